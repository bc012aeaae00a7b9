"""The model where it computes, and one video going through it.

Axes: B batch (1), C channels, T time, H height, W width; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Literal, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longvid.cache import ConvCache
from longvid.errors import ModelError
from longvid.events import Direction
from longvid.memory import DeviceMeter, tensor_bytes
from longvid.models.base import CausalVAE, placed
from longvid.schedule import Chunk
from longvid.step import decode_chunk, encode_chunk, sample_posterior

__all__ = ["DecodeRun", "EncodeRun", "Engine", "Frames", "Representation", "Run", "Times"]

Representation: TypeAlias = Literal["mode", "moments", "sample"]
Frames: TypeAlias = npt.NDArray[np.uint8]
Times: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Engine:
    """The model where it computes."""

    model: CausalVAE
    device: torch.device
    dtype: torch.dtype
    weights_bytes: int

    @classmethod
    def on_device(cls, model: CausalVAE, device: str | torch.device, dtype: torch.dtype | None) -> Engine:
        """Place the model; the one passed in is not touched.

        Raises:
            ModelError: it has no weights, or the device cannot be used.
        """
        module = cast("nn.Module", model)
        first = next(module.parameters(), None)
        if first is None:
            raise ModelError(f"{type(model).__name__} has no parameters; there is nothing to compute with")
        if first.is_meta:
            raise ModelError(
                f"{model.describe().get('name_or_path')!r} is an architecture without weights, good for plans only; "
                "load a folder or a hub id, or pass random_weights=SEED (--random-weights SEED) to try the engine"
            )
        compute = dtype or first.dtype
        where = _resolve_device(device)
        ready = placed(module, where, compute)
        return cls(cast("CausalVAE", ready), where, compute, tensor_bytes(ready))


class Run:
    """One video in one direction: its cache and its meter."""

    direction: ClassVar[Direction]

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = ConvCache(engine.model.encoder if self.direction == "encode" else engine.model.decoder)
        self.meter = DeviceMeter(engine.device, engine.weights_bytes)

    def __enter__(self) -> Self:
        self.cache.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cache.close()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the video's contexts now."""
        return self.cache.nbytes


class EncodeRun(Run):
    """One video on its way to latents."""

    direction = "encode"

    def __init__(self, engine: Engine, representation: Representation, seed: int) -> None:
        super().__init__(engine)
        self.representation = representation
        self.seed = seed

    def moments(self, frames_THWC: Frames) -> Tensor:
        """Padded frames of one chunk to moments (1, 2 c, t, h, w) on the host."""
        host = torch.from_numpy(frames_THWC)
        with self.meter.measure():
            moments = encode_chunk(
                self.engine.model, self.cache, host, device=self.engine.device, dtype=self.engine.dtype
            )
        return _to_host(moments)

    def latents(self, chunk: Chunk, frames_THWC: Frames) -> tuple[Tensor, Tensor | None]:
        """Padded frames to latents (1, c, t, h, w) and, if asked for, moments (1, 2 c, t, h, w), on the host."""
        moments = self.moments(frames_THWC)
        if self.representation == "sample":
            return sample_posterior(moments, seed=self.seed, first_latent=chunk.latent_start), None
        mean = moments.chunk(2, dim=1)[0]
        return mean, moments if self.representation == "moments" else None


class DecodeRun(Run):
    """One video on its way to frames."""

    direction = "decode"

    def __init__(self, engine: Engine, size: tuple[int, int] | None) -> None:
        super().__init__(engine)
        self.size = size

    def frames(self, chunk: Chunk, z_TCHW: npt.NDArray[np.float32]) -> Frames:
        """Latents of one chunk to its true frames (T, H, W, 3) on the host, cropped to size."""
        host = torch.from_numpy(z_TCHW)
        with self.meter.measure():
            frames = decode_chunk(
                self.engine.model, self.cache, host, device=self.engine.device, dtype=self.engine.dtype
            )
        height, width = self.size or frames.shape[1:3]
        return cast("Frames", _to_host(frames).numpy()[: chunk.num_frames, :height, :width])


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, also from the CPU: results wait in queues, and must not count as the device's."""
    return tensor.to("cpu", copy=True)


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator()
        return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, ValueError) as exc:
        raise ModelError(f"device {str(device)!r} cannot be used here: {str(exc).splitlines()[0]}") from exc
    return torch.empty(0, device=where).device

"""The model where it computes, and one video going through it.

Axes: B batch (1), C channels, T time, H height, W width; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longvid.errors import MemoryBudgetError, ModelError, NonFiniteError, SessionStateError
from longvid.events import Direction, Span
from longvid.memory.budget import default_reserved_bytes
from longvid.memory.buffer_pool import BufferPool
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offloader import Offloader
from longvid.memory.tracker import DeviceMeter, is_out_of_memory
from longvid.models.base import CausalVAE
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext, Limits, PreparedWeights
from longvid.models.device import placed, resolve_device, tensor_bytes, weights_digest
from longvid.models.forward import decode_chunk, encode_chunk, sample_posterior
from longvid.models.kernels.convolution import faithful
from longvid.planning.plan import DirectionPlan
from longvid.schedule import Chunk
from longvid.units import format_bytes

__all__ = ["DecodeRun", "EncodeRun", "Engine", "Frames", "ModelGuard", "Representation", "Run", "Times"]

T = TypeVar("T")

Representation: TypeAlias = Literal["mode", "moments", "sample"]
Frames: TypeAlias = npt.NDArray[np.uint8]
Times: TypeAlias = npt.NDArray[np.int64]


class ModelGuard:
    """Notices when a model is not what it was: other weights, another dtype or place, or weights written over.

    Args:
        module: the model as it computes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._state = self._now()
        self._digest: str | None = None

    def _now(self) -> list[tuple[object, ...]]:
        return [
            (name, t.data_ptr(), t.dtype, t.device, tuple(t.shape), None if t.is_inference() else t._version)
            for name, t in (*self._module.named_parameters(), *self._module.named_buffers())
        ]

    def check(self, what: str) -> None:
        """Raise SessionStateError if the model has changed."""
        now = self._now()
        if now != self._state:
            changed = [str(new[0]) for old, new in zip(self._state, now, strict=False) if old != new]
            raise SessionStateError(
                f"{what}: the model was changed since the session was opened (first in "
                f"{changed[0] if changed else 'the number of its parameters'!r}); a result would be half of one model "
                "and half of another. Open a new session"
            )

    @property
    def digest(self) -> str:
        """sha256 over name, dtype, shape and values of all parameters and buffers, as the model computes."""
        if self._digest is None:
            self._digest = weights_digest(self._module)
        return self._digest


@dataclass(frozen=True, slots=True)
class Engine:
    """The model where it computes, and what moves contexts away from there."""

    model: CausalVAE
    device: torch.device
    dtype: torch.dtype
    weights_bytes: int
    copy_engine: CopyEngine
    reserved_bytes: int
    "of the budget, for what a plan cannot see on this device"
    guard: ModelGuard

    @classmethod
    def on_device(
        cls,
        model: CausalVAE,
        device: str | torch.device,
        dtype: torch.dtype | None,
        *,
        offload_dir: Path | None = None,
        reserved_bytes: int | None = None,
    ) -> Engine:
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
        where = resolve_device(device)
        ready = placed(module, where, compute)
        return cls(
            model=cast("CausalVAE", ready),
            device=where,
            dtype=compute,
            weights_bytes=tensor_bytes(ready),
            copy_engine=CopyEngine(where, directory=offload_dir),
            reserved_bytes=default_reserved_bytes(where) if reserved_bytes is None else reserved_bytes,
            guard=ModelGuard(ready),
        )

    def staged(self, frames_THWC: Frames) -> Frames:
        """The same frames where the device fetches them from at its full rate: page-locked memory, for CUDA.

        For the thread that reads ahead, since it is a copy.
        """
        if self.device.type != "cuda":
            return frames_THWC
        locked = torch.empty_like(torch.from_numpy(frames_THWC), pin_memory=True).numpy()
        np.copyto(locked, frames_THWC)
        return cast("Frames", locked)


def context_of(part: DirectionPlan, module: nn.Module, copies: CopyEngine, *, traced: bool = False) -> ForwardContext:
    """The context in which ``module`` runs one video as planned."""
    return ForwardContext(
        ConvCache(module, offloader=Offloader(part.placement, copies, host_sizes=part.host_sizes, traced=traced)),
        BufferPool(keep=part.keeps_buffers),
        PreparedWeights(keep=part.keeps_kernels),
        part.numerics,
        Limits(slice_elements=part.slicing.elements, tile_elements=part.slicing.band_elements),
    )


class Run:
    """One video in one direction: its cache and its meter.

    Args:
        engine: the model where it computes.
        part: the plan of this direction.
        traced: whether the lanes are timed, for :meth:`spans`.
    """

    direction: ClassVar[Direction]

    def __init__(self, engine: Engine, part: DirectionPlan, *, traced: bool = False) -> None:
        self.engine = engine
        self.part = part
        module = engine.model.encoder if self.direction == "encode" else engine.model.decoder
        self.context = context_of(part, module, engine.copy_engine, traced=traced)
        self.cache = self.context.cache
        self.meter = DeviceMeter(engine.device, engine.weights_bytes)
        self._warned = False

    def __enter__(self) -> Self:
        self.context.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.context.close()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the video's contexts now, wherever they are."""
        return self.cache.nbytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the contexts that leave the device between chunks."""
        return self.cache.offloader.offloaded_bytes

    def restore(self, num_chunks: int, contexts: Iterable[tuple[str, Tensor]]) -> None:
        """Stand where another run of the same kind stood after ``num_chunks`` chunks; see :meth:`ConvCache.restore`."""
        self.cache.restore(num_chunks, contexts, self.engine.device)

    def spans(self, origin_seconds: float) -> tuple[Span, ...]:
        """What the lanes did since the last call, timed from ``origin_seconds`` on; empty unless traced."""
        return self.cache.offloader.collect_spans(origin_seconds)

    def _compute(self, step: Callable[[], T]) -> T:
        """Run one chunk under the meter.

        Raises:
            MemoryBudgetError: the device ran out of memory, also with every context on the host.
        """
        index = self.cache.num_chunks
        self.engine.guard.check(f"chunk {index} of {self.direction}")
        try:
            with self.meter.measure(self.cache.device_bytes), faithful(self.engine.device):
                result = step()
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            said = str(exc).splitlines()[0]
        else:
            self._compare_with_plan()
            return result
        # Raised out here, since the frames of the error's traceback hold the chunk's tensors.
        raise MemoryBudgetError(
            f"the device ran out of memory in chunk {index} of {self.direction}: {format_bytes(self._expected_bytes)} "
            f"were planned, {format_bytes(self.meter.peak_bytes)} measured until then{_device_numbers(self.engine)}; "
            f"free memory on the device, or run again with a smaller memory= (--memory) or offload='all' ({said})",
            projected_bytes=self.part.projected_bytes,
            parts=self.part.parts,
        )

    @property
    def _expected_bytes(self) -> int:
        return self.part.projected_bytes + self.engine.reserved_bytes

    def _compare_with_plan(self) -> None:
        measured = self.meter.chunk_peak_bytes or 0
        excess = measured - self._expected_bytes
        if excess > 0 and not self._warned:
            self._warned = True
            planned, reserved = format_bytes(self.part.projected_bytes), format_bytes(self.engine.reserved_bytes)
            warnings.warn(
                f"the measured peak of {format_bytes(measured)} is {format_bytes(excess)} above the plan of {planned} "
                f"and the {reserved} that are reserved for workspaces; lower the budget by that much, or let longvid "
                "tune measure the reserve",
                stacklevel=2,
            )


class EncodeRun(Run):
    """One video on its way to latents."""

    direction = "encode"

    def __init__(
        self, engine: Engine, part: DirectionPlan, representation: Representation, seed: int, *, traced: bool = False
    ) -> None:
        super().__init__(engine, part, traced=traced)
        self.representation = representation
        self.seed = seed

    def moments(self, frames_THWC: Frames) -> Tensor:
        """Padded frames of one chunk to moments (1, 2 c, t, h, w) on the host."""
        host, engine = torch.from_numpy(frames_THWC), self.engine

        def chunk() -> Tensor:
            return encode_chunk(engine.model, self.context, host, device=engine.device, dtype=engine.dtype)

        moments = _to_host(self._compute(chunk))
        if not bool(torch.isfinite(moments).all()):
            raise NonFiniteError(
                f"chunk {self.cache.num_chunks - 1} was encoded to values that are not finite in {engine.dtype}, and "
                "so are its contexts from here on; nothing of it was kept. Compute in float32 or bfloat16 (--dtype), "
                "or replace such frames by their neighbours (--on-non-finite quarantine)",
                chunk=self.cache.num_chunks - 1,
            )
        return moments

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

    def __init__(
        self, engine: Engine, part: DirectionPlan, size: tuple[int, int] | None, *, traced: bool = False
    ) -> None:
        super().__init__(engine, part, traced=traced)
        self.size = size

    def frames(self, chunk: Chunk, z_TCHW: npt.NDArray[np.float32]) -> Frames:
        """Latents of one chunk to its true frames (T, H, W, 3) on the host, cropped to size."""
        host, engine = torch.from_numpy(z_TCHW), self.engine

        def decoded() -> Tensor:
            return decode_chunk(engine.model, self.context, host, device=engine.device, dtype=engine.dtype)

        frames = self._compute(decoded)
        height, width = self.size or frames.shape[1:3]
        return cast("Frames", _to_host(frames).numpy()[: chunk.num_frames, :height, :width])


def _device_numbers(engine: Engine) -> str:
    if engine.device.type in ("cpu", "meta"):
        return ""
    free, total = torch.accelerator.get_memory_info(engine.device)
    return f", {format_bytes(free)} of the device's {format_bytes(total)} are free now"


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, also from the CPU: results wait in queues, and must not count as the device's."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    torch.accelerator.current_stream(tensor.device).synchronize()
    return host

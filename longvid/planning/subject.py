"""A model under examination: a copy that shares its weights, runs in small chunks, and can be looked at for state.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.events import Direction
from longvid.memory.offloader import Offloader
from longvid.models.base import CausalVAE
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext
from longvid.models.device import placed

__all__ = ["Subject", "Watch", "relative_difference", "state_of"]

_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "training"}
_DEEPEST = 5
"levels of containers in an attribute that are looked into"


class Watch(Offloader):
    """Keeps every context on the device and counts the layers; at layer number ``stop_at`` it raises ``stop_with``."""

    def __init__(self, stop_at: int | None = None, stop_with: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.opened, self.layer = 0, ""
        self._stop_at, self._stop_with = stop_at, stop_with

    def open(self, path: str) -> Tensor | None:
        """As the base class does."""
        self.opened, self.layer = self.opened + 1, path
        if self.opened == self._stop_at:
            raise self._stop_with
        return super().open(path)


class Subject:
    """A copy of a model in one dtype. Nothing that is done to it is seen in the model.

    Raises:
        ModelError: the model is no torch module, cannot be copied, or has no weights.
    """

    def __init__(self, model: CausalVAE, dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"{type(model).__name__} is not a torch module, so it cannot be checked")
        shared: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
        if any(weight.is_meta for weight in (*model.parameters(), *model.buffers())):
            raise ModelError(f"{type(model).__name__} has no weights: they are on the meta device; load some first")
        try:
            module = copy.deepcopy(cast("nn.Module", model), shared)
        except Exception as exc:  # of any attribute of a module that we do not know
            raise ModelError(f"{type(model).__name__} cannot be copied, so it cannot be checked: {exc}") from exc
        self.device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        self.dtype, self._original = dtype, model
        self.module = placed(module, self.device, dtype)
        self.model = cast("CausalVAE", self.module)
        self.geometry = self.model.geometry

    def fresh(self, dtype: torch.dtype | None = None) -> Subject:
        """Another copy, for which no video has run; in the same dtype unless another one is given."""
        return Subject(self._original, dtype or self.dtype)

    def half(self, direction: Direction) -> nn.Module:
        """The encoder or the decoder."""
        return self.model.encoder if direction == "encode" else self.model.decoder

    def video(self, direction: Direction, num_latents: int, *, side: int = 2, seed: int = 0, std: float = 1) -> Tensor:
        """Noise (1, C, T, H, W) of ``side`` x ``side`` latents: pixels in [-1, 1], or latents of this deviation."""
        generator = torch.Generator().manual_seed(seed)
        if direction == "decode":
            x = torch.randn((1, self.geometry.latent_channels, num_latents, side, side), generator=generator) * std
        else:
            size = side * self.geometry.pixels_per_latent
            num_frames = 1 + (num_latents - 1) * self.geometry.frames_per_latent
            x = torch.rand((1, 3, num_frames, size, size), generator=generator) * 2 - 1
        return x.to(self.device, self.dtype)

    def pieces(self, direction: Direction, x: Tensor, cut: Sequence[int]) -> tuple[Tensor, ...]:
        """A video in chunks of so many latents, the first of which has the frame that stands alone."""
        if direction == "encode":
            f = self.geometry.frames_per_latent
            cut = [n * f - (f - 1) * (i == 0) for i, n in enumerate(cut)]
        return torch.split(x, list(cut), dim=2)

    def context(self, direction: Direction, offloader: Offloader | None = None) -> ForwardContext:
        """The plainest context, to be entered."""
        return ForwardContext(ConvCache(self.half(direction), offloader=offloader))

    @torch.inference_mode()
    def step(self, direction: Direction, piece: Tensor, context: ForwardContext) -> Tensor:
        """One chunk. The input is copied, as models may take it over."""
        return (self.model.encode if direction == "encode" else self.model.decode)(piece.clone(), context)

    def run(
        self,
        direction: Direction,
        x: Tensor,
        cut: Sequence[int],
        *,
        offloader: Offloader | None = None,
        mode: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """A whole video, chunk after chunk; every chunk inside ``mode``."""
        with self.context(direction, offloader) as context, mode or nullcontext():
            return torch.cat([self.step(direction, piece, context) for piece in self.pieces(direction, x, cut)], dim=2)


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference by norm of what is expected; ModelError if the shapes differ."""
    if got.shape != expected.shape:
        raise ModelError(f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((got.double() - expected.double()).norm() / scale)


def state_of(module: nn.Module) -> dict[str, Any]:
    """A fingerprint of every weight, buffer and other attribute of all modules, by its path."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    found.update(_fingerprint(f"{prefix}{key}", tensor, 0))
            elif name not in _OWN:
                found.update(_fingerprint(f"{prefix}{name}", value, 0))
    return found


def _fingerprint(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        content = None if value.is_meta else zlib.crc32(_bytes_of(value))
        yield path, (value.dtype, tuple(value.shape), content)
    elif isinstance(value, np.ndarray):
        yield path, (str(value.dtype), value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes()))
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        yield path, value
    elif isinstance(value, nn.Module) or depth == _DEEPEST:
        yield path, id(value)
    elif isinstance(value, Mapping):
        yield path, len(value)
        for key, entry in value.items():
            yield from _fingerprint(f"{path}[{key!r}]", entry, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield path, len(value)
        for number, entry in enumerate(value):
            yield from _fingerprint(f"{path}[{number}]", entry, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        for name, entry in vars(value).items():
            yield from _fingerprint(f"{path}.{name}", entry, depth + 1)
    else:
        yield path, id(value)


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data

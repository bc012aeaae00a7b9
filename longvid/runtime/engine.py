"""Engine: the model where it computes, and the guard that notices when it is changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from longvid import __version__
from longvid.environment import kernels_of
from longvid.errors import ModelError, SessionStateError
from longvid.frames import Frames
from longvid.memory.budget import default_reserved_bytes
from longvid.memory.copy_engine import CopyEngine
from longvid.models.base import CausalVAE
from longvid.models.device import placed, resolve_device, tensor_bytes, weights_digest
from longvid.models.numerics import Numerics
from longvid.planning.profile import ProfileScope
from longvid.store.format import FORMAT_VERSION

__all__ = ["Engine", "ModelGuard"]


class ModelGuard:
    """Notices that a model was changed: other weights, another dtype or device, or weights written in place."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._state = self._now()

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
                f"{changed[0] if changed else 'the number of its parameters'!r}); the result would mix two "
                "models. Open a new session"
            )

    @cached_property
    def digest(self) -> str:
        """sha256 over name, dtype, shape and values of all parameters and buffers, as the model computes."""
        return weights_digest(self._module)


@dataclass(frozen=True, slots=True)
class Engine:
    """The model where it computes, and what moves contexts away from there."""

    model: CausalVAE
    device: torch.device
    dtype: torch.dtype
    weights_bytes: int
    copy_engine: CopyEngine
    reserved_bytes: int
    "part of the budget that is kept for memory which a plan cannot see on this device"
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
        """Place the model; the one passed in is not touched. ModelError without weights, or for an unknown device."""
        module = cast("nn.Module", model)
        first = next(module.parameters(), None)
        if first is None:
            raise ModelError(f"{type(model).__name__} has no parameters; there is nothing to compute with")
        if first.is_meta:
            raise ModelError(
                f"{model.describe().get('name_or_path')!r} is an architecture without weights, good for plans only; "
                "load a folder or a hub id, or pass random_weights=SEED (--random-weights SEED) to try the engine"
            )
        compute, where = dtype or first.dtype, resolve_device(device)
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

    @property
    def dtype_name(self) -> str:
        """The compute dtype as it is recorded, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def fingerprint(self, numerics: Numerics, num_threads: int | None) -> dict[str, Any]:
        """The part of a run's fingerprint that the model and the way it computes decide."""
        facts = self.model.describe()
        return {
            "model": {name: facts.get(name) for name in ("class_name", "config")} | {"weights": self.guard.digest},
            "compute": {
                "dtype": self.dtype_name,
                "kernels": kernels_of(str(self.device)),
                "numerics": numerics.to_dict(),
                **({} if num_threads is None else {"threads": num_threads}),
                "torch": str(torch.__version__),
                "longvid": __version__,
                "format": FORMAT_VERSION,
            },
        }

    def scope(self, size: tuple[int, int]) -> ProfileScope:
        """The setting that a profile has to be measured in for frames of this height and width."""
        height, width = size
        return ProfileScope.of(self.model, height=height, width=width, dtype=self.dtype, device=self.device)

    def staged(self, frames_THWC: Frames) -> Frames:
        """The same frames in memory that the device can copy from at its full rate: page-locked memory, for CUDA.

        This is a copy, so the thread that reads ahead calls it.
        """
        if self.device.type != "cuda":
            return frames_THWC
        locked = torch.empty_like(torch.from_numpy(frames_THWC), pin_memory=True).numpy()
        np.copyto(locked, frames_THWC)
        return cast("Frames", locked)

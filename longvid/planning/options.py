"""Options: what a user asks of the computation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from longvid.errors import ModelError, ScheduleError
from longvid.events import Direction
from longvid.memory.budget import default_reserved_bytes
from longvid.memory.offload import OffloadPolicy
from longvid.models.device import resolve_device
from longvid.models.numerics import Layout, Numerics
from longvid.planning.cost_model import DeviceRates
from longvid.planning.profile import Profile
from longvid.planning.workload import Tiling

__all__ = ["ComputeOptions", "default_dtype", "parse_dtype", "planned_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeOptions:
    """What a user asked for; see :class:`longvid.VideoSession`. None leaves a choice to the plan."""

    dtype: torch.dtype | None = None
    layout: Layout | None = None
    paired_frames: bool | None = None
    numerics: Numerics | None = None
    "numerics of a run that is resumed, where the user left the choice"
    chunk_frames: int | None = None
    first_frames: int | None = None
    "frames of the first chunk of a video that is cut by the reference plan"
    slice_frames: int | None = None
    tiling: Tiling | None = field(default=None, hash=False)
    "slices and row tiles of a run that is resumed, taken up where they fit"
    offload: OffloadPolicy = field(default_factory=OffloadPolicy)
    allowed_bytes: int | None = None
    reserved_bytes: int | None = None
    keep_buffers: bool = True
    "whether buffers may be kept from chunk to chunk; push mode keeps none"
    profile: Profile | None = field(default=None, hash=False)
    default_rates: DeviceRates = field(default_factory=DeviceRates)
    "rates of the device where no profile has measured them"

    def __post_init__(self) -> None:
        if self.slice_frames is not None and self.slice_frames < 1:
            raise ScheduleError(f"slices of {self.slice_frames} frames were asked for; one frame is the least")

    def policy(self, direction: Direction) -> OffloadPolicy:
        """The threshold of the profile where neither a policy nor a budget was asked for."""
        part = self._tuned(direction)
        return self.offload if part is None else part.policy

    def slices(self, direction: Direction) -> int | None:
        """Frames of a slice as asked for, or as the profile found them."""
        part = self._tuned(direction)
        return self.slice_frames if part is None or self.slice_frames is not None else part.slice_frames

    def rates(self, direction: Direction) -> DeviceRates:
        """The measured rates of the profile, if there is one."""
        if self.profile is None:
            return self.default_rates
        parts = self.profile.directions
        return parts.get(direction, next(iter(parts.values()))).rates

    def reserved_on(self, device: torch.device) -> int:
        """The reserve as asked for, as the profile found it, or the usual one of the device."""
        if self.reserved_bytes is not None:
            return self.reserved_bytes
        return default_reserved_bytes(device) if self.profile is None else self.profile.reserved_bytes

    def _tuned(self, direction: Direction) -> Any:
        if self.profile is None or self.offload.kind != "auto" or self.allowed_bytes is not None:
            return None
        return self.profile.directions.get(direction)


def planned_device(device: str | torch.device) -> tuple[torch.device, bool]:
    """The device to plan for, which need not exist here, and whether it does.

    Raises:
        ModelError: there is no such kind of device.
    """
    try:
        return resolve_device(device), True
    except ModelError:
        try:
            return torch.device(device), False
        except RuntimeError as exc:
            raise ModelError(f"device {device!r} is not known; choose auto, cpu, cuda, cuda:1, ...") from exc


def default_dtype(source: object, device: torch.device) -> torch.dtype | None:
    """The dtype for a model if none was asked for.

    A model that is given by name computes in float32 on a CPU and in bfloat16 on an accelerator. A model that is given
    as an object computes in the dtype of its weights: None.
    """
    if not isinstance(source, (str, Path)):
        return None
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"bfloat16"``, ``"float16"`` or ``"float32"`` as a torch dtype; None stays None.

    Raises:
        ModelError: another dtype.
    """
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype is None or dtype in known.values():
        return cast("torch.dtype | None", dtype)
    if dtype not in known:
        raise ModelError(f"dtype {dtype!r} is not supported; choose {', '.join(known)}")
    return known[str(dtype)]

"""MemoryBudget: how many device bytes a session may use, and the error that says what does not fit.

* **allowed**: what the user grants.
* **reserved**: the part of the budget for what no dry run can see, such as workspaces inside kernels.
* **projected**: the peak that a dry run on ``meta`` tensors gives.
* **peak**: what a run really used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from longvid.errors import MemoryBudgetError
from longvid.units import format_bytes

__all__ = ["MemoryBudget", "default_reserved_bytes"]

_ACCELERATOR_RESERVED_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """How many device bytes a video may use beside others; ``allowed_bytes=None`` is no limit."""

    allowed_bytes: int | None = None
    reserved_bytes: int = 0
    held_bytes: int = 0
    "contexts of other open videos that are on the device while this one computes"
    idle_limit_bytes: int | None = None
    "most bytes of contexts that the video may have on the device between chunks"

    def fits(self, needed_bytes: int) -> bool:
        """Whether ``needed_bytes`` are within the limit, beside the reserve and what others hold."""
        left = self.left(needed_bytes)
        return left is None or left >= 0

    def left(self, needed_bytes: int) -> int | None:
        """What remains beside ``needed_bytes``; None if there is no limit."""
        if self.allowed_bytes is None:
            return None
        return self.allowed_bytes - self.reserved_bytes - self.held_bytes - needed_bytes

    def check(self, needed_bytes: int, parts: Mapping[str, int], what: str, would_fit: Sequence[str] = ()) -> None:
        """Raise MemoryBudgetError if ``needed_bytes``, weights included, do not fit.

        The message says ``what`` was to be done, what the bytes are made of, and which settings are known to fit.
        """
        if self.allowed_bytes is None or self.fits(needed_bytes):
            return
        if self.held_bytes:
            parts = {**parts, "contexts of other open videos": self.held_bytes}
        projected_bytes = needed_bytes + self.held_bytes
        listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        reserve = f", of which {format_bytes(self.reserved_bytes)} are reserved" if self.reserved_bytes else ""
        advice = "raise the budget, choose a smaller frame size or a narrower dtype"
        if would_fit:
            advice = f"what would fit: {'; or '.join(would_fit)}"
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(projected_bytes)} ({listing}) and "
            f"{format_bytes(self.allowed_bytes)} are allowed{reserve}; {advice}",
            projected_bytes=projected_bytes,
            allowed_bytes=self.allowed_bytes,
            parts=parts,
        )


def default_reserved_bytes(device: torch.device) -> int:
    """What is set aside for workspaces and the allocator's rounding until a profile says what they really take.

    On a CPU a plan sees all that a budget counts. On an accelerator half a GiB is an assumption; ``longvid tune``
    replaces it by a measurement.
    """
    return 0 if device.type in ("cpu", "meta") else _ACCELERATOR_RESERVED_BYTES

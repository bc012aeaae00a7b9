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
    """How many device bytes a session may use; ``allowed_bytes=None`` is no limit."""

    allowed_bytes: int | None = None
    reserved_bytes: int = 0

    def fits(self, needed_bytes: int) -> bool:
        """Whether ``needed_bytes`` and the reserve are within the limit."""
        left = self.left(needed_bytes)
        return left is None or left >= 0

    def left(self, needed_bytes: int) -> int | None:
        """What remains for others beside ``needed_bytes`` and the reserve; None if there is no limit."""
        return None if self.allowed_bytes is None else self.allowed_bytes - self.reserved_bytes - needed_bytes

    def check(self, projected_bytes: int, parts: Mapping[str, int], what: str, would_fit: Sequence[str] = ()) -> None:
        """Raise MemoryBudgetError if ``projected_bytes`` and the reserve do not fit.

        Args:
            projected_bytes: the peak of the run, weights included.
            parts: what it is made of, for the message.
            what: what was to be done, for the message.
            would_fit: settings that are known to fit, for the message.
        """
        if self.allowed_bytes is None or self.fits(projected_bytes):
            return
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

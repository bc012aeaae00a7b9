"""Durability: when what a run has computed is safe, and from what. Values; nothing here touches a disk.

Two things are written while a run goes on. Its results are **published** in steps: a step is on the disk before it is
visible. And the state that the next chunk leans on, the contexts, is saved in **snapshots**, from which a run that
ended early goes on. Neither changes a bit of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from longvid.errors import StoreError

__all__ = ["Durability", "DurabilityMode", "parse_durability"]

DurabilityMode: TypeAlias = Literal["fsync", "rename"]

_SECONDS_BETWEEN_FAILURES = 24 * 3600.0
_LARGEST_SHARE = 0.01
"of a run that snapshots may take, however often it fails"
_SOONEST_SECONDS = 5.0
"the cost of the first snapshot is not known before it was taken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """What a run survives, and how much work it may lose.

    Args:
        mode: ``"fsync"`` survives power loss and crashes of the machine; ``"rename"`` saves the time to wait for the
            disk, and survives the death of the process only.
        publish_seconds: publish when this much time has passed since the last step; 0 for every unit of the store.
        publish_units: publish when this many units wait, however little time has passed; None for no such limit.
        snapshot_seconds: time between two snapshots; None to choose it from what a snapshot costs; infinite for none.
        keep_snapshots: keep every snapshot, also when the run is complete, so that a repair has less to compute.
    """

    mode: DurabilityMode = "fsync"
    publish_seconds: float = 1.0
    publish_units: int | None = None
    snapshot_seconds: float | None = None
    keep_snapshots: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(DurabilityMode):
            raise StoreError(
                f"durability {self.mode!r} is not known; choose {' or '.join(get_args(DurabilityMode))}", kind="format"
            )
        for name in ("publish_seconds", "snapshot_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds >= 0:
                raise StoreError(f"{name}={seconds} is not a time; give seconds from 0 up", kind="format")
        if self.publish_units is not None and self.publish_units < 1:
            raise StoreError(f"publish_units={self.publish_units} publishes nothing; give 1 or more", kind="format")

    @property
    def syncs(self) -> bool:
        """Whether to wait for the disk."""
        return self.mode == "fsync"

    def publish_due(self, *, seconds: float, units: int) -> bool:
        """Whether ``units`` that wait are to be published, ``seconds`` after the last time."""
        return seconds >= self.publish_seconds or (self.publish_units is not None and units >= self.publish_units)

    def snapshot_interval(self, cost_seconds: float | None) -> float:
        """Seconds of work between two snapshots, if one takes ``cost_seconds``; None while that is unknown.

        The work lost at a failure and the time spent on snapshots are together least at ``sqrt(2 c M)`` for a mean
        time M between failures (Young, 1974), here a day; a floor keeps their share of the run below one percent.
        """
        if self.snapshot_seconds is not None:
            return self.snapshot_seconds
        if cost_seconds is None:
            return _SOONEST_SECONDS
        return max(
            _SOONEST_SECONDS, math.sqrt(2 * cost_seconds * _SECONDS_BETWEEN_FAILURES), cost_seconds / _LARGEST_SHARE
        )


def parse_durability(value: str | Durability) -> Durability:
    """A mode by name, or a value as it is.

    Raises:
        StoreError: kind ``"format"`` if there is no such mode.
    """
    return value if isinstance(value, Durability) else Durability(mode=cast("DurabilityMode", value))

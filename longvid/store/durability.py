"""Owns how results are written: when they are durable, and what may be replaced or resumed. Values without effects.

A run writes two things. Its results are **committed** in steps: a step is on the disk before it is visible. The state
that the next chunk needs, the contexts, is saved in **snapshots**, from which an interrupted run resumes. Neither
changes a bit of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, get_args

from longvid.errors import StoreError

__all__ = ["Durability", "DurabilityMode", "WriteOptions", "parse_durability"]

DurabilityMode: TypeAlias = Literal["fsync", "rename"]

_SECONDS_BETWEEN_FAILURES = 24 * 3600.0
_LARGEST_SHARE = 0.01
"largest share of a run that snapshots may take, however often it fails"
_SOONEST_SECONDS = 5.0
"time before the first snapshot, whose cost is not known in advance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """What a run survives, and how much work can be lost.

    Args:
        mode: ``"fsync"`` survives power loss and crashes of the machine; ``"rename"`` saves the time to wait for the
            disk, and survives the death of the process only.
        publish_seconds: commit when this much time has passed since the last commit; 0 for every unit of the store.
        publish_units: commit when this many units wait, however little time has passed; None for no such limit.
        snapshot_seconds: time between two snapshots; None to choose it from what a snapshot costs; infinite for none.
        keep_snapshots: keep every snapshot, even when the run is complete, so that a repair has less to compute.
        lock: lock the store against other runs. False for a file system without locks; you make sure then that one
            run writes at a time.
    """

    mode: DurabilityMode = "fsync"
    publish_seconds: float = 1.0
    publish_units: int | None = None
    snapshot_seconds: float | None = None
    keep_snapshots: bool = False
    lock: bool = True

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
            raise StoreError(f"publish_units={self.publish_units} commits nothing; give 1 or more", kind="format")

    @property
    def syncs(self) -> bool:
        """Whether to wait for the disk."""
        return self.mode == "fsync"

    def commit_due(self, *, seconds: float, units: int) -> bool:
        """Whether to commit ``units`` that wait, ``seconds`` after the last commit."""
        return seconds >= self.publish_seconds or (self.publish_units is not None and units >= self.publish_units)

    def snapshot_interval(self, cost_seconds: float | None) -> float:
        """Seconds of work between two snapshots, if one takes ``cost_seconds``; None while that is unknown.

        The work lost at a failure and the time spent on snapshots are least together at ``sqrt(2 c M)`` for a mean
        time M between failures (Young, 1974), here a day; a lower bound keeps their share of the run below one percent.
        """
        if self.snapshot_seconds is not None:
            return self.snapshot_seconds
        if cost_seconds is None:
            return _SOONEST_SECONDS
        return max(
            _SOONEST_SECONDS, math.sqrt(2 * cost_seconds * _SECONDS_BETWEEN_FAILURES), cost_seconds / _LARGEST_SHARE
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What a writer may replace or resume, and when its results are durable.

    Args:
        durability: when results are durable.
        overwrite: replace an existing longvid store, unless it is an unfinished one that can be resumed.
        resume: resume an unfinished store with the same fingerprint.
        mend: numbers of committed units whose data are written again, in a store with the same fingerprint, finished
            or not. Nothing else is written then, and data that differ from the committed digests are an error.
    """

    durability: Durability = field(default_factory=Durability)
    overwrite: bool = False
    resume: bool = True
    mend: frozenset[int] = frozenset()


def parse_durability(value: str | Durability) -> Durability:
    """Durability by the name of its mode, or as it is given."""
    return value if isinstance(value, Durability) else Durability(mode=cast("DurabilityMode", value))

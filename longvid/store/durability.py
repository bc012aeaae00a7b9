"""Owns how results are written: when they are durable, and what may be replaced or resumed. Values without effects.

Results are **committed** in steps: a step is on the disk before it is visible. An interrupted run resumes behind the
last commit. Neither changes a bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, get_args

from longvid.errors import StoreError

__all__ = ["Durability", "DurabilityMode", "Resume", "WriteOptions", "parse_durability"]

DurabilityMode: TypeAlias = Literal["fsync", "rename"]

Resume: TypeAlias = Literal["exact", "close", "never"]
"""how an unfinished store is continued: only if the run reproduces the end of what is stored, bit for bit; also if it
does not, with a record of where the results change; or not at all"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """What a run survives, and how much work can be lost.

    Args:
        mode: ``"fsync"`` survives power loss and crashes of the machine; ``"rename"`` saves the time to wait for the
            disk, and survives the death of the process only.
        publish_seconds: commit when this much time has passed since the last commit; 0 for every unit of the store.
        publish_units: commit when this many units wait, however little time has passed; None for no such limit.
        lock: lock the store against other runs. False for a file system without locks; you make sure then that one
            run writes at a time.
    """

    mode: DurabilityMode = "fsync"
    publish_seconds: float = 1.0
    publish_units: int | None = None
    lock: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(DurabilityMode):
            raise StoreError(
                f"durability {self.mode!r} is not known; choose {' or '.join(get_args(DurabilityMode))}", kind="format"
            )
        if not self.publish_seconds >= 0:
            raise StoreError(
                f"publish_seconds={self.publish_seconds} is not a time; give seconds from 0 up", kind="format"
            )
        if self.publish_units is not None and self.publish_units < 1:
            raise StoreError(f"publish_units={self.publish_units} commits nothing; give 1 or more", kind="format")

    @property
    def syncs(self) -> bool:
        """Whether to wait for the disk."""
        return self.mode == "fsync"

    def commit_due(self, *, seconds: float, units: int) -> bool:
        """Whether to commit ``units`` that wait, ``seconds`` after the last commit."""
        return seconds >= self.publish_seconds or (self.publish_units is not None and units >= self.publish_units)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What a writer may replace or resume, and when its results are durable.

    Args:
        durability: when results are durable.
        overwrite: replace an existing longvid store, unless it is an unfinished one that can be resumed.
        resume: how an unfinished store with the same fingerprint is continued.
        mend: numbers of committed units whose data are written again, in a store with the same fingerprint, finished
            or not. Nothing else is written then, and data that differ from the committed digests are an error.
    """

    durability: Durability = field(default_factory=Durability)
    overwrite: bool = False
    resume: Resume = "exact"
    mend: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.resume not in get_args(Resume):
            raise StoreError(
                f"resume {self.resume!r} is not known; choose {', '.join(get_args(Resume))}", kind="format"
            )


def parse_durability(value: str | Durability) -> Durability:
    """Durability by the name of its mode, or as it is given."""
    return value if isinstance(value, Durability) else Durability(mode=cast("DurabilityMode", value))

"""Maps the time stamps of a file onto one clock that rises strictly from frame to frame.

Stamps begin again where recordings were joined and where the 33 bits of a transport stream overflow; they come twice
where a container keeps milliseconds and a camera is faster; raw streams have none. Behind a frame with a stamp, the
clock depends on the header of the file, on that frame and its time, and on one offset. So a run that continues at a
seek point, which has both, gives the same times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from longvid.frames import Times

__all__ = ["MOST_JOINTS", "Clock", "Joint"]

MOST_JOINTS = 1000
"so many are recorded"

_MOST_SECONDS = 10
"a transport stream whose clock jumps farther ahead was joined there"
_OVERFLOW = 2**33


@dataclass(frozen=True, slots=True)
class Joint:
    """Where the time stamps of a file do not continue."""

    frame: int
    before: int
    "the stamp of the frame before, in units of the file's own time base"
    after: int


class Clock:
    """Gives every frame its time, in units of ``time_base``.

    Args:
        time_base: seconds per unit of the stamps in the file.
        frame_rate: mean frames per second, for the distance of frames where nothing else tells it.
        transport: the stamps are those of an MPEG transport or program stream.
        without_stamps: the first frame of the file has none; frames are counted, and the unit of the clock is a frame.
    """

    def __init__(
        self, time_base: Fraction, frame_rate: Fraction, *, transport: bool = False, without_stamps: bool = False
    ) -> None:
        per_unit = frame_rate * time_base
        self.scale = 1
        "units of the clock for a unit of the file, so that each frame of a fast camera has its own"
        if per_unit > 1:
            self.scale = int(per_unit) if per_unit.denominator == 1 else 16 * math.ceil(per_unit)
        self.time_base = 1 / frame_rate if without_stamps else time_base / self.scale
        self._step = 1 / (frame_rate * self.time_base)
        self.step = max(1, int(self._step))
        "whole units from one frame to the next at the mean rate"
        self._transport, self._counts = transport, without_stamps
        self._most = int(_MOST_SECONDS / self.time_base)
        self.offset = 0
        "units that are added to the stamps of the file since the last joint"
        self._before: int | None = None
        "the last stamp of the file"
        self._last: int | None = None
        "the last time"
        self._anchor, self._since_anchor = 0, -1
        self._duration = 0
        self.joint: tuple[int, int] | None = None
        "the stamps before and after a joint that lies right before the last frame"
        self._given: int | None = None
        "the time of the next frame, if it is known already"

    def first(self, pts: int | None) -> int:
        """The time of a frame whose stamp is the first one."""
        return 0 if pts is None or self._counts else pts * self.scale

    def stamp(self, pts: int | None, duration: int = 0) -> int:
        """Time of the next frame, whose stamp and duration in the file are these; None and 0 if it gives none."""
        self.joint = None
        if pts is None or self._counts:
            self._since_anchor += 1
            time = self._anchor + round(self._since_anchor * self._step)
            time = time if self._last is None else max(time, self._last + 1)
        else:
            time = self._mapped(pts) if self._given is None else self._given
            self._given = None
            self._anchor, self._since_anchor, self._before = time, 0, pts
        self._last, self._duration = time, duration * self.scale
        return time

    def keeps(self, stamps: Times) -> bool:
        """Whether frames with these stamps, in their order, have them as times."""
        jumps = self._transport and len(stamps) > 1 and int(np.diff(stamps).max()) > self._most
        return self.scale == 1 and not jumps

    def restart(self, time: int, offset: int) -> None:
        """Continue at a frame that has this time, with the offset of that place."""
        self.offset, self._given = offset, time

    def _mapped(self, pts: int) -> int:
        scaled = pts * self.scale
        time, last, before = scaled + self.offset, self._last, self._before
        if last is None or before is None:
            return time if last is None else max(time, last + 1)
        if self._transport and 0 < time + _OVERFLOW * self.scale - last <= self._most:
            self.offset += _OVERFLOW * self.scale
        elif pts < before or (self._transport and time - last > self._most):
            self.joint = before, pts
            self.offset = last + (self._duration or self.step) - scaled
        elif pts == before:
            return max(time, last + (self.step if self.scale > 1 else 1))
        return max(scaled + self.offset, last + 1)

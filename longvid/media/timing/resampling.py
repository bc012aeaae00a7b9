"""Another frame rate by time stamps: every frame that comes out is the one that the source shows at its instant."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Instants", "resampled"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Instants:
    """The instants n / ``fps``, n = 0, 1, ..., on the clock of a source."""

    fps: Fraction
    time_base: Fraction = Fraction(1)
    "seconds per unit of the clock"
    first: int = 0
    "when the first frame is shown, in units of the clock; that is instant 0"

    def of(self, number: int) -> Fraction:
        """One of them, in units of the clock."""
        return self.first + number / (self.fps * self.time_base)

    def before(self, time: int) -> int:
        """How many lie before a time of the clock."""
        return max(0, math.ceil((time - self.first) * self.time_base * self.fps))

    def shown(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The frame that is shown at each of the instants from ``start`` to ``stop``, if the clock counts frames."""
        return np.array([math.floor(self.of(number)) for number in range(start, stop)], np.int64)


def resampled(
    frames: Iterator[tuple[T, int, bool]], instants: Instants, number: int, last_duration: Callable[[], int]
) -> Generator[tuple[T, int, bool], None, int]:
    """The frames that are shown at the instants from ``number`` on, each with the number of its instant and its mark.

    ``frames`` come with their times, and marks, from one on that is shown at the first instant or before it. The last
    one is shown for ``last_duration``, which is asked for after it, in units of the clock. The generator returns the
    number of all instants.
    """
    held: tuple[T, bool] | None = None
    time = 0
    for frame, time, valid in frames:
        stop = instants.before(time)
        while held is not None and number < stop:
            yield held[0], number, held[1]
            number += 1
        held = frame, valid
        del frame
    stop = 0 if held is None else instants.before(time + last_duration())
    while held is not None and number < stop:
        yield held[0], number, held[1]
        number += 1
    return stop

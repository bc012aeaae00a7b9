"""What flows between a source of frames and the engine.

Axes: T time, H height, W width. Frames are always uint8 RGB, ``frames_THWC`` with three channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

__all__ = ["ColorInfo", "FrameBlock", "FrameSource", "SourceInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColorInfo:
    """How the source's samples were read as RGB, or are to be written."""

    matrix: str
    "``bt601``, ``bt709``, ``bt2020`` or ``rgb``"
    range: str
    "``limited`` or ``full``"
    primaries: str | None = None
    transfer: str | None = None
    assumed: bool = False
    "the file did not say and the rule decided: bt709 from 720 lines up, bt601 below; limited range"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What is known of a video before its first frame is read."""

    kind: str
    "``video``, ``array`` or ``iterable``"
    name: str
    "path of the file, or a word for what has none"
    height: int
    width: int
    "size of the frames that come out: rotation and resize applied"
    num_frames: int | None
    "frames that will come out; None if unknown. Of a file it is what the header claims: a hint"
    time_base: Fraction
    "seconds per unit of the time stamps"
    frame_rate: Fraction | None
    "mean frames per second, None if unknown"
    timing_assumed: bool = False
    "the source has no time stamps; they were counted at ``frame_rate``"
    color: ColorInfo | None = None
    details: dict[str, Any] | None = None
    "further facts for the record, ready for JSON: codec, size in file, rotation, resize, bytes, ..."


@dataclass(frozen=True, slots=True)
class FrameBlock:
    """Some consecutive frames."""

    frames_THWC: npt.NDArray[np.uint8]
    pts_T: npt.NDArray[np.int64]
    "time stamps in units of the source's time base, in decoder order"


class FrameSource(Protocol):
    """Frames of one video, read once from front to back, in blocks of any length.

    ``blocks`` may be called once. ``close`` may be called at any time, also twice, also from another thread than
    the one that iterates once that one has stopped.
    """

    @property
    def info(self) -> SourceInfo:
        """Facts known in advance."""
        ...

    def blocks(self) -> Iterator[FrameBlock]:
        """Yield the frames. Raises SourceError where they cannot be read."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

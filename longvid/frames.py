"""Frames: the types that sources of frames and the engine share.

Axes: T time, H height, W width. Frames are always uint8 RGB, ``frames_THWC`` with three channels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "ColorInfo",
    "Deinterlace",
    "Fit",
    "FrameBlock",
    "Frames",
    "Marks",
    "OnError",
    "Pixels",
    "SourceInfo",
    "Times",
    "frame_digest",
]

Frames: TypeAlias = npt.NDArray[np.uint8]
Times: TypeAlias = npt.NDArray[np.int64]
Marks: TypeAlias = npt.NDArray[np.bool_]
"False for a frame whose pixels are not those of the source: it repeats the last good one"

OnError: TypeAlias = Literal["stop", "keep", "conceal"]
"what happens where a file is damaged: an error, the end, or the last good frame in place of the damage"

Fit: TypeAlias = Literal["stretch", "crop", "pad"]
"how frames of another shape come to the size that was asked for"
Pixels: TypeAlias = Literal["kept", "square"]
"whether frames whose pixels are not square are resampled to their display shape"
Deinterlace: TypeAlias = Literal["auto", "off"]
"whether frames that consist of two fields are made whole"


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
    "``video``, ``pictures``, ``pipe``, ``array`` or ``iterable``"
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
    sample_aspect_ratio: Fraction = Fraction(1)
    "width of a pixel by its height, of the frames that come out"
    details: dict[str, Any] | None = None
    "further facts for the record, ready for JSON: codec, size in file, rotation, resize, bytes, ..."


@dataclass(frozen=True, slots=True)
class FrameBlock:
    """Some consecutive frames."""

    frames_THWC: Frames
    pts_T: Times
    "time stamps in units of the source's time base, in decoder order"
    valid_T: Marks

    @classmethod
    def whole(cls, frames_THWC: Frames, pts_T: Times) -> FrameBlock:
        """A block of frames that are all the source's own."""
        return cls(frames_THWC, pts_T, np.ones(len(pts_T), np.bool_))

    def first(self, count: int) -> FrameBlock:
        """The first frames alone."""
        return FrameBlock(self.frames_THWC[:count], self.pts_T[:count], self.valid_T[:count])


def frame_digest(frame_HWC: npt.NDArray[np.uint8]) -> str:
    """sha256 of a frame's RGB bytes in C order, in hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(frame_HWC).data).hexdigest()

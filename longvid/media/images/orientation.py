"""How decoded pictures are turned and mirrored so that they stand upright."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame

if TYPE_CHECKING:
    from longvid.media.decoding.decoder import Picture

__all__ = ["UPRIGHT", "Orientation", "OrientationTracker", "is_between", "orientation_of"]

_MATRIX = struct.Struct("=9i")
_ONE_DEGREE = math.tan(math.radians(1))


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight ways in which a picture can lie."""

    turns: int = 0
    "quarter turns counterclockwise, 0 to 3"
    mirrored: bool = False
    "the picture is mirrored left to right before it is turned"

    def upright(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A view of a picture (H, W, ...) as it is shown."""
        return np.rot90(image[:, ::-1] if self.mirrored else image, self.turns)

    def turned(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) after the turn; the same function leads back."""
        return (size[1], size[0]) if self.turns % 2 else size

    @classmethod
    def from_exif(cls, number: int) -> Orientation:
        """From the number that EXIF has for it, 1 to 8."""
        return cls(*_EXIF[number - 1])

    @classmethod
    def from_matrix(cls, data: bytes) -> Orientation:
        """From a display matrix of nine numbers, by rows; an angle in between is rounded to a quarter turn."""
        if len(data) != _MATRIX.size:
            return UPRIGHT
        a, b, _, c, d, *_ = _MATRIX.unpack(data)
        if not any((a, b, c, d)):
            return UPRIGHT
        if abs(a) + abs(d) >= abs(b) + abs(c):  # x becomes x and y becomes y, each with a sign
            mirrored = (a < 0) != (d < 0)
            return cls(2 if d < 0 else 0, mirrored)
        # x becomes y with the sign of b, and y becomes x with the sign of c
        mirrored = (b < 0) == (c < 0)
        return cls(1 if c > 0 else 3, mirrored)


_EXIF = ((0, False), (0, True), (2, False), (2, True), (1, True), (3, False), (3, True), (1, False))
UPRIGHT = Orientation()


def orientation_of(frame: VideoFrame) -> Orientation:
    """How a frame lies, by what is noted on it: an orientation, or a matrix that :class:`OrientationTracker` found."""
    data = frame.opaque
    if isinstance(data, Orientation):
        return data
    return Orientation.from_matrix(data) if isinstance(data, bytes) else UPRIGHT


def is_between(frame: VideoFrame) -> bool:
    """Whether a frame is turned by an angle that is more than a degree off a quarter turn."""
    data = frame.opaque
    if not isinstance(data, bytes) or len(data) != _MATRIX.size:
        return False
    a, b, _, c, d, *_ = (abs(number) for number in _MATRIX.unpack(data))
    return bool(min(a + d, b + c) > _ONE_DEGREE * max(a + d, b + c))


class OrientationTracker:
    """Gives each frame the orientation that the stream declared last.

    A container declares one for all frames. A stream declares it in messages that hold until another comes, and the
    decoder gives them with the frame that they come with. A key frame without a message has the orientation of the
    first frame, so that what a frame gets does not depend on where decoding began.
    """

    def __init__(self) -> None:
        self._first: bytes | None = None
        self._begun = False

    def follow(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        """Pass pictures on in the order in which they are shown; call it again after a seek."""
        current = self._first
        for picture in pictures:
            frame: Any = picture.frame
            if frame is not None:
                own = _matrix(frame)
                if not self._begun:
                    self._first, self._begun = own, True
                if own is not None:
                    current = own
                elif current is not None and frame.key_frame:
                    current = self._first
                if current is not None:
                    frame.opaque = current
            yield picture
            del frame, picture


def _matrix(frame: VideoFrame) -> bytes | None:
    # frame.side_data would keep the frame alive until the next garbage collection
    container: Any = SideDataContainer
    try:
        data = container(frame).get("DISPLAYMATRIX")
    except ValueError:  # EXIF is among the side data, a kind that PyAV does not know; the angle can be had without it
        return _TURNED.get(frame.rotation % 360)
    return None if data is None else bytes(data)


_TURNED = {
    turns * 90: _MATRIX.pack(a, b, 0, -b, a, 0, 0, 0, 1 << 30)
    for turns, (a, b) in enumerate(((1, 0), (0, -1), (-1, 0), (0, 1)))
    if turns
}

"""Finds the clean aperture of a video in its container: the part of the coded frame that players show.

FFmpeg reads it, and PyAV does not pass it on. Cropping that a codec declares is done by its decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

from av.container import InputContainer
from av.video.stream import VideoStream

__all__ = ["Edges", "clean_aperture"]

_SAMPLE_ENTRY_BYTES = 86
"of a description of video in mp4, with its box header; further boxes follow"
_MOST_HEAD_BYTES = 2**20
"Matroska files have their tracks in front"
_MOST_BOXES = 10_000
_SEGMENT, _TRACKS, _TRACK, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0
_CROPS = (0x54BB, 0x54AA, 0x54CC, 0x54DD)
"PixelCropTop, Bottom, Left and Right"


class Edges(NamedTuple):
    """Lines and columns of the coded frame that are not shown, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def box(self, height: int, width: int) -> tuple[int, int, int, int] | None:
        """(top, left, height, width) of what is shown of such a frame; None if that is all, or nothing at all."""
        shown = height - self.top - self.bottom, width - self.left - self.right
        return (self.top, self.left, *shown) if any(self) and min(shown) > 0 else None


def clean_aperture(file: BinaryIO, container: InputContainer, stream: VideoStream) -> Edges:
    """What an mp4, mov or Matroska file says is not to be shown of its frames; 0 where it says nothing."""
    names = container.format.name.split(",")
    file.seek(0)
    if "mp4" in names:
        return _of_mp4(file, stream.id)
    if "matroska" in names:
        number = [other.index for other in container.streams.video].index(stream.index)
        return _of_matroska(file.read(_MOST_HEAD_BYTES), number)
    return _WHOLE


_WHOLE = Edges(0, 0, 0, 0)


def _boxes(file: BinaryIO, begin: int, end: int | None) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of the contents of each box in a range of an mp4 file."""
    for _ in range(_MOST_BOXES):
        if end is not None and begin + 8 > end:
            return
        file.seek(begin)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, header = int.from_bytes(head[8:], "big"), 16
        if length < header:
            return
        yield kind, begin + header, begin + length
        begin += length


def _inner(file: BinaryIO, begin: int, end: int | None, *kinds: bytes) -> tuple[int, int] | None:
    """Range of the box that these kinds lead to, each inside the one before."""
    for wanted in kinds:
        found = next(((b, e) for kind, b, e in _boxes(file, begin, end) if kind == wanted), None)
        if found is None:
            return None
        begin, end = found
    return begin, end or begin


def _of_mp4(file: BinaryIO, track: int) -> Edges:
    movie = _inner(file, 0, None, b"moov")
    if movie is None:
        return _WHOLE
    for kind, begin, end in _boxes(file, *movie):
        if kind != b"trak" or _track_number(file, begin, end) != track:
            continue
        entries = _inner(file, begin, end, b"mdia", b"minf", b"stbl", b"stsd")
        if entries is None:
            return _WHOLE
        entry = next(_boxes(file, entries[0] + 8, entries[1]), None)
        if entry is None:
            return _WHOLE
        file.seek(entry[1] + 24)
        size = file.read(4)
        aperture = _inner(file, entry[1] + _SAMPLE_ENTRY_BYTES - 8, entry[2], b"clap")
        if aperture is None or len(size) < 4:
            return _WHOLE
        file.seek(aperture[0])
        return _of_clap(file.read(32), int.from_bytes(size[2:], "big"), int.from_bytes(size[:2], "big"))
    return _WHOLE


def _track_number(file: BinaryIO, begin: int, end: int) -> int | None:
    header = _inner(file, begin, end, b"tkhd")
    if header is None:
        return None
    file.seek(header[0])
    data = file.read(24)
    at = 20 if data[:1] == b"\1" else 12
    return int.from_bytes(data[at : at + 4], "big")


def _of_clap(data: bytes, height: int, width: int) -> Edges:
    """The edges outside an aperture, rounded as FFmpeg does; none if they are not inside the frame."""
    numbers = [int.from_bytes(data[i : i + 4], "big", signed=True) for i in range(0, len(data), 4)]
    if len(numbers) < 8 or min(numbers[1::2]) <= 0 or not (height and width):
        return _WHOLE
    shown_w, shown_h, off_x, off_y = (Fraction(*numbers[i : i + 2]) for i in range(0, 8, 2))
    edges = []
    for length, shown, offset in ((height, shown_h, off_y), (width, shown_w, off_x)):
        centre, half = Fraction(length - 1, 2) + offset, (shown - 1) / 2
        first, last = centre - half, centre + half
        if not 0 < shown <= length or first < 0 or int(last) > length - 1:
            return _WHOLE
        edges += [int(first), length - 1 - int(last)]
    return Edges(*edges)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Identifier and contents of the EBML elements in some bytes; the last may be cut."""
    at = 0
    while at < len(data):
        identifier, at = _number(data, at, keep_marker=True)
        size, at = _number(data, at, keep_marker=False)
        if identifier is None or at > len(data):
            return
        yield identifier, data[at:] if size is None else data[at : at + size]
        at += len(data) if size is None else size


def _number(data: bytes, at: int, *, keep_marker: bool) -> tuple[int | None, int]:
    """An EBML number and where it ends; None if it means unknown, or is none."""
    if at >= len(data) or not data[at]:
        return None, len(data) + 1
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    marker = 1 << (7 * length)
    if keep_marker:
        return value, at + length
    return (None if value == 2 * marker - 1 else value - marker), at + length


def _of_matroska(head: bytes, number: int) -> Edges:
    """The edges of the video track with this number among those of the file."""
    segment = next((contents for identifier, contents in _elements(head) if identifier == _SEGMENT), b"")
    tracks = next((contents for identifier, contents in _elements(segment) if identifier == _TRACKS), b"")
    entries = [dict(_elements(contents)) for identifier, contents in _elements(tracks) if identifier == _TRACK]
    videos = [entry for entry in entries if entry.get(_TRACK_TYPE) == b"\1"]
    if number >= len(videos):
        return _WHOLE
    facts = dict(_elements(videos[number].get(_VIDEO, b"")))
    return Edges(*(int.from_bytes(facts.get(crop, b""), "big") for crop in _CROPS))

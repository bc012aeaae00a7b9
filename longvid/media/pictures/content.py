"""What the bytes of a picture hold: its kind, where it ends, how it lies, and whether it is whole.

FFmpeg decodes what it finds of a picture that is cut, and one picture of a file that has several.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Animation", "Content", "examine", "kind_of", "webp_animation"]

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
"of JPEG, other than those within the coded samples"
_EOI, _APP1, _APP2 = 0xD9, 0xE1, 0xE2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"headers of frames"
_SIZE = (257, 256)
_ORIENTATION, _SUBFILE, _STRIPS, _TILES = 274, 254, (273, 279), (324, 325)
_MOST_PAGES = 10_000
_NO_PAGE = 1 | 4
"bits of a reduced picture, and of a mask"
_CUT = "is cut short"
_Entry: TypeAlias = tuple[int, int, bytes]
"kind, count and values of an entry of TIFF"


@dataclass(frozen=True, slots=True)
class Content:
    """The picture in some bytes."""

    codec: str
    "FFmpeg's decoder"
    num_bytes: int
    "those of the picture; a phone may have put another one behind it"
    size: tuple[int, int] = (0, 0)
    "(height, width) by its header; 0 if that is not looked at here"
    orientation: int = 1
    "1 to 8, as EXIF has it"
    fault: str | None = None
    "why it is not whole"
    pages: int = 1
    "pictures of a TIFF file, without reduced ones"
    animated: bool = False
    "frames that follow each other: APNG, animated WebP"
    is_stream: bool = False
    "another picture of the same kind follows that is no part of the first one: a file of many frames"


def kind_of(head: bytes) -> str | None:
    """The decoder for a picture that begins with these bytes, at least 16; None if it is no picture."""
    if head.startswith(_PNG):
        return "png"
    if head.startswith(_JPEG):
        return "mjpeg"
    if head[:4] in _TIFF:
        return "tiff"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def examine(data: bytes) -> Content | None:
    """What a file holds; None if that is no picture."""
    kind = kind_of(data)
    return None if kind is None else {"png": _png, "mjpeg": _jpeg, "tiff": _tiff, "webp": _webp}[kind](data)


def _png(data: bytes) -> Content:
    at, size, orientation, animated, seen = len(_PNG), (0, 0), 1, False, False
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        if kind in _CRITICAL and zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return Content("png", len(data), size, orientation, "is damaged: a checksum is wrong")
        if kind == b"IHDR" and length >= 8:
            width, height = struct.unpack_from(">II", data, at + 8)
            size = height, width
        elif kind == b"acTL" and not seen:
            animated = int.from_bytes(data[at + 8 : at + 12], "big") > 1
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : end - 4])
        seen = seen or kind == b"IDAT"
        at = end
        if kind == b"IEND":
            return Content("png", at, size, orientation, animated=animated, is_stream=data.startswith(_PNG, at))
    return Content("png", len(data), size, orientation, f"{_CUT}: its end is not there", animated=animated)


def _jpeg(data: bytes) -> Content:
    at, size, orientation, has_more = 2, (0, 0), 1, False
    while (match := _MARKER.search(data, at)) is not None:
        at, kind = match.end(), data[match.end() - 1]
        if kind == _EOI:
            is_stream = data.startswith(_JPEG, at) and not has_more
            return Content("mjpeg", at, size, orientation, is_stream=is_stream)
        if kind in (0x01, 0xD8):
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        segment = data[at + 2 : at + length]
        if kind == _APP1 and segment.startswith(b"Exif\0") and orientation == 1:
            orientation = _exif_orientation(segment[6:])
        elif kind in _FRAMES and len(segment) >= 5:
            height, width = struct.unpack_from(">HH", segment, 1)
            size = height, width
        has_more = has_more or (kind == _APP2 and segment.startswith(b"MPF\0"))
        at += max(2, length)
    return Content("mjpeg", len(data), size, orientation, f"{_CUT}: its end is not there")


def _webp(data: bytes) -> Content:
    end, orientation, animated = 8 + int.from_bytes(data[4:8], "little"), 1, False
    for kind, at, length in _riff_chunks(data):
        if kind == b"VP8X":
            animated = bool(data[at : at + 1]) and bool(data[at] & 2)
        elif kind == b"EXIF":
            orientation = _exif_orientation(data[at : at + length].removeprefix(b"Exif\0\0"))
    fault = f"{_CUT}: its header declares {end} bytes and the file has {len(data)}" if end > len(data) else None
    return Content("webp", min(end, len(data)), (0, 0), orientation, fault, animated=animated)


@dataclass(frozen=True, slots=True)
class Animation:
    """What the chunks of an animated WebP say."""

    size: tuple[int, int]
    "(height, width)"
    durations: list[int]
    "milliseconds for which each frame is shown that is there as a whole"
    data: bytes
    "the file up to the last of these frames"
    fault: str | None
    "why the file is not whole"


def webp_animation(data: bytes) -> Animation:
    """The frames of an animated WebP."""
    size, durations, end = (0, 0), list[int](), 12
    for kind, at, length in _riff_chunks(data):
        if at + length > len(data):
            break
        end = at + length + length % 2
        if kind == b"VP8X" and length >= 10:
            width, height = (1 + int.from_bytes(data[at + n : at + n + 3], "little") for n in (4, 7))
            size = height, width
        elif kind == b"ANMF" and length >= 16:
            durations.append(max(1, int.from_bytes(data[at + 12 : at + 15], "little")))
    fault = _webp(data).fault
    if fault is not None:
        data = data[:4] + (end - 8).to_bytes(4, "little") + data[8:end]
    return Animation(size, durations, data, fault if durations else f"{_CUT}: it has no whole frame")


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, place and length of the contents of each chunk."""
    end, at = min(8 + int.from_bytes(data[4:8], "little"), len(data)), 12
    while at + 8 <= end:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, length
        at += 8 + length + length % 2


def _tiff(data: bytes) -> Content:
    pages, size, orientation, fault = 0, (0, 0), 1, None
    for number, entries in enumerate(_directories(data)):
        if number == 0:
            orientation = _orientation(data, entries)
            height, width = (sum(_numbers(data, entries[tag])[:1]) if tag in entries else 0 for tag in _SIZE)
            size = height, width
            if _samples_end(data, entries) > len(data):
                fault = f"{_CUT}: its samples lie beyond its end"
        subfile = _numbers(data, entries[_SUBFILE])[:1] if _SUBFILE in entries else []
        pages += not (subfile and subfile[0] & _NO_PAGE)
    if not pages:
        fault = f"{_CUT}: its directory is not there"
    return Content("tiff", len(data), size, orientation, fault, pages=max(1, pages))


def _directories(data: bytes) -> Iterator[dict[int, _Entry]]:
    """The entries of each directory of a TIFF file, by tag."""
    order, seen = _TIFF.get(data[:4]), set[int]()
    if order is None or len(data) < 8:
        return
    (at,) = struct.unpack_from(order + "I", data, 4)
    while at and at + 2 <= len(data) and at not in seen and len(seen) < _MOST_PAGES:
        seen.add(at)
        (count,) = struct.unpack_from(order + "H", data, at)
        end = at + 2 + 12 * count
        if end > len(data):
            return
        entries: dict[int, _Entry] = {}
        for start in range(at + 2, end, 12):
            tag, kind, length = struct.unpack_from(order + "HHI", data, start)
            entries.setdefault(tag, (kind, length, data[start + 8 : start + 12]))
        yield entries
        (at,) = struct.unpack_from(order + "I", data, end) if end + 4 <= len(data) else (0,)


def _numbers(data: bytes, entry: _Entry) -> list[int]:
    """The values of an entry of 16 or 32 bits; those inside the file."""
    kind, count, inline = entry
    order, code, size = _TIFF[data[:4]], {3: "H", 4: "I"}.get(kind, ""), {3: 2, 4: 4}.get(kind, 0)
    if not size:
        return []
    if count * size <= 4:
        return list(struct.unpack_from(f"{order}{count}{code}", inline))
    (start,) = struct.unpack(order + "I", inline)
    count = min(count, max(0, len(data) - start) // size)
    return list(struct.unpack_from(f"{order}{count}{code}", data, start))


def _samples_end(data: bytes, entries: dict[int, _Entry]) -> int:
    """The byte behind the last strip or tile."""
    for offsets, counts in (_STRIPS, _TILES):
        if offsets in entries and counts in entries:
            pieces = zip(_numbers(data, entries[offsets]), _numbers(data, entries[counts]), strict=False)
            return max((start + count for start, count in pieces), default=0)
    return 0


def _orientation(data: bytes, entries: dict[int, _Entry]) -> int:
    found = _numbers(data, entries[_ORIENTATION])[:1] if _ORIENTATION in entries else []
    return found[0] if found and 1 <= found[0] <= 8 else 1


def _exif_orientation(data: bytes) -> int:
    """The orientation that EXIF declares; 1, upright, if it does not say."""
    return next((_orientation(data, entries) for entries in _directories(data)), 1)

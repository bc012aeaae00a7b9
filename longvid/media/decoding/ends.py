"""Finds where files end by what is in them. What their headers claim is a hint that recorders get wrong."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

__all__ = ["gif_end", "has_gif_picture", "next_recording", "riff_end"]

_BEGINNINGS = {"matroska": b"\x1a\x45\xdf\xa3", "flv": b"FLV\x01"}
_MOST_BETWEEN = 32 * 2**20
"bytes behind the last picture that are looked through, such as an index and sound"

_UNSET, _NEVER_SET = 2**31 - 2**20, 2**32 - 1
"sizes from here on are those of a recorder that could not go back to its header"
_FRAME = re.compile(rb"\d\dd[bc]")
_BLOCK_BYTES = 2**20


def next_recording(file: BinaryIO, formats: list[str], position: int) -> int | None:
    """The byte at which another Matroska or FLV file begins behind the last picture that FFmpeg found; None if none."""
    mark = next((_BEGINNINGS[name] for name in formats if name in _BEGINNINGS), None)
    if mark is None:
        return None
    file.seek(position)
    found = file.read(_MOST_BETWEEN).find(mark)
    return None if found < 0 else position + found


def riff_end(file: BinaryIO, num_frames: int) -> int | None:
    """The least size of a whole AVI file, which is more than it has if it is cut short; None if it is not known.

    A header that claims too much is wrong, and the file is whole, if the last chunk ends where the file ends, and if
    the sizes were never filled in, or all frames are there: the list of frames ends inside of the file, or it has as
    many as the header counts (``num_frames``). Bytes that hold no frames may follow.
    """
    size, end, length = file.seek(0, os.SEEK_END), 0, 0
    file.seek(0)
    while (head := file.read(8))[:4] == b"RIFF" and len(head) == 8:
        length = int.from_bytes(head[4:], "little") or _NEVER_SET
        end = file.tell() + length
        file.seek(end)
    if end <= size:
        return end
    stop, found, list_end = _walk(file, size)
    if stop > size:
        return stop
    is_whole = length >= _UNSET or list_end <= size or list_end >= _UNSET or found >= num_frames > 0
    return None if is_whole and not _has_frames(file, stop) else end


def _walk(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Behind the last chunk of an AVI file, the number of its frames, and behind the last list of frames as declared.

    It ends where no chunk follows.
    """
    at = found = list_end = 0
    file.seek(0)
    reader: io.BufferedReader[Any] = io.BufferedReader(cast("Any", file), 2**16)
    try:
        while at + 8 <= size:
            reader.seek(at)
            head = reader.read(12)
            kind, length = head[:4], int.from_bytes(head[4:8], "little")
            if not kind.rstrip().isalnum():
                break
            if kind == b"RIFF" or (kind == b"LIST" and head[8:] in (b"movi", b"rec ")):
                list_end = at + 8 + length if head[8:] == b"movi" else list_end
                at += 12
                continue
            found += kind[2:] in (b"dc", b"db") and length > 0
            at += 8 + length + length % 2
    finally:
        reader.detach()
    return at, found, list_end


def _has_frames(file: BinaryIO, at: int) -> bool:
    """Whether a chunk of pictures stands anywhere behind a byte."""
    file.seek(at)
    before = b""
    while block := file.read(_BLOCK_BYTES):
        if _FRAME.search(before + block):
            return True
        before = block[-3:]
    return False


def gif_end(file: BinaryIO) -> int:
    """Size of a GIF file up to its trailer or, without one, up to its last whole block; more than the file has if it is
    cut inside of a block."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    reader: io.BufferedReader[Any] = io.BufferedReader(cast("Any", file), 2**16)
    end = 0
    try:
        _skip(reader, 10)
        _skip(reader, 2 + _table_bytes(reader.read(1)[0]))
        for _ in _gif_blocks(reader):
            end = reader.tell()
        return end if end and end <= size else size + 1
    except IndexError:  # the file ends where a block has to go on
        return size + 1
    finally:
        reader.detach()


def has_gif_picture(packet: bytes) -> bool:
    """Whether a packet of a GIF file has a picture: comments and the like behind the last one come as a packet, too."""
    reader: io.BufferedReader[Any] = io.BufferedReader(cast("Any", io.BytesIO(packet)))
    try:
        if packet[:3] == b"GIF":
            _skip(reader, 13 + _table_bytes(packet[10]))
        return any(kind == b"," for kind in _gif_blocks(reader))
    except IndexError:  # it is cut: the decoder tells what it is
        return True


def _gif_blocks(reader: io.BufferedReader[Any]) -> Iterator[bytes]:
    """Read over the blocks, and yield the mark of each behind it; IndexError in the middle of one."""
    while (kind := reader.read(1)) in (b"!", b","):
        if kind == b",":
            _skip(reader, _table_bytes(reader.read(9)[8]))
        _skip(reader, 1)  # the label of an extension, the code size of a picture
        while length := reader.read(1)[0]:
            _skip(reader, length)
        yield kind


def _table_bytes(flags: int) -> int:
    """Bytes of the table of colours that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip(reader: io.BufferedReader[Any], count: int) -> None:
    if len(reader.read(count)) < count:
        raise IndexError

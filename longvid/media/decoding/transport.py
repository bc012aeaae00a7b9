"""Tells a place where two whole transport streams were joined from one where packets were lost (ISO 13818-1).

Every packet has a counter for each kind of content. FFmpeg reports a picture as damaged where a counter jumps. At a
joint, such as between two segments of an HLS recording, the counters begin again, and the picture before it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ends_full", "is_joint"]

_SYNC, _TABLES = 0x47, 0
_SIZES = (188, 192, 204)
_MOST_BYTES = 32 * 2**20
"largest picture that is looked through"
_BEFORE_BYTES = 2**20
"tables are repeated several times a second"


@dataclass(frozen=True, slots=True)
class _Packet:
    position: int
    data: bytes

    @property
    def is_erroneous(self) -> bool:
        return bool(self.data[1] & 0x80) or self.data[0] != _SYNC

    @property
    def begins_unit(self) -> bool:
        return bool(self.data[1] & 0x40)

    @property
    def content(self) -> int:
        return (self.data[1] & 0x1F) << 8 | self.data[2]

    @property
    def counter(self) -> int:
        return self.data[3] & 0x0F

    @property
    def payload(self) -> bytes:
        control = self.data[3] >> 4 & 3
        if not control & 1:
            return b""
        return self.data[5 + self.data[4] :] if control & 2 else self.data[4:]


def is_joint(file: int | None, first: int, last: int | None) -> bool:
    """Whether nothing is lost from the picture that begins at the byte ``first`` on, and another stream begins there.

    ``file`` is a file descriptor, None for a pipe, of which nothing is known. The pictures up to the one that begins at
    the byte ``last`` are looked through, or up to the end of the file. Each is whole if its own counters are continuous
    and its length, if given, is reached. Another stream begins if tables stand in front of a picture and their counter
    begins again, as that of the picture.
    """
    if file is None:
        return False
    size = _packet_size(file, first)
    last = os.fstat(file).st_size if last is None else last
    if size is None or not 0 < last - first <= _MOST_BYTES:
        return False
    tables = _last_tables(file, first, size)
    content = own = None
    length = found = num_joints = 0
    tables_jump, tables_counter = False, None
    for packet in _packets(file, first, last + size, size):
        if packet.is_erroneous:
            return False
        payload = packet.payload
        if packet.content == _TABLES and payload:
            tables_jump = tables_jump or (tables is not None and packet.counter != (tables + 1) % 16)
            tables = packet.counter
            tables_counter = tables if tables_counter is None else tables_counter
        content = packet.content if content is None else content
        if packet.content != content or not payload or packet.counter == own:  # one that is sent twice counts once
            continue
        if packet.begins_unit and own is not None and length and found < length:
            return False
        if own is not None and packet.counter != (own + 1) % 16:
            begins_again = tables_jump or tables_counter == packet.counter == 0
            if not (packet.begins_unit and tables_counter is not None and begins_again):
                return False
            num_joints += 1
        if packet.begins_unit:
            length, found = int.from_bytes(payload[4:6], "big"), -6
        own, found = packet.counter, found + len(payload)
        tables_jump, tables_counter = False, None  # those inside of a picture do not count
    return num_joints > 0


def ends_full(file: int, first: int) -> bool:
    """Whether the last packet of the stream whose last picture begins at the byte ``first`` has no padding."""
    size = _packet_size(file, first)
    if size is None:
        return True
    content, is_full = None, True
    for packet in _packets(file, first, os.fstat(file).st_size, size):
        content = packet.content if content is None else content
        if packet.content == content:
            is_full = packet.data[3] >> 4 & 3 == 1
    return is_full


def _packet_size(file: int, first: int) -> int | None:
    head = os.pread(file, 2 * max(_SIZES), first)
    for size in _SIZES:
        if head[:1] == b"G" and head[size : size + 1] == b"G":
            return size
    return None


def _packets(file: int, first: int, stop: int, size: int) -> Iterator[_Packet]:
    block = size * 1024
    for start in range(first, stop, block):
        data = os.pread(file, min(block, stop - start), start)
        for at in range(0, len(data) - 187, size):
            yield _Packet(start + at, data[at : at + 188])


def _last_tables(file: int, first: int, size: int) -> int | None:
    """The counter of the last tables before a byte."""
    start = first - min(first, _BEFORE_BYTES) // size * size
    counters = [packet.counter for packet in _packets(file, start, first, size) if packet.content == _TABLES]
    return counters[-1] if counters else None

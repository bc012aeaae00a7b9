"""Tells from the bytes of an H.264 packet whether its picture is a single field (H.264, clauses 7.3.2.1 and 7.3.3)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["is_field", "may_have_fields"]

_START_CODE = re.compile(rb"\x00\x00\x01")
_HEADER_BYTES = 512
"so many bytes hold a sequence parameter set, and those of a slice header that are read here"
_SLICES, _PARAMETERS = (1, 5), 7
_LENGTHS_FOLLOW = b"\1"
"begins the parameters of a stream whose NAL units stand behind their lengths (ISO 14496-15)"
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
"profiles whose parameter sets give the chroma format"


class _Bits:
    """Reads the bits of a NAL unit from its front; IndexError at its end."""

    def __init__(self, unit: bytes) -> None:
        content = unit.replace(b"\x00\x00\x03", b"\x00\x00")
        self._bits = "".join(f"{byte:08b}" for byte in content)
        self._at = 0

    def take(self, count: int) -> int:
        self._at += count
        if self._at > len(self._bits):
            raise IndexError
        return int(self._bits[self._at - count : self._at] or "0", 2)

    def unsigned(self) -> int:
        zeros = self._bits.index("1", self._at) - self._at
        self._at += zeros
        return self.take(zeros + 1) - 1

    def signed(self) -> int:
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -code // 2


@dataclass(frozen=True, slots=True)
class _Sequence:
    frame_num_bits: int
    frames_only: bool
    planes_apart: bool


def may_have_fields(extradata: bytes | None) -> bool:
    """Whether a stream with these parameter sets may code the fields of a frame one by one."""
    try:
        units = _parameter_sets(extradata or b"")
        return any(unit[0] & 31 == _PARAMETERS and not _sequence(unit).frames_only for unit in units)
    except (IndexError, ValueError):  # damaged
        return False


def is_field(packet: bytes, extradata: bytes | None) -> bool:
    """Whether the first slice of a packet belongs to a field picture.

    The parameter set is the last one before that slice, in the packet or in ``extradata``. False if it is not known.
    """
    sequence, head = None, extradata or b""
    try:
        units = _units(packet) if head[:1] != _LENGTHS_FOLLOW else _prefixed(packet, (head[4] & 3) + 1)
        for unit in (*_parameter_sets(head), *units):
            kind = unit[0] & 31
            if kind == _PARAMETERS:
                sequence = _sequence(unit)
            elif kind in _SLICES and sequence is not None:
                return _starts_field(unit, sequence)
    except (IndexError, ValueError):  # damaged
        pass
    return False


def _parameter_sets(extradata: bytes) -> Iterator[bytes]:
    """The parameter sets in front of a stream: with start codes (Annex B), or as mp4 and Matroska have them."""
    if extradata[:1] != _LENGTHS_FOLLOW:
        yield from _units(extradata)
        return
    yield from itertools.islice(_prefixed(extradata[6:], 2), extradata[5] & 31)


def _units(data: bytes) -> Iterator[bytes]:
    """The beginning of every NAL unit behind a start code."""
    for mark in _START_CODE.finditer(data):
        if mark.end() < len(data):
            yield data[mark.end() : mark.end() + _HEADER_BYTES]


def _prefixed(data: bytes, size: int) -> Iterator[bytes]:
    """The beginning of every NAL unit behind its length, which is a number of ``size`` bytes."""
    at = 0
    while at + size < len(data):
        begin = at + size
        at = begin + int.from_bytes(data[at:begin], "big")
        yield data[begin : min(at, begin + _HEADER_BYTES)]


def _sequence(unit: bytes) -> _Sequence:
    bits = _Bits(unit[1:])
    profile = bits.take(8)
    bits.take(16)
    bits.unsigned()
    planes_apart = False
    if profile in _WITH_CHROMA:
        chroma = bits.unsigned()
        planes_apart = bool(chroma == 3 and bits.take(1))
        bits.unsigned()
        bits.unsigned()
        bits.take(1)
        if bits.take(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling(bits, 16 if number < 6 else 64)
    frame_num_bits = bits.unsigned() + 4
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.take(1)
        bits.signed()
        bits.signed()
        for _ in range(bits.unsigned()):
            bits.signed()
    bits.unsigned()
    bits.take(1)
    bits.unsigned()
    bits.unsigned()
    return _Sequence(frame_num_bits, bool(bits.take(1)), planes_apart)


def _skip_scaling(bits: _Bits, count: int) -> None:
    last = following = 8
    for _ in range(count):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _starts_field(unit: bytes, sequence: _Sequence) -> bool:
    if sequence.frames_only:
        return False
    bits = _Bits(unit[1:])
    for _ in range(3):
        bits.unsigned()
    bits.take(2 * sequence.planes_apart + sequence.frame_num_bits)
    return bool(bits.take(1))

"""Byte counts and frame sizes as people write them."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes", "parse_reserve", "parse_size"]

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_SIZE = re.compile(r"(\d+)[xX](\d+)")


def parse_bytes(text: str | int) -> int:
    """Read ``"8GiB"``, ``"500 MB"`` or a plain number of bytes; SI units are powers of 1000, IEC of 1024.

    Raises:
        ValueError: the text is not a positive size.
    """
    if isinstance(text, int):
        value = text
    else:
        match = _BYTES.fullmatch(text)
        if match is None or match[2].lower() not in _FACTORS:
            raise ValueError(f"{text!r} is not a size in bytes; write a number with a unit, such as 8GiB or 500MB")
        value = int(float(match[1]) * _FACTORS[match[2].lower()])
    if value <= 0:
        raise ValueError(f"{text!r} is not a positive size in bytes")
    return value


def parse_reserve(text: str | int) -> int:
    """As :func:`parse_bytes`, and 0 is a size."""
    return 0 if text in (0, "0") else parse_bytes(text)


def format_bytes(num_bytes: float) -> str:
    """Write a byte count in the IEC unit that reads best: ``format_bytes(3 * 2**29) == "1.50 GiB"``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def parse_size(text: str) -> tuple[int, int]:
    """Read a frame size written as WIDTHxHEIGHT and return ``(height, width)`` in pixels.

    Raises:
        ValueError: the text is not two positive integers with an x between them.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise ValueError(f"{text!r} is not a frame size; write WIDTHxHEIGHT in pixels, such as 720x480")
    return int(match[2]), int(match[1])

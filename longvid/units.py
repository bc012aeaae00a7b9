"""Byte counts, lengths of time and frame sizes as people write them."""

from __future__ import annotations

import re

from longvid.errors import OptionError

__all__ = ["format_bytes", "format_seconds", "parse_bytes", "parse_reserve", "parse_size"]

_FACTORS = {"b": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _FACTORS |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_SIZE = re.compile(r"(\d+)[xX](\d+)")


def parse_bytes(size: str | int) -> int:
    """Read ``"8GiB"``, ``"500 MB"`` or an int, which is a number of bytes; SI units are powers of 1000, IEC of 1024.

    Raises:
        OptionError: it is not a positive size, or a text without a unit.
    """
    match = _BYTES.fullmatch(size) if isinstance(size, str) else None
    if match is not None and match[2].lower() in _FACTORS:
        num_bytes = int(float(match[1]) * _FACTORS[match[2].lower()])
    elif isinstance(size, int) and not isinstance(size, bool):
        num_bytes = size
    else:
        missing = ": the unit is missing" if match is not None and not match[2] else ""
        raise OptionError(f"{size!r} is not a size in bytes{missing}; write a number and a unit, such as 8GiB or 500MB")
    if num_bytes <= 0:
        raise OptionError(f"{size!r} is not a positive size in bytes; write a size such as 8GiB")
    return num_bytes


def parse_reserve(size: str | int) -> int:
    """Read a size as :func:`parse_bytes` does, or 0."""
    return 0 if size in (0, "0") else parse_bytes(size)


def format_bytes(num_bytes: float) -> str:
    """Write a byte count in the IEC unit that reads best: ``format_bytes(3 * 2**29) == "1.50 GiB"``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """A length of time as people write it: ``350 ms``, ``12.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def parse_size(text: str) -> tuple[int, int]:
    """Read a frame size written as WIDTHxHEIGHT and return ``(height, width)`` in pixels.

    Raises:
        OptionError: the text is not two positive integers with an x between them.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise OptionError(f"{text!r} is not a frame size; write WIDTHxHEIGHT in pixels, such as 720x480")
    return int(match[2]), int(match[1])

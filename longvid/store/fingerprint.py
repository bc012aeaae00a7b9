"""Owns the comparison of fingerprints: nested records, ready for JSON, of everything that decides the bits of a result.

A run is continued only by a run with the same fingerprint. It holds the contents of files, not their names and places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["differences"]

_ABSENT = object()


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """Every field in which two fingerprints differ, with both values in words; the most general fields first."""
    old, new = dict(_leaves(have)), dict(_leaves(want))
    return [
        f"{name} is {_shown(old.get(name, _ABSENT))} in the store and {_shown(new.get(name, _ABSENT))} in this run"
        for name in sorted({*old, *new}, key=lambda name: (name.count("."), name))
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            # JSON has lists only
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "missing"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."

"""Fingerprints: what decides the bits of a result, as one nested record ready for JSON.

A run may only be continued by one of the same fingerprint. Names and places of files are not in it; contents are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["differences"]

_ABSENT = object()


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """Every field in which two fingerprints differ, as ``"source.sha256 was a and is b"``, in order of the names."""
    old, new = dict(_leaves(have)), dict(_leaves(want))
    return [
        f"{name} was {_shown(old.get(name, _ABSENT))} and is {_shown(new.get(name, _ABSENT))}"
        for name in sorted({*old, *new})
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            # as JSON gives it back
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."

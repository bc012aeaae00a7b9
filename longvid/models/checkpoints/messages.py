"""What errors show of files that may come from anyone: short, printable, on one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longvid.errors import ModelError

__all__ = ["listing", "one_line", "reading", "shown"]


def shown(value: Any) -> str:
    """A value in at most 80 printable characters."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else f"{value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(exc: BaseException) -> str:
    """The first line of an exception's text, or its class."""
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__


def listing(folder: Path) -> str:
    """The names of the first files in a folder."""
    names = sorted(f.name if f.name.isprintable() else ascii(f.name) for f in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def reading(path: Path, kind: str = "") -> Iterator[None]:
    """Turn what damaged files and links raise when they are read into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as exc:
        raise ModelError(f"{path} cannot be read{kind}: {one_line(exc)}") from exc

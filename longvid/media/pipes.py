"""Tells pipes, which can be read once only, from other sources."""

from __future__ import annotations

import os
import stat
from typing import Any

__all__ = ["STANDARD_INPUT", "is_pipe"]

STANDARD_INPUT = "-"
_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/")
"where links stand for the open files of a process"


def is_pipe(source: Any) -> bool:
    """Whether a source is standard input (``-``) or a FIFO, which can be read once only."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = os.fspath(source)
    if path == STANDARD_INPUT:
        return True
    try:
        is_fifo = stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
    return is_fifo and (not os.path.islink(path) or os.path.abspath(path).startswith(_DESCRIPTORS))

"""The errors where a video file or a picture cannot be written."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import av

from longvid.errors import LongvidError, StoreError

__all__ = ["is_full", "reason", "write_error", "writing"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise StoreError for what fails inside; kind ``"full"`` if there is no room."""
    try:
        yield
    except LongvidError:
        raise
    except (av.FFmpegError, OSError, ValueError) as exc:
        raise write_error(path, exc) from exc


def write_error(path: Path, exc: Exception) -> StoreError:
    """The error where a file cannot be written."""
    if is_full(exc):
        return StoreError(f"{path} cannot be written: {reason(exc)}; is the disk full? Make room", kind="full")
    return StoreError(f"{path} cannot be written: {reason(exc)}")


def is_full(exc: Exception) -> bool:
    """Whether there is no room on the disk, or no more is allowed."""
    return getattr(exc, "errno", None) in _NO_SPACE


def reason(exc: Exception) -> str:
    """The message of an error, without its number."""
    return getattr(exc, "strerror", None) or str(exc)

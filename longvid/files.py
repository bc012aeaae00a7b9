"""Whether a single file may be written: asked before a run starts, not when hours of work want to be saved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from longvid.errors import StoreError

__all__ = ["check_file_target", "write_whole"]


def check_file_target(
    path: str | os.PathLike[str], *, overwrite: bool, what: str, is_ours: Callable[[Path], bool]
) -> None:
    """Say whether a file can be written at ``path``. Leaves nothing behind. An empty file counts as none.

    Args:
        path: where it should be.
        overwrite: whether one that longvid wrote may be replaced; another is never.
        what: what it will be, such as ``"recording"``, for the message.
        is_ours: whether the file at a path is one of these.

    Raises:
        StoreError: something is there that may not be replaced, or the folder is missing or cannot be written to.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise StoreError(f"{target} cannot be written: there is no folder {target.parent}", kind="missing")
    if target.exists() or target.is_symlink():
        _check_existing(target, overwrite, what, is_ours)
    _check_writable(target)


def write_whole(path: str | os.PathLike[str], text: str, *, what: str) -> None:
    """Write a text file, all or nothing: who reads meanwhile sees the old one.

    Args:
        path: where.
        text: what.
        what: what it is, such as ``"the report"``, for the message.

    Raises:
        StoreError: the disk says no. The old file, if there was one, is untouched.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as exc:
        with suppress(OSError):
            partial.unlink()
        raise StoreError(f"{what} {target} cannot be written: {exc.strerror}") from exc


def _check_existing(target: Path, overwrite: bool, what: str, is_ours: Callable[[Path], bool]) -> None:
    if not target.is_file():
        raise StoreError(f"{target} exists and is not a file; choose another name for the {what}", kind="foreign")
    try:
        if target.stat().st_size == 0:
            return
        ours = is_ours(target)
    except OSError as exc:
        raise StoreError(f"{target} exists and cannot be read ({exc.strerror}); choose another name") from exc
    if not ours:
        raise StoreError(f"{target} exists and is not a longvid {what}; choose another name", kind="foreign")
    if not overwrite:
        raise StoreError(
            f"{target} exists: a longvid {what}; --overwrite (overwrite=True) replaces it, or choose another name",
            kind="exists",
        )


def _check_writable(target: Path) -> None:
    """Write something: permissions alone do not tell of a read-only or a full disk."""
    try:
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(b"longvid")
    except OSError as exc:
        raise StoreError(
            f"{target} cannot be written: no file can be made in {target.parent} ({exc.strerror}); "
            "choose another folder"
        ) from exc
    if target.exists() and not os.access(target, os.W_OK):
        raise StoreError(f"{target} exists and is read-only; choose another name")

"""Single output files: checked before a run starts, and written so that they appear whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from longvid.errors import StoreError

__all__ = ["check_file_target", "local_path", "write_whole"]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder of this machine.

    Raises:
        StoreError: it is an address, such as ``s3://bucket/a.zarr``.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise StoreError(
            f"{text} is an address (a Path drops one of its slashes); stores and videos are written to and read from "
            "folders of this machine, so copy it from or to there",
            kind="refused",
        )
    return Path(text)


def check_file_target(path: str | os.PathLike[str], *, overwrite: bool, what: str) -> None:
    """Check that a file can be written at ``path``. Leaves nothing behind. An empty file counts as none.

    The message of an error calls the file ``what``, such as ``"recording"``.

    Raises:
        StoreError: something at ``path`` may not be replaced, or its folder is missing or cannot be written to.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise StoreError(f"{target} cannot be written: there is no folder {target.parent}; make it", kind="missing")
    if os.path.lexists(target):
        if not target.is_file():
            raise StoreError(f"{target} exists and is not a file; choose another name for the {what}", kind="foreign")
        if not overwrite and target.stat().st_size:
            raise StoreError(
                f"{target} exists; replace it with --overwrite (overwrite=True), or choose another name for the {what}",
                kind="exists",
            )
    try:
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(b"longvid")  # permissions alone do not show a read-only or a full disk
    except OSError as exc:
        raise StoreError(
            f"{target} cannot be written: no file can be made in {target.parent} ({exc.strerror}); "
            "choose another folder"
        ) from exc


def write_whole(path: str | os.PathLike[str], text: str, *, what: str) -> None:
    """Write a text file, all or nothing: until it is whole, a reader sees the old file.

    The message of an error calls the file ``what``, such as ``"the report"``.

    Raises:
        StoreError: the disk refuses the write. The old file, if there was one, is untouched.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as exc:
        with suppress(OSError):
            partial.unlink()
        raise StoreError(f"{what} {target} cannot be written: {exc.strerror}; make room on the disk") from exc

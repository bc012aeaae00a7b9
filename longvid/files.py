"""Single files: output is checked before a run starts and appears whole or not at all; input is never a link."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from longvid.errors import StoreError

__all__ = ["LATENT_SUFFIXES", "check_file_target", "disk_errors", "is_latent_file", "local_path", "read_regular",
           "sync_path", "write_durably", "write_whole"]  # fmt: skip

LATENT_SUFFIXES = (".safetensors", ".npy", ".pt", ".pth")
"names of files that latents of other programs come in"

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


def is_latent_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a file of latents and not of a store, by its name."""
    return Path(path).suffix in LATENT_SUFFIXES and not Path(path).is_dir()


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
    try:
        write_durably(target, text.encode(), sync=False)
    except OSError as exc:
        raise StoreError(f"{what} {target} cannot be written: {exc.strerror}; make room on the disk") from exc


def sync_path(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _fsync(fd, path)
    finally:
        os.close(fd)


def _fsync(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        raise StoreError(
            f"{path} cannot be made durable: its file system has no fsync ({exc.strerror}). Choose another folder, or "
            'add --durability rename (durability="rename"), which survives the death of the process only',
            kind="other",
        ) from exc


def write_durably(path: Path, content: bytes | Callable[[BinaryIO], None], *, sync: bool) -> None:
    """Write a file so that at any moment its name stands for the old content or for the new content.

    With ``sync`` the new content is on the disk before it takes the name. The folder is not synced here.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            if sync:
                file.flush()
                _fsync(file.fileno(), path)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The first bytes of a regular file that is not reached through a link."""
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _refused(path, "it is not a regular file", "files and folders")
            return file.read(min(max_bytes, found.st_size + 1))  # Python allocates what it is asked to read
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise StoreError(f"there is no {path}", kind="missing") from exc
    except ValueError as exc:  # a zero byte in the name
        raise StoreError(f"{str(path)!r} cannot be a path: {exc}", kind="refused") from exc
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR):
            raise _refused(
                path, "it is a folder" if exc.errno == errno.EISDIR else "it is a symbolic link", "a file"
            ) from exc
        kind = "corrupt" if exc.errno == errno.EIO else "other"
        raise StoreError(f"{path} cannot be read: {exc.strerror}", kind=kind) from exc


def _refused(path: Path, found: str, allowed: str) -> StoreError:
    return StoreError(f"{path} is refused: {found}; allowed: {allowed}", kind="refused")


_KINDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "full"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "read-only"),
}
_HINTS = {
    "full": "; make room and run the same command again to resume",
    "read-only": "; choose another folder, or make this one writable",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system about files into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except OSError as exc:
        kind = _KINDS.get(exc.errno or 0, "other")
        message = f"{path} cannot be written: {exc.strerror or exc}{_HINTS.get(kind, '')}"
        raise StoreError(message, kind=kind) from exc

"""Owns the writer lock: one writer per store, by a lock that is released when its owner ends, and that names the owner.

A record lock of POSIX (``lockf``) belongs to a process: the kernel releases it however the process ends, and a forked
child does not inherit it, unlike ``flock``, which survives in the child of a dead owner. It does not tell apart two
writers in one process, so this module keeps a list of those.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longvid.errors import StoreError

__all__ = ["WriterLock", "is_locked"]

_held: dict[tuple[int, int], tuple[int, dict[str, Any]]] = {}
"""for the file (device, inode) of every lock: the process that acquired it, since a fork holds none, and the content of
the file"""
_guard = threading.Lock()


class WriterLock:
    """The right to write at one place. Made by :meth:`acquire`.

    The file exists while the lock is held and names host, process and time; :meth:`release` deletes it. Nothing else in
    the owner's process may open the file: POSIX releases the lock when any descriptor of it is closed.
    """

    def __init__(self, path: Path, fd: int, identity: tuple[int, int]) -> None:
        self._path, self._fd, self._identity, self._pid = path, fd, identity, os.getpid()

    @classmethod
    def acquire(cls, path: Path, *, lock: bool = True) -> WriterLock:
        """Acquire the lock now, or raise StoreError: of kind ``"locked"``, with host, process and time of the owner.

        With ``lock=False`` only writers of this process exclude each other, for a file system that has no locks.
        """
        with _guard:
            while True:
                pid, owner = _held.get(_identity_at(path), (0, {}))
                if pid == os.getpid():
                    raise _refusal(path, owner)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                try:
                    if lock and not _locked(fd, path):
                        raise _refusal(path, _signature(fd))
                    found = os.fstat(fd)
                    identity = found.st_dev, found.st_ino
                    if _identity_at(path) == identity:
                        _held[identity] = os.getpid(), _sign(fd)
                        return cls(path, fd, identity)
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)  # the file's last owner has just deleted it, so it guards nothing

    def release(self) -> None:
        """Release the lock. Does nothing in a fork, or when called again."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if os.getpid() == self._pid:
            with _guard, suppress(OSError):
                _held.pop(self._identity, None)
                if _identity_at(self._path) == self._identity:
                    self._path.unlink()
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock at ``path`` now, as far as this process may see. Writes nothing."""
    with _guard:
        if _held.get(_identity_at(path), (0, {}))[0] == os.getpid():
            return True
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # there is none, or only its owner may read it
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as exc:
            return exc.errno in _TAKEN
        finally:
            os.close(fd)  # releases what was just acquired
        return False


_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def _identity_at(path: Path) -> tuple[int, int]:
    """Device and inode of what is there; (0, 0) for nothing."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _locked(fd: int, path: Path) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in _TAKEN:
            return False
        if exc.errno in _NO_LOCKS:
            raise StoreError(
                f"{path.parents[2]} cannot be locked: its file system has no locks ({exc.strerror}). Choose another "
                "folder, or add --no-lock (Durability(lock=False)) and make sure that one run writes at a time",
                kind="other",
            ) from exc
        raise
    return True


def _sign(fd: int) -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(owner).encode(), 0)
    return owner


def _signature(fd: int) -> dict[str, Any]:
    """The owner as the file names it; empty if it does not yet."""
    with suppress(OSError, ValueError):
        owner: dict[str, Any] = json.loads(os.pread(fd, 4096, 0))
        return owner if isinstance(owner, dict) else {}
    return {}


def _refusal(path: Path, owner: dict[str, Any]) -> StoreError:
    who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}" if owner else "another run"
    return StoreError(
        f"{path.parents[2]} is being written by {who}; wait for it to end, or choose another name", kind="locked"
    )

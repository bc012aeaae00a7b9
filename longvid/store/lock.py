"""One writer per store: a lock that dies with its owner, and says who that is.

A record lock of POSIX (``lockf``) belongs to a process: the kernel takes it back however the process ends, and a forked
child does not inherit it, unlike ``flock``, which lives on in the child of a dead owner. It does not tell apart two
writers in one process, so those are listed here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longvid.errors import StoreError

if sys.platform != "win32":
    import fcntl

__all__ = ["WriterLock", "is_locked"]

_held: dict[tuple[int, int], tuple[int, dict[str, Any]]] = {}
"file (device, inode) of every lock of this process: the process that took it, for a fork holds none, and its signature"
_guard = threading.Lock()


class WriterLock:
    """The right to write at one place. Made by :meth:`acquire`.

    The file stays while the lock is held and names host, process and time; :meth:`release` takes it away. Nothing else
    in the owner's process may open the file: when any descriptor of it is closed, POSIX takes the lock back.
    """

    def __init__(self, path: Path, fd: int, identity: tuple[int, int]) -> None:
        self._path = path
        self._fd = fd
        self._identity = identity
        self._pid = os.getpid()

    @classmethod
    def acquire(cls, path: Path) -> WriterLock:
        """Take the lock at once or not at all.

        Args:
            path: of the lock file; its folder exists.

        Raises:
            StoreError: kind ``"locked"``, with host, process and time of the owner.
            OSError: the file cannot be made.
        """
        with _guard:
            while True:
                pid, owner = _held.get(_identity_at(path), (0, {}))
                if pid == os.getpid():
                    raise _refusal(path, owner)
                lock = cls._try(path)
                if lock is not None:
                    return lock

    @classmethod
    def _try(cls, path: Path) -> WriterLock | None:
        """Take the lock, or nothing if the file's last owner has just taken it away: it guards nothing then."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if not _locked(fd):
                raise _refusal(path, _signature(fd))
            found = os.fstat(fd)
            identity = found.st_dev, found.st_ino
            if _identity_at(path) == identity:
                _held[identity] = os.getpid(), _sign(fd)
                return cls(path, fd, identity)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def release(self) -> None:
        """Give the lock back. Does nothing in a fork, or when called again."""
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
    """Whether a process holds the lock at ``path`` now."""
    with _guard:
        identity = _identity_at(path)
        if identity == (0, 0):
            return False
        if _held.get(identity, (0, {}))[0] == os.getpid():
            return True
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return not _locked(fd)
        finally:
            os.close(fd)  # gives back what was just taken


def _identity_at(path: Path) -> tuple[int, int]:
    """Device and inode of what is there; (0, 0) for nothing."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _locked(fd: int) -> bool:
    if sys.platform == "win32":  # nothing here is tested on it; two runs in one process are kept apart all the same
        return True
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _sign(fd: int) -> dict[str, Any]:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(owner).encode(), 0)
    return owner


def _signature(fd: int) -> dict[str, Any]:
    """Who signed the file; nothing while that has not happened yet."""
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(path: Path, owner: dict[str, Any]) -> StoreError:
    who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}" if owner else "another run"
    return StoreError(
        f"{path.parents[2]} is being written by {who}; wait for it to end, or choose another name", kind="locked"
    )

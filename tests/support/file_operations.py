"""What a process does to the files of a store: counted, cut off anywhere, or undone as a power cut might undo it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

_ARRAYS = "latents|moments|frames|t|frame_start|frame_stop|frame_pts|frame_valid|digest"
_CHUNK = r"c(?:\.\d+)+"
_IN_FORMAT = re.compile(
    rf"""\.? | zarr\.json | \.zarr\.json\.partial
    | (?:{_ARRAYS}) (?: / (?: zarr\.json | {_CHUNK} | \.(?:zarr\.json|{_CHUNK})\.partial
                          | c(?:\.\d+)*\.[0-9a-f]{{32}}\.partial ) )?
    | digest/\.longvid (?: / (?: lock | seek | root\.json | \.root\.json\.partial ) )?""",
    re.VERBOSE,
)
"every path in a store that its format knows; nothing else may be there at any time, and no file of contexts"


def is_in_format(path: str) -> bool:
    """Whether the format of stores knows a path, relative to the folder of a store."""
    return _IN_FORMAT.fullmatch(path) is not None


def foreign_paths(store: Path) -> list[str]:
    """What is in a store and not in its format."""
    return sorted(path for path in paths_of(store) if not is_in_format(path))


def paths_of(store: Path) -> set[str]:
    return {str(entry.relative_to(store)) for entry in store.rglob("*")}


class Operations:
    """Counts, records and cuts off what a process does to files in one folder.

    Every operation has two points: just before it and just after it.

    Args:
        root: the folder; operations elsewhere are not seen, but for syncs.
        kill_at: the point at which the process gets the signal; None for never.
        signum: that signal. By default it dies of it.
        log: file that gets a line for every operation that changes names or syncs, with what a power cut needs to know.
        kept: folder for links to the files that lost their names.
    """

    def __init__(
        self,
        root: str,
        kill_at: int | None = None,
        log: str | None = None,
        kept: str | None = None,
        signum: int = signal.SIGKILL,
    ) -> None:
        self._root = root
        self._kill_at = kill_at
        self._signum = signum
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self._kept = kept
        self._lock = threading.RLock()
        self.points = 0
        self.foreign: set[str] = set()
        """what was made or renamed and has no place in the format of a store: other names in the folder, and files
        anywhere else, since contexts would be as wrong there"""
        self._num_kept = 0
        self._real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir", "rmdir")}

    def install(self) -> None:
        import io

        real_open = io.open

        def opened(file, mode="r", *args, **kwargs):
            if set(mode).isdisjoint("wax+") or isinstance(file, int) or not self._made(path := os.fspath(file)):
                return real_open(file, mode, *args, **kwargs)
            with self._lock:
                created = not os.path.lexists(path)
                self._point("create", path)
                result = real_open(file, mode, *args, **kwargs)
                if created:
                    self._write({"op": "create", "path": path, "inode": os.fstat(result.fileno()).st_ino})
                self._point("create", path)
                return result

        io.open = opened
        for name in self._real:
            setattr(os, name, getattr(self, f"_{name}"))

    def _made(self, path: str) -> bool:
        """Note a path that a file gets; whether it is inside."""
        if self._inside(path):
            if not is_in_format(path[len(self._root) + 1 :]):
                self.foreign.add(path)
            return True
        if not path.startswith(("/dev/", "/proc/")):
            self.foreign.add(path)
        return False

    def _inside(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root + "/")

    def _point(self, name: str, path: str) -> None:
        if self.points == self._kill_at:
            os.kill(os.getpid(), self._signum)
            while self._signum == signal.SIGKILL:
                time.sleep(60)
        self.points += 1

    def _write(self, record: dict) -> None:
        if self._log is not None:
            os.write(self._log, json.dumps(record).encode() + b"\n")

    def _keep(self, path: str) -> str | None:
        if self._kept is None or not os.path.isfile(path):
            return None
        self._num_kept += 1
        kept = f"{self._kept}/{os.getpid()}-{self._num_kept}"
        os.link(path, kept)
        return kept

    @staticmethod
    def _path(path, dir_fd) -> str:
        path = os.fspath(path)
        if not isinstance(path, str):
            return ""
        return path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)

    def _named(self, name, path, dir_fd, call, record=None):
        full = self._path(path, dir_fd)
        if not self._inside(full):
            return call()
        with self._lock:
            before = {} if record is None or self._log is None else record(full)
            self._point(name, full)
            result = call()
            if record is not None:
                self._write({"op": name, "path": full, **before})
            self._point(name, full)
            return result

    def _open(self, path, flags, mode=0o777, *, dir_fd=None):
        created = flags & os.O_CREAT and not os.path.lexists(self._path(path, dir_fd))
        call = partial(self._real["open"], path, flags, mode, dir_fd=dir_fd)
        if not created:
            return self._named("open", path, dir_fd, call)
        self._made(self._path(path, dir_fd))

        def create():
            fd = call()
            self._write({"op": "create", "path": self._path(path, dir_fd), "inode": os.fstat(fd).st_ino})
            return fd

        return self._named("open", path, dir_fd, create)

    def _fsync(self, fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        with self._lock:
            self._point("fsync", path)
            if self._kill_at is None:  # a process that is killed has no need of it, and it takes most of the time
                self._real["fsync"](fd)
            found = os.fstat(fd)
            self._write({"op": "fsync", "path": path, "state": [found.st_ino, found.st_size, found.st_mtime_ns]})
            self._point("fsync", path)

    def _replace(self, src, dst, *, src_dir_fd=None, dst_dir_fd=None):
        self._made(self._path(dst, dst_dir_fd))

        def facts(full):
            facts = {"src": os.fspath(src), "inode": os.stat(src).st_ino, "old": self._keep(full)}
            if full == f"{self._root}/zarr.json":
                facts["frames"] = json.loads(Path(src).read_bytes())["attributes"]["longvid"]["num_frames"]
            return facts

        call = partial(self._real["replace"], src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        return self._named("replace", dst, dst_dir_fd, call, facts)

    def _unlink(self, path, *, dir_fd=None):
        call = partial(self._real["unlink"], path, dir_fd=dir_fd)
        return self._named("unlink", path, dir_fd, call, lambda full: {"old": self._keep(full)})

    def _mkdir(self, path, mode=0o777, *, dir_fd=None):
        self._made(self._path(path, dir_fd))
        call = partial(self._real["mkdir"], path, mode, dir_fd=dir_fd)
        return self._named("mkdir", path, dir_fd, call, lambda full: {})

    def _rmdir(self, path, *, dir_fd=None):
        call = partial(self._real["rmdir"], path, dir_fd=dir_fd)
        return self._named("rmdir", path, dir_fd, call)


class PowerCut:
    """What a disk may hold after the power failed, made from what a process did until it died.

    Names that were made, replaced or removed since their folder was synced may be as before, each by itself. A file
    that was not synced since it was written last may hold all, none, half, or zeros, or may be gone.

    Args:
        root: the store's folder.
        log: what :class:`Operations` wrote.
        rng: what happens to what may happen.
    """

    def __init__(self, root: Path, log: Path, rng: random.Random) -> None:
        self._root = root
        self._rng = rng
        self._records = [json.loads(line) for line in log.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]

    def durable_frames(self) -> int:
        """Frames that were published by a root whose name was on the disk."""
        durable = shown = 0
        for record in self._records:
            shown = record.get("frames", shown)
            if record["op"] == "fsync" and record["path"] == str(self._root):
                durable = shown
        return durable

    def shown_frames(self) -> int:
        """Frames that readers were shown, durable or not."""
        return next((record["frames"] for record in reversed(self._records) if "frames" in record), 0)

    def happen(self) -> None:
        """Turn the folder into such a state."""
        synced = {tuple(record["state"]) for record in self._records if record["op"] == "fsync"}
        for record in reversed(list(self._unsettled())):
            if self._rng.random() < 0.5:
                self._undo(record)
        for path in sorted(self._root.rglob("*")):
            if path.is_file():
                found = path.stat()
                if (found.st_ino, found.st_size, found.st_mtime_ns) not in synced:
                    self._spoil(path)

    def _unsettled(self) -> Iterable[dict]:
        synced_until: dict[str, int] = {}
        for number, record in enumerate(self._records):
            if record["op"] == "fsync":
                synced_until[record["path"]] = number
        for number, record in enumerate(self._records):
            if record["op"] != "fsync" and synced_until.get(os.path.dirname(record["path"]), -1) < number:
                yield record

    def _undo(self, record: dict) -> None:
        path, old = Path(record["path"]), record.get("old")
        if not path.parent.is_dir():  # went with a folder
            return
        if record["op"] == "mkdir":
            shutil.rmtree(path, ignore_errors=True)
        elif record["op"] == "create":
            if path.is_file() and path.stat().st_ino == record["inode"]:
                path.unlink()
        elif record["op"] == "unlink":
            if old is not None and not path.exists():
                os.link(old, path)
        elif path.is_file() and path.stat().st_ino == record["inode"]:  # else it was replaced once more
            os.replace(path, record["src"])
            if old is not None:
                os.link(old, path)

    def _spoil(self, path: Path) -> None:
        content = path.read_bytes()
        kind = self._rng.choice(("kept", "empty", "zeros", "half", "missing"))
        if kind == "kept":
            return
        path.unlink()  # the file may have another name, among those that were kept
        if kind != "missing":
            path.write_bytes({"empty": b"", "zeros": bytes(len(content)), "half": content[: len(content) // 2]}[kind])

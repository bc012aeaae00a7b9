"""Runs that die in forked children: killed at any file operation, with a record of what a power cut needs to know.

The tests' own process reads stores with zarr, whose numbers have to be those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from support.forking import Forkers, serve

NUM_FRAMES, HEIGHT, WIDTH = 54, 32, 48
"""One more than fill their latent frames, so that the tail is padded, and units that do not come out even: a run
resumed after the last chunk has to know how many frames there were."""
_LATENT_UNIT_BYTES = 4 * 16 * (HEIGHT // 8) * (WIDTH // 8) * 2
_FRAME_UNIT_BYTES = 8 * HEIGHT * WIDTH * 3
"of a frame store's unit this is half"
SESSION = {"device": "cpu", "dtype": "float32", "layout": "contiguous", "paired_frames": "off"}
_model = None
"of the process that forks; children share it"


# ------------------------------------------------------------------------------------------- in the child


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
        self._num_kept = 0
        self._real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir", "rmdir")}

    def install(self) -> None:
        import io

        real_open = io.open

        def opened(file, mode="r", *args, **kwargs):
            if "w" not in mode or isinstance(file, int) or not self._inside(path := os.fspath(file)):
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
        call = partial(self._real["mkdir"], path, mode, dir_fd=dir_fd)
        return self._named("mkdir", path, dir_fd, call, lambda full: {})

    def _rmdir(self, path, *, dir_fd=None):
        call = partial(self._real["rmdir"], path, dir_fd=dir_fd)
        return self._named("rmdir", path, dir_fd, call)


def source_frames() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def _longvid(command: dict) -> None:
    from longvid import Durability, VideoSession

    durability = Durability(mode=command["mode"], publish_seconds=0, snapshot_seconds=0)
    with VideoSession(_model, **SESSION) as session:
        if command["job"] == "encode":
            session.encode(source_frames(), command["path"], durability=durability)
        else:
            session.decode(command["store"], command["path"], durability=durability)


def plain_rows() -> np.ndarray:
    """What the plain writer writes; nothing in it equals a fill value."""
    return np.random.default_rng(6).standard_normal((21, 16, HEIGHT // 8, WIDTH // 8)).astype(np.float32)


def _plain(command: dict) -> None:
    """What one would write without this package: an array that is appended to, unit by unit."""
    import zarr

    rows = plain_rows()
    array = zarr.create_array(command["path"], shape=(0, *rows.shape[1:]), chunks=(4, *rows.shape[1:]), dtype="float32")
    for start in range(0, len(rows), 4):
        array.append(rows[start : start + 4])


def _child(command: dict) -> dict:
    result: dict = {}
    operations = Operations(command["path"], command.get("kill_at"), command.get("log"), command.get("kept"))
    started = time.perf_counter()
    try:
        operations.install()
        (_plain if command["job"] == "plain" else _longvid)(command)
    except BaseException:
        result["error"] = traceback.format_exc()
    return result | {"points": operations.points, "seconds": time.perf_counter() - started}


def _main() -> None:
    import numpy.random  # noqa: F401 - for the children
    import torch
    import zarr  # noqa: F401 - for the children

    import longvid.runtime.session  # noqa: F401 - for the children
    from longvid import VideoSession, load_model
    from longvid.store import frame_writer, latent_writer

    torch.set_num_threads(1)
    global _model
    _model = load_model("tiny")
    # Computes nothing, and does what would take every child a second.
    with VideoSession(_model, **SESSION) as session:
        session.plan(height=HEIGHT, width=WIDTH)
    latent_writer.TARGET_CHUNK_BYTES = _LATENT_UNIT_BYTES
    frame_writer.TARGET_CHUNK_BYTES = _FRAME_UNIT_BYTES
    serve(_child)


# ------------------------------------------------------------------------------------------- in the tests


class Forker(Forkers):
    """Runs jobs, each in a child of its own."""

    module = "support.fault_runs"

    def run(self, job: str, path: Path, *, mode: str = "fsync", **facts) -> Ending:
        command = {"job": job, "path": path, "mode": mode, **{k: v for k, v in facts.items() if v is not None}}
        answer = self.ask(command)
        assert answer["ended_by"] in (0, signal.SIGKILL), answer
        return Ending(
            killed=answer["ended_by"] == signal.SIGKILL,
            error=answer.get("error"),
            points=answer.get("points", 0),
            seconds=answer.get("seconds", 0.0),
        )


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    killed: bool
    error: str | None
    points: int
    seconds: float

    @property
    def finished(self) -> bool:
        return not self.killed and self.error is None


@dataclass(frozen=True)
class Truth:
    """The store of an undisturbed run."""

    arrays: dict[str, np.ndarray]
    files: set[str]
    points: int
    "at which such a run can be killed"

    @staticmethod
    def of(path: Path, points: int) -> Truth:
        return Truth(read_arrays(path), files_of(path), points)

    @property
    def frame_bytes(self) -> float:
        """Bytes of one frame in all arrays."""
        return sum(array.nbytes for array in self.arrays.values()) / len(self.arrays["frame_pts"])


def files_of(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


def root_of(path: Path) -> dict | None:
    """What readers go by: the root metadata, or None before anything is published."""
    try:
        root = json.loads((path / "zarr.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return root if root.get("consolidated_metadata") else None


def published_frames(path: Path) -> int:
    root = root_of(path)
    return 0 if root is None else root["attributes"]["longvid"]["num_frames"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays as any reader of zarr sees them; nothing before the first step."""
    import zarr

    if root_of(path) is None:
        return {}
    group = zarr.open_group(path, mode="r", use_consolidated=True)
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def is_prefix(arrays: dict[str, np.ndarray], truth: Truth) -> bool:
    """Whether what is published are the first rows of what an undisturbed run publishes."""
    return not arrays or (
        arrays.keys() == truth.arrays.keys()
        and all(same(array, truth.arrays[name][: len(array)]) for name, array in arrays.items())
    )


@dataclass
class Outcome:
    """What became of a store after a fault and the run that followed; empty lists if all is well."""

    wrong: list[str] = field(default_factory=list)
    "readers were given what nobody had published"
    failed: list[str] = field(default_factory=list)
    "anything else that was not as promised"
    lost_frames: int = 0

    @property
    def ok(self) -> bool:
        return not (self.wrong or self.failed or self.lost_frames)

    def see(self, path: Path, truth: Truth, *, least: int) -> int:
        """Look at what readers are shown after a fault; ``least`` frames have to be there. How many are."""
        try:
            arrays, frames = read_arrays(path), published_frames(path)
        except Exception as exc:
            self.failed.append(f"cannot be read: {exc!r}")
            self.lost_frames += least
            return 0
        if not is_prefix(arrays, truth):
            self.wrong.append(f"the {frames} frames that are published are not those of an undisturbed run")
        if len(arrays.get("frame_pts", ())) != frames:
            self.failed.append(f"{len(arrays.get('frame_pts', ()))} rows, {frames} frames are recorded")
        self.lost_frames += max(0, least - frames)
        return frames

    def see_end(self, path: Path, truth: Truth, ending: Ending) -> None:
        """Look at the store after the run that had to finish it."""
        if not ending.finished:
            self.failed.append(ending.error or "the resumed run was killed")
            return
        self.see(path, truth, least=len(truth.arrays["frame_pts"]))
        self.failed += _faults_of(path)
        if files_of(path) != truth.files:
            self.failed.append(f"files differ: {sorted(files_of(path) ^ truth.files)}")


def explain(bad: list[tuple[object, Outcome]]) -> str:
    """One line for every fault that was not survived: where, and what came of it."""
    return "\n".join(
        f"{where}: {[*outcome.wrong, *outcome.failed]}, lost {outcome.lost_frames}" for where, outcome in bad
    )


def _faults_of(path: Path) -> list[str]:
    from longvid.store.verify import verify

    try:
        found = verify(path)
    except Exception as exc:
        return [f"verify: {exc!r}"]
    return [] if found.ok and found.complete else [found.explain()]


def spread(total: int, count: int, seed: int) -> list[int]:
    """``count`` of ``total`` numbers, one in each of as many equal parts; all of them if there are fewer."""
    rng = random.Random(seed)
    if count >= total:
        return list(range(total))
    edges = [total * i // count for i in range(count + 1)]
    return [rng.randrange(a, b) for a, b in pairwise(edges)]


# ------------------------------------------------------------------------------------------- power cuts


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


if __name__ == "__main__":
    _main()

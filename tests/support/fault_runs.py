"""Runs that die in forked children: killed at any file operation, with a record of what a power cut needs to know.

The tests' own process reads stores with zarr, whose numbers have to be those of an undisturbed run. A run that resumes
another has to begin behind the last commit, and computes no more than its warm-up and one chunk of proof in front.
"""

from __future__ import annotations

import json
import random
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from support.file_operations import Operations, foreign_paths, paths_of
from support.forking import Forkers, serve
from support.media import write_media

NUM_FRAMES, HEIGHT, WIDTH, CHUNK_FRAMES = 96, 32, 48, 8
"""The tail is padded. Units of latents do not come out even: a run resumed after the last chunk has to know how many
frames there were. Those of frames do: a run may be killed when all is committed and the store is not yet complete."""
WARMUP = {"encode": 3, "decode": 4}
"chunks of these frames that `tiny` takes to forget"
_LATENT_UNIT_BYTES = 4 * 16 * (HEIGHT // 8) * (WIDTH // 8) * 2
_FRAME_UNIT_BYTES = 8 * HEIGHT * WIDTH * 3
"of a frame store's unit this is half"
SESSION = {
    "device": "cpu", "dtype": "float32", "layout": "contiguous", "paired_frames": "off", "chunk_frames": CHUNK_FRAMES
}  # fmt: skip
SEEK = "digest/.longvid/seek"
"the file of the seek points"
_model = None
"of the process that forks; children share it"


# ------------------------------------------------------------------------------------------- in the child


def source_frames() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def write_video(folder: Path, num_frames: int = NUM_FRAMES) -> Path:
    """A video of noise, with key frames where a run that resumes may seek to."""
    noise = np.random.default_rng(5).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return write_media(folder / "a.mp4", noise, options={"g": "12"})


def _longvid(command: dict) -> dict:
    from longvid import Durability, VideoSession

    durability = Durability(mode=command["mode"], publish_seconds=0)
    with VideoSession(_model, **SESSION) as session:
        source = command["video"] if command["job"] == "encode" else command["store"]
        report = getattr(session, command["job"])(source, command["path"], durability=durability)
    return {"resumed_from": report.resumed_from_frame, "computed": report.frames_computed}


def plain_rows() -> np.ndarray:
    """What the plain writer writes; nothing in it equals a fill value."""
    return np.random.default_rng(6).standard_normal((21, 16, HEIGHT // 8, WIDTH // 8)).astype(np.float32)


def _plain(command: dict) -> dict:
    """What one would write without this package: an array that is appended to, unit by unit."""
    import zarr

    rows = plain_rows()
    array = zarr.create_array(command["path"], shape=(0, *rows.shape[1:]), chunks=(4, *rows.shape[1:]), dtype="float32")
    for start in range(0, len(rows), 4):
        array.append(rows[start : start + 4])
    return {}


def _child(command: dict) -> dict:
    result: dict = {}
    operations = Operations(command["path"], command.get("kill_at"), command.get("log"), command.get("kept"))
    started = time.perf_counter()
    try:
        operations.install()
        result |= (_plain if command["job"] == "plain" else _longvid)(command)
    except BaseException:
        result["error"] = traceback.format_exc()
    facts = {"points": operations.points, "foreign": sorted(operations.foreign)}
    return result | facts | {"seconds": time.perf_counter() - started}


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

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._video = write_video(Path(self._folder.name))
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self._folder.cleanup()

    def run(self, job: str, path: Path, *, mode: str = "fsync", **facts) -> Ending:
        given = {name: value for name, value in facts.items() if value is not None}
        answer = self.ask({"job": job, "path": path, "mode": mode, "video": self._video, **given})
        ended_by = answer.pop("ended_by")
        assert ended_by in (0, signal.SIGKILL), (ended_by, answer)
        return Ending(killed=ended_by == signal.SIGKILL, **answer)


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    killed: bool
    error: str | None = None
    points: int = 0
    seconds: float = 0.0
    resumed_from: int = 0
    computed: int = 0
    "frames that went through the model"
    foreign: list[str] = field(default_factory=list)
    "see :class:`Operations`"

    @property
    def finished(self) -> bool:
        return not self.killed and self.error is None


class Finish(Protocol):
    """What a run tells that had to finish a store."""

    finished: bool
    error: str | None
    resumed_from: int
    computed: int
    foreign: list[str]


@dataclass(frozen=True)
class Truth:
    """The store of an undisturbed run."""

    job: str
    arrays: dict[str, np.ndarray]
    files: set[str]
    points: int
    "at which such a run can be killed"

    @staticmethod
    def of(job: str, path: Path, ending: Any) -> Truth:
        assert ending.finished, ending.error
        assert not ending.foreign, ending.foreign
        truth = Truth(job, read_arrays(path), paths_of(path), ending.points)
        assert ending.computed == truth.num_frames
        assert len(truth.arrays["digest"]) >= 6  # units
        assert (SEEK in truth.files) == (job == "encode")
        return truth

    @property
    def num_frames(self) -> int:
        return len(self.arrays["frame_pts"])

    @property
    def frame_bytes(self) -> float:
        """Bytes of one frame in all arrays."""
        return sum(array.nbytes for array in self.arrays.values()) / self.num_frames

    def start(self, known: int) -> int:
        """The first chunk of a run that resumes when so many frames are committed: warm-up and one of proof before."""
        first = (known - 1) // CHUNK_FRAMES - 1
        return first - WARMUP[self.job] if first > WARMUP[self.job] else 0

    def to_compute(self, known: int) -> int:
        """The frames that go through the model in such a run."""
        start = self.start(known)
        return self.num_frames - (0 if start == 0 else 1 + start * CHUNK_FRAMES)


def root_of(path: Path) -> dict | None:
    """What readers go by: the root metadata, or None before anything is published."""
    try:
        root = json.loads((path / "zarr.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return root if root.get("consolidated_metadata") else None


def is_complete(root: dict | None) -> bool:
    return root is not None and root["attributes"]["longvid"]["status"] == "complete"


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
    frames: int = 0
    "that readers were shown last"
    complete: bool = False
    "whether they were told that these are all"
    started_in_the_middle: bool = False
    "whether the run that followed did not begin with frame 0"

    @property
    def ok(self) -> bool:
        return not (self.wrong or self.failed or self.lost_frames)

    def see(self, path: Path, truth: Truth, *, least: int) -> int:
        """Look at what readers are shown after a fault; ``least`` frames have to be there. How many are."""
        self.failed += [f"{name} is not of the format" for name in foreign_paths(path)]
        try:
            arrays, root = read_arrays(path), root_of(path)
            self.frames, self.complete = published_frames(path), is_complete(root)
        except Exception as exc:
            self.failed.append(f"cannot be read: {exc!r}")
            self.lost_frames += least
            return 0
        if not is_prefix(arrays, truth):
            self.wrong.append(f"the {self.frames} frames that are published are not those of an undisturbed run")
        if len(arrays.get("frame_pts", ())) != self.frames:
            self.failed.append(f"{len(arrays.get('frame_pts', ()))} rows, {self.frames} frames are recorded")
        self.lost_frames += max(0, least - self.frames)
        return self.frames

    def see_end(self, path: Path, truth: Truth, ending: Finish) -> None:
        """Look at the store after the run that had to finish it."""
        if not ending.finished:
            self.failed.append(ending.error or "the resumed run was killed")
            return
        computed = 0 if self.complete else truth.to_compute(self.frames)
        self.started_in_the_middle = 0 < computed < truth.num_frames
        if (ending.resumed_from, ending.computed) != (self.frames, computed):
            self.failed.append(
                f"resumed from {ending.resumed_from} and computed {ending.computed} frames, {computed} of them had to "
                f"be, since {self.frames} were there"
            )
        self.failed += [f"{name} was written" for name in ending.foreign]
        self.see(path, truth, least=truth.num_frames)
        self.failed += _faults_of(path)
        if differ := (paths_of(path) ^ truth.files) - {SEEK}:  # which is not synced, and may be lost
            self.failed.append(f"files differ: {sorted(differ)}")


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


if __name__ == "__main__":
    _main()

"""Owns writing: how a store is created, grows, is resumed and completed. No torch here.

Data are appended in commit units of one zarr chunk and become visible by **one atomic replacement of the root
metadata**, which carries the lengths of all arrays::

    rows -> unit -> chunk files, coordinates, digest -> [on the disk] -> root metadata -> readers

Readers never see a frame that is not complete and durable, even while a writer is at work or after it was killed. A
writer that finds an unfinished store with its own fingerprint resumes it. It then receives some rows that are committed
already (:meth:`StoreWriter.start_at`): they have to be equal, bit for bit, before anything is written.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr

from longvid import __version__
from longvid.errors import StoreError
from longvid.files import disk_errors, sync_path, write_durably
from longvid.store.durability import WriteOptions
from longvid.store.format import (
    COORDINATE_NAMES,
    DIGEST_BYTES,
    DTYPES,
    FORMAT_VERSION,
    OWN_NAMES,
    PRIVATE,
    StoreKind,
    array_document,
    checksum_is_right,
    chunk_file,
    is_system_file,
    unit_digest,
    with_checksum,
)
from longvid.store.lock import WriterLock
from longvid.store.metadata import RunFacts, StoreMetadata, ratio
from longvid.store.reader import StoreReader, bytes_of, is_ours
from longvid.store.staging import StagedStore, delete, open_array, sweep
from longvid.store.target import Committed, Found, check_target
from longvid.store.validation import check_tree

__all__ = ["TARGET_CHUNK_BYTES", "StoreWriter", "Unit"]

TARGET_CHUNK_BYTES = 2 * 2**20
_LAST_TO_GO = {"digest": 1, "zarr.json": 2}

Unit = dict[str, npt.NDArray[Any]]
"rows of one unit by the name of their array"


class StoreWriter(ABC):
    """A store that is being written. Use it in a ``with`` statement.

    Entering acquires the lock, then creates, replaces or resumes the store. On a clean exit the store is complete,
    unless :meth:`pause` was called. On an exception nothing more is committed; if nothing was committed yet, the folder
    is removed again.

    Args:
        path: the folder; its parent exists.
        facts, options: what is recorded of the run, and what it may replace or resume.
        attributes, recorded: of the group, and of its attribute ``longvid``, beside what every store has.
        frame_rate: mean frames per second, recorded.

    Raises:
        StoreError: see :func:`.check_target` and :meth:`.Found.decide`; another run writes here (kind ``"locked"``);
            or the disk refuses.
    """

    kind: StoreKind
    rows: dict[str, tuple[int, ...]]
    "shape of one row of every data array, the main array first; their chunks are written once, in units"
    dtype: str
    "of the data arrays"
    array_attributes: dict[str, dict[str, Any]]
    "attributes of the arrays that have some"
    num_frames = 0
    "frames of the video in the units that were received, without padding"
    unit_rows: int
    "rows of the data arrays in a whole unit; a store that is resumed keeps its own"

    def __init__(
        self,
        path: str | os.PathLike[str],
        facts: RunFacts,
        options: WriteOptions,
        attributes: dict[str, Any],
        recorded: dict[str, Any],
        frame_rate: Fraction | None,
    ) -> None:
        self.path = Path(path)
        self._options, self.durability, self._mend = options, options.durability, options.mend
        self._sync = self.durability.syncs
        self._epoch = uuid.uuid4().hex
        about = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "status": "writing",
            "num_frames": 0,
            "created_by": f"longvid {__version__}",
            "versions": {"zarr": zarr.__version__, "numpy": np.__version__},
            "frame_rate": ratio(frame_rate),
            **recorded,
            **facts.extra,
            "fingerprint": dict(facts.fingerprint),
            "epoch": self._epoch,
        }
        self._attributes = {"Conventions": "CF-1.11", "longvid": about, **attributes}
        self._root: bytes | None = None
        "the root metadata as this run found them, or wrote them last"
        self._owns_root = False
        self._documents: dict[str, dict[str, Any]] = {}
        "the metadata of every array, with the rows that were received"
        self._waiting: dict[str, list[npt.NDArray[Any]]] = {}
        "rows that are not a unit yet, by the name of their array"
        self._about = about
        self._there: Committed | None = None
        "what was committed when the store was resumed"
        self._at = Counter[str]()
        "the row that comes next, by the name of its array"
        self._chain = hashlib.blake2b(digest_size=DIGEST_BYTES)
        "the digest of all digests so far"
        self._created_folder = self._paused = False
        self._last_commit = -float("inf")
        self.num_units = 0
        "units that are in the store: found there, or written now"
        self.committed_units = 0
        "units that readers see"

    def __enter__(self) -> Self:
        with disk_errors(self.path), ExitStack() as undo:
            self._decide(check_target(self.path))  # before anything is made
            self._created_folder = not self.path.is_dir()
            (self.path / PRIVATE).mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock.acquire(self.path / PRIVATE / "lock", lock=self.durability.lock)
            undo.callback(self._lock.release)
            found = check_target(self.path)  # again, since another run may have held the lock until now
            decision = self._decide(found)
            self._staged = StagedStore(self.path, sync=self._sync, rewritten=lambda name: name not in self.rows)
            if decision == "resume":
                self._open(found)
            else:
                undo.callback(self._remove)
                if decision == "replace":
                    self._clear()
                self._create()
            undo.pop_all()
        return self

    def _decide(self, found: Found) -> Literal["create", "replace", "resume"]:
        decision = found.decide(
            self._about["fingerprint"], overwrite=self._options.overwrite, resume=self._options.resume
        )
        if self._mend:
            return "resume"
        if decision == "done":
            raise StoreError(f"{self.path} is a complete store of this run; nothing is left to write", kind="exists")
        return decision

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                self._finish()
        finally:
            try:
                if self._holds_nothing():
                    self._remove()
            finally:
                self._lock.release()

    @property
    def seek_index(self) -> Path:
        """A file for the seek points of the source, so that a run that continues this one need not look for them."""
        return self.path / PRIVATE / "seek"

    @property
    def wanted_frames(self) -> tuple[int, int | None]:
        """Half-open range of frames that have to be computed, from the first one of the store on; None for the end."""
        if self._there is None or not self._mend:
            return self.known_frames, None
        first, last = (self._there.metadata.frames(unit) for unit in (min(self._mend), max(self._mend)))
        return first[0], last[1]

    @property
    def known_frames(self) -> int:
        """Frames that were committed when the store was resumed."""
        return 0 if self._there is None else self._there.metadata.num_frames

    def known(self, name: str) -> npt.NDArray[Any]:
        """A coordinate of the frames that were committed when the store was resumed, an empty array if none were."""
        return np.zeros(0, DTYPES[name][0]) if self._there is None else self._there.columns[name]

    def start_at(self, frame: int) -> None:
        """Say which frame comes next, by the first one of the store; by default that one."""
        self._at = Counter(dict.fromkeys(self.rows, self._row(frame)) | {"frame_pts": frame, "frame_valid": frame})

    def _row(self, frame: int) -> int:
        return frame

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What is recorded of the run that decides the bits of the result."""
        return dict(self._attributes["longvid"]["fingerprint"])

    def record(self, name: str, value: Any) -> None:
        """Say something of the run in the attribute ``longvid``, from the next commit on."""
        self._attributes["longvid"][name] = value

    def check_times(self, frame: int, pts_T: npt.NDArray[np.int64]) -> None:
        """Raise StoreError of kind ``"mismatch"`` if committed frames from ``frame`` on have other time stamps."""
        if self._there is not None:
            self._there.compare("frame_pts", frame, np.asarray(pts_T, np.int64))

    def pause(self) -> None:
        """Leave the store unfinished on the next clean exit, with all whole units committed."""
        self._paused = True

    def _finish(self) -> None:
        with disk_errors(self.path):
            if self._mend:
                self._staged.commit((self.path / "zarr.json").read_bytes(), self._documents, settled=True)
                return
            if self._paused:
                if self.num_units > self.committed_units:
                    self.commit()
                return
            if self._num_waiting:
                self._take_unit(self._unit(self._num_waiting))
            if not self.num_units:
                raise StoreError(f"{self.path} would hold no frames; it was not written")
            if self._at["frame_pts"] < self.known_frames:
                raise StoreError(
                    f"{self.path}: the source ended after {self._at['frame_pts']} frames, before those that were "
                    "committed; it has changed, or cannot be read as before",
                    kind="mismatch",
                )
            self.commit("complete")

    def _create(self) -> None:
        self._write_root(None)
        if self._sync:
            sync_path(self.path.parent)
        digest = {"long_name": "blake2b of each unit's data, then of its coordinates"}
        attributes = {"digest": digest, **self.array_attributes}
        rows = (
            self.rows | dict.fromkeys(COORDINATE_NAMES[self.kind], ()) | {"digest": (len(self.rows) + 1, DIGEST_BYTES)}
        )
        for name, row in rows.items():
            dtype, about = self.dtype if name in self.rows else DTYPES[name][0], attributes.get(name)
            self._documents[name] = array_document(self.kind, name, (0, *row), dtype, self.unit_rows, about)

    def _open(self, found: Found) -> None:
        """Resume what is there: lengths, digests and metadata as the root has them, and nothing beyond."""
        content, metadata = (self.path / "zarr.json").read_bytes(), found.metadata
        if metadata is None or not checksum_is_right(content):
            raise StoreError(
                f"{self.path}: the root metadata are damaged; `longvid repair` restores them", kind="corrupt"
            )
        check_tree(self.path)
        self._attributes, self._root = metadata.attributes, content
        self._attributes["longvid"]["epoch"] = self._epoch
        if self._mend or not metadata.arrays:
            sweep(self.path, tuple(self.rows), metadata.num_units)
        if not metadata.arrays:  # the run ended before its first commit
            self._create()
            return
        # What will be written again as the arrays grow is compared while it can still be refused.
        self._there = Committed(StoreReader(self.path, metadata, content), self._about, self._options.resume)
        self._chain.update(self._there.digests.tobytes())
        self._documents = {name: copy.deepcopy(array.document) for name, array in metadata.arrays.items()}
        self.unit_rows, self.num_frames = metadata.main.chunks[0], metadata.num_frames
        self.num_units = self.committed_units = metadata.num_units
        if not self._mend:
            self._check_chunks(metadata)

    def _check_chunks(self, metadata: StoreMetadata) -> None:
        """Require that every committed chunk exists. Readers compare what is in them."""
        for name in metadata.data_names:
            for file in metadata.arrays[name].chunk_files:
                path = self.path / name / file
                if not path.is_file() or not path.stat().st_size:
                    raise StoreError(
                        f"{self.path}: the chunk {name}/{path.name} is missing or empty; `longvid repair` computes "
                        "it again, then run this once more",
                        kind="corrupt",
                    )

    def _take_over(self) -> None:
        """Begin to write to a store that is resumed, now that the run has reproduced what is there. A writer of an
        older epoch that is still alive sees then that it lost the store."""
        if self._there is None or self._owns_root:
            return
        if self._there.differs:
            self._attributes["longvid"] |= self._there.seam()
        self._write_root(self._documents)
        sweep(self.path, tuple(self.rows), self.committed_units)

    def _clear(self) -> None:
        """Remove the store that is to be replaced. If it is interrupted, a store of ours remains that holds nothing."""
        facts = {**self._attributes["longvid"], "fingerprint": {}}
        emptied = {"zarr_format": 3, "node_type": "group", "attributes": {"longvid": facts}}
        write_durably(self.path / "zarr.json", with_checksum(emptied), sync=self._sync)
        private = self.path / PRIVATE
        kept = (private.parent, private, private / "lock", self.path / "zarr.json")
        for entry in (*self.path.iterdir(), *private.parent.iterdir(), *private.iterdir()):
            if entry not in kept and not is_system_file(entry.name):
                delete(entry)
        (self.path / "zarr.json").unlink()

    def _holds_nothing(self) -> bool:
        """Whether there is nothing to resume from, and no other run has taken the store over."""
        if self.committed_units or self._paused:
            return False
        return bytes_of(self.path / "zarr.json") in (None, self._root)  # a commit that failed may be visible

    def _remove(self) -> None:
        """Remove what this writer made, unless foreign files were added. The next run removes what stays."""
        with suppress(OSError):
            entries = [entry for entry in self.path.iterdir() if not is_system_file(entry.name)]
            if any(entry.name not in OWN_NAMES for entry in entries):
                return
            # What shows that the folder is ours is removed last, and stays if anything else has to.
            for entry in sorted(entries, key=lambda entry: _LAST_TO_GO.get(entry.name, 0)):
                delete(entry)
            if self._created_folder:
                self.path.rmdir()  # fails if foreign files were added just now

    def _receive(self, rows: Unit) -> None:
        """Compare rows that are there already, take the others, and commit whole units when it is time."""
        with disk_errors(self.path):
            for name, values in rows.items():
                start, known = self._at[name], 0
                self._at[name] += len(values)
                if self._there is not None and self._mend:
                    self._mend_rows(self._there, name, start, values)
                    continue
                if self._there is not None:
                    self._there.compare(name, start, values)
                    known = max(0, self._there.metadata.arrays[name].shape[0] - start)
                if known < len(values):
                    self._waiting.setdefault(name, []).append(values[known:])
            while not self._mend and self._num_waiting >= self.unit_rows:
                self._take_unit(self._unit(self.unit_rows))
            waiting = self.num_units - self.committed_units
            if waiting > 0 and self.durability.commit_due(seconds=time.monotonic() - self._last_commit, units=waiting):
                self.commit()

    def _mend_rows(self, there: Committed, name: str, start: int, values: npt.NDArray[Any]) -> None:
        """Write those units again that are to be mended and that these rows complete."""
        for row, value in enumerate(values, start) if name in self.rows else ():
            unit = row // self.unit_rows
            first, stop = there.metadata.rows(unit)
            waiting = self._waiting.setdefault(name, [])
            if unit not in self._mend or len(waiting) != row - first:
                continue
            waiting.append(value)
            if row == stop - 1:
                rows = np.stack(self._waiting.pop(name))
                there.check_unit(name, unit, rows)
                # zarr may look into a chunk before it replaces it, and this one is damaged
                (self.path / name / chunk_file(unit, rows.ndim)).unlink(missing_ok=True)
                open_array(self._staged, name, self._documents[name])[first:stop] = rows

    @property
    def _num_waiting(self) -> int:
        """Rows of the main array that wait."""
        return sum(map(len, self._waiting.get(next(iter(self.rows)), [])))

    def _take(self, name: str, count: int) -> npt.NDArray[Any]:
        """Remove the first ``count`` rows of an array that wait."""
        rows = np.concatenate(self._waiting.pop(name, []) or [np.zeros(0, DTYPES[name][0])])
        if count < len(rows):
            self._waiting[name] = [rows[count:].copy()]
        return rows[:count]

    def _take_unit(self, unit: Unit) -> None:
        """Append one unit."""
        self._take_over()
        # a digest for each data array, then one for all coordinates
        coordinates = [unit[name] for name in COORDINATE_NAMES[self.kind]]
        digests = np.stack([*(unit_digest([unit[name]]) for name in self.rows), unit_digest(coordinates)])
        for name, values in unit.items():
            self._append(name, values)
        self._append("digest", digests[None])
        self._chain.update(digests.tobytes())
        self.num_units += 1

    def _append(self, name: str, values: npt.NDArray[Any]) -> None:
        document = self._documents[name]
        start = document["shape"][0]
        document["shape"][0] += len(values)
        open_array(self._staged, name, document)[start:] = values

    def commit(self, status: Literal["writing", "complete"] = "writing") -> None:
        """Make everything that was received durable, then visible. Nothing else makes data visible."""
        self._take_over()
        self._attributes["longvid"] |= {"status": status, "num_frames": self.num_frames}
        self._write_root(self._documents)
        self._last_commit = time.monotonic()

    def _write_root(self, documents: dict[str, dict[str, Any]] | None) -> None:
        root: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": self._attributes}
        if documents is not None:
            root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": documents}
            self._attributes["longvid"]["digests"] = self._chain.hexdigest()
        # zarr.consolidate_metadata keeps the stored attributes, so status and lengths would need two writes.
        content = with_checksum(root)
        complete = self._attributes["longvid"]["status"] == "complete"
        if documents is None:
            write_durably(self.path / "zarr.json", content, sync=self._sync)
            if self._sync:
                sync_path(self.path)
        else:
            self._require_own_root()
            self._staged.commit(content, documents, settled=complete)
            self.committed_units = max(self.committed_units, self.num_units)  # also if what follows fails
        self._root, self._owns_root = content, True
        write_durably(self.path / PRIVATE / "root.json", content, sync=self._sync and complete)

    def _require_own_root(self) -> None:
        """Require that no run took the store over. The lock prevents it, but not every file system has locks."""
        there = bytes_of(self.path / "zarr.json")
        if there == self._root:
            return
        if is_ours(there):
            raise StoreError(f"{self.path} was taken over by another run; this one ends", kind="locked")
        raise StoreError(
            f"{self.path}: the root metadata disappeared or were damaged while the store was being written",
            kind="corrupt",
        )

    @abstractmethod
    def _unit(self, count: int) -> Unit:
        """Remove ``count`` rows of the main array that wait, with their coordinates, as a unit."""

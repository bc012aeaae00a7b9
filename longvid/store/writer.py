"""The zarr store of one video, write side: how it comes into being, grows, is continued and completed. No torch here.

Data is appended in units of one zarr chunk and becomes visible by **one atomic replacement of the root metadata**,
which carries the lengths of all arrays::

    rows -> unit -> chunk files, coordinates, digest -> [on the disk] -> root metadata -> readers

Readers never see a frame that is not complete and durable, also while a writer is at work or after it was killed. A
writer that finds an unfinished store of its own fingerprint continues it. It may be given rows again that are published
already, since a run goes on from its last snapshot: those have to be the same, bit for bit, and are not written again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from longvid import __version__
from longvid.errors import StoreError
from longvid.store.durability import Durability
from longvid.store.format import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    MISSING,
    OWN_NAMES,
    PRIVATE,
    StoreLayout,
    chunk_file,
    seal_is_whole,
    sealed,
    serialized,
    unit_digest,
)
from longvid.store.lock import WriterLock
from longvid.store.reader import STORE_ERRORS, Found, check_target, read_root
from longvid.store.staging import StagedStore, is_partial, sync_folder, write_durably
from longvid.store.validation import check_group, check_tree

__all__ = ["TARGET_CHUNK_BYTES", "StoreWriter", "Unit", "disk_errors", "first_facts", "settle_complete", "take"]

TARGET_CHUNK_BYTES = 2 * 2**20
COORDINATE_CHUNK = 4096
_DIGEST_CHUNK = 1024
_LAST_TO_GO = {"digest": 1, "zarr.json": 2}
_CHUNK_FILE = re.compile(r"c\.(\d+)(\.0)*")

Unit = dict[str, npt.NDArray[Any]]
"rows of one unit by the name of their array"


class StoreWriter(ABC):
    """Life of a store that is being written. Use it in a ``with`` statement.

    Entering takes the lock, then creates the store, or clears it away and creates it, or opens it to be continued. On
    a clean exit the store is complete, unless :meth:`pause` was called. On an exception nothing more is published; if
    nothing was published yet, the folder is removed again.

    Args:
        path: the folder; its parent exists.
        attributes: of the group.
        fingerprint: what decides the bits of the result, recorded; see :mod:`longvid.store.fingerprint`.
        durability: when results are safe.
        overwrite: replace an existing longvid store.
        resume: continue an unfinished store of the same fingerprint.
        mend: numbers of published units whose data is to be written again, in a store of the same fingerprint,
            finished or not; nothing else is written then. What comes out other than it was published is an error.

    Raises:
        StoreError: see :func:`.check_target` and :meth:`.Found.decide`; another run writes here (kind ``"locked"``);
            or the disk says no.
    """

    data_names: ClassVar[tuple[str, ...]]
    "arrays whose chunks are written once, in units; the first one is always there"
    unit_rows: int
    "of the data arrays in a whole unit; of a store that is continued, what it was begun with"

    def __init__(
        self,
        path: str | os.PathLike[str],
        attributes: dict[str, Any],
        *,
        fingerprint: Mapping[str, Any],
        durability: Durability,
        overwrite: bool,
        resume: bool,
        mend: frozenset[int],
    ) -> None:
        self.path = Path(path)
        self.durability = durability
        self._overwrite = overwrite
        self._resume = resume
        self._mend = mend
        self._fingerprint = fingerprint
        self._epoch = uuid.uuid4().hex
        attributes["longvid"] |= {"fingerprint": dict(fingerprint), "epoch": self._epoch}
        self._attributes = attributes
        self._epoch_there: str | None = self._epoch
        "that of the writer who wrote the root metadata last"
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._chain = hashlib.blake2b(digest_size=DIGEST_BYTES)
        "of all digests so far"
        self._created_folder = self._published = self._paused = False
        self._last_publish = -float("inf")
        self.num_units = 0
        "units that were taken, counted from the first of the video: written now, or found to be there already"
        self.published_units = 0
        "units that readers see"

    # ------------------------------------------------------------------------------------------- life

    def __enter__(self) -> Self:
        with disk_errors(self.path), ExitStack() as undo:
            found = check_target(self.path)
            self._decide(found)  # before anything is made
            self._created_folder = not self.path.is_dir()
            (self.path / PRIVATE).mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock.acquire(self.path / PRIVATE / "lock")
            undo.callback(self._lock.release)
            found = check_target(self.path)  # under the lock, which somebody else may have had until now
            decision = self._decide(found)
            self._staged = StagedStore(self.path, sync=self.durability.syncs, rewritten=self._is_rewritten)
            if decision == "resume":
                self._open(found)
            else:
                undo.callback(self._remove)
                if decision == "replace":
                    self._clear(found.root)
                self._create()
            undo.pop_all()
        return self

    def _decide(self, found: Found) -> Literal["create", "replace", "resume"]:
        decision = found.decide(self._fingerprint, overwrite=self._overwrite, resume=self._resume)
        if self._mend:
            return "resume"
        if decision == "done":
            raise StoreError(f"{self.path} exists: a complete store of this run; nothing is left to write")
        return decision

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
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
    def snapshots_folder(self) -> Path:
        """Where snapshots of this run lie."""
        return self.path / PRIVATE / "snapshots"

    @property
    def first_wanted(self) -> int:
        """The first unit that has to be computed: a run may go on from any snapshot that lies before it."""
        return min(self._mend, default=self.published_units)

    def wants_nothing_from(self, row: int) -> bool:
        """Whether no row of the main array from this one on has to be computed, although the video may go on."""
        return bool(self._mend) and row >= (max(self._mend) + 1) * self.unit_rows

    def pause(self) -> None:
        """Leave the store unfinished on the next clean exit, with all whole units published."""
        self._paused = True

    def _finish(self) -> None:
        with disk_errors(self.path):
            if self._mend:
                rest = None if self._paused else self._rest()
                if rest is not None:
                    self._take_unit(rest)
                self._staged.publish((self.path / "zarr.json").read_bytes(), settled=True)
                return
            if self._paused:
                if self.num_units > self.published_units:
                    self.publish()
                return
            rest = self._rest()
            if rest is not None:
                self._take_unit(rest)
            if not self.num_units:
                raise StoreError(f"{self.path} would hold no frames; it was not written")
            if self.num_units < self.published_units:
                raise StoreError(
                    f"{self.path}: the source ended after {self.num_frames} frames, before those that were published; "
                    "it has changed, or cannot be read as before",
                    kind="mismatch",
                )
            self.publish("complete")
            if not self.durability.keep_snapshots:
                shutil.rmtree(self.snapshots_folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------- coming into being

    def _create(self) -> None:
        self._write_root(None)
        if self.durability.syncs:
            sync_folder(self.path.parent)
        self._create_arrays(zarr.open_group(self._staged, mode="r+", zarr_format=3, use_consolidated=False))

    def _open(self, found: Found) -> None:
        """Continue what is there: lengths, digests and metadata as the root has them, and nothing beyond."""
        if not seal_is_whole((self.path / "zarr.json").read_bytes()):
            raise StoreError(f"{self.path}: the root metadata is damaged; longvid repair restores it", kind="corrupt")
        check_tree(self.path)
        check_group(found.root, where=str(self.path))
        self._attributes = found.root["attributes"]
        if self._mend:
            self._epoch = self._attributes["longvid"]["epoch"]
        self._epoch_there = self._attributes["longvid"].get("epoch")
        self._attributes["longvid"]["epoch"] = self._epoch
        layout = StoreLayout(found.root)
        members = layout.members
        self._sweep(layout.num_units)
        if not members:  # it ended before the first step
            self._create()
            return
        for name, document in members.items():
            self._staged.stage(f"{name}/zarr.json", serialized(document))
        try:
            self._take_over(layout)
        except STORE_ERRORS as exc:
            raise StoreError(
                f"{self.path}: its digests or coordinates are damaged ({exc}); longvid repair restores them, then run "
                "this once more",
                kind="corrupt",
            ) from exc
        self._published = True
        self._check_chunks()
        if self._mend:
            return
        # Takes the store over: a writer of an older epoch that comes back to life sees that it lost it.
        self._write_root(members)

    def _take_over(self, layout: StoreLayout) -> None:
        """Open the arrays of a store, and read what will be written again as they grow, while it can be refused."""
        for name in layout.members:
            self._arrays[name] = zarr.open_array(
                self._staged, path=name, mode="r+", zarr_format=3, config={"write_empty_chunks": True}
            )
        self.unit_rows, self.published_units = layout.unit_rows, layout.num_units
        columns = {name: np.asarray(self._arrays[name][:]) for name in (*layout.coordinate_names, "digest")}
        self._chain.update(columns["digest"].tobytes())
        if self._chain.hexdigest() != layout.facts.get("digests"):
            raise ValueError("the digests are not those that were published")
        for unit in range(self.published_units):
            if not layout.coordinates_agree(columns, columns["digest"], unit):
                raise ValueError(f"the coordinates of frames from {layout.frames(unit)[0]} on are not as published")

    def _check_chunks(self) -> None:
        """Every published chunk is there. What is in them is compared by those who read."""
        for name in self.data_names:
            for unit in set(range(self.published_units if name in self._arrays else 0)) - self._mend:
                path = self.path / name / chunk_file(unit, self._arrays[name].ndim)
                if not path.is_file() or not path.stat().st_size:
                    raise StoreError(
                        f"{self.path}: the chunk {name}/{path.name} is missing or empty; longvid repair computes it "
                        "again, then run this once more",
                        kind="corrupt",
                    )

    def _sweep(self, published: int) -> None:
        """Remove what an earlier run did not finish: files half written, and chunks that were never published."""
        for partial in partial_files(self.path):
            os.unlink(partial)
        for name in self.data_names:
            if (self.path / name).is_dir():
                for entry in os.scandir(self.path / name):
                    number = _CHUNK_FILE.fullmatch(entry.name)
                    if number is not None and int(number[1]) >= published:
                        os.unlink(entry.path)

    def _clear(self, root: dict[str, Any]) -> None:
        """Take away the store that is to be replaced. Cut short, it is left as one of ours that holds nothing."""
        facts = {**root["attributes"]["longvid"], "status": "writing", "num_frames": 0, "fingerprint": {}}
        emptied = {"zarr_format": 3, "node_type": "group", "attributes": {"longvid": facts}}
        write_durably(self.path / "zarr.json", sealed(emptied), sync=self.durability.syncs)
        private = self.path / PRIVATE
        for entry in (*self.path.iterdir(), *private.parent.iterdir(), *private.iterdir()):
            if entry in (private.parent, private, private / "lock", self.path / "zarr.json"):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (self.path / "zarr.json").unlink()

    def _holds_nothing(self) -> bool:
        """Whether there is nothing to go on from, and nobody else has taken the store over."""
        if self._published or self._paused or any(self.snapshots_folder.glob("*")):
            return False
        root = read_root(self.path)  # a step that failed may have been visible before it did
        return root is None or not (
            StoreLayout(root).members or root["attributes"]["longvid"].get("epoch") != self._epoch_there
        )

    def _remove(self) -> None:
        """Take away what this writer made, unless something foreign came into it. The next run clears what stays."""
        with suppress(OSError):
            entries = list(self.path.iterdir())
            if any(entry.name not in OWN_NAMES for entry in entries):
                return
            # What says that the folder is ours goes last, and stays if anything else has to.
            for entry in sorted(entries, key=lambda entry: _LAST_TO_GO.get(entry.name, 0)):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            if self._created_folder:
                self.path.rmdir()  # unless something foreign came into it just now

    # ------------------------------------------------------------------------------------------- growing

    def _take_unit(self, unit: Unit) -> None:
        """Append one unit, or find that it is published already, and the same."""
        number = self.num_units
        digests = self._digests(unit)
        if number < self.published_units:
            self._compare(number, digests)
            if number in self._mend:
                self._write_again(number, unit)
        else:
            for name, values in unit.items():
                self._append(name, values)
            self._append("digest", digests[None])
            self._chain.update(digests.tobytes())
        self.num_units += 1

    def _digests(self, unit: Unit) -> npt.NDArray[np.uint8]:
        """One row for each data array, then one for all coordinates."""
        data = [unit_digest([unit[name]]) for name in self.data_names if name in unit]
        coordinates = unit_digest([values for name, values in unit.items() if name not in self.data_names])
        return np.stack([*data, coordinates])

    def _compare(self, number: int, digests: npt.NDArray[np.uint8]) -> None:
        if not np.array_equal(np.asarray(self._arrays["digest"][number]), digests):
            raise StoreError(
                f"{self.path}: unit {number} came out other than it was published, so this run cannot continue that "
                "one: the source gives other frames, or the same model computes other numbers here than it did there. "
                "longvid verify tells whether the store is damaged; --overwrite --no-resume starts over",
                kind="mismatch",
            )

    def _write_again(self, number: int, unit: Unit) -> None:
        for name in self.data_names:
            if name in unit:
                array = self._arrays[name]
                # zarr may look into a chunk before it replaces it, and this one is damaged
                (self.path / name / chunk_file(number, array.ndim)).unlink(missing_ok=True)
                start = number * array.chunks[0]
                array[start : start + len(unit[name])] = unit[name]

    def _append(self, name: str, values: npt.NDArray[Any]) -> None:
        array = self._arrays[name]
        start = array.shape[0]
        array.resize((start + len(values), *array.shape[1:]))
        array[start:] = values

    def _publish_if_due(self) -> None:
        waiting = self.num_units - self.published_units
        if waiting > 0 and self.durability.publish_due(seconds=time.monotonic() - self._last_publish, units=waiting):
            self.publish()

    def publish(self, status: Literal["writing", "complete"] = "writing") -> None:
        """The one publish point: everything that was taken becomes durable, then visible."""
        self._attributes["longvid"] |= {"status": status, "num_frames": self.num_frames}
        members = {name: json.loads(self._staged.document(name)) for name in self._arrays}
        for name, document in members.items():
            self._staged.stage(f"{name}/zarr.json", serialized(document))
        self._write_root(members)
        self._published = True
        self.published_units = max(self.published_units, self.num_units)
        self._last_publish = time.monotonic()

    def _write_root(self, members: Mapping[str, Any] | None) -> None:
        root: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": self._attributes}
        if members is not None:
            root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
            self._attributes["longvid"]["digests"] = self._chain.hexdigest()
        # zarr.consolidate_metadata keeps the attributes that are stored, so status and lengths would need two writes.
        content = sealed(root)
        complete = self._attributes["longvid"]["status"] == "complete"
        if members is None:
            write_durably(self.path / "zarr.json", content, sync=self.durability.syncs)
            if self.durability.syncs:
                sync_folder(self.path)
            self._epoch_there = self._epoch
        else:
            self._require_epoch()
            self._staged.publish(content, settled=complete)
        write_durably(self.path / PRIVATE / "root.json", content, sync=self.durability.syncs and complete)

    def _require_epoch(self) -> None:
        """Nobody took the store over. The lock should see to that; not every file system keeps one."""
        root = read_root(self.path)
        if root is None:
            raise StoreError(
                f"{self.path}: the root metadata has gone or was damaged while the store was being written",
                kind="corrupt",
            )
        if root["attributes"]["longvid"].get("epoch") != self._epoch_there:
            raise StoreError(f"{self.path} was taken over by another run; this one ends", kind="locked")
        self._epoch_there = self._epoch

    def _array(
        self,
        group: zarr.Group,
        name: str,
        shape: tuple[int, ...],
        chunk: int,
        dtype: str,
        dimensions: tuple[str, ...],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """An array of length 0 in time, with the codecs, names and fill of this format."""
        item = np.dtype(dtype)
        fill: Any = {"f": float("nan"), "i": MISSING}.get(item.kind, 0)
        self._arrays[name] = group.create_array(
            name,
            shape=(0, *shape),
            chunks=(chunk, *shape),
            dtype=dtype,
            fill_value=fill,
            dimension_names=dimensions,
            # one folder for all chunks of an array, so that a new chunk needs one folder on the disk, not four
            chunk_key_encoding={"name": "default", "separator": "."},
            serializer=BytesCodec(endian="little") if item.itemsize > 1 else BytesCodec(endian=None),
            compressors=[_compressor(item.itemsize), Crc32cCodec()],
            attributes=dict(attributes or {}),
            config={"write_empty_chunks": True},
        )

    def _digest_array(self, group: zarr.Group, num_data: int) -> None:
        self._array(
            group, "digest", (num_data + 1, DIGEST_BYTES), _DIGEST_CHUNK, "uint8", ("unit", "part", "byte"),
            {"long_name": "blake2b of each unit's data, then of its coordinates"},
        )  # fmt: skip

    def _is_rewritten(self, name: str) -> bool:
        return name not in self.data_names

    # what the two kinds of store add

    num_frames = 0
    "true frames in what is, or is about to be, published"

    @abstractmethod
    def _create_arrays(self, group: zarr.Group) -> None:
        """Make the empty arrays."""

    @abstractmethod
    def _rest(self) -> Unit | None:
        """The rows that are still waiting, as a last unit."""

    @abstractmethod
    def pending(self) -> Unit:
        """Rows that wait to become a unit, for a snapshot; copies."""

    @abstractmethod
    def go_on(self, chunk: int, num_frames: int, units: int, pending: Unit) -> None:
        """Stand where a run stood when it had handed over ``num_frames`` frames in chunks up to ``chunk``.

        ``units`` of the store were full then, and ``pending`` is what :meth:`pending` gave.
        """


def _compressor(itemsize: int) -> BloscCodec:
    """Bitshuffle brings the exponents of numbers together; single bytes, pixels above all, have none (decision 20)."""
    return BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle" if itemsize == 1 else "bitshuffle", typesize=itemsize)


def settle_complete(found: Found, durability: Durability) -> None:
    """Do what is left of a run that was killed after its last step: the store is complete, and tidy after this.

    Raises:
        StoreError: somebody writes to it, or the disk says no.
    """
    path, private = found.path, found.path / PRIVATE
    content = (path / "zarr.json").read_bytes()
    documents = {path / name / "zarr.json": serialized(d) for name, d in StoreLayout(found.root).members.items()}
    documents[private / "root.json"] = content
    stale = {file for file, expected in documents.items() if not file.is_file() or file.read_bytes() != expected}
    snapshots = private / "snapshots"
    left = [private / "lock"] + ([] if durability.keep_snapshots else [snapshots])
    if not (stale or any(file.exists() for file in left) or any(partial_files(path))):
        return
    with disk_errors(path):
        lock = WriterLock.acquire(private / "lock")
        try:
            for partial in partial_files(path):
                os.unlink(partial)
            for file in stale:
                write_durably(file, documents[file], sync=durability.syncs)
            if not durability.keep_snapshots:
                shutil.rmtree(snapshots, ignore_errors=True)
        finally:
            lock.release()


def partial_files(path: Path) -> Iterator[str]:
    """Files in a store that were never finished."""
    for folder in (path, path / PRIVATE, path / PRIVATE / "snapshots", *(path / name for name in OWN_NAMES)):
        if not folder.is_dir() or folder.is_symlink():
            continue
        for entry in os.scandir(folder):
            if is_partial(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry.path


def take(pending: list[npt.NDArray[Any]], count: int) -> npt.NDArray[Any]:
    """Remove ``count`` rows from the front of a list of arrays and return them as one."""
    joined = np.concatenate(pending) if pending else np.zeros(0, np.int64)
    pending[:] = [joined[count:].copy()] if count < len(joined) else []
    return joined[:count]


def first_facts(kind: str, frame_rate: Fraction | None) -> dict[str, Any]:
    """The attribute ``longvid`` of a store that holds nothing yet."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "status": "writing",
        "num_frames": 0,
        "created_by": f"longvid {__version__}",
        "versions": {"zarr": zarr.__version__, "numpy": np.__version__},
        "frame_rate": None if frame_rate is None else f"{frame_rate.numerator}/{frame_rate.denominator}",
    }


_KINDS = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EFBIG: "full",
    errno.EROFS: "read-only",
    errno.EACCES: "read-only",
    errno.EPERM: "read-only",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about files into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except OSError as exc:
        kind = _KINDS.get(exc.errno or 0, "other")
        hint = {
            "full": "; make room and run the same command again, it goes on where it stopped",
            "read-only": "; choose another folder, or make this one writable",
        }.get(kind, "")
        raise StoreError(f"{path} cannot be written: {exc.strerror or exc}{hint}", kind=kind) from exc

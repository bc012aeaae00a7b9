"""Verify: whether every byte of a store is what was published, and which frames are not. Changes nothing; no torch.

Everything is compared with the seal of the root metadata: the root itself, its copy, the metadata of each array, the
digests, and through them every unit's data and coordinates. What lies in the store beside that is reported as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from longvid.errors import StoreError
from longvid.lock import is_locked
from longvid.schedule import ChunkSchedule
from longvid.staging import StagedStore, is_partial
from longvid.store import (
    DIGEST_BYTES,
    PRIVATE,
    array_document,
    chunk_file,
    digest_chain,
    read_root,
    seal_is_whole,
    unit_digest,
)
from longvid.zarr_gate import check_chunk, check_group, check_tree

__all__ = ["Damage", "Opened", "Verification", "open_sealed", "verify"]

Kind: TypeAlias = Literal["data", "coordinates", "digests", "metadata", "root", "stale", "foreign"]
DATA_NAMES = {"latents": ("latents", "moments"), "frames": ("frames",)}
_STORE_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError)
"what zarr and its codecs raise when they meet damage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was published."""

    kind: Kind
    name: str
    "path in the store"
    what: str
    unit: int | None = None
    frames: tuple[int, int] | None = None
    "half-open range of the frames that cannot be trusted; None if none is concerned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What :func:`verify` found."""

    path: str
    num_frames: int
    num_units: int
    complete: bool
    damages: tuple[Damage, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is as it was published."""
        return not self.damages

    @property
    def frame_ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of frames that cannot be trusted, merged, in order."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted({damage.frames for damage in self.damages if damage.frames is not None}):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            else:
                merged.append((start, stop))
        return merged

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "ok": self.ok, "damaged_frames": [list(pair) for pair in self.frame_ranges]}

    def explain(self) -> str:
        """For people."""
        state = "complete" if self.complete else "unfinished"
        lines = [f"{self.path}: {state}, {self.num_frames} frames in {self.num_units} units"]
        if self.ok:
            return f"{lines[0]}; everything is as it was published"
        lines += [f"  {damage.name}: {damage.what}" for damage in self.damages[:20]]
        if len(self.damages) > 20:
            lines.append(f"  and {len(self.damages) - 20} more (--json lists them)")
        ranges = ", ".join(f"{a} to {b - 1}" for a, b in self.frame_ranges)
        lines.append(f"damaged frames: {ranges or 'none'}; longvid repair restores what it can")
        return "\n".join(lines)


@dataclass(frozen=True)
class Opened:
    """A store by what its root metadata says, also where files contradict it. Made by :func:`open_sealed`."""

    path: Path
    content: bytes
    "the root metadata, sealed"
    root: dict[str, Any]
    intact: bool
    "whether that is what stands in zarr.json; else it is the copy"
    _store: StagedStore = field(repr=False)

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes of the group."""
        attributes: dict[str, Any] = self.root["attributes"]
        return attributes

    @property
    def facts(self) -> dict[str, Any]:
        """The attribute ``longvid``."""
        facts: dict[str, Any] = self.root["attributes"]["longvid"]
        return facts

    @property
    def members(self) -> dict[str, Any]:
        """Metadata of every array by name; empty before the first step."""
        members: dict[str, Any] = self.root.get("consolidated_metadata", {}).get("metadata", {})
        return members

    @cached_property
    def arrays(self) -> dict[str, zarr.Array[Any]]:
        """Every array, by the root's metadata."""
        return {name: zarr.open_array(self._store, path=name, mode="r+", zarr_format=3) for name in self.members}

    @property
    def data_names(self) -> tuple[str, ...]:
        """Arrays that hold data, the main one first."""
        return tuple(name for name in DATA_NAMES[self.facts["kind"]] if name in self.members)

    @property
    def coordinate_names(self) -> tuple[str, ...]:
        """Arrays that hold coordinates, in the order in which they are digested."""
        kept = [name for name in self.members if name not in (*self.data_names, "digest")]
        return tuple(sorted(kept, key=list(COORDINATES).index))

    @property
    def num_units(self) -> int:
        """Published units."""
        return int(self.members["digest"]["shape"][0]) if self.members else 0

    @property
    def unit_rows(self) -> int:
        """Rows of the main array in a whole unit."""
        chunks = self.members[self.data_names[0]]["chunk_grid"]["configuration"]["chunk_shape"]
        return int(chunks[0])

    def rows(self, unit: int) -> tuple[int, int]:
        """Half-open range of rows of the main array in a unit."""
        total = int(self.members[self.data_names[0]]["shape"][0])
        return unit * self.unit_rows, min((unit + 1) * self.unit_rows, total)

    def frames(self, unit: int) -> tuple[int, int]:
        """Half-open range of frames in a unit."""
        start, stop = self.rows(unit)
        if self.facts["kind"] == "frames":
            return start, stop
        schedule = ChunkSchedule.from_dict(self.facts["chunk_plan"])
        num_frames = int(self.members["frame_pts"]["shape"][0])
        return schedule.frame_range(start)[0], min(schedule.frame_range(stop - 1)[1], num_frames)

    def coordinate_rows(self, name: str, unit: int) -> tuple[int, int]:
        """Half-open range of rows of a coordinate in a unit."""
        dimensions = self.members[name]["dimension_names"]
        return self.frames(unit) if dimensions == ["frame"] else self.rows(unit)


COORDINATES = ("t", "frame_start", "frame_stop", "frame_pts", "frame_valid")


def open_sealed(path: str | os.PathLike[str]) -> Opened:
    """Open a store by its root metadata, or by the copy of it where that is damaged.

    Raises:
        StoreError: there is no store of ours, or neither is whole.
    """
    where = Path(path)
    if not where.is_dir():
        raise StoreError(f"there is no store {where}", kind="missing")
    content = _bytes_of(where / "zarr.json")
    copy = _bytes_of(where / PRIVATE / "root.json")
    intact = content is not None and seal_is_whole(content)
    best = content if intact else copy if copy is not None and seal_is_whole(copy) else None
    if best is None:
        if read_root(where) is None and copy is None:
            raise StoreError(f"{where} is not a store of longvid, or of a version that sealed nothing", kind="foreign")
        raise StoreError(
            f"{where}: the root metadata and its copy are both damaged; encode the video again", kind="corrupt"
        )
    root = json.loads(best)
    check_tree(where)
    check_group(root, where=str(where))
    store = StagedStore(where, sync=False, rewritten=lambda _: False)
    store.stage("zarr.json", best)
    for name, document in root.get("consolidated_metadata", {}).get("metadata", {}).items():
        store.stage(f"{name}/zarr.json", json.dumps(document).encode())
    return Opened(where, best, root, intact, store)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read all of a store and compare it with what was published.

    Raises:
        StoreError: there is no store of ours, somebody writes to it, or root metadata and copy are both damaged.
    """
    opened = open_sealed(path)
    complete = opened.facts.get("status") == "complete"
    if not complete and is_locked(opened.path / PRIVATE / "lock"):
        raise StoreError(f"{path} is being written; verify it when the run has ended", kind="locked")
    damages = [*_root_damage(opened, complete), *_metadata_damage(opened, complete)]
    digests = _digests(opened)
    if digests is None:
        damages.append(Damage(kind="digests", name="digest", what="the digests are damaged or missing"))
        digests = recomputed_digests(opened)
    damages += _unit_damage(opened, digests)
    damages += _strangers(opened, complete)
    return Verification(
        path=str(path),
        num_frames=int(opened.facts["num_frames"]),
        num_units=opened.num_units,
        complete=complete,
        damages=tuple(damages),
    )


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _root_damage(opened: Opened, complete: bool) -> Iterator[Damage]:
    if not opened.intact:
        everything = (0, int(opened.facts["num_frames"]))
        yield Damage(kind="root", name="zarr.json", what="the root metadata is damaged or missing", frames=everything)
        return
    copy = _bytes_of(opened.path / PRIVATE / "root.json")
    # A run that was killed may have left a copy that is one step behind.
    if copy is None or not seal_is_whole(copy) or (complete and copy != opened.content):
        yield Damage(kind="metadata", name=f"{PRIVATE}/root.json", what="the copy of the root metadata is damaged")


def _metadata_damage(opened: Opened, complete: bool) -> Iterator[Damage]:
    for name, document in opened.members.items():
        content = _bytes_of(opened.path / name / "zarr.json")
        if not metadata_is_whole(content, document, complete):
            what = "the array's own metadata is missing" if content is None else "the array's own metadata is damaged"
            yield Damage(kind="metadata", name=f"{name}/zarr.json", what=what)


def metadata_is_whole(content: bytes | None, document: Mapping[str, Any], complete: bool) -> bool:
    """Whether an array's own metadata is what the root says, or an earlier length of it in an unfinished store."""
    if content is None:
        return not complete
    if content == array_document(document):
        return True
    try:
        there = json.loads(content)
        shorter = {**document, "shape": [there["shape"][0], *document["shape"][1:]]}
        return not complete and there["shape"][0] <= document["shape"][0] and content == array_document(shorter)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False


def _digests(opened: Opened) -> npt.NDArray[np.uint8] | None:
    """The digests of all units, or None if they are not those that the root speaks of."""
    if not opened.members:
        return np.zeros((0, 1, DIGEST_BYTES), np.uint8)
    try:
        digests = np.asarray(opened.arrays["digest"][:], np.uint8)
    except _STORE_ERRORS:
        return None
    return digests if digest_chain(digests) == opened.facts.get("digests") else None


def recomputed_digests(opened: Opened) -> npt.NDArray[np.uint8]:
    """The digests of what is there now; zeros, which nothing has, where it cannot be read."""
    rows = []
    for unit in range(opened.num_units):
        parts = [_read_data(opened, name, unit) for name in opened.data_names]
        digests = [np.zeros(DIGEST_BYTES, np.uint8) if part is None else unit_digest([part]) for part in parts]
        coordinates = [_read_coordinate(opened, name, unit) for name in opened.coordinate_names]
        whole = [part for part in coordinates if part is not None]
        lost = len(whole) < len(coordinates)
        rows.append(np.stack([*digests, np.zeros(DIGEST_BYTES, np.uint8) if lost else unit_digest(whole)]))
    return np.stack(rows)


def _unit_damage(opened: Opened, digests: npt.NDArray[np.uint8]) -> Iterator[Damage]:
    # Where the digests had to be computed from the data and do not add up, any unit may be the one that is wrong.
    trusted = digest_chain(digests) == opened.facts.get("digests") if opened.members else True
    for unit in range(opened.num_units):
        frames = opened.frames(unit)
        for part, name in enumerate(opened.data_names):
            data = _read_data(opened, name, unit)
            if data is None or not trusted or not np.array_equal(unit_digest([data]), digests[unit, part]):
                yield _data_damage(opened, name, unit, frames, readable=data is not None)
        lost, rows = [], []
        for name in opened.coordinate_names:
            values = _read_coordinate(opened, name, unit)
            if values is None:
                lost.append(name)
            else:
                rows.append(values)
        if lost or not trusted or not np.array_equal(unit_digest(rows), digests[unit, -1]):
            for name in lost or ["coordinates"]:
                what = f"of unit {unit} cannot be read" if lost else f"of unit {unit} are not those that were published"
                yield Damage(kind="coordinates", name=name, what=what, unit=unit, frames=frames)


def _data_damage(opened: Opened, name: str, unit: int, frames: tuple[int, int], *, readable: bool) -> Damage:
    file = f"{name}/c.{unit}{'.0' * (len(opened.members[name]['shape']) - 1)}"
    if not (opened.path / file).is_file():
        what = "missing"
    elif readable:
        what = "not what was published: swapped, older or forged"
    else:
        what = "damaged"
    return Damage(
        kind="data", name=file, what=f"{what}; frames {frames[0]} to {frames[1] - 1}", unit=unit, frames=frames
    )


def _read_data(opened: Opened, name: str, unit: int) -> npt.NDArray[Any] | None:
    start, stop = opened.rows(unit)
    return _read(opened, name, start, stop)


def _read_coordinate(opened: Opened, name: str, unit: int) -> npt.NDArray[Any] | None:
    return _read(opened, name, *opened.coordinate_rows(name, unit))


def _read(opened: Opened, name: str, start: int, stop: int) -> npt.NDArray[Any] | None:
    array = opened.arrays[name]
    try:
        for number in range(start // array.chunks[0], -(-stop // array.chunks[0])):
            file = opened.path / name / chunk_file(number, array.ndim)
            check_chunk(file, opened.members[name], where=str(opened.path))
        return np.asarray(array[start:stop])
    except _STORE_ERRORS:
        return None


def _strangers(opened: Opened, complete: bool) -> Iterator[Damage]:
    """Files that no published unit has. What an unfinished run leaves behind is swept by the next one."""
    expected = {"zarr.json", f"{PRIVATE}/root.json", f"{PRIVATE}/lock"}
    for name, document in opened.members.items():
        expected.add(f"{name}/zarr.json")
        shape, chunks = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
        tail = ".0" * (len(shape) - 1)
        expected |= {f"{name}/c.{i}{tail}" for i in range(-(-shape[0] // chunks[0]))}
    for file in sorted(_files(opened.path, "")):
        if file in expected or file.startswith(f"{PRIVATE}/snapshots/"):
            continue
        folder, _, name = file.rpartition("/")
        if (name.startswith("c.") and folder in opened.members) or is_partial(name):
            if complete:
                yield Damage(kind="stale", name=file, what="left over; nothing that is published needs it")
        elif opened.members or folder not in ALL_NAMES:
            yield Damage(kind="foreign", name=file, what="not written by longvid")


ALL_NAMES = frozenset({*COORDINATES, "digest", *(name for names in DATA_NAMES.values() for name in names)})


def _files(root: Path, prefix: str) -> Iterable[str]:
    for entry in os.scandir(root / prefix if prefix else root):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _files(root, name)
        else:
            yield name

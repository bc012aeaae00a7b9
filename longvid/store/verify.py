"""Verify: whether every byte of a store is what was published, and which frames are not. Changes nothing; no torch.

Everything is compared with the seal of the root metadata: the root itself, its copy, the metadata of each array, the
digests, and through them every unit's data and coordinates. What lies in the store beside that is reported as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from longvid.errors import StoreError
from longvid.store.format import (
    ARRAY_NAMES,
    DATA_NAMES,
    DIGEST_BYTES,
    PRIVATE,
    StoreLayout,
    chunk_file,
    digest_chain,
    seal_is_whole,
    serialized,
    unit_digest,
)
from longvid.store.lock import is_locked
from longvid.store.reader import STORE_ERRORS, read_root
from longvid.store.staging import StagedStore, is_partial
from longvid.store.validation import check_chunk, check_group, check_tree

__all__ = ["Damage", "Opened", "Verification", "open_sealed", "verify"]

Kind: TypeAlias = Literal["data", "coordinates", "digests", "metadata", "root", "stale", "foreign"]


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
class Opened(StoreLayout):
    """A store by what its root metadata says, also where files contradict it. Made by :func:`open_sealed`."""

    path: Path
    content: bytes
    "the root metadata, sealed"
    intact: bool
    "whether that is what stands in zarr.json; else it is the copy"
    store: StagedStore = field(repr=False)
    "the files, under that metadata"
    disputed: bool = False
    "whether the copy is as whole, and says something else that fits the store as well"

    @cached_property
    def arrays(self) -> dict[str, zarr.Array[Any]]:
        """Every array, by the root's metadata."""
        return {name: zarr.open_array(self.store, path=name, mode="r+", zarr_format=3) for name in self.members}

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[Any] | None:
        """Rows of an array as they are; None if they cannot be read."""
        array, file_names = self.arrays[name], self.chunk_files(name)
        try:
            for number in range(start // array.chunks[0], -(-stop // array.chunks[0])):
                check_chunk(self.path / name / file_names[number], self.members[name], where=str(self.path))
            return np.asarray(array[start:stop])
        except STORE_ERRORS:
            return None

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any] | None]:
        """Coordinates, whole arrays by name; None for one that cannot be read as a whole."""
        return {name: self.read(name, 0, int(self.members[name]["shape"][0])) for name in self.coordinate_names}

    def coordinate(self, name: str, unit: int) -> npt.NDArray[Any] | None:
        """The rows of a coordinate in a unit; None if they cannot be read."""
        start, stop = self.coordinate_rows(name, unit)
        column = self.columns[name]
        return self.read(name, start, stop) if column is None else column[start:stop]


def open_sealed(path: str | os.PathLike[str]) -> Opened:
    """Open a store by its root metadata, or by the copy of it where that is damaged.

    Raises:
        StoreError: there is no store of ours, or neither is whole.
    """
    where = Path(path)
    if not where.is_dir():
        raise StoreError(f"there is no store {where}", kind="missing")
    content, copy = (_bytes_of(where / name) for name in ("zarr.json", f"{PRIVATE}/root.json"))
    whole = [document for document in (content, copy) if document is not None and seal_is_whole(document)]
    if not whole:
        if read_root(where) is None and copy is None:
            raise StoreError(f"{where} is not a store of longvid, or of a version that sealed nothing", kind="foreign")
        raise StoreError(
            f"{where}: the root metadata and its copy are both damaged; encode the video again", kind="corrupt"
        )
    check_tree(where)
    opened = [_opened(where, document, intact=document == content) for document in whole]
    if len(opened) == 1 or _may_stand_beside(opened[1].root, opened[0].root):
        return opened[0]
    fitting = [one for one in opened if _digests(one) is not None]
    if len(fitting) == 1:
        return fitting[0]
    if _may_stand_beside(opened[0].root, opened[1].root):  # an older root was put back
        return opened[1]
    return replace(opened[0], disputed=len(fitting) == 2)


def _opened(where: Path, content: bytes, *, intact: bool) -> Opened:
    root = json.loads(content)
    check_group(root, where=str(where))
    store = StagedStore(where, sync=False, rewritten=lambda _: False)
    store.stage("zarr.json", content)
    opened = Opened(root=root, path=where, content=content, intact=intact, store=store)
    if opened.facts.get("kind") not in DATA_NAMES:
        raise StoreError(f"{where} holds {opened.facts.get('kind')}, which this version does not know", kind="format")
    for name, document in opened.members.items():
        store.stage(f"{name}/zarr.json", serialized(document))
    return opened


def _may_stand_beside(copy: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Whether a run leaves such a copy beside such a root: the same, or older, if it was killed between the two."""
    if copy == root:
        return True
    old, new = copy["attributes"]["longvid"], root["attributes"]["longvid"]
    if not new.get("fingerprint") and not root.get("consolidated_metadata"):  # it is being replaced
        return True
    if old.get("fingerprint") != new.get("fingerprint") or old.get("status") != "writing":
        return False
    steps = [(facts.get("num_frames", 0), facts.get("status") == "complete") for facts in (old, new)]
    return steps[0] < steps[1] or (steps[0] == steps[1] and old.get("epoch") != new.get("epoch"))


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read all of a store and compare it with what was published.

    Raises:
        StoreError: there is no store of ours, somebody writes to it, or root metadata and copy are both damaged.
    """
    opened = open_sealed(path)
    complete = opened.complete
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
    everything = (0, int(opened.facts["num_frames"]))
    if not opened.intact or opened.disputed:
        contradiction = "the root metadata and its copy are both whole and contradict each other"
        what = contradiction if opened.disputed else "the root metadata is damaged, missing or older than its copy"
        yield Damage(kind="root", name="zarr.json", what=what, frames=everything)
        return
    copy = _bytes_of(opened.path / PRIVATE / "root.json")
    # A run that was killed may have left a copy that is one step behind.
    whole = copy is not None and seal_is_whole(copy)
    if (
        copy is None
        or not whole
        or (complete and copy != opened.content)
        or not _may_stand_beside(json.loads(copy), opened.root)
    ):
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
    if content == serialized(document):
        return True
    try:
        there = json.loads(content)
        shorter = {**document, "shape": [there["shape"][0], *document["shape"][1:]]}
        return not complete and there["shape"][0] <= document["shape"][0] and content == serialized(shorter)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False


def _digests(opened: Opened) -> npt.NDArray[np.uint8] | None:
    """The digests of all units, or None if they are not those that the root speaks of."""
    if not opened.members:
        return np.zeros((0, 1, DIGEST_BYTES), np.uint8)
    try:
        digests = np.asarray(opened.arrays["digest"][:], np.uint8)
    except STORE_ERRORS:
        return None
    return digests if digest_chain(digests) == opened.facts.get("digests") else None


def recomputed_digests(opened: Opened) -> npt.NDArray[np.uint8]:
    """The digests of what is there now; zeros, which nothing has, where it cannot be read."""
    rows = []
    for unit in range(opened.num_units):
        parts = [opened.read(name, *opened.rows(unit)) for name in opened.data_names]
        digests = [np.zeros(DIGEST_BYTES, np.uint8) if part is None else unit_digest([part]) for part in parts]
        coordinates = [opened.coordinate(name, unit) for name in opened.coordinate_names]
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
            data = opened.read(name, *opened.rows(unit))
            if data is None or not trusted or not np.array_equal(unit_digest([data]), digests[unit, part]):
                yield _data_damage(opened, name, unit, frames, readable=data is not None)
        lost, rows = [], []
        for name in opened.coordinate_names:
            values = opened.coordinate(name, unit)
            if values is None:
                lost.append(name)
            else:
                rows.append(values)
        if lost or not trusted or not np.array_equal(unit_digest(rows), digests[unit, -1]):
            for name in lost or ["coordinates"]:
                what = f"of unit {unit} cannot be read" if lost else f"of unit {unit} are not those that were published"
                yield Damage(kind="coordinates", name=name, what=what, unit=unit, frames=frames)


def _data_damage(opened: Opened, name: str, unit: int, frames: tuple[int, int], *, readable: bool) -> Damage:
    file = f"{name}/{chunk_file(unit, len(opened.members[name]['shape']))}"
    if not (opened.path / file).is_file():
        what = "missing"
    elif readable:
        what = "not what was published: swapped, older or forged"
    else:
        what = "damaged"
    return Damage(
        kind="data", name=file, what=f"{what}; frames {frames[0]} to {frames[1] - 1}", unit=unit, frames=frames
    )


def _strangers(opened: Opened, complete: bool) -> Iterator[Damage]:
    """Files that no published unit has. What an unfinished run leaves behind is swept by the next one."""
    expected = {"zarr.json", f"{PRIVATE}/root.json", f"{PRIVATE}/lock"}
    for name in opened.members:
        expected |= {f"{name}/zarr.json", *(f"{name}/{file}" for file in opened.chunk_files(name))}
    for file in sorted(_files(opened.path, "")):
        if file in expected or file.startswith(f"{PRIVATE}/snapshots/"):
            continue
        folder, _, name = file.rpartition("/")
        if (name.startswith("c.") and folder in opened.members) or is_partial(name):
            if complete:
                yield Damage(kind="stale", name=file, what="left over; nothing that is published needs it")
        elif opened.members or folder not in ARRAY_NAMES:
            yield Damage(kind="foreign", name=file, what="not written by longvid")


def _files(root: Path, prefix: str) -> Iterable[str]:
    for entry in os.scandir(root / prefix if prefix else root):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _files(root, name)
        else:
            yield name

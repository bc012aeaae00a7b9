"""Owns verification: whether every byte of a store is as it was committed, and which frames are not. Changes nothing.

Everything is compared with the metadata checksum of the root: the root itself, its copy, the metadata of each array,
the digests, and through them the data and coordinates of every unit. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.store.format import (
    ARRAY_NAMES,
    DIGEST_BYTES,
    PRIVATE,
    checksum_is_right,
    digest_chain,
    is_system_file,
    serialized,
    unit_digest,
)
from longvid.store.lock import is_locked
from longvid.store.metadata import Seam, StoreMetadata
from longvid.store.reader import StoreReader, bytes_of, may_stand_beside, open_reader
from longvid.store.staging import is_partial

__all__ = ["Damage", "Verification", "metadata_is_whole", "recomputed_digests", "verify"]

Kind: TypeAlias = Literal["data", "coordinates", "digests", "metadata", "root", "stale", "foreign"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was committed."""

    kind: Kind
    name: str
    "path in the store"
    what: str
    unit: int | None = None
    frames: tuple[int, int] | None = None
    "half-open range of the frames that cannot be trusted; None if no frame is affected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of :func:`verify`."""

    path: str
    num_frames: int
    num_units: int
    complete: bool
    damages: tuple[Damage, ...] = ()
    foreign: tuple[str, ...] = ()
    "files that the operating system or a network drive put into the store; they do no harm"
    seams: tuple[Seam, ...] = ()
    "where the run was continued on another machine or with other libraries; see ``resume`` of ``VideoSession.encode``"

    @property
    def ok(self) -> bool:
        """Whether everything is as it was committed."""
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
        """The result as text."""
        state = "complete" if self.complete else "unfinished"
        units = "1 commit unit" if self.num_units == 1 else f"{self.num_units} commit units"
        lines = [f"{self.path}: {state}, {self.num_frames} frames in {units}"]
        if self.ok:
            lines[0] += "; everything is as it was committed"
        lines += [f"  {damage.name}: {damage.what}" for damage in self.damages[:20]]
        if len(self.damages) > 20:
            lines.append(f"  and {len(self.damages) - 20} more (--json lists them)")
        lines += [f"  seam: {seam}" for seam in self.seams]
        if self.foreign:
            more = ", ..." if len(self.foreign) > 5 else ""
            lines.append(f"  foreign files, which do no harm: {', '.join(self.foreign[:5])}{more}")
        if not self.ok:
            ranges = ", ".join(f"{a} to {b - 1}" for a, b in self.frame_ranges)
            lines.append(f"damaged frames: {ranges or 'none'}; longvid repair restores what it can")
        return "\n".join(lines)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read all of a store and compare it with what was committed.

    Raises:
        StoreError: there is no store of ours, a run writes to it, a file may not be read, or the root metadata and
            their copy are both damaged.
    """
    reader = open_reader(path, strict=False)
    metadata = reader.metadata
    if not metadata.complete and is_locked(reader.path / PRIVATE / "lock"):
        raise StoreError(f"{path} is being written; verify it when the run has ended", kind="locked")
    damages = [*_root_damage(reader), *_metadata_damage(reader)]
    if reader.digests is None:
        damages.append(Damage(kind="digests", name="digest", what="the digests are damaged or missing"))
    damages += _unit_damage(reader)
    others = list(_other_files(reader))
    foreign = tuple(other.name for other in others if any(map(is_system_file, other.name.split("/"))))
    damages += [other for other in others if other.name not in foreign]
    return Verification(
        path=str(path),
        num_frames=metadata.num_frames,
        num_units=metadata.num_units,
        complete=metadata.complete,
        damages=tuple(damages),
        foreign=foreign,
        seams=metadata.seams,
    )


def _root_damage(reader: StoreReader) -> Iterator[Damage]:
    if reader.disputed or bytes_of(reader.path / "zarr.json") != reader.content:
        contradiction = "the root metadata and their copy both have a right checksum and contradict each other"
        what = contradiction if reader.disputed else "the root metadata are damaged, missing or older than their copy"
        yield Damage(kind="root", name="zarr.json", what=what, frames=(0, reader.metadata.num_frames))
    elif not _copy_is_right(reader):
        yield Damage(kind="metadata", name=f"{PRIVATE}/root.json", what="the copy of the root metadata is damaged")


def _copy_is_right(reader: StoreReader) -> bool:
    """A run that was killed may leave a copy that is one commit behind."""
    copy = bytes_of(reader.path / PRIVATE / "root.json")
    if copy is None or not checksum_is_right(copy):
        return False
    if reader.metadata.complete or copy == reader.content:
        return copy == reader.content
    return may_stand_beside(StoreMetadata.parse(json.loads(copy), where=str(reader.path)), reader.metadata)


def _metadata_damage(reader: StoreReader) -> Iterator[Damage]:
    for name, array in reader.metadata.arrays.items():
        content = bytes_of(reader.path / name / "zarr.json")
        if not metadata_is_whole(content, array.document, reader.metadata.complete):
            what = "the array's own metadata are missing" if content is None else "the array's own metadata are damaged"
            yield Damage(kind="metadata", name=f"{name}/zarr.json", what=what)


def metadata_is_whole(content: bytes | None, document: Mapping[str, Any], complete: bool) -> bool:
    """Whether an array's own metadata are those of the root, or of an earlier commit in an unfinished store."""
    if content is None:
        return not complete
    num_rows, *row = document["shape"]
    with suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
        length = num_rows if complete else min(json.loads(content)["shape"][0], num_rows)
        return content == serialized({**document, "shape": [length, *row]})
    return False


def recomputed_digests(reader: StoreReader) -> npt.NDArray[np.uint8]:
    """The digests of what is on the disk now; zeros, which nothing has, where it cannot be read."""
    rows = []
    for unit in range(reader.metadata.num_units):
        data = ([reader.readable(name, *reader.metadata.rows(unit))] for name in reader.metadata.data_names)
        coordinates = [reader.coordinate(name, unit) for name in reader.metadata.coordinate_names]
        rows.append([_digest_or_zeros(parts) for parts in (*data, coordinates)])
    return np.array(rows, np.uint8)


def _digest_or_zeros(parts: list[npt.NDArray[Any] | None]) -> npt.NDArray[np.uint8]:
    there = [part for part in parts if part is not None]
    return unit_digest(there) if len(there) == len(parts) else np.zeros(DIGEST_BYTES, np.uint8)


def _unit_damage(reader: StoreReader) -> Iterator[Damage]:
    if not reader.metadata.arrays:
        return
    metadata, found, digests = reader.metadata, recomputed_digests(reader), reader.digests
    if digests is None and digest_chain(found) == metadata.digests:
        digests = found
    # Where the digests are lost and those of the data do not agree with the root, any unit may be wrong.
    wrong = np.ones(found.shape, np.bool_) if digests is None else found != digests
    files = {name: metadata.arrays[name].chunk_files for name in metadata.data_names}
    for unit in range(metadata.num_units):
        frames = metadata.frames(unit)
        for part, name in enumerate(files):
            if wrong[unit, part].any():
                file = f"{name}/{files[name][unit]}"
                what = "not what was committed: swapped, older or forged" if found[unit, part].any() else "damaged"
                what = what if (reader.path / file).is_file() else "missing"
                what = f"{what}; frames {frames[0]} to {frames[1] - 1}"
                yield Damage(kind="data", name=file, what=what, unit=unit, frames=frames)
        if wrong[unit, -1].any():
            lost = [name for name in metadata.coordinate_names if reader.coordinate(name, unit) is None]
            what = f"unit {unit} cannot be read" if lost else f"unit {unit} is not as it was committed"
            for name in lost or ["coordinates"]:
                yield Damage(kind="coordinates", name=name, what=what, unit=unit, frames=frames)


def _other_files(reader: StoreReader) -> Iterator[Damage]:
    """Files that no committed unit has. What an unfinished run leaves behind is removed by the next run."""
    arrays = reader.metadata.arrays
    expected = {"zarr.json", f"{PRIVATE}/root.json", f"{PRIVATE}/lock", f"{PRIVATE}/seek"}
    for name, array in arrays.items():
        expected |= {f"{name}/zarr.json", *(f"{name}/{file}" for file in array.chunk_files)}
    there = (path.relative_to(reader.path).as_posix() for path in reader.path.rglob("*") if not path.is_dir())
    for file in sorted(there):
        if file in expected:
            continue
        folder, _, name = file.rpartition("/")
        if (name.startswith("c.") and folder in arrays) or is_partial(name):
            if reader.metadata.complete:
                yield Damage(kind="stale", name=file, what="left over; nothing that is committed needs it")
        elif arrays or folder not in ARRAY_NAMES:
            yield Damage(kind="foreign", name=file, what="not written by longvid")

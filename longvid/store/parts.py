"""Owns parts: the stores that several runs made of one video, each of a share of its chunks, and the one store that is
joined of them.

A part is an ordinary store. All but the first begin with a chunk that the part before has too, so that :func:`join` can
compare what two runs computed, bit for bit. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from longvid.errors import StoreError
from longvid.files import local_path
from longvid.store.durability import WriteOptions
from longvid.store.metadata import Part, RunFacts, StoreMetadata
from longvid.store.reader import StoreReader, open_reader
from longvid.store.target import changes
from longvid.store.writer import StoreWriter, Unit

__all__ = ["join", "part_path", "without_part"]

_NAME = re.compile(r"\.part-(\d+)-of-(\d+)")
_OWN_FACTS = ("part", "window")
"what the fingerprints of the parts of one video do not share"


def part_path(store: Path, number: int, of: int) -> Path:
    """Where a part of a store is written."""
    return store.with_name(f"{store.name}.part-{number}-of-{of}")


def without_part(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What the fingerprints of all parts of one video share."""
    return {name: value for name, value in fingerprint.items() if name not in _OWN_FACTS}


def join(store: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Make one store of its parts, ``STORE.part-1-of-n`` and so on, which stay as they are.

    The result is, in every data file, the store of one run. It becomes visible with one commit.

    Args:
        store: where the joined store goes; the parts lie beside it.
        overwrite: replace a longvid store that is there.

    Raises:
        StoreError: kind ``"missing"``, ``"incomplete"`` or ``"mismatch"`` if a part is missing, was not finished or is
            of another run, or if two neighbours differ in the chunk that both have; kind ``"exists"`` if a store is
            there.
    """
    target = local_path(store)
    readers = [open_reader(path) for path in _paths(target)]
    _check_one_run(readers)
    for before, reader in pairwise(readers):
        _check_overlap(before, reader)
    options = WriteOptions(overwrite=overwrite)
    with _JoinedWriter(target, [reader.metadata for reader in readers], options) as writer:
        for reader in readers:
            writer.copy(reader, first=_part(reader).overlap)
    return target


def _paths(target: Path) -> list[Path]:
    """All parts in their order; StoreError unless they are there."""
    found: dict[int, dict[int, Path]] = {}
    for path in target.parent.glob(f"{_escaped(target.name)}.part-*-of-*"):
        match = _NAME.fullmatch(path.name.removeprefix(target.name))
        if match is not None:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if len(found) != 1:
        there = ", ".join(f"{len(parts)} of {of}" for of, parts in sorted(found.items())) or "none"
        raise StoreError(
            f"{target} has to be joined of all parts of one run, {target.name}.part-1-of-N to .part-N-of-N; parts that "
            f"are there: {there}",
            kind="mismatch" if found else "missing",
        )
    of, parts = found.popitem()
    missing = [number for number in range(1, of + 1) if number not in parts]
    if missing:
        names = ", ".join(part_path(target, number, of).name for number in missing)
        raise StoreError(f"{target} lacks parts: {names}; make them with --part K/{of}", kind="missing")
    return [parts[number] for number in range(1, of + 1)]


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _part(reader: StoreReader) -> Part:
    part = reader.metadata.part
    if part is None:
        raise StoreError(f"{reader.path} is a whole store and no part of one", kind="mismatch")
    return part


def _check_one_run(readers: list[StoreReader]) -> None:
    """Require finished parts of one run that follow each other without a gap."""
    row, frame, of = 0, _part(readers[0]).frame, len(readers)
    for number, reader in enumerate(readers, 1):
        metadata, part = reader.metadata, _part(reader)
        if not metadata.complete:
            raise StoreError(f"{reader.path} is not finished; run the command that makes it again", kind="incomplete")
        other = changes(without_part(readers[0].metadata.fingerprint), without_part(metadata.fingerprint))
        if other or metadata.seams:
            what = "; ".join(f"{name} is {old} there and {new} here" for name, (old, new) in list(other.items())[:6])
            raise StoreError(
                f"{reader.path} is of another run than {readers[0].path.name}: {what or 'it has a seam'}. All parts "
                "have to be made of one video by one model, with the same settings, threads and libraries",
                kind="mismatch",
            )
        at = part.row + part.overlap, part.frame + metadata.padded_frames(part.overlap)[0]
        if (part.number, part.of) != (number, of) or at != (row, frame):
            raise StoreError(
                f"{reader.path} is {part} and begins at frame {at[1]}, and the parts before it end at frame {frame}; "
                "make it again",
                kind="mismatch",
            )
        row, frame = part.row + metadata.main.shape[0], part.frame + metadata.num_frames


def _check_overlap(before: StoreReader, reader: StoreReader) -> None:
    """Require that two neighbours computed the same for the chunk that both have."""
    part, stop = _part(reader), before.metadata.main.shape[0]
    there = _values(before, stop - part.overlap, stop)
    for name, array in _values(reader, 0, part.overlap).items():
        if array.tobytes() != there[name].tobytes():
            raise StoreError(
                f"{reader.path} and {before.path.name} differ in the chunk that both have, in {name}: they were not "
                "computed alike, or frames were replaced (--on-non-finite quarantine) within the warm-up of "
                f"{part}; make {reader.path.name} again on a machine like that of the other, or the whole store "
                "without --part",
                kind="mismatch",
            )


def _values(reader: StoreReader, start: int, stop: int) -> Unit:
    """Rows ``start`` to ``stop`` of the main array, with the rows of all other arrays that belong to them."""
    metadata = reader.metadata
    # the coordinates were compared with their digests when the part was opened
    columns = {name: column for name, column in reader.columns.items() if column is not None}
    frames = slice(metadata.padded_frames(start)[0], min(metadata.padded_frames(stop - 1)[1], metadata.num_frames))
    data = {name: reader.take(name, np.arange(start, stop)) for name in metadata.data_names}
    of_frames = {"frame_pts", "frame_valid"}
    return data | {
        name: column[frames if name in of_frames else slice(start, stop)] for name, column in columns.items()
    }


class _JoinedWriter(StoreWriter):
    """Writes the rows of all parts, coordinates too, as one run would have written them."""

    def __init__(self, path: Path, parts: list[StoreMetadata], options: WriteOptions) -> None:
        first = parts[0]
        self.kind = first.kind
        attributes = {name: value for name, value in first.attributes.items() if name != "longvid"}
        facts = first.attributes["longvid"]
        own = {"part", "digests", "seal", "num_frames", "status", "epoch", "warmup_chunks", "fingerprint"}
        fingerprint = without_part(first.fingerprint)
        if first.window is not None and parts[-1].window is not None:
            fingerprint["window"] = [first.window[0], parts[-1].window[1]]
        extra = {name: value for name, value in facts.items() if name not in own}
        super().__init__(
            path, RunFacts(fingerprint=fingerprint, extra=extra), options, attributes, {}, first.frame_rate
        )
        self.rows = {name: first.arrays[name].shape[1:] for name in first.data_names}
        self.dtype, self.unit_rows = str(first.main.dtype), first.main.chunks[0]
        self._last_commit = float("inf")  # one commit, at the end
        self.array_attributes = {name: array.attributes for name, array in first.arrays.items() if array.attributes}

    def copy(self, reader: StoreReader, *, first: int) -> None:
        """Append the rows of a part from ``first`` on, a unit at a time."""
        num_rows = reader.metadata.main.shape[0]
        for start in range(first, num_rows, self.unit_rows):
            self._receive(_values(reader, start, min(start + self.unit_rows, num_rows)))

    def _unit(self, count: int) -> Unit:
        rows = [name for name in self._waiting if name not in ("frame_pts", "frame_valid")]
        unit = {name: self._take(name, count) for name in rows}
        frames = count if self.kind == "frames" else int(unit["frame_stop"][-1] - unit["frame_start"][0])
        unit |= {name: self._take(name, frames) for name in ("frame_pts", "frame_valid")}
        self.num_frames += frames
        return unit

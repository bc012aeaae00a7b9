"""Owns the decision before writing: what is at a path, and whether a run may create, resume or replace it; and the
proof that a run which resumes a store computes the same: rows that are there already are computed again and compared,
bit for bit, before any others are written.

A run is continued only by a run with the same fingerprint: a nested record, ready for JSON, of everything that decides
the bits of the result. It holds the contents of files, not their names and places.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.files import disk_errors, local_path, write_durably
from longvid.store.durability import Durability, Resume
from longvid.store.format import (
    OWN_NAMES,
    PARTIAL_ROOT,
    PRIVATE,
    checksum_is_right,
    digest_chain,
    is_system_file,
    serialized,
    unit_digest,
    with_checksum,
)
from longvid.store.lock import WriterLock
from longvid.store.metadata import StoreMetadata
from longvid.store.reader import StoreReader, bytes_of, is_ours
from longvid.store.staging import partial_files

__all__ = ["Committed", "Found", "changes", "check_target", "in_words", "is_of_machine", "reopen", "settle_complete"]

_OF_MACHINE = ("fingerprint", "numerics", "tiling", "versions", "created_by")
"what a store records of the machine and the libraries that compute it"
_MISSING = "missing"
"stands for a field that a fingerprint does not have"
_LIBRARIES = ("source.av", "source.libavcodec", "source.libswscale")


@dataclass(frozen=True, slots=True)
class Found:
    """What is at the place where a store is to be written. Made by :func:`check_target`."""

    path: Path
    metadata: StoreMetadata | None = None
    "root metadata of a store of ours; None if there is nothing, or if this version cannot read it"
    problem: StoreError | None = None
    "why the store that is there can only be replaced"

    @property
    def complete(self) -> bool:
        """Whether a complete store is there."""
        return self.metadata is not None and self.metadata.complete

    def decide(
        self, fingerprint: Mapping[str, Any], *, overwrite: bool, resume: Resume
    ) -> Literal["create", "replace", "resume", "done"]:
        """What a run of this fingerprint does here. Changes nothing.

        With ``resume="close"`` the machine, the kernels and the versions of libraries may be other ones.

        Raises:
            StoreError: kind ``"exists"``, or ``"mismatch"`` with the fields in which the store's run differs.
        """
        if self.problem is not None and not overwrite:
            raise self.problem
        if self.metadata is None:
            return "create" if self.problem is None else "replace"
        changed = changes(self.metadata.fingerprint, fingerprint)
        tolerated = {name for name in changed if resume == "close" and is_of_machine(name)}
        if not self.complete and resume != "never" and changed.keys() <= tolerated:
            return "resume"
        if overwrite:
            return "replace"
        state = "a complete" if self.complete else "an incomplete"
        there = f"{self.path} exists: {state} store of {self.metadata.num_frames} frames"
        if changed:
            raise StoreError(f"{there}, made by another run. {self._advice(changed)}", kind="mismatch")
        if self.complete and resume != "never":
            return "done"
        raise StoreError(f"{there}; --overwrite (overwrite=True) replaces it", kind="exists")

    def _advice(self, changed: Mapping[str, tuple[Any, Any]]) -> str:
        """What differs, and how the run can be continued all the same."""
        listed = in_words(changed)
        advice = "use the settings of that run, "
        # the digest of the weights is that of the dtype in which they compute
        if any(name.startswith("model.") for name in changed) and "compute.dtype" not in changed:
            advice = "pass the model that made it with --model (model=), "
        elif not self.complete and all(map(is_of_machine, changed)):
            advice = (
                "use the settings of that run, accept other values from here on with --resume close (resume='close'), "
            )
        return (
            f"These fields differ: {_some(listed, 6, '; ')}. To continue it, {advice}choose another name, or replace "
            "the store with --overwrite (overwrite=True)"
        )


def changes(have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every field in which two fingerprints differ, with both values; the most general fields first."""
    old, new = dict(_leaves(have)), dict(_leaves(want))
    names = sorted({*old, *new}, key=lambda name: (name.count("."), name))
    pairs = {name: (old.get(name, _MISSING), new.get(name, _MISSING)) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """What :func:`changes` found, for people."""
    return [f"{name} is {_shown(a)} in the store and {_shown(b)} in this run" for name, (a, b) in changed.items()]


def is_of_machine(name: str) -> bool:
    """Whether a field of a fingerprint says where and by which libraries it was computed, and not what."""
    return name in _LIBRARIES or (name.startswith("compute.") and name not in ("compute.dtype", "compute.format"))


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            # JSON has lists only
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _some(items: list[str], most: int = 3, between: str = ", ") -> str:
    return between.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def check_target(path: str | os.PathLike[str]) -> Found:
    """Look at ``path``, where a store is to be written. Changes nothing.

    Raises:
        StoreError: something is there that may never be replaced, the parent folder is missing, or the root metadata
            of a store of ours are damaged.
    """
    target = local_path(path)
    with disk_errors(target):
        return _look_at(target)


def _look_at(target: Path) -> Found:
    if not target.parent.is_dir():
        raise StoreError(f"{target} cannot be written: there is no folder {target.parent}; make it", kind="missing")
    if not target.exists() and not target.is_symlink():
        return Found(target)
    if not target.is_dir() or target.is_symlink():
        raise StoreError(f"{target} exists and is not a folder; choose another name", kind="foreign")
    entries = sorted(entry.name for entry in target.iterdir() if not is_system_file(entry.name))
    digest = target / "digest"
    begun = (target / PRIVATE).is_dir() or (digest.is_dir() and not digest.is_symlink() and not any(digest.iterdir()))
    if not entries or (begun and set(entries) <= {"digest", PARTIAL_ROOT}):  # of a run that ended before it wrote
        return Found(target)
    content = bytes_of(target / "zarr.json")
    if content is None or not is_ours(content):
        if begun:
            raise StoreError(
                f"{target}: the root metadata are damaged or missing; `longvid repair` restores them", kind="corrupt"
            )
        raise StoreError(
            f"{target} exists, holds {_some(entries)} and is not a longvid store; choose another name", kind="foreign"
        )
    foreign = [name for name in entries if name not in OWN_NAMES]
    if foreign:
        raise StoreError(
            f"{target} is a longvid store that also holds {_some(foreign)}, which longvid did not write; move that "
            "away first, or choose another name",
            kind="foreign",
        )
    try:
        return Found(target, StoreMetadata.parse(json.loads(content), where=str(target)))
    except StoreError as exc:
        if exc.kind == "refused" and not checksum_is_right((target / "zarr.json").read_bytes()):
            exc = StoreError(
                f"{target}: the root metadata are damaged; `longvid repair` restores them ({exc})", kind="corrupt"
            )
        return Found(target, problem=exc)


def settle_complete(found: Found, durability: Durability) -> None:
    """Finish what a run left to do that was killed after its last commit."""
    path, private = found.path, found.path / PRIVATE
    arrays = {} if found.metadata is None else found.metadata.arrays
    documents = {path / name / "zarr.json": serialized(array.document) for name, array in arrays.items()}
    documents[private / "root.json"] = (path / "zarr.json").read_bytes()
    stale = {file for file, expected in documents.items() if not file.is_file() or file.read_bytes() != expected}
    if not (stale or (private / "lock").exists() or partial_files(path)):
        return
    with disk_errors(path), ExitStack() as stack:
        stack.callback(WriterLock.acquire(private / "lock", lock=durability.lock).release)
        for partial in partial_files(path):
            partial.unlink()
        for file in stale:
            write_durably(file, documents[file], sync=durability.syncs)


def reopen(found: Found, durability: Durability) -> None:
    """Make a complete store of latents one that can be continued: the source has more frames now than it had.

    What depends on where the source ended is taken back: the last chunk if its tail was padded, and with it the units
    in which it lies. One replacement of the root metadata does it.
    """
    path, metadata = found.path, found.metadata
    assert metadata is not None
    assert metadata.schedule is not None
    with disk_errors(path), ExitStack() as stack:
        stack.callback(WriterLock.acquire(path / PRIVATE / "lock", lock=durability.lock).release)
        _, digests = StoreReader(path, metadata, (path / "zarr.json").read_bytes()).checked_columns()
        last = metadata.schedule.full(metadata.schedule.index_of_frame(metadata.num_frames - 1))
        rows = last.latent_stop if last.frame_stop == metadata.num_frames else last.latent_start
        units = rows // metadata.main.chunks[0]
        lengths = dict.fromkeys(metadata.arrays, units * metadata.main.chunks[0])
        num_frames = metadata.frames(units - 1)[1] if units else 0
        lengths |= {"digest": units, "frame_pts": num_frames, "frame_valid": num_frames}
        root = copy.deepcopy(metadata.root)
        root["attributes"]["longvid"] |= {
            "status": "writing",
            "num_frames": num_frames,
            "digests": digest_chain(digests[:units]),
        }
        documents = root["consolidated_metadata"]["metadata"]
        for name, length in lengths.items():
            documents[name]["shape"][0] = length
        if not units:
            del root["consolidated_metadata"]
        content = with_checksum(root)
        for file in (path / "zarr.json", path / PRIVATE / "root.json"):
            write_durably(file, content, sync=durability.syncs)


class Committed:
    """The committed content of a store when a run resumes it.

    Args:
        reader: of the store.
        facts: what the run that resumes would record.
        resume: whether its results may be other ones.
    """

    def __init__(self, reader: StoreReader, facts: Mapping[str, Any], resume: Resume) -> None:
        self.columns, self.digests = reader.checked_columns()
        self.metadata = reader.metadata
        self._reader, self._facts, self._resume = reader, facts, resume
        have, want = self.metadata.attributes["longvid"], facts
        self._changed = changes(have["fingerprint"], want["fingerprint"])
        self.differs = bool(self._changed)
        "whether the results of the run are taken to be other ones than those of the run before would be"
        for name in ("tiling", "versions"):
            self._changed |= changes({name: have.get(name, {})}, {name: want.get(name, {})})

    def compare(self, name: str, start: int, values: npt.NDArray[Any]) -> None:
        """Require that rows from ``start`` on are those that are committed; rows before and beyond these are not
        looked at.

        Raises:
            StoreError: kind ``"mismatch"``, with what has changed of what is recorded; not for data with
                ``resume="close"``, where :attr:`differs` is set.
        """
        values, start = values[max(0, -start) :], max(0, start)
        stop = min(start + len(values), self.metadata.arrays[name].shape[0])
        if stop <= start:
            return
        data = name in self.metadata.data_names
        there = self._reader.take(name, np.arange(start, stop)) if data else self.columns[name][start:stop]
        if there.tobytes() == values[: stop - start].tobytes():
            return
        if data and self._resume == "close":
            self.differs = True
            return
        why, advice = "the source has other frames or time stamps than it had", "give the source that it was"
        if data:
            advice = "--resume close accepts other values from here on"
            recorded = "; ".join(in_words(self._changed)) or "nothing that is recorded has changed"
            why = f"the same model computes other values than it did ({recorded}), or the source has other frames"
        raise StoreError(
            f"{self._reader.path}: {name} {start} to {stop - 1} were computed again before the run is continued, and "
            f"they differ from those that are stored: {why}. Nothing was written. `longvid verify` tells whether the "
            f"store is damaged; {advice}, --overwrite --resume never starts over",
            kind="mismatch",
        )

    def check_unit(self, name: str, unit: int, rows: npt.NDArray[Any]) -> None:
        """Require that rows that were computed again are, by their digest, those of a damaged unit."""
        if not np.array_equal(unit_digest([rows]), self.digests[unit, self.metadata.data_names.index(name)]):
            raise StoreError(
                f"{self._reader.path}: {name} of unit {unit} were computed again and differ from those that were "
                "committed: the source has other frames, or the same model computes other values on this machine",
                kind="mismatch",
            )

    def seam(self) -> dict[str, Any]:
        """What a store records where values begin to be those of another machine or of other libraries."""
        before, after = ({name: values[side] for name, values in self._changed.items()} for side in (0, 1))
        earlier = self.metadata.attributes["longvid"].get("seams", [])
        seams = [*earlier, {"frame": self.metadata.num_frames, "before": before, "after": after}]
        return {"seams": seams} | {name: self._facts[name] for name in _OF_MACHINE if name in self._facts}

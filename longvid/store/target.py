"""Owns the decision before writing: what is at a path, and whether a run may create, resume or replace it.

A run is continued only by a run with the same fingerprint: a nested record, ready for JSON, of everything that decides
the bits of the result. It holds the contents of files, not their names and places.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longvid.errors import StoreError
from longvid.files import local_path
from longvid.store.durability import Durability
from longvid.store.format import OWN_NAMES, PARTIAL_ROOT, PRIVATE, is_system_file, serialized
from longvid.store.lock import WriterLock
from longvid.store.metadata import StoreMetadata
from longvid.store.reader import bytes_of, is_ours
from longvid.store.staging import disk_errors, partial_files, write_durably

__all__ = ["Found", "check_target", "differences", "read_root", "settle_complete"]

_ABSENT = object()


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
        self, fingerprint: Mapping[str, Any], *, overwrite: bool, resume: bool
    ) -> Literal["create", "replace", "resume", "done"]:
        """What a run of this fingerprint does here. Changes nothing.

        Raises:
            StoreError: kind ``"exists"``, or ``"mismatch"`` with the fields in which the store's run differs.
        """
        if self.problem is not None and not overwrite:
            raise self.problem
        if self.metadata is None:
            return "create" if self.problem is None else "replace"
        other = differences(self.metadata.fingerprint, fingerprint)
        if not self.complete and resume and not other:
            return "resume"
        if overwrite:
            return "replace"
        state = "a complete" if self.complete else "an incomplete"
        there = f"{self.path} exists: {state} store of {self.metadata.num_frames} frames"
        if other:
            model = any(field.startswith("model.") for field in other)
            advice = (
                "pass the model that made it with --model (model=), " if model else "use the settings of that run, "
            )
            raise StoreError(
                f"{there}, made by another run. These fields differ: {_some(other, 6, '; ')}. To continue it, {advice}"
                "choose another name, or replace the store with --overwrite (overwrite=True)",
                kind="mismatch",
            )
        if self.complete and resume:
            return "done"
        raise StoreError(f"{there}; --overwrite (overwrite=True) replaces it", kind="exists")


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """Every field in which two fingerprints differ, with both values in words; the most general fields first."""
    old, new = dict(_leaves(have)), dict(_leaves(want))
    return [
        f"{name} is {_shown(old.get(name, _ABSENT))} in the store and {_shown(new.get(name, _ABSENT))} in this run"
        for name in sorted({*old, *new}, key=lambda name: (name.count("."), name))
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            # JSON has lists only
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = "missing" if value is _ABSENT else str(value)
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
    root = read_root(target)
    if root is None:
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
        return Found(target, StoreMetadata.parse(root, where=str(target)))
    except StoreError as exc:
        return Found(target, problem=exc)


def read_root(path: Path) -> dict[str, Any] | None:
    """The root metadata of the store at ``path``; None if there are none of ours that can be read."""
    content = bytes_of(path / "zarr.json")
    return json.loads(content) if content is not None and is_ours(content) else None


def settle_complete(found: Found, durability: Durability) -> None:
    """Finish what a run left to do that was killed after its last commit."""
    path, private = found.path, found.path / PRIVATE
    arrays = {} if found.metadata is None else found.metadata.arrays
    documents = {path / name / "zarr.json": serialized(array.document) for name, array in arrays.items()}
    documents[private / "root.json"] = (path / "zarr.json").read_bytes()
    stale = {file for file, expected in documents.items() if not file.is_file() or file.read_bytes() != expected}
    snapshots = private / "snapshots"
    left = [private / "lock"] + ([] if durability.keep_snapshots else [snapshots])
    if not (stale or any(file.exists() for file in left) or partial_files(path)):
        return
    with disk_errors(path), ExitStack() as stack:
        stack.callback(WriterLock.acquire(private / "lock", lock=durability.lock).release)
        for partial in partial_files(path):
            partial.unlink()
        for file in stale:
            write_durably(file, documents[file], sync=durability.syncs)
        if not durability.keep_snapshots:
            shutil.rmtree(snapshots, ignore_errors=True)

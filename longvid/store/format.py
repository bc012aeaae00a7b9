"""The format of a store: names, units, digests and the seal. No torch, no zarr; reads and writes no file.

One zarr v3 group per video with sibling arrays that share a time dimension. The data come in **units**, one chunk of
the main array with the coordinates that belong to it. The array ``digest`` holds a digest of every unit, the root
metadata one of all digests and one of itself, the **seal**. So whatever part of a store is damaged, missing, older than
the rest or put in another's place, it shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from longvid.schedule import ChunkSchedule

__all__ = [
    "ARRAY_NAMES",
    "DIGEST_BYTES",
    "FORMAT_VERSION",
    "MISSING",
    "OWN_NAMES",
    "PARTIAL_ROOT",
    "PRIVATE",
    "StoreLayout",
    "chunk_file",
    "chunk_length",
    "digest_chain",
    "seal_is_whole",
    "sealed",
    "serialized",
    "unit_digest",
]

FORMAT_VERSION = 2
MISSING = -(2**63)
"fill value of whole-number arrays, so that a missing chunk cannot pass for data"
PRIVATE = "digest/.longvid"
"""folder in a store for what is not data: lock, snapshots, a copy of the root metadata. It lies in that of an array of
ours, since readers that list the group's members would wonder about it anywhere else"""
PARTIAL_ROOT = ".zarr.json.partial"
"what the root metadata is called while it is being written"
DIGEST_BYTES = 16
DATA_NAMES = {"latents": ("latents", "moments"), "frames": ("frames",)}
"arrays of each kind of store that hold data, the main one first; the second one of latents need not be there"
COORDINATE_NAMES = ("t", "frame_start", "frame_stop", "frame_pts", "frame_valid")
"arrays that say what the data are of, in the order in which they are digested"
ARRAY_NAMES = frozenset({*COORDINATE_NAMES, "digest", *(name for names in DATA_NAMES.values() for name in names)})
OWN_NAMES = frozenset({"zarr.json", PARTIAL_ROOT, *ARRAY_NAMES})
"every name that longvid writes in a store's folder"


def unit_digest(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Digest of arrays, of their values in little-endian order: uint8 of length 16."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)
    return np.frombuffer(digest.digest(), np.uint8)


def digest_chain(digests: npt.NDArray[np.uint8]) -> str:
    """One digest of the digests of all units, in hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=DIGEST_BYTES).hexdigest()


def sealed(root: dict[str, Any]) -> bytes:
    """Root metadata as it is written, with a digest of itself in ``longvid.seal``."""
    root["attributes"]["longvid"]["seal"] = ""
    root["attributes"]["longvid"]["seal"] = hashlib.sha256(serialized(root)).hexdigest()
    return serialized(root)


def serialized(document: Mapping[str, Any]) -> bytes:
    """Metadata, of the root or of an array, byte for byte as they are written."""
    return json.dumps(document, indent=2).encode()


def seal_is_whole(content: bytes) -> bool:
    """Whether root metadata is, byte for byte, what was sealed."""
    try:
        root = json.loads(content)
        return sealed(root) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class StoreLayout:
    """What the root metadata of a store say of its arrays and their units."""

    root: dict[str, Any]

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes of the group."""
        attributes: dict[str, Any] = self.root["attributes"]
        return attributes

    @property
    def facts(self) -> dict[str, Any]:
        """The attribute ``longvid``."""
        facts: dict[str, Any] = self.attributes["longvid"]
        return facts

    @property
    def complete(self) -> bool:
        """Whether the whole video is in it."""
        return bool(self.facts.get("status") == "complete")

    @property
    def members(self) -> dict[str, Any]:
        """Metadata of every array by name; empty before the first step."""
        members: dict[str, Any] = (self.root.get("consolidated_metadata") or {}).get("metadata", {})
        return members

    @property
    def data_names(self) -> tuple[str, ...]:
        """Arrays that hold data, the main one first."""
        return tuple(name for name in DATA_NAMES[self.facts["kind"]] if name in self.members)

    @property
    def coordinate_names(self) -> tuple[str, ...]:
        """Arrays that hold coordinates, in the order in which they are digested."""
        return tuple(name for name in COORDINATE_NAMES if name in self.members)

    @property
    def num_units(self) -> int:
        """Published units."""
        return int(self.members["digest"]["shape"][0]) if self.members else 0

    @cached_property
    def unit_rows(self) -> int:
        """Rows of the main array in a whole unit."""
        return chunk_length(self.members[self.data_names[0]])

    def rows(self, unit: int) -> tuple[int, int]:
        """Half-open range of rows of the main array in a unit."""
        total = int(self.members[self.data_names[0]]["shape"][0])
        return unit * self.unit_rows, min((unit + 1) * self.unit_rows, total)

    @cached_property
    def _schedule(self) -> ChunkSchedule:
        return ChunkSchedule.from_dict(self.facts["chunk_plan"])

    def frames(self, unit: int) -> tuple[int, int]:
        """Half-open range of frames in a unit."""
        start, stop = self.rows(unit)
        if self.facts["kind"] == "frames":
            return start, stop
        num_frames = int(self.members["frame_pts"]["shape"][0])
        return self._schedule.frame_range(start)[0], min(self._schedule.frame_range(stop - 1)[1], num_frames)

    def coordinate_rows(self, name: str, unit: int) -> tuple[int, int]:
        """Half-open range of rows of a coordinate in a unit."""
        dimensions = self.members[name]["dimension_names"]
        return self.frames(unit) if dimensions == ["frame"] else self.rows(unit)

    def coordinates_agree(
        self, columns: Mapping[str, npt.NDArray[Any]], digests: npt.NDArray[np.uint8], unit: int
    ) -> bool:
        """Whether these coordinates, whole arrays by name, are those that were published with a unit."""
        parts = (columns[name][slice(*self.coordinate_rows(name, unit))] for name in self.coordinate_names)
        return np.array_equal(unit_digest(parts), digests[unit, -1])

    def chunk_files(self, name: str) -> list[str]:
        """Names of the files of an array's published chunks."""
        document = self.members[name]
        count = -(-int(document["shape"][0]) // chunk_length(document))
        return [chunk_file(number, len(document["shape"])) for number in range(count)]


def chunk_length(document: Mapping[str, Any]) -> int:
    """Rows in a chunk of an array."""
    return int(document["chunk_grid"]["configuration"]["chunk_shape"][0])


def chunk_file(unit: int, ndim: int) -> str:
    """Name of the file of a chunk that spans all axes but the first."""
    return "c." + ".".join([str(unit), *["0"] * (ndim - 1)])

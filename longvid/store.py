"""The zarr store of one video, read side: what is at a path, and what is published in it. No torch here.

One zarr v3 group per video with sibling arrays that share a time dimension; ``store_writer`` describes how it grows.

What is published is sealed. The store's data comes in **units**, one zarr chunk of the main array with the coordinates
that belong to it. The array ``digest`` holds a digest of every unit, the root metadata one of all digests and one of
itself. So whatever part of a store is damaged, missing, older than the rest or put in another's place, it shows.

Axes: t time, c channels, y x latent rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import zarr

from longvid.errors import ScheduleError, StoreError
from longvid.fingerprint import differences
from longvid.schedule import ChunkSchedule
from longvid.zarr_gate import check_chunk, check_group, check_tree, read_document

__all__ = [
    "DIGEST_BYTES",
    "FORMAT_VERSION",
    "MISSING",
    "OWN_NAMES",
    "PRIVATE",
    "Found",
    "LatentStore",
    "array_document",
    "check_target",
    "chunk_file",
    "digest_chain",
    "open_store",
    "read_root",
    "seal_is_whole",
    "sealed",
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
_LATENT_ARRAYS = ("latents", "moments", "t", "frame_start", "frame_stop", "frame_pts", "frame_valid", "digest")
_FRAME_ARRAYS = ("frames", "t", "frame_pts", "frame_valid", "digest")
OWN_NAMES = frozenset({"zarr.json", PARTIAL_ROOT, *_LATENT_ARRAYS, *_FRAME_ARRAYS})
"every name that longvid writes in a store's folder"


# ------------------------------------------------------------------------------------------------- seals


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
    root["attributes"]["longvid"]["seal"] = hashlib.sha256(_serialized(root)).hexdigest()
    return _serialized(root)


def _serialized(root: Mapping[str, Any]) -> bytes:
    return json.dumps(root, indent=2).encode()


def array_document(document: Mapping[str, Any]) -> bytes:
    """An array's own metadata, byte for byte as it is written."""
    return json.dumps(document, indent=2).encode()


def seal_is_whole(content: bytes) -> bool:
    """Whether root metadata is, byte for byte, what was sealed."""
    try:
        root = json.loads(content)
        return sealed(root) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


# ------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True, slots=True)
class Found:
    """What is at the place where a store is to be written. Made by :func:`check_target`."""

    path: Path
    state: Literal["nothing", "unfinished", "complete"]
    root: dict[str, Any] = field(default_factory=dict)
    "root metadata of a store of ours"

    @property
    def facts(self) -> dict[str, Any]:
        """Its attribute ``longvid``; empty if there is nothing."""
        return cast("dict[str, Any]", self.root.get("attributes", {}).get("longvid", {}))

    def decide(
        self, fingerprint: Mapping[str, Any], *, overwrite: bool, resume: bool
    ) -> Literal["create", "replace", "resume", "done"]:
        """What a run of this fingerprint does here. Changes nothing.

        Raises:
            StoreError: kind ``"exists"``, or ``"mismatch"`` with every field in which the store's run differs.
        """
        if self.state == "nothing":
            return "create"
        other = differences(self.facts.get("fingerprint") or {}, fingerprint)
        if self.state == "unfinished" and resume and not other:
            return "resume"
        if overwrite:
            return "replace"
        frames = f"{self.path} exists: {_a(self.state)} store of {self.facts.get('num_frames', 0)} frames"
        if other:
            raise StoreError(
                f"{frames}, made by another run: {'; '.join(other)}. Run what made it, choose another name, or replace "
                "it with --overwrite (overwrite=True)",
                kind="mismatch",
            )
        if self.state == "complete" and resume:
            return "done"
        raise StoreError(f"{frames}; --overwrite (overwrite=True) starts it again", kind="exists")


def check_target(path: str | os.PathLike[str]) -> Found:
    """Say what is at ``path``, where a store is to be written. Changes nothing.

    Raises:
        StoreError: something is there that may never be replaced, the parent folder is missing, or the root metadata
            of a store of ours is damaged.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise StoreError(f"{target} cannot be written: there is no folder {target.parent}", kind="missing")
    if not target.exists() and not target.is_symlink():
        return Found(target, "nothing")
    if not target.is_dir() or target.is_symlink():
        raise StoreError(f"{target} exists and is not a folder; choose another name", kind="foreign")
    entries = sorted(entry.name for entry in target.iterdir())
    digest = target / "digest"
    ours = (target / PRIVATE).is_dir() or (digest.is_dir() and not digest.is_symlink() and not any(digest.iterdir()))
    if not entries or (ours and set(entries) <= {"digest", PARTIAL_ROOT}):  # of a run that ended before it wrote
        return Found(target, "nothing")
    root = read_root(target)
    if root is None:
        if ours:
            raise StoreError(
                f"{target}: the root metadata is damaged or missing; longvid repair restores it", kind="corrupt"
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
    complete = root["attributes"]["longvid"].get("status") == "complete"
    return Found(target, "complete" if complete else "unfinished", root)


def read_root(path: Path) -> dict[str, Any] | None:
    """The root metadata of the store at ``path``, or None if there is none of ours that can be read."""
    try:
        root = json.loads((path / "zarr.json").read_bytes())
        return root if isinstance(root["attributes"]["longvid"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _a(state: str) -> str:
    return "a complete" if state == "complete" else "an incomplete"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class LatentStore:
    """A store of latents as it is published now. Made by :func:`open_store`."""

    path: Path
    latents: zarr.Array[Any]
    "(t, c, y, x), float16 or float32, raw"
    moments: zarr.Array[Any] | None
    "(t, 2 c, y, x): mean, then log variance"
    frame_pts: npt.NDArray[np.int64]
    "time stamps of the published frames, in units of ``time_base``"
    attrs: dict[str, Any]
    "all attributes of the group"
    schedule: ChunkSchedule
    arrays: Mapping[str, zarr.Array[Any]]
    "all arrays by name"
    documents: Mapping[str, Any]
    "their metadata by name"
    _last_unit: dict[int, npt.NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_frames(self) -> int:
        """True frames that are published."""
        return len(self.frame_pts)

    @property
    def num_latents(self) -> int:
        """Latent frames that are published."""
        return int(self.latents.shape[0])

    @property
    def complete(self) -> bool:
        """Whether the whole video is in it."""
        return bool(self.attrs["longvid"]["status"] == "complete")

    @property
    def representation(self) -> str:
        """``mode``, ``sample`` or ``moments``."""
        return str(self.attrs["longvid"]["representation"])

    @property
    def vae(self) -> dict[str, Any]:
        """Facts of the model that made the latents."""
        return cast("dict[str, Any]", self.attrs["vae"])

    @property
    def source(self) -> dict[str, Any]:
        """Facts of the video."""
        return cast("dict[str, Any]", self.attrs["source"])

    @property
    def height(self) -> int:
        """Of the true frames, in pixels."""
        return int(self.source["height"])

    @property
    def width(self) -> int:
        """Of the true frames, in pixels."""
        return int(self.source["width"])

    @property
    def time_base(self) -> Fraction:
        """Seconds per unit of the time stamps."""
        return Fraction(self.source["time_base"])

    @property
    def frame_rate(self) -> Fraction | None:
        """Mean frames per second."""
        rate = self.source["frame_rate"]
        return None if rate is None else Fraction(rate)

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    @property
    def frame_valid(self) -> npt.NDArray[np.bool_]:
        """Which published frames are those of the source; the others repeat a good one in place of a damaged one."""
        return np.asarray(self.arrays["frame_valid"][:], np.bool_)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Latent frames ``start`` to ``stop`` as float32 (t, c, y, x), compared with their digests.

        Raises:
            StoreError: kind ``"corrupt"`` if a stored chunk is damaged, missing or not the one that was published.
        """
        length = self.latents.chunks[0]
        parts = []
        for unit in range(start // length, -(-stop // length)):
            begin = unit * length
            parts.append(self._unit(unit)[max(0, start - begin) : stop - begin])
        return np.concatenate(parts).astype(np.float32)

    def _unit(self, unit: int) -> npt.NDArray[Any]:
        """The latents of one unit; the last one read is kept, since chunks of a model are shorter."""
        if unit not in self._last_unit:
            begin = unit * self.latents.chunks[0]
            stop = min(begin + self.latents.chunks[0], self.num_latents)
            try:
                file = self.path / "latents" / chunk_file(unit, self.latents.ndim)
                check_chunk(file, self.documents["latents"], where=str(self.path))
                latents = np.asarray(self.latents[begin:stop])
                known = np.asarray(self.arrays["digest"][unit, 0])
            except (ValueError, RuntimeError, OSError, MemoryError) as exc:
                raise StoreError(
                    f"{self.path}: latent frames {begin} to {stop - 1} are damaged ({exc}); {_REPAIR}", kind="corrupt"
                ) from exc
            if not np.array_equal(unit_digest([latents]), known):
                raise StoreError(
                    f"{self.path}: latent frames {begin} to {stop - 1} are damaged, missing or not those that were "
                    f"published; {_REPAIR}",
                    kind="corrupt",
                )
            self._last_unit.clear()
            self._last_unit[unit] = latents
        return self._last_unit[unit]


_REPAIR = "longvid verify tells what else is, longvid repair computes it again"


def chunk_file(unit: int, ndim: int) -> str:
    """Name of the file of a chunk that spans all axes but the first."""
    return "c." + ".".join([str(unit), *["0"] * (ndim - 1)])


def _check_chunks(path: Path, name: str, document: Mapping[str, Any]) -> None:
    """No chunk of a small array, which is read whole, is larger than it says."""
    shape, chunks = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    for number in range(-(-shape[0] // chunks[0])):
        check_chunk(path / name / chunk_file(number, len(shape)), document, where=str(path))


def open_store(path: str | os.PathLike[str]) -> LatentStore:
    """Open a store of latents for reading, as it is published at this moment.

    Raises:
        StoreError: nothing is there, it is not a longvid store of latents, or its metadata is damaged.
    """
    where = Path(path)
    if not where.exists():
        raise StoreError(f"there is no store {where}", kind="missing")
    if not (where / "zarr.json").is_file():
        raise StoreError(f"{where} is not a zarr store; pass the folder that encode wrote", kind="foreign")
    check_tree(where)
    content = read_document(where / "zarr.json")
    attributes = content.get("attributes", {})
    facts = attributes.get("longvid") if isinstance(attributes, dict) else None
    if not isinstance(facts, dict):
        raise StoreError(f"{where} is a zarr store, but not of longvid", kind="foreign")
    if facts.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{where} has format {facts.get('format_version')}, this version of longvid reads {FORMAT_VERSION}",
            kind="format",
        )
    if facts.get("kind") != "latents":
        raise StoreError(f"{where} holds {facts.get('kind')}, not latents", kind="format")
    if not content.get("consolidated_metadata"):
        raise StoreError(f"{where} is incomplete: nothing was published yet", kind="incomplete")
    check_group(content, where=str(where))
    documents = content["consolidated_metadata"]["metadata"]
    try:
        group = zarr.open_group(where, mode="r", use_consolidated=True)
        arrays = dict(group.arrays())
        for name in ("frame_pts", "frame_valid", "digest"):
            _check_chunks(where, name, documents[name])
        frame_pts = np.asarray(arrays["frame_pts"][:], np.int64)
        if (frame_pts == MISSING).any():
            raise ValueError("time stamps of frames are missing")
        _ = attributes["source"]["height"], attributes["source"]["width"], attributes["vae"]
        return LatentStore(
            path=where,
            latents=arrays["latents"],
            moments=arrays.get("moments"),
            frame_pts=frame_pts,
            attrs=attributes,
            schedule=ChunkSchedule.from_dict(facts["chunk_plan"]),
            arrays=arrays,
            documents=documents,
        )
    except (KeyError, ValueError, TypeError, RuntimeError, OSError, MemoryError, ScheduleError) as exc:
        raise StoreError(f"{where}: the metadata is damaged ({exc})", kind="corrupt") from exc

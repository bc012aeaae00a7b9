"""The zarr store of one video, read side: what is at a path, and what is published in it. No torch here.

Whatever is read is compared with the seal first: metadata, digests and coordinates when a store is opened, data unit by
unit as they are read. ``store_format`` tells what a store is, ``store_writer`` how it grows.

Axes: t time, c channels, y x latent rows and columns; T H W of frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import zarr

from longvid.errors import ScheduleError, StoreError
from longvid.schedule import ChunkSchedule
from longvid.store.fingerprint import differences
from longvid.store.format import (
    FORMAT_VERSION,
    MISSING,
    OWN_NAMES,
    PARTIAL_ROOT,
    PRIVATE,
    StoreLayout,
    digest_chain,
    seal_is_whole,
    serialized,
    unit_digest,
)
from longvid.store.validation import check_chunk, check_group, check_tree, read_document

__all__ = ["Found", "FrameStore", "LatentStore", "Published", "check_target", "open_frames", "open_store", "read_root"]

STORE_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, IndexError, MemoryError)
"what zarr and its codecs raise when they meet damage"
_REPAIR = "longvid verify tells what else is, longvid repair restores it"


# ------------------------------------------------------------------------------------------------- before writing


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


# ------------------------------------------------------------------------------------------------- what is published


@dataclass(frozen=True)
class Published(StoreLayout):
    """What a store shows its readers at this moment, compared with its seal. Made by :func:`open_published`."""

    path: Path
    arrays: Mapping[str, zarr.Array[Any]]
    columns: Mapping[str, npt.NDArray[Any]]
    "coordinates and digests, whole arrays by name"
    _last: dict[tuple[str, int], npt.NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` of an array of data, compared with their digests.

        Raises:
            StoreError: kind ``"corrupt"`` if a stored chunk is damaged, missing or not the one that was published.
        """
        length = self.unit_rows
        parts = [
            self._unit(name, unit)[max(0, start - unit * length) : stop - unit * length]
            for unit in range(start // length, -(-stop // length))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _unit(self, name: str, unit: int) -> npt.NDArray[Any]:
        """One unit; the last one read is kept, since chunks of a model are shorter."""
        if (name, unit) not in self._last:
            begin, stop = self.rows(unit)
            what = f"{self.path}: {name} {begin} to {stop - 1} are damaged"
            try:
                check_chunk(self.path / name / self.chunk_files(name)[unit], self.members[name], where=str(self.path))
                rows = np.asarray(self.arrays[name][begin:stop])
            except STORE_ERRORS as exc:
                raise StoreError(f"{what} ({exc}); {_REPAIR}", kind="corrupt") from exc
            if not np.array_equal(unit_digest([rows]), self.columns["digest"][unit, self.data_names.index(name)]):
                raise StoreError(f"{what}, missing or not those that were published; {_REPAIR}", kind="corrupt")
            self._last.clear()
            self._last[name, unit] = rows
        return self._last[name, unit]

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


def open_published(path: str | os.PathLike[str], kind: Literal["latents", "frames"]) -> Published:
    """Open a store for reading, and compare its metadata, digests and coordinates with its seal.

    Raises:
        StoreError: nothing is there, it is not a longvid store of this kind, nothing was published, or something is
            not what was published.
    """
    where = Path(path)
    if not where.exists():
        raise StoreError(f"there is no store {where}", kind="missing")
    if not (where / "zarr.json").is_file():
        raise StoreError(f"{where} is not a zarr store; pass the folder that longvid wrote", kind="foreign")
    check_tree(where)
    root = read_document(where / "zarr.json")
    attributes = root.get("attributes")
    facts = attributes.get("longvid") if isinstance(attributes, dict) else None
    if not isinstance(facts, dict):
        raise StoreError(f"{where} is a zarr store, but not of longvid", kind="foreign")
    if facts.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{where} has format {facts.get('format_version')}, this version of longvid reads {FORMAT_VERSION}",
            kind="format",
        )
    if facts.get("kind") != kind:
        raise StoreError(f"{where} holds {facts.get('kind')}, not {kind}", kind="format")
    # Not the bytes: a tool that writes the same metadata in another form does no harm.
    if not seal_is_whole(serialized(root)):
        raise StoreError(
            f"{where}: the root metadata is damaged or was changed after it was published; longvid repair restores it",
            kind="corrupt",
        )
    if not root.get("consolidated_metadata"):
        raise StoreError(f"{where} is incomplete: nothing was published yet", kind="incomplete")
    check_group(root, where=str(where))
    try:
        return _opened(where, StoreLayout(root))
    except (*STORE_ERRORS, ScheduleError) as exc:
        raise StoreError(
            f"{where}: the metadata or coordinates are damaged ({exc}); {_REPAIR}", kind="corrupt"
        ) from exc


def _opened(path: Path, layout: StoreLayout) -> Published:
    group = zarr.open_group(path, mode="r", use_consolidated=True)
    arrays = dict(group.arrays())
    columns = {}
    for name in (*layout.coordinate_names, "digest"):
        for file in layout.chunk_files(name):
            check_chunk(path / name / file, layout.members[name], where=str(path))
        # zarr has read the root once more, and a writer may have published meanwhile
        columns[name] = np.asarray(arrays[name][: layout.members[name]["shape"][0]])
    if digest_chain(columns["digest"]) != layout.facts["digests"]:
        raise ValueError("the digests are not those that were published")
    if (columns["frame_pts"] == MISSING).any():
        raise ValueError("time stamps of frames are missing")
    for unit in range(layout.num_units):
        if not layout.coordinates_agree(columns, columns["digest"], unit):
            raise ValueError(f"the coordinates of frames from {layout.frames(unit)[0]} on are not as published")
    return Published(root=layout.root, path=path, arrays=arrays, columns=columns)


class FrameStore:
    """Frames of a store as an array (T, H, W, 3) of uint8 to slice. Made by :func:`open_frames`."""

    dtype = np.dtype(np.uint8)

    def __init__(self, published: Published) -> None:
        self._published = published
        array = published.arrays["frames"]
        self.shape, self.chunks = array.shape, array.chunks

    @property
    def digests(self) -> str:
        """One digest of everything that is published."""
        return str(self._published.facts["digests"])

    @property
    def frame_rate(self) -> Fraction | None:
        """Mean frames per second."""
        rate = self._published.facts.get("frame_rate")
        return None if rate is None else Fraction(rate)

    def __getitem__(self, window: slice) -> npt.NDArray[np.uint8]:
        """Frames of a window without steps; see :meth:`Published.read`."""
        start, stop, _ = window.indices(self.shape[0])
        return self._published.read("frames", start, stop)


def open_frames(path: str | os.PathLike[str]) -> FrameStore:
    """Open a store of frames for reading.

    Raises:
        StoreError: as :func:`open_published`, and kind ``"incomplete"`` if the run that wrote it did not end.
    """
    published = open_published(path, "frames")
    if not published.complete:
        raise StoreError(
            f"{path} is incomplete: {published.facts.get('num_frames', 0)} frames were published before the run that "
            "wrote it ended; run that again, it goes on",
            kind="incomplete",
        )
    return FrameStore(published)


@dataclass(frozen=True)
class LatentStore:
    """A store of latents as it is published now. Made by :func:`open_store`."""

    published: Published
    frame_pts: npt.NDArray[np.int64]
    "time stamps of the published frames, in units of ``time_base``"
    schedule: ChunkSchedule

    @property
    def path(self) -> Path:
        """Of the store's folder."""
        return self.published.path

    @property
    def arrays(self) -> Mapping[str, zarr.Array[Any]]:
        """All arrays by name."""
        return self.published.arrays

    @property
    def attrs(self) -> dict[str, Any]:
        """All attributes of the group."""
        return self.published.attributes

    @property
    def latents(self) -> zarr.Array[Any]:
        """(t, c, y, x), float16 or float32, raw."""
        return self.arrays["latents"]

    @property
    def moments(self) -> zarr.Array[Any] | None:
        """(t, 2 c, y, x): mean, then log variance."""
        return self.arrays.get("moments")

    @property
    def frame_valid(self) -> npt.NDArray[np.bool_]:
        """Which published frames are those of the source; the others repeat a good one in place of a damaged one."""
        return self.published.columns["frame_valid"]

    @property
    def num_frames(self) -> int:
        """True frames that are published."""
        return len(self.frame_pts)

    @property
    def num_latents(self) -> int:
        """Latent frames that are published."""
        return int(self.published.members["latents"]["shape"][0])

    @property
    def complete(self) -> bool:
        """Whether the whole video is in it."""
        return self.published.complete

    @property
    def representation(self) -> str:
        """``mode``, ``sample`` or ``moments``."""
        return str(self.published.facts["representation"])

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
        return self.published.stored_bytes

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Latent frames ``start`` to ``stop`` as float32 (t, c, y, x), compared with their digests.

        Raises:
            StoreError: kind ``"corrupt"`` if a stored chunk is damaged, missing or not the one that was published.
        """
        return self.published.read("latents", start, stop).astype(np.float32)


def open_store(path: str | os.PathLike[str]) -> LatentStore:
    """Open a store of latents for reading, as it is published at this moment.

    Raises:
        StoreError: see :func:`open_published`.
    """
    published = open_published(path, "latents")
    try:
        _ = published.attributes["source"]["height"], published.attributes["source"]["width"]
        _ = published.attributes["vae"]
        return LatentStore(
            published=published,
            frame_pts=published.columns["frame_pts"],
            schedule=ChunkSchedule.from_dict(published.facts["chunk_plan"]),
        )
    except (KeyError, TypeError, ScheduleError) as exc:
        raise StoreError(f"{path}: the metadata is damaged ({exc})", kind="corrupt") from exc

"""The zarr store of one video, read side: what is at a path, and what is published in it. No torch here.

One zarr v3 group per video with sibling arrays that share a time dimension; ``store_writer`` describes how it grows.

Axes: t time, c channels, y x latent rows and columns.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from longvid.errors import ScheduleError, StoreError
from longvid.schedule import ChunkSchedule

__all__ = [
    "FORMAT_VERSION",
    "MISSING",
    "OWN_NAMES",
    "PARTIAL_ROOT",
    "LatentStore",
    "check_target",
    "open_store",
    "read_json",
]

FORMAT_VERSION = 1
MISSING = -(2**63)
"fill value of whole-number arrays, so that a missing chunk cannot pass for data"
PARTIAL_ROOT = ".zarr.json.partial"
"what the root metadata is called while it is being written"
_LATENT_ARRAYS = ("latents", "moments", "t", "frame_start", "frame_stop", "frame_pts")
_FRAME_ARRAYS = ("frames", "t", "frame_pts")
OWN_NAMES = frozenset({"zarr.json", PARTIAL_ROOT, *_LATENT_ARRAYS, *_FRAME_ARRAYS})
"every name that longvid writes in a store's folder"


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Say whether a store can be written at ``path``. Changes nothing.

    Raises:
        StoreError: something is there that may not be replaced, or the parent folder is missing.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise StoreError(f"{target} cannot be written: there is no folder {target.parent}", kind="missing")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise StoreError(f"{target} exists and is not a folder; choose another name", kind="foreign")
    entries = sorted(entry.name for entry in target.iterdir())
    if not entries:
        return
    facts = _own_attributes(target)
    if facts is None:
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
    if not overwrite:
        state = "a complete" if facts.get("status") == "complete" else "an incomplete"
        raise StoreError(
            f"{target} exists: {state} store of {facts.get('num_frames', 0)} frames; --overwrite (overwrite=True) "
            "starts it again",
            kind="exists",
        )


def _own_attributes(path: Path) -> dict[str, Any] | None:
    """The ``longvid`` attribute of the group at ``path``, or None if it is not ours."""
    try:
        facts = read_json(path / "zarr.json")["attributes"]["longvid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None


def read_json(path: Path) -> Any:
    """The content of a metadata file."""
    return json.loads(path.read_text(encoding="utf-8"))


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

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Latent frames ``start`` to ``stop`` as float32 (t, c, y, x).

        Raises:
            StoreError: kind ``"corrupt"`` if a stored chunk is damaged or missing.
        """
        try:
            latents = np.asarray(self.latents[start:stop]).astype(np.float32)
        except (ValueError, RuntimeError, OSError) as exc:
            raise StoreError(
                f"{self.path}: latent frames {start} to {stop - 1} are damaged ({exc}); encode the video again",
                kind="corrupt",
            ) from exc
        if np.isnan(latents).any():
            raise StoreError(
                f"{self.path}: latent frames {start} to {stop - 1} are missing; encode the video again", kind="corrupt"
            )
        return latents


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
    try:
        content = read_json(where / "zarr.json")
        attributes = content.get("attributes", {})
    except (OSError, ValueError, AttributeError) as exc:
        raise StoreError(f"{where}: the root metadata is damaged ({exc})", kind="corrupt") from exc
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
    try:
        group = zarr.open_group(where, mode="r", use_consolidated=True)
        arrays = dict(group.arrays())
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
        )
    except (KeyError, ValueError, TypeError, RuntimeError, OSError, ScheduleError) as exc:
        raise StoreError(f"{where}: the metadata is damaged ({exc})", kind="corrupt") from exc

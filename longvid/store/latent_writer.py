"""Owns writing the latents of one video. Axes: T or t time, C or c channels, y x rows and columns of a latent."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.frames import SourceInfo
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.durability import WriteOptions
from longvid.store.format import COORDINATE_CHUNK
from longvid.store.metadata import RunFacts, first_facts
from longvid.store.staging import disk_errors
from longvid.store.writer import TARGET_CHUNK_BYTES, StoreWriter, Unit, take

__all__ = ["LatentLayout", "LatentWriter", "seconds_of_latents"]

_MOST_LATENTS_PER_CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayout:
    """The arrays of a store of latents.

    Args:
        shape_CYX: channels, rows and columns of a latent frame.
        representation: what the latents are; with ``"moments"`` a second array holds mean and log variance.
        dtype: the dtype of the stored latents.
    """

    shape_CYX: tuple[int, int, int]
    representation: Literal["mode", "sample", "moments"]
    dtype: Literal["float16", "float32"] = "float16"


class LatentWriter(StoreWriter):
    """Writes latents with their coordinates; see :class:`~longvid.store.writer.StoreWriter` for its life.

    Args:
        path: the folder; its parent exists.
        schedule: the chunk plan, recorded in the store.
        source: where the frames are from, recorded in the store.
        layout: shape, dtype and representation of the latents.
        facts: facts of the run, recorded.
        options: what may be replaced or resumed, and when results are durable.
    """

    kind: ClassVar = "latents"
    data_names: ClassVar = ("latents", "moments")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        schedule: ChunkSchedule,
        source: SourceInfo,
        layout: LatentLayout,
        facts: RunFacts | None = None,
        options: WriteOptions | None = None,
    ) -> None:
        facts = facts or RunFacts()
        self._schedule = schedule
        self._source = source
        self._shape = layout.shape_CYX
        self._moments = layout.representation == "moments"
        self._dtype = np.dtype(layout.dtype)
        recorded = {
            "chunk_plan": schedule.to_dict(),
            "representation": layout.representation,
            "scaled": False,
            **facts.extra,
        }
        attributes = {
            "Conventions": "CF-1.11",
            "longvid": first_facts("latents", source.frame_rate, recorded),
            "vae": dict(facts.vae),
            "source": _source_facts(source),
            "ome": _ome(self._shape[0], schedule.frames_per_latent, source.frame_rate),
        }
        super().__init__(path, attributes, facts.fingerprint, options or WriteOptions())
        self.unit_rows = _latents_per_chunk(self._shape, self._dtype.itemsize, schedule.chunk_latents)
        self._next = 0
        self._num_received = 0
        self._waiting: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._row_names()}
        "rows that are not a unit yet"
        self._last_pts = np.zeros(0, np.int64)
        "time stamps of the two frames before those that wait"

    def _row_names(self) -> tuple[str, ...]:
        return ("latents", *(("moments",) if self._moments else ()), "frame_pts", "frame_valid")

    def _stage_arrays(self) -> None:
        (c, y, x), dtype, rows = self._shape, self._dtype.name, self.unit_rows
        coordinates = {"coordinates": "t frame_start frame_stop"}
        self._stage("latents", (c, y, x), dtype, rows, coordinates)
        if self._moments:
            self._stage("moments", (2 * c, y, x), dtype, rows, coordinates)
        base = f"{self._source.time_base.numerator}/{self._source.time_base.denominator}"
        self._stage("t", (), "float64", COORDINATE_CHUNK, {"units": "s", "long_name": "time of first frame"})
        self._stage("frame_start", (), "int64", COORDINATE_CHUNK)
        self._stage("frame_stop", (), "int64", COORDINATE_CHUNK)
        self._stage("frame_pts", (), "int64", COORDINATE_CHUNK, {"time_base": base})
        valid = {"long_name": "false where a damaged frame was replaced by its neighbour"}
        self._stage("frame_valid", (), "bool", COORDINATE_CHUNK, valid)
        self._stage_digests(1 + self._moments)

    def write(
        self,
        chunk: Chunk,
        latents_TCYX: npt.NDArray[np.float32],
        pts_T: npt.NDArray[np.int64],
        moments_TCYX: npt.NDArray[np.float32] | None = None,
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the latents of the next chunk, and commit whole units when it is time.

        Args:
            chunk: the next chunk in order.
            latents_TCYX: ``chunk.num_latents`` latent frames, float32.
            pts_T: time stamps of the chunk's true frames.
            moments_TCYX: float32 with twice the channels, for a store with moments.
            valid_T: which of the frames are the source's own; all by default.

        Raises:
            StoreError: kind ``"range"`` if a value is not finite or does not fit the stored dtype; nothing of the
                chunk is committed then. Kind ``"mismatch"`` if rows differ from those that are committed already.
        """
        valid = np.ones(len(pts_T), np.bool_) if valid_T is None else valid_T
        self._check(chunk, latents_TCYX, pts_T, moments_TCYX, valid)
        self._waiting["latents"].append(latents_TCYX.astype(self._dtype))
        if moments_TCYX is not None:
            self._waiting["moments"].append(moments_TCYX.astype(self._dtype))
        self._waiting["frame_pts"].append(np.asarray(pts_T, np.int64))
        self._waiting["frame_valid"].append(np.asarray(valid, np.bool_))
        self._next = chunk.index + 1
        self._num_received = chunk.frame_stop
        with disk_errors(self.path):
            while sum(map(len, self._waiting["latents"])) >= self.unit_rows:
                self._take_unit(self._unit(self.unit_rows))
            self._commit_if_due()

    def _check(
        self,
        chunk: Chunk,
        latents: npt.NDArray[np.float32],
        pts: npt.NDArray[np.int64],
        moments: npt.NDArray[np.float32] | None,
        valid: npt.NDArray[np.bool_],
    ) -> None:
        if chunk.index != self._next:
            raise StoreError(f"chunk {chunk.index} was written, chunk {self._next} is expected")
        c, y, x = self._shape
        expected = {"latents": (latents, (chunk.num_latents, c, y, x))}
        if self._moments != (moments is not None):
            raise StoreError(f"moments are {'missing' if self._moments else 'not part of this store'}")
        if moments is not None:
            expected["moments"] = (moments, (chunk.num_latents, 2 * c, y, x))
        for name, (array, shape) in expected.items():
            if array.shape != shape or array.dtype != np.float32:
                raise StoreError(
                    f"{name} of chunk {chunk.index} are {array.dtype} {array.shape}, float32 {shape} is expected"
                )
            self._check_range(chunk, name, array)
        if not len(pts) == len(valid) == chunk.num_frames:
            raise StoreError(
                f"chunk {chunk.index} has {chunk.num_frames} frames, {len(pts)} time stamps and {len(valid)} marks"
            )

    def _check_range(self, chunk: Chunk, name: str, array: npt.NDArray[np.float32]) -> None:
        most = float(np.finfo(self._dtype).max)
        size = float(np.abs(array).max()) if np.isfinite(array).all() else float("nan")
        if size <= most:
            return
        where = f"{name} {chunk.latent_start} to {chunk.latent_stop - 1}"
        if np.isfinite(size):
            raise StoreError(
                f"{where} reach {size:.6g}, {self._dtype} holds up to {most:.6g}; store them as float32 "
                "(--store-dtype float32)",
                kind="range",
            )
        raise StoreError(
            f"{where} hold values that are not finite, and were not written. Compute in float32 or bfloat16 "
            "(--dtype), and check the source's frames there",
            kind="range",
        )

    def _unit(self, count: int) -> Unit:
        """Remove ``count`` latents that wait, with their coordinates, as a unit."""
        start = self.num_units * self.unit_rows
        padded = np.array([self._schedule.frame_range(i) for i in range(start, start + count)], np.int64)
        ranges = np.minimum(padded, self._num_received)
        num_frames = int(ranges[-1, 1] - ranges[0, 0])
        pts = take(self._waiting["frame_pts"], num_frames)
        unit = {name: take(self._waiting[name], count) for name in self.data_names if name in self._waiting}
        unit |= {
            "t": seconds_of_latents(
                padded[:, 0],
                np.concatenate([self._last_pts, pts]),
                self.num_frames - len(self._last_pts),
                self._source.time_base,
                self._source.frame_rate,
            ),
            "frame_start": ranges[:, 0],
            "frame_stop": ranges[:, 1],
            "frame_pts": pts,
            "frame_valid": take(self._waiting["frame_valid"], num_frames).astype(np.bool_),
        }
        self._last_pts = np.concatenate([self._last_pts, pts])[-2:]
        self.num_frames = int(ranges[-1, 1])
        return unit

    def _rest(self) -> Unit | None:
        left = sum(map(len, self._waiting["latents"]))
        return self._unit(left) if left else None

    def pending(self) -> Unit:
        """Rows that wait to become a unit, for a snapshot; copies."""
        rows = {name: np.concatenate(parts) for name, parts in self._waiting.items() if parts}
        return {**rows, "last_pts": self._last_pts}

    def go_on(self, chunk: int, num_frames: int, units: int, pending: Unit) -> None:
        """Restore the state of a run that had written ``num_frames`` frames in the chunks before ``chunk``."""
        self._next = chunk
        self._num_received = num_frames  # the last chunk of a video may hold fewer than others
        self.num_units = units
        full = 0 if units == 0 else self._schedule.frame_range(units * self.unit_rows - 1)[1]
        self.num_frames = min(num_frames, full)
        for name in self._waiting:
            self._waiting[name] = [pending[name]] if name in pending else []
        self._last_pts = pending.get("last_pts", self._last_pts)


def seconds_of_latents(
    first_frames: npt.NDArray[np.int64],
    pts_T: npt.NDArray[np.int64],
    first_known: int,
    time_base: Fraction,
    frame_rate: Fraction | None,
) -> npt.NDArray[np.float64]:
    """Seconds of each latent's first frame; a padded tail continues at the frame rate.

    Args:
        first_frames: number of the first frame of each latent.
        pts_T: time stamps of consecutive frames.
        first_known: number of the first of these frames.
        time_base: seconds per unit of the time stamps.
        frame_rate: frames per second; None for the distance of the last two frames.
    """
    last = first_known + len(pts_T) - 1
    step = float(1 / frame_rate / time_base) if frame_rate else float(pts_T[-1] - pts_T[-2]) if len(pts_T) > 1 else 0.0
    ticks = np.array([pts_T[f - first_known] if f <= last else pts_T[-1] + step * (f - last) for f in first_frames])
    return ticks * time_base.numerator / time_base.denominator


def _latents_per_chunk(shape: tuple[int, int, int], itemsize: int, multiple: int) -> int:
    """Latent frames of a zarr chunk: about the target size, whole schedule chunks where possible, at most 64."""
    fitting = TARGET_CHUNK_BYTES // (int(np.prod(shape)) * itemsize)
    bounded = max(1, min(_MOST_LATENTS_PER_CHUNK, fitting))
    return bounded // multiple * multiple or bounded


def _source_facts(source: SourceInfo) -> dict[str, Any]:
    facts = asdict(source)
    for key in ("time_base", "frame_rate"):
        value: Fraction | None = facts[key]
        facts[key] = None if value is None else f"{value.numerator}/{value.denominator}"
    return facts


def _ome(channels: int, frames_per_latent: int, frame_rate: Fraction | None) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata, so that image viewers open the latents without a scan for contrast limits."""
    axes = [("t", "time", "second"), ("c", "channel", None), ("y", "space", None), ("x", "space", None)]
    step = float(frames_per_latent / frame_rate) if frame_rate else 1.0
    window = {"min": -8.0, "max": 8.0, "start": -3.0, "end": 3.0}
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": "latents",
                "axes": [{"name": n, "type": t, **({"unit": u} if u else {})} for n, t, u in axes],
                "datasets": [
                    {
                        "path": "latents",
                        "coordinateTransformations": [{"type": "scale", "scale": [step, 1.0, 1.0, 1.0]}],
                    }
                ],
            }
        ],
        "omero": {
            "channels": [
                {"label": f"latent {i}", "color": "FFFFFF", "active": i < 3, "window": window} for i in range(channels)
            ]
        },
    }

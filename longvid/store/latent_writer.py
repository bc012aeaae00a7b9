"""Owns writing the latents of one video. Axes: T or t time, C or c channels, y x rows and columns of a latent."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.frames import SourceInfo
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.durability import WriteOptions
from longvid.store.metadata import Part, RunFacts, ratio
from longvid.store.target import Found
from longvid.store.writer import TARGET_CHUNK_BYTES, StoreWriter, Unit

__all__ = ["LatentLayout", "LatentWriter", "latent_coordinates"]

_MOST_LATENTS_PER_CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayout:
    """The arrays of a store of latents; with ``"moments"`` a second one holds mean and log variance."""

    shape_CYX: tuple[int, int, int]
    representation: Literal["mode", "sample", "moments", "imported"]
    dtype: Literal["float16", "float32"] = "float16"


class LatentWriter(StoreWriter):
    """Writes latents with their coordinates; :class:`~longvid.store.writer.StoreWriter` describes its life.

    ``schedule`` and ``source`` are recorded. ``part`` is the part of the video that is written; None for all of it.
    """

    kind = "latents"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        schedule: ChunkSchedule,
        source: SourceInfo,
        layout: LatentLayout,
        facts: RunFacts,
        options: WriteOptions,
        part: Part | None = None,
    ) -> None:
        c, y, x = layout.shape_CYX
        recorded = {"chunk_plan": schedule.to_dict(), "representation": layout.representation, "scaled": False}
        recorded |= {} if part is None else {"part": asdict(part)}
        rates = {"time_base": ratio(source.time_base), "frame_rate": ratio(source.frame_rate)}
        rates["sample_aspect_ratio"] = ratio(source.sample_aspect_ratio)
        attributes = {
            "vae": dict(facts.vae),
            "source": {**asdict(source), **rates},
            "ome": _ome(c, schedule.frames_per_latent, source.frame_rate),
        }
        super().__init__(path, facts, options, attributes, recorded, source.frame_rate)
        self._schedule, self._source = schedule, source
        self._row_before, self._frame = (0, 0) if part is None else (part.row, part.frame)
        self.rows, self.dtype = {"latents": (c, y, x)}, layout.dtype
        if layout.representation == "moments":
            self.rows["moments"] = (2 * c, y, x)
        self.array_attributes = {
            **{name: {"coordinates": "t frame_start frame_stop"} for name in self.rows},
            "t": {"units": "s", "long_name": "time of first frame"},
            "frame_pts": {"time_base": ratio(source.time_base)},
            "frame_valid": {"long_name": "false where a damaged frame was replaced by its neighbour"},
        }
        self.unit_rows = _latents_per_chunk((c, y, x), np.dtype(self.dtype).itemsize, schedule.chunk_latents)
        self._num_received = 0
        self._last_pts = np.zeros(0, np.int64)
        "time stamps of the two frames before those that wait"

    def write(
        self,
        chunk: Chunk,
        latents_TCYX: npt.NDArray[np.float32],
        pts_T: npt.NDArray[np.int64],
        moments_TCYX: npt.NDArray[np.float32] | None = None,
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the latents of the next chunk, and commit whole units when it is time.

        Time stamps and marks are those of the chunk's true frames. StoreError of kind ``"range"`` if a value is not
        finite or does not fit the stored dtype, and nothing of the chunk is committed then; of kind ``"mismatch"`` if
        rows differ from those that are committed already.
        """
        valid = np.ones(len(pts_T), np.bool_) if valid_T is None else valid_T
        data = {"latents": latents_TCYX, **({} if moments_TCYX is None else {"moments": moments_TCYX})}
        for name, array in data.items():  # a user's model may compute any shape
            shape = (chunk.num_latents, *self.rows[name])
            if array.shape != shape or array.dtype != np.float32:
                raise StoreError(
                    f"{name} of chunk {chunk.index} are {array.dtype} {array.shape}, float32 {shape} is expected"
                )
            self._check_range(chunk, name, array)
        rows: Unit = {name: array.astype(self.dtype) for name, array in data.items()}
        self._num_received = chunk.frame_stop
        self._receive({**rows, "frame_pts": np.asarray(pts_T, np.int64), "frame_valid": np.asarray(valid, np.bool_)})

    def _row(self, frame: int) -> int:
        return self._schedule.latent_of_frame(self._frame + frame) - self._row_before

    def _open(self, found: Found) -> None:
        super()._open(found)
        self._last_pts = self.known("frame_pts")[-2:]

    def _check_range(self, chunk: Chunk, name: str, array: npt.NDArray[np.float32]) -> None:
        most = float(np.finfo(self.dtype).max)
        size = float(np.abs(array).max()) if np.isfinite(array).all() else float("nan")
        if size <= most:
            return
        where = f"{name} {chunk.latent_start} to {chunk.latent_stop - 1}"
        if np.isfinite(size):
            raise StoreError(
                f"{where} reach {size:.6g}, {self.dtype} holds up to {most:.6g}; store them as float32 "
                "(--store-dtype float32)",
                kind="range",
            )
        raise StoreError(
            f"{where} hold values that are not finite, and were not written. Compute in float32 or bfloat16 "
            "(--dtype), and check the source's frames there",
            kind="range",
        )

    def _unit(self, count: int) -> Unit:
        start = self._row_before + self.num_units * self.unit_rows
        first = self._frame + self.num_frames
        stop = min(self._schedule.frame_range(start + count - 1)[1], self._num_received)
        pts, earlier = self._take("frame_pts", stop - first), self._last_pts
        self._last_pts = np.concatenate([earlier, pts])[-2:]
        self.num_frames = stop - self._frame
        return {
            **{name: self._take(name, count) for name in self.rows},
            **latent_coordinates(
                self._schedule,
                range(start, start + count),
                stop,
                np.concatenate([earlier, pts]),
                first - len(earlier),
                self._source.time_base,
                self._source.frame_rate,
            ),
            "frame_pts": pts,
            "frame_valid": self._take("frame_valid", stop - first),
        }


def latent_coordinates(
    schedule: ChunkSchedule,
    rows: range,
    stop: int,
    pts_T: npt.NDArray[np.int64],
    first_known: int,
    time_base: Fraction,
    frame_rate: Fraction | None,
) -> Unit:
    """The frames that each latent stands for, up to ``stop``, and the seconds at which the first of them is shown.

    ``pts_T`` are time stamps of consecutive frames from ``first_known`` on. A padded tail continues at the frame rate,
    or, without one, at the distance of the last two frames.
    """
    padded = np.array([schedule.frame_range(row) for row in rows], np.int64)
    ranges = np.minimum(padded, stop)
    last = first_known + len(pts_T) - 1
    step = float(1 / frame_rate / time_base) if frame_rate else float(pts_T[-1] - pts_T[-2]) if len(pts_T) > 1 else 0.0
    ticks = np.array([pts_T[f - first_known] if f <= last else pts_T[-1] + step * (f - last) for f in padded[:, 0]])
    seconds = ticks * time_base.numerator / time_base.denominator
    return {"t": seconds, "frame_start": ranges[:, 0], "frame_stop": ranges[:, 1]}


def _latents_per_chunk(shape: tuple[int, int, int], itemsize: int, multiple: int) -> int:
    """Latent frames of a zarr chunk: about the target size, whole schedule chunks where possible, at most 64."""
    fitting = TARGET_CHUNK_BYTES // (int(np.prod(shape)) * itemsize)
    bounded = max(1, min(_MOST_LATENTS_PER_CHUNK, fitting))
    return bounded // multiple * multiple or bounded


def _ome(channels: int, frames_per_latent: int, frame_rate: Fraction | None) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata, so that image viewers open the latents without a scan for contrast limits."""
    axes = [("t", "time", "second"), ("c", "channel", None), ("y", "space", None), ("x", "space", None)]
    step = float(frames_per_latent / frame_rate) if frame_rate else 1.0
    window = {"min": -8.0, "max": 8.0, "start": -3.0, "end": 3.0}
    named = [{"name": n, "type": t, **({"unit": u} if u else {})} for n, t, u in axes]
    scaled = [{"type": "scale", "scale": [step, 1.0, 1.0, 1.0]}]
    datasets = [{"path": "latents", "coordinateTransformations": scaled}]
    return {
        "version": "0.5",
        "multiscales": [{"name": "latents", "axes": named, "datasets": datasets}],
        "omero": {
            "channels": [
                {"label": f"latent {i}", "color": "FFFFFF", "active": i < 3, "window": window} for i in range(channels)
            ]
        },
    }

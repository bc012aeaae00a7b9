"""The zarr store of one video, write side: layout, appending, publishing. No torch here.

Data is appended in whole zarr chunks and becomes visible by **one atomic rewrite of the root metadata**, which carries
the lengths of all arrays: readers that open the group never see a frame that is not complete, also while a writer is
at work or after it was killed.

Axes: T or t time, C or c channels, H W pixels, y x latent rows and columns.
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from longvid import __version__
from longvid.errors import StoreError
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store import FORMAT_VERSION, MISSING, OWN_NAMES, PARTIAL_ROOT, check_target, read_json
from longvid.video.frames import SourceInfo

__all__ = ["FrameStoreWriter", "LatentWriter"]

_TARGET_CHUNK_BYTES = 2 * 2**20
_MOST_LATENTS_PER_CHUNK = 64
_COORDINATE_CHUNK = 4096


class _Writer(ABC):
    """Life of a store that is being written: created on entering, published in steps, completed on a clean exit."""

    def __init__(self, path: str | os.PathLike[str], attributes: dict[str, Any], overwrite: bool) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._attributes = attributes
        self._created = False
        self._published = False
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def __enter__(self) -> Self:
        check_target(self.path, self._overwrite)
        with _disk_errors(self.path):
            self._clear()
            self._created = True
            try:
                self._group = zarr.create_group(self.path, attributes=self._attributes, zarr_format=3)
                self._create_arrays()
            except BaseException:
                self._remove()
                raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._complete()
        finally:
            if not self._published:
                self._remove()

    def _clear(self) -> None:
        """Take away the store that is to be replaced. Cut short, it is left as one of ours that holds nothing."""
        if not (self.path / "zarr.json").exists():
            return
        facts = read_json(self.path / "zarr.json")["attributes"]["longvid"]
        emptied = {"longvid": {**facts, "status": "writing", "num_frames": 0}}
        self._write_root({"zarr_format": 3, "node_type": "group", "attributes": emptied})
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
        (self.path / "zarr.json").unlink()

    def _write_root(self, root: dict[str, Any]) -> None:
        partial = self.path / PARTIAL_ROOT
        partial.write_text(json.dumps(root, indent=2), encoding="utf-8")
        partial.replace(self.path / "zarr.json")

    def _complete(self) -> None:
        with _disk_errors(self.path):
            self._flush()
            if not self.num_frames:
                raise StoreError(f"{self.path} would hold no frames; it was not written")
            self._publish("complete")

    def _remove(self) -> None:
        """Take away the folder that this writer made, unless something foreign came into it."""
        if self._created and self.path.is_dir() and all(e.name in OWN_NAMES for e in self.path.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)

    def _publish(self, status: Literal["writing", "complete"]) -> None:
        """The one publish point: an atomic rewrite of the root metadata with the lengths of all arrays."""
        facts = {**self._attributes["longvid"], "status": status, "num_frames": self.num_frames}
        self._attributes["longvid"] = facts
        members = {name: read_json(self.path / name / "zarr.json") for name in self._arrays}
        root = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": self._attributes,
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": members},
        }
        # zarr.consolidate_metadata keeps the attributes that are stored, so status and lengths would need two writes.
        self._write_root(root)
        self._published = True

    def _array(
        self,
        name: str,
        shape: tuple[int, ...],
        chunk: int,
        dtype: str,
        dimensions: tuple[str, ...],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """An array of length 0 in time, with the codecs, names and fill of this format."""
        item = np.dtype(dtype)
        fill: Any = float("nan") if item.kind == "f" else (0 if item.kind == "u" else MISSING)
        self._arrays[name] = self._group.create_array(
            name,
            shape=(0, *shape),
            chunks=(chunk, *shape),
            dtype=dtype,
            fill_value=fill,
            dimension_names=dimensions,
            serializer=BytesCodec(endian="little") if item.itemsize > 1 else BytesCodec(endian=None),
            compressors=[
                BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=item.itemsize),
                Crc32cCodec(),
            ],
            attributes=dict(attributes or {}),
            config={"write_empty_chunks": True},
        )

    def _append(self, name: str, values: npt.NDArray[Any]) -> None:
        array = self._arrays[name]
        start = array.shape[0]
        array.resize((start + len(values), *array.shape[1:]))
        array[start:] = values

    # what the two kinds of store add

    num_frames = 0
    "true frames in what is, or is about to be, published"

    @abstractmethod
    def _create_arrays(self) -> None:
        """Make the empty arrays."""

    @abstractmethod
    def _flush(self) -> None:
        """Write what is still buffered."""


class LatentWriter(_Writer):
    """Writes the latents of one video, chunk by chunk. Use it in a ``with`` statement; entering creates the store.

    On a clean exit the store is complete. On an exception nothing more is published; if nothing was published yet,
    the folder is removed again.

    Args:
        path: the folder to make; its parent exists.
        schedule: the chunk plan, recorded in the store.
        source: where the frames are from, recorded in the store.
        latent_shape_CYX: channels, rows and columns of a latent frame.
        representation: what the latents are; with ``"moments"`` a second array holds mean and log variance.
        dtype: of the stored latents.
        vae: facts of the model, recorded as the group's attribute ``vae``.
        extra: further facts for the attribute ``longvid``.
        overwrite: replace an existing longvid store.

    Raises:
        StoreError: see :func:`check_target`; or the disk says no.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        schedule: ChunkSchedule,
        source: SourceInfo,
        latent_shape_CYX: tuple[int, int, int],
        representation: Literal["mode", "sample", "moments"],
        dtype: Literal["float16", "float32"] = "float16",
        vae: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self._schedule = schedule
        self._source = source
        self._shape = latent_shape_CYX
        self._moments = representation == "moments"
        self._dtype = np.dtype(dtype)
        rate = source.frame_rate
        attributes = {
            "Conventions": "CF-1.11",
            "longvid": {
                **_facts("latents", rate),
                "chunk_plan": schedule.to_dict(),
                "representation": representation,
                "scaled": False,
                **(extra or {}),
            },
            "vae": dict(vae),
            "source": _source_facts(source),
            "ome": _ome(latent_shape_CYX[0], schedule.frames_per_latent, rate),
        }
        super().__init__(path, attributes, overwrite)
        self._chunk_latents = _latents_per_chunk(latent_shape_CYX, self._dtype.itemsize, schedule.chunk_latents)
        self._next = 0
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_moments: list[npt.NDArray[Any]] = []
        self._num_written = 0
        self._pts: list[npt.NDArray[np.int64]] = []
        self._num_pts_written = 0
        self._num_received = 0
        self._last_pts = np.zeros(0, np.int64)

    def _create_arrays(self) -> None:
        k, (c, y, x) = self._chunk_latents, self._shape
        name = self._dtype.name
        coordinates = {"coordinates": "t frame_start frame_stop"}
        self._array("latents", (c, y, x), k, name, ("t", "c", "y", "x"), coordinates)
        if self._moments:
            self._array("moments", (2 * c, y, x), k, name, ("t", "c2", "y", "x"), coordinates)
        base = f"{self._source.time_base.numerator}/{self._source.time_base.denominator}"
        self._array("t", (), _COORDINATE_CHUNK, "float64", ("t",), {"units": "s", "long_name": "time of first frame"})
        self._array("frame_start", (), _COORDINATE_CHUNK, "int64", ("t",))
        self._array("frame_stop", (), _COORDINATE_CHUNK, "int64", ("t",))
        self._array("frame_pts", (), _COORDINATE_CHUNK, "int64", ("frame",), {"time_base": base})

    def write(
        self,
        chunk: Chunk,
        latents_TCYX: npt.NDArray[np.float32],
        pts_T: npt.NDArray[np.int64],
        moments_TCYX: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Take the latents of the next chunk and publish every whole zarr chunk they complete.

        Args:
            chunk: the chunk; they come in order.
            latents_TCYX: float32, ``chunk.num_latents`` of them.
            pts_T: time stamps of the chunk's true frames.
            moments_TCYX: float32 with twice the channels, for a store with moments.

        Raises:
            StoreError: kind ``"range"`` if a value is not finite or does not fit the stored dtype; nothing of the
                chunk is published then.
        """
        self._check(chunk, latents_TCYX, pts_T, moments_TCYX)
        self._pending.append(self._stored(latents_TCYX))
        if moments_TCYX is not None:
            self._pending_moments.append(self._stored(moments_TCYX))
        self._pts.append(np.asarray(pts_T, np.int64))
        self._next = chunk.index + 1
        self._num_received = chunk.frame_stop
        with _disk_errors(self.path):
            while sum(map(len, self._pending)) >= self._chunk_latents:
                self._append_latents(self._chunk_latents)
                self._publish("writing")

    def _check(
        self,
        chunk: Chunk,
        latents: npt.NDArray[np.float32],
        pts: npt.NDArray[np.int64],
        moments: npt.NDArray[np.float32] | None,
    ) -> None:
        if chunk.index != self._next:
            raise StoreError(f"chunk {chunk.index} came where chunk {self._next} was due")
        c, y, x = self._shape
        expected = {"latents": (latents, (chunk.num_latents, c, y, x))}
        if self._moments != (moments is not None):
            raise StoreError(f"moments are {'missing' if self._moments else 'not part of this store'}")
        if moments is not None:
            expected["moments"] = (moments, (chunk.num_latents, 2 * c, y, x))
        for name, (array, shape) in expected.items():
            if array.shape != shape or array.dtype != np.float32:
                raise StoreError(
                    f"{name} of chunk {chunk.index} are {array.dtype} {array.shape}, float32 {shape} were due"
                )
            self._check_range(chunk, name, array)
        if len(pts) != chunk.num_frames:
            raise StoreError(f"chunk {chunk.index} has {chunk.num_frames} frames and {len(pts)} time stamps")

    def _check_range(self, chunk: Chunk, name: str, array: npt.NDArray[np.float32]) -> None:
        most = float(np.finfo(self._dtype).max)
        size = float(np.abs(array).max()) if np.isfinite(array).all() else float("nan")
        if size <= most:
            return
        where = f"{name} {chunk.latent_start} to {chunk.latent_stop - 1}"
        if np.isfinite(size):
            raise StoreError(
                f"{where} reach {size:.6g} and {self._dtype} holds {most:.6g}; store them as float32 "
                "(--store-dtype float32)",
                kind="range",
            )
        raise StoreError(
            f"{where} hold values that are not finite; nothing of them was written. Compute in float32 or bfloat16 "
            "(--dtype), and check the source's frames there",
            kind="range",
        )

    def _stored(self, array: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        return array.astype(self._dtype)

    def _append_latents(self, count: int) -> None:
        """Append ``count`` pending latents and the coordinates that go with them; visible after the next publish."""
        start, stop = self._num_written, self._num_written + count
        self._append("latents", _take(self._pending, count))
        if self._moments:
            self._append("moments", _take(self._pending_moments, count))
        padded = np.array([self._schedule.frame_range(i) for i in range(start, stop)], np.int64)
        ranges = np.minimum(padded, self._num_received)
        until = int(ranges[-1, 1])
        pts = _take(self._pts, until - self._num_pts_written)
        self._append("t", self._times(padded[:, 0], pts))
        self._append("frame_start", ranges[:, 0])
        self._append("frame_stop", ranges[:, 1])
        self._append("frame_pts", pts)
        self._num_written, self._num_pts_written = stop, until
        self.num_frames = until

    def _times(self, first_frames: npt.NDArray[np.int64], pts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Seconds of each latent's first frame; those of a padded tail go on at the frame rate."""
        base, rate = self._source.time_base, self._source.frame_rate
        known = np.concatenate([self._last_pts, pts])
        offset = self._num_pts_written - len(self._last_pts)
        last = offset + len(known) - 1
        step = float(1 / rate / base) if rate else float(known[-1] - known[-2]) if len(known) > 1 else 0.0
        ticks = np.array([known[f - offset] if f <= last else known[-1] + step * (f - last) for f in first_frames])
        self._last_pts = known[-2:]
        return ticks * base.numerator / base.denominator

    def _flush(self) -> None:
        left = sum(map(len, self._pending))
        if left:
            self._append_latents(left)


class FrameStoreWriter(_Writer):
    """Writes decoded frames: array ``frames`` (t, y, x, rgb) uint8 with ``t`` and ``frame_pts``.

    Args:
        path: the folder to make; its parent exists.
        height: of the frames.
        width: of the frames.
        time_base: seconds per unit of the time stamps.
        frame_rate: mean frames per second, recorded.
        source: facts of where the frames came from, recorded.
        overwrite: replace an existing longvid store.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        height: int,
        width: int,
        time_base: Fraction,
        frame_rate: Fraction | None,
        source: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        attributes = {
            "Conventions": "CF-1.11",
            "longvid": _facts("frames", frame_rate),
            "source": dict(source),
        }
        super().__init__(path, attributes, overwrite)
        self._time_base = time_base
        self._shape = (height, width, 3)
        self._chunk_frames = max(1, min(64, 2 * _TARGET_CHUNK_BYTES // (height * width * 3)))
        self._pending: list[npt.NDArray[Any]] = []
        self._pts: list[npt.NDArray[Any]] = []

    def _create_arrays(self) -> None:
        coordinates = {"coordinates": "t frame_pts"}
        self._array("frames", self._shape, self._chunk_frames, "uint8", ("t", "y", "x", "rgb"), coordinates)
        self._array("t", (), _COORDINATE_CHUNK, "float64", ("t",), {"units": "s"})
        base = f"{self._time_base.numerator}/{self._time_base.denominator}"
        self._array("frame_pts", (), _COORDINATE_CHUNK, "int64", ("t",), {"time_base": base})

    def write(self, frames_THWC: npt.NDArray[np.uint8], pts_T: npt.NDArray[np.int64]) -> None:
        """Take the next frames with their time stamps and publish every whole zarr chunk they complete.

        Raises:
            StoreError: wrong dtype or shape, or the disk says no.
        """
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != self._shape or len(frames_THWC) != len(pts_T):
            raise StoreError(
                f"frames are {frames_THWC.dtype} {frames_THWC.shape} with {len(pts_T)} time stamps, uint8 "
                f"(T, {', '.join(map(str, self._shape))}) were due"
            )
        self._pending.append(frames_THWC.copy())
        self._pts.append(np.asarray(pts_T, np.int64))
        with _disk_errors(self.path):
            while sum(map(len, self._pending)) >= self._chunk_frames:
                self._append_frames(self._chunk_frames)
                self._publish("writing")

    def _append_frames(self, count: int) -> None:
        pts = _take(self._pts, count)
        self._append("frames", _take(self._pending, count))
        self._append("t", pts * self._time_base.numerator / self._time_base.denominator)
        self._append("frame_pts", pts)
        self.num_frames += count

    def _flush(self) -> None:
        left = sum(map(len, self._pending))
        if left:
            self._append_frames(left)


def _take(pending: list[npt.NDArray[Any]], count: int) -> npt.NDArray[Any]:
    """Remove ``count`` rows from the front of a list of arrays and return them as one."""
    joined = np.concatenate(pending) if pending else np.zeros(0, np.int64)
    pending[:] = [joined[count:].copy()] if count < len(joined) else []
    return joined[:count]


def _latents_per_chunk(shape: tuple[int, int, int], itemsize: int, multiple: int) -> int:
    """Latent frames of a zarr chunk: about the target size, whole schedule chunks where possible, at most 64."""
    fitting = _TARGET_CHUNK_BYTES // (int(np.prod(shape)) * itemsize)
    bounded = max(1, min(_MOST_LATENTS_PER_CHUNK, fitting))
    return bounded // multiple * multiple or bounded


def _facts(kind: str, frame_rate: Fraction | None) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "status": "writing",
        "num_frames": 0,
        "created_by": f"longvid {__version__}",
        "versions": {"zarr": zarr.__version__, "numpy": np.__version__},
        "frame_rate": None if frame_rate is None else f"{frame_rate.numerator}/{frame_rate.denominator}",
    }


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


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as exc:
        raise StoreError(f"{path} cannot be written: {exc.strerror or exc}") from exc

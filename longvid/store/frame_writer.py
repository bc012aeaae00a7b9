"""Owns writing decoded frames to a zarr store. Axes: T time, H height, W width."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.store.durability import WriteOptions
from longvid.store.format import COORDINATE_CHUNK
from longvid.store.metadata import RunFacts, first_facts
from longvid.store.staging import disk_errors
from longvid.store.writer import TARGET_CHUNK_BYTES, StoreWriter, Unit, take

__all__ = ["FrameStoreWriter"]

_ROWS = ("frames", "frame_pts", "frame_valid")


class FrameStoreWriter(StoreWriter):
    """Writes array ``frames`` (t, y, x, rgb) uint8 with ``t``, ``frame_pts`` and ``frame_valid``.

    See :class:`~longvid.store.writer.StoreWriter` for its life.

    Args:
        path: the folder; its parent exists.
        size: (height, width) of the frames.
        time_base: seconds per unit of the time stamps.
        frame_rate: mean frames per second, recorded.
        source: facts of where the frames came from, recorded.
        facts: facts of the run, recorded.
        options: what may be replaced or resumed, and when results are durable.
    """

    kind: ClassVar = "frames"
    data_names: ClassVar = ("frames",)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: tuple[int, int],
        time_base: Fraction,
        frame_rate: Fraction | None,
        source: Mapping[str, Any],
        facts: RunFacts | None = None,
        options: WriteOptions | None = None,
    ) -> None:
        facts = facts or RunFacts()
        extra = {**facts.extra, **({"vae": dict(facts.vae)} if facts.vae else {})}
        attributes = {
            "Conventions": "CF-1.11",
            "longvid": first_facts("frames", frame_rate, extra),
            "source": dict(source),
        }
        super().__init__(path, attributes, facts.fingerprint, options or WriteOptions())
        self._time_base = time_base
        self._shape = (*size, 3)
        self.unit_rows = max(1, min(64, 2 * TARGET_CHUNK_BYTES // (size[0] * size[1] * 3)))
        self._waiting: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _ROWS}

    def _stage_arrays(self) -> None:
        base = f"{self._time_base.numerator}/{self._time_base.denominator}"
        self._stage("frames", self._shape, "uint8", self.unit_rows, {"coordinates": "t frame_pts"})
        self._stage("t", (), "float64", COORDINATE_CHUNK, {"units": "s"})
        self._stage("frame_pts", (), "int64", COORDINATE_CHUNK, {"time_base": base})
        self._stage("frame_valid", (), "bool", COORDINATE_CHUNK)
        self._stage_digests(1)

    def write(
        self,
        frames_THWC: npt.NDArray[np.uint8],
        pts_T: npt.NDArray[np.int64],
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the next frames with their time stamps, and commit whole units when it is time.

        Raises:
            StoreError: wrong dtype or shape, or the disk refuses.
        """
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != self._shape or len(frames_THWC) != len(pts_T):
            raise StoreError(
                f"frames are {frames_THWC.dtype} {frames_THWC.shape} with {len(pts_T)} time stamps; uint8 "
                f"(T, {', '.join(map(str, self._shape))}) are expected"
            )
        valid = np.ones(len(pts_T), np.bool_) if valid_T is None else valid_T
        for name, rows in zip(_ROWS, (frames_THWC.copy(), np.asarray(pts_T, np.int64), valid), strict=True):
            self._waiting[name].append(rows)
        with disk_errors(self.path):
            while sum(map(len, self._waiting["frames"])) >= self.unit_rows:
                self._take_unit(self._unit(self.unit_rows))
            self._commit_if_due()

    def _unit(self, count: int) -> Unit:
        rows = {name: take(self._waiting[name], count) for name in _ROWS}
        self.num_frames += count
        return {
            "frames": rows["frames"],
            "t": rows["frame_pts"] * self._time_base.numerator / self._time_base.denominator,
            "frame_pts": rows["frame_pts"],
            "frame_valid": rows["frame_valid"],
        }

    def _rest(self) -> Unit | None:
        left = sum(map(len, self._waiting["frames"]))
        return self._unit(left) if left else None

    def pending(self) -> Unit:
        """Rows that wait to become a unit, for a snapshot; copies."""
        return {name: np.concatenate(parts) for name, parts in self._waiting.items() if parts}

    def go_on(self, chunk: int, num_frames: int, units: int, pending: Unit) -> None:
        """Restore the state in which :meth:`pending` returned these rows; frames do not depend on chunks."""
        self.num_units = units
        self.num_frames = units * self.unit_rows
        for name in self._waiting:
            self._waiting[name] = [pending[name]] if name in pending else []

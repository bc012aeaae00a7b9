"""Writes decoded frames to a zarr store.

Axes: T time, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zarr

from longvid.errors import StoreError
from longvid.store.durability import Durability
from longvid.store.writer import (
    COORDINATE_CHUNK,
    TARGET_CHUNK_BYTES,
    StoreWriter,
    Unit,
    disk_errors,
    first_facts,
    take,
)

__all__ = ["FrameStoreWriter"]

_ROWS = ("frames", "frame_pts", "frame_valid")


class FrameStoreWriter(StoreWriter):
    """Writes array ``frames`` (t, y, x, rgb) uint8 with ``t``, ``frame_pts`` and ``frame_valid``.

    See :class:`~longvid.store.writer.StoreWriter` for its life.

    Args:
        path: the folder; its parent exists.
        height: of the frames.
        width: of the frames.
        time_base: seconds per unit of the time stamps.
        frame_rate: mean frames per second, recorded.
        source: facts of where the frames came from, recorded.
        extra: further facts for the attribute ``longvid``.
        fingerprint: what decides the bits of the result.
        durability: when results are safe.
        overwrite: replace an existing longvid store.
        resume: continue an unfinished store of the same fingerprint.
        mend: published units whose data is to be written again.
    """

    data_names: ClassVar = ("frames",)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        height: int,
        width: int,
        time_base: Fraction,
        frame_rate: Fraction | None,
        source: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        durability: Durability | None = None,
        overwrite: bool = False,
        resume: bool = True,
        mend: frozenset[int] = frozenset(),
    ) -> None:
        attributes = {
            "Conventions": "CF-1.11",
            "longvid": {**first_facts("frames", frame_rate), **(extra or {})},
            "source": dict(source),
        }
        super().__init__(
            path,
            attributes,
            fingerprint=fingerprint or {},
            durability=durability or Durability(),
            overwrite=overwrite,
            resume=resume,
            mend=mend,
        )
        self._time_base = time_base
        self._shape = (height, width, 3)
        self.unit_rows = max(1, min(64, 2 * TARGET_CHUNK_BYTES // (height * width * 3)))
        self._waiting: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _ROWS}

    def _create_arrays(self, group: zarr.Group) -> None:
        coordinates = {"coordinates": "t frame_pts"}
        self._array(group, "frames", self._shape, self.unit_rows, "uint8", ("t", "y", "x", "rgb"), coordinates)
        self._array(group, "t", (), COORDINATE_CHUNK, "float64", ("t",), {"units": "s"})
        base = f"{self._time_base.numerator}/{self._time_base.denominator}"
        self._array(group, "frame_pts", (), COORDINATE_CHUNK, "int64", ("t",), {"time_base": base})
        self._array(group, "frame_valid", (), COORDINATE_CHUNK, "bool", ("t",))
        self._digest_array(group, 1)

    def write(
        self,
        frames_THWC: npt.NDArray[np.uint8],
        pts_T: npt.NDArray[np.int64],
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the next frames with their time stamps, and publish what is complete if it is time.

        Raises:
            StoreError: wrong dtype or shape, or the disk says no.
        """
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != self._shape or len(frames_THWC) != len(pts_T):
            raise StoreError(
                f"frames are {frames_THWC.dtype} {frames_THWC.shape} with {len(pts_T)} time stamps, uint8 "
                f"(T, {', '.join(map(str, self._shape))}) were due"
            )
        valid = np.ones(len(pts_T), np.bool_) if valid_T is None else valid_T
        for name, rows in zip(_ROWS, (frames_THWC.copy(), np.asarray(pts_T, np.int64), valid), strict=True):
            self._waiting[name].append(rows)
        with disk_errors(self.path):
            while sum(map(len, self._waiting["frames"])) >= self.unit_rows:
                self._take_unit(self._unit(self.unit_rows))
            self._publish_if_due()

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
        """Stand where a run stood when this was :meth:`pending`; frames do not care for chunks."""
        self.num_units = units
        self.num_frames = units * self.unit_rows
        for name in self._waiting:
            self._waiting[name] = [pending[name]] if name in pending else []

"""Owns writing decoded frames to a zarr store. Axes: T time, H height, W width."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.store.durability import WriteOptions
from longvid.store.metadata import Part, RunFacts, ratio
from longvid.store.writer import TARGET_CHUNK_BYTES, StoreWriter, Unit

__all__ = ["FrameStoreWriter"]


class FrameStoreWriter(StoreWriter):
    """Writes array ``frames`` (t, y, x, rgb) uint8 with ``t``, ``frame_pts`` and ``frame_valid``.

    :class:`~longvid.store.writer.StoreWriter` describes its life. ``size`` is height and width, ``time_base`` the
    seconds per unit of the time stamps. ``part`` is the part of the frames that is written; None for all of them.
    """

    kind = "frames"
    dtype = "uint8"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: tuple[int, int],
        time_base: Fraction,
        frame_rate: Fraction | None,
        source: Mapping[str, Any],
        facts: RunFacts,
        options: WriteOptions,
        part: Part | None = None,
    ) -> None:
        model = {"vae": dict(facts.vae)} if facts.vae else {}
        model |= {} if part is None else {"part": asdict(part)}
        super().__init__(path, facts, options, {"source": dict(source)}, model, frame_rate)
        self._time_base = time_base
        self.rows = {"frames": (*size, 3)}
        self.unit_rows = max(1, min(64, 2 * TARGET_CHUNK_BYTES // (size[0] * size[1] * 3)))
        self.array_attributes = {
            "frames": {"coordinates": "t frame_pts"},
            "t": {"units": "s"},
            "frame_pts": {"time_base": ratio(time_base)},
        }

    def write(
        self,
        frames_THWC: npt.NDArray[np.uint8],
        pts_T: npt.NDArray[np.int64],
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the next frames with their time stamps, and commit whole units when it is time."""
        row = self.rows["frames"]
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != row or len(frames_THWC) != len(pts_T):
            raise StoreError(
                f"frames are {frames_THWC.dtype} {frames_THWC.shape} with {len(pts_T)} time stamps; uint8 "
                f"(T, {', '.join(map(str, row))}) are expected"
            )
        valid = np.ones(len(pts_T), np.bool_) if valid_T is None else valid_T
        pts = np.asarray(pts_T, np.int64)
        self._receive({"frames": frames_THWC.copy(), "frame_pts": pts, "frame_valid": valid})

    def _unit(self, count: int) -> Unit:
        unit = {name: self._take(name, count) for name in ("frames", "frame_pts", "frame_valid")}
        self.num_frames += count
        return {**unit, "t": unit["frame_pts"] * self._time_base.numerator / self._time_base.denominator}

"""PNG files of single frames, or of frames side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

__all__ = ["side_by_side", "write_png"]


def side_by_side(rows: Sequence[Sequence[npt.NDArray[np.uint8]]], gap: int = 4) -> npt.NDArray[np.uint8]:
    """Frames (H, W, 3) of one size, in rows and columns, with a white gap between them."""
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, frame in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            sheet[y : y + height, x : x + width] = frame
    return sheet


def write_png(path: str | os.PathLike[str], image_HWC: npt.NDArray[np.uint8]) -> None:
    """Write uint8 RGB (H, W, 3); an existing file is replaced."""
    height, width = image_HWC.shape[:2]
    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.width, codec.height, codec.pix_fmt = width, height, "rgb24"
    codec.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
    Path(path).write_bytes(b"".join(bytes(p) for p in (*codec.encode(frame), *codec.encode(None))))

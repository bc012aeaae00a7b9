"""Converts decoded frames to upright RGB of one size."""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.media.decoding.container import reason
from longvid.media.images.color import resolve_color

__all__ = ["REVISION", "Converter"]

REVISION = 2
"changes whenever the same file would give other bytes"
# FULL_CHR_H_INT interpolates chroma where the fast path repeats it: a third of the error on film, at half the speed
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_GBR = (1, 2, 0)
"channels of the planes of ``gbrp``"


class Converter:
    """Converts decoded frames to upright RGB of one size: colour and size in one pass of swscale."""

    def __init__(self, first: VideoFrame, stream: VideoStream, size: tuple[int, int] | None, name: str) -> None:
        self._name = name
        self._coded = (first.height, first.width)
        self.rotation = round(first.rotation / 90) * 90
        self._turns = self.rotation // 90 % 4
        upright = _turned(self._coded, self._turns)
        self.height, self.width = size or upright
        self._target = _turned((self.height, self.width), self._turns)
        self.resized_from = list(upright) if upright != (self.height, self.width) else None
        self._stream = stream
        self.color = resolve_color(first, stream, name)
        self._colors = {first.format.name: self.color}
        self._scaler = VideoReformatter()
        shrinks = self._target[0] <= self._coded[0] and self._target[1] <= self._coded[1]
        self._interpolation = (Interpolation.AREA if shrinks and self.resized_from else Interpolation.BICUBIC) | _EXACT
        self.interpolation_name = ("area" if shrinks else "bicubic") if self.resized_from else None

    def convert(self, frame: VideoFrame, index: int) -> npt.NDArray[np.uint8]:
        """RGB of one frame, of shape (height, width, 3), in memory of its own.

        Channels are stored as planes, as swscale gives them and models need them.
        """
        height, width = self._target
        pixel_format = frame.format.name
        if pixel_format not in self._colors:  # it may change within a file
            self._colors[pixel_format] = resolve_color(frame, self._stream, self._name)
        color = self._colors[pixel_format]
        is_rgb = color.matrix is None
        try:
            rgb = self._scaler.reformat(
                frame,
                width=width,
                height=height,
                # the same RGB (within 1 where it is resized), but swscale has vector code for planes
                format="rgb24" if is_rgb else "gbrp",
                src_colorspace=color.matrix,
                src_color_range=ColorRange.JPEG if color.info.range == "full" else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=self._interpolation,
            )
        except (av.FFmpegError, ValueError) as exc:
            raise SourceError(
                f"frame {index} of {self._name} cannot be converted from {pixel_format} to RGB: {reason(exc)}"
            ) from exc
        image = np.empty((3, self.height, self.width), np.uint8).transpose(1, 2, 0)
        if is_rgb:
            packed = _samples(rgb.planes[0])[:, : width * 3].reshape(height, width, 3)
            image[:] = np.rot90(packed, self._turns)
            return image
        for channel, plane in zip(_GBR, rgb.planes, strict=True):
            image[..., channel] = np.rot90(_samples(plane)[:, :width], self._turns)
        if color.expand_gray:
            image[:] = _LIMITED_TO_FULL[image]
        return image


_LIMITED_TO_FULL = ((np.arange(256) - 16) * 255 / 219).round().clip(0, 255).astype(np.uint8)


def _samples(plane: VideoPlane) -> npt.NDArray[np.uint8]:
    """Rows of bytes, padding included."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)


def _turned(size: tuple[int, int], turns: int) -> tuple[int, int]:
    return (size[1], size[0]) if turns % 2 else size

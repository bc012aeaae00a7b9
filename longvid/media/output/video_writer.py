"""Video files, written frame by frame; a file takes its name only when it is complete."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longvid.errors import StoreError
from longvid.files import check_file_target
from longvid.frames import ColorInfo
from longvid.media.images.color import PRIMARIES, TRANSFERS, matrix_by_rule

__all__ = ["VideoWriter"]

_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# name -> (tag of matrix, primaries and transfer; coefficients of swscale)
_MATRICES = {"bt709": (1, 1), "bt601": (6, 5)}
_PRIMARIES = {name: tag for tag, name in PRIMARIES.items()}
_TRANSFERS = {name: tag for tag, name in TRANSFERS.items()}
_LARGEST_TIME_BASE = 2**31 - 1
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


class VideoWriter:
    """Writes H.264 in limited range with every frame at its own time; a context manager.

    Frames go to a partial file beside the target, which takes the target's name on a clean exit and is removed if
    the block raises. Even sizes are written as yuv420p, odd ones as yuv444p, so that the size comes back exactly.
    Matroska keeps time in milliseconds; mp4 and mov keep the time base.

    ``size`` is (height, width); ``frame_rate`` is a hint to players, and ``sample_aspect_ratio``, width of a pixel by
    its height, tells them the shape of the picture. ``color`` says how the source was read: the matrix
    is used again if it is bt601 or bt709, else the rule decides (bt709 from 720 lines up); primaries and transfer are
    passed on. ``crf`` is the quality of x264, 0 (lossless) to 51.

    Raises:
        StoreError: the target exists and may not be replaced, its folder does not, or its format is not one of these.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: tuple[int, int],
        time_base: Fraction,
        frame_rate: Fraction | None,
        color: ColorInfo | None = None,
        sample_aspect_ratio: Fraction = Fraction(1),
        overwrite: bool = False,
        crf: int = 18,
    ) -> None:
        self._path = Path(path)
        self._height, self._width = size
        self._time_base = Fraction(time_base)
        self._frame_rate = frame_rate
        self._pixel_aspect = _within_16_bits(sample_aspect_ratio)
        self._color = color or ColorInfo(matrix="", range="")
        self._overwrite = overwrite
        self._crf = crf
        self._partial = self._path.with_name(f"{self._path.stem}.partial-{secrets.token_hex(4)}{self._path.suffix}")
        self._container: OutputContainer | None = None
        self._first_pts: int | None = None
        self._last_pts: list[int] = []
        self._check_format()
        check_file_target(self._path, overwrite=self._overwrite, what="video")

    def write(
        self,
        frames_THWC: npt.NDArray[np.uint8],
        pts_T: npt.NDArray[np.int64],
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Append frames; their time stamps must increase strictly, and are shifted so that the first is 0.

        A video file has no place for ``valid_T``, which other writers of frames keep.

        Raises:
            StoreError: frames or time stamps are not as promised, or the file cannot be written.
        """
        container = self._opened()
        stamps = self._check_frames(frames_THWC, pts_T)
        with self._wrapped():
            for frame_HWC, pts in zip(frames_THWC, stamps, strict=True):
                container.mux(self._stream.encode(self._convert(frame_HWC, pts)))

    def __enter__(self) -> Self:
        if self._container is not None:
            raise StoreError(f"{self._path} is already being written by this writer; make another one")
        with self._wrapped(), contextlib.ExitStack() as undo:
            undo.callback(self._discard)
            format_name = _FORMATS[self._path.suffix.lower()]
            options = {} if format_name == "matroska" else {"movflags": "+faststart"}
            self._container = av.open(f"file:{self._partial.absolute()}", "w", format=format_name, options=options)
            self._stream = self._add_stream(self._container)
            self._scaler = VideoReformatter()
            undo.pop_all()
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        try:
            if exc_type is None:
                self._finish()
        finally:
            self._discard()

    def _check_format(self) -> None:
        if self._path.suffix.lower() not in _FORMATS:
            raise StoreError(
                f"{self._path} cannot be written: the suffix {self._path.suffix!r} names no format known here; "
                f"use {', '.join(_FORMATS)}",
                kind="format",
            )
        if self._height < 1 or self._width < 1:
            raise StoreError(f"a video of {self._width}x{self._height} pixels cannot be written", kind="format")
        if self._time_base <= 0 or max(self._time_base.as_integer_ratio()) > _LARGEST_TIME_BASE:
            raise StoreError(f"the time base {self._time_base} cannot be kept in a video file", kind="format")

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        stream = container.add_stream("libx264", rate=self._frame_rate or Fraction(24))
        stream.time_base = self._time_base
        context = stream.codec_context
        context.time_base = self._time_base
        context.height, context.width = self._height, self._width
        context.pix_fmt = "yuv444p" if self._height % 2 or self._width % 2 else "yuv420p"
        # swscale puts chroma between the pixels; without this option H.264 decoders expect it half a pixel off
        context.options = {"crf": str(self._crf), "x264-params": "chromaloc=1"}
        if self._pixel_aspect != 1:
            context.sample_aspect_ratio = self._pixel_aspect
        color = self._color
        tag, self._coefficients = _MATRICES.get(color.matrix) or _MATRICES[matrix_by_rule(self._height)]
        context.colorspace = tag
        context.color_range = ColorRange.MPEG
        context.color_primaries = _PRIMARIES.get(color.primaries or "", tag)
        context.color_trc = _TRANSFERS.get(color.transfer or "", tag)
        return stream

    def _opened(self) -> OutputContainer:
        if self._container is None:
            raise StoreError(f"{self._path} is not open for writing; use the writer in a with block")
        return self._container

    def _check_frames(self, frames_THWC: npt.NDArray[np.uint8], pts_T: npt.NDArray[np.int64]) -> list[int]:
        """Time stamps from 0 for these frames, if they fit what came before."""
        shape = (len(pts_T), self._height, self._width, 3)
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape != shape:
            raise StoreError(
                f"frames for {self._path} are {frames_THWC.dtype} with shape {frames_THWC.shape}; expected uint8 with "
                f"shape {shape}, one frame for each of {len(pts_T)} time stamps",
                kind="format",
            )
        stamps = [int(pts) for pts in pts_T]
        for previous, pts in itertools.pairwise([*self._last_pts, *stamps]):
            if pts <= previous:
                raise StoreError(
                    f"time stamps for {self._path} must increase strictly; {pts} follows {previous}", kind="range"
                )
        if self._first_pts is None and stamps:
            self._first_pts = stamps[0]
        self._last_pts = stamps[-1:] or self._last_pts
        return [pts - (self._first_pts or 0) for pts in stamps]

    def _convert(self, frame_HWC: npt.NDArray[np.uint8], pts: int) -> VideoFrame:
        frame = self._scaler.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), "rgb24"),
            format=self._stream.codec_context.pix_fmt,
            dst_colorspace=self._coefficients,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_INTERPOLATION,
        )
        frame.pts = pts
        frame.time_base = self._time_base
        return frame

    def _finish(self) -> None:
        container = self._opened()
        if self._first_pts is None:
            raise StoreError(f"no frames were written to {self._path}, so that there is no video to keep")
        with self._wrapped():
            container.mux(self._stream.encode(None))
            container.close()
            with self._partial.open("rb+") as file:
                os.fsync(file.fileno())
            check_file_target(self._path, overwrite=self._overwrite, what="video")
            self._partial.replace(self._path)

    def _discard(self) -> None:
        container, self._container = self._container, None
        with contextlib.suppress(av.FFmpegError, OSError):
            if container is not None:
                container.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _wrapped(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except (av.FFmpegError, OSError, ValueError) as exc:
            raise StoreError(f"{self._path} cannot be written: {exc}; is the disk full?") from exc


def _within_16_bits(ratio: Fraction) -> Fraction:
    """The nearest ratio that H.264 can hold: both numbers below 65536."""
    inverted = ratio > 1
    found = (1 / ratio if inverted else Fraction(ratio)).limit_denominator(2**16 - 1) or Fraction(1, 2**16 - 1)
    return 1 / found if inverted else found

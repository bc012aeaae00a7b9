"""Video files, written frame by frame; a file takes its name only when it is complete."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import av
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longvid.errors import StoreError
from longvid.files import check_file_target
from longvid.frames import ColorInfo
from longvid.media.images.color import PRIMARIES, TRANSFERS, matrix_by_rule
from longvid.media.output.errors import is_full, reason, write_error, writing
from longvid.media.output.formats import Encoding, video_format

if TYPE_CHECKING:
    from longvid.media.output.sound import Sound

__all__ = ["VideoWriter"]

# name -> (tag of matrix, primaries and transfer; coefficients of swscale)
_MATRICES = {"bt709": (1, 1), "bt601": (6, 5)}
_PRIMARIES = {name: tag for tag, name in PRIMARIES.items()}
_TRANSFERS = {name: tag for tag, name in TRANSFERS.items()}
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


class VideoWriter:
    """Writes a video file with every frame at its own time; a context manager.

    Frames go to a partial file beside the target, which takes the target's name on a clean exit and is removed if
    the block raises. Matroska keeps time in milliseconds; mp4 and mov keep the time base.

    ``size`` is (height, width); ``frame_rate`` is a hint to players, and ``sample_aspect_ratio``, width of a pixel by
    its height, tells them the shape of the picture. ``color`` says how the source was read: the matrix
    is used again if it is bt601 or bt709, else the rule decides (bt709 from 720 lines up); primaries and transfer are
    passed on. ``encoding`` is the codec, its quality and the pixel format: by default H.264 in limited range, yuv420p
    for even sizes and yuv444p for odd ones, so that the size comes back exactly. ``sound`` opens the sound that is
    written along, when the file is opened. ``last_duration`` is how long the last frame is shown, in units of the time
    base; None to leave that to players.

    Raises:
        StoreError: the target exists and may not be replaced, its folder does not, or the format does not take such
            frames.
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
        encoding: Encoding | None = None,
        sound: Callable[[], Sound | None] | None = None,
        last_duration: int | None = None,
    ) -> None:
        self._path = Path(path)
        self._height, self._width = size
        self._time_base = Fraction(time_base)
        self._frame_rate = frame_rate
        self._pixel_aspect = _within_16_bits(sample_aspect_ratio)
        self._color = color or ColorInfo(matrix="", range="")
        self._overwrite = overwrite
        self._open_sound = sound
        self._sound: Sound | None = None
        self._last_duration = last_duration
        self._held: VideoFrame | None = None
        "the last frame so far: how long it is shown is known when it is not followed by another one"
        self._partial = self._path.with_name(f"{self._path.stem}.partial-{secrets.token_hex(4)}{self._path.suffix}")
        self._container: OutputContainer | None = None
        self._first_pts: int | None = None
        self._last_pts: list[int] = []
        self._format = video_format(self._path, size=size, time_base=self._time_base, encoding=encoding or Encoding())
        if self._pixel_aspect != 1 and not self._format.keeps_aspect:
            warnings.warn(
                f"{self._path} will look {'narrower' if self._pixel_aspect > 1 else 'wider'} than its source: its "
                f"pixels are {self._pixel_aspect} as wide as high, which {self._format.codec} in {self._path.suffix} "
                "cannot tell; choose .mp4, .mov or --codec h264, or encode with --pixels square",
                stacklevel=2,
            )
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
        self._opened()
        stamps = self._check_frames(frames_THWC, pts_T)
        with writing(self._path):
            for frame_HWC, pts in zip(frames_THWC, stamps, strict=True):
                if self._sound is not None:
                    self._mux_sound(self._sound, self._sound.until(pts * self._time_base))
                held, self._held = self._held, self._convert(frame_HWC, pts)
                if held is not None:
                    self._mux(self._stream.encode(held))

    def _mux(self, packets: list[Packet[VideoStream]]) -> None:
        """Write packets of the picture."""
        container = self._opened()
        for packet in packets:
            if packet.pts is not None and (packet.dts is None or not 0 <= packet.pts - packet.dts < 2**40):
                packet.dts = packet.pts  # x265 gives none, or any number, in a video of one or two frames
            container.mux_one(packet)

    def _mux_sound(self, sound: Sound, packets: Iterator[Packet[Any]]) -> None:
        """Write sound; what the file does not take is left out, and never the pictures."""
        container = self._opened()
        for packet in packets:
            try:
                container.mux_one(packet)
            except (av.FFmpegError, ValueError) as exc:
                if is_full(exc):
                    raise
                sound.leave_out(f"it cannot be written ({reason(exc)})")
                return

    def __enter__(self) -> Self:
        if self._container is not None:
            raise StoreError(f"{self._path} is already being written by this writer; make another one")
        with contextlib.ExitStack() as undo, writing(self._path):
            undo.callback(self._discard)
            if self._open_sound is not None:
                self._sound = self._open_sound()
            self._scaler = VideoReformatter()
            try:
                self._start(self._sound)
            except (av.FFmpegError, ValueError) as exc:
                self._start_silent(exc)
            undo.pop_all()
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        try:
            if exc_type is None:
                self._finish()
        finally:
            self._discard()

    def _start_silent(self, cause: Exception) -> None:
        """Start again without the sound, if that may be what the file does not take."""
        sound = self._sound
        if sound is None or is_full(cause):
            raise self._refused(cause) from cause
        self._remove()
        try:
            self._start(None)
        except (av.FFmpegError, ValueError) as exc:
            raise self._refused(exc) from exc
        sound.leave_out(f"a {self._path.suffix} file does not take it ({reason(cause)})")

    def _start(self, sound: Sound | None) -> None:
        """Open the partial file and write its header, for which all encoders are opened."""
        form = self._format
        os.environ.setdefault("SVT_LOG", "1")  # the encoder of AV1 prints its settings otherwise
        options = {"movflags": "+faststart"} if form.container.format in ("mp4", "mov") else {}
        self._container = av.open(
            f"file:{self._partial.absolute()}", "w", format=form.container.format, options=options
        )
        self._stream = self._add_stream(self._container)
        if sound is not None:
            sound.add_to(self._container, form.container)
        self._container.start_encoding()

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        form, color = self._format, self._color
        stream = container.add_stream(form.encoder, rate=form.hint(self._frame_rate))
        assert isinstance(stream, VideoStream)
        stream.time_base = form.time_base
        context = stream.codec_context
        context.time_base = form.time_base
        context.height, context.width = form.height, form.width
        context.pix_fmt = form.pix_fmt
        context.options = dict(form.options)
        if form.tag is not None:
            context.codec_tag = form.tag
        if self._pixel_aspect != 1:
            context.sample_aspect_ratio = self._pixel_aspect
        tag, self._coefficients = _MATRICES.get(color.matrix) or _MATRICES[matrix_by_rule(self._height)]
        context.colorspace = 0 if form.is_rgb else tag
        context.color_range = ColorRange.JPEG if form.is_rgb else ColorRange.MPEG
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
        form = self._format
        rows, columns = form.height - self._height, form.width - self._width
        if rows or columns:
            frame_HWC = np.pad(frame_HWC, ((0, rows), (0, columns), (0, 0)), mode="edge")
        frame = self._scaler.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), "rgb24"),
            format=form.pix_fmt,
            dst_colorspace=None if form.is_rgb else self._coefficients,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.JPEG if form.is_rgb else ColorRange.MPEG,
            interpolation=_INTERPOLATION,
        )
        frame.pts = round(pts * self._time_base / form.time_base)
        frame.time_base = form.time_base
        return frame

    def _finish(self) -> None:
        container = self._opened()
        if self._first_pts is None:
            raise StoreError(f"no frames were written to {self._path}, so that there is no video to keep")
        with writing(self._path):
            if self._sound is not None:
                self._mux_sound(self._sound, self._sound.rest())
            packets = [] if self._held is None else self._stream.encode(self._held)
            packets += self._stream.encode(None)
            self._set_end(packets)
            self._mux(packets)
            container.close()
            with self._partial.open("rb+") as file:
                os.fsync(file.fileno())
            check_file_target(self._path, overwrite=self._overwrite, what="video")
            self._partial.replace(self._path)

    def _set_end(self, packets: list[Packet[Any]]) -> None:
        """Let the video end when its last frame has been shown: mp4 takes the end from the last packet that is coded,
        which may belong to an earlier frame."""
        if not self._last_duration or self._held is None or self._held.pts is None:
            return
        end = self._held.pts + max(1, round(self._last_duration * self._time_base / self._format.time_base))
        for number, packet in enumerate(packets, 1):
            if packet.pts is not None and (number == len(packets) or packet.pts == self._held.pts):
                packet.duration = end - packet.pts

    def _discard(self) -> None:
        sound, self._sound = self._sound, None
        if sound is not None:
            sound.close()
        self._remove()

    def _remove(self) -> None:
        container, self._container = self._container, None
        with contextlib.suppress(av.FFmpegError, OSError):
            if container is not None:
                container.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _refused(self, exc: Exception) -> StoreError:
        """The error where an encoder cannot be opened."""
        if (isinstance(exc, OSError) and not isinstance(exc, av.FFmpegError)) or is_full(exc):
            return write_error(self._path, exc)
        form = self._format
        what = f"{form.encoder} does not take {self._width}x{self._height} {form.pix_fmt} at {form.time_base} s"
        return StoreError(
            f"{self._path} cannot be written: {what} ({reason(exc)}); choose another --codec or --pix-fmt, or another "
            "suffix",
            kind="format",
        )


def _within_16_bits(ratio: Fraction) -> Fraction:
    """The nearest ratio that H.264 can hold: both numbers below 65536."""
    inverted = ratio > 1
    found = (1 / ratio if inverted else Fraction(ratio)).limit_denominator(2**16 - 1) or Fraction(1, 2**16 - 1)
    return 1 / found if inverted else found

"""Frames of a media file, in decoder order, with the time stamps that the file gives them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.video.arrays import DEFAULT_FRAME_RATE, OnePass, block_length, check_position, check_window
from longvid.video.color import Conversion, resolve_color
from longvid.video.container import check_complete, check_regular_file, open_container, pick_stream, reason
from longvid.video.frames import FrameBlock, OnError, SourceInfo, SourcePosition
from longvid.video.limits import Limits

__all__ = ["VideoFile"]

_HDR = ("smpte2084", "arib-std-b67")
# FULL_CHR_H_INT interpolates chroma where the fast path repeats it: a third of the error on film, at half the speed
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class VideoFile(OnePass):
    """The video stream of a local media file.

    Opening reads the header and the first frame, so that ``info`` is known and a file that cannot be read is refused
    at once. Frames come as the decoder delivers them, turned upright, in RGB, each with its own time stamp; variable
    frame rates are kept. Frames before ``start`` are decoded and dropped, which is exact for every format.

    Args:
        path: a regular file; never an address.
        start: index of the first frame delivered.
        frames: how many frames at most.
        size: (height, width) to resize to.
        on_error: what happens where the file is damaged.
        limits: what the file may ask for at most.

    Raises:
        SourceError: the file is missing, is no video, is cut short, or holds no frames.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        on_error: OnError = "stop",
        limits: Limits | None = None,
    ) -> None:
        super().__init__(os.fspath(path))
        self._on_error = on_error
        self._limits = limits or Limits()
        check_window(start, frames)
        _check_size(size)
        self._path = Path(path)
        self._begin = start
        self._limit = frames
        self._pending: VideoFrame | None = None
        self._num_bytes = check_regular_file(self._path)
        self._container = open_container(self._path)
        try:
            self._probe(size)
        except BaseException:
            self.close()
            raise

    info: SourceInfo
    "facts known in advance"

    def fingerprint(self) -> dict[str, Any]:
        """The file's content, and how it is read."""
        with self._path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        details = self.info.details or {}
        return {
            "kind": "video",
            "bytes": self._num_bytes,
            "sha256": content,
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "frames": self._limit,
            "on_error": self._on_error,
            **{key: details[key] for key in ("interpolation", "rotation", "stream_index", "av", "libavcodec")},
            "matrix": self._converter.color.info.matrix,
            "range": self._converter.color.info.range,
        }

    def blocks(self, *, after: SourcePosition | None = None) -> Iterator[FrameBlock]:
        """Yield the frames; where decoding fails, those before come out first, then SourceError is raised."""
        self._start()
        return self._blocks(after)

    def close(self) -> None:
        """Close the file."""
        if self._closed:
            return
        super().close()
        self._pending = None
        self._container.close()

    def _probe(self, size: tuple[int, int] | None) -> None:
        stream = pick_stream(self._container, self._name)
        stream.thread_type = "AUTO"
        check_complete(self._path, self._container, stream, self._num_bytes)
        self._decoder = _Decoder(self._container, stream, self._name, self._num_bytes)
        self._check_start(stream)
        first = next(self._decoder.frames(), None)
        if first is None:
            raise SourceError(f"{self._name} has a video stream without a single frame that decodes", kind="no-frames")
        self._converter = _Converter(first, stream, size, self._name)
        self._clock = _Clock(stream)
        self._pending = first
        self.info = self._describe(stream, first)
        self._warn_of_hdr()

    def _check_start(self, stream: VideoStream) -> None:
        # the sample table of mp4 is what the frames are read from; the counts of other formats are mere claims
        if "mp4" in self._container.format.name and 0 < stream.frames <= self._begin:
            raise self._beyond_end(stream.frames)

    def _beyond_end(self, count: int) -> SourceError:
        return SourceError(
            f"start={self._begin} is beyond the end of {self._name}, which has {count} frames", kind="range"
        )

    def _describe(self, stream: VideoStream, first: VideoFrame) -> SourceInfo:
        converter = self._converter
        return SourceInfo(
            kind="video",
            name=self._name,
            height=converter.height,
            width=converter.width,
            num_frames=self._expected_frames(stream),
            time_base=self._clock.time_base,
            frame_rate=_frame_rate(stream),
            timing_assumed=first.pts is None,
            color=converter.color.info,
            details={
                "container": self._container.format.name,
                "codec": stream.codec_context.name,
                "pix_fmt": first.format.name,
                "coded_height": first.height,
                "coded_width": first.width,
                "rotation": converter.rotation,
                "interlaced": first.interlaced_frame,
                "resized_from": converter.resized_from,
                "interpolation": converter.interpolation_name,
                "matrix_tag": converter.color.matrix_tag,
                "bytes": self._num_bytes,
                "start": self._begin,
                "stream_index": stream.index,
                "stream_start_time": stream.start_time,
                "stream_duration": stream.duration,
                "frames_in_header": stream.frames,
                "av": av.__version__,
                "libavcodec": ".".join(str(part) for part in av.library_versions["libavcodec"]),
            },
        )

    def _expected_frames(self, stream: VideoStream) -> int | None:
        if not stream.frames:
            return None
        left = max(0, stream.frames - self._begin)
        return left if self._limit is None else min(left, self._limit)

    def _warn_of_hdr(self) -> None:
        color = self.info.color
        if color is not None and color.transfer in _HDR:
            warnings.warn(
                f"{self._name} is HDR ({color.transfer}); its values are taken as they are, without tone mapping, and "
                f"look pale as ordinary RGB: convert it to SDR first if that matters",
                stacklevel=4,
            )

    def _blocks(self, after: SourcePosition | None) -> Iterator[FrameBlock]:
        length = block_length(self.info.height, self.info.width)
        images: list[npt.NDArray[np.uint8]] = []
        stamps: list[int] = []
        try:
            for image, pts in self._images(after):
                images.append(image)
                stamps.append(pts)
                if len(images) == length:
                    yield _block(images, stamps)
                    images, stamps = [], []
        except SourceError:
            if images and not self._closed:
                yield _block(images, stamps)
            raise
        if images:
            yield _block(images, stamps)

    def _images(self, after: SourcePosition | None) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
        """Yield the frames of the window, converted, with their time stamps; those behind ``after`` if it is given."""
        index = -1
        end = None if self._limit is None else self._begin + self._limit
        last_seen = -1 if after is None else self._begin + after.num_frames - 1
        for index, frame in enumerate(self._raw_frames()):
            self._converter.check(frame, index)
            pts = self._clock.stamp(frame.pts)
            if index == last_seen and after is not None:
                check_position(self._name, after, self._converter.convert(frame, index))
            if index >= self._begin:
                if index > last_seen:
                    yield self._converter.convert(frame, index), pts
                if index + 1 == end:
                    return
            del frame
        if after is not None and index < last_seen:
            check_position(self._name, after, None)
        if index < self._begin:
            raise self._beyond_end(index + 1)

    def _raw_frames(self) -> Iterator[VideoFrame]:
        if self._pending is not None:
            frame, self._pending = self._pending, None
            yield frame
            del frame
        self._check_open()
        for frame in self._decoder.frames():
            yield frame
            del frame
            self._check_open()


class _Decoder:
    """Decodes one stream and turns what FFmpeg raises into SourceError."""

    def __init__(self, container: InputContainer, stream: VideoStream, name: str, num_bytes: int) -> None:
        self._packets = container.demux(stream)
        self._name = name
        self._num_bytes = num_bytes
        self._reached = 0
        self._count = 0
        self._warned = False
        self._ready: list[VideoFrame] = []

    def frames(self) -> Iterator[VideoFrame]:
        """Yield the frames that follow; calling it again goes on where the last iteration stopped."""
        while self._ready or self._refill():
            frame = self._ready.pop(0)
            self._warn_of_damage(frame)
            self._count += 1
            yield frame
            del frame

    def _refill(self) -> bool:
        """Decode until there is a frame; False at the end of the stream."""
        try:
            for packet in self._packets:
                self._reached = max(self._reached, (packet.pos or 0) + packet.size)
                self._ready.extend(packet.decode())
                if self._ready:
                    return True
        except (av.FFmpegError, OSError) as exc:
            raise self._wrap(exc) from exc
        return False

    def _wrap(self, exc: Exception) -> SourceError:
        where = f"{self._name} cannot be decoded beyond frame {self._count}"
        if self._reached >= self._num_bytes or isinstance(exc, EOFError):
            return SourceError(f"{where}: the file is cut short ({reason(exc)}); copy it again", kind="truncated")
        return SourceError(f"{where}: the file is damaged or cut short ({reason(exc)}); copy it again", kind="other")

    def _warn_of_damage(self, frame: VideoFrame) -> None:
        if frame.is_corrupt and not self._warned:
            self._warned = True
            warnings.warn(
                f"frame {self._count} of {self._name} is damaged: its pixels, and those of frames that depend on it, "
                f"are the decoder's guess",
                stacklevel=2,
            )


class _Clock:
    """Time stamps of the frames; where the file gives none, it counts on at the frame rate."""

    def __init__(self, stream: VideoStream) -> None:
        self.time_base = stream.time_base or 1 / DEFAULT_FRAME_RATE
        self._step = 1 / ((_frame_rate(stream) or DEFAULT_FRAME_RATE) * self.time_base)
        self._anchor = 0
        self._since_anchor = -1

    def stamp(self, pts: int | None) -> int:
        """Time stamp of the next frame, whose own is ``pts``."""
        if pts is not None:
            self._anchor, self._since_anchor = pts, 0
            return pts
        self._since_anchor += 1
        return self._anchor + round(self._since_anchor * self._step)


class _Converter:
    """Turns decoded frames into upright RGB of one size: colour and size in one pass of swscale."""

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

    def check(self, frame: VideoFrame, index: int) -> None:
        """Refuse a frame whose size is not that of the first."""
        if (frame.height, frame.width) != self._coded:
            raise SourceError(
                f"frame {index} of {self._name} has {frame.width}x{frame.height} pixels where the frames before have "
                f"{self._coded[1]}x{self._coded[0]}; cut the file there, or bring it to one size first",
                kind="geometry-changed",
            )

    def convert(self, frame: VideoFrame, index: int) -> npt.NDArray[np.uint8]:
        """RGB of one frame, of shape (height, width, 3), in memory of its own."""
        height, width = self._target
        color = self._color_of(frame)
        try:
            rgb = self._scaler.reformat(
                frame,
                width=width,
                height=height,
                format="rgb24",
                src_colorspace=color.matrix,
                src_color_range=ColorRange.JPEG if color.info.range == "full" else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=self._interpolation,
            )
        except (av.FFmpegError, ValueError) as exc:
            raise SourceError(
                f"frame {index} of {self._name} cannot be converted from {frame.format.name} to RGB: {reason(exc)}"
            ) from exc
        plane = rgb.planes[0]
        image = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)[:, : width * 3]
        image = image.reshape(height, width, 3)
        if color.expand_gray:
            image = _LIMITED_TO_FULL[image]
        return np.array(np.rot90(image, self._turns), order="C")

    def _color_of(self, frame: VideoFrame) -> Conversion:
        pixel_format = frame.format.name
        if pixel_format not in self._colors:  # it may change on the way
            self._colors[pixel_format] = resolve_color(frame, self._stream, self._name)
        return self._colors[pixel_format]


_LIMITED_TO_FULL = ((np.arange(256) - 16) * 255 / 219).round().clip(0, 255).astype(np.uint8)


def _turned(size: tuple[int, int], turns: int) -> tuple[int, int]:
    return (size[1], size[0]) if turns % 2 else size


def _block(images: list[npt.NDArray[np.uint8]], stamps: list[int]) -> FrameBlock:
    return FrameBlock.whole(np.stack(images), np.array(stamps, dtype=np.int64))


def _frame_rate(stream: VideoStream) -> Fraction | None:
    return stream.average_rate or stream.guessed_rate or None


def _check_size(size: tuple[int, int] | None) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise SourceError(f"size={size} is not (height, width) in pixels, both at least 1", kind="range")

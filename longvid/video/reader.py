"""Frames of a media file, in decoder order, with the time stamps that the file gives them."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.video.arrays import DEFAULT_FRAME_RATE, OnePass, block_length, check_position, check_window
from longvid.video.color import Conversion, resolve_color
from longvid.video.container import MediaFile, declared_end, pick_stream, reason
from longvid.video.frames import FrameBlock, OnError, SourceInfo, SourcePosition, frame_digest
from longvid.video.limits import Limits
from longvid.video.watchdog import Watchdog

__all__ = ["VideoFile"]

_Run: TypeAlias = Callable[[Callable[[], Any]], Any]
"calls a function in a thread that may be left behind"
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
        super().__init__(os.fspath(path), limits)
        self._on_error = on_error
        check_window(start, frames)
        _check_size(size)
        self._begin = start
        self._limit = frames
        self._pending: VideoFrame | None = None
        self._file = MediaFile(Path(path), self._limits)
        self._container: InputContainer | None = None
        self._watchdog = Watchdog(self._name, self._limits.stall_seconds)
        try:
            self._open()
            self._describe_all(size)
        except BaseException:
            self.close()
            raise

    def fingerprint(self) -> dict[str, Any]:
        """The file's content, and how it is read."""
        details = self.info.details or {}
        return {
            "kind": "video",
            "bytes": self._file.num_bytes,
            "sha256": self._file.sha256(lambda: None),
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
        return self._within_limits(self._blocks(after))

    def close(self) -> None:
        """Close the file."""
        if self._closed:
            return
        super().close()
        self._pending = None
        self._watchdog.close()
        if self._container is not None and not self._watchdog.stalled:  # the thread that was left behind still has it
            self._container.close()
        self._file.close()

    def _open(self) -> None:
        """Open the container at its beginning, also once more."""
        if self._container is not None:
            self._container.close()
        self._container = container = self._watchdog.run(self._file.open)
        self._stream = stream = pick_stream(container, self._name)
        self._limits.check_pixels(self._name, stream.codec_context.height, stream.codec_context.width)
        # The decoder is a context of its own, to which the limit given on opening does not reach.
        stream.codec_context.options = {"max_pixels": str(self._limits.max_pixels)}
        # What a decoder makes of damaged frames depends on how threads meet in it, unless each frame has but one.
        stream.thread_type = "AUTO" if self._on_error == "stop" else "SLICE"
        self._decoder = _Decoder(
            container,
            stream,
            self._name,
            self._file.num_bytes,
            tolerant=self._on_error != "stop",
            run=self._watchdog.run,
        )

    def _describe_all(self, size: tuple[int, int] | None) -> None:
        assert self._container is not None
        if self._on_error == "stop":
            self._check_complete(self._container)
        self._check_start(self._stream)
        decoded = self._decoder.frames()
        first = next((d.frame for d in decoded if d.frame is not None), None)
        if first is None:
            raise SourceError(f"{self._name} has a video stream without a single frame that decodes", kind="no-frames")
        self._converter = _Converter(first, self._stream, size, self._name)
        self._clock = _Clock(self._stream)
        if self._on_error == "stop":
            self._pending = first
        else:  # what came before the first frame is part of the story
            self._open()
        self.info = self._describe(self._stream, first)
        self._check_known_length(self.info)
        self._warn_of_hdr()

    def _check_complete(self, container: InputContainer) -> None:
        """Refuse a file whose own header speaks of more bytes than it has."""
        end = declared_end(self._file.file, container, self._stream)
        if end is not None and end > self._file.num_bytes:
            raise SourceError(
                f"{self._name} is cut short: its header speaks of {end} bytes and {self._file.num_bytes} are there; "
                "copy the file again",
                kind="truncated",
            )

    def _check_start(self, stream: VideoStream) -> None:
        # the sample table of mp4 is what the frames are read from; the counts of other formats are mere claims
        if self._container is not None and "mp4" in self._container.format.name and 0 < stream.frames <= self._begin:
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
                "container": None if self._container is None else self._container.format.name,
                "codec": stream.codec_context.name,
                "pix_fmt": first.format.name,
                "coded_height": first.height,
                "coded_width": first.width,
                "rotation": converter.rotation,
                "interlaced": first.interlaced_frame,
                "resized_from": converter.resized_from,
                "interpolation": converter.interpolation_name,
                "matrix_tag": converter.color.matrix_tag,
                "bytes": self._file.num_bytes,
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
        valid: list[bool] = []
        try:
            for image, pts, good in self._images(after):
                images.append(image)
                stamps.append(pts)
                valid.append(good)
                if len(images) == length:
                    yield _block(images, stamps, valid)
                    images, stamps, valid = [], [], []
        except SourceError:
            if images and not self._closed:
                yield _block(images, stamps, valid)
            raise
        if images:
            yield _block(images, stamps, valid)

    def _images(self, after: SourcePosition | None) -> Iterator[tuple[npt.NDArray[np.uint8], int, bool]]:
        """Yield the frames of the window with time stamps and marks; those behind ``after`` if it is given."""
        end = None if self._limit is None else self._begin + self._limit
        index = -1 if after is None else self._begin + after.num_frames - 1
        frames = self._all_images() if after is None else self._images_behind(after)
        for image, pts, good in frames:
            index += 1
            if index >= self._begin:
                yield image(), pts, good
                if index + 1 == end:
                    return
        if index < self._begin:
            raise self._beyond_end(index + 1)

    def _images_behind(self, after: SourcePosition) -> Iterator[_Image]:
        """Go on behind a frame that was delivered before. Where a container lands after seeking is its own affair, so
        a place counts only if the frame is found there, pixel by pixel; from the start it has to be."""
        self._pending = None
        seconds_back = (0.0, 0.5, 2.0) if self._on_error == "stop" and not self.info.timing_assumed else ()
        for back in seconds_back:
            if self._seek(after, back):
                yield from self._all_images()
                return
        self._open()
        self._clock = _Clock(self._stream)
        frames = self._all_images()
        last = self._begin + after.num_frames - 1
        found = next(itertools.islice(frames, last, None), None)
        check_position(self._name, after, None if found is None else found[0]())
        yield from frames

    def _seek(self, after: SourcePosition, seconds_back: float) -> bool:
        """Stand right behind the frame; False if that does not work from here."""
        assert self._container is not None
        target = after.pts - int(seconds_back / self._clock.time_base)
        try:
            self._open()
            self._container.seek(target, stream=self._stream, backward=True)
            self._decoder.restart()
            first = True
            for decoded in self._decoder.frames():
                frame = decoded.frame
                if frame is None or frame.pts is None or frame.pts > after.pts or (first and not frame.key_frame):
                    return False
                first = False
                if frame.pts == after.pts:
                    return frame_digest(self._converter.convert(frame, 0)) == after.digest
        except (SourceError, av.FFmpegError, OSError):
            return False
        return False

    def _all_images(self) -> Iterator[_Image]:
        """Every frame from here on: a function that converts it, its time stamp, and whether it is the source's own.

        A frame that is damaged, or lost, is the last good one before it; at the beginning the first good one.
        """
        good: npt.NDArray[np.uint8] | None = None
        waiting: list[int] = []
        "time stamps of bad frames before the first good one"
        try:
            for index, decoded in enumerate(self._raw_frames()):
                frame = decoded.frame
                if frame is None:
                    if good is None:
                        waiting.append(self._clock.stamp(decoded.pts))
                    else:
                        yield _constant(good), self._clock.stamp(decoded.pts), False
                    continue
                self._converter.check(frame, index)
                pts = self._clock.stamp(frame.pts)
                if self._on_error != "conceal":
                    yield partial(self._converter.convert, frame, index), pts, True
                    continue
                good = self._converter.convert(frame, index)
                for early in waiting:
                    yield _constant(good), early, False
                waiting = []
                yield _constant(good), pts, True
                del frame, decoded
        except SourceError as exc:
            if self._on_error == "stop" or exc.kind in ("limit", "stalled") or self._decoder.num_good == 0:
                raise
            warnings.warn(f"{exc}; the video ends there", stacklevel=2)

    def _raw_frames(self) -> Iterator[_Decoded]:
        if self._pending is not None:
            frame, self._pending = self._pending, None
            yield _Decoded(frame, frame.pts)
            del frame
        self._check_open()
        for decoded in self._decoder.frames():
            if decoded.frame is None and self._on_error == "keep":
                raise decoded.error(self._name)
            yield decoded
            del decoded
            self._check_open()


_Image: TypeAlias = tuple[Callable[[], npt.NDArray[np.uint8]], int, bool]


def _constant(image: npt.NDArray[np.uint8]) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: image


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A frame, or the place of one that is damaged or lost."""

    frame: VideoFrame | None
    pts: int | None
    index: int = 0
    why: str = ""

    def error(self, name: str) -> SourceError:
        """What there is to say about a place without a good frame."""
        return SourceError(f"frame {self.index} of {name} is damaged ({self.why})", kind="damaged")


class _Decoder:
    """Decodes one stream and turns what FFmpeg raises into SourceError.

    Args:
        container: what is read.
        stream: what is decoded.
        name: for messages.
        num_bytes: size of the file.
        tolerant: whether to go on where the stream is damaged, with places in place of frames: from the first damaged
            frame to the next key frame that is whole, since every frame between leans on what was lost.
        run: calls what may hang.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        name: str,
        num_bytes: int,
        *,
        tolerant: bool,
        run: _Run,
    ) -> None:
        self._run = run
        self._container, self._stream = container, stream
        self._name = name
        self._num_bytes = num_bytes
        self._tolerant = tolerant
        self._reached = 0
        self._count = 0
        self.num_good = 0
        "frames that were whole"
        self._bad = ""
        "why frames are not to be trusted now"
        self._bad_until: int | None = None
        "time stamp of the last frame that is known to be damaged"
        self._ready: list[VideoFrame] = []
        self._lost: list[int | None] = []
        "time stamps of packets that gave nothing"
        self.restart()

    def restart(self) -> None:
        """Take packets from where the container stands now."""
        self._packets = self._container.demux(self._stream)
        self._ready.clear()

    def frames(self) -> Iterator[_Decoded]:
        """Yield what follows; calling it again goes on where the last iteration stopped."""
        while self._ready or self._refill():
            frame = self._ready.pop(0)
            yield from self._places_before(frame.pts)
            decoded = self._judged(frame)
            self._count += 1  # before the frame goes out: who takes only the first one never comes back here
            yield decoded
            del frame, decoded
        yield from self._places_before(None)

    def _judged(self, frame: VideoFrame) -> _Decoded:
        if frame.is_corrupt:
            if not self._tolerant:
                raise SourceError(
                    f"frame {self._count} of {self._name} is damaged: its pixels, and those of frames that depend on "
                    "it, would be the decoder's guess; copy the file again, or go on without (--on-error keep, or "
                    "conceal)",
                    kind="damaged",
                )
            self._bad = "the decoder found errors in it, or in one that it depends on"
            self._bad_until = frame.pts
        elif self._bad and frame.key_frame and self._is_behind_damage(frame):
            self._bad = ""
        if self._bad and (frame.is_corrupt or not frame.key_frame):
            return _Decoded(None, frame.pts, self._count, self._bad)
        self.num_good += 1
        return _Decoded(frame, frame.pts, self._count)

    def _is_behind_damage(self, frame: VideoFrame) -> bool:
        """A key frame leans on nothing; but one that is only shown late was decoded before the damage."""
        return frame.pts is None or self._bad_until is None or frame.pts > self._bad_until

    def _places_before(self, pts: int | None) -> Iterator[_Decoded]:
        """Lost frames whose time has come: before ``pts``, or all that are left."""
        due = sorted(p for p in self._lost if p is not None and (pts is None or p < pts))
        self._lost = [p for p in self._lost if p is not None and p not in due]
        for stamp in due:
            yield _Decoded(None, stamp, self._count, self._bad)
            self._count += 1

    def _refill(self) -> bool:
        """Decode until there is a frame; False at the end of the stream."""
        while True:
            try:
                packet: Packet[Any] | None = self._run(lambda: next(self._packets, None))
            except SourceError:  # the watchdog's
                raise
            except (av.FFmpegError, OSError) as exc:
                raise self._wrap(exc) from exc
            if packet is None:
                return False
            self._reached = max(self._reached, (packet.pos or 0) + packet.size)
            try:
                self._ready.extend(self._run(packet.decode))
            except SourceError:
                raise
            except (av.FFmpegError, OSError) as exc:
                if not self._tolerant or isinstance(exc, (av.EOFError, av.MemoryError)):
                    raise self._wrap(exc) from exc
                self._bad, self._bad_until = reason(exc), packet.pts
                if packet.size:
                    self._lost.append(packet.pts)
            if self._ready:
                return True

    def _wrap(self, exc: Exception) -> SourceError:
        where = f"{self._name} cannot be decoded beyond frame {self._count}"
        if isinstance(exc, av.ExitError):
            return SourceError(f"{where}: nothing came for a long time; is its disk there?", kind="stalled")
        if self._reached >= self._num_bytes or isinstance(exc, EOFError):
            return SourceError(f"{where}: the file is cut short ({reason(exc)}); copy it again", kind="truncated")
        return SourceError(f"{where}: the file is damaged or cut short ({reason(exc)}); copy it again", kind="damaged")


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


def _block(images: list[npt.NDArray[np.uint8]], stamps: list[int], valid: list[bool]) -> FrameBlock:
    return FrameBlock(np.stack(images), np.array(stamps, dtype=np.int64), np.array(valid, dtype=np.bool_))


def _frame_rate(stream: VideoStream) -> Fraction | None:
    return stream.average_rate or stream.guessed_rate or None


def _check_size(size: tuple[int, int] | None) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise SourceError(f"size={size} is not (height, width) in pixels, both at least 1", kind="range")

"""Media files as sources: frames in decoder order, with the time stamps of the file."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Unpack

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.frames import FrameBlock, SourceInfo, SourcePosition, frame_digest
from longvid.media.arrays import DEFAULT_FRAME_RATE, FrameSource, Reading, check_position
from longvid.media.container import MediaFile, declared_end, lost_samples, pick_stream
from longvid.media.convert import REVISION, Converter
from longvid.media.decoder import Decoder, Fault, Picture
from longvid.media.watchdog import Watchdog

__all__ = ["VideoFile"]

_HDR = ("smpte2084", "arib-std-b67")
_TIME_BEGINS_AGAIN = {"mpegts", "mpeg", "m4v", "ogg"}
"containers whose time stamps may begin again within a file: FFmpeg's AVFMT_TS_DISCONT"
_SECONDS_BACK = (0.0, 0.5, 2.0)
"how long before the wanted frame to seek: containers differ in where a seek ends"


class VideoFile(FrameSource):
    """The video stream of a local media file.

    Opening reads the header and the first frame, so that ``info`` is known and a file that cannot be read is refused
    at once. Frames come in decoder order, turned upright, in RGB, each with its own time stamp; variable frame rates
    are kept. Frames before ``start`` are decoded and dropped, which is exact for every format.

    Raises:
        SourceError: the file is missing, is not a video, is cut short, or holds no frames.
    """

    def __init__(self, path: str | os.PathLike[str], **reading: Unpack[Reading]) -> None:
        super().__init__(os.fspath(path), **reading)
        size = self._size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise SourceError(f"size={size} is not (height, width) in pixels, both at least 1", kind="range")
        if self._frame_rate is not None:
            raise SourceError(
                f"frame_rate={self._frame_rate} was given for {self._name}, but a media file carries its own time "
                "stamps; leave it out",
                kind="layout",
            )
        self._ahead: deque[Picture] = deque()
        "pictures that were decoded to describe the file"
        self._file = MediaFile(self._name, self._limits)
        self._container: InputContainer | None = None
        self._watchdog = Watchdog(self._name, self._limits.stall_seconds)
        try:
            self._open()
            self._describe_all()
        except BaseException:
            self.close()
            raise

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the whole file, which is read for it, and how it is converted to frames."""
        details = self.info.details or {}
        facts = ("interpolation", "rotation", "stream_index", "av", "libavcodec", "libswscale")
        return {
            "kind": "video",
            "bytes": self._file.num_bytes,
            "sha256": self._watchdog.run(lambda: self._file.sha256(self._watchdog.beat)),
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "frames": None if self._end is None else self._end - self._begin,
            "conversion": REVISION,
            "on_error": self._on_error,
            **{key: details[key] for key in facts},
            "matrix": self._converter.color.info.matrix,
            "range": self._converter.color.info.range,
        }

    def blocks(self, *, after: SourcePosition | None = None) -> Iterator[FrameBlock]:
        """Yield the frames; where decoding fails, SourceError is raised after the frames before it."""
        self._start()
        done = 0 if after is None else after.num_frames
        return self._within_limits(self._blocks(after), done=done, first_pts=self._first_pts)

    def close(self) -> None:
        """Close the file."""
        if self._closed:
            return
        super().close()
        self._ahead.clear()
        self._watchdog.close()
        if self._container is not None and not self._watchdog.stalled:  # an abandoned thread still uses it
            self._container.close()
        self._file.close()

    def _open(self, *, frame_size: tuple[int, int] | None = None, seek: int | None = None) -> None:
        """Open the container, or open it again, at its beginning or near a time stamp."""
        if self._container is not None:
            self._container.close()
        self._container = container = self._watchdog.run(self._file.open)
        self._stream = stream = pick_stream(container, self._name)
        self._limits.check_pixels(self._name, stream.codec_context.height, stream.codec_context.width)
        # the decoder is a context of its own, which does not inherit the limit given on opening
        stream.codec_context.options = {"max_pixels": str(self._limits.decoder_pixels)}
        # damaged frames are decoded reproducibly only with one thread per frame
        stream.thread_type = "AUTO" if self._on_error == "stop" else "SLICE"
        if seek is not None:
            self._watchdog.run(lambda: container.seek(seek, stream=stream, backward=True))
        self._decoder = Decoder(
            container,
            stream,
            name=self._name,
            num_bytes=self._file.num_bytes,
            run=self._watchdog.run,
            size=frame_size,
            from_start=seek is None,
        )
        self._pictures = self._decoder.pictures()
        self._ahead.clear()
        self._clock = _Clock(stream)

    def _describe_all(self) -> None:
        assert self._container is not None
        self._formats = self._container.format.name.split(",")
        self._shortfall = self._find_shortfall(self._container)
        if self._shortfall is not None and self._on_error == "stop":
            raise self._cut_short(self._shortfall)
        # frames of mp4 are read by its sample table; the counts of other formats are not reliable
        if "mp4" in self._formats and 0 < self._stream.frames <= self._begin:
            raise self._beyond_end(self._stream.frames)
        first = self._first_frame()
        self._limits.check_pixels(self._name, first.height, first.width)
        self._frame_size = (first.height, first.width)
        self._first_pts = self._ahead[0].pts or 0
        self._converter = Converter(first, self._stream, self._size, self._name)
        self.info = self._describe(self._stream, first)
        self._check_known_length()
        transfer = self._converter.color.info.transfer
        if transfer in _HDR:
            warnings.warn(
                f"{self._name} is HDR ({transfer}) and is read without tone mapping, so that it looks pale; convert it "
                "to SDR first if that matters",
                stacklevel=3,
            )

    def _first_frame(self) -> VideoFrame:
        """Decode up to the first frame, good or damaged; it is delivered later."""
        for index, picture in enumerate(self._pictures):
            if picture.fault is not None and self._on_error == "stop":
                raise self._error(picture.fault, index)
            self._ahead.append(picture)
            if picture.frame is not None:
                return picture.frame
        if self._shortfall is not None:
            raise self._cut_short(self._shortfall)
        fault = next((picture.fault for picture in self._ahead if picture.fault is not None), self._decoder.rest)
        if fault is not None:
            raise self._error(fault, 0)
        raise SourceError(f"{self._name} has a video stream without a single frame that decodes", kind="no-frames")

    def _cut_short(self, shortfall: Fault) -> SourceError:
        return SourceError(f"{self._name} {shortfall.why}; copy the file again", kind="truncated")

    def _error(self, fault: Fault, index: int) -> SourceError:
        num_pixels = self._stream.codec_context.height * self._stream.codec_context.width
        if isinstance(fault.cause, av.ArgumentError) and not 0 < num_pixels <= self._limits.max_pixels:
            return self._limits.exceeded("max_pixels", f"{self._name} has frames of more pixels, or of no size at all")
        if fault.kind == "geometry-changed":
            advice = "cut the file there, or bring it to one size first"
        else:
            advice = "copy the file again, or encode without the damaged frames (--on-error keep, or conceal)"
        error = SourceError(f"frame {index} of {self._name} {fault.why}; {advice}", kind=fault.kind)
        error.__cause__ = fault.cause
        return error

    def _find_shortfall(self, container: InputContainer) -> Fault | None:
        end, have = declared_end(self._file.file, container, self._stream), self._file.num_bytes
        if end is not None and end > have:
            return Fault("truncated", f"is cut short: its header declares {end} bytes and the file has {have}")
        lost = lost_samples(container, self._stream)
        if lost:
            return Fault("truncated", f"is cut short: {lost} of {self._stream.frames} frames lie beyond its end")
        return None

    def _describe(self, stream: VideoStream, first: VideoFrame) -> SourceInfo:
        converter = self._converter
        return SourceInfo(
            kind="video",
            name=self._name,
            height=converter.height,
            width=converter.width,
            num_frames=max(0, min(stream.frames, self._end or stream.frames) - self._begin) if stream.frames else None,
            time_base=self._clock.time_base,
            frame_rate=_frame_rate(stream),
            timing_assumed=first.pts is None,
            color=converter.color.info,
            details={
                "container": ",".join(self._formats),
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
                **{name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libswscale")},
            },
        )

    def _blocks(self, after: SourcePosition | None) -> Iterator[FrameBlock]:
        """Yield the frames of the window, or those behind ``after``, one by one."""
        index = self._begin + (after.num_frames if after is not None else 0)
        if index == self._end:
            return
        # Frames before ``start`` are decoded and dropped: a header does not tell whether the decoder gives one frame
        # for each of its time stamps, and there is no digest to compare the first frame with.
        frames = self._from_begin() if after is None else self._behind(after)
        shown, image = None, np.empty(0, np.uint8)
        for frame, pts, valid in frames:
            if frame is not shown:
                shown, image = frame, self._converter.convert(frame, index)
            yield FrameBlock(image[None], np.array([pts], dtype=np.int64), np.array([valid], dtype=np.bool_))
            index += 1
            if index == self._end:
                return

    def _from_begin(self) -> Iterator[tuple[VideoFrame, int, bool]]:
        count = 0
        for count, delivered in enumerate(self._played(), start=1):
            if count > self._begin:
                yield delivered
        if count <= self._begin:
            raise self._beyond_end(count)

    def _behind(self, after: SourcePosition) -> Iterator[tuple[VideoFrame, int, bool]]:
        """The frames behind one that was delivered before. The result of a seek is used only if that frame is found
        there, pixel by pixel; else the file is read from its start, where the frame must be found. Damaged files are
        always read from the start, since what counts as damaged depends on everything before."""
        moved = False
        if self._on_error == "stop" and not self.info.timing_assumed and self._is_unique(after.pts):
            for seconds in _SECONDS_BACK:
                moved = True
                pictures = self._sought(after, after.pts - int(seconds / self.info.time_base))
                if pictures is not None:
                    yield from self._played(pictures, self._begin + after.num_frames)
                    return
        if moved:
            self._open(frame_size=self._frame_size)
        frames = self._played()
        last = self._begin + after.num_frames - 1
        found = next(itertools.islice(frames, last, None), None)
        check_position(self._name, after, None if found is None else self._converter.convert(found[0], last))
        yield from frames

    def _is_unique(self, pts: int) -> bool:
        """Whether only one frame has the time stamp: time may begin again in the middle of a recording."""
        if not _TIME_BEGINS_AGAIN.intersection(self._formats):
            return True
        with self._watchdog.run(self._file.open) as container:
            packets = container.demux(pick_stream(container, self._name))

            def count() -> int:
                found = 0
                for packet in packets:
                    self._watchdog.beat()
                    found += packet.pts == pts
                return found

            try:
                return bool(self._watchdog.run(count) == 1)
            except (av.FFmpegError, OSError):
                return False

    def _sought(self, after: SourcePosition, target: int) -> Iterator[Picture] | None:
        """Pictures behind the frame, reached by a seek; None if they may differ from those of a full read.

        No picture between the key frame where decoding begins and the frame may have a fault, and the frame must have
        its own time stamp.
        """
        try:
            self._open(frame_size=self._frame_size, seek=target)
            whole = False
            for picture in self._pictures:
                if picture.pts is None or picture.pts > after.pts:
                    return None
                whole = whole or (picture.frame is not None and picture.frame.key_frame and picture.fault is None)
                if not whole:  # pictures that are predicted from earlier ones
                    continue
                if picture.frame is None or picture.fault is not None:
                    return None
                if picture.pts == after.pts:
                    if frame_digest(self._converter.convert(picture.frame, 0)) != after.digest:
                        return None
                    following = next(self._pictures, None)
                    if following is None:
                        return iter(())
                    if following.pts is None or following.pts <= after.pts:
                        return None
                    return itertools.chain([following], self._pictures)
        except (av.FFmpegError, OSError) as exc:
            if isinstance(exc, SourceError) and exc.kind == "stalled":
                raise
        return None

    def _played(
        self, pictures: Iterator[Picture] | None = None, index: int = 0
    ) -> Iterator[tuple[VideoFrame, int, bool]]:
        """Every frame from ``index`` on with its time stamp and validity.

        Damaged and lost frames are handled as ``on_error`` says; a frame that is repeated is the same object again.
        """
        good: VideoFrame | None = None
        waiting: list[int] = []
        "time stamps of bad pictures before the first good one"
        for picture in pictures or self._with_ahead():
            stamp = self._clock.stamp(picture.pts)
            fault, frame = picture.fault, picture.frame
            if fault is None and frame is not None:
                good = frame
                for early in waiting:
                    yield good, early, False
                waiting.clear()
                yield good, stamp, True
            elif fault is not None and (self._on_error == "stop" or (self._on_error == "keep" and good is None)):
                raise self._error(fault, index)
            elif fault is not None and self._on_error == "keep":
                self._warn_of_end(fault, index)
                return
            elif good is None:
                waiting.append(stamp)
            else:
                yield good, stamp, False
            index += 1
            del picture, frame
            self._check_open()
        if waiting:
            raise SourceError(f"{self._name} has no frame without damage", kind="damaged")
        fault = self._decoder.rest or self._shortfall
        if fault is not None and self._on_error == "stop":
            raise self._error(fault, index)
        if fault is not None:
            self._warn_of_end(fault, index)

    def _with_ahead(self) -> Iterator[Picture]:
        while self._ahead:
            yield self._ahead.popleft()
        self._check_open()
        yield from self._pictures

    def _warn_of_end(self, fault: Fault, index: int) -> None:
        what = f"frame {index} of {self._name}" if fault is not self._shortfall else self._name
        warnings.warn(f"{what} {fault.why}; the video ends there, after {index} frames", stacklevel=2)


class _Clock:
    """Time stamps of the frames; where the file gives none, they are counted at the frame rate."""

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


def _frame_rate(stream: VideoStream) -> Fraction | None:
    return stream.average_rate or stream.guessed_rate or None

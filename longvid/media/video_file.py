"""Media files as sources: frames in decoder order, with the time stamps of the file."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar, Unpack

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.frames import FrameBlock, SourceInfo, Times, frame_digest
from longvid.media.arrays import FrameSource, Reading
from longvid.media.decoding.aperture import clean_aperture
from longvid.media.decoding.audio import describe_audio
from longvid.media.decoding.container import counted_frames, declared_end, lost_samples, pick_stream
from longvid.media.decoding.decoder import Decoder, Fault, Picture
from longvid.media.decoding.field_pictures import may_have_fields
from longvid.media.decoding.one_pass import in_one_pass, open_file
from longvid.media.decoding.seek_index import PACKETS_AHEAD, SeekIndex, SeekPoint, index_of_packets
from longvid.media.decoding.transport import is_joint
from longvid.media.decoding.unchanged import identity, is_continued, unchanged
from longvid.media.decoding.watchdog import Watchdog
from longvid.media.images.color import warn_of_hdr
from longvid.media.images.convert import REVISION, Converter, Wanted
from longvid.media.images.fields import Delivered, Fields, Whole
from longvid.media.images.orientation import OrientationTracker
from longvid.media.pipes import is_pipe
from longvid.media.timing.file_times import FileTimes
from longvid.media.timing.resampling import Instants, resampled

__all__ = ["VideoFile"]

T = TypeVar("T")

_LIBRARIES = ("libavcodec", "libavfilter", "libswscale")
_WORTH_A_SEEK = 32
"frames before the wanted one that are decoded faster than a file is opened again"


class VideoFile(FrameSource):
    """The video stream of a local media file.

    Opening reads the header and the first frame, so that ``info`` is known and a file that cannot be read is refused
    at once. Frames come in decoder order, turned upright, in RGB, each with its own time stamp; variable frame rates
    are kept. Frames before ``start`` are skipped by a seek where it is exact, and else decoded and dropped.

    Raises:
        SourceError: the file is missing, is not a video, is cut short, or holds no frames.
    """

    def __init__(self, path: str | os.PathLike[str], **reading: Unpack[Reading]) -> None:
        name = os.fspath(path)
        super().__init__("standard input" if name == "-" else name, **reading)
        size = self._size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise SourceError(f"size={size} is not (height, width) in pixels, both at least 1", kind="range")
        self._times = FileTimes(self._name, self._frame_rate)
        self.joints = self._times.joints
        self._sorts: bool | None = None
        self._at_end = False
        self._ahead: deque[Picture] = deque()
        "pictures that were decoded to describe the file"
        self._orientation = OrientationTracker()
        self._fields = Fields(self._name, self._deinterlace)
        self.one_pass, self.grows = is_pipe(name), self._follow_seconds is not None
        self._file = open_file(name, self._limits, follow_seconds=self._follow_seconds, interrupted=self._interrupted)
        self._container: InputContainer | None = None
        self._watchdog = Watchdog(self._name, self._limits.stall_seconds)
        self._file.beat = self._watchdog.beat
        try:
            self._open()
            self._describe_all()
        except BaseException:
            self.close()
            raise

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the file (if it grows, of what was read; of a pipe, of its first frame), and how it is read."""
        first = self._first_digest() if self.one_pass else None
        details = self.info.details or {}
        facts = ("stream_index", "av", "libavcodec", "libavfilter", "libswscale")
        return {
            **identity(self._file, self._watchdog, first),
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "frames": None if self._end is None else self._end - self._begin,
            "conversion": REVISION,
            "deinterlace": self._deinterlace,
            **{key: details[key] for key in facts},
            **self._converter.facts,
            **({} if self._fps is None else {"fps": str(self._fps)}),
            **({} if self._frame_rate is None else {"frame_rate": str(Fraction(self._frame_rate))}),
            "matrix": self._converter.color.info.matrix,
            "range": self._converter.color.info.range,
        }

    def grown_since(self, earlier: Mapping[str, Any]) -> bool | None:
        """Whether the file has more bytes than the one that had the fingerprint ``earlier``, and begins with those."""
        if self.one_pass or not is_continued(earlier, self.fingerprint(), self._file, self._watchdog.run):
            return None
        return self._file.current_size() > int(earlier["bytes"])

    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the frames; where decoding fails or the file has changed, SourceError is raised after those before."""
        self._start()
        first_pts = self._first_pts if self._fps is None else 0
        blocks = self._within_limits(self._blocks(first), done=first, first_pts=first_pts)
        return unchanged(blocks, self._file, self._watchdog)

    def count_frames(self) -> int:
        """By the header, or else by the packets, which are read for it."""
        if self._file.one_pass:
            raise in_one_pass(self._name)
        if self.info.num_frames and self._fps is None:
            return self.info.num_frames
        if self._fps is None:
            count = self._scan(lambda packets: sum(packet.size > 0 for packet in packets)) or 0
        else:
            length = self._scan(self._times.length) or 0
            count = self._instants.before(self._first_pts + length)
        return max(1, (count if self._end is None else min(self._end, count)) - self._begin)

    def last_duration(self) -> int | None:
        """By the file; of a frame that another one follows in the file, what it says of that frame."""
        return 1 if self._fps is not None else self._times.last_duration(at_end=self._at_end)

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

    def _open(
        self, *, frame_size: tuple[int, int] | None = None, seek: int | None = None, from_start: bool = True
    ) -> None:
        """Open the container, or open it again, at its beginning or near a time stamp."""
        if self._container is not None:
            self._container.close()
        self._container = container = self._watchdog.run(self._file.open)
        file = self._file  # the decoder refers to it alone, so that it does not keep itself alive
        self._stream = stream = pick_stream(container, self._name)
        self._limits.check_pixels(self._name, stream.codec_context.height, stream.codec_context.width)
        # the decoder is a context of its own, which does not inherit the limit given on opening
        stream.codec_context.options = {"max_pixels": str(self._limits.decoder_pixels)}
        # damaged frames are decoded reproducibly only with one thread per frame, and where frames of one picture and of
        # two follow each other, several threads call whole ones damaged
        has_fields = stream.codec_context.name == "h264" and may_have_fields(stream.codec_context.extradata)
        stream.thread_type = "AUTO" if self._on_error == "stop" and not has_fields else "SLICE"
        if seek is not None:
            self._watchdog.run(lambda: container.seek(seek, stream=stream, backward=True))
        self._decoder = Decoder(
            container,
            stream,
            name=self._name,
            num_bytes=lambda: file.num_bytes,
            run=self._watchdog.run,
            size=frame_size,
            from_start=from_start,
            any_size=self._size is not None,
            sorts=self._sorts,
            is_joint=partial(is_joint, self._file.descriptor),
        )
        self._pictures = self._orientation.follow(self._decoder.pictures())
        self._ahead.clear()
        self._times.begin(stream)

    def _describe_all(self) -> None:
        assert self._container is not None
        self._formats = self._container.format.name.split(",")
        self._shortfall = self._find_shortfall(self._container)
        if self._shortfall is not None and self._on_error == "stop":
            raise self._cut_short(self._shortfall)
        # frames of mp4 are read by its sample table; the counts of other formats are not reliable
        if "mp4" in self._formats and 0 < self._stream.frames <= self._begin and self._fps is None:
            raise self._beyond_end(self._stream.frames)
        first = self._first_frame()
        self._sorts = self._decoder.sorts
        self._times.check(first)
        if self._decoder.skipped:
            warnings.warn(
                f"{self._name} begins in the middle of a group of pictures: {self._decoder.skipped} packets were "
                "skipped, frame 0 is the first one that can be decoded whole",
                stacklevel=3,
            )
        self._limits.check_pixels(self._name, first.height, first.width)
        self._frame_size = (first.height, first.width)
        self._first_pts = self._times.clock.first(self._ahead[0].shown_at)
        wanted = Wanted(
            size=self._size, fit=self._fit, pixels=self._pixels, background=self._background, limits=self._limits
        )
        edges = clean_aperture(self._file.file, self._container, self._stream)
        self._converter = Converter(first, self._stream, wanted, self._name, edges)
        self._instants = Instants(self._fps or Fraction(1), self._times.clock.time_base, self._first_pts)
        self.info = self._describe(self._stream, first)
        self._check_known_length()
        self._converter.warn()
        if first.interlaced_frame:
            self._fields.warn()
        warn_of_hdr(self._name, self._converter.color.info)

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

    def _first_digest(self) -> str:
        picture = next(picture for picture in self._ahead if picture.frame is not None)
        assert picture.frame is not None
        return frame_digest(self._converter.convert(picture.frame, 0))

    def _cut_short(self, shortfall: Fault) -> SourceError:
        return SourceError(f"{self._name} {shortfall.why}; copy the file again", kind="truncated")

    def _error(self, fault: Fault, index: int) -> SourceError:
        num_pixels = self._stream.codec_context.height * self._stream.codec_context.width
        if isinstance(fault.cause, av.ArgumentError) and not 0 < num_pixels <= self._limits.max_pixels:
            return self._limits.exceeded("max_pixels", f"{self._name} has frames of more pixels, or of no size at all")
        if fault.kind == "geometry-changed":
            advice = "give a size that all frames are brought to (--size), or cut the file there"
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
        converter, container, clock = self._converter, self._container, self._times.clock
        counted = 0 if container is None else counted_frames(container, stream, self._file.num_bytes)
        if self._fps is not None:
            counted = math.ceil(counted * self._fps / (self._times.frame_rate or self._fps))
        return SourceInfo(
            kind="pipe" if self.one_pass else "video",
            name=self._name,
            height=converter.height,
            width=converter.width,
            num_frames=max(0, min(counted, self._end or counted) - self._begin) if counted else None,
            time_base=1 / self._fps if self._fps else clock.time_base,
            frame_rate=self._fps or self._times.frame_rate,
            timing_assumed=first.pts is None,
            color=converter.color.info,
            sample_aspect_ratio=converter.shape.pixel_aspect,
            details={
                "container": ",".join(self._formats),
                "codec": stream.codec_context.name,
                "pix_fmt": first.format.name,
                "coded_height": first.height,
                "coded_width": first.width,
                **converter.facts,
                "resized_from": converter.resized_from,
                "alpha": converter.has_alpha,
                "interlaced": first.interlaced_frame,
                "deinterlace": self._deinterlace,
                "matrix_tag": converter.color.matrix_tag,
                "audio": None if self._container is None else describe_audio(self._container),
                "bytes": None if self._file.one_pass else self._file.num_bytes,
                "start": self._begin,
                "stream_index": stream.index,
                "stream_start_time": stream.start_time,
                "stream_duration": stream.duration,
                "resampled_from": None if self._fps is None else str(self._times.frame_rate),
                "resampled_from_second": None if self._fps is None else str(self._first_pts * clock.time_base),
                "time_scale": clock.scale,
                "times_sorted": bool(self._sorts),
                "frames_in_header": stream.frames,
                "skipped_packets": self._decoder.skipped,
                "av": av.__version__,
                **{name: ".".join(map(str, av.library_versions[name])) for name in _LIBRARIES},
            },
        )

    def _blocks(self, first: int) -> Iterator[FrameBlock]:
        """Yield the frames of the window from number ``first`` on, one by one."""
        index = self._begin + first
        if index == self._end:
            return
        shown, image = None, np.empty(0, np.uint8)
        for whole, pts, valid in self._whole(index) if self._fps is None else self._resampled(index):
            if whole is not shown:
                shown, image = whole, self._converter.convert(whole.frame, index, whole.original)
            yield FrameBlock(image[None], np.array([pts], dtype=np.int64), np.array([valid], dtype=np.bool_))
            index += 1
            if index == self._end:
                return

    def _resampled(self, number: int) -> Iterator[Delivered[Whole]]:
        """The frames that are shown at the instants from ``number`` on."""
        first = 0
        if number:
            points = (
                self.index.points or self._scanned(round(self._instants.of(number) / self._times.clock.step)).points
            )
            first = max((one.frame for one in points if one.time <= self._instants.of(number)), default=0)
        duration = partial(self._times.last_duration, at_end=True)
        count = yield from resampled(self._whole(first), self._instants, number, duration)
        if count <= self._begin:
            raise self._beyond_end(count)

    def _whole(self, index: int) -> Iterator[Delivered[Whole]]:
        """Frames from number ``index`` of the file on, made whole where they are interlaced."""
        # where frames are repeated, it takes all before a frame to know what it is
        before = index if self._on_error == "conceal" else 1
        return self._fields.frames(self._from, self._again_from, index, before=before)

    def _again_from(self, index: int) -> Iterator[Delivered[VideoFrame]]:
        """Frames from number ``index`` of the file on, after some were read already."""
        self._open(frame_size=self._frame_size)
        return self._from(index)

    def _from(self, index: int) -> Iterator[Delivered[VideoFrame]]:
        """Frames from number ``index`` of the file on.

        Decoding begins at the seek point before it; the result of a seek is used only if the frame of that point comes
        out first and no frame up to ``index`` has a fault. Else the file is decoded from its start. Damaged files are
        always read from the start, since what counts as damaged depends on everything before.
        """
        pictures = self._seek(index)
        if pictures is not None:
            try:
                for delivered in self._played(pictures, index):
                    yield delivered
                    index += 1
                return
            except SourceError:  # a full read tells whether that is so
                self._check_open()
                self._open(frame_size=self._frame_size)
        count = 0
        for count, delivered in enumerate(self._played(), start=1):
            if count > index:
                yield delivered
        if count <= self._begin and self._fps is None:
            raise self._beyond_end(count)

    def _seek(self, index: int) -> Iterator[Picture] | None:
        """Pictures from frame ``index`` on behind a seek; None to decode the file from its start."""
        if index < _WORTH_A_SEEK or self._file.one_pass or self._on_error != "stop" or self.info.timing_assumed:
            return None
        points = self.index if self.index.before(index) else self._scanned(index)
        point = points.before(index)
        if point is None or point.frame < _WORTH_A_SEEK:
            return None
        for seek in (True, False):
            pictures = self._sought(point, index, points.stamps, seek=seek)
            if pictures is not None:
                return pictures
        self._open(frame_size=self._frame_size)
        return None

    def _scanned(self, index: int) -> SeekIndex:
        """The seek points up to a frame by the packets of the file, which are read for it and not decoded."""
        codec, most = self._stream.codec_context, index + PACKETS_AHEAD
        if self._sorts or self._times.clock.scale != 1:
            return SeekIndex()
        return self._scan(lambda packets: index_of_packets(itertools.islice(packets, most), codec)) or SeekIndex()

    def _scan(self, find: Callable[[Iterator[Packet[Any]]], T]) -> T | None:
        """What is found in the packets of the file, which are read and not decoded; None if they cannot be read."""
        with self._watchdog.run(self._file.open) as container:
            stream = pick_stream(container, self._name)

            def packets() -> Iterator[Packet[Any]]:
                for packet in container.demux(stream):
                    self._watchdog.beat()
                    yield packet

            try:
                found: T = self._watchdog.run(lambda: find(packets()))
                return found
            except (av.FFmpegError, OSError) as exc:
                if isinstance(exc, SourceError):
                    raise
                return None

    def _sought(self, point: SeekPoint, index: int, stamps: Times | None, *, seek: bool) -> Iterator[Picture] | None:
        """Pictures from frame ``index`` on, decoded from a seek point at it or before it; None if they may differ from
        those of a full read. Without ``seek`` the packets before the point are read and not decoded."""
        try:
            self._open(frame_size=self._frame_size, seek=point.pts if seek else None, from_start=False)
            if not self._decoder.skip_to(point):
                return None
            number = point.frame - 1
            for picture in self._pictures:
                if number < point.frame and self._times.is_before(picture, point):
                    continue  # pictures that are predicted from earlier ones
                number += 1
                if (
                    picture.frame is None
                    or picture.fault is not None
                    or (number == point.frame and not self._times.is_at(picture, point))
                    or (stamps is not None and picture.pts not in stamps[number : number + 1])
                ):
                    return None
                if number == index:
                    return itertools.chain([picture], self._pictures)
                self._times.stamp(picture, number)
        except (av.FFmpegError, OSError) as exc:
            if isinstance(exc, SourceError) and exc.kind == "stalled":
                raise
        return None

    def _played(self, pictures: Iterator[Picture] | None = None, index: int = 0) -> Iterator[Delivered[VideoFrame]]:
        """Every frame from ``index`` on with its time stamp and validity.

        Damaged and lost frames are handled as ``on_error`` says; a frame that is repeated is the same object again.
        """
        good: VideoFrame | None = None
        waiting: list[int] = []
        "time stamps of bad pictures before the first good one"
        clock = self._times.clock
        for picture in pictures or self._with_ahead():
            stamp = self._times.stamp(picture, index)
            fault, frame = picture.fault, picture.frame
            if fault is None and frame is not None:
                good = frame
                if frame.key_frame and picture.position is not None and picture.pts is not None:
                    self.index.add(SeekPoint(index, picture.pts, picture.position, stamp, clock.offset))
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
                self._note_damage(index)
                waiting.append(stamp)
            else:
                self._note_damage(index)
                yield good, stamp, False
            index += 1
            del picture, frame
            self._check_open()
        self._at_end = True
        if waiting:
            raise SourceError(f"{self._name} has no frame without damage", kind="damaged")
        if self._container is not None and self._file.one_pass and {"mp4", "matroska"} & {*self._formats}:
            self._shortfall = self._find_shortfall(self._container)
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

    def _note_damage(self, index: int) -> None:
        self.damage = index if self.damage is None else self.damage

    def _warn_of_end(self, fault: Fault, index: int) -> None:
        self._note_damage(index)
        what = f"frame {index} of {self._name}" if fault is not self._shortfall else self._name
        warnings.warn(f"{what} {fault.why}; the video ends there, after {index} frames", stacklevel=2)

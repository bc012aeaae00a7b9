"""Media files as sources: frames in decoder order, with the time stamps of the file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar, Unpack

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.frames import FrameBlock, SourceInfo, frame_digest
from longvid.media.audio import describe_audio
from longvid.media.decoding.aperture import clean_aperture
from longvid.media.decoding.container import counted_frames
from longvid.media.decoding.one_pass import in_one_pass, open_file
from longvid.media.decoding.unchanged import identity, is_continued, unchanged
from longvid.media.file_reader import FileReader
from longvid.media.frame_source import FrameSource, Reading
from longvid.media.images.color import warn_of_hdr
from longvid.media.images.convert import REVISION, Converter, Wanted
from longvid.media.images.fields import Delivered, Fields, Whole
from longvid.media.pipes import is_pipe
from longvid.media.timing.clock import Joint
from longvid.media.timing.resampling import Instants, resampled

__all__ = ["VideoFile"]

T = TypeVar("T")

_LIBRARIES = ("libavcodec", "libavfilter", "libswscale")


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
        self._fields = Fields(self._name, self._deinterlace)
        self.one_pass, self.grows = is_pipe(name), self._follow_seconds is not None
        file = open_file(name, self._limits, follow_seconds=self._follow_seconds, interrupted=self._interrupted)
        self._reader = FileReader(
            file,
            self._name,
            limits=self._limits,
            on_error=self._on_error,
            frame_rate=self._frame_rate,
            any_size=self._size is not None,
        )
        self.index = self._reader.index
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def joints(self) -> dict[int, Joint]:
        """Places where the time stamps do not continue, by the number of the frame, as far as the file was read."""
        return self._reader.times.joints

    @property
    def damage(self) -> int | None:
        """The first frame at which ``on_error`` decided what comes out, as far as the file was read."""
        return self._reader.damage

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the file (if it grows, of what was read; of a pipe, of its first frame), and how it is read."""
        first = frame_digest(self._converter.convert(self._reader.first_frame, 0)) if self.one_pass else None
        details = self.info.details or {}
        facts = ("stream_index", "av", "libavcodec", "libavfilter", "libswscale")
        return {
            **identity(self._reader.file, self._reader.watchdog, first),
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "frames": None if self._end is None else self._end - self._begin,
            "conversion": REVISION,
            "deinterlace": self._deinterlace,
            **{key: details[key] for key in facts},
            **self._converter.facts,
            **({} if self._fps is None else {"fps": str(self._fps)}),
            **({} if self._frame_rate is None else {"frame_rate": str(self._frame_rate)}),
            "matrix": self._converter.color.info.matrix,
            "range": self._converter.color.info.range,
        }

    def grown_since(self, earlier: Mapping[str, Any]) -> bool | None:
        """Whether the file has more bytes than the one that had the fingerprint ``earlier``, and begins with those."""
        if self.one_pass or not is_continued(earlier, self.fingerprint(), self._reader.file, self._reader.watchdog.run):
            return None
        return self._reader.file.current_size() > int(earlier["bytes"])

    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the frames; where decoding fails or the file has changed, SourceError is raised after those before."""
        self._start()
        first_pts = self._reader.first_pts if self._fps is None else 0
        blocks = self._within_limits(self._blocks(first), done=first, first_pts=first_pts)
        return unchanged(blocks, self._reader.file, self._reader.watchdog)

    def count_frames(self) -> int:
        """By the header, or else by the packets, which are read for it."""
        if self.one_pass:
            raise in_one_pass(self._name)
        if self.info.num_frames and self._fps is None:
            return self.info.num_frames
        if self._fps is None:
            count = self._reader.count_packets()
        else:
            count = self._instants.before(self._reader.first_pts + self._reader.length())
        return max(1, (count if self._end is None else min(self._end, count)) - self._begin)

    def last_duration(self) -> int | None:
        """As the file says of the last frame that was read."""
        return 1 if self._fps is not None else self._reader.times.last_duration(at_end=self._reader.at_end)

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            super().close()
            self._reader.close()

    def _prepare(self) -> None:
        """Decide by the first frame what all frames become."""
        reader = self._reader
        if 0 < reader.declared_frames <= self._begin and self._fps is None:
            raise self._beyond_end(reader.declared_frames)
        assert reader.container is not None
        first = reader.first_frame
        wanted = Wanted(
            size=self._size, fit=self._fit, pixels=self._pixels, background=self._background, limits=self._limits
        )
        edges = clean_aperture(reader.file.file, reader.container, reader.stream)
        self._converter = Converter(first, reader.stream, wanted, self._name, edges)
        self._instants = Instants(self._fps or Fraction(1), reader.times.clock.time_base, reader.first_pts)
        self.info = self._describe(reader.container, reader.stream, first)
        self._check_known_length()
        self._converter.warn()
        if first.interlaced_frame:
            self._fields.warn()
        self._fields.warn_of_header(reader.stream.codec_context)
        warn_of_hdr(self._name, self._converter.color.info)

    def _describe(self, container: InputContainer, stream: VideoStream, first: VideoFrame) -> SourceInfo:
        converter, reader, clock = self._converter, self._reader, self._reader.times.clock
        counted = counted_frames(container, stream, reader.file.num_bytes)
        if self._fps is not None:
            counted = math.ceil(counted * self._fps / (reader.times.frame_rate or self._fps))
        return SourceInfo(
            kind="pipe" if self.one_pass else "video",
            name=self._name,
            height=converter.height,
            width=converter.width,
            num_frames=max(0, min(counted, self._end or counted) - self._begin) if counted else None,
            time_base=1 / self._fps if self._fps else clock.time_base,
            frame_rate=self._fps or reader.times.frame_rate,
            timing_assumed=first.pts is None,
            color=converter.color.info,
            sample_aspect_ratio=converter.shape.pixel_aspect,
            details={
                "container": ",".join(reader.formats),
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
                "audio": describe_audio(container),
                "bytes": None if self.one_pass else reader.file.num_bytes,
                "start": self._begin,
                "stream_index": stream.index,
                "stream_start_time": stream.start_time,
                "stream_duration": stream.duration,
                "resampled_from": None if self._fps is None else str(reader.times.frame_rate),
                "resampled_from_second": None if self._fps is None else str(reader.first_pts * clock.time_base),
                "time_scale": clock.scale,
                "times_sorted": bool(reader.sorts),
                "frames_in_header": stream.frames,
                "skipped_packets": reader.skipped_packets,
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
        if self._fps is None and self._reader.num_frames <= self._begin:
            raise self._beyond_end(self._reader.num_frames)

    def _resampled(self, number: int) -> Iterator[Delivered[Whole]]:
        """The frames that are shown at the instants from ``number`` on."""
        first = self._reader.key_frame_before(self._instants.of(number)) if number else 0
        duration = partial(self._reader.times.last_duration, at_end=True)
        count = yield from resampled(self._whole(first), self._instants, number, duration)
        if count <= self._begin:
            raise self._beyond_end(count)

    def _whole(self, index: int) -> Iterator[Delivered[Whole]]:
        """Frames from number ``index`` of the file on, made whole where they are interlaced."""
        # where frames are repeated, it takes all before a frame to know what it is
        before = index if self._on_error == "conceal" else 1
        return self._fields.frames(self._reader.frames, self._reader.frames_again, index, before=before)

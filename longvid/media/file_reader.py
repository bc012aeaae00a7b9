"""Reads the pictures of one media file, each with its time, from any of them on."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame

from longvid.errors import SourceError
from longvid.frames import OnError, Times
from longvid.media.decoding.container import declared_end, lost_samples, pick_stream
from longvid.media.decoding.decoder import Decoder, Fault, Picture
from longvid.media.decoding.ends import next_recording
from longvid.media.decoding.field_pictures import may_have_fields
from longvid.media.decoding.last_pictures import is_cut_off
from longvid.media.decoding.media_file import MediaFile
from longvid.media.decoding.seek_index import PACKETS_AHEAD, SeekIndex, SeekPoint, index_of_packets
from longvid.media.decoding.transport import is_joint
from longvid.media.decoding.watchdog import Watchdog
from longvid.media.images.fields import Delivered
from longvid.media.images.orientation import OrientationTracker
from longvid.media.limits import Limits
from longvid.media.timing.file_times import FileTimes

__all__ = ["FileReader"]

T = TypeVar("T")

_WORTH_A_SEEK = 32
"frames before the wanted one that are decoded faster than a file is opened again"


class FileReader:
    """The pictures of the video stream of an open file, in the order in which they are shown.

    It owns the container, its decoder and the clock of the file, opens the container again where reading begins at
    another place, and decides by ``on_error`` what damaged pictures become. Opening decodes up to the first frame, so
    that a file that cannot be read is refused at once. The file is closed with the reader.

    ``frame_rate`` is for files without time stamps. With ``any_size`` frames may change their size.

    Raises:
        SourceError: the file is not a video, is cut short, or holds no frames.
    """

    def __init__(
        self,
        file: MediaFile,
        name: str,
        *,
        limits: Limits,
        on_error: OnError,
        frame_rate: Fraction | None,
        any_size: bool,
    ) -> None:
        self.file, self._name, self._limits, self._on_error, self._any_size = file, name, limits, on_error, any_size
        self.times = FileTimes(name, frame_rate)
        self.index = SeekIndex()
        "the seek points that are known; more are found as frames are read"
        self.damage: int | None = None
        "the first frame at which ``on_error`` decided what comes out, as far as the file was read"
        self.at_end = False
        "whether the file was read to its end"
        self.num_frames = 0
        "how many the file has, once it was read to where it ends or is damaged"
        self.sorts: bool | None = None
        "whether times are made from the order of the pictures, which the container does not store"
        self._ahead: deque[Picture] = deque()
        "pictures that were decoded to describe the file"
        self._orientation = OrientationTracker()
        self._frame_size: tuple[int, int] | None = None
        self.container: InputContainer | None = None
        self.watchdog = Watchdog(name, limits.stall_seconds)
        file.beat = self.watchdog.beat
        self._closed = False
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Open the file and decode its first frame."""
        self._open()
        assert self.container is not None
        self.formats: list[str] = self.container.format.name.split(",")
        self._shortfall = self._find_shortfall(self.container)
        if self._shortfall is not None and self._on_error == "stop":
            raise self._cut_short(self._shortfall)
        first = self._decode_first()
        self.sorts = self._decoder.sorts
        self.times.check(first)
        if self._decoder.skipped:
            warnings.warn(
                f"{self._name} begins in the middle of a group of pictures: {self._decoder.skipped} packets were "
                "skipped, frame 0 is the first one that can be decoded whole",
                stacklevel=5,
            )
        self._limits.check_pixels(self._name, first.height, first.width)
        self._frame_size = (first.height, first.width)
        self.first_pts = self.times.clock.first(self._ahead[0].shown_at)
        "when the first frame is shown, in units of the clock"
        self.skipped_packets = self._decoder.skipped
        "packets before the first frame, which need pictures that the file does not hold"

    @property
    def first_frame(self) -> VideoFrame:
        """The first frame that was decoded, until the frames are read."""
        return next(picture.frame for picture in self._ahead if picture.frame is not None)

    @property
    def declared_frames(self) -> int:
        """By a header that is right about it, which is the sample table of mp4; 0 if there is none."""
        return self.stream.frames if "mp4" in self.formats else 0

    def frames(self, index: int) -> Iterator[Delivered[VideoFrame]]:
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

    def frames_again(self, index: int) -> Iterator[Delivered[VideoFrame]]:
        """The same, after some were read already."""
        self._open(frame_size=self._frame_size)
        return self.frames(index)

    def key_frame_before(self, time: Fraction) -> int:
        """The number of the last known seek point that is shown at a time of the clock or before it."""
        points = self.index.points or self._scanned(round(time / self.times.clock.step)).points
        return max((one.frame for one in points if one.time <= time), default=0)

    def count_packets(self) -> int:
        """The pictures of the file by its packets, which are read for it; 0 if they cannot be read."""
        return self._scan(lambda packets: sum(packet.size > 0 for packet in packets)) or 0

    def length(self) -> int:
        """The length of the video by its packets, in units of the clock; 0 if they cannot be read."""
        return self._scan(self.times.length) or 0

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        self._ahead.clear()
        self.watchdog.close()
        if self.container is not None and not self.watchdog.stalled:  # an abandoned thread still uses it
            self.container.close()
        self.file.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SourceError(f"{self._name} is closed; open the source again to read its frames")

    def _open(
        self, *, frame_size: tuple[int, int] | None = None, seek: int | None = None, from_start: bool = True
    ) -> None:
        """Open the container, or open it again, at its beginning or near a time stamp."""
        if self.container is not None:
            self.container.close()
        self.container = container = self.watchdog.run(self.file.open)
        file, limits = self.file, self._limits  # the decoder refers to them, so that it does not keep itself alive
        self.stream = stream = pick_stream(container, self._name)
        self._limits.check_pixels(self._name, stream.codec_context.height, stream.codec_context.width)
        # the decoder is a context of its own, which does not inherit the limit given on opening
        stream.codec_context.options = {"max_pixels": str(self._limits.decoder_pixels)}
        # damaged frames are decoded reproducibly only with one thread per frame, and where frames of one picture and of
        # two follow each other, several threads call whole ones damaged
        has_fields = stream.codec_context.name == "h264" and may_have_fields(stream.codec_context.extradata)
        stream.thread_type = "AUTO" if self._on_error == "stop" and not has_fields else "SLICE"
        if seek is not None:
            self.watchdog.run(lambda: container.seek(seek, stream=stream, backward=True))
        self._decoder = Decoder(
            container,
            stream,
            name=self._name,
            num_bytes=lambda: file.num_bytes,
            run=self.watchdog.run,
            size=frame_size,
            from_start=from_start,
            any_size=self._any_size,
            sorts=self.sorts,
            is_joint=partial(is_joint, file.descriptor),
            is_cut_off=lambda packet: (
                not file.one_pass and is_cut_off(packet, file.descriptor, file.open, limits.decoder_pixels)
            ),
        )
        self._pictures = self._orientation.follow(self._decoder.pictures())
        self._ahead.clear()
        self.times.begin(stream)

    def _decode_first(self) -> VideoFrame:
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
        num_pixels = self.stream.codec_context.height * self.stream.codec_context.width
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
        end, have = declared_end(self.file.file, container, self.stream), self.file.num_bytes
        if end is not None and end > have:
            return Fault(
                "truncated",
                f"is cut short: by its header or its last block it has at least {end} bytes, and there are {have}",
            )
        lost = lost_samples(container, self.stream)
        if lost:
            return Fault("truncated", f"is cut short: {lost} of {self.stream.frames} frames lie beyond its end")
        return None

    def _seek(self, index: int) -> Iterator[Picture] | None:
        """Pictures from frame ``index`` on behind a seek; None to decode the file from its start."""
        if index < _WORTH_A_SEEK or self.file.one_pass or self._on_error != "stop" or self.times.without_stamps:
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
        codec, most = self.stream.codec_context, index + PACKETS_AHEAD
        if self.sorts:
            return SeekIndex()
        found = self._scan(lambda packets: index_of_packets(itertools.islice(packets, most), codec))
        if found is None or found.stamps is None or not self.times.clock.keeps(found.stamps):
            return SeekIndex()
        return found

    def _scan(self, find: Callable[[Iterator[Packet[Any]]], T]) -> T | None:
        """What is found in the packets of the file, which are read and not decoded; None if they cannot be read."""
        with self.watchdog.run(self.file.open) as container:
            stream = pick_stream(container, self._name)

            def packets() -> Iterator[Packet[Any]]:
                for packet in container.demux(stream):
                    self.watchdog.beat()
                    yield packet

            try:
                found: T = self.watchdog.run(lambda: find(packets()))
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
                if number < point.frame and self.times.is_before(picture, point):
                    continue  # pictures that are predicted from earlier ones
                number += 1
                if (
                    picture.frame is None
                    or picture.fault is not None
                    or (number == point.frame and not self.times.is_at(picture, point, are_sorted=bool(self.sorts)))
                    or (stamps is not None and picture.pts not in stamps[number : number + 1])
                ):
                    return None
                if number == index:
                    return itertools.chain([picture], self._pictures)
                self.times.stamp(picture, number)
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
        clock = self.times.clock
        for picture in pictures or self._with_ahead():
            stamp = self.times.stamp(picture, index)
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
                self.num_frames = index
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
        self.at_end, self.num_frames = True, index
        if waiting:
            raise SourceError(f"{self._name} has no frame without damage", kind="damaged")
        if self.container is not None and self.file.one_pass and {"mp4", "matroska"} & {*self.formats}:
            self._shortfall = self._find_shortfall(self.container)
        fault = self._decoder.rest or self._shortfall
        if fault is not None and self._on_error == "stop":
            raise self._error(fault, index)
        if fault is not None:
            self._warn_of_end(fault, index)
        else:
            self._warn_of_rest()

    def _with_ahead(self) -> Iterator[Picture]:
        while self._ahead:
            yield self._ahead.popleft()
        self._check_open()
        yield from self._pictures

    def _note_damage(self, index: int) -> None:
        self.damage = index if self.damage is None else self.damage

    def _warn_of_rest(self) -> None:
        """Say which pictures of recordings that were joined are not found."""
        how = "join the recordings with ffmpeg -f concat, or encode them one by one"
        start = None
        if not self.file.one_pass:
            start = next_recording(self.file.file, self.formats, self._decoder.reached)
        if start is not None:
            warnings.warn(
                f"another recording begins at byte {start} of {self._name}, which FFmpeg does not read: the video ends "
                f"before it; {how}",
                stacklevel=2,
            )
        if self._decoder.num_discarded:
            warnings.warn(
                f"{self._decoder.num_discarded} packets of {self._name} are left out, since the edit list of one "
                f"recording holds for another one that was joined to it; {how}",
                stacklevel=2,
            )

    def _warn_of_end(self, fault: Fault, index: int) -> None:
        self._note_damage(index)
        what = f"frame {index} of {self._name}" if fault is not self._shortfall else self._name
        warnings.warn(f"{what} {fault.why}; the video ends there, after {index} frames", stacklevel=2)

"""Decodes one video stream to pictures in the order in which they are shown, and finds the faults of each.

FFmpeg conceals damage and reports little: a frame with damaged data is flagged, frames that were predicted from it look
whole, and frames that cannot be decoded are missing. This module combines these signs with the time stamps of the
packets.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.media.decoding.container import reason
from longvid.media.decoding.ends import has_gif_picture
from longvid.media.decoding.field_pictures import is_field
from longvid.media.decoding.last_pictures import packets_without_picture
from longvid.media.decoding.lookahead import Lookahead
from longvid.media.decoding.seek_index import SeekPoint
from longvid.media.timing.stamp_order import in_decoding_order

__all__ = ["TRANSPORTS", "Decoder", "Fault", "Picture"]

TRANSPORTS = ("mpegts", "mpeg")
"containers whose stamps are those of an MPEG system clock"

_Run: TypeAlias = Callable[[Callable[[], Any]], Any]
"calls a function in a thread that can be abandoned if it hangs"
_MOST_BETWEEN = 16
"largest number of B pictures in a row in H.264"
_MOST_WAITING = 128
"pictures that change places, and threads that decode a frame each, together"
_REST = "its pixels would be the decoder's guess"
_GUESS = f"is damaged: {_REST}"
_GAP = "lies at a gap of its transport stream: packets were lost, or recordings joined"
_SILENT_PACKETS = ("mpeg4", "vp8")
"decoders that accept packets without a picture, in whole files too"
_MOST_SILENT = 2
"packets without a picture between two pictures of a whole file: fields, and frames that are only referred to"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a picture does not show what the source showed."""

    kind: str
    "``damaged``, ``truncated`` or ``geometry-changed``; the kind of the SourceError"
    why: str
    "the end of a sentence that begins with *frame 12 of a.mp4*"
    cause: Exception | None = None
    "without its traceback, which would keep the decoder and all its frames alive"


_CUT_BEGINNING = Fault(
    "damaged", "cannot be decoded: frames that it is predicted from lie before the beginning of the file"
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A frame, or the place of a frame that is missing."""

    frame: VideoFrame | None
    pts: int | None
    fault: Fault | None = None
    order: int | None = None
    "number of its packet among those decoded, if known"
    position: int | None = None
    "the byte of the file at which its packet begins, if known"
    shown_at: int | None = None
    "its time: ``pts``, or the lowest stamp that is left if the stamps of the file are in the order of decoding"

    @property
    def duration(self) -> int:
        """How long it is shown, in units of the file's time base; 0 if that is not known."""
        return 0 if self.frame is None else self.frame.duration or 0


class Decoder:
    """Decodes a stream from the position of its container.

    After a picture with a fault all pictures have a fault, up to the next whole key frame: they are predicted from each
    other. B pictures that are shown before a faulty picture and decoded after it have the same fault; they are held
    back until the picture after them is known.

    A stream may begin in the middle of a group of pictures. Then the pictures before the first one that can be decoded
    whole are left out, and :attr:`skipped` counts their packets.

    ``num_bytes`` gives the size of the file. ``run`` calls a function that can hang. ``size`` is the (height, width)
    that all frames must have, by default that of the first; with ``any_size`` they may have any. ``from_start`` says
    that decoding begins at the start of the file. ``sorts`` says that its time stamps are in the order of decoding, so
    that they have to be sorted; None to look at the first packets. ``is_joint`` tells by the bytes at which two packets
    of a transport stream begin whether a gap in between is a joint, where nothing is lost. ``is_cut_off`` tells whether
    the last packet of one holds a part of a picture only.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        *,
        name: str,
        num_bytes: Callable[[], int],
        run: _Run,
        size: tuple[int, int] | None = None,
        from_start: bool = True,
        any_size: bool = False,
        sorts: bool | None = None,
        is_joint: Callable[[int, int | None], bool] = lambda first, last: False,
        is_cut_off: Callable[[Packet[Any]], bool] = lambda packet: False,
    ) -> None:
        self._packets: Lookahead[Packet[Any]] = Lookahead(container.demux(stream))
        stream.codec_context.copy_opaque = True  # a frame tells its packet, also where a time stamp comes twice
        self._is_plain = container.format.name == "yuv4mpegpipe"
        self._is_gif = container.format.name == "gif"
        self._is_transport = container.format.name in TRANSPORTS
        self.sorts = sorts
        self._stamps: list[int] = []
        "a heap of the stamps of packets whose pictures have not come yet, if they are sorted"
        self._has_samples = "mp4" in container.format.name.split(",")
        self._stream, self._name, self._size = stream, name, size
        self._num_bytes, self._run = num_bytes, run
        self._from_start, self._any_size = from_start, any_size
        self._is_joint, self._is_cut_off = is_joint, is_cut_off
        self._tells_nothing = self._is_transport and stream.codec_context.name == "hevc"
        "the decoder does not say that a picture is cut"
        self._one_by_one = stream.codec_context.thread_type.name == "SLICE"
        "the decoder has one thread per frame, so that an error belongs to the last packet"
        self.reached = 0
        "behind the last byte of the packets that were read"
        self.num_discarded = 0
        "packets that the edit list of one recording leaves out of another one that was joined to it"
        self._num_packets = 0
        self._leading = 0
        "packets before the first key frame"
        self._key_seen = self._begun = False
        self._left_out: deque[int] = deque(maxlen=4 * _MOST_BETWEEN)
        "the last pictures before the first whole one that were left out, by the number of their packet"
        self.skipped = 0
        "packets at the beginning of the file that cannot be decoded, known with the first picture"
        self._last: Packet[Any] | None = None
        self._waiting: dict[int, int] = {}
        "packets whose frames have not come yet: order by time stamp"
        self._shown: int | None = None
        self._num_silent = 0
        "packets without a picture before the last frame: one in a file whose frames are two fields, also at its end"
        self._failed: dict[int | None, str] = {}
        "packets known to be damaged: reason by time stamp"
        self._failure: Fault | None = None
        "the decoder reported an error that no picture has been blamed for yet"
        self._zone: Fault | None = None
        "all pictures up to the next key frame have this fault"
        self.rest: Fault | None = None
        "why reading ended, if not at the end of the file"

    def skip_to(self, point: SeekPoint) -> bool:
        """Begin with the packet of a seek point; whether it was found ahead. Packets before it are not decoded."""
        while ahead := self._run(lambda: self._packets.peek(1)):
            packet = ahead[0]
            if packet.pos is not None and packet.pos > point.position and packet.pts is not None:
                return False
            if packet.is_keyframe and (packet.pts, packet.pos) == (point.pts, point.position):
                return True
            next(self._packets)
        return False

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures in the order in which they are shown; once.

        Raises:
            SourceError: the decoder hangs, or has not enough memory.
        """
        held: list[Picture] = []
        for picture in self._judged():
            if picture.fault is None and picture.frame is not None and picture.frame.pict_type == PictureType.B:
                held.append(picture)
                if len(held) > _MOST_BETWEEN:
                    yield held.pop(0)
                continue
            yield from _with_share(held, picture)
            held.clear()
            yield picture
        yield from held

    def _judged(self) -> Iterator[Picture]:
        for frame in self._frames():
            if frame is None:
                if not self._leaves_out(None):
                    yield Picture(None, None, self._blame(), shown_at=self._lowest(None))
                continue
            label: Any = frame.opaque
            order, position = label or (None, None)
            if frame.pts is not None:
                self._waiting.pop(frame.pts, None)
            yield from self._missing_before(frame, order)
            picture = replace(self._judge(frame, order), position=position, shown_at=self._lowest(frame.pts))
            if picture.fault is not None and self._leaves_out(order):
                continue
            self._begin(order)
            yield picture
            self._shown = frame.pts if frame.pts is not None else self._shown
        yield from self._missing(None)
        if self._is_plain and self.reached < self._num_bytes():  # its demuxer takes an incomplete frame for the end
            self.rest = self.rest or Fault("truncated", "is not there as a whole: the file is cut short")
        if self._failure is not None:  # no picture was blamed for it
            self.rest = self.rest or self._failure

    def _leaves_out(self, order: int | None) -> bool:
        """Whether a picture with a fault is left out, since the file begins in the middle of a group of pictures."""
        if self._begun or not self._from_start or not self._leading:
            return False
        self._left_out.append(-1 if order is None else order)
        self._failure = None
        return True

    def _begin(self, order: int | None) -> None:
        """Note the first picture that comes out, and count what was left out before it."""
        if not self._begun and self._from_start and (self._leading or self._left_out):
            before = self._leading if order is None else order
            self.skipped = before + sum(number > before for number in self._left_out)
        self._begun = True
        self._left_out.clear()

    def _missing_before(self, frame: VideoFrame, order: int | None) -> Iterator[Picture]:
        if frame.pts is None:
            return
        if self.sorts and self._begun:
            return
        if self._shown is not None and frame.pts < self._shown:
            self._shown = None  # two recordings in a row: time begins again
        yield from self._missing(frame.pts, order)

    def _missing(self, before: int | None, order: int | None = None) -> Iterator[Picture]:
        """Places of packets whose time has passed without a frame; they count only where a fault is known, since whole
        files have such packets too."""
        after, quiet = self._shown, self._one_by_one or self._stream.codec_context.name in _SILENT_PACKETS
        stamps = sorted(p for p in self._waiting if (after is None or p > after) and (before is None or p < before))
        if not self._begun and stamps and before is not None:
            numbers = [self._waiting[p] for p in stamps]
            # pictures that are shown before the first key frame and predicted from one before it, too
            is_cut = self._leading > 0 or (order is not None and min(numbers) > order)
            if not self._from_start or is_cut:
                self._waiting = {p: number for p, number in self._waiting.items() if p not in stamps}
                self._left_out.extend(numbers)
                self._failure = None if self._from_start else self._failure
                return
            self._zone = self._failure or _CUT_BEGINNING
        elif before is None and len(stamps) > self._num_silent and self._begun and not quiet:
            # frame threads that fail while they are flushed end without an error
            if len(stamps) > self._num_silent + self._ends_with_field():
                self._zone = self._zone or Fault(self._kind(), "and what follows gave no picture: the data are damaged")
        elif len(stamps) > _MOST_SILENT:
            self._blame()
        self._num_silent = len(stamps)
        for stamp in stamps:
            number = self._waiting.pop(stamp)
            if self._zone is not None or self._failure is not None:
                yield Picture(None, stamp, self._blame(), number, shown_at=stamp)

    def _ends_with_field(self) -> bool:
        """Whether the last packet is one of two fields of a frame, which came out with the other one."""
        context, last = self._stream.codec_context, self._last
        return context.name == "h264" and last is not None and is_field(bytes(last), context.extradata)

    def _blame(self) -> Fault:
        """The fault of a missing picture, which holds for all pictures from here on."""
        self._zone = self._zone or self._failure or Fault(self._kind(), "gave no picture: its data are damaged")
        self._failure = None
        return self._zone

    def _judge(self, frame: VideoFrame, order: int | None) -> Picture:
        size = (frame.height, frame.width)
        self._size = self._size or size
        if size != self._size and not self._any_size:
            self._zone = Fault(
                "geometry-changed",
                f"has {size[1]}x{size[0]} pixels where the frames before have {self._size[1]}x{self._size[0]}",
            )
        elif frame.is_corrupt or frame.pts in self._failed:
            self._failure = None
            self._zone = Fault(self._kind(), self._failed.pop(frame.pts, _GUESS))
        elif self._zone is not None and frame.key_frame:
            self._zone = self._failure = None
        elif not self._begun and self._from_start and self._leading and not frame.key_frame:
            self._zone = _CUT_BEGINNING
        return Picture(frame, frame.pts, self._zone, order)

    def _kind(self) -> str:
        return "truncated" if self.reached >= self._num_bytes() else "damaged"

    def _frames(self) -> Iterator[VideoFrame | None]:
        """Yield decoded frames, and None for a packet that failed and has no time stamp."""
        while True:
            try:
                frames = self._run(self._step)
            except SourceError:  # the watchdog's
                raise
            except av.ExitError as exc:
                raise SourceError(
                    f"{self._name} could not be read for a long time; check its disk", kind="stalled"
                ) from exc
            except (av.MemoryError, av.BlockingIOError) as exc:
                raise SourceError(
                    f"there is not enough memory, or no thread, to decode {self._name}; end other programs"
                ) from exc
            except (av.FFmpegError, OSError) as exc:
                self.rest = Fault(
                    self._kind(), f"and what follows cannot be read: {reason(exc)}", exc.with_traceback(None)
                )
                yield from self._run(self._emptied)
                return
            if frames is None:
                return
            yield from frames

    def _step(self) -> list[VideoFrame | None] | None:
        if self.sorts is None:
            reorders = not self._is_transport and bool(self._stream.codec_context.has_b_frames)
            self.sorts = reorders and in_decoding_order(self._packets, self._has_samples)
        packet: Packet[Any] | None = next(self._packets, None)
        if packet is None:
            return None
        self.reached = max(self.reached, (packet.pos or 0) + packet.size)
        if self._is_gif and packet.size and not has_gif_picture(bytes(packet)):
            return []
        if packet.size:
            self._register(packet)
        elif packet.pts is not None or packet.dts is not None:
            return []  # an empty entry of an AVI file, which the decoder would take for the end
        before = [] if packet.size else self._of_threads()
        try:
            return before + list(packet.decode())
        except (av.MemoryError, av.BlockingIOError, av.ExitError):
            raise
        except (av.FFmpegError, OSError) as exc:
            self._failure = Fault(self._kind(), f"cannot be decoded: {reason(exc)}", exc.with_traceback(None))
            if packet.pts is None or self.sorts:
                if packet.pts is not None:
                    self._waiting.pop(packet.pts, None)
                return [None] if packet.size else before
            if self._one_by_one:
                self._failed[packet.pts] = _GUESS
            return []

    def _of_threads(self) -> list[VideoFrame | None]:
        """The frames that are ready when all threads are done, at the end of the file."""
        frames: list[VideoFrame | None] = []
        for packet in packets_without_picture(self._stream.codec_context):
            try:
                frames += self._stream.codec_context.decode(packet)
            except (av.MemoryError, av.BlockingIOError, av.ExitError):
                raise
            except (av.FFmpegError, OSError) as exc:  # of a packet before
                self._failure = Fault(self._kind(), f"cannot be decoded: {reason(exc)}", exc.with_traceback(None))
        return frames

    def _register(self, packet: Packet[Any]) -> None:
        self._key_seen = self._key_seen or packet.is_keyframe or (not self._num_packets and self._should_begin())
        self._leading += not self._key_seen
        self._last = packet
        packet.opaque = self._num_packets, packet.pos
        if packet.pts is not None and not packet.is_discard:  # an edit list may leave packets out
            self._waiting[packet.pts] = self._num_packets
            if self.sorts:
                self._sort_in(packet.pts)
            if packet.is_corrupt and not self._precedes_joint(packet):  # at a gap, which the decoder does not see
                self._failed[packet.pts] = _GAP if self._is_transport else "is not there as a whole"
            elif self._tells_nothing and self._is_last() and self._is_cut_off(packet):
                self._failed[packet.pts] = f"is cut off: {_REST}"
        starts_again = packet.pts is not None and self._shown is not None and packet.pts <= self._shown
        self.num_discarded += packet.is_discard and starts_again
        self._num_packets += 1

    def _is_last(self) -> bool:
        """Whether no packet with a picture follows."""
        return not any(one.size for one in self._packets.peek(1))

    def _lowest(self, pts: int | None) -> int | None:
        """The stamp at which a picture is shown whose own one is ``pts``."""
        return heapq.heappop(self._stamps) if self._stamps else pts

    def _sort_in(self, pts: int) -> None:
        heapq.heappush(self._stamps, pts)
        if len(self._stamps) > _MOST_WAITING:  # of a picture that was lost
            heapq.heappop(self._stamps)
            oldest = min(self._waiting, key=self._waiting.__getitem__)
            if len(self._waiting) > _MOST_WAITING:
                del self._waiting[oldest]

    def _should_begin(self) -> bool:
        """Whether an index says that the first sample is a key frame, whatever its damaged data look like."""
        entries: Any = self._stream.index_entries if self._has_samples else []
        return len(entries) > 0 and bool(entries[0].is_keyframe)

    def _precedes_joint(self, packet: Packet[Any]) -> bool:
        """Whether a gap of a transport stream is a joint; the packet that is marked may be the one before."""
        places = [one.pos for one in self._packets.peek(2) if one.size]
        last = places[1] if len(places) > 1 else None
        return packet.pos is not None and None not in places and self._is_joint(packet.pos, last)

    def _emptied(self) -> list[VideoFrame | None]:
        before = self._of_threads()
        try:
            return before + list(self._stream.codec_context.decode(None))
        except (av.FFmpegError, OSError):
            return before


def _with_share(held: list[Picture], picture: Picture) -> Iterator[Picture]:
    """The B pictures before ``picture``; from the first that was decoded after it on, they share its fault."""
    shares = False
    for earlier in held:
        fault = picture.fault
        if fault is not None and fault.kind != "geometry-changed":
            known = earlier.order is not None and picture.order is not None
            shares = shares or not known or (earlier.order or 0) > (picture.order or 0)
        yield replace(earlier, fault=fault) if shares else earlier

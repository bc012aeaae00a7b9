"""Decodes one video stream to pictures in the order in which they are shown, and finds the faults of each.

FFmpeg conceals damage and reports little: a frame with damaged data is flagged, frames that were predicted from it look
whole, and frames that cannot be decoded are missing. This module combines these signs with the time stamps of the
packets.
"""

from __future__ import annotations

import itertools
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
from longvid.media.decoding.seek_index import SeekPoint

__all__ = ["Decoder", "Fault", "Picture"]

_Run: TypeAlias = Callable[[Callable[[], Any]], Any]
"calls a function in a thread that can be abandoned if it hangs"
_MOST_BETWEEN = 16
"largest number of B pictures in a row in H.264"
_GUESS = "is damaged: its pixels would be the decoder's guess"
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


class Decoder:
    """Decodes a stream from the position of its container.

    After a picture with a fault all pictures have a fault, up to the next whole key frame: they are predicted from each
    other. B pictures that are shown before a faulty picture and decoded after it have the same fault; they are held
    back until the picture after them is known.

    ``num_bytes`` gives the size of the file. ``run`` calls a function that can hang. ``size`` is the (height, width)
    that all frames must have, by default that of the first; with ``any_size`` they may have any. ``from_start`` says
    whether pictures that cannot be decoded at the beginning count as faults.
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
    ) -> None:
        self._packets: Iterator[Packet[Any]] = container.demux(stream)
        stream.codec_context.copy_opaque = True  # a frame tells its packet, also where a time stamp comes twice
        self._is_plain = container.format.name == "yuv4mpegpipe"
        self._stream = stream
        self._name = name
        self._num_bytes = num_bytes
        self._run = run
        self._size = size
        self._from_start = from_start
        self._any_size = any_size
        self._one_by_one = stream.codec_context.thread_type.name == "SLICE"
        "the decoder has one thread per frame, so that an error belongs to the last packet"
        self._reached = 0
        self._num_packets = 0
        self._leading = 0
        self._key_seen = self._begun = False
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
        while (packet := self._run(lambda: next(self._packets, None))) is not None:
            if packet.pos is not None and packet.pos > point.position and packet.pts is not None:
                return False
            if packet.is_keyframe and (packet.pts, packet.pos) == (point.pts, point.position):
                self._packets = itertools.chain([packet], self._packets)
                return True
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
                yield Picture(None, None, self._blame())
                continue
            label: Any = frame.opaque
            order, position = label or (None, None)
            if frame.pts is not None:
                self._waiting.pop(frame.pts, None)
            yield from self._missing_before(frame)
            yield replace(self._judge(frame, order), position=position)
            self._shown = frame.pts if frame.pts is not None else self._shown
            self._begun = True
        yield from self._missing(None)
        if self._is_plain and self._reached < self._num_bytes():  # its demuxer takes an incomplete frame for the end
            self.rest = self.rest or Fault("truncated", "is not there as a whole: the file is cut short")
        if self._failure is not None:  # no picture was blamed for it
            self.rest = self.rest or self._failure

    def _missing_before(self, frame: VideoFrame) -> Iterator[Picture]:
        if frame.pts is None:
            if not self._begun and self._from_start and frame.key_frame and self._leading:
                self._zone = _CUT_BEGINNING
                for _ in range(self._leading):
                    yield Picture(None, None, self._zone)
            return
        if self._shown is not None and frame.pts < self._shown:
            self._shown = None  # two recordings in a row: time begins again
        yield from self._missing(frame.pts)

    def _missing(self, before: int | None) -> Iterator[Picture]:
        """Places of packets whose time has passed without a frame; they count only where a fault is known, since whole
        files have such packets too."""
        after, quiet = self._shown, self._one_by_one or self._stream.codec_context.name in _SILENT_PACKETS
        stamps = sorted(p for p in self._waiting if (after is None or p > after) and (before is None or p < before))
        if not self._begun and stamps and before is not None:
            if not self._from_start:
                self._waiting = {p: order for p, order in self._waiting.items() if p not in stamps}
                return
            self._zone = self._failure or _CUT_BEGINNING
        elif before is None and len(stamps) > self._num_silent and self._begun and not quiet:
            # frame threads that fail while they are flushed end without an error
            self._zone = self._zone or Fault(self._kind(), "and what follows gave no picture: the data are damaged")
        elif len(stamps) > _MOST_SILENT:
            self._blame()
        self._num_silent = len(stamps)
        for stamp in stamps:
            order = self._waiting.pop(stamp)
            if self._zone is not None or self._failure is not None:
                yield Picture(None, stamp, self._blame(), order)

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
        elif not self._begun and self._from_start and not self._key_seen and not frame.key_frame:
            self._zone = _CUT_BEGINNING
        return Picture(frame, frame.pts, self._zone, order)

    def _kind(self) -> str:
        return "truncated" if self._reached >= self._num_bytes() else "damaged"

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
        packet: Packet[Any] | None = next(self._packets, None)
        if packet is None:
            return None
        self._reached = max(self._reached, (packet.pos or 0) + packet.size)
        if packet.size:
            self._register(packet)
        elif packet.pts is not None or packet.dts is not None:
            return []  # an empty entry of an AVI file, which the decoder would take for the end
        try:
            return list(packet.decode())
        except (av.MemoryError, av.BlockingIOError, av.ExitError):
            raise
        except (av.FFmpegError, OSError) as exc:
            self._failure = Fault(self._kind(), f"cannot be decoded: {reason(exc)}", exc.with_traceback(None))
            if packet.pts is None:
                return [None] if packet.size else []
            if self._one_by_one:
                self._failed[packet.pts] = _GUESS
            return []

    def _register(self, packet: Packet[Any]) -> None:
        self._key_seen = self._key_seen or packet.is_keyframe
        self._leading += not self._key_seen
        packet.opaque = self._num_packets, packet.pos
        if packet.pts is not None and not packet.is_discard:  # an edit list may leave packets out
            self._waiting[packet.pts] = self._num_packets
            if packet.is_corrupt:  # at a gap of a transport stream, which the decoder does not see
                self._failed[packet.pts] = (
                    "lies at a gap of its transport stream: packets were lost, or recordings joined"
                )
        self._num_packets += 1

    def _emptied(self) -> list[VideoFrame | None]:
        try:
            return list(self._stream.codec_context.decode(None))
        except (av.FFmpegError, OSError):
            return []


def _with_share(held: list[Picture], picture: Picture) -> Iterator[Picture]:
    """The B pictures before ``picture``; from the first that was decoded after it on, they share its fault."""
    shares = False
    for earlier in held:
        fault = picture.fault
        if fault is not None and fault.kind != "geometry-changed":
            known = earlier.order is not None and picture.order is not None
            shares = shares or not known or (earlier.order or 0) > (picture.order or 0)
        yield replace(earlier, fault=fault) if shares else earlier

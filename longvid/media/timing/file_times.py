"""The times of the frames of one media file, and what is said where they are not those that it stores."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.media.decoding.decoder import TRANSPORTS, Picture
from longvid.media.decoding.seek_index import SeekPoint
from longvid.media.timing.clock import MOST_JOINTS, Clock, Joint

__all__ = ["FileTimes", "mean_frame_rate"]

DEFAULT_FRAME_RATE = Fraction(24)
_TAG = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
_LONGEST_HOLD = 3600
"seconds; a header that claims a longer last frame is not believed"


class FileTimes:
    """Gives the frames of a file their times; every opening of the file begins with :meth:`begin`.

    ``frame_rate`` is for files without time stamps, and refused for others by :meth:`check`.
    """

    def __init__(self, name: str, frame_rate: Fraction | None) -> None:
        self._name, self._frame_rate = name, frame_rate
        self.without_stamps = self._said_joint = self._said_sorted = False
        self.joints: dict[int, Joint] = {}
        "places where the stamps do not continue, by the number of the frame"
        self._duration = 0
        self._shown_at: int | None = None
        self._index = -1

    def begin(self, stream: VideoStream) -> None:
        """Make a new clock, for the first frame of the file or for the one that :meth:`is_at` finds."""
        self._stream = stream
        rate = (self._frame_rate if self.without_stamps else None) or mean_frame_rate(stream) or DEFAULT_FRAME_RATE
        self.clock = Clock(
            stream.time_base or 1 / DEFAULT_FRAME_RATE,
            rate,
            transport=stream.container.format.name in TRANSPORTS,
            without_stamps=self.without_stamps,
        )

    @property
    def frame_rate(self) -> Fraction | None:
        """Mean frames per second; None if unknown."""
        return 1 / self.clock.time_base if self.without_stamps else mean_frame_rate(self._stream)

    def check(self, first: VideoFrame) -> None:
        """Decide by the first frame whether the file has time stamps.

        Raises:
            SourceError: it has some, and a frame rate was given.
        """
        rate = self._frame_rate
        if first.pts is not None and rate is not None:
            raise SourceError(
                f"frame_rate={rate} was given for {self._name}, but a media file carries its own time stamps; leave it "
                "out, or resample to that rate with --fps (fps=)",
                kind="layout",
            )
        if first.pts is not None:
            return
        self.without_stamps = True
        self.begin(self._stream)
        if rate is None:
            warnings.warn(
                f"{self._name} has no time stamps; {float(1 / self.clock.time_base):.6g} frames per second are "
                "assumed, --assume-fps (frame_rate=) sets another rate",
                stacklevel=4,
            )

    def stamp(self, picture: Picture, index: int) -> int:
        """The time of a picture, the next one; ``index`` is the number of the frame in the file."""
        time = self.clock.stamp(picture.shown_at, picture.duration)
        self._duration, self._index = self._own_duration(picture), index
        self._shown_at = None if self.without_stamps else picture.shown_at
        joint = self.clock.joint
        if joint is not None and len(self.joints) < MOST_JOINTS:
            self.joints.setdefault(index, Joint(index, *joint))
        if joint is not None and not self._said_joint:
            self._said_joint = True
            warnings.warn(
                f"the time stamps of {self._name} do not continue at frame {index} ({joint[1]} follows {joint[0]}); "
                "the frames from there on continue the time of those before, as at every such place",
                stacklevel=2,
            )
        if picture.frame is not None and picture.shown_at != picture.pts and not self._said_sorted:
            self._said_sorted = True
            warnings.warn(
                f"{self._name} does not store when its frames are shown; their times are made from the order of its "
                "pictures",
                stacklevel=2,
            )
        return time

    def is_at(self, picture: Picture, point: SeekPoint, *, are_sorted: bool) -> bool:
        """Whether a picture is the one of a seek point, with its time; the clock continues there.

        Stamps that are sorted tell so only if as many pictures came out since the seek as in a full read.
        """
        if (picture.pts, picture.position) != (point.pts, point.position) or picture.shown_at is None:
            return False
        if are_sorted and picture.shown_at * self.clock.scale + point.offset != point.time:
            return False  # pictures before it were lost, so that the lowest stamp that is left is another one
        self.clock.restart(point.time, point.offset)
        return True

    def is_before(self, picture: Picture, point: SeekPoint) -> bool:
        """Whether a picture is shown before that of a seek point."""
        if picture.shown_at is None or picture.position == point.position:
            return False
        return picture.shown_at * self.clock.scale + point.offset < point.time

    def length(self, packets: Iterable[Packet[Any]]) -> int:
        """From the first frame to the end of the last one by the packets of the file, in units of the clock."""
        first = end = None
        count = 0
        for packet in packets:
            if not packet.size or packet.is_discard:
                continue
            count += 1
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                end = max(packet.pts + (packet.duration or 0), packet.pts if end is None else end)
        if self.without_stamps or first is None or end is None:
            return count
        self._index = count - 1
        claimed = self._claimed_end()
        end = end if claimed is None else max(end, round(claimed))
        return (end - first) * self.clock.scale

    def last_duration(self, *, at_end: bool) -> int:
        """How long the last frame that got a time is shown, in units of the clock.

        By the frame, by the length of the stream that its header claims if the file ends there, or else by the rate.
        """
        clock, held = self.clock, self._duration
        claimed = self._claimed_end() if at_end and self._shown_at is not None and not self.joints else None
        if claimed is not None and self._shown_at is not None:
            rest = round(claimed * clock.scale) - self._shown_at * clock.scale
            held = rest if held < rest <= _LONGEST_HOLD / clock.time_base else held
        return held or clock.step

    def _own_duration(self, picture: Picture) -> int:
        duration, frame = picture.duration * self.clock.scale, picture.frame
        if frame is not None and frame.interlaced_frame and abs(2 * duration - self.clock.step) <= 1:
            return self.clock.step  # of one of its two fields
        return 0 if self.without_stamps else duration

    def _claimed_end(self) -> Fraction | None:
        """Where the stream ends, in units of the file, by its header."""
        stream = self._stream
        names = stream.container.format.name.split(",")
        if "mp4" in names and stream.duration and stream.frames == self._index + 1:
            return Fraction((stream.start_time or 0) + stream.duration)
        tag = _TAG.match(stream.metadata.get("DURATION", "")) if "matroska" in names else None
        if tag is None or not stream.time_base:
            return None
        return (int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])) / stream.time_base


def mean_frame_rate(stream: VideoStream) -> Fraction | None:
    """By the header, or as FFmpeg guesses it."""
    return stream.average_rate or stream.guessed_rate or None

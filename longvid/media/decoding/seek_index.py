"""Seek points: where in a media file decoding can begin, and which frame of the file comes out there.

Frames are addressed by their number in the file. A time stamp may come twice, where two recordings were joined or where
the clock of a transport stream begins again; the byte at which a packet begins does not. So a seek point is a key frame
with its number, its time stamp and the byte of its packet, and decoding begins at the packet that has all three. It
also has the time of the frame on the rising clock of the file, and the offset of that clock, which continues there.

They are noted as frames are decoded, which is exact for every format, and a run saves them beside its results. For a
file that nobody has decoded yet they are found from its packets, if one packet gives one frame.
"""

from __future__ import annotations

import json
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longvid.errors import StoreError
from longvid.files import read_regular
from longvid.frames import Times

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext

__all__ = ["PACKETS_AHEAD", "SeekIndex", "SeekPoint", "index_of_packets"]

PACKETS_AHEAD = 64
"so many packets behind a frame, every frame that is shown before it has been read: at most 16 pictures change places"
_ONE_FRAME_PER_PACKET = {"h264", "hevc", "vvc", "av1", "vp9", "mjpeg", "prores", "dnxhd", "ffv1", "png", "rawvideo"}
"codecs whose packets, as FFmpeg's demuxers cut them, hold a frame each"
_DECODERS = {"libdav1d": "av1"}
_PROGRESSIVE = 1
_LEAST_DISTANCE = 16
"frames between two points, so that they take a few bytes a frame where every frame is a key frame"
_MOST_BYTES = 64 * 2**20
_POINT = struct.Struct("<qqqqq")
_CHECK_BYTES = 8
_RECORD_BYTES = _POINT.size + _CHECK_BYTES


@dataclass(frozen=True, slots=True, order=True)
class SeekPoint:
    """A key frame of a file."""

    frame: int
    "its number, counted from the first frame of the file"
    pts: int
    position: int
    "the byte of the file at which its packet begins"
    time: int = 0
    "when it is shown, in units of the clock of the file"
    offset: int = 0
    "units that the clock adds to stamps here"


@dataclass(slots=True)
class SeekIndex:
    """The seek points of one file that are known, in their order."""

    points: list[SeekPoint] = field(default_factory=list)
    stamps: Times | None = None
    "time stamps of the frames from the first on, if the points come from packets and not from frames"
    _key: bytes = b""
    _num_saved: int = 0

    def add(self, point: SeekPoint) -> None:
        """Note a key frame, unless one is known that lies behind it, or closely before it."""
        if not self.points or point.frame >= self.points[-1].frame + _LEAST_DISTANCE:
            self.points.append(point)

    def before(self, frame: int) -> SeekPoint | None:
        """The last one that lies at a frame or before it."""
        count = bisect_right(self.points, frame, key=lambda point: point.frame)
        return self.points[count - 1] if count else None

    def load(self, path: Path, source: Mapping[str, Any]) -> None:
        """Take what an earlier run saved for the source with this fingerprint.

        A seek is compared with its point, but nothing else tells the number of the frame. So each record has a digest
        of itself and of the fingerprint. A file that is missing, damaged or of another source gives fewer points, and
        no wrong ones.
        """
        self._key = blake2b(json.dumps(source, sort_keys=True).encode()).digest()
        try:
            content = read_regular(path, _MOST_BYTES)
        except (OSError, StoreError):
            return
        for start in range(0, len(content), _RECORD_BYTES):
            record = content[start : start + _POINT.size]
            if content[start + _POINT.size : start + _RECORD_BYTES] != self._check(record):
                break
            self.add(SeekPoint(*_POINT.unpack(record)))
        self._num_saved = len(self.points)

    def save(self, path: Path) -> None:
        """Append what was noted since the last time. If that fails, a later run looks for the points itself."""
        new = self.points[self._num_saved :]  # the reader's thread may be noting more
        records = [_POINT.pack(*astuple(point)) for point in new]
        if new:
            with suppress(OSError), path.open("ab") as file:
                file.truncate(_RECORD_BYTES * self._num_saved)
                file.write(b"".join(record + self._check(record) for record in records))
                file.flush()
                self._num_saved += len(new)

    def _check(self, record: bytes) -> bytes:
        return blake2b(record, key=self._key, digest_size=_CHECK_BYTES).digest()


def index_of_packets(packets: Iterable[Packet[Any]], codec: VideoCodecContext) -> SeekIndex | None:
    """The seek points of a file by its first packets alone; None if frames cannot be counted without decoding.

    The two fields of an H.264 frame may be two packets, so a stream has to be known as progressive.
    """
    if _DECODERS.get(codec.name, codec.name) not in _ONE_FRAME_PER_PACKET:
        return None
    if codec.name == "h264" and codec.field_order != _PROGRESSIVE:
        return None
    stamps = array("q")
    keys: list[tuple[int, int]] = []
    last_dts = None
    for packet in packets:
        if not packet.size:
            continue
        pts, dts, position = packet.pts, packet.dts, packet.pos
        starts_again = last_dts is not None and (dts is None or dts <= last_dts)
        if pts is None or packet.is_discard or packet.is_corrupt or starts_again or not (stamps or packet.is_keyframe):
            return None
        last_dts = dts if dts is not None else last_dts
        stamps.append(pts)
        if packet.is_keyframe and position is not None and position >= 0:
            keys.append((pts, position))
    order = np.sort(np.array(stamps, np.int64))
    if not len(order) or order[0] != stamps[0] or not np.diff(order).all():
        return None
    index = SeekIndex(stamps=order)
    for pts, position in sorted(keys):
        index.add(SeekPoint(int(np.searchsorted(order, pts)), pts, position, time=pts))
    return index

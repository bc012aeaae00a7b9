"""The stream of a media file that is shown, and checks by its header whether the file is whole."""

from __future__ import annotations

import os
from typing import BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.media.decoding.ends import gif_end, riff_end

__all__ = ["counted_frames", "declared_end", "lost_samples", "pick_stream", "reason"]


def reason(exc: Exception) -> str:
    """The message of an error, without its number."""
    return getattr(exc, "strerror", None) or str(exc)


def pick_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream that players show; cover pictures of audio files do not count."""
    cover = av.stream.Disposition.attached_pic
    moving = [stream for stream in container.streams.video if not stream.disposition & cover]
    best = container.streams.best("video")
    stream = best if best in moving else next(iter(moving), None)
    if stream is None:
        kinds = sorted({other.type for other in container.streams})
        raise SourceError(
            f"{name} has no video stream; it has {', '.join(kinds) or 'no stream at all'}", kind="no-video-stream"
        )
    if stream.codec_context is None:  # decoding would crash the process
        raise SourceError(f"{name} uses a video codec that FFmpeg cannot decode; convert it first", kind="not-video")
    return stream


def declared_end(file: BinaryIO, container: InputContainer, stream: VideoStream) -> int | None:
    """The least size of the whole file, where its header declares it."""
    names = container.format.name.split(",")
    file.seek(0)
    if "mp4" in names:
        samples_end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        return max(samples_end, _boxes_end(file))
    if "avi" in names:
        return riff_end(file, stream.frames)
    ends = {"matroska": _matroska_end, "gif": gif_end}
    return next((ends[name](file) for name in names if name in ends), None)


def counted_frames(container: InputContainer, stream: VideoStream, num_bytes: int) -> int:
    """Number of frames that the header counts; 0 if it does not tell, or more than the file can hold."""
    if container.format.name == "avi" and stream.frames != len(stream.index_entries):
        return 0  # recorders that end early leave any number; an index lists what is there
    return stream.frames if 0 < stream.frames <= num_bytes else 0


def lost_samples(container: InputContainer, stream: VideoStream) -> int:
    """Number of frames that the index of an mp4 file counts but does not place inside the file.

    An edit list leaves frames out too, but then the stream is declared to be as short as the rest.
    """
    entries, count = stream.index_entries, stream.frames
    if "mp4" not in container.format.name.split(",") or not 0 < len(entries) < count or not stream.duration:
        return 0
    times = [entry.timestamp for entry in entries]
    is_short = max(times) - min(times) + 2.5 * stream.duration / count < stream.duration
    return count - len(entries) if is_short else 0


def _boxes_end(file: BinaryIO) -> int:
    """Where the index of an mp4 file ends, or its last fragment if it is written in fragments."""
    position = end = 0
    fragmented = False
    while len(head := file.read(16)) >= 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:  # the true length follows
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # the box runs to the end of the file, or is none
            break
        position += length
        fragmented = fragmented or kind == b"moof"
        if kind in (b"moov", b"moof") or (fragmented and kind == b"mdat"):
            end = position
        file.seek(position)
    return end


_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def _matroska_end(file: BinaryIO) -> int | None:
    """End of the first segment of a Matroska file; None if its size is left open, and those of its parts too."""
    for _ in range(4):  # the EBML header, perhaps padding, then the segment
        identifier = _variable_int(file, keep_marker=True)
        size = _variable_int(file, keep_marker=False)
        if identifier == _SEGMENT and size is None:
            return _parts_end(file)
        if identifier is None or size is None:
            return None
        if identifier == _SEGMENT:
            return file.tell() + size
        file.seek(size, os.SEEK_CUR)
    return None


def _parts_end(file: BinaryIO) -> int | None:
    """End of the last part of a segment without a size, as a live recording has it."""
    while True:
        begin = file.tell()
        identifier = _variable_int(file, keep_marker=True)
        if identifier is None:
            return begin
        size = _variable_int(file, keep_marker=False)
        if size is None:
            return None
        file.seek(size, os.SEEK_CUR)


def _variable_int(file: BinaryIO, *, keep_marker: bool) -> int | None:
    """An EBML number, whose leading zero bits give its length; None if it means unknown, or at the end of the file."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    raw = first + file.read(length - 1)
    value = int.from_bytes(raw, "big")
    if len(raw) < length:
        return None
    if keep_marker:
        return value
    marker = 1 << (7 * length)
    return None if value == 2 * marker - 1 else value - marker

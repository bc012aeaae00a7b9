"""Opening a media file safely, and telling beforehand whether it is whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from longvid.errors import SourceError

__all__ = ["check_complete", "check_regular_file", "open_container", "pick_stream", "reason"]

# demuxers that claim text and playlists; a playlist would open other files
_NOT_MEDIA = {"tty", "hls", "concat", "dash", "sdp", "ffmetadata", "imf"}


def reason(exc: Exception) -> str:
    """The words of an error, without its number."""
    return getattr(exc, "strerror", None) or str(exc)


def check_regular_file(path: Path) -> int:
    """Size in bytes of the file."""
    try:
        found = path.stat()
    except FileNotFoundError as exc:
        raise SourceError(f"there is no file {path}; check the name", kind="missing") from exc
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {reason(exc)}") from exc
    if stat.S_ISDIR(found.st_mode):
        raise SourceError(f"{path} is a folder, not a video file; name a file in it", kind="not-video")
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{path} is not a regular file; copy the video to one", kind="not-video")
    if not found.st_size:
        raise SourceError(f"{path} is empty (0 bytes), not a video", kind="not-video")
    return found.st_size


def open_container(path: Path) -> InputContainer:
    """Open a local file for reading; what is no media file, or would open others, is refused."""
    try:
        # the prefix and the whitelist keep names such as concat:a|b, and playlists, from opening anything else
        container = av.open(f"file:{path.absolute()}", "r", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError) as exc:
        raise _refusal(path, exc) from exc
    if set(container.format.name.split(",")) & _NOT_MEDIA:
        container.close()
        raise SourceError(f"{path} is a text file or a playlist, not a video; name the video itself", kind="not-video")
    return container


def _refusal(path: Path, exc: Exception) -> SourceError:
    """Say why a file that FFmpeg does not open is none."""
    if isinstance(exc, PermissionError):
        return SourceError(f"{path} cannot be read: permission denied; change its mode")
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" or head[:4] == _EBML.to_bytes(4, "big"):
        return SourceError(
            f"{path} begins like a video and lacks its index: it is cut short, or was never finished; copy or record "
            f"it again ({reason(exc)})",
            kind="truncated",
        )
    return SourceError(f"{path} is not a video that can be read: {reason(exc)}", kind="not-video")


def pick_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream that players would show; pictures attached to a song do not count."""
    moving = [stream for stream in container.streams.video if not _is_cover(stream)]
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


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def check_complete(path: Path, container: InputContainer, stream: VideoStream, num_bytes: int) -> None:
    """Raise SourceError if the file's own header speaks of more bytes than the file has."""
    end = _declared_end(path, container, stream)
    if end is not None and end > num_bytes:
        raise SourceError(
            f"{path} is cut short: its header speaks of {end} bytes and {num_bytes} are there; copy the file again",
            kind="truncated",
        )


def _declared_end(path: Path, container: InputContainer, stream: VideoStream) -> int | None:
    """The byte at which the file should end at the earliest, where its header tells."""
    names = container.format.name.split(",")
    if "mp4" in names:
        samples_end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        with path.open("rb") as file:
            return max(samples_end, _boxes_end(file))
    if "matroska" in names:
        with path.open("rb") as file:
            return _matroska_end(file)
    return None


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
    """End of the first segment of a Matroska file; None if its size is left open, as in a live recording."""
    for _ in range(4):  # the EBML header, perhaps padding, then the segment
        identifier = _variable_int(file, keep_marker=True)
        size = _variable_int(file, keep_marker=False)
        if identifier is None or size is None:
            return None
        if identifier == _SEGMENT:
            return file.tell() + size
        file.seek(size, os.SEEK_CUR)
    return None


def _variable_int(file: BinaryIO, *, keep_marker: bool) -> int | None:
    """A number of EBML, as long as its leading zero bits tell; None if it says unknown or the file ends."""
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

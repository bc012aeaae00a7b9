"""Opens media files safely, and checks by their headers whether they are whole."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from longvid.errors import SourceError
from longvid.media.decoding.ends import gif_end, riff_end
from longvid.media.limits import Limits

__all__ = ["MediaFile", "counted_frames", "declared_end", "lost_samples", "pick_stream", "reason"]

# demuxers that read one file and nothing else: no playlist, no list of pictures, no device
_DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,ogg,gif,yuv4mpegpipe,ivf,asf,mxf,nut,obu"
)  # fmt: skip
_PLAYLISTS = {
    b"#EXTM3U": "an HLS playlist", b"ffconcat": "a list of files", b"<MPD": "a DASH manifest", b"v=0": "an SDP file",
    b"[playlist]": "a playlist", b"<smil": "a playlist", b"<SmoothStreamingMedia": "a manifest",
}  # fmt: skip
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.,-]+:")
_BLOCK_BYTES = 8 * 2**20


def reason(exc: Exception) -> str:
    """The message of an error, without its number."""
    return getattr(exc, "strerror", None) or str(exc)


class MediaFile:
    """A regular file that is opened once: the file that is checked is the file that is decoded.

    Raises:
        SourceError: there is no such file, it is empty, a link, an address or a device, or it exceeds ``max_bytes``.
    """

    def __init__(self, path: str, limits: Limits) -> None:
        self._path = path
        self._limits = limits
        self.file: io.FileIO = _open_regular(path)
        "for reads besides decoding; FFmpeg has a position of its own"
        try:
            self.num_bytes = os.fstat(self.file.fileno()).st_size
            if not self.num_bytes:
                raise SourceError(f"{path} is empty (0 bytes), not a video", kind="not-video")
            limits.check("max_bytes", self.num_bytes, f"{path} has {self.num_bytes} bytes")
        except BaseException:
            self.file.close()
            raise

    def open(self) -> InputContainer:
        """Open the same file with FFmpeg, which may open nothing else.

        Raises:
            SourceError: the file is not a video, or refers to other files.
        """
        options = {
            "protocol_whitelist": "file",
            "format_whitelist": _DEMUXERS,
            # FFmpeg decodes while it probes, before the size can be checked
            "max_pixels": str(self._limits.decoder_pixels),
        }
        seconds = self._limits.stall_seconds
        try:
            return av.open(
                f"file:{self._own_name()}",
                "r",
                options=options,
                metadata_errors="replace",  # titles and the like may be in any encoding
                timeout=(seconds, seconds),
            )
        except (av.FFmpegError, OSError, UnicodeDecodeError) as exc:
            raise self._refusal(exc) from exc

    def sha256(self, beat: Callable[[], None]) -> str:
        """Digest of the whole file in hexadecimal digits; ``beat`` is called for every block of it."""
        digest = hashlib.sha256()
        self.file.seek(0)
        while block := self.file.read(_BLOCK_BYTES):
            digest.update(block)
            beat()
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _own_name(self) -> str:
        """A name of the open file itself, where the system has one: the path may come to name another file."""
        name = f"/proc/self/fd/{self.file.fileno()}"
        return name if os.path.exists(name) else os.path.abspath(self._path)

    def _refusal(self, exc: Exception) -> SourceError:
        if isinstance(exc, av.error.ExitError):
            return SourceError(
                f"{self._path} could not be opened within {self._limits.stall_seconds:g} s; convert the file, or allow "
                f"more with Limits.stall_seconds",
                kind="stalled",
            )
        self.file.seek(0)
        head = self.file.read(1024)
        for mark, what in _PLAYLISTS.items():
            if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark) or (mark[:1] == b"<" and mark in head):
                return SourceError(
                    f"{self._path} is {what}, which names other files; name the video itself", kind="refused"
                )
        if head[4:8] == b"ftyp" or head[:4] == _EBML.to_bytes(4, "big"):
            return SourceError(
                f"{self._path} begins as a video and has no index: it is cut short, or was never finished; copy "
                f"or record it again ({reason(exc)})",
                kind="truncated",
            )
        return SourceError(
            f"{self._path} is not a video that can be read ({reason(exc)}); convert it to mp4 or mkv", kind="not-video"
        )


def _open_regular(path: str) -> io.FileIO:
    # a FIFO would wait for its writer without O_NONBLOCK, and a link may point anywhere
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:
        raise _unopened(path, exc) from exc
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return io.FileIO(number, "rb", closefd=True)
    os.close(number)
    if stat.S_ISDIR(mode):
        raise SourceError(f"{path} is a folder, not a video file; name a file in it", kind="not-video")
    raise SourceError(f"{path} is not a regular file; copy the video to one", kind="refused")


def _unopened(path: str, exc: OSError | ValueError) -> SourceError:
    code = exc.errno if isinstance(exc, OSError) else errno.EINVAL
    if code == errno.ELOOP:
        return SourceError(f"{path} is a symbolic link; name the file itself", kind="refused")
    if code == errno.ENXIO:
        return SourceError(f"{path} is not a regular file; copy the video to one", kind="refused")
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) and _ADDRESS.match(path):
        return SourceError(
            f"{path} is an address or names a protocol; only local files are read: download it and give the path of "
            "the file",
            kind="refused",
        )
    if code == errno.ENOENT:
        return SourceError(f"there is no file {path}; check the name", kind="missing")
    if code == errno.EACCES:
        return SourceError(f"{path} cannot be read: permission denied; change its mode")
    return SourceError(f"{path} cannot be read: {reason(exc)}")


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


def declared_end(file: io.FileIO, container: InputContainer, stream: VideoStream) -> int | None:
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


def _boxes_end(file: io.FileIO) -> int:
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


def _matroska_end(file: io.FileIO) -> int | None:
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


def _parts_end(file: io.FileIO) -> int | None:
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


def _variable_int(file: io.FileIO, *, keep_marker: bool) -> int | None:
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

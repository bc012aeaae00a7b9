"""Opens a media file once and safely: the file that is checked is the file that is decoded, and no other is opened."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import av
from av.container import InputContainer

from longvid.errors import SourceError
from longvid.media.decoding.container import reason
from longvid.media.limits import Limits

__all__ = ["REWRITTEN_BYTES", "MediaFile", "changed", "open_container", "unopened"]

# demuxers that read one file and nothing else: no playlist, no list of pictures, no device
_DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,ogg,gif,yuv4mpegpipe,ivf,asf,mxf,nut,obu,apng,"
    "png_pipe,jpeg_pipe,tiff_pipe,webp_pipe"
)  # fmt: skip
_PLAYLISTS = {
    b"#EXTM3U": "an HLS playlist", b"ffconcat": "a list of files", b"<MPD": "a DASH manifest", b"v=0": "an SDP file",
    b"[playlist]": "a playlist", b"<smil": "a playlist", b"<SmoothStreamingMedia": "a manifest",
}  # fmt: skip
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.,-]+:")
_BLOCK_BYTES = 8 * 2**20
REWRITTEN_BYTES = 16 * 2**10
"bytes at the beginning of a file in which recorders note its length when they end"
_EBML = b"\x1a\x45\xdf\xa3"


class MediaFile:
    """A regular file that is opened once. A symbolic link is followed: the user has named it.

    Raises:
        SourceError: there is no such file, it is empty, an address or a device, or it exceeds ``max_bytes``.
    """

    one_pass = False
    "whether the bytes can be read once only, from the first to the last"

    def __init__(self, path: str, limits: Limits, *, may_be_empty: bool = False) -> None:
        self._path = path
        self._limits = limits
        self._file: BinaryIO = _open_regular(path)
        self._sha256: str | None = None
        self.beat: Callable[[], None] = lambda: None
        "called while a reader waits for bytes, so that a slow writer is not taken for a decoder that hangs"
        try:
            found = os.fstat(self._file.fileno())
            self._num_bytes = found.st_size
            self._modified, self._noted = found.st_mtime_ns, found.st_ctime_ns
            "when it was written to, which programs set back, and when the system last noted a change, if of its name"
            if not self.num_bytes and not may_be_empty:
                raise SourceError(f"{path} is empty (0 bytes), not a video", kind="not-video")
            limits.check("max_bytes", self.num_bytes, f"{path} has {self.num_bytes} bytes")
        except BaseException:
            self._file.close()
            raise

    @property
    def file(self) -> BinaryIO:
        """For reads besides decoding; FFmpeg has a position of its own."""
        return self._file

    @property
    def num_bytes(self) -> int:
        """Size when the file was opened."""
        return self._num_bytes

    def open(self) -> InputContainer:
        """Open the same file with FFmpeg, which may open nothing else.

        Raises:
            SourceError: the file is not a video, or refers to other files.
        """
        try:
            name, seconds = f"file:{self._own_name()}", self._limits.stall_seconds
            return open_container(name, self._limits, protocols="file", timeout=seconds)
        except (av.FFmpegError, OSError, UnicodeDecodeError) as exc:
            if isinstance(exc, SourceError):
                raise
            self.check_unchanged(lambda: None)
            raise self.refusal(exc) from exc

    @property
    def identity_is_known(self) -> bool:
        """Whether :meth:`identity` takes no time."""
        return self._sha256 is not None

    def identity(self, beat: Callable[[], None]) -> dict[str, Any]:
        """Size and digest of the bytes that the file had when it was opened; ``beat`` is called for every block."""
        self._sha256 = self._sha256 or self._digest(self.num_bytes, beat)
        return {"bytes": self.num_bytes, "sha256": self._sha256}

    def continues(self, earlier: Mapping[str, Any], beat: Callable[[], None]) -> bool:
        """Whether the file is one that had an ``identity`` earlier, with more bytes behind it, or that was read as it
        grew."""
        return (earlier.get("bytes") != self.num_bytes or "body_sha256" in earlier) and self.holds(earlier, beat)

    def holds(self, earlier: Mapping[str, Any], beat: Callable[[], None]) -> bool:
        """Whether the file begins with the bytes that had an ``identity`` earlier. If it was read as it grew, its
        header may be another one: a recorder notes the length there at the end."""
        length = earlier.get("bytes")
        if not isinstance(length, int) or not 0 < length <= self.current_size():
            return False
        if self._digest(length, beat) == earlier.get("sha256"):
            return True
        return length > REWRITTEN_BYTES and self._digest(length, beat, REWRITTEN_BYTES) == earlier.get("body_sha256")

    def check_length(self, length: int) -> None:
        """Raise SourceError of kind ``"changed"`` if the file is shorter now."""
        if self.current_size() < length:
            raise changed(self._path, length, self.current_size())

    def compare(self, read: Mapping[str, Any], beat: Callable[[], None]) -> dict[str, Any]:
        """The ``identity`` of what was read; SourceError of kind ``"changed"`` if the file holds more, or other bytes,
        beside its header."""
        if self.current_size() != read["bytes"]:
            raise changed(self._path, read["bytes"], self.current_size())
        if not self.holds(read, beat):
            raise changed(self._path, read["bytes"], read["bytes"])
        return {**read, "sha256": self._digest(read["bytes"], beat)}

    def check_unchanged(self, beat: Callable[[], None]) -> None:
        """Raise SourceError of kind ``"changed"`` if the file is not the one that was opened."""
        found = os.fstat(self._file.fileno())
        if found.st_size != self.num_bytes:
            raise changed(self._path, self.num_bytes, found.st_size)
        known = self._sha256
        if found.st_mtime_ns == self._modified and (known is None or found.st_ctime_ns == self._noted):
            return
        if known is None or self._digest(self.num_bytes, beat) != known:
            raise changed(self._path, self.num_bytes, found.st_size)
        self._modified, self._noted = found.st_mtime_ns, found.st_ctime_ns  # written again with the same bytes

    def check_kept(self, beat: Callable[[], None]) -> None:
        """The same, but a file that has grown is well for now."""
        if self.current_size() <= self.num_bytes:
            self.check_unchanged(beat)

    @property
    def descriptor(self) -> int | None:
        """For reads anywhere in the file; None if they are not possible."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def refusal(self, exc: Exception) -> SourceError:
        """Why FFmpeg could not open the file."""
        if isinstance(exc, av.error.ExitError):
            return SourceError(
                f"{self._path} could not be opened within {self._limits.stall_seconds:g} s; convert the file, or allow "
                f"more with Limits.stall_seconds",
                kind="stalled",
            )
        file = self.file
        file.seek(0)
        head = file.read(1024)
        for mark, what in _PLAYLISTS.items():
            if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark) or (mark[:1] == b"<" and mark in head):
                return SourceError(
                    f"{self._path} is {what}, which names other files; name the video itself", kind="refused"
                )
        if head[4:8] == b"ftyp" or head[:4] == _EBML:
            return SourceError(
                f"{self._path} begins as a video and has no index: it is cut short, or was never finished; copy "
                f"or record it again ({reason(exc)})",
                kind="truncated",
            )
        return SourceError(
            f"{self._path} is not a video that can be read ({reason(exc)}); convert it to mp4 or mkv", kind="not-video"
        )

    def current_size(self) -> int:
        """Bytes that the file has now."""
        return os.fstat(self._file.fileno()).st_size

    def _digest(self, length: int, beat: Callable[[], None], start: int = 0) -> str:
        """sha256 of the first ``length`` bytes, from ``start`` on."""
        digest, left = hashlib.sha256(), length - start
        self._file.seek(start)
        while left:
            block = self._file.read(min(left, _BLOCK_BYTES))
            if not block:
                raise changed(self._path, self.num_bytes, length - left)
            digest.update(block)
            left -= len(block)
            beat()
        return digest.hexdigest()

    def _own_name(self) -> str:
        """A name of the open file itself, where the system has one: the path may come to name another file."""
        name = f"/proc/self/fd/{self._file.fileno()}"
        return name if os.path.exists(name) else os.path.realpath(self._path)


def open_container(file: Any, limits: Limits, *, protocols: str, timeout: float | None) -> InputContainer:
    """Open a name or a file object with FFmpeg, which may use these protocols alone, and only safe demuxers."""
    container: InputContainer = av.open(
        file,
        "r",
        options={
            "protocol_whitelist": protocols,
            "format_whitelist": _DEMUXERS,
            # FFmpeg decodes while it probes, before the size can be checked
            "max_pixels": str(limits.decoder_pixels),
        },
        metadata_errors="replace",  # titles and the like may be in any encoding
        timeout=None if timeout is None else (timeout, timeout),
    )
    return container


def changed(path: str, before: int, now: int) -> SourceError:
    """The error for a file that changed while it was read."""
    if now > before:
        what = (
            f"{path} has grown from {before} to {now} bytes while it was read: it is still being written. Run the same "
            "command again when it is whole, which continues the store, or read it as it grows with --follow "
            "(follow=True)"
        )
    elif now < before:
        what = f"{path} had {before} bytes when it was opened and has {now} now; copy the file again"
    else:
        what = f"{path} was written to while it was read; run again when nothing writes to it"
    return SourceError(what, kind="changed")


def _open_regular(path: str) -> io.FileIO:
    # a FIFO would wait for its writer without O_NONBLOCK
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:
        raise unopened(path, exc) from exc
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return io.FileIO(number, "rb", closefd=True)
    os.close(number)
    if stat.S_ISDIR(mode):
        raise SourceError(f"{path} is a folder, not a video file; name a file in it", kind="not-video")
    what = "is a symbolic link to something that is no regular file" if os.path.islink(path) else "is no regular file"
    raise SourceError(f"{path} {what}; copy the video to one", kind="refused")


def unopened(path: str, exc: OSError | ValueError) -> SourceError:
    """The error for a path that the system does not open."""
    code = exc.errno if isinstance(exc, OSError) else errno.EINVAL
    if code == errno.ELOOP:
        return SourceError(f"{path} is a symbolic link that leads back to itself; name the file", kind="refused")
    if code == errno.ENXIO:
        return SourceError(f"{path} is not a regular file; copy the video to one", kind="refused")
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) and _ADDRESS.match(path):
        return SourceError(
            f"{path} is an address or names a protocol; only local files are read: download it and give the path of "
            "the file",
            kind="refused",
        )
    if code == errno.ENOENT and os.path.islink(path):
        return SourceError(
            f"{path} is a symbolic link to {os.readlink(path)}, which is not there; get the file, or name another",
            kind="refused",
        )
    if code == errno.ENOENT:
        return SourceError(f"there is no file {path}; check the name", kind="missing")
    if code == errno.EACCES:
        return SourceError(f"{path} cannot be read: permission denied; change its mode")
    return SourceError(f"{path} cannot be read: {reason(exc)}")

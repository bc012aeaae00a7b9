"""Bytes that are read once, from the first to the last: a pipe, and a file that is read while it grows.

FFmpeg takes them from a Python object, which waits for more, counts them and digests them as they are read.
"""

from __future__ import annotations

import hashlib
import io
import os
import select
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import av
from av.container import InputContainer

from longvid.errors import SourceError
from longvid.media.decoding.container import reason
from longvid.media.decoding.media_file import REWRITTEN_BYTES, MediaFile, open_container, unopened
from longvid.media.limits import Limits
from longvid.media.pipes import STANDARD_INPUT, is_pipe

__all__ = ["FollowedFile", "OnePassFile", "PipeFile", "in_one_pass", "open_file"]

_UNKNOWN = 1 << 62
"size of a file whose end has not come"
_HEAD_BYTES = 64 * 2**10
_POLL_SECONDS = 0.1
_IN_ONE_PASS = "mkv, webm, ts, fragmented mp4 and y4m can be read in one pass"


def open_file(path: str, limits: Limits, *, follow_seconds: float | None, interrupted: Callable[[], bool]) -> MediaFile:
    """Open a file to be read as it is, a pipe, or with ``follow_seconds`` a file that grows.

    ``interrupted`` tells whether a reader that waits for bytes is to give up.
    """
    if is_pipe(path):
        if follow_seconds is not None:
            raise SourceError(
                f"{path} is a pipe, which is read to its end in any case; leave --follow out", kind="layout"
            )
        return PipeFile(path, limits, interrupted)
    if follow_seconds is not None:
        return FollowedFile(path, limits, interrupted, follow_seconds)
    return MediaFile(path, limits)


def in_one_pass(name: str) -> SourceError:
    """The error for asking what a source that is read once cannot tell."""
    return SourceError(
        f"{name} is read in one pass, and a part or the reference plan needs its length in advance; write it to a file "
        "and give its path",
        kind="layout",
    )


class OnePassFile(MediaFile):
    """What pipes and growing files have in common."""

    one_pass = True
    _advice: str

    def __init__(self, path: str, limits: Limits, interrupted: Callable[[], bool]) -> None:
        self._path, self._limits, self._interrupted = path, limits, interrupted
        self.beat = lambda: None
        self._head, self._waiting = b"", b""
        self._count, self._lock = 0, threading.Lock()
        self._whole, self._body = hashlib.sha256(), hashlib.sha256()
        self._ended = self._opened = self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole, once all are read; more than any file has until then."""
        return self._count if self._ended else _UNKNOWN

    @property
    def file(self) -> io.BytesIO:
        """The first bytes, for looking into the header."""
        return io.BytesIO(self._head)

    @property
    def descriptor(self) -> int | None:
        """For reads anywhere in the file; None if they are not possible."""
        return None

    def open(self) -> InputContainer:
        """Open it with FFmpeg; once."""
        if self._opened:
            raise SourceError(f"{self._path} can be read once only; {self._advice}", kind="layout")
        self._opened = True
        self._look_at_head()
        try:
            return open_container(_Reader(self), self._limits, protocols="none", timeout=None)
        except (av.FFmpegError, OSError, UnicodeDecodeError) as exc:
            if isinstance(exc, SourceError):
                raise
            refusal = self.refusal(exc)
            if refusal.kind in ("not-video", "truncated"):
                refusal = SourceError(
                    f"{self._path} cannot be read in one pass ({reason(exc)}); {_IN_ONE_PASS}; {self._advice}",
                    kind="not-video",
                )
            raise refusal from exc

    @property
    def identity_is_known(self) -> bool:
        """It is, at any moment."""
        return True

    def identity(self, beat: Callable[[], None]) -> dict[str, Any]:
        """Number and digests of the bytes that were read so far."""
        with self._lock:
            digests = {"sha256": self._whole.hexdigest(), "body_sha256": self._body.hexdigest()}
            return {"bytes": self._count, **digests}

    def continues(self, earlier: Mapping[str, Any], beat: Callable[[], None]) -> bool:
        """What was read cannot be read again."""
        return False

    def check_unchanged(self, beat: Callable[[], None]) -> None:
        """Every byte was read once."""

    def check_kept(self, beat: Callable[[], None]) -> None:
        """Every byte was read once."""

    def take(self, size: int) -> bytes:
        """The next bytes, at most ``size``; none at the end."""
        if self._ended:
            return b""
        block, self._waiting = self._waiting[:size] or self._next(size), self._waiting[size:]
        with self._lock:
            self._whole.update(block)
            self._body.update(block[max(0, REWRITTEN_BYTES - self._count) :])
            self._count += len(block)
        self._limits.check("max_bytes", self._count, f"{self._path} has {self._count} bytes or more")
        self._ended = not block
        return block

    @abstractmethod
    def _next(self, size: int) -> bytes:
        """Wait for the next bytes; none at the end."""

    def _look_at_head(self) -> None:
        """Read the first bytes, and refuse at once what cannot be read in one pass."""
        while len(self._head) < _HEAD_BYTES and not _mp4_kind(self._head):
            block = self._next(_HEAD_BYTES)
            if not block:
                break
            self._head += block
            if self._head[4:8] != b"ftyp":
                break
        self._waiting = self._head
        if not self._head:
            raise SourceError(f"{self._path} is empty (0 bytes), not a video", kind="not-video")
        if _mp4_kind(self._head) == "behind":
            raise SourceError(
                f"{self._path} is an mp4 file whose index stands behind the pictures, so that it cannot be read in one "
                f"pass; {_IN_ONE_PASS}, and mp4 with its index in front (ffmpeg -movflags +faststart); {self._advice}",
                kind="not-video",
            )

    def _wait(self) -> None:
        """Between two looks for more bytes."""
        self.beat()
        if self._closed or self._interrupted():
            raise SourceError(f"reading {self._path} was stopped", kind="stopped")


class PipeFile(OnePassFile):
    """Standard input, a FIFO, or another open pipe.

    Raises:
        SourceError: nobody writes to it, or it is a terminal.
    """

    _advice = "write it to a file and give its path"

    def __init__(self, path: str, limits: Limits, interrupted: Callable[[], bool]) -> None:
        super().__init__("standard input" if path == STANDARD_INPUT else path, limits, interrupted)
        try:
            self._number = os.dup(0) if path == STANDARD_INPUT else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as exc:
            raise unopened(self._path, exc) from exc
        if os.isatty(self._number):
            os.close(self._number)
            raise SourceError(
                "standard input is a terminal; pipe a video into it, such as cat clip.mkv | longvid encode - out.zarr",
                kind="not-video",
            )
        self._poll = select.poll()
        self._poll.register(self._number, select.POLLIN | select.POLLHUP | select.POLLERR)

    def _next(self, size: int) -> bytes:
        patience = time.monotonic() + self._limits.stall_seconds
        while True:
            self._wait()
            if self._poll.poll(_POLL_SECONDS * 1000):  # there are bytes, or the writer has closed its end
                with suppress(BlockingIOError):
                    return self._read(size)
            if time.monotonic() > patience:
                raise SourceError(
                    f"nothing was written to {self._path} for {self._limits.stall_seconds:g} s; check the program that "
                    "writes to it, or allow more with Limits.stall_seconds",
                    kind="stalled",
                )

    def _read(self, size: int) -> bytes:
        try:
            return os.read(self._number, size)
        except BlockingIOError:
            raise
        except OSError as exc:
            raise SourceError(f"{self._path} cannot be read: {reason(exc)}") from exc

    def close(self) -> None:
        """Close our end; a program that writes after that gets SIGPIPE."""
        if not self._closed:
            self._closed = True
            os.close(self._number)


class FollowedFile(OnePassFile):
    """A regular file that another program is writing; it ends when it has not grown for ``seconds``."""

    _advice = "or wait until the file is whole, and leave --follow out"

    def __init__(self, path: str, limits: Limits, interrupted: Callable[[], bool], seconds: float) -> None:
        super().__init__(path, limits, interrupted)
        self._seconds = seconds
        self._regular = MediaFile(path, limits, may_be_empty=True)
        self._at_end: dict[str, Any] | None = None

    def identity(self, beat: Callable[[], None]) -> dict[str, Any]:
        """Number and digests of the bytes that were read so far; at the end, those of the file as it was left."""
        return self._at_end or super().identity(beat)

    def continues(self, earlier: Mapping[str, Any], beat: Callable[[], None]) -> bool:
        """Whether the file is one that had an ``identity`` earlier, perhaps with more bytes behind it."""
        return self._regular.holds(earlier, beat)

    @property
    def descriptor(self) -> int | None:
        """For reads anywhere in the file."""
        return self._regular.descriptor

    def current_size(self) -> int:
        """Bytes that the file has now."""
        return self._regular.current_size()

    def check_kept(self, beat: Callable[[], None]) -> None:
        """Raise SourceError of kind ``"changed"`` if the file is shorter than what was read of it."""
        self._regular.check_length(self._count)

    def check_unchanged(self, beat: Callable[[], None]) -> None:
        """Raise SourceError of kind ``"changed"`` if the file holds other bytes than those that were read, beside its
        header, in which a recorder notes the length at the end."""
        self._at_end = self._regular.compare(super().identity(beat), beat)

    def _next(self, size: int) -> bytes:
        patience = time.monotonic() + self._seconds
        position = max(self._count, len(self._head))
        while True:
            self._wait()
            block = os.pread(self._regular.file.fileno(), size, position)
            if block or time.monotonic() > patience:
                return block
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        self._regular.close()


class _Reader:
    """The file object that FFmpeg reads from; it has no ``seek``."""

    def __init__(self, file: OnePassFile) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end."""
        return self._file.take(size)


def _mp4_kind(head: bytes) -> str:
    """``front`` or ``behind``: where the index of an mp4 file stands; empty if that is not known."""
    position = 0
    while head[4:8] == b"ftyp" and position + 16 <= len(head):
        size, kind = int.from_bytes(head[position : position + 4], "big"), head[position + 4 : position + 8]
        if kind in (b"moov", b"moof"):
            return "front"
        if kind == b"mdat":
            return "behind"
        if size == 1:
            size = int.from_bytes(head[position + 8 : position + 16], "big")
        if size < 8:
            return ""
        position += size
    return ""

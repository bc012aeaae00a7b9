"""Notices that a file changes while its frames are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longvid.errors import SourceError
from longvid.frames import FrameBlock
from longvid.media.decoding.media_file import MediaFile
from longvid.media.decoding.watchdog import Watchdog

__all__ = ["identity", "is_continued", "unchanged"]

_IDENTITY = ("bytes", "sha256", "body_sha256")
"of a fingerprint: which bytes a file holds"


def unchanged(blocks: Iterator[FrameBlock], file: MediaFile, watchdog: Watchdog) -> Iterator[FrameBlock]:
    """Pass frames on while the file is the one that was opened; nothing is made of damage in one that changes.

    Raises:
        SourceError: kind ``"changed"``, at the end, or before if what was there is there no more.
    """
    beat = watchdog.beat
    try:
        for block in blocks:
            if block.valid_T.all():
                file.check_kept(beat)
            elif not file.one_pass:
                watchdog.run(lambda: file.check_unchanged(beat))
            yield block
    except SourceError as exc:
        if exc.kind in ("damaged", "truncated"):
            watchdog.run(lambda: file.check_unchanged(beat))
        raise
    watchdog.run(lambda: file.check_unchanged(beat))


def identity(file: MediaFile, watchdog: Watchdog, first_frame: str | None) -> dict[str, Any]:
    """Which bytes a file holds, for its fingerprint; of a pipe, the digest of its first frame."""
    if first_frame is not None:
        return {"kind": "pipe", "first_frame": first_frame}
    if file.identity_is_known:  # the thread of the watchdog may be waiting for bytes
        return {"kind": "video", **file.identity(watchdog.beat)}
    return {"kind": "video", **watchdog.run(lambda: file.identity(watchdog.beat))}


def is_continued(
    earlier: Mapping[str, Any], own: Mapping[str, Any], file: MediaFile, run: Callable[[Callable[[], bool]], bool]
) -> bool:
    """Whether a file begins with the bytes of the one that had the fingerprint ``earlier``, and is read as that was.

    A recorder may have noted the length in the header of a file that was read as it grew.
    """
    nothing = dict.fromkeys(_IDENTITY)
    if {**own, **nothing} != {**earlier, **nothing}:
        return False
    return run(lambda: file.continues(earlier, file.beat))

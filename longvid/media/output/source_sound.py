"""Which sound a decoded video gets: that of its source, if it is still the same file, or of a file that was named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

from longvid.errors import LongvidError, SourceError
from longvid.media.decoding.media_file import MediaFile
from longvid.media.limits import Limits
from longvid.media.output.sound import Sound, SoundFile, Window
from longvid.store.reader import LatentStore

__all__ = ["Audio", "sound_of"]

Audio: TypeAlias = "str | os.PathLike[str]"
"``copy`` for the sound of the source, ``none``, or a file whose sound is taken"


def sound_of(latents: LatentStore, frames: tuple[int, int], audio: Audio) -> Callable[[], Sound | None]:
    """What opens the sound for a half-open range of the frames of a store; it gives None for a silent video.

    Sound of the source that cannot be taken along is left out with a warning; that of a file that was named raises
    SourceError.
    """
    first, last = frames
    pts, base = latents.frame_pts, latents.time_base
    frame = 1 / latents.frame_rate if latents.frame_rate else _mean_step(latents)
    stop = int(pts[last]) * base if last < len(pts) else int(pts[last - 1]) * base + frame
    window = Window(begin=int(pts[first]) * base, end=stop, frame=frame)
    if audio == "none":
        return lambda: None
    if audio != "copy":
        return lambda: _of_file(audio, latents, window)

    def copy() -> Sound | None:
        try:
            return _of_source(latents, window)
        except LongvidError as exc:
            warnings.warn(f"the sound of the source is left out: {exc}", stacklevel=2)
            return None

    return copy


def _mean_step(latents: LatentStore) -> Fraction:
    pts = latents.frame_pts
    return Fraction(int(pts[-1] - pts[0]), max(1, len(pts) - 1)) * latents.time_base or Fraction(1, 24)


def _of_file(path: Audio, latents: LatentStore, window: Window) -> Sound:
    """The sound of a file that was named. It begins with the first frame of the store, unless it is the source."""
    name, recorded = os.fspath(path), _recorded(latents)
    file = SoundFile(name, Limits())
    try:
        if _why_other(file, recorded) is None:
            return Sound(file, name, window)
        origin = int(latents.frame_pts[0]) * latents.time_base
        moved = Window(begin=window.begin - origin, end=window.end - origin, frame=window.frame)
        return Sound(file, name, moved, from_start=True)
    except BaseException:
        file.close()
        raise


def _of_source(latents: LatentStore, window: Window) -> Sound | None:
    name, recorded = latents.source.get("name"), _recorded(latents)
    details = latents.source.get("details") or {}
    if latents.source.get("kind") not in ("video", "pipe") or not name or details.get("audio", ()) is None:
        return None
    advice = "name a file with --audio FILE, or leave the sound out with --audio none"
    if latents.source["kind"] == "pipe":
        raise SourceError(f"{name} could be read once only; {advice}")
    window = _on_clock_of_file(latents, window, advice)
    if not Path(name).exists():
        raise SourceError(f"{name} is not there any more; {advice}", kind="missing")
    file = MediaFile(name, Limits())
    try:
        other = _why_other(file, recorded)
        if other is not None:
            raise SourceError(f"{name} is not the file any more that was encoded ({other}); {advice}")
        if "audio" not in details and not _has_sound(file):
            file.close()
            return None
        return Sound(file, name, window)
    except BaseException:
        file.close()
        raise


def _on_clock_of_file(latents: LatentStore, window: Window, advice: str) -> Window:
    """The window on the clock of the source; SourceError if the pictures do not lie on that clock."""
    details = latents.source.get("details") or {}
    if latents.metadata.attributes["longvid"].get("joints"):
        raise SourceError(f"the time stamps of its pictures begin again on the way; {advice}")
    if latents.source.get("timing_assumed"):
        raise SourceError(f"its pictures have no time stamps of their own; {advice}")
    begin = Fraction(details.get("resampled_from_second") or 0)
    return Window(begin=window.begin + begin, end=window.end + begin, frame=window.frame)


def _recorded(latents: LatentStore) -> dict[str, Any]:
    """What the store records of the file that was encoded."""
    found = latents.metadata.fingerprint.get("source")
    return found if isinstance(found, dict) else {}


def _why_other(file: MediaFile, recorded: dict[str, Any]) -> str | None:
    """How a file differs from the one that was encoded; None if it is the same."""
    size, digest = recorded.get("bytes"), recorded.get("sha256")
    if size != file.num_bytes:
        return f"it has {file.num_bytes} bytes, and had {size}"
    return None if digest == file.identity(lambda: None)["sha256"] else "its content has changed"


def _has_sound(file: MediaFile) -> bool:
    with file.open() as container:
        return bool(container.streams.audio)

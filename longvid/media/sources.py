"""One door for everything that frames can come from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from longvid.errors import SourceError, StoreError
from longvid.frames import FrameSource, OnError
from longvid.media.arrays import ArrayFrames, IterableFrames, check_window, is_array
from longvid.media.limits import Limits

if TYPE_CHECKING:
    import zarr

__all__ = ["open_source"]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ACCEPTED = (
    "the path of a video file, the path of a zarr group with an array `frames`, a numpy array, a torch tensor or a "
    "zarr array, uint8 with axes (T, H, W, 3), or an iterable of such arrays"
)


def open_source(
    source: Any,
    *,
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    frame_rate: Fraction | int | None = None,
    on_error: OnError = "stop",
    limits: Limits | None = None,
) -> FrameSource:
    """Open what frames are read from.

    Args:
        source: a media file, a folder that holds a zarr group with an array ``frames``, an array of frames (numpy,
            torch or zarr), or an iterable of such arrays.
        start: index of the first frame delivered.
        frames: how many frames at most; all by default.
        size: (height, width) to resize to; files only.
        frame_rate: frames per second of a source without time stamps; a media file has its own.
        on_error: what happens where a media file is damaged: ``"stop"`` raises, ``"keep"`` ends before the damage,
            ``"conceal"`` repeats the last good frame and marks it.
        limits: what the source may ask for at most.

    Raises:
        SourceError: the source cannot be read, or is none.
    """
    check_window(start, frames)
    if on_error not in get_args(OnError):
        raise SourceError(f"on_error {on_error!r} is not known; choose {', '.join(get_args(OnError))}", kind="range")
    if isinstance(source, (str, os.PathLike)):
        _refuse_address(os.fspath(source))
        path = Path(source)
        if (path / "zarr.json").is_file():
            return _open_zarr(path, start=start, frames=frames, size=size, frame_rate=frame_rate, limits=limits)
        if frame_rate is not None:
            raise SourceError(
                f"frame_rate={frame_rate} was given for {path}, but a media file carries its own time stamps; leave it "
                "out",
                kind="layout",
            )
        from longvid.media.video_file import VideoFile

        return VideoFile(path, start=start, frames=frames, size=size, on_error=on_error, limits=limits)
    if is_array(source):
        return ArrayFrames(source, start=start, frames=frames, size=size, frame_rate=frame_rate, limits=limits)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, dict)):
        return IterableFrames(source, start=start, frames=frames, size=size, frame_rate=frame_rate, limits=limits)
    raise SourceError(f"a {type(source).__name__} is no source of frames; give {_ACCEPTED}", kind="layout")


def _refuse_address(name: str) -> None:
    if _ADDRESS.match(name):
        raise SourceError(
            f"{name} is an address; only files of this machine are read, so download it first", kind="refused"
        )


def _open_zarr(
    path: Path,
    *,
    start: int,
    frames: int | None,
    size: tuple[int, int] | None,
    frame_rate: Fraction | int | None,
    limits: Limits | None,
) -> FrameSource:
    """A zarr group with an array ``frames``: one of ours, compared with its seal, or a stranger's, looked at first."""
    from longvid.store.reader import FrameStore, open_frames
    from longvid.store.validation import read_document

    array: FrameStore | zarr.Array[Any]
    try:
        root = read_document(path / "zarr.json")
        recorded = (root.get("attributes") or {}).get("longvid")
        if isinstance(recorded, dict) and "status" in recorded:
            array = open_frames(path)
            frame_rate = frame_rate or array.frame_rate
        else:
            array = _stranger(path)
            frame_rate = frame_rate or _recorded_rate(path, recorded)
    except StoreError as exc:
        kind = "truncated" if exc.kind == "incomplete" else exc.kind if exc.kind == "refused" else "layout"
        raise SourceError(f"{exc}", kind=kind) from exc
    return ArrayFrames(
        array, start=start, frames=frames, size=size, frame_rate=frame_rate, name=str(path), limits=limits
    )


def _stranger(path: Path) -> zarr.Array[Any]:
    """The array ``frames`` of a group that longvid did not write, if its metadata ask for nothing unusual."""
    import zarr

    from longvid.store.validation import StoreLimits, check_array, check_tree, read_document

    check_tree(path)
    where = path / "frames"
    if not (where / "zarr.json").is_file():
        members = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise SourceError(
            f"the zarr group {path} has no array `frames`; it holds {', '.join(members) or 'nothing'}", kind="layout"
        )
    # whoever made it may like larger chunks than we do; ArrayFrames has the last word on what is held at once
    limits = StoreLimits(max_chunk_bytes=2**31, max_slab_bytes=2**32)
    check_array("frames", read_document(where / "zarr.json"), where=str(path), limits=limits)
    try:
        return zarr.open_array(where, mode="r", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise SourceError(f"{where} cannot be opened as a zarr array: {exc}", kind="layout") from exc


def _recorded_rate(path: Path, recorded: Any) -> Fraction | None:
    text = recorded.get("frame_rate") if isinstance(recorded, dict) else None
    if text is None:
        return None
    try:
        return Fraction(text)
    except (ValueError, TypeError, ZeroDivisionError) as exc:
        raise SourceError(
            f"the attribute longvid.frame_rate of {path} is {text!r}; expected a fraction such as '30000/1001'",
            kind="layout",
        ) from exc

"""Opens whatever frames can come from: files, zarr groups, arrays and iterables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from longvid.errors import SourceError, StoreError
from longvid.frames import FrameSource, OnError
from longvid.media.arrays import ArrayFrames, IterableFrames, check_window, is_array
from longvid.media.limits import Limits

if TYPE_CHECKING:
    import zarr

    from longvid.store.reader import FrameStore

__all__ = ["open_source"]

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
        SourceError: the source cannot be read, or is of a kind that has no frames.
    """
    check_window(start, frames)
    if on_error not in get_args(OnError):
        raise SourceError(f"on_error {on_error!r} is not known; choose {', '.join(get_args(OnError))}", kind="range")
    window: dict[str, Any] = {"start": start, "frames": frames, "size": size, "limits": limits}
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if (path / "zarr.json").is_file():
            stored, rate = _open_zarr(path)
            return ArrayFrames(stored, frame_rate=frame_rate or rate, name=str(path), **window)
        if frame_rate is not None:
            raise SourceError(
                f"frame_rate={frame_rate} was given for {path}, but a media file carries its own time stamps; leave it "
                "out",
                kind="layout",
            )
        from longvid.media.video_file import VideoFile

        return VideoFile(source, on_error=on_error, **window)
    if is_array(source):
        return ArrayFrames(source, frame_rate=frame_rate, **window)
    kind = type(source)
    if kind.__module__.partition(".")[0] == "zarr":
        raise SourceError(
            f"a zarr {kind.__name__} was given as the source; give the array of frames in it, such as "
            'zarr.open_group(store)["frames"], or the path of a group with an array `frames`',
            kind="layout",
        )
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, Mapping)):
        return IterableFrames(source, frame_rate=frame_rate, **window)
    raise SourceError(f"a {kind.__name__} was given as the source; give {_ACCEPTED}", kind="layout")


def _open_zarr(path: Path) -> tuple[FrameStore | zarr.Array[Any], Fraction | None]:
    """The array ``frames`` of a group and its frame rate: of a longvid store, checked with its digests, or of another
    zarr group, whose metadata are checked first."""
    from longvid.store.reader import open_frames
    from longvid.store.validation import read_document

    try:
        root = read_document(path / "zarr.json")
        recorded = (root.get("attributes") or {}).get("longvid")
        if isinstance(recorded, dict) and "status" in recorded:
            store = open_frames(path)
            return store, store.frame_rate
        if root.get("node_type") == "array":
            raise SourceError(
                f"{path} is a zarr array by itself, not a group with an array `frames`; give the array, such as "
                f'zarr.open_array("{path}")',
                kind="layout",
            )
        return _foreign_array(path), _recorded_rate(path, recorded)
    except StoreError as exc:
        kind = "truncated" if exc.kind == "incomplete" else exc.kind if exc.kind == "refused" else "layout"
        raise SourceError(f"{exc}", kind=kind) from exc


def _foreign_array(path: Path) -> zarr.Array[Any]:
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
    # other writers may use larger chunks; ArrayFrames bounds what is held at once
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

"""Opens whatever frames can come from: files, pictures, stores of frames, arrays and iterables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from longvid.errors import SourceError, StoreError
from longvid.media.arrays import ArrayFrames, IterableFrames, is_array
from longvid.media.frame_source import FrameSource, Reading
from longvid.media.pipes import is_pipe

if TYPE_CHECKING:
    from longvid.store.reader import FrameStore

__all__ = ["open_source"]


def open_source(source: Any, **reading: Unpack[Reading]) -> FrameSource:
    """Open what frames are read from: a media file, pictures (a folder, names numbered as in ``frames/%05d.png``, or a
    single one), a store of frames that longvid wrote, an array of frames (numpy, torch or zarr), or an iterable of such
    arrays.

    Raises:
        SourceError: the source cannot be read, or is of a kind that has no frames.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if is_pipe(source):
            from longvid.media.video_file import VideoFile

            return VideoFile(source, **reading)
        if (path / "zarr.json").is_file():
            store = _open_store(path)
            reading["frame_rate"] = reading.get("frame_rate") or store.frame_rate
            frames = ArrayFrames(store, name=str(path), **reading)
            frames.info = replace(frames.info, sample_aspect_ratio=store.sample_aspect_ratio)
            return frames
        from longvid.media.pictures.animation import AnimatedWebP, is_animated_webp
        from longvid.media.pictures.picture_folder import PictureFolder, is_pictures

        if is_animated_webp(os.fspath(source)):
            return AnimatedWebP(source, **reading)
        if is_pictures(os.fspath(source)):
            return PictureFolder(source, **reading)
        from longvid.media.video_file import VideoFile

        return VideoFile(source, **reading)
    if reading.get("follow_seconds") is not None:
        raise SourceError(
            f"a {type(source).__name__} was given as the source, and only files are followed as they grow; leave "
            "follow=True out",
            kind="layout",
        )
    if is_array(source):
        return ArrayFrames(source, **reading)
    kind = type(source)
    if kind.__module__.partition(".")[0] == "zarr":
        raise SourceError(
            f"a zarr {kind.__name__} was given as the source; give the array of frames in it, such as "
            'zarr.open_group(store)["frames"]',
            kind="layout",
        )
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, Mapping)):
        return IterableFrames(source, **reading)
    raise SourceError(
        f"a {kind.__name__} was given as the source; give the path of a video file or of a store of frames, a numpy "
        "array, a torch tensor or a zarr array, uint8 with axes (T, H, W, 3), or an iterable of such arrays",
        kind="layout",
    )


def _open_store(path: Path) -> FrameStore:
    """A store of frames that longvid wrote, compared with its digests as it is read."""
    from longvid.store.reader import open_frames

    try:
        return open_frames(path)
    except StoreError as exc:
        if exc.kind == "foreign":
            raise SourceError(
                f"{path} is a zarr store that longvid did not write; open the array of frames in it and pass that, "
                f'such as zarr.open_array("{path / "frames"}")',
                kind="layout",
            ) from exc
        kind = "truncated" if exc.kind == "incomplete" else exc.kind if exc.kind == "refused" else "layout"
        raise SourceError(f"{exc}", kind=kind) from exc

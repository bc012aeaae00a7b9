"""What flows into and out of the caller's thread while a whole video is encoded or decoded.

Read ahead: frames re-blocked and padded, latents of a store. Written behind: latents to a store, frames to whatever
``out`` names. The functions run in the reader's and the writer's thread and touch neither model nor device.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from longvid.engine import Frames, Times
from longvid.reblock import Reblocker, pad_frames
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store import LatentStore, check_target
from longvid.store_writer import FrameStoreWriter, LatentWriter
from longvid.video.frames import ColorInfo, FrameSource
from longvid.video.writer import VideoWriter

__all__ = ["FramePiece", "LatentPiece", "frame_chunks", "frame_sink", "latent_chunks", "store_latents"]


@dataclass(frozen=True, slots=True)
class FramePiece:
    """Frames of one chunk, padded for the model, with the time stamps of the true ones."""

    chunk: Chunk
    frames: Frames
    pts: Times


@dataclass(frozen=True, slots=True)
class LatentPiece:
    """What a chunk was encoded to, on the host."""

    chunk: Chunk
    pts: Times
    latents: Tensor
    moments: Tensor | None


def frame_chunks(video: FrameSource, plan: ChunkSchedule, size: tuple[int, int]) -> Iterator[FramePiece]:
    """Runs in the reader thread: decode, re-block, pad to ``size``."""
    reblock = Reblocker(plan.capacity)

    def piece(chunk: Chunk, frames: Frames, pts: Times) -> FramePiece:
        return FramePiece(chunk, pad_frames(frames, chunk.padded_frames, *size), pts)

    for block in video.blocks():
        for index, (frames, pts) in reblock.push(block.frames_THWC, block.pts_T):
            yield piece(plan.full(index), frames, pts)
    rest = reblock.rest()
    if rest is not None:
        index, (frames, pts) = rest
        yield piece(plan.tail(index, len(frames)), frames, pts)


def store_latents(target: LatentWriter, piece: LatentPiece) -> None:
    """Runs in the writer thread."""

    def host(z_BCTHW: Tensor) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", z_BCTHW[0].movedim(1, 0).float().contiguous().numpy())

    moments = None if piece.moments is None else host(piece.moments)
    target.write(piece.chunk, host(piece.latents), piece.pts, moments)


def latent_chunks(
    store: LatentStore, plan: ChunkSchedule, stop_frame: int
) -> Iterator[tuple[Chunk, npt.NDArray[np.float32]]]:
    """Runs in the reader thread: latents (t, c, h, w) of every chunk up to ``stop_frame``."""
    for chunk in plan.chunks(store.num_frames):
        if chunk.frame_start >= stop_frame:
            return
        yield chunk, store.read(chunk.latent_start, chunk.latent_stop)


@contextmanager
def _call_sink(out: Callable[[Frames], None]) -> Iterator[Callable[[Frames, Times], None]]:
    yield lambda frames, _: out(frames)


@contextmanager
def _writer_sink(target: VideoWriter | FrameStoreWriter) -> Iterator[Callable[[Frames, Times], None]]:
    with target:
        yield target.write


def frame_sink(store: LatentStore, out: Any, overwrite: bool) -> Any:
    """A context manager that gives ``write(frames, pts)`` for what ``out`` names. Nothing is created yet."""
    if callable(out):
        return _call_sink(out)
    path = Path(out)
    size: dict[str, Any] = {
        "height": store.height,
        "width": store.width,
        "time_base": store.time_base,
        "frame_rate": store.frame_rate,
        "overwrite": overwrite,
    }
    if path.suffix == ".zarr":
        check_target(path, overwrite)
        return _writer_sink(FrameStoreWriter(path, source=store.source, **size))
    color = store.source.get("color")
    return _writer_sink(VideoWriter(path, color=None if color is None else ColorInfo(**color), **size))

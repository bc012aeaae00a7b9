"""What flows into and out of the caller's thread while a whole video is encoded or decoded.

Read ahead: frames re-blocked and padded, latents of a store. Written behind: latents to a store, frames to whatever
``out`` names. The functions run in the reader's and the writer's thread and touch neither model nor device.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from longvid.frames import ColorInfo, FrameSource, SourcePosition, frame_digest
from longvid.media.video_writer import VideoWriter
from longvid.runtime.engine import Frames, Times
from longvid.runtime.reblock import Reblocker, pad_frames
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.latent_writer import LatentWriter
from longvid.store.reader import LatentStore

__all__ = [
    "CallSink",
    "FramePiece",
    "FrameSink",
    "LatentPiece",
    "frame_chunks",
    "latent_chunks",
    "store_latents",
    "video_sink",
]


@dataclass(frozen=True, slots=True)
class FramePiece:
    """Frames of one chunk, padded for the model, with the time stamps of the true ones."""

    chunk: Chunk
    frames: Frames
    pts: Times
    valid: npt.NDArray[np.bool_]
    "which of the true frames are the source's own"
    last_frame: Frames
    "(1, H, W, 3), of its own memory: the last true one as the source gave it"

    @property
    def position(self) -> SourcePosition:
        """Where the source stands behind this chunk. Costs a digest of a frame, so only who saves it asks."""
        return SourcePosition(
            num_frames=self.chunk.frame_stop, pts=int(self.pts[-1]), digest=frame_digest(self.last_frame[0])
        )


@dataclass(frozen=True, slots=True)
class LatentPiece:
    """What a chunk was encoded to, on the host."""

    chunk: Chunk
    pts: Times
    valid: npt.NDArray[np.bool_]
    latents: Tensor
    moments: Tensor | None


def frame_chunks(
    video: FrameSource,
    plan: ChunkSchedule,
    size: tuple[int, int],
    *,
    first: int = 0,
    after: SourcePosition | None = None,
    replaced: frozenset[int] = frozenset(),
    stage: Callable[[Frames], Frames] = lambda frames: frames,
) -> Iterator[FramePiece]:
    """Runs in the reader thread: decode, re-block, pad to ``size``, lay out where the device can fetch it.

    Args:
        video: the frames.
        plan: how they are cut.
        size: (height, width) to pad to.
        first: number of the first chunk.
        after: where the source stands before it.
        replaced: chunks whose frames are to repeat the last one before them.
        stage: copies padded frames to where the device fetches them from; see :meth:`.Engine.staged`.
    """
    reblock = Reblocker(plan.capacity, first=first)
    before: Frames | None = None

    def piece(chunk: Chunk, frames: Frames, pts: Times, valid: npt.NDArray[np.bool_]) -> FramePiece:
        nonlocal before
        last_frame = frames[-1:].copy(order="K")
        if chunk.index in replaced and before is not None:
            frames, valid = np.repeat(before, len(frames), axis=0), np.zeros(len(frames), np.bool_)
        else:
            before = last_frame
        padded = stage(pad_frames(frames, chunk.padded_frames, *size))
        return FramePiece(chunk, padded, pts, valid, last_frame)

    for block in video.blocks(after=after):
        for index, (frames, pts, valid) in reblock.push(block.frames_THWC, block.pts_T, block.valid_T):
            yield piece(plan.full(index), frames, pts, valid)
    rest = reblock.rest()
    if rest is not None:
        index, (frames, pts, valid) = rest
        yield piece(plan.tail(index, len(frames)), frames, pts, valid)


def store_latents(target: LatentWriter, piece: LatentPiece) -> None:
    """Runs in the writer thread."""

    def host(z_BCTHW: Tensor) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", z_BCTHW[0].movedim(1, 0).float().contiguous().numpy())

    moments = None if piece.moments is None else host(piece.moments)
    target.write(piece.chunk, host(piece.latents), piece.pts, moments, piece.valid)


def latent_chunks(
    store: LatentStore, plan: ChunkSchedule, stop_frame: int, *, first: int = 0
) -> Iterator[tuple[Chunk, npt.NDArray[np.float32]]]:
    """Runs in the reader thread: latents (t, c, h, w) of every chunk from ``first`` up to ``stop_frame``."""
    for chunk in plan.chunks(store.num_frames):
        if chunk.frame_start >= stop_frame:
            return
        if chunk.index >= first:
            yield chunk, store.read(chunk.latent_start, chunk.latent_stop)


class CallSink:
    """Hands frames to a function of the caller's."""

    def __init__(self, out: Callable[[Frames], None]) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass

    def write(self, frames_THWC: Frames, pts_T: Times, valid_T: npt.NDArray[np.bool_] | None = None) -> None:
        """Pass the frames on."""
        self._out(frames_THWC)


FrameSink: TypeAlias = CallSink | VideoWriter | FrameStoreWriter
"a context manager with ``write(frames, pts, valid)``"


def video_sink(store: LatentStore, out: Path, overwrite: bool) -> VideoWriter:
    """What writes the frames of ``store`` to a video file. Nothing is created yet."""
    color = store.source.get("color")
    return VideoWriter(
        out,
        size=(store.height, store.width),
        time_base=store.time_base,
        frame_rate=store.frame_rate,
        color=None if color is None else ColorInfo(**color),
        overwrite=overwrite,
    )

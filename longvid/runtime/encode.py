"""Encode: a whole video from a source to a store of latents.

The path of one chunk. A queue stands for the bounded futures of :mod:`longvid.runtime.prefetch`::

    reader thread                caller's thread                              writer thread
    frames -> re-block -> queue -> device -> model + cache -> host -> queue -> check -> commit unit -> commit
                                              |              \\-> ChunkEvent to the callbacks
                                              \\-> now and then, between two chunks: snapshot

Decoding (:mod:`longvid.runtime.decode`) is the same with latents in and frames out. A run that finds an unfinished
store of its own fingerprint resumes from the newest snapshot in it; what was committed after that snapshot is computed
again and must come out the same.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from longvid.errors import ModelError, NonFiniteError, StoreError
from longvid.events import RunReport
from longvid.frames import Frames, Marks, SourcePosition, Times, frame_digest
from longvid.media.arrays import FrameSource
from longvid.media.limits import Limits
from longvid.media.sources import open_source
from longvid.models.kernels.cpu import compute_threads
from longvid.runtime.admission import Admission, Job, RunOptions
from longvid.runtime.monitor import Monitor, nothing_done
from longvid.runtime.prefetch import Prefetcher, Writer
from longvid.runtime.reblock import Reblocker, pad_frames
from longvid.runtime.run import EncodeRun, Representation, check_representation
from longvid.runtime.snapshot import Checkpoints
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import ReadOptions, RunFacts, ratio
from longvid.store.target import check_target

__all__ = ["EncodeOptions", "EncodedChunk", "OnNonFinite", "encode_video", "frame_chunks", "store_latents"]

OnNonFinite: TypeAlias = Literal["stop", "quarantine"]
EncodedChunk: TypeAlias = tuple[Chunk, Times, Marks, Tensor, Tensor | None]
"a chunk with the time stamps and marks of its true frames, its latents, and its moments if they are stored"
_SHRINK = 0.8
"least share of their bytes that latents take on the disk; 0.9 is usual"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions(RunOptions):
    """How a video is encoded; see :meth:`longvid.VideoSession.encode`."""

    reading: ReadOptions
    representation: Representation
    store_dtype: Literal["float16", "float32"]
    seed: int
    on_non_finite: OnNonFinite = "stop"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_representation(self.representation, self.seed)
        if self.store_dtype not in ("float16", "float32"):
            raise StoreError(f"store_dtype {self.store_dtype!r} is not known; choose float16 or float32", kind="format")
        if self.on_non_finite not in get_args(OnNonFinite):
            raise ModelError(f"on_non_finite {self.on_non_finite!r} is not known; choose stop or quarantine")


def encode_video(job: Job, source: Any, store: Path, options: EncodeOptions) -> RunReport:
    """Encode a video into a store, or resume it. Arguments and errors are those of ``VideoSession.encode``."""
    replaced: frozenset[int] = frozenset()
    while True:
        try:
            return _encode(job, source, store, options, replaced)
        except NonFiniteError as exc:
            why = _why_not_quarantined(exc.chunk, source, options, replaced)
            if why:
                raise NonFiniteError(f"{exc}; {why}", chunk=exc.chunk) from exc
            warnings.warn(
                f"chunk {exc.chunk} was encoded to values that are not finite; its frames are replaced by the last "
                "one before them and marked in frame_valid",
                stacklevel=4,
            )
            replaced |= {exc.chunk}
            options = replace(options, resume=True)  # the store is the one that this call has begun


def _why_not_quarantined(chunk: int, source: Any, options: EncodeOptions, replaced: frozenset[int]) -> str:
    """Why the chunk is an error, and what to do; empty if its frames can be replaced."""
    if chunk in replaced:
        return "replacing its frames by the last one before them did not help"
    if chunk == 0:
        return "no good frame stands before the first chunk; skip its frames (--start)"
    if hasattr(source, "__next__"):
        return "its frames cannot be replaced, since the source can be read only once; give a file or an array"
    if options.on_non_finite == "stop":
        return "its frames can be replaced by the last one before them (--on-non-finite quarantine)"
    return ""


@dataclass(frozen=True, slots=True)
class _Task:
    """One attempt to encode one video."""

    job: Job
    options: EncodeOptions
    video: FrameSource
    admission: Admission
    replaced: frozenset[int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames that the model sees."""
        info = self.video.info
        return self.job.engine.model.geometry.padded_size(info.height, info.width)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a latent frame."""
        geometry, (height, width) = self.job.engine.model.geometry, self.size
        return geometry.latent_channels, height // geometry.pixels_per_latent, width // geometry.pixels_per_latent

    @property
    def stored_bytes(self) -> int:
        """Bytes of a latent frame in the store, before compression."""
        options, (channels, height, width) = self.options, self.latent_shape
        arrays = 3 if options.representation == "moments" else 1
        return arrays * channels * height * width * (2 if options.store_dtype == "float16" else 4)

    @property
    def seed(self) -> dict[str, int]:
        """The seed, if it decides the result."""
        return {"seed": self.options.seed} if self.options.representation == "sample" else {}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bits of the latents."""
        return {
            "kind": "latents",
            "source": self.video.fingerprint(),
            **self.job.engine.fingerprint(self.admission.part.execution.numerics, self.admission.num_threads),
            "chunk_plan": self.admission.schedule.to_dict(),
            "representation": self.options.representation,
            "store_dtype": self.options.store_dtype,
            **self.seed,
        }


def _encode(job: Job, source: Any, store: Path, options: EncodeOptions, replaced: frozenset[int]) -> RunReport:
    engine = job.engine
    found = check_target(store)
    with ExitStack() as stack:
        video = stack.enter_context(open_source(source, **asdict(options.reading), limits=options.limits))
        info = video.info
        size, earlier = (info.height, info.width), options.continued(found)
        admission = job.control.admit("encode", size, earlier=earlier, whole=True)
        task = _Task(job, options, video, admission, replaced)
        fingerprint = task.fingerprint()
        if options.is_done(found, fingerprint):
            return nothing_done(admission, found)
        num_latents = None if info.num_frames is None else admission.schedule.num_latents(info.num_frames)
        options.check_disk(found, admission.part, num_latents, task.stored_bytes * _SHRINK)
        target = _writer(task, store, fingerprint)
        run = EncodeRun(engine, admission.part, options.representation, options.seed, traced=job.traced)
        stack.enter_context(compute_threads(admission.num_threads))
        stack.enter_context(run)
        monitor = stack.enter_context(Monitor(job.callbacks, run, admission.plan, info.num_frames))
        with target:
            checkpoints = Checkpoints(target, run, fingerprint)
            ended = _encode_chunks(task, target, run, monitor, checkpoints)
        return monitor.finish(complete=ended, snapshot_seconds=checkpoints.seconds)


def _writer(task: _Task, store: Path, fingerprint: dict[str, Any]) -> LatentWriter:
    engine, options, info = task.job.engine, task.options, task.video.info
    # what a repair needs to read the source as this run does
    reading = {**asdict(options.reading), "frame_rate": ratio(options.reading.frame_rate)}
    return LatentWriter(
        store,
        schedule=task.admission.schedule,
        source=info,
        layout=LatentLayout(
            shape_CYX=task.latent_shape, representation=options.representation, dtype=options.store_dtype
        ),
        facts=RunFacts(
            fingerprint=fingerprint,
            vae=engine.model.describe(),
            extra={
                "compute_dtype": engine.dtype_name,
                "compute_device": engine.device.type,
                "numerics": task.admission.part.execution.numerics.to_dict(),
                "padded_size": list(task.size),
                "pixel_range": [-1, 1],
                "run": {**reading, "source": info.name if info.kind == "video" else None},
                **task.seed,
            },
        ),
        options=options,
    )


def _encode_chunks(
    task: _Task, target: LatentWriter, run: EncodeRun, monitor: Monitor, checkpoints: Checkpoints
) -> bool:
    """The loop; returns whether it came to the end of the video."""
    schedule, replaced, stop = task.admission.schedule, task.replaced, task.job.stop
    snapshot = checkpoints.restore(latest=min(replaced) - 1 if replaced else None)
    monitor.skip(snapshot, schedule)
    first, after = (0, None) if snapshot is None else (snapshot.chunk, snapshot.position)
    frames = frame_chunks(
        task.video, schedule, task.size, first=first, after=after, replaced=replaced, stage=task.job.engine.staged
    )
    with (
        Writer[EncodedChunk](lambda item: store_latents(target, *item), stop=stop) as writer,
        Prefetcher(frames, check=writer.check, stop=stop) as reader,
    ):
        piece = None
        for piece in reader:
            with monitor.timed():
                latents, moments = run.latents(piece.chunk, piece.frames)
            writer.put((piece.chunk, piece.pts, piece.valid, latents, moments))
            monitor.emit(piece.chunk.num_frames, piece.chunk.num_latents, reader, writer)
            if target.wants_nothing_from(piece.chunk.latent_stop):
                break
            if checkpoints.due:
                checkpoints.take(piece.chunk.index + 1, piece.position, writer)
        if not reader.ended:
            if piece is not None:
                checkpoints.take(piece.chunk.index + 1, piece.position, writer)
            target.pause()
    return reader.ended


@dataclass(frozen=True, slots=True)
class FramePiece:
    """Frames of one chunk, padded for the model, with the time stamps of the true ones."""

    chunk: Chunk
    frames: Frames
    pts: Times
    valid: Marks
    last_frame: Frames
    "(1, H, W, 3), a copy of the last true frame as the source gave it"

    @property
    def position(self) -> SourcePosition:
        """Position of the source after this chunk. It costs a digest of a frame, so it is made on demand."""
        return SourcePosition(
            num_frames=self.chunk.frame_stop, pts=int(self.pts[-1]), digest=frame_digest(self.last_frame[0])
        )


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
    """Decode, re-block, pad to ``size`` and stage the frames of every chunk; runs in the reader thread.

    The video starts with chunk ``first`` behind ``after``. Chunks in ``replaced`` repeat the last frame before them.
    """
    reblock = Reblocker(plan.capacity, first=first)
    before: Frames | None = None

    def piece(chunk: Chunk, frames: Frames, pts: Times, valid: Marks) -> FramePiece:
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
    for index, (frames, pts, valid) in reblock.rest():
        yield piece(plan.tail(index, len(frames)), frames, pts, valid)


def store_latents(
    target: LatentWriter, chunk: Chunk, pts: Times, valid: Marks, latents: Tensor, moments: Tensor | None
) -> None:
    """Write the latents of one chunk, which are on the host; runs in the writer thread."""

    def rows(z_BCTHW: Tensor) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", z_BCTHW[0].movedim(1, 0).float().contiguous().numpy())

    target.write(chunk, rows(latents), pts, None if moments is None else rows(moments), valid)

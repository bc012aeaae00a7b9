"""Encode: a whole video from a source to a store of latents, or what a store still lacks.

A run that finds an unfinished store of its own fingerprint continues behind its last commit; which chunks that takes,
and what proves that it computes the same, is a :class:`~longvid.runtime.span.Span`.

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
from longvid.frames import Frames, Marks, Times
from longvid.media.arrays import FrameSource
from longvid.media.limits import Limits
from longvid.media.sources import open_source
from longvid.models.kernels.cpu import compute_threads
from longvid.runtime.admission import Admission, Job, RunOptions, Share
from longvid.runtime.monitor import Monitor, nothing_done
from longvid.runtime.reblock import Reblocker, pad_frames
from longvid.runtime.run import EncodeRun, Representation, check_representation
from longvid.runtime.span import Span, SpanSteps, run_span
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
        RunOptions.__post_init__(self)
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
            if options.resume == "never":  # the store is the one that this call has begun
                options = replace(options, resume="exact")


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
    share: Share
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

    def span(self, target: LatentWriter) -> Span:
        """The chunks that the store lacks, and those in front of them."""
        schedule, control = self.admission.schedule, self.job.control
        row, stop = target.wanted_rows
        return Span.of(
            schedule.index_of_latent(self.origin.latent_start + row),
            self.share.stop if stop is None else schedule.index_of_latent(self.origin.latent_start + stop - 1) + 1,
            lambda: control.warmup("encode", schedule),
            origin=self.share.first,
            proof=row > 0 and not self.options.mend,
        )

    @property
    def origin(self) -> Chunk:
        """The chunk at which the store begins."""
        return self.admission.schedule.full(self.share.first)

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
            **self.share.fingerprint,
        }


def _encode(job: Job, source: Any, store: Path, options: EncodeOptions, replaced: frozenset[int]) -> RunReport:
    engine, store = job.engine, options.path_of(store)
    found = check_target(store)
    with ExitStack() as stack:
        video = stack.enter_context(open_source(source, **asdict(options.reading), limits=options.limits))
        info = video.info
        size, earlier = (info.height, info.width), options.continued(found)
        admission = job.control.admit("encode", size, earlier=earlier, whole=True)
        length = info.num_frames if options.part is None else video.count_frames()
        share = options.part_of(admission.schedule, (0, length or 1), "latent")
        if share.first:
            job.control.warmup("encode", admission.schedule)  # raises if the model runs from frame 0 only
        task = _Task(job, options, video, admission, share, replaced)
        fingerprint = task.fingerprint()
        if options.is_done(found, fingerprint):
            return nothing_done(admission, found)
        length = None if length is None else share.window[1] - share.window[0]
        num_latents = None if length is None else admission.schedule.num_latents(length)
        options.check_disk(found, num_latents, task.stored_bytes * _SHRINK)
        target = _writer(task, store, fingerprint)
        run = EncodeRun(engine, admission.part, options.representation, options.seed, traced=job.traced)
        stack.enter_context(compute_threads(admission.num_threads))
        stack.enter_context(run)
        monitor = stack.enter_context(Monitor(job.callbacks, run, admission.plan, length))
        with target:
            done = _encode_chunks(task, target, run, monitor, fingerprint["source"])
        return monitor.finish(complete=done)


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
                "tiling": task.admission.part.execution.tiling,
                "padded_size": list(task.size),
                "pixel_range": [-1, 1],
                "run": {**reading, "source": info.name if info.kind == "video" else None},
                **task.seed,
            },
        ),
        options=options,
        part=task.share.part,
    )


def _encode_chunks(task: _Task, target: LatentWriter, run: EncodeRun, monitor: Monitor, source: dict[str, Any]) -> bool:
    """Compute what the store lacks; returns whether that is done."""
    schedule, span, origin = task.admission.schedule, task.span(target), task.origin
    known, num_known = target.known_frames, target.wanted_rows[0] if target.known_frames else 0
    replaced = task.replaced | _replaced_before(schedule, origin, target.known("frame_valid"))
    first = schedule.full(span.first)
    target.start_at(first.latent_start - origin.latent_start, first.frame_start - origin.frame_start)
    if span.warmup is not None:
        target.record("warmup_chunks", span.warmup.chunks)
    if not task.options.mend:
        monitor.resume(known, num_known)

    def compute(piece: FramePiece) -> EncodedChunk:
        return piece.chunk, piece.pts, piece.valid, *run.latents(piece.chunk, piece.values)

    def count(chunk: Chunk) -> tuple[int, int]:
        if task.options.mend:
            return chunk.num_frames, chunk.num_latents
        frame = max(chunk.frame_start, origin.frame_start + known)
        latent = max(chunk.latent_start, origin.latent_start + num_known)
        return max(0, chunk.frame_stop - frame), max(0, chunk.latent_stop - latent)

    def write(item: EncodedChunk) -> None:
        num_units = target.committed_units
        store_latents(target, *item)
        if target.committed_units > num_units:
            task.video.index.save(target.seek_index)

    task.video.index.load(target.seek_index, source)
    steps: SpanSteps[FramePiece, EncodedChunk] = SpanSteps(
        read=lambda start: frame_chunks(
            task.video, schedule, task.size, first=start, replaced=replaced, stage=task.job.engine.staged
        ),
        check=lambda piece: target.check_times(piece.chunk.frame_start - origin.frame_start, piece.pts),
        compute=compute,
        write=write,
        count=count,
    )
    done = run_span(span, run, steps, monitor, task.job.stop)
    if not done:
        target.pause()
    return done


def _replaced_before(schedule: ChunkSchedule, origin: Chunk, valid_T: Marks) -> frozenset[int]:
    """The chunks without a good frame in what is stored: their frames repeat the last one before them."""
    extra = int(origin.index == 0)  # the first frame of a video, which stands alone
    length = max(0, len(valid_T) - extra) // schedule.chunk_frames * schedule.chunk_frames
    good: Marks = np.any(valid_T[extra : extra + length].reshape(-1, schedule.chunk_frames), axis=1)
    good[:extra] |= valid_T[:extra]
    return frozenset((origin.index + np.flatnonzero(~good)).tolist())


@dataclass(frozen=True, slots=True)
class FramePiece:
    """Frames of one chunk, padded for the model, with the time stamps of the true ones."""

    chunk: Chunk
    values: Frames
    pts: Times
    valid: Marks


def frame_chunks(
    video: FrameSource,
    plan: ChunkSchedule,
    size: tuple[int, int],
    *,
    first: int = 0,
    replaced: frozenset[int] = frozenset(),
    stage: Callable[[Frames], Frames] = lambda frames: frames,
) -> Iterator[FramePiece]:
    """Decode, re-block, pad to ``size`` and stage the frames of every chunk; runs in the reader thread.

    The first piece is chunk ``first``. Chunks in ``replaced`` repeat the last frame before them.
    """
    start = first
    while start in replaced and start > 0:  # the frame that it repeats lies further back
        start -= 1
    reblock = Reblocker(plan.capacity, first=start)
    before: Frames | None = None

    def piece(chunk: Chunk, frames: Frames, pts: Times, valid: Marks) -> FramePiece:
        nonlocal before
        if chunk.index in replaced and before is not None:
            frames, valid = np.repeat(before, len(frames), axis=0), np.zeros(len(frames), np.bool_)
        else:
            before = frames[-1:].copy(order="K")
        padded = stage(pad_frames(frames, chunk.padded_frames, *size))
        return FramePiece(chunk, padded, pts, valid)

    def pieces() -> Iterator[FramePiece]:
        for block in video.blocks(first=plan.full(start).frame_start):
            for index, (frames, pts, valid) in reblock.push(block.frames_THWC, block.pts_T, block.valid_T):
                yield piece(plan.full(index), frames, pts, valid)
        for index, (frames, pts, valid) in reblock.rest():
            yield piece(plan.tail(index, len(frames)), frames, pts, valid)

    return (made for made in pieces() if made.chunk.index >= first)


def store_latents(
    target: LatentWriter, chunk: Chunk, pts: Times, valid: Marks, latents: Tensor, moments: Tensor | None
) -> None:
    """Write the latents of one chunk, which are on the host; runs in the writer thread."""

    def rows(z_BCTHW: Tensor) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", z_BCTHW[0].movedim(1, 0).float().contiguous().numpy())

    target.write(chunk, rows(latents), pts, None if moments is None else rows(moments), valid)

"""Decode: a whole store of latents to a video file, a store of frames or a callable.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from longvid.errors import ScheduleError, StoreError
from longvid.events import RunReport
from longvid.frames import ColorInfo, Frames, Marks, Times
from longvid.media.video_writer import VideoWriter
from longvid.models.base import CausalVAE, model_name
from longvid.models.kernels.cpu import compute_threads
from longvid.runtime.admission import Admission, Job, RunOptions, Share
from longvid.runtime.monitor import Monitor, nothing_done
from longvid.runtime.run import DecodeRun
from longvid.runtime.span import Span, SpanSteps, run_span
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.metadata import RunFacts
from longvid.store.reader import LatentStore, open_store, require_complete
from longvid.store.target import check_target
from longvid.store.writer import StoreWriter

__all__ = ["DecodeOptions", "decode_video", "latent_chunks", "video_sink"]

_Write: TypeAlias = Callable[[Frames, Times, Marks], None]
_SHRINK = 0.05
"least share of their bytes that frames take on the disk: drawings compress well, film to about 0.4"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions(RunOptions):
    """How a store is decoded; see :meth:`longvid.VideoSession.decode`."""

    start: int = 0
    frames: int | None = None


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was stopped, and what it writes cannot be continued: leave its sink by an exception."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One store that is decoded."""

    job: Job
    options: DecodeOptions
    latents: LatentStore
    admission: Admission
    share: Share

    @property
    def window(self) -> tuple[int, int]:
        """Half-open range of the frames that are written."""
        return self.share.window

    def span(self, target: StoreWriter | None) -> Span:
        """The chunks that the window needs and the store lacks, and those in front of them."""
        schedule, control, (first, last) = self.admission.schedule, self.job.control, self.window
        row, stop = (0, None) if target is None else target.wanted_rows
        return Span.of(
            schedule.index_of_frame(first + row),
            schedule.index_of_frame((last if stop is None else min(last, first + stop)) - 1) + 1,
            lambda: control.warmup("decode", schedule),
            origin=schedule.index_of_frame(first),
            proof=row > 0 and not self.options.mend,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bits of the frames."""
        latents = self.latents
        return {
            "kind": "frames",
            "latents": {
                "digests": latents.metadata.digests,
                "num_frames": latents.num_frames,
                "dtype": str(latents.latents.dtype),
            },
            "window": list(self.window),
            "size": [latents.height, latents.width],
            **self.job.engine.fingerprint(self.admission.part.execution.numerics, self.admission.num_threads),
            "chunk_plan": self.admission.schedule.to_dict(),
            **self.share.fingerprint,
        }


def decode_video(
    job: Job, store: str | os.PathLike[str] | LatentStore, out: Path | Callable[[Frames], None], options: DecodeOptions
) -> RunReport:
    """Decode a store, or resume it. Arguments and errors are those of ``VideoSession.decode``."""
    latents = store if isinstance(store, LatentStore) else open_store(store)
    _require_decodable(latents, job.engine.model)
    window = _frame_window(latents.num_frames, options.start, options.frames)
    target = _store_path(out, options)
    found = None if target is None else check_target(target)
    earlier = None if found is None else options.continued(found)
    size = (latents.height, latents.width)
    admission = job.control.admit("decode", size, earlier=earlier, whole=True)
    share = options.part_of(admission.schedule, window, "frame")
    if share.part is not None and share.first:
        job.control.warmup("decode", admission.schedule)  # raises if the model runs from frame 0 only
    task, window = _Task(job, options, latents, admission, share), share.window
    fingerprint = task.fingerprint()
    if found is not None:
        if options.is_done(found, fingerprint):
            return nothing_done(admission, found)
        options.check_disk(found, window[1] - window[0], size[0] * size[1] * 3 * _SHRINK)
    sink, write = _sink(task, out, target, fingerprint)
    with ExitStack() as stack:
        stack.enter_context(compute_threads(admission.num_threads))
        run = stack.enter_context(DecodeRun(job.engine, admission.part, size, traced=job.traced))
        monitor = stack.enter_context(Monitor(job.callbacks, run, admission.plan, window[1] - window[0]))
        done = False
        with suppress(_Stopped), sink:
            done = _decode_chunks(task, write, run, monitor, sink if isinstance(sink, StoreWriter) else None)
        return monitor.finish(complete=done)


def _store_path(out: Path | Callable[[Frames], None], options: DecodeOptions) -> Path | None:
    """Where frames are written to a store; None for a video file and for a callable."""
    if isinstance(out, Path) and (out.suffix == ".zarr" or options.mend):
        return options.path_of(out)
    if options.part is not None:
        raise StoreError(
            f"a part of {out} was asked for; nothing joins video files exactly, so give a path that ends in .zarr",
            kind="format",
        )
    return None


def _sink(
    task: _Task, out: Path | Callable[[Frames], None], target: Path | None, fingerprint: Mapping[str, Any]
) -> tuple[AbstractContextManager[Any], _Write]:
    """Where the frames are written, and what writes them. Nothing is created yet."""
    latents, options = task.latents, task.options
    if not isinstance(out, Path):
        return nullcontext(), lambda frames, *_: out(frames)
    if target is None:
        video = video_sink(latents, out, options.overwrite)
        return video, video.write
    store = FrameStoreWriter(
        target,
        size=(latents.height, latents.width),
        time_base=latents.time_base,
        frame_rate=latents.frame_rate,
        source=latents.source,
        facts=RunFacts(
            fingerprint=fingerprint,
            vae=latents.vae,
            extra={
                "numerics": task.admission.part.execution.numerics.to_dict(),
                "tiling": task.admission.part.execution.tiling,
                "latents": str(latents.path),
            },
        ),
        options=options,
        part=task.share.part,
    )
    return store, store.write


def _decode_chunks(task: _Task, write: _Write, run: DecodeRun, monitor: Monitor, target: StoreWriter | None) -> bool:
    """Compute what the output lacks; returns whether that is done. ``target`` is the output if it is a store."""
    latents, schedule, (first, last) = task.latents, task.admission.schedule, task.window
    span, known = task.span(target), first if target is None else first + target.known_frames
    pts, valid = latents.frame_pts, latents.frame_valid

    def inside(chunk: Chunk, start: int = first) -> tuple[int, int]:
        """The frames of a chunk that lie in the window, from ``start`` on."""
        return min(max(chunk.frame_start, start), last), min(max(chunk.frame_stop, start), last)

    def compute(piece: LatentPiece) -> tuple[Frames, Times, Marks]:
        a, b = inside(piece.chunk)
        pixels = run.frames(piece.chunk, piece.values)
        return pixels[a - piece.chunk.frame_start : b - piece.chunk.frame_start], pts[a:b], valid[a:b]

    def count(chunk: Chunk) -> tuple[int, int]:
        a, b = inside(chunk, first if task.options.mend else known)
        return b - a, chunk.num_latents if a < b else 0

    if target is not None:
        frame, _ = inside(schedule.full(span.first))
        target.start_at(frame - first, frame - first)
        if span.warmup is not None:
            target.record("warmup_chunks", span.warmup.chunks)
        if target.known_frames and not task.options.mend:
            chunks = [schedule.full(schedule.index_of_frame(frame)) for frame in (first, known)]
            monitor.resume(target.known_frames, chunks[1].latent_start - chunks[0].latent_start)
    steps: SpanSteps[LatentPiece, tuple[Frames, Times, Marks]] = SpanSteps(
        read=lambda start: latent_chunks(latents, schedule, last, first=start),
        compute=compute,
        write=lambda made: write(*made),
        count=count,
    )
    done = run_span(span, run, steps, monitor, task.job.stop)
    if not done:
        if target is None:
            raise _Stopped
        target.pause()
    return done


def _frame_window(num_frames: int, start: int, frames: int | None) -> tuple[int, int]:
    if start < 0 or start >= num_frames or (frames is not None and frames < 1):
        raise ScheduleError(
            f"frames from {start}{'' if frames is None else f', {frames} of them,'} were asked for; the video has "
            f"{num_frames} frames, 0 to {num_frames - 1}"
        )
    return start, num_frames if frames is None else min(num_frames, start + frames)


@dataclass(frozen=True, slots=True)
class LatentPiece:
    """Latents (t, c, h, w) of one chunk."""

    chunk: Chunk
    values: npt.NDArray[np.float32]


def latent_chunks(store: LatentStore, plan: ChunkSchedule, stop_frame: int, *, first: int = 0) -> Iterator[LatentPiece]:
    """Latents of every chunk from ``first`` up to ``stop_frame``; runs in the reader thread."""
    for chunk in plan.chunks(store.num_frames):
        if chunk.frame_start >= stop_frame:
            return
        if chunk.index >= first:
            yield LatentPiece(chunk, store.read(chunk.latent_start, chunk.latent_stop))


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


def _require_decodable(store: LatentStore, model: CausalVAE) -> None:
    require_complete(store)
    if store.metadata.part is not None:
        raise StoreError(
            f"{store.path} is {store.metadata.part} of a video; join the parts first (longvid join)", kind="incomplete"
        )
    geometry, theirs = model.geometry, store.vae.get("name_or_path") or store.vae.get("class_name") or "another model"

    def differs(found: str, expected: str) -> str:
        return (
            f"{store.path} was encoded with the model {theirs}, in {found}; the model of this session, "
            f"{model_name(model)}, works in {expected}. Decode with the model of the store (--model {theirs})"
        )

    p, size = geometry.pixels_per_latent, geometry.padded_size(store.height, store.width)
    stored, ours = store.latents.shape[1:], (geometry.latent_channels, size[0] // p, size[1] // p)
    if stored != ours:
        frames = f"for frames of {store.width}x{store.height}, with"
        sizes = [f"latents of {w}x{h} {frames} {channels} channels" for channels, h, w in (stored, ours)]
        raise StoreError(differs(*sizes), kind="format")
    if not geometry.schedule.same_latents(store.schedule):
        raise ScheduleError(differs(str(store.schedule), str(geometry.schedule)))
    have, want = model.describe().get("weights_sha256"), store.vae.get("weights_sha256")
    if have and want and have != want:
        warnings.warn(
            f"{store.path} was encoded with other weights ({theirs}) than this session has; frames may look wrong",
            stacklevel=4,
        )

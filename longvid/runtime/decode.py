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
from longvid.frames import ColorInfo, Frames, Times
from longvid.media.video_writer import VideoWriter
from longvid.models.base import CausalVAE, model_name
from longvid.models.kernels.cpu import compute_threads
from longvid.runtime.admission import Admission, Job, RunOptions
from longvid.runtime.monitor import Monitor, nothing_done
from longvid.runtime.prefetch import Prefetcher, Writer
from longvid.runtime.run import DecodeRun, Span
from longvid.runtime.snapshot import Checkpoints
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.metadata import RunFacts
from longvid.store.reader import LatentStore, open_store, require_complete
from longvid.store.target import check_target
from longvid.store.writer import StoreWriter

__all__ = ["DecodeOptions", "decode_video", "latent_chunks", "video_sink"]

_Write: TypeAlias = Callable[[Frames, Times, npt.NDArray[np.bool_]], None]
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
    window: tuple[int, int]
    "frames that are written, half-open"

    @property
    def span(self) -> Span:
        """The chunks that the window needs."""
        schedule, control = self.admission.schedule, self.job.control
        return Span.beginning_at(schedule.index_of_frame(self.window[0]), lambda: control.warmup("decode", schedule))

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
        }


def decode_video(
    job: Job, store: str | os.PathLike[str] | LatentStore, out: Path | Callable[[Frames], None], options: DecodeOptions
) -> RunReport:
    """Decode a store, or resume it. Arguments and errors are those of ``VideoSession.decode``."""
    latents = store if isinstance(store, LatentStore) else open_store(store)
    _require_decodable(latents, job.engine.model)
    window = _frame_window(latents.num_frames, options.start, options.frames)
    found = check_target(out) if isinstance(out, Path) and out.suffix == ".zarr" else None
    earlier = None if found is None else options.continued(found)
    size = (latents.height, latents.width)
    admission = job.control.admit("decode", size, earlier=earlier, whole=True)
    task = _Task(job, options, latents, admission, window)
    fingerprint = task.fingerprint()
    if found is not None:
        if options.is_done(found, fingerprint):
            return nothing_done(admission, found)
        options.check_disk(found, admission.part, window[1] - window[0], size[0] * size[1] * 3 * _SHRINK)
    sink, write = _sink(task, out, fingerprint)
    with ExitStack() as stack:
        stack.enter_context(compute_threads(admission.num_threads))
        run = stack.enter_context(DecodeRun(job.engine, admission.part, size, traced=job.traced))
        monitor = stack.enter_context(Monitor(job.callbacks, run, admission.plan, window[1] - window[0]))
        checkpoints, ended = None, False
        with suppress(_Stopped), sink:
            checkpoints = Checkpoints(sink, run, fingerprint) if isinstance(sink, StoreWriter) else None
            ended = _decode_chunks(task, write, run, monitor, checkpoints)
        return monitor.finish(complete=ended, snapshot_seconds=checkpoints.seconds if checkpoints else 0.0)


def _sink(
    task: _Task, out: Path | Callable[[Frames], None], fingerprint: Mapping[str, Any]
) -> tuple[AbstractContextManager[Any], _Write]:
    """Where the frames are written, and what writes them. Nothing is created yet."""
    latents, options = task.latents, task.options
    if not isinstance(out, Path):
        return nullcontext(), lambda frames, *_: out(frames)
    if out.suffix != ".zarr":
        video = video_sink(latents, out, options.overwrite)
        return video, video.write
    store = FrameStoreWriter(
        out,
        size=(latents.height, latents.width),
        time_base=latents.time_base,
        frame_rate=latents.frame_rate,
        source=latents.source,
        facts=RunFacts(
            fingerprint=fingerprint,
            vae=latents.vae,
            extra={"numerics": task.admission.part.execution.numerics.to_dict(), "latents": str(latents.path)},
        ),
        options=options,
    )
    return store, store.write


def _decode_chunks(
    task: _Task, write: _Write, run: DecodeRun, monitor: Monitor, checkpoints: Checkpoints | None
) -> bool:
    """The loop; returns whether it came to the end of the window."""
    latents, schedule, stop, (first, last) = task.latents, task.admission.schedule, task.job.stop, task.window
    pts, valid = latents.frame_pts, latents.frame_valid
    snapshot = None if checkpoints is None else checkpoints.restore()
    monitor.skip(snapshot, schedule, task.window)
    span = Span() if snapshot else task.span
    if span.start:
        run.cache.start_at(span.start)
        monitor.start_at(span.start)
    chunks = latent_chunks(latents, schedule, last, first=span.start if snapshot is None else snapshot.chunk)
    with (
        Writer[tuple[Frames, Times, Any]](lambda piece: write(*piece), stop=stop) as writer,
        Prefetcher(chunks, check=writer.check, stop=stop) as reader,
    ):
        chunk = None
        for chunk, z_TCHW in reader:
            if span.is_warmup(chunk.index):
                run.check(chunk, z_TCHW)
                with monitor.timed():
                    run.warm_up(z_TCHW, span.last_layer(chunk.index))
                monitor.emit(0, chunk.num_latents, reader, writer)
                continue
            with monitor.timed():
                pixels = run.frames(chunk, z_TCHW)
            a, b = (min(max(edge, first), last) for edge in (chunk.frame_start, chunk.frame_stop))
            writer.put((pixels[a - chunk.frame_start : b - chunk.frame_start], pts[a:b], valid[a:b]))
            monitor.emit(b - a, chunk.num_latents, reader, writer)
            if checkpoints is None:
                continue
            if checkpoints.target.wants_nothing_from(b - first):
                break
            if checkpoints.due:
                checkpoints.take(chunk.index + 1, None, writer)
        if not reader.ended:
            if checkpoints is None:
                raise _Stopped
            if chunk is not None and not span.is_warmup(chunk.index):
                checkpoints.take(chunk.index + 1, None, writer)
            checkpoints.target.pause()
    return reader.ended


def _frame_window(num_frames: int, start: int, frames: int | None) -> tuple[int, int]:
    if start < 0 or start >= num_frames or (frames is not None and frames < 1):
        raise ScheduleError(
            f"frames from {start}{'' if frames is None else f', {frames} of them,'} were asked for; the video has "
            f"{num_frames} frames, 0 to {num_frames - 1}"
        )
    return start, num_frames if frames is None else min(num_frames, start + frames)


def latent_chunks(
    store: LatentStore, plan: ChunkSchedule, stop_frame: int, *, first: int = 0
) -> Iterator[tuple[Chunk, npt.NDArray[np.float32]]]:
    """Latents (t, c, h, w) of every chunk from ``first`` up to ``stop_frame``; runs in the reader thread."""
    for chunk in plan.chunks(store.num_frames):
        if chunk.frame_start >= stop_frame:
            return
        if chunk.index >= first:
            yield chunk, store.read(chunk.latent_start, chunk.latent_stop)


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

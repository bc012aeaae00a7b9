"""A whole video from a source to a store, and from a store to frames: what runs, in which order, and when it is safe.

The path of one chunk, encoding::

    reader thread                caller's thread                              writer thread
    frames -> re-block -> queue -> device -> model + cache -> host -> queue -> check -> unit -> publish
                                              |              \\-> ChunkEvent to the callbacks
                                              \\-> now and then, between two chunks: snapshot

Decoding is the same with latents in and frames out. A run that finds an unfinished store of its own fingerprint goes
on from the newest snapshot in it; what was published beyond that is computed again and has to come out the same.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from longvid import __version__
from longvid.environment import kernels_of
from longvid.errors import NonFiniteError, ScheduleError, StoreError
from longvid.events import Callback, Direction, RunReport
from longvid.frames import FrameSource, OnError, SourceInfo
from longvid.media.limits import Limits
from longvid.media.sources import open_source
from longvid.memory.host import peak_rss_bytes
from longvid.models.numerics import Numerics
from longvid.runtime.admission import Admission, AdmissionControl, Recorded
from longvid.runtime.checkpoint import Checkpoints
from longvid.runtime.engine import DecodeRun, EncodeRun, Engine, Frames, Representation, Times
from longvid.runtime.feeds import (
    CallSink,
    FrameSink,
    LatentPiece,
    frame_chunks,
    latent_chunks,
    store_latents,
    video_sink,
)
from longvid.runtime.monitor import Job
from longvid.runtime.prefetch import Prefetcher, Writer
from longvid.runtime.snapshot import Snapshot
from longvid.schedule import ChunkSchedule
from longvid.store.durability import Durability, WriteOptions
from longvid.store.format import FORMAT_VERSION
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import RunFacts
from longvid.store.reader import LatentStore
from longvid.store.target import Found, check_target, settle_complete
from longvid.store.writer import StoreWriter
from longvid.units import format_bytes

__all__ = ["DecodeOptions", "EncodeOptions", "Host", "OnNonFinite", "decode_video", "encode_video"]

OnNonFinite: TypeAlias = Literal["stop", "quarantine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a session lends to a run."""

    control: AdmissionControl
    callbacks: tuple[Callback, ...]
    stopping: Callable[[], bool]
    "whether the run is to end at the next boundary between chunks"

    @property
    def engine(self) -> Engine:
        """The model where it computes."""
        return self.control.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How a video is encoded; see :meth:`longvid.VideoSession.encode`."""

    representation: Representation = "mode"
    start: int = 0
    frames: int | None = None
    size: tuple[int, int] | None = None
    frame_rate: Fraction | None = None
    store_dtype: Literal["float16", "float32"] = "float16"
    seed: int = 0
    on_error: OnError = "stop"
    on_non_finite: OnNonFinite = "stop"
    limits: Limits = field(default_factory=Limits)
    overwrite: bool = False
    resume: bool = True
    durability: Durability = field(default_factory=Durability)
    mend: frozenset[int] = frozenset()
    "units to write again, and nothing else; see :mod:`longvid.runtime.repair`"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """How a store is decoded; see :meth:`longvid.VideoSession.decode`."""

    start: int = 0
    frames: int | None = None
    overwrite: bool = False
    resume: bool = True
    durability: Durability = field(default_factory=Durability)
    mend: frozenset[int] = frozenset()
    "units to write again, and nothing else; see :mod:`longvid.runtime.repair`"


# ------------------------------------------------------------------------------------------------- encode


def encode_video(host: Host, source: Any, store: Path, options: EncodeOptions) -> RunReport:
    """Encode a video into a store, or go on with it. Arguments and errors are those of ``VideoSession.encode``."""
    replaced: frozenset[int] = frozenset()
    while True:
        try:
            return _encode(host, source, store, options, replaced)
        except NonFiniteError as exc:
            if options.on_non_finite == "stop" or exc.chunk in replaced:
                raise
            if exc.chunk == 0 or not _can_be_read_again(source):
                why = "no good frame stands before it" if exc.chunk == 0 else "its source can be read only once"
                exc.add_note(f"the chunk cannot be quarantined: {why}")
                raise
            warnings.warn(
                f"chunk {exc.chunk} was encoded to values that are not finite; its frames are replaced by the last "
                "one before them and marked in frame_valid",
                stacklevel=4,
            )
            replaced |= {exc.chunk}


def _can_be_read_again(source: Any) -> bool:
    return not hasattr(source, "__next__")


def _encode(host: Host, source: Any, store: Path, options: EncodeOptions, replaced: frozenset[int]) -> RunReport:
    engine = host.engine
    found = check_target(store)
    with ExitStack() as stack:
        video = stack.enter_context(
            open_source(
                source,
                start=options.start,
                frames=options.frames,
                size=options.size,
                frame_rate=options.frame_rate,
                on_error=options.on_error,
                limits=options.limits,
            )
        )
        info, geometry = video.info, engine.model.geometry
        recorded = _recorded(found, engine, overwrite=options.overwrite)
        admission = host.control.admit("encode", info.height, info.width, recorded=recorded, whole=True)
        height, width = geometry.padded_size(info.height, info.width)
        p = geometry.pixels_per_latent
        fingerprint = _encode_fingerprint(engine, admission, video, options)
        if _is_done(found, fingerprint, options):
            settle_complete(found, options.durability)
            return _nothing_to_do(found, "encode", admission)
        num_latents = None if info.num_frames is None else admission.schedule.num_latents(info.num_frames)
        channels = geometry.latent_channels * (3 if options.representation == "moments" else 1)
        latent_bytes = channels * (height // p) * (width // p) * (2 if options.store_dtype == "float16" else 4)
        _require_room(found, admission, options, num_latents, latent_bytes * _LATENTS_SHRINK)
        target = LatentWriter(
            store,
            schedule=admission.schedule,
            source=info,
            layout=LatentLayout(
                shape_CYX=(geometry.latent_channels, height // p, width // p),
                representation=options.representation,
                dtype=options.store_dtype,
            ),
            facts=RunFacts(
                fingerprint=fingerprint,
                vae=engine.model.describe(),
                extra={
                    "compute_dtype": _name(engine.dtype),
                    "compute_device": engine.device.type,
                    "numerics": admission.part.numerics.to_dict(),
                    "padded_size": [height, width],
                    "pixel_range": [-1, 1],
                    "run": _run_facts(info, options),
                    **({"seed": options.seed} if options.representation == "sample" else {}),
                },
            ),
            options=_write_options(options),
        )
        run = stack.enter_context(
            EncodeRun(
                engine,
                admission.part,
                options.representation,
                options.seed,
                traced=Job.wants_spans(host.callbacks),
            )
        )
        job = stack.enter_context(Job(host.callbacks, run, admission.plan, info.num_frames))
        ended = _encode_chunks(host, target, run, job, video, admission, fingerprint, replaced)
        return job.finish(complete=ended)


def _encode_chunks(
    host: Host,
    target: LatentWriter,
    run: EncodeRun,
    job: Job,
    video: FrameSource,
    admission: Admission,
    fingerprint: Mapping[str, Any],
    replaced: frozenset[int],
) -> bool:
    """The loop; returns whether it came to the end of the video."""
    schedule = admission.schedule
    size = host.engine.model.geometry.padded_size(video.info.height, video.info.width)
    with target:
        checkpoints = Checkpoints(target, run, fingerprint)
        snapshot = checkpoints.restore(latest=min(replaced) - 1 if replaced else None, units=target.first_wanted)
        _skip(job, snapshot, schedule)
        frames = frame_chunks(
            video,
            schedule,
            size,
            first=0 if snapshot is None else snapshot.chunk,
            after=None if snapshot is None else snapshot.position,
            replaced=replaced,
            stage=host.engine.staged,
        )
        with (
            Writer[LatentPiece](lambda item: store_latents(target, item)) as writer,
            Prefetcher(frames, check=writer.check, stop=host.stopping) as reader,
        ):
            piece = None
            for piece in reader:
                with job.timed():
                    latents, moments = run.latents(piece.chunk, piece.frames)
                writer.put(LatentPiece(piece.chunk, piece.pts, piece.valid, latents, moments))
                job.emit(piece.chunk.num_frames, piece.chunk.num_latents, reader, writer)
                if target.wants_nothing_from(piece.chunk.latent_stop):
                    break
                if checkpoints.due:
                    checkpoints.take(piece.chunk.index + 1, piece.position, writer)
            if not reader.ended:
                if piece is not None:
                    checkpoints.take(piece.chunk.index + 1, piece.position, writer)
                target.pause()
        job.snapshot_seconds = checkpoints.seconds
        return reader.ended


def _encode_fingerprint(
    engine: Engine, admission: Admission, video: FrameSource, options: EncodeOptions
) -> dict[str, Any]:
    return {
        "kind": "latents",
        "source": video.fingerprint(),
        **_compute_facts(engine, admission.part.numerics),
        "chunk_plan": admission.schedule.to_dict(),
        "representation": options.representation,
        "store_dtype": options.store_dtype,
        **({"seed": options.seed} if options.representation == "sample" else {}),
    }


def _run_facts(info: SourceInfo, options: EncodeOptions) -> dict[str, Any]:
    """What a repair needs to read the source as this run does."""
    rate = options.frame_rate
    return {
        "start": options.start,
        "frames": options.frames,
        "size": None if options.size is None else list(options.size),
        "frame_rate": None if rate is None else f"{rate.numerator}/{rate.denominator}",
        "on_error": options.on_error,
        "source": info.name if info.kind == "video" else None,
    }


# ------------------------------------------------------------------------------------------------- decode


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Thrown through a writer of a video file, which cannot be continued, so that it removes what is unfinished."""


def decode_video(
    host: Host, latents: LatentStore, out: Path | Callable[[Frames], None], options: DecodeOptions
) -> RunReport:
    """Decode a store, or go on with it. Arguments and errors are those of ``VideoSession.decode``."""
    window = _frame_window(latents.num_frames, options.start, options.frames)
    found = check_target(out) if isinstance(out, Path) and out.suffix == ".zarr" else None
    engine, recorded = host.engine, Recorded()
    if found is not None:
        recorded = Recorded(numerics=_recorded(found, engine, overwrite=options.overwrite).numerics)
    admission = host.control.admit("decode", latents.height, latents.width, recorded=recorded, whole=True)
    fingerprint = _decode_fingerprint(engine, admission, latents, window)
    if found is not None and _is_done(found, fingerprint, options):
        settle_complete(found, options.durability)
        return _nothing_to_do(found, "decode", admission)
    if found is not None:
        frame_bytes = latents.height * latents.width * 3
        _require_room(found, admission, options, window[1] - window[0], frame_bytes * _FRAMES_SHRINK)
    sink = _sink(latents, out, admission, fingerprint, options)
    with ExitStack() as stack:
        run = stack.enter_context(
            DecodeRun(engine, admission.part, (latents.height, latents.width), traced=Job.wants_spans(host.callbacks))
        )
        job = stack.enter_context(Job(host.callbacks, run, admission.plan, window[1] - window[0]))
        ended = False
        with suppress(_Stopped):
            ended = _decode_chunks(host, sink, run, job, latents, admission, fingerprint, window)
        return job.finish(complete=ended)


def _sink(
    latents: LatentStore,
    out: Path | Callable[[Frames], None],
    admission: Admission,
    fingerprint: Mapping[str, Any],
    options: DecodeOptions,
) -> FrameSink:
    """What takes the frames. Nothing is created yet."""
    if not isinstance(out, Path):
        return CallSink(out)
    if out.suffix != ".zarr":
        return video_sink(latents, out, options.overwrite)
    return FrameStoreWriter(
        out,
        size=(latents.height, latents.width),
        time_base=latents.time_base,
        frame_rate=latents.frame_rate,
        source=latents.source,
        facts=RunFacts(
            fingerprint=fingerprint,
            vae=latents.vae,
            extra={"numerics": admission.part.numerics.to_dict(), "latents": str(latents.path)},
        ),
        options=_write_options(options),
    )


def _decode_chunks(
    host: Host,
    sink: FrameSink,
    run: DecodeRun,
    job: Job,
    latents: LatentStore,
    admission: Admission,
    fingerprint: Mapping[str, Any],
    window: tuple[int, int],
) -> bool:
    """The loop; returns whether it came to the end of the window."""
    first, last = window
    pts, valid = latents.frame_pts, latents.frame_valid
    with sink:
        store = sink if isinstance(sink, StoreWriter) else None
        checkpoints = None if store is None else Checkpoints(store, run, fingerprint)
        snapshot = None if store is None or checkpoints is None else checkpoints.restore(units=store.first_wanted)
        _skip(job, snapshot, admission.schedule, window)
        chunks = latent_chunks(latents, admission.schedule, last, first=0 if snapshot is None else snapshot.chunk)
        with (
            Writer[tuple[Frames, Times, Any]](lambda piece: sink.write(*piece)) as writer,
            Prefetcher(chunks, check=writer.check, stop=host.stopping) as reader,
        ):
            chunk = None
            for chunk, z_TCHW in reader:
                with job.timed():
                    pixels = run.frames(chunk, z_TCHW)
                a, b = (min(max(edge, first), last) for edge in (chunk.frame_start, chunk.frame_stop))
                if b > a:
                    writer.put((pixels[a - chunk.frame_start : b - chunk.frame_start], pts[a:b], valid[a:b]))
                job.emit(b - a, chunk.num_latents, reader, writer)
                if store is not None and store.wants_nothing_from(b - first):
                    break
                if checkpoints is not None and checkpoints.due:
                    checkpoints.take(chunk.index + 1, None, writer)
            if not reader.ended:
                if checkpoints is None or store is None:
                    raise _Stopped
                if chunk is not None:
                    checkpoints.take(chunk.index + 1, None, writer)
                store.pause()
        if checkpoints is not None:
            job.snapshot_seconds = checkpoints.seconds
        return reader.ended


def _decode_fingerprint(
    engine: Engine, admission: Admission, latents: LatentStore, window: tuple[int, int]
) -> dict[str, Any]:
    return {
        "kind": "frames",
        "latents": {
            "digests": latents.metadata.digests,
            "num_frames": latents.num_frames,
            "dtype": str(latents.latents.dtype),
        },
        "window": list(window),
        "size": [latents.height, latents.width],
        **_compute_facts(engine, admission.part.numerics),
        "chunk_plan": admission.schedule.to_dict(),
    }


def _frame_window(num_frames: int, start: int, frames: int | None) -> tuple[int, int]:
    if start < 0 or start >= num_frames or (frames is not None and frames < 1):
        raise ScheduleError(
            f"frames from {start}{'' if frames is None else f', {frames} of them,'} were asked for; the video has "
            f"{num_frames} frames, 0 to {num_frames - 1}"
        )
    return start, num_frames if frames is None else min(num_frames, start + frames)


# ------------------------------------------------------------------------------------------------- both


def _compute_facts(engine: Engine, numerics: Numerics) -> dict[str, Any]:
    """Of a fingerprint: what the model is, and with what it computes."""
    facts = engine.model.describe()
    return {
        "model": {
            "class_name": facts.get("class_name"),
            "config": facts.get("config"),
            "weights": engine.guard.digest,
        },
        "compute": {
            "dtype": _name(engine.dtype),
            "kernels": kernels_of(str(engine.device)),
            "numerics": numerics.to_dict(),
            "torch": str(torch.__version__),
            "longvid": __version__,
            "format": FORMAT_VERSION,
        },
    }


def _recorded(found: Found, engine: Engine, *, overwrite: bool) -> Recorded:
    """What the unfinished store that was found has chosen; nothing if it is not continued, or not with this dtype."""
    metadata = found.metadata
    if metadata is None or (metadata.complete and overwrite):
        return Recorded()
    compute = metadata.compute
    alike = (compute.get("dtype"), compute.get("kernels")) == (_name(engine.dtype), kernels_of(str(engine.device)))
    numerics = metadata.numerics if alike else None
    chunk_frames = None if metadata.schedule is None else metadata.schedule.chunk_frames
    try:
        return Recorded(numerics=None if numerics is None else Numerics.from_dict(numerics), chunk_frames=chunk_frames)
    except (KeyError, TypeError, ValueError):
        return Recorded()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_options(options: EncodeOptions | DecodeOptions) -> WriteOptions:
    return WriteOptions(
        durability=options.durability, overwrite=options.overwrite, resume=options.resume, mend=options.mend
    )


def _is_done(found: Found, fingerprint: Mapping[str, Any], options: EncodeOptions | DecodeOptions) -> bool:
    """Whether what is there is what the run would make. Raises what forbids the run."""
    decision = found.decide(fingerprint, overwrite=options.overwrite, resume=options.resume)
    return decision == "done" and not options.mend


_LATENTS_SHRINK = 0.8
"of their bytes is what latents take on the disk at least; 0.9 is usual"
_FRAMES_SHRINK = 0.05
"the same of decoded frames: drawings compress well, film to about 0.4"
_SHORT_RUN_ROWS = 256
"a shorter run is over before a snapshot is worth its while"


def _require_room(
    found: Found,
    admission: Admission,
    options: EncodeOptions | DecodeOptions,
    num_rows: int | None,
    row_bytes: float,
) -> None:
    """Refuse a run that cannot end well: its results and snapshots are larger than what is free, at the least guess.

    What is found out later, when something else fills the disk, ends the run where it can be continued.
    """
    if num_rows is None or options.mend:
        return
    parts = {"results": int(num_rows * row_bytes)}
    if num_rows > _SHORT_RUN_ROWS and options.durability.snapshot_seconds != float("inf"):
        parts["three snapshots, one of them being written"] = 3 * admission.part.cache_bytes
    there = sum(f.stat().st_size for f in found.path.rglob("*") if f.is_file()) if found.state != "nothing" else 0
    free, needed = shutil.disk_usage(found.path.parent).free, sum(parts.values()) - there
    if needed > free:
        listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        raise StoreError(
            f"{found.path} needs at least {format_bytes(needed)} of disk ({listing}), and {format_bytes(free)} are "
            "free; make room or choose another folder (snapshots can be left out: --snapshot-seconds off)",
            kind="full",
        )


def _nothing_to_do(found: Found, direction: Direction, admission: Admission) -> RunReport:
    """The report of a run whose store is complete already."""
    num_frames = 0 if found.metadata is None else found.metadata.num_frames
    return RunReport(
        direction=direction,
        frames=num_frames,
        latent_frames=admission.schedule.num_latents(num_frames),
        seconds=0.0,
        frames_per_second=0.0,
        compute_seconds=0.0,
        wait_seconds=0.0,
        read_seconds=0.0,
        write_seconds=0.0,
        snapshot_seconds=0.0,
        peak_device_bytes=0,
        projected_bytes=admission.part.projected_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        cache_bytes=0,
        offloaded_bytes=0,
        resumed_from_frame=num_frames,
        complete=True,
    )


def _skip(job: Job, snapshot: Snapshot | None, schedule: ChunkSchedule, window: tuple[int, int] | None = None) -> None:
    """Count what an earlier run has done."""
    if snapshot is None or snapshot.chunk == 0:
        return
    last = schedule.full(snapshot.chunk - 1)
    # the last chunk of a video may hold fewer frames than others
    frames = last.frame_stop if snapshot.position is None else snapshot.position.num_frames
    if window is not None:
        frames = max(0, min(frames, window[1]) - window[0])
    job.skip(chunks=snapshot.chunk, frames=frames, latents=last.latent_stop)

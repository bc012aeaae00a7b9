"""Encode: a whole video from a source to a store of latents, or what a store still lacks.

A run that finds an unfinished store of its own fingerprint continues behind its last commit; which chunks that takes,
and what proves that it computes the same, is a :class:`~longvid.runtime.span.Span`.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from longvid.errors import ModelError, NonFiniteError, ScheduleError, SourceError, StoreError
from longvid.events import RunReport
from longvid.frames import Frames, Marks, Times
from longvid.media.frame_source import FrameSource
from longvid.media.limits import Limits
from longvid.media.pipes import is_pipe
from longvid.media.sources import open_source
from longvid.media.timing.clock import MOST_JOINTS
from longvid.runtime.admission import Job
from longvid.runtime.reblock import Reblocker, pad_frames
from longvid.runtime.run import EncodeRun, Representation, check_representation
from longvid.runtime.span import Piece, RunOptions, VideoTask
from longvid.schedule import Chunk, ChunkSchedule
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import ReadOptions, RunFacts
from longvid.store.target import Found, check_target, reopen

__all__ = ["ChunkPlan", "EncodeOptions", "EncodedChunk", "OnNonFinite", "encode_video", "frame_chunks", "store_latents"]

ChunkPlan: TypeAlias = Literal["online", "reference"]
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
    follow_seconds: float | None = None
    chunk_plan: ChunkPlan = "online"

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        check_representation(self.representation, self.seed)
        if self.store_dtype not in ("float16", "float32"):
            raise StoreError(f"store_dtype {self.store_dtype!r} is not known; choose float16 or float32", kind="format")
        if self.on_non_finite not in get_args(OnNonFinite):
            raise ModelError(f"on_non_finite {self.on_non_finite!r} is not known; choose stop or quarantine")
        if self.chunk_plan not in get_args(ChunkPlan):
            raise ScheduleError(f"chunk_plan {self.chunk_plan!r} is not known; choose online or reference")


def encode_video(job: Job, source: Any, store: Path, options: EncodeOptions) -> RunReport:
    """Encode a video into a store, or resume it. Arguments and errors are those of ``VideoSession.encode``."""
    replaced: frozenset[int] = frozenset()
    while True:
        try:
            found = check_target(options.path_of(store))
            with _opened(job, source, options) as video:
                if video.one_pass:
                    options = _for_one_pass(video.info.name, options)
                task = _Encoding(job, options, found, video, replaced)
                return task.run(None if options.mend else video.info.num_frames)
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


def _opened(job: Job, source: Any, options: EncodeOptions) -> FrameSource:
    return open_source(
        source,
        **asdict(options.reading),
        limits=options.limits,
        follow_seconds=options.follow_seconds,
        interrupted=lambda: job.stop.made,
    )


def _for_one_pass(name: str, options: EncodeOptions) -> EncodeOptions:
    """What can be done with a source that is read once; with a warning."""
    if options.mend:
        raise SourceError(
            f"{name} can be read once only, and a repair reads its source where the damage is; give the path of a file",
            kind="layout",
        )
    warnings.warn(
        f"{name} can be read once only: this run cannot be resumed if it is stopped, and the store cannot be repaired",
        stacklevel=5,
    )
    return replace(options, resume="never")


def _why_not_quarantined(chunk: int, source: Any, options: EncodeOptions, replaced: frozenset[int]) -> str:
    """Why the chunk is an error, and what to do; empty if its frames can be replaced."""
    if chunk in replaced:
        return "replacing its frames by the last one before them did not help"
    if chunk == 0:
        return "no good frame stands before the first chunk; skip its frames (--start)"
    if hasattr(source, "__next__") or is_pipe(source):
        return "its frames cannot be replaced, since the source can be read only once; give a file or an array"
    if options.on_non_finite == "stop":
        return "its frames can be replaced by the last one before them (--on-non-finite quarantine)"
    return ""


class _Encoding(VideoTask[EncodedChunk]):
    """One attempt to encode one video."""

    direction = "encode"
    _options: EncodeOptions
    _found: Found

    def __init__(
        self, job: Job, options: EncodeOptions, found: Found, video: FrameSource, replaced: frozenset[int]
    ) -> None:
        geometry = job.engine.model.geometry
        length, first_frames = video.count_frames() if isinstance(options.part, tuple) else None, None
        if options.chunk_plan == "reference":
            first_frames = geometry.reference_schedule(video.count_frames()).first_frames
        super().__init__(job, options, found, (video.info.height, video.info.width), (0, length), first_frames)
        self._video, self._replaced = video, replaced
        self._size = geometry.padded_size(video.info.height, video.info.width)
        height, width = (length // geometry.pixels_per_latent for length in self._size)
        self._latent_shape = geometry.latent_channels, height, width
        self._grown: bool | None = None
        "whether the source has more bytes than it had for the store that is there; None if its bytes are the same"
        self._seed = {"seed": options.seed} if options.representation == "sample" else {}

    @cached_property
    def _source(self) -> dict[str, Any]:
        earlier = None if self._found.metadata is None else self._found.metadata.fingerprint.get("source")
        replaced = self._found.complete and self._options.overwrite
        if isinstance(earlier, dict) and not (replaced or self._options.resume == "never" or self._options.part):
            self._grown = self._video.grown_since(earlier)
            if self._grown is not None:
                return earlier
        return self._video.fingerprint()

    def fingerprint(self, compute: dict[str, Any]) -> dict[str, Any]:
        self._check_policy()
        representation, dtype = self._options.representation, self._options.store_dtype
        choices = {"representation": representation, "store_dtype": dtype, **self._seed}
        return {"kind": "latents", "source": self._source, **compute, **choices}

    def _check_policy(self) -> None:
        """Refuse to continue a store behind damage that another policy dealt with. Up to it, all of them are equal."""
        stored, policy = self._stored("damage"), self._options.reading.on_error
        if stored and stored["on_error"] != policy and not self._options.overwrite and not self._options.mend:
            raise StoreError(
                f"{self._found.path} exists, and frame {stored['frame']} of its source is damaged, which it was made "
                f"with --on-error {stored['on_error']} for; {policy} was asked for. Use that, choose another name, or "
                "replace the store with --overwrite (overwrite=True)",
                kind="mismatch",
            )

    def _stored(self, name: str) -> Any:
        """What the store that is there records of its run."""
        return None if self._found.metadata is None else self._found.metadata.attributes["longvid"].get(name)

    @property
    def _reading(self) -> dict[str, Any]:
        """What a repair needs to read the source as this run does."""
        info = self._video.info
        return {
            **self._options.reading.record,
            "source": info.name if info.kind in ("video", "pictures") else None,
        }

    def reopen(self) -> bool:
        if not self._grown:
            return False
        reopen(self._found, self._options.durability)
        self._found = check_target(self._found.path)
        return True

    def least_bytes(self, num_frames: int) -> float:
        row_bytes = math.prod(self._latent_shape) * np.dtype(self._options.store_dtype).itemsize
        row_bytes *= 3 if self._options.representation == "moments" else 1
        return self.schedule.num_latents(num_frames) * row_bytes * _SHRINK

    def sink(self, fingerprint: dict[str, Any], facts: dict[str, Any]) -> LatentWriter:
        engine, options, info = self.job.engine, self._options, self._video.info
        extra = {
            "compute_dtype": engine.dtype_name,
            "compute_device": engine.device.type,
            **facts,
            "padded_size": list(self._size),
            "pixel_range": [-1, 1],
            "run": self._reading,
            **self._seed,
        }
        self._target = LatentWriter(
            self._found.path,
            schedule=self.schedule,
            source=info,
            layout=LatentLayout(
                shape_CYX=self._latent_shape, representation=options.representation, dtype=options.store_dtype
            ),
            facts=RunFacts(fingerprint=fingerprint, vae=engine.model.describe(), extra=extra),
            options=options,
            part=self.part,
        )
        return self._target

    def make_run(self) -> EncodeRun:
        options = self._options
        self._run = EncodeRun(
            self.job.engine, self.admission.part, options.representation, options.seed, traced=self.job.traced
        )
        return self._run

    def read(self, start: int) -> Iterator[Piece]:
        self._video.index.load(self._target.seek_index, self._source)
        self._target.record("run", self._reading)  # a run with another policy for damage may continue one
        replaced = self._replaced | _replaced_before(self.schedule, self.origin, self._target.known("frame_valid"))
        schedule, stage = self.schedule, self.job.engine.staged
        for piece in frame_chunks(self._video, schedule, self._size, first=start, replaced=replaced, stage=stage):
            # before it goes through the model, where frames that are not those of the store would spoil the contexts
            self._target.check_times(piece.chunk.frame_start - self.origin.frame_start, piece.pts)
            yield piece

    def compute(self, piece: Piece) -> EncodedChunk:
        return piece.chunk, piece.pts, piece.valid, *self._run.latents(piece.chunk, piece.values)

    def write(self, result: EncodedChunk) -> None:
        num_units = self._target.committed_units
        self._record_source()
        store_latents(self._target, *result)
        if self._target.committed_units > num_units:
            self._video.index.save(self._target.seek_index)

    def completed(self) -> None:
        self._record_source()
        duration = self._video.last_duration()
        if duration is not None:
            self._target.record("last_frame_duration", duration)

    def _record_source(self) -> None:
        """Record what was found out about the source while it was read; frames are counted as in the file."""
        joints = {joint["frame"]: joint for joint in self._stored("joints") or []} if self._target.known_frames else {}
        joints |= {joint.frame: asdict(joint) for joint in list(self._video.joints.values())}
        if joints:
            self._target.record("joints", [joints[frame] for frame in sorted(joints)][:MOST_JOINTS])
        if self._video.damage is not None:
            self._target.record("damage", {"frame": self._video.damage, "on_error": self._options.reading.on_error})
        if not self._mend and (self._grown is not None or self._video.grows):  # more bytes than in the fingerprint
            fingerprint = {**self._target.fingerprint, "source": self._video.fingerprint()}
            self._target.record("fingerprint", fingerprint)


def _replaced_before(schedule: ChunkSchedule, origin: Chunk, valid_T: Marks) -> frozenset[int]:
    """The chunks without a good frame in what is stored: their frames repeat the last one before them."""
    stops = np.arange(schedule.capacity(origin.index), len(valid_T) + 1, schedule.chunk_frames)
    if not len(stops):
        return frozenset()
    starts = np.concatenate([[0], stops[:-1]])
    good = np.logical_or.reduceat(valid_T[: stops[-1]], starts)
    return frozenset((origin.index + np.flatnonzero(~good)).tolist())


def frame_chunks(
    video: FrameSource,
    plan: ChunkSchedule,
    size: tuple[int, int],
    *,
    first: int = 0,
    replaced: frozenset[int] = frozenset(),
    stage: Callable[[Frames], Frames] = lambda frames: frames,
) -> Iterator[Piece]:
    """Decode, re-block, pad to ``size`` and stage the frames of every chunk; runs in the reader thread.

    The first piece is chunk ``first``. Chunks in ``replaced`` repeat the last frame before them.
    """
    start = first
    while start in replaced and start > 0:  # the frame that it repeats lies further back
        start -= 1
    before: Frames | None = None
    for chunk, (frames, pts, valid) in _cut(video, plan, start):
        if chunk.index in replaced and before is not None:
            frames, valid = np.repeat(before, len(frames), axis=0), np.zeros(len(frames), np.bool_)
        else:
            before = frames[-1:].copy(order="K")
        if chunk.index >= first:
            yield Piece(chunk, stage(pad_frames(frames, chunk.padded_frames, *size)), pts, valid)


def _cut(video: FrameSource, plan: ChunkSchedule, start: int) -> Iterator[tuple[Chunk, tuple[npt.NDArray[Any], ...]]]:
    """Frames, time stamps and marks of every chunk from ``start`` on."""
    reblock = Reblocker(plan.capacity, first=start)
    for block in video.blocks(first=plan.full(start).frame_start):
        for index, arrays in reblock.push(block.frames_THWC, block.pts_T, block.valid_T):
            if index and plan.first_frames is not None and plan.first_frames < plan.chunk_frames:
                raise _other_length(video, f"more than {plan.first_frames} frames")
            yield plan.full(index), arrays
    for index, arrays in reblock.rest():
        num_frames = len(arrays[0])
        if plan.is_reference and num_frames < plan.capacity(index):
            raise _other_length(video, f"{plan.full(index).frame_start + num_frames} frames")
        yield plan.tail(index, num_frames), arrays


def _other_length(video: FrameSource, found: str) -> ScheduleError:
    return ScheduleError(
        f"{video.info.name} has {found}, and its header or packets tell of {video.count_frames()}: the reference plan "
        "has put the remainder of that number into the first chunk. Give the number of its frames (--frames), or use "
        "the online plan (leave --chunk-plan out)"
    )


def store_latents(
    target: LatentWriter, chunk: Chunk, pts: Times, valid: Marks, latents: Tensor, moments: Tensor | None
) -> None:
    """Write the latents of one chunk, which are on the host; runs in the writer thread."""

    def rows(z_BCTHW: Tensor) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", z_BCTHW[0].movedim(1, 0).float().contiguous().numpy())

    target.write(chunk, rows(latents), pts, None if moments is None else rows(moments), valid)

"""Span: the chunks of a video that a run computes, and the one loop in which every run computes them.

A run that starts in the middle of a video has no contexts. It starts early enough that all of them are right where its
results begin (:func:`longvid.warmup`), and drops what it computes until then. A run that continues a store begins its
results one chunk before those that are missing, and the writer compares them with what is stored::

    chunk    start ........................ first ............ what is missing ............ stop
             warm-up: contexts only         proof: compared    written

A new run, a continued one, a repair, a decode from the middle and a part of a video differ in their span only. The path
of one chunk; a queue stands for the bounded futures of :mod:`longvid.runtime.prefetch`::

    reader thread         caller's thread                               writer thread
    read -> queue -> device -> model + cache -> host -> queue -> write: compare, or commit
                                  \\-> warm-up: nothing comes out
                                  \\-> ChunkEvent to the callbacks
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy.typing as npt

from longvid.errors import ModelError, StoreError
from longvid.events import Direction, RunReport
from longvid.files import disk_errors
from longvid.frames import Marks, Times
from longvid.memory.host import peak_rss_bytes
from longvid.models.kernels.cpu import compute_threads
from longvid.planning.warmup import Warmup
from longvid.runtime.admission import Job
from longvid.runtime.monitor import Monitor
from longvid.runtime.prefetch import Prefetcher, Writer
from longvid.runtime.run import Run
from longvid.schedule import Chunk
from longvid.store.durability import WriteOptions
from longvid.store.metadata import Part
from longvid.store.parts import part_path
from longvid.store.target import Found, settle_complete
from longvid.store.writer import StoreWriter
from longvid.units import format_bytes

__all__ = ["Piece", "RunOptions", "Span", "VideoTask"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes through the model as one chunk: padded frames, or latents."""

    chunk: Chunk
    values: npt.NDArray[Any]
    pts: Times
    "time stamps of the chunk's true frames"
    valid: Marks


ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Span:
    """The chunks whose results a run wants, with the warm-up in front of them that makes them exact."""

    start: int = 0
    "the first chunk that runs"
    first: int = 0
    "the first chunk with a result"
    stop: int | None = None
    "the chunk behind the last one; None for the end of the video"
    warmup: Warmup | None = None
    "what the chunks before it are for; None for a run from frame 0"

    @classmethod
    def of(
        cls,
        wanted: int,
        stop: int | None,
        find_warmup: Callable[[], Warmup],
        *,
        origin: int = 0,
        proof: bool = False,
    ) -> Self:
        """The shortest run that computes the chunks from ``wanted`` to ``stop``.

        A model that never forgets runs from frame 0. With ``proof`` the chunk before is computed too, but none before
        ``origin``, where the output begins; if the run starts at frame 0 in any case, all chunks from there on are.
        """
        first = max(origin, wanted - 1) if proof else wanted
        if first > 0:
            try:
                warmup = find_warmup()
            except ModelError:
                warmup = None
            if warmup is not None and first > warmup.chunks:
                return cls(first - warmup.chunks, first, stop, warmup)
        return cls(0, origin if proof else first, stop)

    def is_warmup(self, chunk: int) -> bool:
        """Whether nothing but the contexts of this chunk is wanted."""
        return chunk < self.first

    def last_layer(self, chunk: int) -> str | None:
        """The last layer that has to run in a chunk; None for all."""
        return None if self.warmup is None else self.warmup.last_layer(chunk - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(WriteOptions):
    """What a run may replace, continue and lose; see :meth:`longvid.VideoSession.encode`."""

    part: tuple[int, int] | Part | None = None
    "the number of a part, from 1 on, and of how many; for its repair, what it records; None for the whole video"

    def path_of(self, store: Path) -> Path:
        """Where the run writes."""
        return part_path(store, *self.part) if isinstance(self.part, tuple) else store


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was stopped, and what it writes cannot be continued: leave its sink by an exception."""


class VideoTask(ABC, Generic[ResultT]):
    """A whole video, or a part of it, in one direction. The abstract methods are where the directions differ.

    Args:
        job, options: of the session, and of the call.
        found: what is where the store of results goes; None if they go elsewhere.
        size: height and width of the frames.
        window: half-open range of the frames that are wanted; no end if it is not known.
        first_frames: frames of the first chunk in the reference plan; None for the online plan.
    """

    direction: ClassVar[Direction]

    def __init__(
        self,
        job: Job,
        options: RunOptions,
        found: Found | None,
        size: tuple[int, int],
        window: tuple[int, int | None],
        first_frames: int | None = None,
    ) -> None:
        self.job, self._options, self._found, self._mend = job, options, found, bool(options.mend)
        earlier = None if found is None else found.metadata
        if earlier is not None and earlier.complete and options.overwrite:
            earlier = None
        self.admission = job.control.admit(self.direction, size, earlier=earlier, whole=True, first_frames=first_frames)
        self.schedule = self.admission.schedule
        self.window, self.part = self._own(options.part, window)
        self.origin = self.schedule.full(self.schedule.index_of_frame(self.window[0]))
        "the chunk in which the results begin"
        if self.part is not None and self.origin.index:
            self._find_warmup()  # raises if the model runs from frame 0 only

    @abstractmethod
    def fingerprint(self, compute: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides the bits of the results; ``compute`` is what the model and the chunks decide."""

    def reopen(self) -> bool:
        """Make a complete store one that can be continued, if its source has grown; whether it has."""
        return False

    @abstractmethod
    def least_bytes(self, num_frames: int) -> float:
        """A low estimate of the bytes on the disk."""

    @abstractmethod
    def sink(self, fingerprint: dict[str, Any], facts: dict[str, Any]) -> AbstractContextManager[Any]:
        """What takes the results; nothing is created yet. ``facts`` are recorded in a store."""

    @abstractmethod
    def make_run(self) -> Run:
        """What computes."""

    @abstractmethod
    def read(self, start: int) -> Iterator[Piece]:
        """The pieces from a chunk on. They are made in the reader's thread."""

    @abstractmethod
    def compute(self, piece: Piece) -> ResultT:
        """The result of one piece."""

    @abstractmethod
    def write(self, result: ResultT) -> None:
        """Hand a result to the sink, in the writer's thread."""

    def completed(self) -> None:
        """Called when all results were written, before their store is completed."""

    def run(self, expected_frames: int | None = None) -> RunReport:
        """Compute what is missing. ``expected_frames`` is what the source says of its length."""
        job, admission, (first, last) = self.job, self.admission, self.window
        execution = admission.part.execution
        compute = job.engine.fingerprint(execution.numerics, admission.num_threads)
        fingerprint = self.fingerprint({**compute, "chunk_plan": self.schedule.to_dict()})
        fingerprint |= {} if self.part is None else {"part": asdict(self.part)}
        total = expected_frames if last is None else last - first
        if self._found is not None and not self._mend:
            options = self._options
            decision = self._found.decide(fingerprint, overwrite=options.overwrite, resume=options.resume)
            if decision == "done" and not self.reopen():
                settle_complete(self._found, options.durability)
                return self._nothing_done(self._found)
            if total is not None:
                _check_disk(self._found.path, self.least_bytes(total))
        sink = self.sink(fingerprint, {"numerics": execution.numerics.to_dict(), "tiling": execution.tiling})
        with ExitStack() as stack:
            stack.enter_context(compute_threads(admission.num_threads))
            run = stack.enter_context(self.make_run())
            monitor = stack.enter_context(Monitor(job.callbacks, run, admission.plan, total))
            done, target = False, sink if isinstance(sink, StoreWriter) else None
            with suppress(_Stopped), sink:
                done = self._compute_span(target, run, monitor)
                if done and target is not None:
                    self.completed()
                if not done and target is None:
                    raise _Stopped
                if not done and target is not None:
                    target.pause()
            return monitor.finish(complete=done)

    def _nothing_done(self, found: Found) -> RunReport:
        """The report of a run whose store is complete already."""
        num_frames = 0 if found.metadata is None else found.metadata.num_frames
        return RunReport(
            direction=self.direction,
            frames=num_frames,
            latent_frames=self.schedule.num_latents(num_frames),
            projected_bytes=self.admission.part.projected_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            resumed_from_frame=num_frames,
            complete=True,
        )

    def _compute_span(self, target: StoreWriter | None, run: Run, monitor: Monitor) -> bool:
        """Returns whether the span came to its end, and was not stopped before."""
        schedule, origin, (first, last) = self.schedule, self.window[0], self.window
        start, stop = (0, None) if target is None else target.wanted_frames
        ends = [end for end in (last, None if stop is None else first + stop) if end is not None]
        span = Span.of(
            schedule.index_of_frame(first + start),
            schedule.index_of_frame(min(ends) - 1) + 1 if ends else None,
            self._find_warmup,
            origin=self.origin.index,
            proof=start > 0 and not self._mend,
        )
        if target is not None:
            target.start_at(max(0, schedule.full(span.first).frame_start - first))
            if span.warmup is not None:
                target.record("warmup_chunks", span.warmup.chunks)
            if not self._mend:
                first += start
                monitor.resume(start, schedule.latent_of_frame(first) - schedule.latent_of_frame(origin))
        if span.start:
            run.cache.start_at(span.start)
        with (
            Writer[ResultT](self.write, stop=self.job.stop) as writer,
            Prefetcher(self.read(span.start), check=writer.check, stop=self.job.stop) as reader,
        ):
            for piece in reader:
                chunk, counted = piece.chunk, None
                with monitor.timed():
                    if span.is_warmup(chunk.index):
                        run.warm_up(chunk, piece.values, span.last_layer(chunk.index))
                    else:
                        result = self.compute(piece)
                if not span.is_warmup(chunk.index):
                    writer.put(result)
                    counted = self._count(chunk, first)
                monitor.emit(chunk, counted, reader, writer)
                if chunk.index + 1 == span.stop:
                    return True
            return reader.ended

    def _count(self, chunk: Chunk, first: int) -> tuple[int, int]:
        """Frames and latents of a chunk, from frame ``first`` on, that the result has."""
        start, stop = self.inside(chunk, first)
        if start >= stop:
            return 0, 0
        latents = chunk.latent_stop if stop == chunk.frame_stop else self.schedule.latent_of_frame(stop - 1) + 1
        return stop - start, latents - self.schedule.latent_of_frame(start)

    def inside(self, chunk: Chunk, first: int) -> tuple[int, int]:
        """The frames of a chunk, from frame ``first`` on, that lie in the window."""
        last = chunk.frame_stop if self.window[1] is None else self.window[1]
        return min(max(chunk.frame_start, first), last), min(max(chunk.frame_stop, first), last)

    def _find_warmup(self) -> Warmup:
        return self.job.control.warmup(self.direction, self.schedule)

    def _own(
        self, part: tuple[int, int] | Part | None, window: tuple[int, int | None]
    ) -> tuple[tuple[int, int | None], Part | None]:
        """The frames of the window that a part has, and what its store records of it."""
        if not isinstance(part, tuple):
            return (window if part is None else (part.frame, window[1])), part
        first, last = window
        assert last is not None
        start, own, stop = self.schedule.part(*part, first, last)
        to_row = self.schedule.latent_of_frame if self.direction == "encode" else lambda frame: frame - first
        row = to_row(start)
        return (start, stop), Part(number=part[0], of=part[1], row=row, frame=start, overlap=to_row(own) - row)


def _check_disk(path: Path, least_bytes: float) -> None:
    """Fail early if so much does not fit on the disk. The bytes of what is there count as written."""
    with disk_errors(path):
        there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        free, needed = shutil.disk_usage(path.parent).free, int(least_bytes) - there
    if needed > free:
        raise StoreError(
            f"{path} needs at least {format_bytes(needed)} of disk, and {format_bytes(free)} are free; make room or "
            "choose another folder",
            kind="full",
        )

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy.typing as npt

from longvid.errors import ModelError
from longvid.planning.warmup import Warmup
from longvid.runtime.monitor import Monitor
from longvid.runtime.prefetch import Prefetcher, StopRequest, Writer
from longvid.runtime.run import Run
from longvid.schedule import Chunk

__all__ = ["Piece", "Span", "SpanSteps", "run_span"]


class Piece(Protocol):
    """What goes through the model as one chunk."""

    @property
    def chunk(self) -> Chunk:
        """Which one it is."""

    @property
    def values(self) -> npt.NDArray[Any]:
        """What the model takes, padded."""


PieceT = TypeVar("PieceT", bound=Piece)
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
class SpanSteps(Generic[PieceT, ResultT]):
    """What a direction does with each chunk."""

    read: Callable[[int], Iterator[PieceT]]
    "gives the pieces from a chunk on; in the reader's thread"
    compute: Callable[[PieceT], ResultT]
    write: Callable[[ResultT], None]
    "in the writer's thread"
    count: Callable[[Chunk], tuple[int, int]]
    "frames and latents of a chunk with a result that no earlier run has stored"
    check: Callable[[PieceT], None] = lambda _: None
    "raises an error for a piece that must not go through the model"


def run_span(
    span: Span, run: Run, steps: SpanSteps[PieceT, ResultT], monitor: Monitor, stop_request: StopRequest
) -> bool:
    """Compute a span; returns whether it came to its end, and was not stopped before."""
    if span.start:
        run.cache.start_at(span.start)
    with (
        Writer[ResultT](steps.write, stop=stop_request) as writer,
        Prefetcher(steps.read(span.start), check=writer.check, stop=stop_request) as reader,
    ):
        for piece in reader:
            index = piece.chunk.index
            steps.check(piece)
            if span.is_warmup(index):
                with monitor.timed():
                    run.warm_up(piece.chunk, piece.values, span.last_layer(index))
                counted = None
            else:
                with monitor.timed():
                    result = steps.compute(piece)
                writer.put(result)
                counted = steps.count(piece.chunk)
            monitor.emit(piece.chunk, counted, reader, writer)
            if index + 1 == span.stop:
                return True
        return reader.ended

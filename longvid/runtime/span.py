"""Span: the chunks of a video whose results a run wants, with the warm-up in front of them that makes them exact.

A run that starts in the middle of a video has no contexts. It starts early enough that all of them are right where its
results begin (:func:`longvid.warmup`), and drops what it computes until then::

    chunk    start ........................ first ............ end of the run
             warm-up: contexts only         results, bit for bit those of a run from frame 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longvid.errors import ModelError
from longvid.planning.warmup import Warmup

__all__ = ["Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """Where a run starts, and where its results begin."""

    start: int = 0
    "the first chunk that runs"
    first: int = 0
    "the first chunk with a result"
    warmup: Warmup | None = None
    "what the chunks before it are for; None for a run from frame 0"

    @classmethod
    def beginning_at(cls, first: int, find_warmup: Callable[[], Warmup]) -> Span:
        """The shortest run whose results begin at chunk ``first``; from frame 0 for a model that never forgets."""
        if first == 0:
            return cls()
        try:
            warmup = find_warmup()
        except ModelError:
            return cls(0, first)
        start = first - warmup.chunks
        return cls(start, first, warmup) if start > 0 else cls(0, first)

    def is_warmup(self, chunk: int) -> bool:
        """Whether nothing but the contexts of this chunk is wanted."""
        return chunk < self.first

    def last_layer(self, chunk: int) -> str | None:
        """The last layer that has to run in a chunk; None for all."""
        return None if self.warmup is None else self.warmup.last_layer(chunk - self.start)

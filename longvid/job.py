"""Clock and counters of one run: what events and the report are made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longvid.engine import Run
from longvid.events import Callback, ChunkEvent, Direction, RunReport
from longvid.memory import peak_rss_bytes, rss_bytes
from longvid.pipeline import Prefetcher, Writer

__all__ = ["Job"]


class Job:
    """Clock and counters of one run."""

    def __init__(self, callbacks: tuple[Callback, ...], direction: Direction, total: int | None) -> None:
        self._callbacks = callbacks
        self._direction: Direction = direction
        self._total = total
        self._started = time.perf_counter()
        self._chunks = self._frames = self._latents = 0
        self._compute_seconds = self._waited = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the computation of one chunk."""
        started = time.perf_counter()
        yield
        self._compute_seconds = time.perf_counter() - started

    def emit(self, num_frames: int, num_latents: int, run: Run, reader: Prefetcher[Any], writer: Writer[Any]) -> None:
        """Tell the callbacks that a chunk is done."""
        self._frames += num_frames
        self._latents += num_latents
        waited = reader.wait_seconds + writer.wait_seconds
        event = ChunkEvent(
            direction=self._direction,
            index=self._chunks,
            num_frames=num_frames,
            frames_done=self._frames,
            frames_total=self._total,
            num_latents=num_latents,
            compute_seconds=self._compute_seconds,
            wait_seconds=waited - self._waited,
            cache_bytes=run.cache_bytes,
            peak_device_bytes=run.meter.peak_bytes,
            rss_bytes=rss_bytes(),
        )
        self._chunks, self._waited = self._chunks + 1, waited
        for callback in self._callbacks:
            callback(event)

    def report(self, run: Run, cache_bytes: int) -> RunReport:
        """The whole run; ``cache_bytes`` as they were before the contexts were freed."""
        seconds = time.perf_counter() - self._started
        return RunReport(
            direction=self._direction,
            frames=self._frames,
            latent_frames=self._latents,
            seconds=seconds,
            frames_per_second=self._frames / seconds,
            peak_device_bytes=run.meter.peak_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            cache_bytes=cache_bytes,
            offloaded_bytes=0,
            resumed_from_frame=0,
            complete=True,
        )

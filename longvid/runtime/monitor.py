"""Monitor: clock and counters of one run, from which its events and its report are made."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from longvid.environment import describe_machine
from longvid.events import Callback, ChunkEvent, LayerContext, RunReport, RunStart
from longvid.memory.host import peak_rss_bytes, rss_bytes
from longvid.planning.plan import Plan
from longvid.runtime.prefetch import Prefetcher, Writer
from longvid.runtime.run import Run
from longvid.schedule import Chunk

__all__ = ["Monitor"]


class Monitor:
    """Times and counts one run, and tells the callbacks. Use it in a ``with`` statement, which tells start and end.

    The run has been entered. ``total`` is the number of frames of the whole run, None while unknown.
    """

    def __init__(self, callbacks: tuple[Callback, ...], run: Run, plan: Plan, total: int | None) -> None:
        self._callbacks = callbacks
        self._run, self._plan, self._total = run, plan, total
        self._started = time.perf_counter()
        self._frames = self._latents = self._resumed_from_frame = self._frames_computed = 0
        self._compute_seconds = self._computed = 0.0
        self._threads: tuple[Prefetcher[Any], Writer[Any]] | None = None
        self._spent = (0.0, 0.0, 0.0)
        "what :func:`_thread_seconds` said at the last chunk"
        self._report: RunReport | None = None

    def __enter__(self) -> Self:
        observers = [callback for callback in self._callbacks if hasattr(callback, "run_started")]
        start = self._start() if observers else None
        for count, observer in enumerate(observers):
            try:
                observer.run_started(start)
            except BaseException:
                self._tell_end(observers[:count])
                raise
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        failures = self._tell_end(self._callbacks)
        if failures and exc_type is None:
            raise failures[0]
        for failure in failures:  # the run's own error is what the caller must see
            warnings.warn(f"a callback failed after the run did: {failure}", stacklevel=2)

    def _tell_end(self, callbacks: Sequence[Any]) -> list[Exception]:
        """Tell all callbacks, also after one of them has failed."""
        failures: list[Exception] = []
        for callback in callbacks:
            try:
                getattr(callback, "run_finished", lambda _: None)(self._report)
            except Exception as exc:
                failures.append(exc)
        return failures

    def _start(self) -> RunStart:
        plan, run, part = self._plan, self._run, self._run.part
        return RunStart(
            direction=run.direction,
            model=plan.model,
            height=plan.height,
            width=plan.width,
            dtype=plan.dtype,
            device=str(run.engine.device),
            chunk_frames=part.chunk_frames,
            frames_total=self._total,
            offload=part.offload,
            prefetch_bytes=part.placement.prefetch_bytes,
            host_tier=run.engine.copy_engine.tier,
            allowed_bytes=plan.budget.allowed_bytes,
            reserved_bytes=plan.budget.reserved_bytes,
            projected_bytes=part.projected_bytes,
            weights_bytes=part.weights_bytes,
            layers=tuple(LayerContext(name=x.name, bytes=x.bytes, resident=x.resident) for x in part.layers),
            plan=plan.explain(),
            machine=describe_machine(str(run.engine.device)),
        )

    def resume(self, num_frames: int, num_latents: int) -> None:
        """Count what earlier runs have stored."""
        self._frames = self._resumed_from_frame = num_frames
        self._latents = num_latents

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the computation of one chunk."""
        started = time.perf_counter()
        yield
        self._compute_seconds = time.perf_counter() - started
        self._computed += self._compute_seconds

    def emit(self, chunk: Chunk, counted: tuple[int, int] | None, reader: Prefetcher[Any], writer: Writer[Any]) -> None:
        """Tell the callbacks that a chunk is done.

        ``counted`` are its frames and latents that no earlier run has stored; None for a chunk of a warm-up.
        """
        num_frames, num_latents = counted or (0, 0)
        run = self._run
        self._frames_computed += chunk.num_frames
        self._frames += num_frames
        self._latents += num_latents
        self._threads = (reader, writer)
        spent = _thread_seconds(reader, writer)
        wait_seconds, read_seconds, write_seconds = (now - then for now, then in zip(spent, self._spent, strict=True))
        event = ChunkEvent(
            direction=run.direction,
            index=chunk.index,
            num_frames=num_frames,
            frames_done=self._frames,
            frames_total=self._total,
            num_latents=num_latents,
            seconds=time.perf_counter() - self._started,
            compute_seconds=self._compute_seconds,
            wait_seconds=wait_seconds,
            read_seconds=read_seconds,
            write_seconds=write_seconds,
            cache_bytes=run.cache.nbytes,
            offloaded_bytes=run.cache.nbytes - run.cache.device_bytes,
            chunk_peak_bytes=run.meter.chunk_peak_bytes,
            peak_device_bytes=run.meter.peak_bytes,
            rss_bytes=rss_bytes(),
            warmup=counted is None,
            spans=run.cache.offloader.collect_spans(self._started),
        )
        self._spent = spent
        for callback in self._callbacks:
            callback(event)

    def finish(self, *, complete: bool) -> RunReport:
        """The whole run. Called when its threads are done, and while its contexts are still there."""
        seconds, run = time.perf_counter() - self._started, self._run
        wait_seconds, read_seconds, write_seconds = _thread_seconds(*self._threads) if self._threads else self._spent
        self._report = RunReport(
            direction=run.direction,
            frames=self._frames,
            latent_frames=self._latents,
            seconds=seconds,
            frames_per_second=(self._frames - self._resumed_from_frame) / seconds,
            compute_seconds=self._computed,
            wait_seconds=wait_seconds,
            read_seconds=read_seconds,
            write_seconds=write_seconds,
            peak_device_bytes=run.meter.peak_bytes,
            projected_bytes=run.part.projected_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            cache_bytes=run.cache.nbytes,
            offloaded_bytes=run.cache.offloader.offloaded_bytes,
            resumed_from_frame=self._resumed_from_frame,
            frames_computed=self._frames_computed,
            complete=complete,
        )
        return self._report


def _thread_seconds(reader: Prefetcher[Any], writer: Writer[Any]) -> tuple[float, float, float]:
    """Seconds so far in which compute waited for either, in which the reader worked, and in which the writer did."""
    return reader.wait_seconds + writer.wait_seconds, reader.busy_seconds, writer.busy_seconds

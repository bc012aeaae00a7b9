"""Tune: peak against time for a row of thresholds, measured on the machine at hand.

Every threshold runs the same chunks of noise. Thresholds take turns, round after round, so that other load on the
machine affects all of them alike; a threshold's time is the median over the rounds. The knee is the least peak whose
chunks take at most ``slack`` longer than with nothing offloaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longvid.environment import describe_machine
from longvid.errors import MemoryBudgetError
from longvid.events import Direction
from longvid.memory.offload import OffloadPolicy
from longvid.models.base import CausalVAE
from longvid.planning.cost_model import DeviceRates
from longvid.planning.options import ComputeOptions
from longvid.planning.plan import DirectionPlan
from longvid.planning.planner import Planner
from longvid.planning.profile import DirectionProfile, Profile
from longvid.runtime.engine import Engine
from longvid.runtime.run import DecodeRun, EncodeRun
from longvid.units import format_bytes

__all__ = ["Sweep", "ThresholdPoint", "Tuning", "tune"]

_FIRST_TIMED = 3
"chunks before it warm up, and on a CPU they are the ones whose allocations are tracked, which takes time of its own"
_LINK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdPoint:
    """One threshold of one direction, measured."""

    direction: Direction
    slice_frames: int
    "frames of a slice in the layer with the largest frames; as many as a chunk has if it is not cut"
    resident_bytes: int
    "contexts that stay on the device, together"
    offloaded_bytes: int
    prefetch_bytes: int
    projected_bytes: int
    peak_bytes: int
    "measured, weights included"
    seconds: float
    "time of a middle chunk, median over the rounds"
    spread: float
    "largest time of the rounds divided by the smallest"
    slowdown: float
    "its time divided by that with nothing offloaded"
    knee: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The measurements of a sweep, and the profile made of them."""

    slack: float
    points: tuple[ThresholdPoint, ...]
    profile: Profile
    machine: dict[str, Any]

    def explain(self) -> str:
        """The sweep as a table, the knees marked."""
        scope, columns = self.profile.scope, "stay leave early planned measured"
        names = ("resident_bytes", "offloaded_bytes", "prefetch_bytes", "projected_bytes", "peak_bytes")
        lines = [
            f"{scope.model} at {scope.size} in {scope.dtype} on {scope.device}",
            f"{'':8}{'slices':>8}{''.join(f'{column:>12}' for column in columns.split())}{'ms/chunk':>10}{'ratio':>8}",
        ]
        for point in self.points:
            sizes = "".join(f"{format_bytes(getattr(point, name)):>12}" for name in names)
            times = f"{point.seconds * 1e3:>10.1f}{point.slowdown:>8.3f}{'  <- knee' if point.knee else ''}"
            lines.append(f"{point.direction:8}{point.slice_frames:>8}{sizes}{times}")
        lines.append(f"knee: the least peak for at most {self.slack:.0%} more time than with nothing offloaded")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "scope": asdict(self.profile.scope),
            "slack": self.slack,
            "reserved_bytes": self.profile.reserved_bytes,
            "points": [asdict(point) for point in self.points],
            "profile": {direction: asdict(part) for direction, part in self.profile.directions.items()},
            "machine": self.machine,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to measure, and how often."""

    directions: Sequence[Direction] = ("encode", "decode")
    thresholds: int = 6
    "offload thresholds, with nothing offloaded and everything offloaded included"
    rounds: int = 3
    "how often each threshold is measured"
    slack: float = 0.05
    "how much longer a chunk may take at the knee than at the first threshold that fits"
    offload_dir: Path | None = None
    "folder for offloaded contexts; None for host memory"


def tune(
    model: CausalVAE,
    *,
    height: int,
    width: int,
    device: str | torch.device = "auto",
    options: ComputeOptions | None = None,
    sweep: Sweep | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Measure a row of thresholds: ever shorter slices, then, in the shortest, ever more offloaded contexts.

    Args:
        model: a model with weights; random ones are enough.
        height, width: size of the frames in pixels.
        device: ``"auto"`` or a torch device.
        options: dtype and budget; thresholds that need more than the budget are left out.
        sweep: what to measure.
        say: called with a line of text after every measurement.

    Raises:
        ModelError: the model has no weights, or the device cannot be used.
        MemoryBudgetError: nothing fits the budget, even with everything offloaded.
    """
    options, sweep = options or ComputeOptions(), sweep or Sweep()
    engine = Engine.on_device(model, device, options.dtype, offload_dir=sweep.offload_dir)
    with engine.copy_engine:
        bench = _Bench(engine, (height, width), options, sweep, _link_rate(engine), say)
        points: list[ThresholdPoint] = []
        parts: dict[Direction, DirectionProfile] = {}
        for direction in sweep.directions:
            plans = bench.thresholds(direction)
            row = bench.measure(plans)
            points += row
            (knee,) = (point for point in row if point.knee)
            parts[direction] = DirectionProfile(
                slice_frames=knee.slice_frames,
                resident_bytes=knee.resident_bytes,
                prefetch_bytes=knee.prefetch_bytes,
                peak_bytes=knee.peak_bytes,
                slowdown=knee.slowdown,
                flops_per_second=plans[0].cost_model.total_flops / min(point.seconds for point in row),
                link_bytes_per_second=bench.link,
            )
        excess = max(point.peak_bytes - point.projected_bytes for point in points)
        profile = Profile(scope=engine.scope((height, width)), reserved_bytes=max(0, excess), directions=parts)
        machine = describe_machine(str(engine.device))
        return Tuning(slack=sweep.slack, points=tuple(points), profile=profile, machine=machine)


@dataclass(frozen=True, slots=True)
class _Bench:
    """Plans thresholds for one model and measures them."""

    engine: Engine
    size: tuple[int, int]
    options: ComputeOptions
    sweep: Sweep
    link: float
    say: Callable[[str], None]

    def thresholds(self, direction: Direction) -> list[DirectionPlan]:
        """Plans in ever shorter slices, then from nothing to everything offloaded, each different from the others."""
        memory, count = self.options.allowed_bytes, self.sweep.thresholds
        planner = Planner(self.engine.model, self.engine.device)
        rates = DeviceRates(link_bytes_per_second=self.link)

        def planned(policy: OffloadPolicy, slice_frames: int | None = None) -> DirectionPlan:
            free = replace(
                self.options, allowed_bytes=None, offload=policy, slice_frames=slice_frames, default_rates=rates
            )
            return planner.plan(self.size, free, (direction,)).direction(direction)

        none = planned(OffloadPolicy("none"))
        if memory is None or none.projected_bytes <= memory:  # how early contexts are fetched depends on the rates
            flops = none.cost_model.total_flops / self._run_once(none)[0]
            rates = DeviceRates(flops_per_second=flops, link_bytes_per_second=self.link, measured=True)
        sizes = [int(none.cache_bytes * (count - 1 - i) / (count - 1)) for i in range(1, count - 1)]
        policies = [*(OffloadPolicy("size", size) for size in sizes if size > 0), OffloadPolicy("all")]
        found = [none]
        shortest, frames = none.chunk_frames, none.chunk_frames // 2
        while frames:
            shorter = planned(OffloadPolicy("none"), frames)
            if shorter.projected_bytes < found[-1].projected_bytes:
                found.append(shorter)
                shortest = frames
            frames //= 2
        for policy in policies:
            candidate = planned(policy, shortest)
            if all(candidate.placement.offloaded != other.placement.offloaded for other in found):
                found.append(candidate)
        fitting = [part for part in found if memory is None or part.projected_bytes <= memory]
        if not fitting:
            raise MemoryBudgetError(
                f"{direction} needs {format_bytes(found[-1].projected_bytes)} with every context offloaded, and "
                f"{format_bytes(memory or 0)} are allowed; there is no threshold to measure",
                projected_bytes=found[-1].projected_bytes,
                allowed_bytes=memory or 0,
            )
        return fitting

    def measure(self, plans: Sequence[DirectionPlan]) -> list[ThresholdPoint]:
        """The point of each plan."""
        rounds: list[list[float]] = [[] for _ in plans]
        peaks = [0] * len(plans)
        for number in range(self.sweep.rounds):
            # Forwards and backwards in turn, so that a drift of the machine does not favour one end of the row.
            for index in range(len(plans))[:: -1 if number % 2 else 1]:
                took, peak = self._run_once(plans[index])
                rounds[index].append(took)
                peaks[index] = max(peaks[index], peak)
                self.say(
                    f"{plans[index].workload.direction}, round {number + 1} of {self.sweep.rounds}, "
                    f"{format_bytes(peak)}: {took * 1e3:.1f} ms per chunk"
                )
        times = [statistics.median(seconds) for seconds in rounds]
        allowed = [i for i, seconds in enumerate(times) if seconds <= (1 + self.sweep.slack) * times[0]]
        knee = min(allowed, key=lambda i: (peaks[i], times[i]))
        return [
            ThresholdPoint(
                direction=part.workload.direction,
                slice_frames=part.execution.slice_frames or part.chunk_frames,
                resident_bytes=part.resident_cache_bytes,
                offloaded_bytes=part.offloaded_cache_bytes,
                prefetch_bytes=part.placement.prefetch_bytes,
                projected_bytes=part.projected_bytes,
                peak_bytes=peaks[i],
                seconds=times[i],
                spread=max(rounds[i]) / min(rounds[i]),
                slowdown=times[i] / times[0],
                knee=i == knee,
            )
            for i, part in enumerate(plans)
        ]

    def _run_once(self, part: DirectionPlan) -> tuple[float, int]:
        """Seconds of a chunk in the middle, the shorter of two, and the peak of all."""
        encodes = part.workload.direction == "encode"
        run = EncodeRun(self.engine, part, "mode", 0) if encodes else DecodeRun(self.engine, part, None)
        with run:
            times = [_seconds(self.engine, compute) for compute in _chunks(run)]
            return min(times[_FIRST_TIMED:]), run.meter.peak_bytes


def _chunks(run: EncodeRun | DecodeRun) -> Iterator[Callable[[], object]]:
    """The first chunks of a video of noise, each as a call that computes it."""
    geometry, random = run.engine.model.geometry, np.random.default_rng(0)
    height, width = run.part.workload.height, run.part.workload.width
    p = geometry.pixels_per_latent
    for index in range(_FIRST_TIMED + 2):
        chunk = run.part.workload.schedule.full(index)
        if isinstance(run, EncodeRun):
            yield partial(run.moments, random.integers(0, 256, (chunk.padded_frames, height, width, 3), dtype=np.uint8))
        else:
            shape = (chunk.num_latents, geometry.latent_channels, height // p, width // p)
            yield partial(run.frames, chunk, random.standard_normal(shape, dtype=np.float32))


def _seconds(engine: Engine, work: Callable[[], object]) -> float:
    """Time of ``work`` on the device, which a call only queues there."""
    wait = (lambda _: None) if engine.device.type == "cpu" else torch.accelerator.synchronize
    wait(engine.device)
    started = time.perf_counter()
    work()
    wait(engine.device)
    return time.perf_counter() - started


def _link_rate(engine: Engine) -> float:
    """Bytes per second of a copy to the host and of one back, the slower of the two medians."""
    copy_engine = engine.copy_engine
    source = torch.ones(_LINK_BYTES, dtype=torch.uint8, device=engine.device)
    host_buffer = copy_engine.host_buffer([source.nbytes])
    slot = host_buffer.take(source)
    out = [_seconds(engine, lambda: copy_engine.to_host(source, slot).synchronize()) for _ in range(5)]
    back = [_seconds(engine, lambda: copy_engine.to_device(slot, source, None).synchronize()) for _ in range(5)]
    copy_engine.release(host_buffer)
    return source.nbytes / max(statistics.median(out), statistics.median(back))

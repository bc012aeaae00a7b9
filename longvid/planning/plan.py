"""Plan: what a run needs, how its layers run and where its contexts live, as values and as tables to read.

:mod:`longvid.planning.planner` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from longvid.events import Direction, LayerContext
from longvid.memory.budget import MemoryBudget
from longvid.memory.offload import Placement
from longvid.planning.cost_model import CostModel, DeviceRates
from longvid.planning.workload import Execution, Workload
from longvid.schedule import ChunkSchedule
from longvid.units import format_bytes

__all__ = ["DirectionPlan", "LayerPlan", "Plan"]

_ROWS = (
    ("peak without offloading", "nothing_offloaded_bytes"),
    ("lowest possible peak", "minimum_bytes"),
    ("peak of the run, as planned", "projected_bytes"),
    ("peak of a middle chunk", "steady_chunk_bytes"),
    ("  weights", "weights_bytes"),
    ("  activations", "activation_bytes"),
    ("all contexts", "cache_bytes"),
    ("  stay on the device", "resident_cache_bytes"),
    ("  are offloaded", "offloaded_cache_bytes"),
)
_MOST_ROWS = 12
"most contexts in a table"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan(LayerContext):
    """The context of one layer in a plan."""

    exposure: float
    "predicted time of its transfer divided by the computing time of its own step; above 1 it cannot hide there"


@dataclass(frozen=True, kw_only=True)
class DirectionPlan:
    """The plan of one direction, encode or decode."""

    workload: Workload
    execution: Execution
    cost_model: CostModel = field(repr=False)
    placement: Placement
    offload: str
    "the policy that was asked for"
    rates: DeviceRates
    weights_bytes: int
    least_model: CostModel | None = field(default=None, repr=False)
    "cost model with the shortest slices; None if the plan has them"
    suggestions: tuple[str, ...] = ()
    "if it does not fit: the nearest settings that would"

    @property
    def chunk_frames(self) -> int:
        """Frames of a chunk after the first."""
        return self.workload.schedule.chunk_frames

    @property
    def projected_bytes(self) -> int:
        """Highest peak of the whole run: first chunk and weights included."""
        return self.weights_bytes + self.cost_model.peak(self.placement).total_bytes

    @property
    def steady_chunk_bytes(self) -> int:
        """Highest peak of a chunk in the middle, weights included."""
        return self.weights_bytes + self.cost_model.steady_peak(self.placement).total_bytes

    @property
    def nothing_offloaded_bytes(self) -> int:
        """Peak of the run if every context stayed on the device."""
        return self.weights_bytes + self.cost_model.peak(Placement()).total_bytes

    @property
    def minimum_bytes(self) -> int:
        """Peak of the run in the shortest slices if every context left and none came early: nothing needs less."""
        cost_model = self.least_model or self.cost_model
        return self.weights_bytes + cost_model.peak(cost_model.least).total_bytes

    @property
    def cache_bytes(self) -> int:
        """All contexts of one video."""
        return self.cost_model.cache_bytes

    @property
    def activation_bytes(self) -> int:
        """What a middle chunk needs at its peak beside weights and contexts."""
        return self.cost_model.steady_peak(self.placement).working_bytes

    @property
    def resident_cache_bytes(self) -> int:
        """Contexts that stay on the device."""
        return self.cost_model.resident_bytes(self.placement)

    @property
    def offloaded_cache_bytes(self) -> int:
        """Contexts that leave the device between chunks."""
        return self.cache_bytes - self.resident_cache_bytes

    @property
    def idle_bytes(self) -> int:
        """Contexts on the device between two chunks."""
        return self.cost_model.idle_need(self.placement).total_bytes

    @property
    def host_sizes(self) -> tuple[int, ...]:
        """Bytes of every context that needs a place off the device."""
        leaving = (step for step in self.cost_model.steps if step.layer in self.placement.offloaded)
        return tuple(size for step in leaving for size in step.sizes or (step.context_bytes,))

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Every context, in the order in which the layers run."""
        return tuple(
            LayerPlan(
                name=step.layer,
                bytes=step.context_bytes,
                resident=step.layer not in self.placement.offloaded,
                exposure=self.cost_model.exposure(step, self.rates),
            )
            for step in self.cost_model.steps
        )

    @property
    def parts(self) -> dict[str, int]:
        """The projection by cause."""
        need = self.cost_model.peak(self.placement)
        transit = {"contexts in transit": need.transit_bytes} if need.transit_bytes else {}
        return {
            "weights": self.weights_bytes,
            "contexts": need.resident_bytes,
            **transit,
            "activations": need.working_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        names = (*(name for _, name in _ROWS), "idle_bytes", "offload", "chunk_frames")
        needs, execution = self.cost_model.steady_needs(self.placement), self.execution
        return {
            **{name: getattr(self, name) for name in names},
            "prefetch_bytes": self.placement.prefetch_bytes,
            **asdict(execution.limits),
            **{name: getattr(execution, name) for name in ("slice_frames", "keeps_buffers", "keeps_kernels")},
            "numerics": execution.numerics.to_dict(),
            "suggestions": list(self.suggestions),
            "rates": asdict(self.rates),
            "predicted_compute_seconds": self.cost_model.compute_seconds(self.rates),
            "predicted_transfer_seconds": self.cost_model.transfer_seconds(self.placement, self.rates),
            "predicted_chunk_seconds": self.cost_model.chunk_seconds(self.placement, self.rates),
            "layers": [asdict(layer) for layer in self.layers],
            "steady_chunk": [
                {"step": name, **asdict(need)} for name, need in zip(("", *self.cost_model.layers), needs, strict=True)
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Schedule and memory of encoding and decoding videos of one size with one model."""

    model: str
    height: int
    width: int
    "frame size after padding to whole latents"
    dtype: str
    device: str
    "the device that was planned for, such as cpu or cuda"
    schedule: ChunkSchedule
    budget: MemoryBudget
    "the limit that the plan was made for, and what other open videos hold"
    parts: Mapping[Direction, DirectionPlan]
    "what was planned, by direction"

    @property
    def encode(self) -> DirectionPlan:
        """The part for encoding."""
        return self.parts["encode"]

    @property
    def decode(self) -> DirectionPlan:
        """The part for decoding."""
        return self.parts["decode"]

    @property
    def projected_bytes(self) -> int:
        """The higher peak of the directions."""
        return max(part.projected_bytes for part in self.parts.values())

    def direction(self, direction: Direction) -> DirectionPlan:
        """The part for encoding or decoding."""
        return self.parts[direction]

    def fits(self, direction: Direction) -> bool:
        """Whether the direction is within the budget."""
        return self.budget.fits(self.direction(direction).projected_bytes)

    def check(self, direction: Direction) -> None:
        """Raise MemoryBudgetError if the direction does not fit the budget."""
        part = self.direction(direction)
        what = f"{direction} at {self.width}x{self.height} in {self.dtype}"
        if part.placement.offloaded:
            what += f" with {len(part.placement.offloaded)} of {len(part.layers)} contexts offloaded"
        self.budget.check(part.projected_bytes, part.parts, what, part.suggestions)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "model": self.model,
            "height": self.height,
            "width": self.width,
            "dtype": self.dtype,
            "device": self.device,
            "schedule": self.schedule.to_dict(),
            **{name: getattr(self.budget, name) for name in ("allowed_bytes", "reserved_bytes", "held_bytes")},
            "projected_bytes": self.projected_bytes,
            **{direction: part.to_dict() for direction, part in self.parts.items()},
        }

    def explain(self) -> str:
        """The plan as tables to read: peaks by direction, then the contexts."""
        directions, parts = list(self.parts), list(self.parts.values())
        allowed, reserved = self.budget.allowed_bytes, self.budget.reserved_bytes
        budget = "no limit" if allowed is None else f"{format_bytes(allowed)} allowed"
        if reserved:
            budget += f", {format_bytes(reserved)} of it reserved for kernels and the allocator"
        lines = [
            f"{self.model} at {self.width}x{self.height} in {self.dtype} on {self.device}, {budget}",
            self.schedule.lengths,
            f"computed in the {_by_direction(self.parts)}",
            "",
            " " * 28 + "".join(f"{direction:>14}" for direction in directions),
        ]
        for label, key in _ROWS:
            lines.append(f"{label:28}" + "".join(f"{format_bytes(getattr(part, key)):>14}" for part in parts))
        lines.append(f"{'layers run in':28}" + "".join(f"{part.execution.slices:>14}" for part in parts))
        how = [part.execution for part in parts]
        kept = (("all kept" if e.keeps_kernels else "buffers kept") if e.keeps_buffers else "freed" for e in how)
        lines.append(f"{'memory between chunks':28}" + "".join(f"{words:>14}" for words in kept))
        if allowed is not None:
            lines.append(f"{'fits':28}" + "".join(f"{'yes' if self.fits(d) else 'no':>14}" for d in directions))
        for direction, part in zip(directions, parts, strict=True):
            lines += ["", *_explain_direction(direction, part)]
        return "\n".join(lines)


def _explain_direction(direction: Direction, part: DirectionPlan) -> list[str]:
    leaving = [layer for layer in part.layers if not layer.resident]
    if not leaving:
        lines = [f"{direction}: every context stays on the device; nothing is transferred"]
        listed, title = sorted(part.layers, key=lambda layer: -layer.bytes)[:5], "largest contexts"
    else:
        compute = part.cost_model.compute_seconds(part.rates)
        transfer = part.cost_model.transfer_seconds(part.placement, part.rates)
        extra = part.cost_model.chunk_seconds(part.placement, part.rates) / compute - 1 if compute else 0.0
        early = part.placement.prefetch_bytes
        rates = part.rates
        how = "measured" if rates.measured else "a fast GPU's"
        lines = [
            f"{direction}: {len(leaving)} of {len(part.layers)} contexts are offloaded between chunks and come back "
            + (f"up to {format_bytes(early)} ahead of need" if early else "when needed"),
            f"  predicted for a chunk, at {how} {rates.flops_per_second / 1e12:.3g} TFLOP/s and "
            f"{rates.link_bytes_per_second / 1e9:.3g} GB/s each way: compute {compute * 1e3:.1f} ms, transfer "
            f"{transfer * 1e3:.1f} ms each way, {max(0.0, extra):.1%} longer than without",
        ]
        listed, title = leaving, "contexts that are offloaded"
    if part.suggestions:
        lines += ["  does not fit; these settings would:", *(f"    {text}" for text in part.suggestions)]
    lines += [f"  {title:38}{'bytes':>12}{'transfer/compute':>18}"]
    shown = listed if len(listed) <= _MOST_ROWS else sorted(listed, key=lambda layer: -layer.bytes)[:_MOST_ROWS]
    lines += [f"    {layer.name:36}{format_bytes(layer.bytes):>12}{layer.exposure:>18.2f}" for layer in shown]
    if len(shown) < len(listed):
        rest = sum(layer.bytes for layer in listed) - sum(layer.bytes for layer in shown)
        lines.append(f"    and {len(listed) - len(shown)} smaller ones, {format_bytes(rest)}; --json lists all")
    return lines


def _by_direction(parts: Mapping[Direction, DirectionPlan]) -> str:
    words_of = {direction: part.execution.numerics.words for direction, part in parts.items()}
    if len(set(words_of.values())) == 1:
        return next(iter(words_of.values()))
    return "; ".join(f"{words} ({direction})" for direction, words in words_of.items())

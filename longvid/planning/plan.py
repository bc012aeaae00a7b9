"""Plan: what a run will need and where its contexts will live.

Bytes and placements, in numbers and in words; :mod:`longvid.planning.planner` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from longvid.events import Direction
from longvid.memory.budget import MemoryBudget
from longvid.memory.offload import Placement
from longvid.models.numerics import Numerics
from longvid.planning.cost_model import DeviceRates, Timeline
from longvid.schedule import ChunkSchedule
from longvid.units import format_bytes

__all__ = ["DirectionPlan", "LayerPlan", "Plan", "Slicing"]

_ROWS = (
    ("peak, nothing offloaded", "nothing_offloaded_bytes"),
    ("peak, the least possible", "minimum_bytes"),
    ("peak of the run, as planned", "projected_bytes"),
    ("peak of a middle chunk", "steady_chunk_bytes"),
    ("  weights", "weights_bytes"),
    ("  activations", "activation_bytes"),
    ("all contexts", "cache_bytes"),
    ("  stay on the device", "resident_cache_bytes"),
    ("  leave for the host", "offloaded_cache_bytes"),
)
_MOST_ROWS = 12
"contexts in a table for people"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """The context of one layer."""

    name: str
    bytes: int
    resident: bool
    "whether it stays on the device between chunks"
    exposure: float
    "predicted time of its transfer over the computing time of its own step; above 1 it cannot hide there"


@dataclass(frozen=True, slots=True)
class Slicing:
    """How large the slices of frames and the bands of rows are in which layers run. Never changes a result."""

    elements: int = 2**31 - 1
    "most elements of a slice's new input frames and of its output; at least one frame"
    frames: int | None = None
    "that many frames in the layer with the largest frames, and more in the others; None for whole chunks"
    band_elements: int | None = None
    "most elements of a window, beyond which layers run in bands of rows; None for whole frames"

    def __str__(self) -> str:
        if self.band_elements is None:
            return "whole chunks" if self.frames is None else f"slices of {self.frames}"
        return "bands of rows" if self.frames is None else f"{self.frames}-frame bands"


@dataclass(frozen=True, kw_only=True)
class DirectionPlan:
    """Bytes of one direction, encode or decode, and where its contexts live."""

    timeline: Timeline = field(repr=False)
    frame_size: tuple[int, int]
    "height and width after padding to whole latents"
    placement: Placement
    offload: str
    "the policy that was asked for"
    rates: DeviceRates
    weights_bytes: int
    chunk_frames: int
    numerics: Numerics = field(default_factory=Numerics)
    slicing: Slicing = field(default_factory=lambda: Slicing())
    keeps_buffers: bool = False
    "whether the layers' memory is kept from chunk to chunk"
    keeps_kernels: bool = False
    "whether what the layers make of their weights is kept as well"
    least_timeline: Timeline | None = field(default=None, repr=False)
    "with the shortest slices; None if there are none shorter than the plan's"
    suggestions: tuple[str, ...] = ()
    "if it does not fit: the nearest settings that would"

    @property
    def projected_bytes(self) -> int:
        """Highest peak of the whole run: first chunk and weights included."""
        return self.weights_bytes + self.timeline.peak(self.placement).total_bytes

    @property
    def steady_chunk_bytes(self) -> int:
        """Highest peak of a chunk in the middle, weights included."""
        return self.weights_bytes + self.timeline.steady_peak(self.placement).total_bytes

    @property
    def nothing_offloaded_bytes(self) -> int:
        """Peak of the run if every context stayed on the device."""
        return self.weights_bytes + self.timeline.peak(Placement()).total_bytes

    @property
    def minimum_bytes(self) -> int:
        """Peak of the run in the shortest slices if every context left and none came early: nothing needs less."""
        timeline = self.least_timeline or self.timeline
        return self.weights_bytes + timeline.peak(timeline.least).total_bytes

    @property
    def cache_bytes(self) -> int:
        """All contexts of one video."""
        return self.timeline.cache_bytes

    @property
    def activation_bytes(self) -> int:
        """What a middle chunk needs at its peak beside weights and contexts."""
        return self.timeline.steady_peak(self.placement).working_bytes

    @property
    def resident_cache_bytes(self) -> int:
        """Contexts that stay on the device."""
        return self.timeline.resident_bytes(self.placement)

    @property
    def offloaded_cache_bytes(self) -> int:
        """Contexts that leave the device between chunks."""
        return self.cache_bytes - self.resident_cache_bytes

    @property
    def idle_bytes(self) -> int:
        """Contexts on the device between two chunks."""
        return self.timeline.idle_need(self.placement).total_bytes

    @property
    def host_sizes(self) -> tuple[int, ...]:
        """Bytes of every context that needs a place off the device."""
        return tuple(layer.bytes for layer in self.layers if not layer.resident)

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Every context, in the order in which the layers run."""
        return tuple(
            LayerPlan(
                name=step.layer,
                bytes=step.context_bytes,
                resident=step.layer not in self.placement.offloaded,
                exposure=self.timeline.exposure(step, self.rates),
            )
            for step in self.timeline.steps
        )

    @property
    def parts(self) -> dict[str, int]:
        """The projection by cause."""
        need = self.timeline.peak(self.placement)
        transit = {"contexts in transit": need.transit_bytes} if need.transit_bytes else {}
        return {
            "weights": self.weights_bytes,
            "contexts": need.resident_bytes,
            **transit,
            "activations": need.working_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        names = (
            "projected_bytes", "steady_chunk_bytes", "nothing_offloaded_bytes", "minimum_bytes", "weights_bytes",
            "cache_bytes", "activation_bytes", "resident_cache_bytes", "offloaded_cache_bytes", "idle_bytes", "offload",
            "chunk_frames",
        )  # fmt: skip
        needs = self.timeline.steady_needs(self.placement)
        return {
            **{name: getattr(self, name) for name in names},
            "prefetch_bytes": self.placement.prefetch_bytes,
            "slice_frames": self.slicing.frames,
            "slice_elements": self.slicing.elements,
            "band_elements": self.slicing.band_elements,
            "keeps_buffers": self.keeps_buffers,
            "keeps_kernels": self.keeps_kernels,
            "numerics": self.numerics.to_dict(),
            "suggestions": list(self.suggestions),
            "rates": asdict(self.rates),
            "predicted_compute_seconds": self.timeline.compute_seconds(self.rates),
            "predicted_transfer_seconds": self.timeline.transfer_seconds(self.placement, self.rates),
            "predicted_chunk_seconds": self.timeline.chunk_seconds(self.placement, self.rates),
            "layers": [asdict(layer) for layer in self.layers],
            "steady_chunk": [
                {"step": name, **asdict(need)} for name, need in zip(("", *self.timeline.layers), needs, strict=True)
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
    schedule: ChunkSchedule
    allowed_bytes: int | None
    reserved_bytes: int
    "part of the budget that is set aside for what a dry run cannot see"
    held_bytes: int = 0
    "contexts of other videos that are open at the same time"
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

    @property
    def budget(self) -> MemoryBudget:
        """The limit that the plan was made for."""
        return MemoryBudget(allowed_bytes=self.allowed_bytes, reserved_bytes=self.reserved_bytes)

    def fits(self, direction: Direction) -> bool:
        """Whether the direction is within the budget."""
        return self.budget.fits(self.direction(direction).projected_bytes + self.held_bytes)

    def check(self, direction: Direction) -> None:
        """Raise MemoryBudgetError if the direction does not fit the budget."""
        part = self.direction(direction)
        others = {"contexts of other open videos": self.held_bytes} if self.held_bytes else {}
        what = f"{direction} at {self.width}x{self.height} in {self.dtype}"
        if part.placement.offloaded:
            what += f" with {len(part.placement.offloaded)} of {len(part.layers)} contexts offloaded"
        needed = part.projected_bytes + self.held_bytes
        self.budget.check(needed, {**part.parts, **others}, what, part.suggestions)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "model": self.model,
            "height": self.height,
            "width": self.width,
            "dtype": self.dtype,
            "schedule": self.schedule.to_dict(),
            "allowed_bytes": self.allowed_bytes,
            "reserved_bytes": self.reserved_bytes,
            "held_bytes": self.held_bytes,
            "projected_bytes": self.projected_bytes,
            **{direction: part.to_dict() for direction, part in self.parts.items()},
        }

    def explain(self) -> str:
        """The plan as tables to read."""
        directions, parts = list(self.parts), list(self.parts.values())
        first = 1 + self.schedule.chunk_frames
        budget = "no limit" if self.allowed_bytes is None else f"{format_bytes(self.allowed_bytes)} allowed"
        if self.reserved_bytes:
            budget += f", {format_bytes(self.reserved_bytes)} of it reserved for workspaces"
        lines = [
            f"{self.model} at {self.width}x{self.height} in {self.dtype}, {budget}",
            f"chunks of {first}, {self.schedule.chunk_frames}, {self.schedule.chunk_frames}, ... frames",
            f"computed in the {_by_direction(self.parts)}",
            "",
            " " * 28 + "".join(f"{direction:>14}" for direction in directions),
        ]
        for label, key in _ROWS:
            lines.append(f"{label:28}" + "".join(f"{format_bytes(getattr(part, key)):>14}" for part in parts))
        lines.append(f"{'layers run in':28}" + "".join(f"{part.slicing!s:>14}" for part in parts))
        kept = (("kept" if p.keeps_kernels else "layers only") if p.keeps_buffers else "given up" for p in parts)
        lines.append(f"{'memory between chunks':28}" + "".join(f"{words:>14}" for words in kept))
        if self.allowed_bytes is not None:
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
        compute = part.timeline.compute_seconds(part.rates)
        transfer = part.timeline.transfer_seconds(part.placement, part.rates)
        extra = part.timeline.chunk_seconds(part.placement, part.rates) / compute - 1 if compute else 0.0
        early = part.placement.prefetch_bytes
        rates = part.rates
        how = "measured" if rates.measured else "a fast GPU's"
        lines = [
            f"{direction}: {len(leaving)} of {len(part.layers)} contexts leave between chunks and come back "
            + (f"up to {format_bytes(early)} ahead of need" if early else "when needed"),
            f"  predicted for a chunk, at {how} {rates.flops_per_second / 1e12:.3g} TFLOP/s and "
            f"{rates.link_bytes_per_second / 1e9:.3g} GB/s each way: compute {compute * 1e3:.1f} ms, transfer "
            f"{transfer * 1e3:.1f} ms each way, {max(0.0, extra):.1%} longer than without",
        ]
        listed, title = leaving, "contexts that leave"
    if part.suggestions:
        lines += ["  does not fit even so; these would:", *(f"    {text}" for text in part.suggestions)]
    lines += [f"  {title:38}{'bytes':>12}{'transfer/compute':>18}"]
    shown = listed if len(listed) <= _MOST_ROWS else sorted(listed, key=lambda layer: -layer.bytes)[:_MOST_ROWS]
    lines += [f"    {layer.name:36}{format_bytes(layer.bytes):>12}{layer.exposure:>18.2f}" for layer in shown]
    if len(shown) < len(listed):
        rest = sum(layer.bytes for layer in listed) - sum(layer.bytes for layer in shown)
        lines.append(f"    and {len(listed) - len(shown)} smaller ones, {format_bytes(rest)}; --json lists all")
    return lines


def _by_direction(parts: Mapping[Direction, DirectionPlan]) -> str:
    """The numerics of all directions in words, told apart where they differ."""
    told = {direction: part.numerics.words for direction, part in parts.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{words} ({direction})" for direction, words in told.items())

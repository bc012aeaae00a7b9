"""Plan: what a run will need and where its contexts will live, known before it starts.

A dry run of the first and of a middle chunk (:mod:`longvid.dryrun`) gives a
:class:`~longvid.timeline.Timeline`, from which the peak of every placement of the contexts follows to the byte: without
a device, without weights, in about a second. The real run executes the same code, so on a CPU its tracked peak is the
same. Workspaces of kernels and the rounding of an allocator are not tensors and are not in these numbers; the budget
sets ``reserved_bytes`` aside for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from longvid.cache import CausalLayer
from longvid.dryrun import dry_run, skeleton_of
from longvid.errors import ModelError, ScheduleError
from longvid.events import Direction
from longvid.memory import MemoryBudget, tensor_bytes
from longvid.models.base import CausalVAE
from longvid.models.loading import load_model
from longvid.numerics import Numerics
from longvid.offload import OffloadPolicy, Placement
from longvid.schedule import ChunkSchedule
from longvid.timeline import DeviceRates, Timeline, choose_placement
from longvid.units import format_bytes, parse_bytes, parse_reserve

__all__ = [
    "DirectionPlan",
    "LayerPlan",
    "Offload",
    "Plan",
    "Slicing",
    "make_plan",
    "model_name",
    "parse_dtype",
    "parse_offload",
]

Offload: TypeAlias = str | int | OffloadPolicy
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
_DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")


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
    keeps_workspace: bool = False
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
            "keeps_workspace": self.keeps_workspace,
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
        kept = (("kept" if p.keeps_kernels else "layers only") if p.keeps_workspace else "given up" for p in parts)
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


def make_plan(
    model: CausalVAE | str,
    *,
    height: int,
    width: int,
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    offload: Offload | Mapping[Direction, OffloadPolicy] = "auto",
    chunk_frames: int | None = None,
    reserved: str | int = 0,
    rates: DeviceRates | Mapping[Direction, DeviceRates] | None = None,
    held_bytes: int = 0,
    idle_limit_bytes: int | None = None,
    directions: Sequence[Direction] = _DIRECTIONS,
    numerics: Numerics | Mapping[Direction, Numerics] | None = None,
    slice_frames: int | Mapping[Direction, int | None] | None = None,
    band_bytes: int | None = None,
    keep_workspace: bool = False,
) -> Plan:
    """Plan encoding and decoding of ``height`` x ``width`` frames. Needs no weights, no device and about a second.

    Args:
        model: a model, or what :func:`longvid.load_model` takes.
        height: frame height in pixels; sizes that are not whole latents are padded up.
        width: frame width in pixels.
        dtype: compute dtype, a name or a torch dtype; None for that of the model's weights.
        memory: the budget, such as ``"8GiB"``; None for no limit.
        offload: which contexts leave the device between chunks: ``"auto"`` (as much as the budget needs), ``"none"``,
            ``"all"``, or a size such as ``"512MiB"`` up to which they stay. A mapping gives each direction its own.
        chunk_frames: frames of a chunk after the first; None for the model's own. If the model is chunk-invariant
            and its own length does not fit the budget, None takes the longest of a half, a quarter, ... that does;
            only if none fits does ``"auto"`` offload.
        reserved: part of the budget to set aside for what a dry run cannot see.
        rates: of the device, for predicted times, also by direction; assumptions by default.
        held_bytes: contexts of other videos on the device while this one computes.
        idle_limit_bytes: most bytes of contexts on the device between chunks; for several videos in one session.
        directions: what to plan; both share the length of a chunk.
        numerics: layout and forms of convolutions and norms, also by direction; contiguous and plain by default.
        slice_frames: frames of a slice in the layer with the largest frames; None for the longest slices that fit the
            budget, whole chunks first. A mapping gives each direction its own.
        band_bytes: most bytes of a layer's window, beyond which it runs in bands of rows, for devices with caches that
            gain from that.
        keep_workspace: keep the layers' memory from chunk to chunk if that fits without offloading, for devices on
            which fresh memory is slow; and what they make of their weights if that fits as well.

    Raises:
        ModelError: the model, the dtype or the policy cannot be used.
        ScheduleError: the frame size is not positive, or ``chunk_frames`` is not for this model.
    """
    if height < 1 or width < 1:
        raise ScheduleError(f"a frame of {width}x{height} pixels has no area")
    policies = offload if isinstance(offload, Mapping) else dict.fromkeys(_DIRECTIONS, parse_offload(offload))
    vae = load_model(model)
    if not isinstance(vae, nn.Module):
        raise ModelError(f"{type(vae).__name__} is not a torch module, so its memory cannot be planned")
    compute = parse_dtype(dtype) if dtype is not None else next(vae.parameters()).dtype
    allowed = None if memory is None else parse_bytes(memory)
    reserved_bytes = parse_reserve(reserved)
    planner = _Planner(
        vae,
        compute,
        MemoryBudget(allowed_bytes=allowed, reserved_bytes=reserved_bytes),
        held_bytes,
        idle_limit_bytes,
        rates if isinstance(rates, Mapping) else dict.fromkeys(_DIRECTIONS, rates or DeviceRates()),
        numerics if isinstance(numerics, Mapping) else dict.fromkeys(_DIRECTIONS, numerics or Numerics()),
        slice_frames if isinstance(slice_frames, Mapping) else dict.fromkeys(_DIRECTIONS, slice_frames),
        band_bytes,
        keep_workspace,
    )
    padded = vae.geometry.padded_size(height, width)
    chosen: tuple[ChunkSchedule, dict[Direction, DirectionPlan]] | None = None
    for schedule, tried in _attempts(vae, chunk_frames, policies):
        parts = {d: planner.plan(d, *padded, schedule, tried[d]) for d in directions}
        chosen = schedule, parts
        if all(planner.fits(part, part.placement) for part in parts.values()):
            break
    assert chosen is not None
    schedule, parts = chosen
    for direction, part in parts.items():
        if not planner.fits(part, part.placement):
            parts[direction] = planner.with_suggestions(direction, *padded, schedule, part)
    return Plan(
        model=model_name(vae),
        height=padded[0],
        width=padded[1],
        dtype=_dtype_name(compute),
        schedule=schedule,
        allowed_bytes=allowed,
        reserved_bytes=reserved_bytes,
        held_bytes=held_bytes,
        parts=parts,
    )


def _attempts(
    model: CausalVAE, chunk_frames: int | None, policies: Mapping[Direction, OffloadPolicy]
) -> Iterator[tuple[ChunkSchedule, Mapping[Direction, OffloadPolicy]]]:
    """What to try, best first; at least one. A shorter chunk costs less than a transfer where the cut is free."""
    lengths = list(_schedules(model, chunk_frames))
    if len(lengths) > 1 and any(policy.kind == "auto" for policy in policies.values()):
        staying = {d: OffloadPolicy("none") if p.kind == "auto" else p for d, p in policies.items()}
        yield from ((schedule, staying) for schedule in lengths)
    yield from ((schedule, policies) for schedule in lengths)


def _schedules(model: CausalVAE, chunk_frames: int | None) -> Iterator[ChunkSchedule]:
    geometry = model.geometry
    yield geometry.schedule_for(chunk_frames)
    length = geometry.chunk_frames
    while geometry.chunk_invariant and chunk_frames is None and length % (2 * geometry.frames_per_latent) == 0:
        length //= 2
        yield geometry.schedule_for(length)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept from chunk to chunk."""

    workspace: bool = False
    kernels: bool = False


class _Planner:
    """Plans of one model in one dtype under one budget."""

    def __init__(
        self,
        model: CausalVAE,
        dtype: torch.dtype,
        budget: MemoryBudget,
        held_bytes: int,
        idle_limit_bytes: int | None,
        rates: Mapping[Direction, DeviceRates],
        numerics: Mapping[Direction, Numerics],
        slice_frames: Mapping[Direction, int | None],
        band_bytes: int | None,
        keep_workspace: bool,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._budget = budget
        self._held_bytes = held_bytes
        self._idle_limit_bytes = idle_limit_bytes
        self._rates = rates
        self._numerics = numerics
        self._slice_frames = slice_frames
        self._keep_workspace = keep_workspace
        self._band_elements = None if band_bytes is None else band_bytes // dtype.itemsize
        self._timelines: dict[tuple[tuple[object, ...], Slicing, _Kept], Timeline] = {}
        self._frames: dict[Direction, tuple[int, int]] = {}
        "elements of the largest frame of a layer's input, for frames of how many pixels"
        self._skeletons: dict[torch.dtype, CausalVAE] = {}

    def fits(self, part: DirectionPlan, placement: Placement) -> bool:
        """Whether the direction would be within all limits with this placement."""
        if self._idle_limit_bytes is not None:
            idle_bytes = part.timeline.idle_need(placement).total_bytes
            if idle_bytes > self._idle_limit_bytes:
                return False
        return self._within(part.weights_bytes + part.timeline.peak(placement).total_bytes)

    def _within(self, peak_bytes: int) -> bool:
        return self._budget.fits(peak_bytes + self._held_bytes)

    def plan(
        self, direction: Direction, height: int, width: int, schedule: ChunkSchedule, policy: OffloadPolicy
    ) -> DirectionPlan:
        """A direction with the slices and the placement that the policy and the limits give it.

        Memory that is kept saves time, shorter slices cost next to nothing, transfers may cost a lot: contexts leave
        only if the shortest slices are not enough.
        """
        candidates = self._slicings(direction, height, width, schedule)
        least = self._timeline(direction, height, width, self._dtype, schedule, candidates[-1])
        staying = OffloadPolicy("none") if policy.kind == "auto" else policy
        tried = [(slicing, _Kept()) for slicing in candidates]
        if self._keep_workspace and staying.kind == "none":
            tried[:0] = [(candidates[0], _Kept(True, True)), (candidates[0], _Kept(True))]
        for slicing, kept in tried:
            part = self._part(direction, height, width, schedule, policy, slicing, least, kept)
            part = self._placed(part, staying)
            if self.fits(part, part.placement):
                return part
        return self._placed(part, policy)

    def _part(
        self,
        direction: Direction,
        height: int,
        width: int,
        schedule: ChunkSchedule,
        policy: OffloadPolicy,
        slicing: Slicing,
        least: Timeline,
        kept: _Kept,
    ) -> DirectionPlan:
        return DirectionPlan(
            timeline=self._timeline(direction, height, width, self._dtype, schedule, slicing, kept),
            frame_size=(height, width),
            placement=Placement(),
            offload=str(policy),
            rates=self._rates[direction],
            weights_bytes=self._weights_bytes(self._dtype),
            chunk_frames=schedule.chunk_frames,
            numerics=self._numerics[direction],
            slicing=slicing,
            keeps_workspace=kept.workspace,
            keeps_kernels=kept.kernels,
            least_timeline=least,
        )

    def _placed(self, part: DirectionPlan, policy: OffloadPolicy) -> DirectionPlan:
        chosen = choose_placement(part.timeline, policy, partial(self.fits, part), part.rates)
        return replace(part, placement=chosen)

    def _slicings(self, direction: Direction, height: int, width: int, schedule: ChunkSchedule) -> list[Slicing]:
        """What to try, longest first. The unit is a frame of the layer whose frames are the largest."""
        # A layout that has no bands has slices of that size instead.
        last = self._numerics[direction].layout == "channels_last"
        most = 2**31 - 1 if last or self._band_elements is None else self._band_elements
        whole = Slicing(most, band_elements=self._band_elements if last else None)
        if direction not in self._frames:
            timeline = self._timeline(direction, height, width, self._dtype, schedule, whole)
            module = self._model.encoder if direction == "encode" else self._model.decoder
            layers = dict(module.named_modules())
            context_frames = (cast("CausalLayer", layers[step.layer]).context_frames for step in timeline.steps)
            sizes = (s.context_bytes // n for s, n in zip(timeline.steps, context_frames, strict=True))
            self._frames[direction] = (max(sizes, default=0) // self._dtype.itemsize, height * width)
        largest, area = self._frames[direction]
        frame = largest * height * width // area
        if not frame:
            return [whole]
        asked = self._slice_frames[direction]
        if asked is not None:
            return [replace(whole, elements=asked * frame, frames=asked)]
        shortest = 2 if self._numerics[direction].paired_frames else 1
        longest = max(shortest, most // frame)
        found = [whole if longest >= schedule.chunk_frames else replace(whole, frames=longest)]
        frames = min(longest, schedule.chunk_frames) // 2
        while frames >= shortest:
            found.append(replace(whole, elements=frames * frame, frames=frames))
            frames //= 2
        return found

    def with_suggestions(
        self, direction: Direction, height: int, width: int, schedule: ChunkSchedule, part: DirectionPlan
    ) -> DirectionPlan:
        """The same plan with the nearest settings that would fit, each tried by a dry run of its own."""
        found = []
        if part.minimum_bytes < part.projected_bytes:
            if self.fits(part, part.timeline.least):
                found.append("offload auto or all")
            else:
                found.append(f"a budget of {self._budget_text(part.minimum_bytes)} and offload auto")
        found.append(f"a budget of {self._budget_text(part.projected_bytes)}" + (" as it is" if found else ""))
        for shorter in _schedules(self._model, None):
            if shorter.chunk_frames < schedule.chunk_frames and self._minimum_fits(
                direction, height, width, self._dtype, shorter
            ):
                found.append(f"chunks of {shorter.chunk_frames} frames")
                break
        if self._dtype == torch.float32 and self._minimum_fits(direction, height, width, torch.bfloat16, schedule):
            found.append("dtype bfloat16")
        smaller = self._smaller_size(direction, height, width, schedule, part)
        if smaller is not None:
            found.append(f"frames of {smaller[1]}x{smaller[0]}")
        return replace(part, suggestions=tuple(found))

    def _budget_text(self, peak_bytes: int) -> str:
        """A budget that, read back, holds this peak."""
        needed = peak_bytes + self._held_bytes + self._budget.reserved_bytes
        return f"{math.ceil(needed / 2**20)}MiB"

    def _smaller_size(
        self, direction: Direction, height: int, width: int, schedule: ChunkSchedule, part: DirectionPlan
    ) -> tuple[int, int] | None:
        """The largest frame of about the same shape whose smallest plan fits. Bytes grow with the area."""
        p = self._model.geometry.pixels_per_latent
        free = self._budget.left(part.weights_bytes + self._held_bytes)
        if free is None or free <= 0:
            return None
        scale = min(1.0, math.sqrt(free / (part.minimum_bytes - part.weights_bytes)))
        while scale > 0:
            smaller = int(height * scale) // p * p, int(width * scale) // p * p
            if 0 in smaller:
                return None
            if smaller != (height, width) and self._minimum_fits(direction, *smaller, self._dtype, schedule):
                return smaller
            scale -= 0.02
        return None

    def _minimum_fits(
        self, direction: Direction, height: int, width: int, dtype: torch.dtype, schedule: ChunkSchedule
    ) -> bool:
        shortest = self._slicings(direction, height, width, schedule)[-1]
        timeline = self._timeline(direction, height, width, dtype, schedule, shortest)
        return self._within(self._weights_bytes(dtype) + timeline.peak(timeline.least).total_bytes)

    def _weights_bytes(self, dtype: torch.dtype) -> int:
        return tensor_bytes(cast("nn.Module", self._skeleton(dtype)))

    def _skeleton(self, dtype: torch.dtype) -> CausalVAE:
        if dtype not in self._skeletons:
            self._skeletons[dtype] = skeleton_of(self._model, dtype)
        return self._skeletons[dtype]

    def _timeline(
        self,
        direction: Direction,
        height: int,
        width: int,
        dtype: torch.dtype,
        schedule: ChunkSchedule,
        slicing: Slicing,
        kept: _Kept = _Kept(),
    ) -> Timeline:
        chunks = (direction, height, width, dtype, schedule)
        key = (chunks, slicing, kept)
        if key not in self._timelines:
            self._timelines[key] = dry_run(
                self._skeleton(dtype),
                direction,
                height,
                width,
                dtype,
                schedule,
                numerics=self._numerics[direction],
                slice_elements=slicing.elements,
                band_elements=slicing.band_elements,
                keep_workspace=kept.workspace,
                keep_kernels=kept.kernels,
                like=next((known for (other, *_), known in self._timelines.items() if other == chunks), None),
            )
        return self._timelines[key]


def _by_direction(parts: Mapping[Direction, DirectionPlan]) -> str:
    """The numerics of all directions in words, told apart where they differ."""
    told = {direction: part.numerics.words for direction, part in parts.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{words} ({direction})" for direction, words in told.items())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_name(model: CausalVAE) -> str:
    """What a model is called in plans, profiles and reports."""
    facts = model.describe()
    return str(facts.get("name_or_path") or facts.get("class_name") or type(model).__name__)


def parse_offload(offload: Offload) -> OffloadPolicy:
    """An offload policy as a user writes it; see :class:`~longvid.offload.OffloadPolicy`.

    Raises:
        ModelError: it is not one.
    """
    try:
        return OffloadPolicy.parse(offload)
    except ValueError as exc:
        raise ModelError(str(exc)) from exc


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"``, ``"float16"`` or ``"float32"`` as a torch dtype.

    Raises:
        ModelError: another dtype.
    """
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    found = known.get(dtype) if isinstance(dtype, str) else (dtype if dtype in known.values() else None)
    if found is None:
        raise ModelError(f"dtype {dtype!r} cannot be computed in; choose {', '.join(known)}")
    return found

"""Plan: what a run will need and where its contexts will live, known before it starts.

A dry run of the first and of a middle chunk on ``meta`` tensors, under the :class:`AllocationTracker`, gives a
:class:`~longvid.timeline.Timeline`, from which the peak of every placement of the contexts follows to the byte: without
a device, without weights, in about a second. The real run executes the same code, so on a CPU its tracked peak is the
same. Workspaces of kernels and the rounding of an allocator are not tensors and are not in these numbers; the budget
sets ``reserved_bytes`` aside for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from longvid.cache import ConvCache
from longvid.errors import ModelError, ScheduleError
from longvid.events import Direction
from longvid.memory import AllocationTracker, MemoryBudget, tensor_bytes
from longvid.models.base import CausalVAE, placed
from longvid.models.loading import load_model
from longvid.offload import OffloadPolicy, Placement
from longvid.residency import Residency
from longvid.schedule import Chunk, ChunkSchedule
from longvid.step import decode_chunk, encode_chunk
from longvid.timeline import DeviceRates, Step, Timeline, choose_placement
from longvid.units import format_bytes, parse_bytes

__all__ = ["DirectionPlan", "LayerPlan", "Offload", "Plan", "make_plan", "model_name", "parse_dtype", "parse_offload"]

Offload: TypeAlias = str | int | OffloadPolicy
_META = torch.device("meta")
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
        """Peak of the run if every context left the device and none came early: no placement needs less."""
        return self.weights_bytes + self.timeline.peak(self.timeline.least).total_bytes

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
        return sum(layer.bytes for layer in self.layers if layer.resident)

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
        needed = self.direction(direction).projected_bytes + self.reserved_bytes
        return self.allowed_bytes is None or needed <= self.allowed_bytes

    def check(self, direction: Direction, *, others_bytes: int = 0) -> None:
        """Raise MemoryBudgetError if the direction does not fit the budget.

        Args:
            direction: what is about to run.
            others_bytes: contexts of other videos that are open at the same time.
        """
        part = self.direction(direction)
        parts = {**part.parts, **({"contexts of other open videos": others_bytes} if others_bytes else {})}
        what = f"{direction} at {self.width}x{self.height} in {self.dtype}"
        if part.placement.offloaded:
            what += f" with {len(part.placement.offloaded)} of {len(part.layers)} contexts offloaded"
        MemoryBudget(allowed_bytes=self.allowed_bytes, reserved_bytes=self.reserved_bytes).check(
            part.projected_bytes + others_bytes, parts, what, part.suggestions
        )

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
            "",
            " " * 28 + "".join(f"{direction:>14}" for direction in directions),
        ]
        for label, key in _ROWS:
            lines.append(f"{label:28}" + "".join(f"{format_bytes(getattr(part, key)):>14}" for part in parts))
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
    rates: DeviceRates | None = None,
    idle_limit_bytes: int | None = None,
    directions: Sequence[Direction] = _DIRECTIONS,
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
        rates: of the device, for predicted times; assumptions by default.
        idle_limit_bytes: most bytes of contexts on the device between chunks; for several videos in one session.
        directions: what to plan; both share the length of a chunk.

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
    reserved_bytes = parse_bytes(reserved) if reserved else 0
    limit_bytes = None if allowed is None else allowed - reserved_bytes
    planner = _Planner(vae, compute, limit_bytes, idle_limit_bytes, rates or DeviceRates())
    padded = vae.geometry.padded_size(height, width)
    chosen: tuple[ChunkSchedule, dict[Direction, DirectionPlan]] | None = None
    for schedule, tried in _attempts(vae, chunk_frames, policies):
        parts = {d: planner.plan(d, *padded, schedule, tried[d]) for d in directions}
        chosen = schedule, parts
        if all(planner.fits(part) for part in parts.values()):
            break
    assert chosen is not None
    schedule, parts = chosen
    for direction, part in parts.items():
        if not planner.fits(part):
            parts[direction] = planner.with_suggestions(direction, *padded, schedule, part)
    return Plan(
        model=model_name(vae),
        height=padded[0],
        width=padded[1],
        dtype=_dtype_name(compute),
        schedule=schedule,
        allowed_bytes=allowed,
        reserved_bytes=reserved_bytes,
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


class _Planner:
    """Plans of one model in one dtype under one limit."""

    def __init__(
        self,
        model: CausalVAE,
        dtype: torch.dtype,
        limit_bytes: int | None,
        idle_limit_bytes: int | None,
        rates: DeviceRates,
    ) -> None:
        self._model = model
        self._limit_bytes = limit_bytes
        self._idle_limit_bytes = idle_limit_bytes
        self._rates = rates
        self._dtype = dtype
        self._timelines: dict[tuple[object, ...], Timeline] = {}
        self._skeletons: dict[torch.dtype, CausalVAE] = {}

    def fits(self, part: DirectionPlan) -> bool:
        return self._limit_bytes is None or part.projected_bytes <= self._limit_bytes

    def plan(
        self, direction: Direction, height: int, width: int, schedule: ChunkSchedule, policy: OffloadPolicy
    ) -> DirectionPlan:
        timeline = self._timeline(direction, height, width, self._dtype, schedule)
        weights_bytes = self._weights_bytes(self._dtype)

        def fits(placement: Placement) -> bool:
            peak, idle = timeline.peak(placement).total_bytes, timeline.idle_need(placement).total_bytes
            if self._idle_limit_bytes is not None and idle > self._idle_limit_bytes:
                return False
            return self._limit_bytes is None or weights_bytes + peak <= self._limit_bytes

        return DirectionPlan(
            timeline=timeline,
            frame_size=(height, width),
            placement=choose_placement(timeline, policy, fits, self._rates),
            offload=str(policy),
            rates=self._rates,
            weights_bytes=weights_bytes,
            chunk_frames=schedule.chunk_frames,
        )

    def with_suggestions(
        self, direction: Direction, height: int, width: int, schedule: ChunkSchedule, part: DirectionPlan
    ) -> DirectionPlan:
        """The same plan with the nearest settings that would fit, each tried by a dry run of its own."""
        assert self._limit_bytes is not None
        found = []
        if part.minimum_bytes < part.projected_bytes:
            if part.minimum_bytes <= self._limit_bytes:
                found.append("offload auto or all")
            else:
                found.append(f"a budget of {_budget_text(part.minimum_bytes)} and offload auto")
        found.append(f"a budget of {_budget_text(part.projected_bytes)}" + (" as it is" if found else ""))
        if self._dtype == torch.float32 and self._minimum(direction, height, width, torch.bfloat16, schedule) <= (
            self._limit_bytes
        ):
            found.append("dtype bfloat16")
        smaller = self._smaller_size(direction, height, width, schedule, part)
        if smaller is not None:
            found.append(f"frames of {smaller[1]}x{smaller[0]}")
        values = {name: getattr(part, name) for name in part.__dataclass_fields__}
        return DirectionPlan(**{**values, "suggestions": tuple(found)})

    def _smaller_size(
        self, direction: Direction, height: int, width: int, schedule: ChunkSchedule, part: DirectionPlan
    ) -> tuple[int, int] | None:
        """The largest frame of about the same shape whose smallest plan fits. Bytes grow with the area."""
        assert self._limit_bytes is not None
        p = self._model.geometry.pixels_per_latent
        free, needed = self._limit_bytes - part.weights_bytes, part.minimum_bytes - part.weights_bytes
        if free <= 0:
            return None
        scale = min(1.0, math.sqrt(free / needed))
        while scale > 0:
            smaller = int(height * scale) // p * p, int(width * scale) // p * p
            if 0 in smaller:
                return None
            if smaller != (height, width) and (
                self._minimum(direction, *smaller, self._dtype, schedule) <= self._limit_bytes
            ):
                return smaller
            scale -= 0.02
        return None

    def _minimum(
        self, direction: Direction, height: int, width: int, dtype: torch.dtype, schedule: ChunkSchedule
    ) -> int:
        timeline = self._timeline(direction, height, width, dtype, schedule)
        return self._weights_bytes(dtype) + timeline.peak(timeline.least).total_bytes

    def _weights_bytes(self, dtype: torch.dtype) -> int:
        return tensor_bytes(cast("nn.Module", self._skeleton(dtype)))

    def _skeleton(self, dtype: torch.dtype) -> CausalVAE:
        if dtype not in self._skeletons:
            model = cast("nn.Module", self._model)
            skeleton = placed(model, _META, dtype)
            if skeleton is not model:
                _forget_hooks(skeleton)
            self._skeletons[dtype] = cast("CausalVAE", skeleton)
        return self._skeletons[dtype]

    def _timeline(
        self, direction: Direction, height: int, width: int, dtype: torch.dtype, schedule: ChunkSchedule
    ) -> Timeline:
        key = (direction, height, width, dtype, schedule)
        if key not in self._timelines:
            self._timelines[key] = _dry_run(self._skeleton(dtype), direction, height, width, dtype, schedule)
        return self._timelines[key]


def _forget_hooks(module: nn.Module) -> None:
    """Whoever hooked into the model wants to hear of real chunks, not of a dry run on a copy."""
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()


def _dry_run(
    model: CausalVAE, direction: Direction, height: int, width: int, dtype: torch.dtype, schedule: ChunkSchedule
) -> Timeline:
    """Run the first chunk and a middle one on meta tensors, and note bytes and, of the middle one, FLOPs."""
    p = model.geometry.pixels_per_latent

    def host(chunk: Chunk) -> Tensor:
        if direction == "encode":
            return torch.empty((chunk.padded_frames, height, width, 3), dtype=torch.uint8, device=_META)
        shape = (chunk.num_latents, model.geometry.latent_channels, height // p, width // p)
        return torch.empty(shape, dtype=torch.float32, device=_META)

    run = encode_chunk if direction == "encode" else decode_chunk
    probe = _Probe()
    with ConvCache(model.encoder if direction == "encode" else model.decoder, residency=probe) as cache:
        first_host, middle_host = (
            host(schedule.full(0)),
            host(schedule.full(1)),
        )  # not the device's: outside the tracker
        with probe.tracker:
            run(model, cache, first_host, device=_META, dtype=dtype)
        first_lead, first, _ = probe.take()
        # The tracker is the inner mode: it sees the same operations as without the counter.
        with probe.flop_counter, probe.tracker:
            run(model, cache, middle_host, device=_META, dtype=dtype)
        steady_lead, steady, flops = probe.take()
        context_bytes = probe.layer_bytes()
    return Timeline(
        steps=tuple(
            Step(
                layer=layer,
                context_bytes=context_bytes[layer],
                first_open_bytes=first[layer][0],
                first_kept_bytes=first[layer][1],
                steady_bytes=max(steady[layer]),
                flops=flops[layer],
            )
            for layer in context_bytes
        ),
        first_lead_bytes=first_lead,
        steady_lead_bytes=steady_lead,
        lead_flops=flops[""],
    )


class _Probe(Residency):
    """Keeps everything on the device, and notes the peak between the moments at which contexts could move."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = AllocationTracker()
        self.flop_counter = FlopCounterMode(display=False)
        self._bytes: dict[str, list[int]] = {"": []}
        self._flops: dict[str, int] = {}
        self._flops_before = 0
        self._step = ""

    def open(self, path: str) -> Tensor | None:
        self._cut()
        self._step = path
        self._bytes[path] = []
        return super().open(path)

    def keep(self, path: str, tail: Tensor) -> None:
        self._cut()
        super().keep(path, tail)

    def _cut(self) -> None:
        self._bytes[self._step].append(self.tracker.peak_bytes - self.device_bytes)
        self.tracker.reset_peak()
        done = self.flop_counter.get_total_flops() - self._flops_before - sum(self._flops.values())
        self._flops[self._step] = self._flops.get(self._step, 0) + done

    def take(self) -> tuple[int, dict[str, list[int]], dict[str, int]]:
        """Of the chunk that just ran: the lead's peak, each step's before and after it keeps, and FLOPs of all."""
        self._cut()
        lead, steps, flops = self._bytes.pop(""), self._bytes, self._flops
        self._bytes, self._flops, self._step = {"": []}, {}, ""
        self._flops_before = self.flop_counter.get_total_flops()
        self.tracker.reset_peak()
        return max(lead), steps, flops


def _budget_text(num_bytes: int) -> str:
    """A size that, read back, is at least this many bytes."""
    return f"{math.ceil(num_bytes / 2**20)}MiB"


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

"""Planner: the best plan that fits a budget, known before a run starts.

A dry run of the first and of a middle chunk (:mod:`longvid.planning.dry_run`) gives a
:class:`~longvid.planning.cost_model.Timeline`, from which the peak of every placement of the contexts follows to the
byte: without a device, without weights, in about a second. The real run executes the same code, so on a CPU its tracked
peak is the same. Workspaces of kernels and the rounding of an allocator are not tensors and are not in these numbers;
the budget sets ``reserved_bytes`` aside for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import nn

from longvid.errors import ModelError, ScheduleError
from longvid.events import Direction
from longvid.memory.budget import MemoryBudget
from longvid.memory.offload import OffloadPolicy, Placement
from longvid.models.base import CausalVAE, model_name
from longvid.models.cache import CausalLayer
from longvid.models.device import tensor_bytes
from longvid.models.loading import load_architecture
from longvid.models.numerics import Numerics
from longvid.planning.cost_model import DeviceRates, Timeline, choose_placement
from longvid.planning.dry_run import dry_run, skeleton_of
from longvid.planning.plan import DirectionPlan, Plan, Slicing
from longvid.schedule import ChunkSchedule
from longvid.units import parse_bytes, parse_reserve

__all__ = ["Offload", "make_plan", "parse_dtype"]

Offload: TypeAlias = str | int | OffloadPolicy
_DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")


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
    keep_buffers: bool = False,
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
        keep_buffers: keep the layers' memory from chunk to chunk if that fits without offloading, for devices on
            which fresh memory is slow; and what they make of their weights if that fits as well.

    Raises:
        ModelError: the model, the dtype or the policy cannot be used.
        ScheduleError: the frame size is not positive, or ``chunk_frames`` is not for this model.
    """
    if height < 1 or width < 1:
        raise ScheduleError(f"a frame of {width}x{height} pixels has no area")
    policies = offload if isinstance(offload, Mapping) else dict.fromkeys(_DIRECTIONS, OffloadPolicy.parse(offload))
    vae = load_architecture(model)
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
        keep_buffers,
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

    buffers: bool = False
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
        keep_buffers: bool,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._budget = budget
        self._held_bytes = held_bytes
        self._idle_limit_bytes = idle_limit_bytes
        self._rates = rates
        self._numerics = numerics
        self._slice_frames = slice_frames
        self._keep_buffers = keep_buffers
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
        if self._keep_buffers and staying.kind == "none":
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
            keeps_buffers=kept.buffers,
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
                keep_buffers=kept.buffers,
                keep_kernels=kept.kernels,
                like=next((known for (other, *_), known in self._timelines.items() if other == chunks), None),
            )
        return self._timelines[key]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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

"""Planner: the best plan that fits a budget, known before a run starts.

A dry run of the first and of a middle chunk (:mod:`longvid.planning.dry_run`) gives a
:class:`~longvid.planning.cost_model.CostModel`, from which the peak of every placement of the contexts follows to the
byte: without a device, without weights, in seconds. The real run executes the same code, so on a CPU its tracked
peak is the same. Scratch memory of kernels and the rounding of an allocator are not tensors and are not in these
numbers; the budget sets ``reserved_bytes`` aside for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import nn

from longvid.errors import ModelError, ScheduleError
from longvid.events import Direction
from longvid.memory.budget import MemoryBudget
from longvid.memory.offload import OffloadPolicy, Placement
from longvid.models.base import CausalVAE, model_name
from longvid.models.context import Limits, Pieces
from longvid.models.loading import load_architecture
from longvid.models.numerics import Numerics, parse_layout, parse_paired_frames
from longvid.planning.cost_model import choose_placement
from longvid.planning.dry_run import DryRuns
from longvid.planning.kernel_choice import choose_numerics, preferred_band_bytes
from longvid.planning.options import ComputeOptions, default_dtype, parse_dtype, planned_device
from longvid.planning.plan import DirectionPlan, Plan
from longvid.planning.workload import Execution, Workload
from longvid.schedule import ChunkSchedule
from longvid.units import parse_bytes, parse_reserve

__all__ = ["SMALL_TILE_BYTES", "Offload", "Planner", "make_plan"]

Offload: TypeAlias = str | int | OffloadPolicy
SMALL_TILE_BYTES = 12 * 2**20
"limit for the window of a row tile that is there to save memory, and not time"
_BOTH: tuple[Direction, ...] = ("encode", "decode")


def make_plan(
    model: CausalVAE | str,
    *,
    height: int,
    width: int,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    offload: Offload = "auto",
    reserved: str | int | None = None,
    chunk_frames: int | None = None,
    slice_frames: int | None = None,
    layout: str = "auto",
    paired_frames: str | bool = "auto",
    keep_buffers: bool = True,
) -> Plan:
    """Plan encoding and decoding of ``height`` x ``width`` frames as :class:`~longvid.VideoSession` would run them.

    It needs no weights and takes from a second to half a minute on a CPU. The device need not exist here.

    Args:
        model: a model, or what :func:`longvid.load_model` takes. Of a folder or a hub id only the config is read, of a
            file of weights only names and shapes.
        height: frame height in pixels; sizes that are not whole latents are padded up.
        width: frame width in pixels.
        device: to plan for. Where it does not exist here, the usual layout of such devices is assumed.
        dtype: compute dtype, a name or a torch dtype. None is float32 on a CPU and bfloat16 on an accelerator for a
            model that is given by name, and the dtype of the weights for a model that is given as an object.
        memory: the budget; like all that follow but the last, as for :class:`~longvid.VideoSession`.
        offload: which contexts leave the device between chunks.
        reserved: part of the budget for what a dry run cannot see.
        chunk_frames: frames of a chunk after the first. If None, the model is chunk-invariant and its own length does
            not fit, it is the longest of a half, a quarter, ... that does; only if none fits does ``"auto"`` offload.
        slice_frames: frames of a slice; None for the longest slices that fit the budget, whole chunks first.
        layout: memory layout of activations.
        paired_frames: whether convolutions compute two frames at a time.
        keep_buffers: whether buffers may be kept from chunk to chunk; False plans push mode, which keeps none.

    Raises:
        ModelError: the model, the dtype or the device cannot be used.
        OptionError: a size or the policy cannot be read.
        ScheduleError: the frame size is not positive, or ``chunk_frames`` is not for this model.
    """
    where, is_here = planned_device(device)
    options = ComputeOptions(
        dtype=parse_dtype(dtype) or default_dtype(model, where),
        layout=parse_layout(layout),
        paired_frames=parse_paired_frames(paired_frames),
        chunk_frames=chunk_frames,
        slice_frames=slice_frames,
        offload=OffloadPolicy.parse(offload),
        allowed_bytes=None if memory is None else parse_bytes(memory),
        reserved_bytes=None if reserved is None else parse_reserve(reserved),
        keep_buffers=keep_buffers,
    )
    return Planner(load_architecture(model), where, is_here=is_here).plan((height, width), options)


class Planner:
    """Plans of one model on one device, for calls of :func:`make_plan`, sessions and sweeps alike.

    Kernels are measured if the device ``is_here``. ModelError is raised for a model that is not a torch module.
    """

    def __init__(self, model: CausalVAE, device: torch.device, *, is_here: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"{type(model).__name__} is not a torch module, so its memory cannot be planned")
        self._model, self._device, self._is_here = model, device, is_here
        self._weights_dtype = next((weight.dtype for weight in model.parameters()), torch.float32)
        self.tile_bytes = preferred_band_bytes(device)
        self._runs = DryRuns.of(model)
        self._numerics: dict[tuple[object, ...], Numerics] = {}
        self._plans: dict[tuple[object, ...], Plan] = {}

    def plan(
        self,
        size: tuple[int, int],
        options: ComputeOptions,
        directions: Sequence[Direction] = _BOTH,
        *,
        held_bytes: int = 0,
        idle_limit_bytes: int | None = None,
    ) -> Plan:
        """The plan for frames of ``size`` (height, width), padded to whole latents; the same call gives the same plan.

        All ``directions`` share the length of a chunk. For the last two see :class:`MemoryBudget`.

        Raises:
            ScheduleError: the frame size is not positive, or the chunk length is not for this model.
        """
        if min(size) < 1:
            raise ScheduleError(f"a frame of {size[1]}x{size[0]} pixels has no area")
        padded = self._model.geometry.padded_size(*size)
        budget = MemoryBudget(
            allowed_bytes=options.allowed_bytes,
            reserved_bytes=options.reserved_on(self._device),
            held_bytes=held_bytes,
            idle_limit_bytes=idle_limit_bytes,
        )
        key = (padded, options, tuple(directions), budget)
        if key not in self._plans:
            self._plans[key] = self._make(padded, options, directions, budget)
        return self._plans[key]

    def _make(
        self, size: tuple[int, int], options: ComputeOptions, directions: Sequence[Direction], budget: MemoryBudget
    ) -> Plan:
        # The allocator of an accelerator keeps memory between chunks by itself.
        may_keep = options.keep_buffers and self._device.type == "cpu"
        dtype = options.dtype or self._weights_dtype
        workloads = {
            d: Workload(direction=d, height=size[0], width=size[1], dtype=dtype, schedule=self._model.geometry.schedule)
            for d in directions
        }
        searches = {
            d: _Search(self._runs, budget, options, self._numerics_for(workload, options), self.tile_bytes, may_keep)
            for d, workload in workloads.items()
        }
        parts: dict[Direction, DirectionPlan] = {}
        for schedule, policies in self._attempts(options, directions):
            for d, search in searches.items():
                parts[d] = search.plan(replace(workloads[d], schedule=schedule), policies[d])
            if all(searches[d].fits(part, part.placement) for d, part in parts.items()):
                break
        else:
            parts = {d: searches[d].with_suggestions(part) for d, part in parts.items()}
        return Plan(
            model=model_name(self._model),
            height=size[0],
            width=size[1],
            dtype=str(dtype).removeprefix("torch."),
            device=str(self._device),
            schedule=schedule,
            budget=budget,
            parts=parts,
        )

    def _attempts(
        self, options: ComputeOptions, directions: Sequence[Direction]
    ) -> Iterator[tuple[ChunkSchedule, Mapping[Direction, OffloadPolicy]]]:
        """What to try, best first; at least one. A shorter chunk costs less than a transfer where the cut is free."""
        lengths = [
            replace(schedule, first_frames=options.first_frames)
            for schedule in _schedules(self._model, options.chunk_frames)
        ]
        policies = {d: options.policy(d) for d in directions}
        if len(lengths) > 1 and any(policy.kind == "auto" for policy in policies.values()):
            staying = {d: OffloadPolicy("none") if p.kind == "auto" else p for d, p in policies.items()}
            yield from ((schedule, staying) for schedule in lengths)
        yield from ((schedule, policies) for schedule in lengths)

    def _numerics_for(self, workload: Workload, options: ComputeOptions) -> Numerics:
        """The numerics for frames of this size; chosen once, so that all videos of a session are computed alike."""
        if options.numerics is not None:
            return options.numerics
        layout, paired_frames = options.layout, options.paired_frames
        if not self._is_here:  # nothing can be measured
            layout, paired_frames = layout or "channels_last", bool(paired_frames)
        key = (workload, layout, paired_frames)
        if key not in self._numerics:
            self._numerics[key] = choose_numerics(
                self._runs, workload, device=self._device, layout=layout, paired_frames=paired_frames
            )
        return self._numerics[key]


def _schedules(model: CausalVAE, chunk_frames: int | None) -> Iterator[ChunkSchedule]:
    """Chunk plans that the model may run, the longest first; shorter ones only where the cut is free."""
    geometry = model.geometry
    yield geometry.schedule_for(chunk_frames)
    length = geometry.chunk_frames
    while geometry.chunk_invariant and chunk_frames is None and length % (2 * geometry.frames_per_latent) == 0:
        length //= 2
        yield geometry.schedule_for(length)


@dataclass(frozen=True, slots=True)
class _Search:
    """Looks for the fastest execution of one direction that fits the budget."""

    runs: DryRuns
    budget: MemoryBudget
    options: ComputeOptions
    numerics: Numerics
    tile_bytes: int | None
    "most bytes of a layer's window, beyond which it runs in row tiles; None for whole frames"
    may_keep: bool
    "whether buffers may be kept from chunk to chunk"

    def fits(self, part: DirectionPlan, placement: Placement) -> bool:
        """Whether the direction would be within all limits with this placement."""
        limit = self.budget.idle_limit_bytes
        if limit is not None and part.cost_model.idle_need(placement).total_bytes > limit:
            return False
        return self.budget.fits(part.weights_bytes + part.cost_model.peak(placement).total_bytes)

    def plan(self, workload: Workload, policy: OffloadPolicy) -> DirectionPlan:
        """The direction with the slices and the placement that the policy and the limits give it.

        Memory that is kept saves time, shorter slices cost next to nothing, transfers may cost a lot: contexts leave
        only if the shortest slices are not enough.
        """
        tried = self._slicings(workload)
        staying = OffloadPolicy("none") if policy.kind == "auto" else policy
        shortest, offloading = tried[-1], self._offloading(workload, tried)
        least = self.runs.cost_model(workload, offloading[-1])
        # Contexts that stay are on the device anyway; those that leave come for one block at a time.
        tried += self._in_pieces(workload, shortest, "stages" if staying.kind == "none" else "resnets")
        if self.may_keep and staying.kind == "none":
            kept = replace(tried[0], keeps_buffers=True)
            tried[:0] = [replace(kept, keeps_kernels=True), kept]
        for execution in tried:
            part = DirectionPlan(
                workload=workload,
                execution=execution,
                cost_model=self.runs.cost_model(workload, execution),
                placement=Placement(),
                offload=str(policy),
                rates=self.options.rates(workload.direction),
                weights_bytes=self.runs.weights_bytes(workload.dtype),
                least_model=least,
            )
            part = self._placed(part, staying)
            if self.fits(part, part.placement):
                return part
        if policy == staying:
            return part
        for execution in offloading:
            cost_model = self.runs.cost_model(workload, execution)
            part = self._placed(replace(part, execution=execution, cost_model=cost_model), policy)
            if self.fits(part, part.placement):
                return part
        return part

    def _offloading(self, workload: Workload, slicings: list[Execution]) -> list[Execution]:
        """What to try when contexts leave: the shortest slices, then residual blocks that run piece by piece."""
        return [slicings[-1], *self._in_pieces(workload, slicings[-1], "resnets")]

    def _in_pieces(self, workload: Workload, execution: Execution, pieces: Pieces) -> list[Execution]:
        """The same piece by piece, and then in small row tiles as well, as far as the model and the layout can."""
        if not getattr(self.runs.model, "runs_in_pieces", False):
            return []
        limits = replace(execution.limits, pieces=pieces)
        found = [replace(execution, limits=limits)]
        if self.numerics.layout == "channels_last":
            small = min(SMALL_TILE_BYTES // workload.dtype.itemsize, limits.tile_elements or limits.conv_elements)
            found.append(replace(execution, limits=replace(limits, tile_elements=small)))
        return found

    def _placed(self, part: DirectionPlan, policy: OffloadPolicy) -> DirectionPlan:
        chosen = choose_placement(part.cost_model, policy, partial(self.fits, part), part.rates)
        return replace(part, placement=chosen)

    def _slicings(self, workload: Workload) -> list[Execution]:
        """Slicings to try, the longest first. The unit is a frame of the layer whose frames are the largest."""
        tile_elements = None if self.tile_bytes is None else self.tile_bytes // workload.dtype.itemsize
        # A layout that has no row tiles has slices of that size instead.
        last = self.numerics.layout == "channels_last"
        most = 2**31 - 1 if last or tile_elements is None else tile_elements
        limits = Limits(slice_elements=most, tile_elements=tile_elements if last else None)
        whole = Execution(numerics=self.numerics, limits=limits)
        frame = self.runs.largest_frame(workload, whole)
        if not frame:
            return [whole]

        def slices(frames: int) -> Execution:
            return replace(whole, limits=replace(limits, slice_elements=frames * frame), slice_frames=frames)

        asked = self.options.slices(workload.direction)
        if asked is not None:
            return [slices(asked)]
        tiling = self.options.tiling
        earlier = [] if tiling is None or (tiling["tile_elements"] and not last) else [whole.tiled(tiling)]
        shortest = 2 if self.numerics.paired_frames else 1
        longest = max(shortest, most // frame)
        found = [whole if longest >= workload.schedule.chunk_frames else replace(whole, slice_frames=longest)]
        frames = min(longest, workload.schedule.chunk_frames) // 2
        while frames >= shortest:
            found.append(slices(frames))
            frames //= 2
        return earlier + found

    def with_suggestions(self, part: DirectionPlan) -> DirectionPlan:
        """The same plan with the nearest settings that would fit, each tried by a dry run; unchanged if it fits."""
        if self.fits(part, part.placement):
            return part
        found, workload = [], part.workload
        if part.minimum_bytes < part.projected_bytes:
            if self.fits(part, part.cost_model.least):
                found.append("offload auto or all")
            else:
                found.append(f"a budget of {self._budget_text(part.minimum_bytes)} and offload auto")
        found.append(f"a budget of {self._budget_text(part.projected_bytes)}" + (" as it is" if found else ""))
        for shorter in _schedules(self.runs.model, None):
            if shorter.chunk_frames < part.chunk_frames and self._minimum_fits(replace(workload, schedule=shorter)):
                found.append(f"chunks of {shorter.chunk_frames} frames")
                break
        if workload.dtype == torch.float32 and self._minimum_fits(replace(workload, dtype=torch.bfloat16)):
            found.append("dtype bfloat16")
        smaller = self._smaller_size(part)
        if smaller is not None:
            found.append(f"frames of {smaller[1]}x{smaller[0]}")
        return replace(part, suggestions=tuple(found))

    def _budget_text(self, peak_bytes: int) -> str:
        """A budget that, read back, holds this peak."""
        needed = peak_bytes + self.budget.held_bytes + self.budget.reserved_bytes
        return f"{math.ceil(needed / 2**20)}MiB"

    def _smaller_size(self, part: DirectionPlan) -> tuple[int, int] | None:
        """The largest frame of about the same shape whose smallest plan fits. Bytes grow with the area."""
        workload, p = part.workload, self.runs.model.geometry.pixels_per_latent
        free = self.budget.left(part.weights_bytes)
        if free is None or free <= 0:
            return None
        scale = min(1.0, math.sqrt(free / (part.minimum_bytes - part.weights_bytes)))
        while scale > 0:
            height, width = int(workload.height * scale) // p * p, int(workload.width * scale) // p * p
            if not height or not width:
                return None
            smaller = replace(workload, height=height, width=width)
            if smaller != workload and self._minimum_fits(smaller):
                return height, width
            scale = min(scale - 0.02, scale * math.sqrt(free / self._minimum_bytes(smaller)))
        return None

    def _minimum_fits(self, workload: Workload) -> bool:
        return self.budget.fits(self.runs.weights_bytes(workload.dtype) + self._minimum_bytes(workload))

    def _minimum_bytes(self, workload: Workload) -> int:
        """Bytes beside the weights, with the shortest slices and every context on the host as far as that helps."""
        cost_model = self.runs.cost_model(workload, self._offloading(workload, self._slicings(workload))[-1])
        return cost_model.peak(cost_model.least).total_bytes

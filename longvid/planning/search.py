"""Search: slices, row tiles, kept buffers and the placement of contexts for one direction under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from longvid.memory.budget import MemoryBudget
from longvid.memory.offload import OffloadPolicy, Placement
from longvid.models.base import CausalVAE
from longvid.models.context import Limits
from longvid.models.numerics import Numerics
from longvid.planning.cost_model import choose_placement
from longvid.planning.dry_run import DryRuns
from longvid.planning.options import ComputeOptions
from longvid.planning.plan import DirectionPlan
from longvid.planning.workload import Execution, Workload
from longvid.schedule import ChunkSchedule

__all__ = ["PlanSearch", "schedules"]


def schedules(model: CausalVAE, chunk_frames: int | None) -> Iterator[ChunkSchedule]:
    """Chunk plans that the model may run, the longest first; shorter ones only where the cut is free."""
    geometry = model.geometry
    yield geometry.schedule_for(chunk_frames)
    length = geometry.chunk_frames
    while geometry.chunk_invariant and chunk_frames is None and length % (2 * geometry.frames_per_latent) == 0:
        length //= 2
        yield geometry.schedule_for(length)


@dataclass(frozen=True, slots=True)
class PlanSearch:
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
        least = self.runs.cost_model(workload, tried[-1])
        staying = OffloadPolicy("none") if policy.kind == "auto" else policy
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
        return self._placed(part, policy)

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
        shortest = 2 if self.numerics.paired_frames else 1
        longest = max(shortest, most // frame)
        found = [whole if longest >= workload.schedule.chunk_frames else replace(whole, slice_frames=longest)]
        frames = min(longest, workload.schedule.chunk_frames) // 2
        while frames >= shortest:
            found.append(slices(frames))
            frames //= 2
        return found

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
        for shorter in schedules(self.runs.model, None):
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
            scale -= 0.02
        return None

    def _minimum_fits(self, workload: Workload) -> bool:
        cost_model = self.runs.cost_model(workload, self._slicings(workload)[-1])
        return self.budget.fits(self.runs.weights_bytes(workload.dtype) + cost_model.peak(cost_model.least).total_bytes)

"""Workload and execution: what one direction of a run computes, chunk after chunk, and how its layers compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import torch
from torch import nn

from longvid.events import Direction
from longvid.memory.buffer_pool import BufferPool
from longvid.memory.offloader import Offloader
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext, Limits, Pieces
from longvid.models.numerics import Numerics
from longvid.schedule import ChunkSchedule

__all__ = ["Execution", "Tiling", "Workload"]

Tiling: TypeAlias = Mapping[str, int | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One direction of a model at one frame size, dtype and chunk plan."""

    direction: Direction
    height: int
    "height of a frame in pixels, after padding to whole latents"
    width: int
    dtype: torch.dtype
    schedule: ChunkSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How the layers compute a workload."""

    numerics: Numerics = field(default_factory=Numerics)
    limits: Limits = field(default_factory=Limits)
    "slices and row tiles; on some processors another size changes the last bits of a result, on most it changes none"
    slice_frames: int | None = None
    "frames of a slice in the layer with the largest frames, more in the others; None for whole chunks"
    keeps_buffers: bool = False
    "whether the buffers of the layers are kept from chunk to chunk"
    keeps_kernels: bool = False
    "whether weights that layers have prepared for their kernels are kept as well"

    def context(self, module: nn.Module, offloader: Offloader) -> ForwardContext:
        """The context in which ``module`` computes one video: the same in a dry run and in the real one."""
        return ForwardContext(
            ConvCache(module, offloader=offloader),
            BufferPool(keep=self.keeps_buffers),
            self.numerics,
            self.limits,
            self.keeps_kernels,
        )

    @property
    def tiling(self) -> Tiling:
        """The slices, row tiles and pieces, as a store records them."""
        limits = self.limits
        return {
            "slice_frames": self.slice_frames,
            "slice_elements": limits.slice_elements,
            "tile_elements": limits.tile_elements,
            **({} if limits.pieces is None else {"pieces": limits.pieces}),
        }

    def tiled(self, tiling: Tiling) -> Execution:
        """The same with the slices, row tiles and pieces of a record."""
        numbers = {name: cast("int | None", value) for name, value in tiling.items() if name != "pieces"}
        limits = replace(
            self.limits,
            slice_elements=numbers["slice_elements"] or self.limits.slice_elements,
            tile_elements=numbers["tile_elements"],
            pieces=cast("Pieces | None", tiling.get("pieces")),
        )
        return replace(self, limits=limits, slice_frames=numbers["slice_frames"])

    @property
    def slices(self) -> str:
        """Slices and row tiles in words."""
        frames = self.slice_frames
        if self.limits.pieces is not None:
            return f"{self.limits.pieces}, {frames} frame" + ("s" if frames != 1 else "")
        if self.limits.tile_elements is None:
            return "whole chunks" if frames is None else f"slices of {frames}"
        return "row tiles" if frames is None else f"{frames}-frame tiles"

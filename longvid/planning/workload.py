"""Workload and execution: what one direction of a run computes, chunk after chunk, and how its layers compute it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from longvid.events import Direction
from longvid.memory.buffer_pool import BufferPool
from longvid.memory.offloader import Offloader
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext, Limits
from longvid.models.numerics import Numerics
from longvid.schedule import ChunkSchedule

__all__ = ["Execution", "Slicing", "Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One direction of a model at one frame size, dtype and chunk plan."""

    direction: Direction
    height: int
    "height of a frame in pixels, after padding to whole latents"
    width: int
    dtype: torch.dtype
    schedule: ChunkSchedule


@dataclass(frozen=True, slots=True)
class Slicing:
    """How large the slices of frames and the row tiles are in which layers run.

    On some processors another size changes the last bits of a result; on most it changes none.
    """

    elements: int = 2**31 - 1
    "most elements of a slice's new input frames and of its output; at least one frame"
    frames: int | None = None
    "frames of a slice in the layer with the largest frames, more in the others; None for whole chunks"
    band_elements: int | None = None
    "most elements of a window, beyond which layers run in row tiles; None for whole frames"

    def __str__(self) -> str:
        if self.band_elements is None:
            return "whole chunks" if self.frames is None else f"slices of {self.frames}"
        return "row tiles" if self.frames is None else f"{self.frames}-frame tiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How the layers compute a workload."""

    numerics: Numerics = field(default_factory=Numerics)
    slicing: Slicing = field(default_factory=Slicing)
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
            Limits(slice_elements=self.slicing.elements, tile_elements=self.slicing.band_elements),
            self.keeps_kernels,
        )

"""Workload: what one direction of a run computes, chunk after chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longvid.events import Direction
from longvid.schedule import ChunkSchedule

__all__ = ["Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One direction of a model at one frame size, dtype and chunk plan."""

    direction: Direction
    height: int
    "of a frame in pixels, after padding to whole latents"
    width: int
    dtype: torch.dtype
    schedule: ChunkSchedule

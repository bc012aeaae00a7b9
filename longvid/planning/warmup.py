"""Warm-up: how many chunks a cold start takes until every context is that of the whole video.

A causal model forgets. The context of a layer is the end of its input in the chunk before, so a run that starts in the
middle of a video, with any contexts, gets one layer right after the other: the first one after one chunk, since its
input are pixels, the next one a chunk later, and so on. From then on it computes, bit for bit, what a run from frame 0
computes there. The number of chunks depends on the architecture and on the length of a chunk, and on nothing else.

It is found by running the model on a video of the smallest frames whose past is NaN, which no layer can lose by
chance: as long as a context or an output depends on the past, it is not a number.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.events import Direction
from longvid.models.base import CausalVAE, model_name
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext
from longvid.models.numerics import Numerics
from longvid.schedule import ChunkSchedule

__all__ = ["Warmup", "warmup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmup:
    """What one direction of a model takes to forget what it was started with."""

    direction: Direction
    chunks: int
    "chunks that run before a cold start is exact: the output of the next one is right"
    ready: dict[str, int]
    "chunks after which the context of a layer is right, by the layer's path, in the order in which the layers run"
    begins: dict[str, int]
    "chunks after which a part of that context is right; there is no need to run the layer before"

    def last_layer(self, chunk: int) -> str | None:
        """The last layer whose input counts in this chunk of a cold start, counted from 0; None for the whole model."""
        if chunk >= self.chunks:
            return None
        return [path for path, first in self.begins.items() if first <= chunk + 1][-1]


def warmup(model: CausalVAE, direction: Direction, *, chunk_frames: int | None = None) -> Warmup:
    """Find how many chunks of warm-up make a start in the middle of a video exact.

    It runs the model on its smallest frames, some seconds for the largest models on a CPU. The model is not changed.

    Args:
        model: with weights.
        direction: ``"encode"`` or ``"decode"``.
        chunk_frames: frames of a chunk; None for the model's own.

    Raises:
        ModelError: the past of the model never ends, so that only a run from frame 0 is right: it attends to all
            earlier frames, or keeps running statistics.
        ScheduleError: ``chunk_frames`` is not for this model.
    """
    probe = _Probe(model, direction, model.geometry.schedule_for(chunk_frames))
    frames = [int(getattr(layer, "context_frames", 0)) for layer in probe.module.modules()]
    most = sum(frames) + 1  # in every chunk at least one frame of one context becomes right
    ready: dict[str, int] = {}
    begins: dict[str, int] = {}
    with torch.inference_mode(), probe.context() as context:
        for _ in range(1 + max(frames, default=0)):  # the past, longer than any context
            probe.run(context, float("nan"))
        for count in range(most + 1):
            output = probe.run(context, 0.5)
            for path, values in context.cache.contexts():
                right_T = ~torch.isnan(values).transpose(1, 2).flatten(2).any(dim=2)
                if right_T.any():
                    begins.setdefault(path, count + 1)
                if right_T.all():
                    ready.setdefault(path, count + 1)
            if not torch.isnan(output).any():
                return Warmup(direction=direction, chunks=count, ready=ready, begins=begins)
    raise ModelError(
        f"the {direction}r of {model_name(model)} never forgets its first frames: after {most} chunks its output "
        "still depends on them, as with attention over all earlier frames or running statistics. Such a model runs "
        "from frame 0 only: it cannot be split into parts, and whatever is continued or decoded from the middle is "
        "computed from there"
    )


class _Probe:
    """A copy of the model that shares its weights, and the smallest chunks of a video, one after another."""

    def __init__(self, model: CausalVAE, direction: Direction, schedule: ChunkSchedule) -> None:
        module = cast("nn.Module", model)
        weights = {id(weight): weight for weight in module.parameters()}
        self._model = cast("CausalVAE", copy.deepcopy(module, cast("dict[int, Any]", weights)))
        self._direction, self._schedule = direction, schedule
        weight = next(module.parameters())
        self._kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.module = self._model.encoder if direction == "encode" else self._model.decoder

    def context(self) -> ForwardContext:
        """The context of the copy. CPUs without bfloat16 kernels are slow beyond use, so products are in float32."""
        return ForwardContext(ConvCache(self.module), numerics=Numerics(float32_products=True))

    def run(self, context: ForwardContext, value: float) -> Tensor:
        """The output of the next chunk, whose input is ``value`` everywhere."""
        chunk, geometry = self._schedule.full(context.cache.num_chunks), self._model.geometry
        if self._direction == "encode":
            p = geometry.pixels_per_latent
            return self._model.encode(torch.full((1, 3, chunk.padded_frames, p, p), value, **self._kind), context)
        shape = (1, geometry.latent_channels, chunk.num_latents, 1, 1)
        return self._model.decode(torch.full(shape, value, **self._kind), context)

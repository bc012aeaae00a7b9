"""The dry run: a first and a middle chunk on ``meta`` tensors, which gives the timeline that plans are made from.

It executes the code of the real run, without a device, without weights and without data.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from longvid.events import Direction
from longvid.memory.buffer_pool import BufferPool
from longvid.memory.offloader import Offloader
from longvid.memory.tracker import AllocationTracker
from longvid.models.base import CausalVAE
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext, Limits, PreparedWeights
from longvid.models.device import placed
from longvid.models.forward import decode_chunk, encode_chunk
from longvid.models.numerics import Numerics
from longvid.planning.cost_model import LayerCost, Timeline
from longvid.schedule import Chunk, ChunkSchedule

__all__ = ["dry_run", "skeleton_of"]

_META = torch.device("meta")
_MOST_SETTLING = 8
"chunks until the buffer pool is what it was a chunk ago; one or two are usual"


def skeleton_of(model: CausalVAE, dtype: torch.dtype) -> CausalVAE:
    """The model without its weights, and without hooks, which are meant for real chunks."""
    module = cast("nn.Module", model)
    skeleton = placed(module, _META, dtype)
    if skeleton is not module:
        for part in skeleton.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
    return cast("CausalVAE", skeleton)


def dry_run(
    model: CausalVAE,
    direction: Direction,
    height: int,
    width: int,
    dtype: torch.dtype,
    schedule: ChunkSchedule,
    *,
    numerics: Numerics | None = None,
    slice_elements: int = 2**31 - 1,
    band_elements: int | None = None,
    keep_buffers: bool = False,
    keep_kernels: bool = False,
    like: Timeline | None = None,
) -> Timeline:
    """Run the first chunk and a middle one on meta tensors, and note bytes and, of the middle one, FLOPs.

    If buffers are kept, middle chunks run until it has settled, and one as the first of a run that is continued;
    the highest of them counts. ``like`` is the timeline of the same chunks in other slices or bands, from which FLOPs
    are taken over: those of bands cannot be counted, since bands that are alike are left out.
    """
    if like is None and band_elements is not None:
        like = dry_run(model, direction, height, width, dtype, schedule, numerics=numerics)
    numerics = numerics or Numerics()
    p = model.geometry.pixels_per_latent

    def host(chunk: Chunk) -> Tensor:
        if direction == "encode":
            return torch.empty((chunk.padded_frames, height, width, 3), dtype=torch.uint8, device=_META)
        shape = (chunk.num_latents, model.geometry.latent_channels, height // p, width // p)
        return torch.empty(shape, dtype=torch.float32, device=_META)

    run = encode_chunk if direction == "encode" else decode_chunk
    probe = _Probe()
    with ForwardContext(
        ConvCache(model.encoder if direction == "encode" else model.decoder, offloader=probe),
        BufferPool(keep=keep_buffers),
        PreparedWeights(keep=keep_kernels),
        numerics,
        Limits(slice_elements=slice_elements, tile_elements=band_elements),
    ) as context:
        first_host, middle_host = (
            host(schedule.full(0)),
            host(schedule.full(1)),
        )  # not the device's: outside the tracker
        with probe.tracker:
            run(model, context, first_host, device=_META, dtype=dtype)
        first_lead, first, _ = probe.take()
        # The tracker is the inner mode: it sees the same operations as without the counter.
        with probe.flop_counter if like is None else nullcontext(), probe.tracker:
            run(model, context, middle_host, device=_META, dtype=dtype)
        steady_lead, steady, flops = probe.take()

        def run_another() -> None:
            nonlocal steady_lead, steady
            with probe.tracker:
                run(model, context, middle_host, device=_META, dtype=dtype)
            lead, later, _ = probe.take()
            steady_lead = max(steady_lead, lead)
            steady = {layer: [*steady[layer], *later[layer]] for layer in steady}

        if keep_buffers:
            for _ in range(_MOST_SETTLING):
                before = context.buffers.sizes
                run_another()
                if context.buffers.sizes == before:
                    break
            context.buffers = BufferPool(keep=True)
            run_another()
        context_bytes = probe.layer_bytes()
    if like is not None:
        flops = {"": like.lead_flops} | {step.layer: step.flops for step in like.steps}
    return Timeline(
        steps=tuple(
            LayerCost(
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


class _Probe(Offloader):
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

    def keep(self, path: str, context: Tensor) -> None:
        self._cut()
        super().keep(path, context)

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

"""The dry run: a first and a middle chunk on ``meta`` tensors, which give the cost model that plans are made from.

It executes the code of the real run, without a device, without weights and without data.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from longvid.events import Direction
from longvid.memory.buffer_pool import BufferPool
from longvid.memory.offloader import Offloader
from longvid.models.base import CausalVAE
from longvid.models.cache import CausalLayer
from longvid.models.device import placed, tensor_bytes
from longvid.models.forward import decode_chunk, encode_chunk
from longvid.planning.cost_model import CostModel, LayerCost
from longvid.planning.meta_tracker import MetaTracker
from longvid.planning.workload import Execution, Workload

__all__ = ["DryRuns", "dry_run", "skeleton_of"]

_META = torch.device("meta")
_PLAIN = Execution()
_MOST_KNOWN = 8
"architectures whose dry runs a process remembers"
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST_SETTLING = 8
"chunks until the buffer pool is what it was a chunk ago; one or two are usual"


def skeleton_of(model: CausalVAE, dtype: torch.dtype) -> CausalVAE:
    """The model without its weights, and without hooks, which are for real chunks only."""
    module = cast("nn.Module", model)
    skeleton = placed(module, _META, dtype)
    if skeleton is not module:
        for part in skeleton.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
    return cast("CausalVAE", skeleton)


def dry_run(
    model: CausalVAE, workload: Workload, execution: Execution = _PLAIN, *, like: CostModel | None = None
) -> CostModel:
    """Run the first chunk and a middle one on meta tensors, and note bytes and, of the middle one, FLOPs.

    If buffers are kept, middle chunks run until their sizes have settled, and one more as the first of a run that is
    resumed; the highest of them counts. ``like`` is the cost model of the same workload in another execution, from
    which FLOPs are taken over: those of row tiles and pieces cannot be counted, since what is alike is left out.
    """
    if like is None and (execution.limits.tile_elements is not None or execution.limits.pieces is not None):
        like = dry_run(model, workload, Execution(numerics=execution.numerics))
    run = encode_chunk if workload.direction == "encode" else decode_chunk
    first_host, middle_host = (_host_chunk(model, workload, i) for i in range(2))  # outside the tracker
    probe = _Probe()
    module = model.encoder if workload.direction == "encode" else model.decoder
    with execution.context(module, probe) as context:

        def compute(host: Tensor) -> _ChunkCost:
            with probe.tracker:
                run(model, context, host, device=_META, dtype=workload.dtype)
            return probe.take()

        first = compute(first_host)
        probe.tracker.counts_flops = like is None
        middle = [compute(middle_host)]
        probe.tracker.counts_flops = False
        if execution.keeps_buffers:
            for _ in range(_MOST_SETTLING):
                before = context.buffers.sizes
                middle.append(compute(middle_host))
                if context.buffers.sizes == before:
                    break
            context.buffers = BufferPool(keep=True)
            middle.append(compute(middle_host))
        sizes, groups = probe.layer_bytes_by_group(), probe.group_names
    flops = middle[0].flops
    if like is not None:
        known = {step.layer: step.flops for step in like.steps}
        flops = {"": like.lead_flops} | {group: sum(known[path] for path in paths) for group, paths in sizes.items()}
    return CostModel(
        steps=tuple(
            LayerCost(
                layer=layer,
                context_bytes=sum(sizes[layer].values()),
                sizes=tuple(sizes[layer].values()) if layer in groups else (),
                first_open_bytes=first.step_bytes[layer][0],
                first_kept_bytes=first.step_bytes[layer][1],
                steady_bytes=max(max(chunk.step_bytes[layer][: 1 if layer in groups else 2]) for chunk in middle),
                left_bytes=max(chunk.step_bytes[layer][1] for chunk in middle) if layer in groups else None,
                flops=flops[layer],
            )
            for layer in sizes
        ),
        first_lead_bytes=first.lead_bytes,
        steady_lead_bytes=max(chunk.lead_bytes for chunk in middle),
        lead_flops=flops[""],
    )


def _host_chunk(model: CausalVAE, workload: Workload, index: int) -> Tensor:
    chunk, p = workload.schedule.full(index), model.geometry.pixels_per_latent
    height, width = workload.height, workload.width
    if workload.direction == "encode":
        return torch.empty((chunk.padded_frames, height, width, 3), dtype=torch.uint8, device=_META)
    shape = (chunk.num_latents, model.geometry.latent_channels, height // p, width // p)
    return torch.empty(shape, dtype=torch.float32, device=_META)


class DryRuns:
    """The dry runs of one architecture, of a model with or without weights. Each one is made once."""

    _known: ClassVar[dict[Hashable, DryRuns]] = {}
    "of the architectures that this process planned last, in that order"

    def __init__(self, model: CausalVAE) -> None:
        self.model = skeleton_of(model, torch.float32)
        self._skeletons = {torch.float32: self.model}
        self._cost_models: dict[tuple[Workload, Execution], CostModel] = {}
        self._frames: dict[Direction, tuple[int, int]] = {}
        "elements of the largest frame of a layer's input, and the area of the frames it was found for"

    @classmethod
    def of(cls, model: CausalVAE) -> DryRuns:
        """Those that all models of the same architecture share in this process."""
        architecture = _architecture(cast("nn.Module", model))
        runs = cls._known.pop(architecture, None) or cls(model)
        cls._known[architecture] = runs
        while len(cls._known) > _MOST_KNOWN:
            cls._known.pop(next(iter(cls._known)), None)
        return runs

    def _skeleton(self, dtype: torch.dtype) -> CausalVAE:
        if dtype not in self._skeletons:
            self._skeletons[dtype] = skeleton_of(self.model, dtype)
        return self._skeletons[dtype]

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights in ``dtype``."""
        return tensor_bytes(cast("nn.Module", self._skeleton(dtype)))

    def cost_model(self, workload: Workload, execution: Execution) -> CostModel:
        """What a workload costs in an execution."""
        key = (workload, execution)
        if key not in self._cost_models:
            alike = (workload, execution.numerics)  # other kernel forms have other FLOPs
            known = self._cost_models.items()
            like = next(
                (cost for (other, how), cost in known if (other, how.numerics) == alike and how.limits.pieces is None),
                None,
            )
            self._cost_models[key] = dry_run(self._skeleton(workload.dtype), workload, execution, like=like)
        return self._cost_models[key]

    def largest_frame(self, workload: Workload, execution: Execution) -> int:
        """Elements of one input frame of the layer whose frames are the largest; 0 if no layer has a context."""
        area = workload.height * workload.width
        if workload.direction not in self._frames:
            module = self.model.encoder if workload.direction == "encode" else self.model.decoder
            layers = dict(module.named_modules())
            sizes = (
                step.context_bytes // cast("CausalLayer", layers[step.layer]).context_frames
                for step in self.cost_model(workload, execution).steps
            )
            self._frames[workload.direction] = max(sizes, default=0) // workload.dtype.itemsize, area
        elements, known_area = self._frames[workload.direction]
        return elements * area // known_area


def _architecture(module: nn.Module) -> Hashable:
    """All that decides how a module computes, but for the values of its weights; no reference to any of them."""
    return tuple(
        (
            path,
            type(part),
            type(part).forward,
            *((name, repr(value)) for name, value in vars(part).items() if name not in _OF_EVERY_MODULE),
            *((name, tuple(tensor.shape)) for name, tensor in part.named_parameters(recurse=False)),
            *((name, tuple(tensor.shape)) for name, tensor in part.named_buffers(recurse=False)),
        )
        for path, part in module.named_modules()
    )


@dataclass(frozen=True, slots=True)
class _ChunkCost:
    """What one chunk took: bytes before the first window, bytes of each layer's step in order, and FLOPs."""

    lead_bytes: int
    step_bytes: dict[str, list[int]]
    flops: dict[str, int]


class _Probe(Offloader):
    """Keeps everything on the device, and notes the peak between the moments at which contexts could move."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = MetaTracker()
        self._bytes: dict[str, list[int]] = {"": []}
        self._flops: dict[str, int] = {}
        self._flops_before = 0
        self._step = ""
        self.group_names: set[str] = set()
        self._before = 0
        "bytes of contexts when the last of these moments was over; those that a group makes count to its step"

    def begin(self, group: str) -> None:
        self.group_names.add(group)
        self._start(group)
        super().begin(group)

    def end(self) -> None:
        self._cut()
        super().end()
        self._before = self.device_bytes

    def open(self, path: str) -> Tensor | None:
        if self._group is None:
            self._start(path)
        return super().open(path)

    def keep(self, path: str, context: Tensor, *, complete: bool = True) -> None:
        if self._group is None:
            self._cut()
        super().keep(path, context, complete=complete)
        if self._group is None:
            self._before = self.device_bytes

    def _start(self, step: str) -> None:
        self._cut()
        self._step = step
        self._bytes[step] = []

    def _cut(self) -> None:
        self._bytes[self._step].append(self.tracker.peak_bytes - self._before)
        self.tracker.reset_peak()
        done = self.tracker.flops - self._flops_before - sum(self._flops.values())
        self._flops[self._step] = self._flops.get(self._step, 0) + done

    def take(self) -> _ChunkCost:
        """What the chunk that just ran took; a step of the first chunk has two peaks, before and after it keeps."""
        self._cut()
        cost = _ChunkCost(max(self._bytes.pop("")), self._bytes, self._flops)
        self._bytes, self._flops, self._step = {"": []}, {}, ""
        self._flops_before = self.tracker.flops
        self.tracker.reset_peak()
        return cost

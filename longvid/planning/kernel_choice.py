"""Probe: which layout and which form of convolution a model computes with on the device at hand.

A moment of measuring guards against slow corners (a library without kernels for a layout); it does not chase the last
percent. What it decides is seen in the last bits of a result, so it must decide alike every time on one machine: its
thresholds lie far from what is measured where either form makes sense, and on a CPU it counts the seconds that one
thread computes, which neither other programs nor the number of threads change much (decision 25).

Some things are known and need no measuring. Where the windows of a chunk are small, nothing is gained on a CPU by
channels last, and the contiguous layout is, bit for bit, what diffusers computes. Elsewhere fewer products are taken,
for averages, sub-pixels and, in float32, frames in pairs, unless they turn out slow. But pairing frames costs bfloat16
one more rounding of every input: a decoder hides it in pixels, if it gains by it, an encoder shows it in latents and
has to be asked for it. A residual that a convolution adds itself is rounded once less, which takes a bfloat16 encoder
nearer to float32 and further from what others compute; it is left to the decoder, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from longvid.events import Direction
from longvid.models import compiled_norm
from longvid.models.base import CausalVAE
from longvid.models.cache import ConvCache
from longvid.models.convolution import (
    convolution,
    faithful,
    filters_of_pairs,
    fuses_residuals,
    paired,
    pooling_filters,
)
from longvid.models.layers import CausalConv3d, ResnetBlock, Upsample
from longvid.models.norms import Fitted
from longvid.models.numerics import Layout, Numerics
from longvid.planning.dry_run import dry_run, skeleton_of

__all__ = ["can_compute", "choose_numerics", "fresh_memory_is_slow", "preferred_band_bytes"]

_SMALL_BYTES = 32 * 2**20
"of the largest window of a chunk; up to this size the C library hands memory out again without fetching it anew"
_BAND_BYTES = 24 * 2**20
"of the window of a band; decision 22"
_MOST_PRODUCTS = 3e9
"of a measured convolution: a tenth of a second on one thread"
_NORM_BYTES = 64 * 2**20
"of what a measured norm reads, at most; it writes as many, and there are two of them"
_ROUNDS = 5
"of a race"
_SLOWER = 1.3
"what costs nothing but time is given up if it is slower than the other form by this factor: slow corners, and no noise"
_FASTER = 1.1
"what costs something else as well has to win by this factor"


def choose_numerics(
    model: CausalVAE,
    *,
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    width: int,
    layout: Layout | None = None,
    paired_frames: bool | None = None,
    compile: bool = False,
    direction: Direction = "encode",
) -> Numerics:
    """The numerics for frames of this size, by the rules above unless asked for.

    Args:
        model: on its device.
        device: that it computes on.
        dtype: that it computes in.
        height: of a frame after padding.
        width: of a frame after padding.
        layout: None to choose.
        paired_frames: None to choose.
        compile: whether norms may be compiled, if that wins; it takes seconds, once.
        direction: in which the model runs.
    """
    module = model.encoder if direction == "encode" else model.decoder
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, CausalConv3d) and min(layer.conv.kernel_size) > 1
    }
    if not layers:  # nothing here that any choice is about
        return Numerics(layout=layout or "contiguous", paired_frames=bool(paired_frames))
    if layout == "contiguous":
        return Numerics(paired_frames=bool(paired_frames))
    fused = device.type == "cpu" and _hides_roundings(direction, dtype) and fuses_residuals(dtype)
    upsamplers, poolers = [], []
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        poolers = [block.conv2 for block in module.modules() if isinstance(block, ResnetBlock) and block.pools]
        upsamplers = [layer for layer in module.modules() if isinstance(layer, Upsample)]
    if layout is not None and paired_frames is not None and not (compile or upsamplers or poolers):
        return Numerics(layout=layout, paired_frames=paired_frames, fused_residuals=fused)
    timeline = dry_run(skeleton_of(model, dtype), direction, height, width, dtype, model.geometry.schedule)
    widest = max((step for step in timeline.steps if step.layer in layers), key=lambda step: step.context_bytes)
    layer = layers[widest.layer]
    frame_bytes = widest.context_bytes // layer.context_frames
    window_bytes = frame_bytes * (layer.context_frames + model.geometry.schedule.chunk_frames)
    if layout is None and device.type == "cpu" and window_bytes <= _SMALL_BYTES:
        return Numerics(paired_frames=bool(paired_frames))
    area = frame_bytes // dtype.itemsize // layer.conv.in_channels
    if layout is None:
        layouts = (torch.contiguous_format, torch.channels_last_3d)
        contiguous, last = _race([partial(_plain, layer, area, one) for one in layouts], device)
        layout = "channels_last" if last < contiguous * _SLOWER else "contiguous"
    if paired_frames is None:
        paired_frames = False
        if layout == "channels_last" and device.type == "cpu" and _hides_roundings(direction, dtype):
            forms = [partial(_plain, layer, area, torch.channels_last_3d), partial(_pairs, layer, area)]
            plain, pairs = _race(forms, device)
            paired_frames = pairs < plain * _SLOWER if dtype == torch.float32 else pairs * _FASTER < plain
    if layout == "contiguous":
        return Numerics(paired_frames=paired_frames)
    pooling = subpixel = False
    if poolers:
        forms = [partial(_plain, poolers[0], area, torch.channels_last_3d), partial(_pooled, poolers[0], area)]
        plain, averages = _race(forms, device)
        pooling = averages < plain * _SLOWER
    if upsamplers:
        forms = [partial(_upsample, upsamplers[-1], area // 4, form) for form in (False, True)]
        plain, phases = _race(forms, device)
        subpixel = phases < plain * _SLOWER
    compiled = compile and device.type == "cpu" and compiled_norm.available()
    if compiled:
        maps = direction == "decode"
        forms = [partial(_norm, layer, area, maps, form) for form in (False, True)]
        plain, kernel = _race(forms, device)
        compiled = kernel * _FASTER < plain
    return Numerics(
        layout=layout,
        paired_frames=paired_frames,
        fused_residuals=fused,
        fused_pooling=pooling,
        subpixel_upsampling=subpixel,
        compiled=compiled,
    )


def can_compute(numerics: Numerics, dtype: torch.dtype) -> bool:
    """Whether this machine has the kernels that an earlier run was computed with."""
    return (not numerics.fused_residuals or fuses_residuals(dtype)) and (
        not numerics.compiled or compiled_norm.available()
    )


def _hides_roundings(direction: Direction, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (direction == "decode" and dtype == torch.bfloat16)


def preferred_band_bytes(device: torch.device) -> int | None:
    """How large the windows of bands of rows are at most; None for whole frames.

    On a CPU, what a norm has written is in a cache when the convolution reads it, and so is what that gives when it is
    stored; and the kernels of the convolutions themselves are faster on blocks that size.
    """
    return _BAND_BYTES if device.type == "cpu" else None


def fresh_memory_is_slow(device: torch.device) -> bool:
    """Whether it is worth keeping memory between chunks: not where an allocator of the device's own does so."""
    return device.type == "cpu"


def _input(layer: CausalConv3d | Upsample, area: int, layout: torch.memory_format, outputs: int = 1) -> Tensor:
    """Four frames, or a part of them if they are large; ``outputs`` are computed for each of their pixels."""
    weight = layer.conv.weight
    side = int(min(area, _MOST_PRODUCTS / (4 * outputs * weight.numel())) ** 0.5)
    shape = (1, layer.conv.in_channels, 4, max(8, side), max(8, side))
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device).contiguous(memory_format=layout)


def _plain(layer: CausalConv3d, area: int, layout: torch.memory_format) -> Callable[[], object]:
    conv, x = layer.conv, _input(layer, area, layout)
    padding = (0, *(k // 2 for k in conv.kernel_size[1:]))
    return lambda: convolution(x, conv.weight, conv.bias, padding=padding)


def _pairs(layer: CausalConv3d, area: int) -> Callable[[], object]:
    conv, x = layer.conv, _input(layer, area, torch.channels_last_3d)
    filters = filters_of_pairs(conv.weight)
    out = x.new_empty((1, conv.out_channels, 2, *x.shape[3:])).contiguous(memory_format=torch.channels_last_3d)
    padding = conv.kernel_size[1] // 2, conv.kernel_size[2] // 2
    return lambda: paired(x, filters, conv.bias, out, padding=padding)


def _pooled(layer: CausalConv3d, area: int) -> Callable[[], object]:
    conv, x = layer.conv, _input(layer, area, torch.channels_last_3d)
    filters, padding = pooling_filters(conv.weight), (0, *(k // 2 for k in conv.kernel_size[1:]))
    return lambda: convolution(x, filters, conv.bias, padding=padding, time_stride=2)


def _upsample(layer: Upsample, area: int, subpixel: bool) -> Callable[[], object]:
    x = _input(layer, area, torch.channels_last_3d, outputs=4)
    numerics = Numerics(layout="channels_last", subpixel_upsampling=subpixel)
    cache = ConvCache(layer, numerics=numerics, band_elements=x.numel(), keep_buffers=True, keep_kernels=True)
    return lambda: layer(x, cache)


def _norm(layer: CausalConv3d, area: int, with_maps: bool, compiled: bool) -> Callable[[], object]:
    """Of frames that no cache holds, as those of a chunk: there, memory limits what a kernel can win."""
    channels, weight, last = layer.conv.in_channels, layer.conv.weight, torch.channels_last_3d
    side = max(2, int(min(area, _NORM_BYTES / (4 * channels * weight.element_size())) ** 0.5) // 8)
    small = torch.zeros((1, channels, 4, side, side), dtype=weight.dtype, device=weight.device)
    x = small.new_zeros((1, channels, 4, 8 * side, 8 * side)).contiguous(memory_format=last)
    maps = (small.contiguous(memory_format=last),) * 2
    scale = torch.ones((1, channels), device=weight.device)
    fitted = Fitted(x, scale, torch.zeros_like(scale), maps if with_maps else None, compiled=compiled)
    out = torch.empty_like(x)
    return lambda: fitted.write(range(x.shape[2]), range(x.shape[3]), out)


@torch.inference_mode()
def _race(makers: Sequence[Callable[[], Callable[[], object]]], device: torch.device) -> list[float]:
    """Seconds of each, the least of rounds in which they alternate: whatever else runs can only add to them.

    What an accelerator's library has no kernel for takes forever.
    """
    runners = [make() for make in makers]
    with faithful(device), _one_thread(device):
        for run in runners:
            _timed(run, device)
        rounds = [[_timed(run, device) for run in runners] for _ in range(_ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Where threads of a CPU share the work, all of them wait for the one that another program has interrupted.

    The setting is that of the thread that calls, and of those that begin meanwhile.
    """
    if device.type != "cpu":
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """In which this thread computed, on a CPU; that passed, on an accelerator."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    started = clock()
    try:
        run()
        if device.type != "cpu" and torch.accelerator.is_available():
            torch.accelerator.synchronize(device)
    except RuntimeError as exc:
        if device.type == "cpu" or isinstance(exc, torch.OutOfMemoryError):
            raise
        return math.inf
    return clock() - started

"""Probe: which layout and which form of convolution a model computes with on the device at hand.

A moment of measuring guards against slow corners (a library without kernels for a layout); it does not chase the last
percent. What it decides is seen in the last bits of a result, so it must decide alike every time on one machine: its
thresholds lie far from what is measured where either form makes sense.

Two things are known and need no measuring. Where the windows of a chunk are small, nothing is gained on a CPU by
channels last, and the contiguous layout is, bit for bit, what diffusers computes. And pairing frames costs bfloat16 one
more rounding of every input: a decoder hides it in pixels, an encoder shows it in latents and has to be asked for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longvid.dryrun import dry_run, skeleton_of
from longvid.events import Direction
from longvid.models.base import CausalVAE
from longvid.models.convolution import convolution, filters_of_pairs, paired
from longvid.models.layers import CausalConv3d
from longvid.numerics import Layout, Numerics

__all__ = ["choose_numerics", "preferred_slice_bytes"]

_SMALL_BYTES = 32 * 2**20
"of the largest window of a chunk; up to this size the C library hands memory out again without fetching it anew"
_MOST_FLOPS = 3e9
"of a measured convolution"
_ROUNDS = 7
_SLOWER = 1.3
"a layout is given up if it is slower than the other one by this factor: slow corners, and no noise"
_FASTER = 1.1
"pairing frames has to win by this factor; where it is worth anything, it wins by a third"


def choose_numerics(
    model: CausalVAE,
    *,
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    width: int,
    layout: Layout | None = None,
    paired_frames: bool | None = None,
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
        direction: in which the model runs.
    """
    module = model.encoder if direction == "encode" else model.decoder
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, CausalConv3d) and min(layer.conv.kernel_size) > 1
    }
    if not layers:  # nothing here that either choice is about
        return Numerics(layout=layout or "contiguous", paired_frames=bool(paired_frames))
    if layout is not None and (paired_frames is not None or layout == "contiguous"):
        return Numerics(layout=layout, paired_frames=bool(paired_frames))
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
        contiguous, last = _race([partial(_plain, layer, area, one) for one in layouts])
        layout = "channels_last" if last < contiguous * _SLOWER else "contiguous"
    if paired_frames is None:
        paired_frames = False
        if layout == "channels_last" and device.type == "cpu" and _bears_pairs(direction, dtype):
            plain, pairs = _race([partial(_plain, layer, area, torch.channels_last_3d), partial(_pairs, layer, area)])
            paired_frames = plain > pairs * _FASTER
    return Numerics(layout=layout, paired_frames=paired_frames)


def _bears_pairs(direction: Direction, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (direction == "decode" and dtype == torch.bfloat16)


def preferred_slice_bytes(device: torch.device) -> int | None:
    """How long slices are where nothing else decides; None for as long as can be.

    On a CPU a convolution's output is memory fresh from the system, a page fault for every 4 KiB, unless it is small
    enough for the C library to hand out again; copying a slice to where it belongs costs a fraction of that.
    """
    return _SMALL_BYTES * 3 // 4 if device.type == "cpu" else None


def _input(layer: CausalConv3d, area: int, layout: torch.memory_format) -> Tensor:
    """Four frames, or a part of them if they are large."""
    weight = layer.conv.weight
    side = int(min(area, _MOST_FLOPS / (4 * weight.numel())) ** 0.5)
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
    return lambda: paired(x, filters, conv.bias, out)


@torch.inference_mode()
def _race(makers: list[Callable[[], Callable[[], object]]]) -> list[float]:
    """Seconds of each, the least of rounds in which they alternate: whatever else runs can only add to them."""
    runners = [make() for make in makers]
    seconds: list[list[float]] = [[] for _ in runners]
    for turn in range(_ROUNDS + 1):
        for run, times in zip(runners, seconds, strict=True):
            started = time.perf_counter()
            run()
            _wait()
            if turn:
                times.append(time.perf_counter() - started)
    return [min(times) for times in seconds]


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()

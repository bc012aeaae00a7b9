"""Kernel choice: which layout and which form of convolution a model computes with on the device at hand.

A micro-benchmark guards against slow corners (a library without kernels for a layout); it does not decide small
differences. The choice shows in the last bits of a result, so it must be the same every time on one machine: the
thresholds are far from what is measured where either form makes sense, and on a CPU it counts the seconds that one
thread computes, which neither other programs nor the number of threads change much (decision 25). A process measures
once, and a model without weights is enough, so that plans and runs choose alike.

Some cases need no measurement. Where the windows of a chunk are small, channels last gains nothing on a CPU, and the
contiguous layout computes, bit for bit, what diffusers computes. A CPU whose library has no bfloat16 kernels computes
products of bfloat16 in float32. Elsewhere:

* Winograd along time is taken on a CPU if it is not slower. In bfloat16 it rounds every input once more, unless
  products are in float32, so it has to be faster. A bfloat16 encoder takes it only on a CPU without a matrix unit,
  where it gains most; the distance of its latents to the float32 result is then at most 1.25 times diffusers' own.
* A residual that a convolution adds itself is rounded once less, which takes a bfloat16 encoder nearer to float32 and
  further from what others compute. It is left to decoders and to float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from longvid.models.kernels.convolution import convolution, faithful, fuses_residuals
from longvid.models.kernels.cpu import compute_threads, has_bfloat16, has_matrix_unit, has_onednn
from longvid.models.kernels.winograd import two_frames, winograd_filters
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.numerics import Layout, Numerics
from longvid.planning.dry_run import DryRuns
from longvid.planning.workload import Execution, Workload

__all__ = ["can_compute", "choose_numerics", "preferred_band_bytes"]

_SMALL_BYTES = 32 * 2**20
"limit for the largest window of a chunk; up to this size the C library reuses memory without asking the system"
_BAND_BYTES = 24 * 2**20
"limit for the window of a row tile; see decision 22"
_MOST_PRODUCTS = 3e9
"limit for a measured convolution: a tenth of a second on one thread"
_ROUNDS = 5
"rounds in which the forms of a benchmark alternate"
_SLOWER = 1.3
"a form that costs nothing but time is given up if it is slower than the other by this factor, which noise is not"
_FASTER = 1.1
"a form that costs something else as well has to be faster by this factor"


def choose_numerics(
    runs: DryRuns,
    workload: Workload,
    *,
    device: torch.device,
    layout: Layout | None = None,
    paired_frames: bool | None = None,
) -> Numerics:
    """The numerics of one workload, by the rules above where layout or pairing are left open."""
    on_cpu, dtype = device.type == "cpu", workload.dtype
    widens = on_cpu and dtype == torch.bfloat16 and has_onednn() and not has_bfloat16()
    plain = Numerics(layout=layout or "contiguous", paired_frames=bool(paired_frames), float32_products=widens)
    module = runs.model.encoder if workload.direction == "encode" else runs.model.decoder
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, CausalConv3d) and min(layer.conv.kernel_size) > 1
    }
    if not layers or layout == "contiguous":  # no choice left
        return plain
    fused = on_cpu and not widens and _hides_roundings(workload) and fuses_residuals(dtype)
    if layout is not None and paired_frames is not None:
        return replace(plain, fused_residuals=fused)
    costs = runs.cost_model(workload, Execution()).steps
    widest = max((step for step in costs if step.layer in layers), key=lambda step: step.context_bytes)
    layer = layers[widest.layer]
    frame_bytes = widest.context_bytes // layer.context_frames
    window_bytes = frame_bytes * (layer.context_frames + workload.schedule.chunk_frames)
    if layout is None and on_cpu and window_bytes <= _SMALL_BYTES:
        return plain
    area = frame_bytes // dtype.itemsize // layer.conv.in_channels
    forms = _Forms(tuple(layer.conv.weight.shape), area, dtype, device, widens)
    if layout is None:
        contiguous, last = _seconds_of_layouts(forms)
        if last >= contiguous * _SLOWER:
            return plain
    if paired_frames is None:
        paired_frames = False
        if on_cpu and (_hides_roundings(workload) or (dtype == torch.bfloat16 and not has_matrix_unit())):
            usual, winograd = _seconds_of_winograd(forms)
            paired_frames = winograd < usual * _SLOWER if dtype == torch.float32 else winograd * _FASTER < usual
    return replace(plain, layout="channels_last", paired_frames=paired_frames, fused_residuals=fused)


def can_compute(numerics: Numerics, dtype: torch.dtype) -> bool:
    """Whether this machine has the kernels that an earlier run was computed with."""
    return not numerics.fused_residuals or fuses_residuals(dtype)


def _hides_roundings(workload: Workload) -> bool:
    """Whether one rounding more or less does not matter: in float32, and in a decoder, whose results are 8 bits."""
    return workload.dtype == torch.float32 or (workload.direction == "decode" and workload.dtype == torch.bfloat16)


def preferred_band_bytes(device: torch.device) -> int | None:
    """How large the windows of row tiles are at most; None for whole frames.

    On a CPU, what a norm has written is in a cache when the convolution reads it, and so is what that gives when it is
    stored; and the kernels of the convolutions themselves are faster on blocks that size.
    """
    return _BAND_BYTES if device.type == "cpu" else None


@dataclass(frozen=True, slots=True)
class _Forms:
    """The forms of one convolution, ready to be measured. Weights are zeros, so a model without weights is enough."""

    shape: tuple[int, ...]
    "that of its weight"
    area: int
    "pixels of its input frames; a part of them is measured if that is enough"
    dtype: torch.dtype
    device: torch.device
    widens: bool
    "whether products are in float32"

    def _input(self, layout: torch.memory_format) -> Tensor:
        """Four frames, or a part of them if they are large."""
        side = max(8, int(min(self.area, _MOST_PRODUCTS / (4 * math.prod(self.shape))) ** 0.5))
        shape = (1, self.shape[1], 4, side, side)
        return torch.zeros(shape, dtype=self.dtype, device=self.device).contiguous(memory_format=layout)

    def _weights(self) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if self.widens else self.dtype
        weight = torch.zeros(self.shape, dtype=dtype, device=self.device)
        return weight, torch.zeros(self.shape[:1], dtype=self.dtype, device=self.device)

    def plain(self, layout: torch.memory_format) -> Callable[[], object]:
        """Two output frames by the convolution as it is."""
        x, (weight, bias) = self._input(layout), self._weights()
        padding = (0, self.shape[3] // 2, self.shape[4] // 2)
        return lambda: convolution(x, weight, bias, padding=padding)

    def winograd(self) -> Callable[[], object]:
        """The same two frames by Winograd F(2,3)."""
        x, (weight, bias) = self._input(torch.channels_last_3d), self._weights()
        filters, padding = winograd_filters(weight), (self.shape[3] // 2, self.shape[4] // 2)
        out = x.new_empty((1, self.shape[0], 2, *x.shape[3:])).contiguous(memory_format=torch.channels_last_3d)
        return lambda: two_frames(x, filters, bias, out, padding=padding)


# Each convolution is measured once in a process, so that all plans and sessions in it choose alike.


@cache
def _seconds_of_layouts(forms: _Forms) -> list[float]:
    """Seconds in the contiguous layout and in channels last."""
    layouts = (torch.contiguous_format, torch.channels_last_3d)
    return _benchmark([partial(forms.plain, layout) for layout in layouts], forms.device)


@cache
def _seconds_of_winograd(forms: _Forms) -> list[float]:
    """Seconds in channels last without and with Winograd."""
    return _benchmark([partial(forms.plain, torch.channels_last_3d), forms.winograd], forms.device)


@torch.inference_mode()
def _benchmark(makers: Sequence[Callable[[], Callable[[], object]]], device: torch.device) -> list[float]:
    """Seconds of each form, the least of rounds in which they alternate: other programs can only add to them.

    A form for which an accelerator's library has no kernel takes forever.
    """
    runners = [make() for make in makers]
    # Where several threads share the work, all wait for one that another program interrupts.
    with faithful(device), compute_threads(1 if device.type == "cpu" else None):
        for run in runners:
            _timed(run, device)
        rounds = [[_timed(run, device) for run in runners] for _ in range(_ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that this thread computed, on a CPU; seconds that passed, on an accelerator."""
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

"""One convolution, kept out of the slow corners of the libraries that compute it.

* On a CPU, PyTorch does not ask oneDNN for a float32 convolution when the first four sizes of its input multiply to
  20,480 or less, and takes 10 to 50 times longer; oneDNN is then called by its own name. (bfloat16 is not affected.)
* Kernels address elements with 32 bits. Input and output of a call stay below a limit: longer inputs are cut in time,
  larger frames in row tiles with a halo, whose doubly computed rows are thrown away. Nothing is blended. (A causal
  layer cuts its window before that.)
* oneDNN reads weights in an order of its own and reorders them in every call. :func:`packed` does that once for all
  calls of a layer.
* :func:`accumulate` adds a residual within the kernel where oneDNN can: no output beside the residual, no pass over
  both, one rounding.
* Without bfloat16 kernels in oneDNN, PyTorch's own take hundreds of times longer than float32. Weights that were
  widened to float32 make a convolution of a bfloat16 input compute in float32 and round its output once.
* On CUDA, float32 is float32 and not TF32, and cuDNN chooses its kernels by rule and not by a benchmark of its own,
  which might end otherwise on another day (:func:`faithful`).

The layout of the input is that of the output.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import layout_of
from longvid.models.kernels.cpu import has_onednn
from longvid.models.kernels.cuts import even_parts, tiles_with_halo

__all__ = [
    "Attempt",
    "Conv2d",
    "Conv3d",
    "accumulate",
    "convolution",
    "faithful",
    "fuses_residuals",
    "packed",
    "run_once",
]

MAX_ELEMENTS = 2**31 - 1
Attempt: TypeAlias = Callable[[Callable[[], Tensor]], Tensor]
_PACKED_CHANNELS = 64
"channels of a packed kernel are multiples of this; no block of the library is wider, so none is filled up"
_cudnn_lock = threading.Lock()
_cudnn_before: list[tuple[bool, bool, str]] = []
"the settings that each thread within :func:`faithful` found"


@contextmanager
def faithful(device: torch.device) -> Iterator[None]:
    """Within this context, settings of the program around it change no bit of what is computed on ``device``.

    They are a ``torch.autocast``, a default device, and those of cuDNN: by default PyTorch lets it round the inputs of
    float32 convolutions to the 10 bits of TF32, and programs often let it benchmark its kernels at run time.
    """
    with ExitStack() as stack:
        for kind in {"cpu", device.type} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if device.type == "cuda":
            stack.enter_context(_exact_cudnn())
        yield


@contextmanager
def _exact_cudnn() -> Iterator[None]:
    """Settings of cuDNN belong to the process. They are restored when the last thread that needs them has left."""
    with _cudnn_lock:
        _cudnn_before.append(_set_cudnn(False, True, "ieee"))
    try:
        yield
    finally:
        with _cudnn_lock:
            before = _cudnn_before[0]
            _cudnn_before.pop()
            if not _cudnn_before:
                _set_cudnn(*before)


def _set_cudnn(benchmark: bool, deterministic: bool, precision: str) -> tuple[bool, bool, str]:
    """Change settings of the library, and return those before."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = benchmark, deterministic, precision
    return before


def run_once(forward: Callable[[], Tensor]) -> Tensor:
    """Call a function, and let it fail where there is no memory."""
    return forward()


class _Convolution(nn.modules.conv._ConvNd):
    """PyTorch's, by way of :func:`_call`. Padding is zeros and none in time, nothing is dilated."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _call(input, weight, bias, cast("tuple[int, ...]", self.padding), self.stride)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same with a weight that may be widened; hooks see the call where it is the module's own."""
        return cast("Tensor", self(x)) if weight is self.weight else self._conv_forward(x, weight, self.bias)


class Conv2d(_Convolution, nn.Conv2d):
    """A convolution in space."""


class Conv3d(_Convolution, nn.Conv3d):
    """A convolution in time and space."""


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, ...],
    limit: int = MAX_ELEMENTS,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A 2-D or 3-D convolution of any size, with stride 1.

    Args:
        x: (B, C, T, H, W) with a 3-D kernel, (B, C, H, W) with a 2-D one.
        weight: (out channels, C, *kernel), in x's dtype, or float32 and then rounded once; or from :func:`packed`.
        bias: (out channels,) or None.
        padding: half a kernel in height and width, none in time.
        limit: most elements of the input and of the output of one call of a kernel, as far as rows can be cut.
        call: what computes each part, a module with these weights and this padding whose hooks see it.
    """
    call = call or (lambda part: _call(part, weight, bias, padding))
    out_channels, halo = weight.shape[0], weight.shape[-2] // 2
    num_frames, taps = (x.shape[2], weight.shape[2]) if x.ndim == 5 else (1, 1)
    frame = max(x.shape[1], out_channels) * x.shape[0] * x.shape[-2] * x.shape[-1]
    if frame * num_frames <= limit:
        return call(x)
    time, longest = num_frames - taps + 1, max(1, limit // frame - taps + 1)
    tiles = tiles_with_halo(x.shape[-2], halo=halo, row=frame // x.shape[-2] * (longest + taps - 1), limit=limit)
    shape = (x.shape[0], out_channels, *((time,) if x.ndim == 5 else ()), *x.shape[-2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    for frames in even_parts(time, longest):
        part, target = x, out
        if x.ndim == 5:
            part = x[:, :, frames.start : frames.stop + taps - 1]
            target = out[:, :, frames.start : frames.stop]
        for read, rows in tiles:
            y = call(part[..., read.start : read.stop, :])
            target[..., rows.start : rows.stop, :].copy_(y[..., rows.start - read.start : rows.stop - read.start, :])
    return out


def accumulate(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, ...],
    attempt: Attempt = run_once,
) -> None:
    """``out += convolution(x)``, rounded once, and without a tensor for the convolution's own result.

    ``out`` is in channels last and dense in every frame, so that it may be a tile of the rows of larger frames. With
    more than one batch element, the two are separate operations. x is of a size that one call can take.
    """
    if out.shape[0] > 1:
        out.add_(attempt(lambda: convolution(x, weight, bias, padding=padding)))
    elif out.ndim == 4 or out.is_contiguous(memory_format=torch.channels_last_3d):
        # A kernel that finds no memory has not begun, so repeating it adds nothing twice.
        attempt(partial(_accumulate, out, x, weight, bias, padding))
    else:
        taps = weight.shape[2]
        for t in range(out.shape[2]):
            frame, ins = out[:, :, t : t + 1], x[:, :, t : t + taps]
            attempt(partial(_accumulate, frame, ins, weight, bias, padding))


def _accumulate(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    x, ones = x.contiguous(memory_format=layout_of(x)), (1,) * (x.ndim - 2)
    if out.is_meta:  # what a dry run has to see are the operations and that nothing is allocated
        zeros = (0,) * (x.ndim - 2)
        result = torch.ops.aten.convolution.out(x, weight, bias, ones, padding, ones, False, zeros, 1, out=out)
    else:
        # PyTorch has no public name for oneDNN's sum: this is what its own compiler calls.
        onednn_sum = torch.ops.mkldnn._convolution_pointwise_.binary
        result = onednn_sum(out, x, weight, bias, padding, ones, ones, 1, "add", None, None, [], None)
    return cast("Tensor", result)


@cache
def fuses_residuals(dtype: torch.dtype) -> bool:
    """Whether the CPU's library packs kernels and adds onto a tensor here, in this version of PyTorch, as it should."""
    if not has_onednn() or dtype not in (torch.float32, torch.bfloat16):
        return False
    channels, padding = _PACKED_CHANNELS, (0, 1, 1)
    with torch.inference_mode():
        x = torch.linspace(-1, 1, channels * 48).view(1, channels, 3, 4, 4).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.linspace(-0.1, 0.1, channels * channels * 27).view(channels, channels, 3, 3, 3).to(dtype)
        plain = _call(x, weight, None, padding)
        try:
            found = _call(x, _pack(weight, padding, tuple(x.shape)), None, padding)
            added = torch.ones_like(plain)
            _accumulate(added, x, weight, None, padding)
        except (AttributeError, RuntimeError, TypeError):  # gone, not built in, or other arguments
            return False
    pairs = (found.float(), plain.float()), (added.float(), 1 + plain.float())
    return all(torch.allclose(got, expected, rtol=0.02, atol=0.02) for got, expected in pairs)


def packed(weight: Tensor, padding: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A kernel in the order in which the CPU's library reads it, for any of the functions here; or as it is.

    Without this, each call does it again. The result of a convolution is the same, bit for bit. ``padding`` and
    ``shape`` are those of most calls, in channels last.
    """
    if any(channels % _PACKED_CHANNELS for channels in weight.shape[:2]):  # the library would pad them
        return weight
    if weight.is_meta:
        return torch.empty_like(weight)
    if weight.device.type != "cpu" or not fuses_residuals(weight.dtype):
        return weight
    return _pack(weight, padding, shape)


def _pack(weight: Tensor, padding: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    ones = (1,) * (weight.ndim - 2)
    return cast("Tensor", torch.ops.mkldnn._reorder_convolution_weight(weight, padding, ones, ones, 1, shape))


def _call(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...] | None = None
) -> Tensor:
    if weight.dtype != x.dtype:  # widened weights: products and sums in float32, rounded once
        y = _call(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype), padding, stride)
        return y.to(x.dtype)
    # Kernels want dense input. Slices that are not are copied here, where a dry run sees it, and not within a kernel.
    x = x.contiguous(memory_format=layout_of(x))
    ones = (1,) * (x.ndim - 2)
    stride = stride or ones
    if weight.is_mkldnn:
        op = torch.ops.mkldnn._convolution_pointwise.default
        return cast("Tensor", op(x, weight, bias, padding, stride, ones, 1, "none", [], None))
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled() and has_onednn():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1)
    y = (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, bias, stride=stride, padding=padding)
    if y.is_meta and layout_of(x) == torch.channels_last_3d:  # its kernel forgets the layout, real ones do not
        _, C, T, H, W = y.shape
        y = y.as_strided(y.shape, (T * H * W * C, 1, H * W * C, W * C, C))
    return y

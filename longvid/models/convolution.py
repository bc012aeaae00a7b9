"""One convolution, kept out of the slow corners of the libraries that compute it.

Eight things are done here and nowhere else:

* On a CPU, PyTorch does not ask oneDNN for a float32 convolution when the first four sizes of its input multiply to
  20,480 or less, and takes 10 to 50 times longer; oneDNN is then called by its own name. (bfloat16 is not affected.)
* Kernels address elements with 32 bits. Input and output of a call stay below a limit: longer inputs are cut in time,
  larger frames in bands of rows with a halo, whose doubly computed rows are thrown away. Nothing is blended and every
  element comes from the same products, in the same order on a CPU. (A causal layer cuts its window before that.)
* A library that reads kernels in an order of its own reorders them in every call. For all calls of a layer that is done
  once (:func:`packed`).
* A residual is added within the kernel (:func:`accumulate`), where the library has a way: no output beside the
  residual, no pass over both, one rounding.
* Three taps in time over pairs of frames need four 2-D convolutions, not six: Winograd's minimal filtering F(2, 3)
  along time (:func:`paired`). A third fewer multiplications, to rounding.
* A 3x3 convolution of a frame that was just doubled reads every pixel up to four times: it is a sub-pixel convolution,
  four 2x2 kernels on the frame as it was (:func:`subpixel_filters`). 4/9 of the multiplications, to rounding.
* A convolution whose output is averaged over pairs of frames computes the averages: four taps in time, for every second
  frame (:func:`pooling_filters`). 2/3 of the multiplications and half of the output, to rounding.
* On CUDA, float32 is float32 and not TF32, and the library chooses its kernels by rule and not by a race of its own,
  which might end otherwise on another day (:func:`faithful`).

The layout of the input is that of the output.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Conv2d",
    "Conv3d",
    "accumulate",
    "convolution",
    "faithful",
    "filters_of_pairs",
    "fuses_residuals",
    "packed",
    "paired",
    "pooling_filters",
    "row_bands",
    "subpixel",
    "subpixel_filters",
]

MAX_ELEMENTS = 2**31 - 1
_PACKED_CHANNELS = 64
"channels of a packed kernel are multiples of this; no block of the library is wider, so none is filled up"


@cache
def _has_onednn() -> bool:
    return bool(torch._C._has_mkldnn)


@contextmanager
def faithful(device: torch.device) -> Iterator[None]:
    """Within, convolutions on ``device`` give float32 what it is due, and the same bits every time.

    PyTorch lets cuDNN round the inputs of float32 convolutions to the 10 bits of TF32 unless it is told otherwise, and
    programs like to have it try its kernels on the spot. The settings are the process's. They come back as they were
    when the last thread that needs them has left.
    """
    if device.type != "cuda":
        yield
        return
    _cudnn.enter()
    try:
        yield
    finally:
        _cudnn.leave()


class _Cudnn:
    """Settings of the library, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before: tuple[Any, ...] = ()

    @property
    def settings(self) -> tuple[Any, ...]:
        cudnn: Any = torch.backends.cudnn
        return cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision

    @settings.setter
    def settings(self, wanted: tuple[Any, ...]) -> None:
        cudnn: Any = torch.backends.cudnn
        cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = wanted

    def enter(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._before, self.settings = self.settings, (False, True, "ieee")
            self._num_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self.settings = self._before


_cudnn = _Cudnn()


class Conv2d(nn.Conv2d):
    """PyTorch's, by way of :func:`_call`. Padding is zeros, strides are alike in every axis, nothing is dilated."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _call(input, weight, bias, cast("tuple[int, ...]", self.padding), self.stride)


class Conv3d(nn.Conv3d):
    """PyTorch's, by way of :func:`_call`. Padding is zeros and none in time, nothing is strided or dilated."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _call(input, weight, bias, cast("tuple[int, ...]", self.padding), self.stride)

    def in_parts(self, x_BCTHW: Tensor, limit: int = MAX_ELEMENTS) -> Tensor:
        """The same in slices of frames and bands of rows, if it is too large for one call; see :func:`convolution`."""
        return _in_parts(self, x_BCTHW, self.out_channels, self.kernel_size, limit)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, ...],
    time_stride: int = 1,
    limit: int = MAX_ELEMENTS,
) -> Tensor:
    """A 2-D or 3-D convolution of any size, with stride 1 in height and width.

    Args:
        x: (B, C, T, H, W) with a 3-D kernel, (B, C, H, W) with a 2-D one.
        weight: (out channels, C, *kernel).
        bias: (out channels,) or None.
        padding: zeros on both sides of each axis: half a kernel in height and width, none in time.
        time_stride: frames from one output frame to the next.
        limit: most elements of the input and of the output of one call of a kernel, as far as rows can be cut.
    """
    kernel = tuple(weight.shape[2:]) if x.ndim == 5 else (1, *weight.shape[2:])
    stride = _strides(x, time_stride)
    return _in_parts(
        lambda part: _call(part, weight, bias, padding, stride), x, len(weight), kernel, limit, time_stride
    )


def _strides(x: Tensor, in_time: int) -> tuple[int, ...]:
    return (in_time, 1, 1)[5 - x.ndim :]


def _in_parts(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    out_channels: int,
    kernel: tuple[int, ...],
    limit: int,
    stride: int = 1,
) -> Tensor:
    taps, halo = kernel[0], kernel[1] // 2
    num_frames = x.shape[2] if x.ndim == 5 else 1
    time = (num_frames - taps) // stride + 1
    frame = _frame_elements(x, out_channels)
    if frame * num_frames <= limit:
        return call(x)
    longest = max(1, (limit // frame - taps) // stride + 1)
    num_read = (longest - 1) * stride + taps
    bands = row_bands(x.shape[-2], halo=halo, row=frame // x.shape[-2] * num_read, limit=limit)
    shape = (x.shape[0], out_channels, *((time,) if x.ndim == 5 else ()), *x.shape[-2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    for start in range(0, time, longest):
        stop = min(start + longest, time)
        part, target = x, out
        if x.ndim == 5:
            part, target = x[:, :, start * stride : (stop - 1) * stride + taps], out[:, :, start:stop]
        for read, rows in bands:
            y = call(part[..., read.start : read.stop, :])
            target[..., rows.start : rows.stop, :].copy_(y[..., rows.start - read.start : rows.stop - read.start, :])
    return out


def _frame_elements(x: Tensor, out_channels: int) -> int:
    return max(x.shape[1], out_channels) * x.shape[0] * x.shape[-2] * x.shape[-1]


def accumulate(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, ...],
    time_stride: int = 1,
    attempt: Callable[[Callable[[], Tensor]], Tensor] = lambda step: step(),
) -> None:
    """``out += convolution(x)``, rounded once, and without a tensor for the convolution's own result.

    The arguments are those of :func:`convolution`, of a size that one call can take.

    Args:
        out: what the convolution would return, in channels last; dense in every frame, so that it may be a band of rows
            of longer frames. With more than one batch element, the two are separate operations.
        attempt: runs a step that takes memory and may be repeated; see :meth:`longvid.ConvCache.attempt`.
    """
    if out.shape[0] > 1:
        out.add_(attempt(lambda: convolution(x, weight, bias, padding=padding, time_stride=time_stride)))
    elif out.ndim == 4 or out.is_contiguous(memory_format=torch.channels_last_3d):
        # A kernel that finds no memory has not begun, so repeating it adds nothing twice.
        attempt(partial(_accumulate, out, x, weight, bias, padding, _strides(x, time_stride)))
    else:
        taps = weight.shape[2]
        for t in range(out.shape[2]):
            frame, ins = out[:, :, t : t + 1], x[:, :, t * time_stride : t * time_stride + taps]
            attempt(partial(_accumulate, frame, ins, weight, bias, padding, (1, 1, 1)))


def _accumulate(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    x, ones = x.contiguous(memory_format=_layout(x)), (1,) * (x.ndim - 2)
    if out.is_meta:  # what a dry run has to see are the operations and that nothing is allocated
        zeros = (0,) * (x.ndim - 2)
        result = torch.ops.aten.convolution.out(x, weight, bias, stride, padding, ones, False, zeros, 1, out=out)
    else:
        result = _onednn_sum()(out, x, weight, bias, padding, stride, ones, 1, "add", None, None, [], None)
    return cast("Tensor", result)


def _onednn_sum() -> Any:
    # PyTorch has no public name for oneDNN's sum: this is what its own compiler calls.
    return torch.ops.mkldnn._convolution_pointwise_.binary


@cache
def fuses_residuals(dtype: torch.dtype) -> bool:
    """Whether the CPU's library adds onto a tensor here, in this version of PyTorch, and what it should."""
    if not _has_onednn() or dtype not in (torch.float32, torch.bfloat16):
        return False
    last = torch.channels_last_3d
    with torch.inference_mode():
        ramp = torch.linspace(-1, 1, 8 * 3 * 4 * 4).view(1, 8, 3, 4, 4).to(dtype).contiguous(memory_format=last)
        weight = torch.linspace(-1, 1, 8 * 8 * 27).view(8, 8, 3, 3, 3).to(dtype)
        expected = 1 + F.conv3d(ramp, weight, padding=(0, 1, 1)).float()
        out = torch.ones((1, 8, 1, 4, 4), dtype=dtype).contiguous(memory_format=last)
        try:
            _accumulate(out, ramp, weight, None, (0, 1, 1), (1, 1, 1))
        except (AttributeError, RuntimeError, TypeError):  # gone, not built in, or other arguments
            return False
    return bool(torch.allclose(out.float(), expected, rtol=0.02, atol=0.02))


def packed(weight: Tensor, padding: tuple[int, ...], shape: tuple[int, ...], time_stride: int = 1) -> Tensor:
    """A kernel in the order in which the CPU's library reads it, for any of the functions here; or as it is.

    Without this, each call does it again. The result of a convolution is the same, bit for bit.

    Args:
        weight: (out channels, C, *kernel).
        padding: that of the calls.
        shape: of the input of most calls, in channels last.
        time_stride: that of the calls.
    """
    if any(channels % _PACKED_CHANNELS for channels in weight.shape[:2]):  # the library would pad them
        return weight
    if weight.is_meta:
        return torch.empty_like(weight)
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return weight
    return _pack(weight, padding, shape, _strides(weight, time_stride))


def _pack(weight: Tensor, padding: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    ones = (1,) * (weight.ndim - 2)
    return cast("Tensor", torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, ones, 1, shape))


def _call_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    ones = (1,) * (x.ndim - 2)
    op = torch.ops.mkldnn._convolution_pointwise.default
    return cast("Tensor", op(x, weight, bias, padding, stride, ones, 1, "none", [], None))


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether the CPU's library packs kernels here, in this version of PyTorch, and then gives what it should."""
    if not _has_onednn() or dtype not in (torch.float32, torch.bfloat16):
        return False
    channels, padding, ones = _PACKED_CHANNELS, (0, 1, 1), (1, 1, 1)
    with torch.inference_mode():
        x = torch.linspace(-1, 1, channels * 48).view(1, channels, 3, 4, 4).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.linspace(-0.1, 0.1, channels * channels * 27).view(channels, channels, 3, 3, 3).to(dtype)
        try:
            found = _call_packed(x, _pack(weight, padding, tuple(x.shape), ones), None, padding, ones)
        except (AttributeError, RuntimeError, TypeError):  # gone, not built in, or other arguments
            return False
        return torch.allclose(found.float(), _call(x, weight, None, padding, ones).float(), rtol=0.02, atol=0.02)


def filters_of_pairs(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 2-D kernels that take the place of one with three taps in time; see :func:`paired`."""
    first, middle, last = weight.unbind(2)
    outer = first + last
    return first.contiguous(), outer.add(middle).mul_(0.5), outer.sub_(middle).mul_(0.5), last.contiguous()


def paired(
    x_BCTHW: Tensor,
    filters: tuple[Tensor, ...],
    bias: Tensor | None,
    out_BCTHW: Tensor,
    *,
    padding: tuple[int, int],
    onto: bool = False,
    fused: bool = False,
    attempt: Callable[[Callable[[], Tensor]], Tensor] = lambda step: step(),
) -> None:
    """Two output frames of a convolution with three taps in time, from four input frames, by four 2-D convolutions.

    With input frames d and taps g::

        m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    m3 = (d1 - d3) g2
        y0 = m0 + m1 + m2    y1 = m1 - m2 - m3

    of which m0 and -m3 are added last, by :func:`accumulate` if that is ``fused``.

    Sums of inputs and of taps are rounded to the dtype. In float32 the result is as near to the truth as the plain
    form; in bfloat16 its error is about twice that of the plain form.

    Args:
        x_BCTHW: four frames.
        filters: from :func:`filters_of_pairs`, packed or not.
        bias: (out channels,) or None.
        out_BCTHW: two frames, written; dense in each frame.
        padding: zeros on both sides in height and width.
        onto: add to what ``out`` holds, at the end.
        fused: see above.
        attempt: as for :func:`accumulate`.

    Source: Lavin and Gray 2016, arXiv 1509.09308, in one dimension; Winograd 1980.
    """
    d0, d1, d2, d3 = x_BCTHW.unbind(2)
    y0, y1 = out_BCTHW.unbind(2)

    def product(d: Tensor, index: int, bias: Tensor | None = None) -> Tensor:
        return attempt(lambda: convolution(d, filters[index], bias, padding=padding))

    def add(y: Tensor, d: Tensor, index: int) -> None:
        if fused:
            accumulate(y, d, filters[index], None, padding=padding, attempt=attempt)
        else:
            y.add_(product(d, index))

    d = attempt(lambda: d1 + d2)
    m1 = product(d, 1, bias)
    m2 = product(torch.sub(d2, d1, out=d), 2)
    if onto:
        s0, s1 = attempt(partial(torch.add, m1, m2)), m1.sub_(m2)
    else:
        s0, s1 = torch.add(m1, m2, out=y0), torch.sub(m1, m2, out=y1)
    del m1, m2
    add(s0, torch.sub(d0, d2, out=d), 0)
    add(s1, torch.sub(d3, d1, out=d), 3)
    if onto:
        y0.add_(s0)
        y1.add_(s1)


def pooling_filters(weight: Tensor) -> Tensor:
    """The kernel whose every second output frame is the average of two neighbouring ones of a kernel with three taps.

    With input frames d and taps g, the average of frames 0 and 1 is::

        d0 g0 / 2  +  d1 (g0 + g1) / 2  +  d2 (g1 + g2) / 2  +  d3 g2 / 2

    Taps that read the same frame are summed, in float32 or better, and rounded once.

    Args:
        weight: (out channels, C, 3, kh, kw).

    Returns:
        (out channels, C, 4, kh, kw), for :func:`convolution` with a stride of 2 in time.
    """
    first, middle, last = weight.to(torch.promote_types(weight.dtype, torch.float32)).unbind(2)
    taps = torch.stack((first, first + middle, middle + last, last), dim=2)
    return taps.mul_(0.5).to(weight.dtype, memory_format=torch.channels_last_3d)


def subpixel_filters(weight: Tensor) -> Tensor:
    """The kernels that take the place of one behind nearest-neighbour upsampling by two; see :func:`subpixel`.

    Taps that read the same pixel are summed, in float32 or better, and rounded once.

    Args:
        weight: (out channels, C, 3, 3).

    Returns:
        (4 x out channels, C, 2, 2) in channels last: for even rows and columns of the result, for even rows and odd
        columns, and so on.
    """
    first, middle, last = weight.to(torch.promote_types(weight.dtype, torch.float32)).unbind(2)
    by_rows = torch.stack((first, middle + last)), torch.stack((first + middle, last))
    phases = []
    for rows in by_rows:  # (2, out channels, C, 3)
        first, middle, last = rows.unbind(-1)
        phases += [torch.stack((first, middle + last), -1), torch.stack((first + middle, last), -1)]
    found = torch.cat([phase.permute(1, 2, 0, 3) for phase in phases])
    return found.to(weight.dtype, memory_format=torch.channels_last)


def subpixel(x_BCHW: Tensor, filters: Tensor, bias: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """``conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)`` from the smaller frame, in four phases.

    Args:
        x_BCHW: a frame, or a band of its rows.
        filters: from :func:`subpixel_filters`, packed or not.
        bias: (out channels,) or None.

    Yields:
        Row, column, and a view (B, out channels, H, W) of what belongs in every second row and column from there.

    Source: Shi et al. 2016, arXiv 1609.05158 and 1609.07009.
    """
    *_, H, W = x_BCHW.shape
    y = _call(x_BCHW, filters, None if bias is None else bias.repeat(4), (1, 1), (1, 1))
    for phase, part in enumerate(y.chunk(4, dim=1)):
        row, column = divmod(phase, 2)
        yield row, column, part[..., row : row + H, column : column + W]


def row_bands(height: int, *, halo: int, row: int, limit: int) -> list[tuple[range, range]]:
    """Cut a frame into bands: the rows that each reads, halo included, and the rows that it gives.

    Args:
        height: rows of a frame.
        halo: rows above and below that an output row depends on.
        row: elements of one row.
        limit: most elements of the rows that a band reads; a band gives at least one row.
    """
    most = height if row * height <= limit else max(1, limit // row - 2 * halo)
    num_bands = -(-height // most)
    edges = [height * i // num_bands for i in range(num_bands + 1)]
    return [(range(max(0, a - halo), min(height, b + halo)), range(a, b)) for a, b in pairwise(edges)]


def _layout(x: Tensor) -> torch.memory_format:
    if x.shape[1] > 1 and x.stride(1) == 1 and max(x.stride()[2:]) > 1:
        return torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    return torch.contiguous_format


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    # Kernels want dense input. Slices that are not are copied here, where a dry run sees it, and not within a kernel.
    x = x.contiguous(memory_format=_layout(x))
    if weight.is_mkldnn:
        return _call_packed(x, weight, bias, padding, stride)
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled() and _has_onednn():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * (x.ndim - 2), 1)
    y = (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, bias, stride=stride, padding=padding)
    if y.is_meta and _layout(x) == torch.channels_last_3d:  # its kernel forgets the layout, real ones do not
        _, C, T, H, W = y.shape
        y = y.as_strided(y.shape, (T * H * W * C, 1, H * W * C, W * C, C))
    return y

"""Norms on CUDA for tensors in channels_last_3d order: the moments of every channel, and norm, maps and SiLU at once.

The kernel behind ``torch.native_group_norm`` launches one thread block per group and video, 32 in CogVideoX, which
leaves most of a large GPU idle; and plain modules read and write a feature map once for each of norm, scale, offset
and SiLU. Here the statistics are one pass by thousands of blocks, and the rest is one more pass.

Triton is imported at the first use only; nothing in longvid needs it. Ask :func:`available` before calling the rest.
With the environment variable ``TRITON_INTERPRET=1``, set before Triton is first imported, the kernels run on a CPU:
slowly, for tests.

Axes: B batch, C channels, T time, H height, W width; lower-case t h w are those of a latent.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["apply_silu", "available", "channel_moments", "is_channels_last"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE_ELEMENTS = 2048
"Elements that a thread block works on at a time: 16 for each thread of its 4 warps"
_MOMENTS_CHANNELS = 64
"Most channels of a tile when gathering moments: 128 bytes of a row in 16-bit types, whole cache lines"
_APPLY_CHANNELS = 128
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"What rounds once says so with fma: the compiler is not to choose"
_MOMENTS_PROGRAMS = 4096
"About as many thread blocks gather moments: several for each place on the largest GPUs, and their partials are 2 MiB"


def available(x_BCTHW: Tensor) -> bool:
    """Whether the kernels can work on ``x_BCTHW``: its dtype and layout, its device, and an installation that works.

    The first call for a device compiles and runs a kernel on it (seconds), because what can be missing shows only
    then, such as the C compiler that Triton needs. A failure is a warning, once, and False from then on.
    """
    if x_BCTHW.dtype not in _DTYPES or x_BCTHW.numel() == 0 or not is_channels_last(x_BCTHW):
        return False
    if not x_BCTHW.is_cuda and not (x_BCTHW.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return importlib.util.find_spec("triton") is not None and _runs_on(x_BCTHW.device)


def is_channels_last(x_BCTHW: Tensor) -> bool:
    """Whether each video of a batch is dense in the order T H W C. Slices in time of such a tensor are."""
    if x_BCTHW.ndim != 5:
        return False
    _, C, T, H, W = x_BCTHW.shape
    # A dimension of size 1 is never stepped along: PyTorch lets its stride be anything.
    dense = zip((C, T, H, W), (1, H * W * C, W * C, C), x_BCTHW.stride()[1:], strict=True)
    return all(size == 1 or stride == expected for size, expected, stride in dense)


def channel_moments(x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over time, height and width, (B, C) each, in float32.

    One pass over x, stable for large means, and the same bits on every call. Takes about 6 MiB for a moment. The batch
    stride of x is free.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for joining parts; Welford
    1962 within a part.
    """
    _check_operand("x", x_BCTHW)
    B, C, T, H, W = x_BCTHW.shape
    num_rows = T * H * W
    block_r, block_c, channel_blocks = _tiles(C, _MOMENTS_CHANNELS)
    num_tiles = _ceil_div(_ceil_div(num_rows, block_r), max(1, _MOMENTS_PROGRAMS // (B * channel_blocks)))
    rows_each = num_tiles * block_r
    parts = _ceil_div(num_rows, rows_each)
    means_BPC = torch.empty((B, parts, C), dtype=torch.float32, device=x_BCTHW.device)
    squares_BPC = torch.empty_like(means_BPC)
    moments, _ = _kernels()
    with torch.cuda.device(x_BCTHW.get_device()):  # where Triton launches, which need not be the current device
        moments[(parts, channel_blocks, B)](
            x_BCTHW, means_BPC, squares_BPC, x_BCTHW.stride(0), num_rows, C, num_tiles,
            BLOCK_R=block_r, BLOCK_C=block_c, **_OPTIONS,
        )  # fmt: skip

    # In float64, so that joining thousands of parts adds no error. All parts are equally long except the last one.
    weight_P1 = torch.full((parts, 1), rows_each / num_rows, dtype=torch.float64, device=x_BCTHW.device)
    weight_P1[-1] = (num_rows - (parts - 1) * rows_each) / num_rows
    wide_BPC = means_BPC.double()
    mean_B1C = (wide_BPC * weight_P1).sum(dim=1, keepdim=True)
    variance_BC = squares_BPC.sum(dim=1, dtype=torch.float64).div_(num_rows)
    variance_BC += wide_BPC.sub_(mean_B1C).square_().mul_(weight_P1).sum(dim=1)
    return mean_B1C[:, 0].float(), variance_BC.float()


def apply_silu(
    x_BCTHW: Tensor,
    out_BCTHW: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    maps: tuple[Tensor, Tensor] | None = None,
    latent_frames: Sequence[int] | None = None,
) -> None:
    """Write silu(x * scale + shift) into ``out_BCTHW``, or silu((x * scale + shift) * y + b) with maps, in one pass.

    Everything is computed in float32. Below float32 each step is rounded where plain PyTorch modules round it: after
    the norm, after the product with y, after adding b, and after SiLU.

    Args:
        x_BCTHW: float32, bfloat16 or float16; see :func:`is_channels_last`.
        out_BCTHW: of x's shape and dtype and in the same order, such as a slice in time of a longer window. Its batch
            stride may differ from x's. It may be x itself; it must not overlap x otherwise.
        scale_BC: float32.
        shift_BC: float32.
        maps: y and b at the latent's size, (B, C, t, h, w) each, in x's dtype; pixel (row, column) of x reads
            (row * h // H, column * w // W). Any strides will do; channels_last_3d is read fastest.
        latent_frames: for each of the T frames of x the frame of the maps that it reads. Needed with maps.
    """
    _check_operand("x", x_BCTHW)
    _check_operand("out", out_BCTHW)
    B, C, T, H, W = x_BCTHW.shape
    if out_BCTHW.shape != x_BCTHW.shape or out_BCTHW.dtype != x_BCTHW.dtype:
        raise ValueError(f"out is {tuple(out_BCTHW.shape)} {out_BCTHW.dtype}, x {tuple(x_BCTHW.shape)} {x_BCTHW.dtype}")
    # Without maps the kernel is compiled without them, and what is passed in their place is not read.
    y = b = frames = x_BCTHW
    sizes: tuple[int, ...] = (1, 1)
    strides: tuple[int, ...] = (0,) * 10
    if maps is not None:
        y, b = maps
        # A copy this small is taken along with the command: it does not wait for the device.
        frames = torch.tensor(latent_frames, dtype=torch.int32).to(x_BCTHW.device, non_blocking=True)
        sizes, strides = y.shape[3:], (*y.stride(), *b.stride())

    block_r, block_c, channel_blocks = _tiles(C, _APPLY_CHANNELS)
    _, apply = _kernels()
    with torch.cuda.device(x_BCTHW.get_device()):
        # The first axis of a grid is the only one that may be longer than 65,535.
        apply[(_ceil_div(H * W, block_r) * channel_blocks, T, B)](
            x_BCTHW, out_BCTHW, scale_BC.contiguous(), shift_BC.contiguous(), y, b, frames,
            x_BCTHW.stride(0), out_BCTHW.stride(0), C, H, W, *sizes, *strides,
            HAS_MAPS=maps is not None, BLOCK_R=block_r, BLOCK_C=block_c, **_OPTIONS,
        )  # fmt: skip


def _check_operand(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES or not is_channels_last(x):
        raise ValueError(f"{name} is {x.dtype} with strides {x.stride()}; it must be channels_last_3d")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(num_channels: int, most: int) -> tuple[int, int, int]:
    """Rows and channels of a tile, both powers of two, and how many tiles cover the channels."""
    channels = min(1 << (num_channels - 1).bit_length(), most)
    return _TILE_ELEMENTS // channels, channels, _ceil_div(num_channels, channels)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether a kernel compiles for a device, runs on it and computes what it should."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False  # no bfloat16 there, and Triton's support of such devices comes and goes
    try:
        x = torch.arange(16.0, device=device).view(1, 1, 2, 2, 4)
        mean, variance = channel_moments(x)
        works = mean.item() == 7.5 and abs(variance.item() - 21.25) < 1e-4
        reason = f"mean {mean.item()} and variance {variance.item()} of 0 to 15"
    except torch.OutOfMemoryError:
        raise  # says nothing about Triton
    except Exception as failure:  # a missing compiler, driver or header: each has an exception of its own
        works, reason = False, f"{type(failure).__name__}: {failure}"
    if not works:
        warnings.warn(f"Triton's kernels do not work on {device}; norms use PyTorch's. {reason}", stacklevel=3)
    return works


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """Both kernels, compiled at their first launch for every combination of dtypes and constants."""
    global tl  # where Triton looks up the names that a kernel uses
    import triton
    import triton.language as tl

    # Sizes say nothing about alignment. Without this, Triton compiles anew where one is 1 or a multiple of 16.
    sizes = ["height", "width", "map_height", "map_width"]
    return (
        triton.jit(_moments_kernel, do_not_specialize=["num_rows", "num_tiles"]),
        triton.jit(_apply_kernel, do_not_specialize=sizes),
    )


# What follows is read by Triton's compiler and never run by Python (but by the interpreter). Offsets to the start of
# a tile are 64 bits wide, because a feature map can be longer than 2**31 elements; offsets within a tile are small.


def _moments_kernel(
    x_ptr: tl.tensor,
    means_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    batch_stride: tl.tensor,
    num_rows: tl.tensor,
    num_channels: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Mean and sum of squared deviations of num_tiles * BLOCK_R rows (positions in time and space) per channel."""
    part = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first_row = part.to(tl.int64) * num_tiles * BLOCK_R
    rows = tl.arange(0, BLOCK_R)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channels < num_channels
    offsets = rows[:, None] * num_channels + channels[None, :]

    # Welford's recurrence for each place of the tile on its own: threads need each other at the end only.
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    count = 0.0
    for tile in range(num_tiles):
        row = first_row + tile * BLOCK_R
        mask = (row + rows < num_rows)[:, None] & in_channels[None, :]
        start = batch * batch_stride + row * num_channels
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        count += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean = tl.fma(delta, 1.0 / count, mean)
        squares = tl.fma(delta, x - mean, squares)

    # Places of the tile see one row less where the rows end within a tile. Joined as Chan, Golub and LeVeque do.
    total = tl.minimum(num_rows - first_row, num_tiles * BLOCK_R).to(tl.int32)
    counts = ((total - rows + (BLOCK_R - 1)) // BLOCK_R).to(tl.float32)
    joined = tl.sum(mean * (counts / total.to(tl.float32))[:, None], axis=0)
    apart = mean - joined[None, :]
    squared = tl.sum(squares + apart * apart * counts[:, None], axis=0)
    place = (batch * tl.num_programs(0) + part) * num_channels + channels
    tl.store(means_ptr + place, joined, mask=in_channels)
    tl.store(squares_ptr + place, squared, mask=in_channels)


def _apply_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    y_ptr: tl.tensor,
    b_ptr: tl.tensor,
    frames_ptr: tl.tensor,
    x_batch: tl.tensor,
    out_batch: tl.tensor,
    num_channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_frame: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    b_batch: tl.tensor,
    b_channel: tl.tensor,
    b_frame: tl.tensor,
    b_row: tl.tensor,
    b_column: tl.tensor,
    HAS_MAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """BLOCK_R pixels of one frame, BLOCK_C channels of each."""
    channel_blocks = tl.cdiv(num_channels, BLOCK_C)
    first = tl.program_id(0) // channel_blocks * BLOCK_R
    t = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_R)
    pixels = first + rows
    channels = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channels < num_channels
    mask = (pixels < height * width)[:, None] & in_channels[None, :]
    start = (t.to(tl.int64) * (height * width) + first) * num_channels
    offsets = rows[:, None] * num_channels + channels[None, :]
    dtype = out_ptr.dtype.element_ty

    vector = batch * num_channels + channels
    scale = tl.load(scale_ptr + vector, mask=in_channels, other=0.0)
    shift = tl.load(shift_ptr + vector, mask=in_channels, other=0.0)
    x = tl.load(x_ptr + (batch * x_batch + start) + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.fma(x, scale[None, :], shift[None, :]).to(dtype).to(tl.float32)
    if HAS_MAPS:
        frame = tl.load(frames_ptr + t).to(tl.int64)
        row = ((pixels // width) * map_height // height).to(tl.int64)
        column = ((pixels % width) * map_width // width).to(tl.int64)
        wide = channels.to(tl.int64)
        y_place = (batch * y_batch + frame * y_frame) + row * y_row + column * y_column
        y = tl.load(y_ptr + y_place[:, None] + (wide * y_channel)[None, :], mask=mask, other=0.0).to(tl.float32)
        value = (value * y).to(dtype).to(tl.float32)
        b_place = (batch * b_batch + frame * b_frame) + row * b_row + column * b_column
        b = tl.load(b_ptr + b_place[:, None] + (wide * b_channel)[None, :], mask=mask, other=0.0).to(tl.float32)
        value = (value + b).to(dtype).to(tl.float32)
    tl.store(out_ptr + (batch * out_batch + start) + offsets, (value / (1.0 + tl.exp(-value))).to(dtype), mask=mask)

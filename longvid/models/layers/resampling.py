"""Layers that change the size of frames and their number, frame by frame.

:class:`Downsample` and :class:`Upsample` have no context: pairs of frames are averaged, frames are repeated.
:class:`CausalDownsample` and :class:`CausalUpsample` convolve along time, and leave the first frame of a video alone.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import TensorKind
from longvid.models.context import ForwardContext
from longvid.models.kernels.convolution import Conv2d, Conv3d
from longvid.models.kernels.cuts import tiles_with_halo
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.layers.window import Window

__all__ = ["CausalDownsample", "CausalUpsample", "Downsample", "Upsample"]


class Downsample(nn.Module):
    """Half the height and width by a strided convolution, and half the frames by averaging pairs if asked.

    A chunk with an odd number of frames starts with the video's first frame, which stays alone.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)
        self.time = time

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, (T + 1) // 2 or T, H / 2, W / 2)."""
        return context.attempt(partial(self._downsample, x_BCTHW, context))

    def _downsample(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        num_frames = (T + 1) // 2 if self.time else T
        out = context.buffers.take((B, C, num_frames, H // 2, W // 2), TensorKind.of(x_BCTHW))
        self.write(x_BCTHW, out, context)
        return out

    def write(self, x_BCTHW: Tensor, out_BCTHW: Tensor, context: ForwardContext) -> None:
        """Write the output into ``out_BCTHW``."""
        B, C, T, H, W = x_BCTHW.shape
        sources = [(t, t) for t in range(T)]
        if self.time:
            sources = sources[: T % 2] + [(t, t + 1) for t in range(T % 2, T, 2)]
        weight = context.weight(self.conv)
        padded = context.buffers.take((B, C, 1, H + 1, W + 1), TensorKind.of(x_BCTHW), brief=True)[:, :, 0]
        padded[:, :, H:].zero_()
        padded[:, :, :H, W:].zero_()
        inner = padded[:, :, :H, :W]
        for t, (first, second) in enumerate(sources):
            if second == first:
                inner.copy_(x_BCTHW[:, :, first])
            else:
                torch.add(x_BCTHW[:, :, first], x_BCTHW[:, :, second], out=inner).mul_(0.5)
            out_BCTHW[:, :, t].copy_(self.conv.with_weight(padded, weight))


class Upsample(nn.Module):
    """Double the height and width, and the frames if asked, by nearest neighbour; then a 2-D convolution.

    The convolution of a doubled frame is computed once and written twice. The first frame of a video stays alone.

    Args:
        channels: of the input.
        out_channels: of the output; None for as many.
        time: whether frames are doubled.
        through_float32: whether float64, and no other dtype, is rounded to float32 before it is enlarged.
    """

    def __init__(
        self, channels: int, out_channels: int | None = None, *, time: bool, through_float32: bool = False
    ) -> None:
        super().__init__()
        self.through_float32 = through_float32
        self.conv = Conv2d(channels, out_channels or channels, 3, padding=1)
        self.time = time

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, out, T, 2 T - 1 or 2 T, 2 H, 2 W)."""
        return context.attempt(partial(self._upsample, x_BCTHW, context))

    def _upsample(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        T = x_BCTHW.shape[2]
        copies = [1] * T if not self.time or T == 1 else [1] * (T % 2) + [2] * (T - T % 2)
        out = self.take(x_BCTHW, sum(copies), context)
        if x_BCTHW.is_meta and context.limits.tile_elements is not None:
            copies = copies[:2]  # all others allocate and free the same
        done = 0
        for t, count in enumerate(copies):
            self.write(x_BCTHW[:, :, t], out[:, :, done : done + count], context)
            done += count
        return out

    def take(self, x_BCTHW: Tensor, num_frames: int, context: ForwardContext) -> Tensor:
        """Memory for so many frames of the output."""
        B, _, _, H, W = x_BCTHW.shape
        shape = (B, self.conv.out_channels, num_frames, 2 * H, 2 * W)
        return context.buffers.take(shape, TensorKind.of(x_BCTHW))

    def write(self, x_BCHW: Tensor, out_BCTHW: Tensor, context: ForwardContext) -> None:
        """Write what becomes of one frame into each frame of ``out_BCTHW``."""
        B, C, H, W = x_BCHW.shape
        # An enlarged tile is four times as large as its source, and as large as its result.
        limits, weight = context.limits, context.weight(self.conv)
        limit = min(limits.conv_elements, limits.slice_elements, limits.tile_elements or limits.conv_elements) // 4
        row = B * W * max(C, self.conv.out_channels)
        tiles = tiles_with_halo(H, halo=1, row=row, limit=limit)
        if x_BCHW.is_meta and limits.tile_elements is not None:
            tiles = [*tiles[:2], *tiles[2:][-2:]]
        for read, rows in tiles:
            source = x_BCHW[:, :, read.start : read.stop]
            if self.through_float32 and source.dtype == torch.float64:
                source = source.float().double()
            tile = self.conv.with_weight(F.interpolate(source, scale_factor=2.0, mode="nearest"), weight)
            first, last = rows.start - read.start, rows.stop - read.start
            out_BCTHW[:, :, :, 2 * rows.start : 2 * rows.stop].copy_(tile[:, :, None, 2 * first : 2 * last])


class CausalDownsample(nn.Module):
    """Half the height and width by :class:`Downsample`, then half the frames by a convolution over three of them.

    The first frame of a video is not convolved, and is what stands before the others. The context is one frame.

    Source: Wan, 2025, arXiv 2503.20314.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.context_frames = 1
        self.initial_context: Literal["repeat", "zeros"] = "repeat"
        self.space = Downsample(channels, time=False)
        self.time_conv = Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, T / 2, H / 2, W / 2); where a video starts, of an odd T, (T + 1) / 2 frames."""
        first = context.at_start
        with Window(self, context, like=x_BCTHW[..., ::2, ::2]) as window:
            context.attempt(partial(self.space.write, x_BCTHW, window.new, context))
            frames = window.input()
            if not first:
                return context.attempt(partial(self._halve, frames, context))
            # In front stands the first frame once more.
            return context.attempt(partial(self._start, frames[:, :, 1:], context))

    def _start(self, frames_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        B, C, T, H, W = frames_BCTHW.shape
        out = context.buffers.take((B, C, (T + 1) // 2, H, W), TensorKind.of(frames_BCTHW))
        out[:, :, 0].copy_(frames_BCTHW[:, :, 0])
        if T > 1:
            out[:, :, 1:].copy_(self._halve(frames_BCTHW, context))
        return out

    def _halve(self, frames_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        return self.time_conv.with_weight(frames_BCTHW, context.weight(self.time_conv))


class CausalUpsample(nn.Module):
    """Double the frames by a convolution over three of them, then height and width by :class:`Upsample`.

    The first frame of a video stays alone: it is not convolved, and is not among the frames that the others see.

    Args:
        channels: of the input.
        out_channels: of the output.

    Source: Wan, 2025, arXiv 2503.20314.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), initial_context="zeros")
        self.space = Upsample(channels, out_channels, time=False, through_float32=True)

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, out, 2 T, 2 H, 2 W); where a video starts, 2 T - 1 frames."""
        C, alone = x_BCTHW.shape[1], int(context.at_start)
        later = x_BCTHW[:, :, alone:]
        if later.shape[2]:
            doubled = self.time_conv(later, context)
            sources = [pair[:, :, t] for t in range(later.shape[2]) for pair in doubled.split(C, dim=1)]
        else:
            sources = []
            with Window(self.time_conv, context, like=later):
                pass  # no layer misses a chunk: zeros are its context
        return context.attempt(partial(self._upsample, x_BCTHW, [x_BCTHW[:, :, 0]] * alone + sources, context))

    def _upsample(self, x_BCTHW: Tensor, sources_BCHW: list[Tensor], context: ForwardContext) -> Tensor:
        out = self.space.take(x_BCTHW, len(sources_BCHW), context)
        for t, source in enumerate(sources_BCHW):
            self.space.write(source, out[:, :, t : t + 1], context)
        return out

"""Downsample and Upsample: layers that change the size of frames and their number, frame by frame.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import TensorKind
from longvid.models.context import ForwardContext
from longvid.models.kernels.convolution import Conv2d
from longvid.models.kernels.cuts import tiles_with_halo

__all__ = ["Downsample", "Upsample"]


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
        return context.attempt(partial(self._downsample, x_BCTHW, context, context.weight(self.conv)))

    def _downsample(self, x_BCTHW: Tensor, context: ForwardContext, weight: Tensor) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        sources = [(t, t) for t in range(T)]
        if self.time:
            sources = sources[: T % 2] + [(t, t + 1) for t in range(T % 2, T, 2)]
        kind = TensorKind.of(x_BCTHW)
        out = context.buffers.take((B, C, len(sources), H // 2, W // 2), kind)
        padded = context.buffers.take((B, C, 1, H + 1, W + 1), kind, brief=True)[:, :, 0]
        padded[:, :, H:].zero_()
        padded[:, :, :H, W:].zero_()
        inner = padded[:, :, :H, :W]
        for t, (first, second) in enumerate(sources):
            if second == first:
                inner.copy_(x_BCTHW[:, :, first])
            else:
                torch.add(x_BCTHW[:, :, first], x_BCTHW[:, :, second], out=inner).mul_(0.5)
            out[:, :, t].copy_(self.conv.with_weight(padded, weight))
        return out


class Upsample(nn.Module):
    """Double the height and width, and the frames if asked, by nearest neighbour; then a 2-D convolution.

    The convolution of a doubled frame is computed once and written twice. The first frame of a video stays alone.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)
        self.time = time

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, T, 2 T - 1 or 2 T, 2 H, 2 W)."""
        return context.attempt(partial(self._upsample, x_BCTHW, context, context.weight(self.conv)))

    def _upsample(self, x_BCTHW: Tensor, context: ForwardContext, weight: Tensor) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        copies = [1] * T if not self.time or T == 1 else [1] * (T % 2) + [2] * (T - T % 2)
        out = context.buffers.take((B, C, sum(copies), 2 * H, 2 * W), TensorKind.of(x_BCTHW))
        # An enlarged tile is four times as large as its source, and as large as its result.
        limits = context.limits
        limit = min(limits.conv_elements, limits.slice_elements, limits.tile_elements or limits.conv_elements) // 4
        tiles = tiles_with_halo(H, halo=1, row=B * C * W, limit=limit)
        if x_BCTHW.is_meta and limits.tile_elements is not None:
            copies, tiles = copies[:2], [*tiles[:2], *tiles[2:][-2:]]  # all others allocate and free the same
        done = 0
        for t, count in enumerate(copies):
            for read, rows in tiles:
                enlarged = F.interpolate(x_BCTHW[:, :, t, read.start : read.stop], scale_factor=2.0, mode="nearest")
                tile = self.conv.with_weight(enlarged, weight)
                first, last = rows.start - read.start, rows.stop - read.start
                target = out[:, :, done : done + count, 2 * rows.start : 2 * rows.stop]
                target.copy_(tile[:, :, None, 2 * first : 2 * last])
            done += count
        return out

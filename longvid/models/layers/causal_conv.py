"""CausalConv3d: the layer that causal video VAEs are built from.

Four rules keep memory low.

1. What feeds a causal convolution is a :class:`~longvid.models.layers.norms.Producer`, which writes into that
   convolution's window.
2. A convolution may run in blocks, slices of frames and row tiles, through a window that moves over the input. Beside
   the input and the output of a layer only one block is alive, and it may fit a cache of the processor.
3. What works frame by frame (resampling, 1x1 shortcuts) does so in a loop over frames, so its temporaries are one frame
   large.
4. What takes memory and is harmless to repeat is called through
   :meth:`~longvid.models.context.ForwardContext.attempt`, so that a device that runs out of memory is survived.

The layers are for inference: they write in place and are not differentiable. The exception is
:meth:`CausalConv3d.whole`, which small models that are trained here are built on.

The memory layout of the input (contiguous or channels last) is that of everything within and of the output.

Axes: B batch, C channels, T time, H height, W width; lower-case t h w are those of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import TensorKind, dense_within, layout_of
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext
from longvid.models.kernels.convolution import MAX_ELEMENTS, Conv3d, accumulate, convolution, packed
from longvid.models.kernels.cuts import even_parts, row_tiles
from longvid.models.kernels.winograd import two_frames, winograd_filters
from longvid.models.layers.norms import Producer
from longvid.models.layers.window import Block, Window

__all__ = ["CausalConv3d"]

_LEAST_WINOGRAD_CHANNELS = 16
_LEAST_TILE_ROWS = 16
"a tile that is meant to save time has at least this many rows; calls of fewer rows cost more than a cache gives back"


class CausalConv3d(nn.Module):
    """A 3-D convolution whose output at frame t sees input frames up to t only.

    Height and width keep their size (zero padding). In time the k - 1 frames before the chunk come from the
    :class:`~longvid.models.cache.ConvCache`; in front of the first frame of a video stands that frame again
    (``initial_context="repeat"``) or zeros.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps in time, height and width; one number for all three. Odd in height and width.
        bias: whether the convolution adds a bias.
        initial_context: see above.

    Source: CogVideoX, Yang et al. 2024, arXiv 2408.06072, section 2.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        bias: bool = True,
        initial_context: Literal["repeat", "zeros"] = "repeat",
    ) -> None:
        super().__init__()
        kt, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        if kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"kernel size {kernel_size} is even in height or width; the size would not be kept")
        self.context_frames = kt - 1
        self.initial_context = initial_context
        self.conv = Conv3d(in_channels, out_channels, (kt, kh, kw), padding=(0, kh // 2, kw // 2), bias=bias)

    def forward(self, x_BCTHW: Tensor, context: ForwardContext | ConvCache) -> Tensor:
        """Convolve T new frames into T output frames. Prefer :meth:`stream`, which needs no copy of them."""
        context = ForwardContext.of(context)
        if self.context_frames == 0:
            weight = context.weight(self.conv)
            return context.attempt(lambda: self._convolve(x_BCTHW, weight, context.limits.conv_elements))
        return self.stream(Producer(x_BCTHW), context)

    def whole(self, x_BCTHW: Tensor) -> Tensor:
        """Convolve a whole video at once, without a cache. Differentiable; for training."""
        if self.context_frames:
            first = x_BCTHW[:, :, :1] if self.initial_context == "repeat" else torch.zeros_like(x_BCTHW[:, :, :1])
            x_BCTHW = torch.cat([first] * self.context_frames + [x_BCTHW], dim=2)
        return self._convolve(x_BCTHW, self.conv.weight, MAX_ELEMENTS)

    def blocks(self, source: Producer, context: ForwardContext) -> list[Block]:
        """The blocks that this layer runs in for what ``source`` writes, tile by tile within each slice."""
        like, limits = source.like, context.limits
        B, C, T, H, W = like.shape
        area, out_channels = B * H * W, self.conv.out_channels
        longest = min(
            limits.conv_elements // (area * C) - self.context_frames,
            limits.conv_elements // (area * out_channels),
            limits.slice_elements // (area * max(C, out_channels)),
        )
        slices = even_parts(T, longest, multiple=2 if self._uses_winograd(like, context) else 1)
        longest = max(map(len, slices))
        row = B * W * max((longest + self.context_frames) * C, longest * out_channels)
        halo, most = self.conv.kernel_size[1] // 2, H
        # Kernels for other layouts may sum in another order where no zeros are padded, and those that are flat in space
        # are computed as another convolution, which does.
        if layout_of(like) == torch.channels_last_3d and halo:
            if limits.tile_elements is not None and row * H > limits.tile_elements:
                most = min(H, max(_LEAST_TILE_ROWS, limits.tile_elements // row - 2 * halo))
            if row * H > limits.conv_elements:
                most = min(most, max(1, limits.conv_elements // row - 2 * halo))
        tiles = [range(H)] if most == H else row_tiles(H, most, halo=halo, multiple=source.row_step)
        return [Block(frames, rows) for frames in slices for rows in tiles]

    def _uses_winograd(self, like: Tensor, context: ForwardContext) -> bool:
        """Not for thin layers, which gain nothing, nor in other layouts, whose frames are not dense."""
        return (
            context.numerics.paired_frames
            and self.conv.kernel_size[0] == 3
            and min(self.conv.in_channels, self.conv.out_channels) >= _LEAST_WINOGRAD_CHANNELS
            and layout_of(like) == torch.channels_last_3d
        )

    def stream(
        self,
        source: Producer,
        context: ForwardContext,
        *,
        onto: Tensor | None = None,
        finish: Callable[[Block, Tensor], None] | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Convolve what ``source`` writes, block by block, into T output frames in the layout of the input.

        Args:
            source: released as soon as nothing reads from it any more.
            context: its limits decide what the blocks are.
            onto: a residual in the shape of the output: the output is added to it in place, and it is returned.
            finish: called with each block of the output, such as to add a residual that has yet to be computed.
            overwrite: the output may take the place of what the source reads, if it is in blocks and of that shape.
        """
        like = source.like
        B, C, T, H, W = like.shape
        blocks, winograd = self.blocks(source, context), self._uses_winograd(like, context)
        take = partial(context.buffers.take, (B, self.conv.out_channels, T, H, W), TensorKind.of(like))
        out = onto
        if out is None and len(blocks) > 1:
            out = like if overwrite and self.conv.out_channels == C else context.attempt(take)
        with Window(self, context, like=like, blocks=blocks, halo=self.conv.kernel_size[1] // 2) as window:
            conv = _BlockConv(self, window, context, like, tiled=len(blocks[0].rows) < H, winograd=winograd)
            del like
            for block in window.blocks():
                if window.rows:  # a last row may have been read as the one below the others
                    context.attempt(partial(source.write, block.frames, window.rows, window.new))
                if block is blocks[-1]:
                    source.release()
                if winograd and out is None:
                    out = context.attempt(take)
                frames, rows = (slice(r.start, r.stop) for r in (block.frames, block.rows))
                part = conv(None if out is None else out[:, :, frames, rows], onto=onto is not None)
                if finish is not None:
                    finish(block, part)
                if out is None:
                    return part
                del part
        assert out is not None
        return out

    def convolve(self, window: Window, context: ForwardContext) -> Tensor:
        """Convolve a window of whole frames whose new frames are written."""
        x, weight = window.input(), context.weight(self.conv)
        return context.attempt(lambda: self._convolve(x, weight, context.limits.conv_elements))

    def _convolve(self, x: Tensor, weight: Tensor, limit: int) -> Tensor:
        """The convolution, without padding in time, in parts of at most ``limit`` elements where that is possible.

        A kernel that is flat in time or in space runs as the 2-D convolution that it is: on a CPU PyTorch's 3-D one
        is up to ten times slower for small float32 inputs (channels x frames x height up to 20,480).
        """
        kt, kh, kw = self.conv.kernel_size
        bias = self.conv.bias
        if (kt == 1) != (kh * kw == 1):
            if weight.dtype == x.dtype:
                return self._flat(x, weight, bias)
            return self._flat(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
        own = self.conv if weight is self.conv.weight else None
        return convolution(x, weight, bias, padding=(0, kh // 2, kw // 2), limit=limit, call=own)

    def _flat(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kt, kh, kw = self.conv.kernel_size
        B, _, T, H, W = x.shape
        if kt == 1:
            frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, padding=(kh // 2, kw // 2))
            return frames.view(B, T, -1, H, W).transpose(1, 2)
        return F.conv2d(x.flatten(3), weight[..., 0], bias).view(B, -1, T - kt + 1, H, W)


class _BlockConv:
    """The convolution of one layer's window, block by block, two frames at a time with ``winograd``.

    Blocks that are row tiles have the rows above and below them in the window.
    """

    def __init__(
        self, layer: CausalConv3d, window: Window, context: ForwardContext, like: Tensor, *, tiled: bool, winograd: bool
    ) -> None:
        self._layer, self._window, self._context = layer, window, context
        self._tiled, self._winograd = tiled, winograd
        conv, last = layer.conv, layout_of(like) == torch.channels_last_3d
        _, kh, kw = conv.kernel_size
        self._padding = (0 if tiled else kh // 2, kw // 2)
        widens = context.widens(like.dtype)
        self._fuses = context.numerics.fused_residuals and last and not widens
        self._packs = context.limits.tile_elements is not None and last and kh > 1
        self._memory: Tensor | None = None
        "for blocks of the output that are not dense where they belong"
        B, C, _, H, W = window.shape
        shape, padding = ((B, C, H, W), self._padding) if winograd else (window.shape, (0, *self._padding))

        def prepare() -> tuple[Tensor, ...]:
            weight = conv.weight.detach().float() if widens else conv.weight
            weights = winograd_filters(weight) if winograd else (weight,)
            return tuple(packed(w, padding, shape) for w in weights) if self._packs else weights

        changes = winograd or widens or self._packs
        self._weights = context.prepared(layer, prepare) if changes else (conv.weight,)

    def __call__(self, out: Tensor | None, *, onto: bool) -> Tensor:
        """The output of the block that is in the window: new, written into ``out``, or added ``onto`` what is there."""
        x = self._window.input()
        if not self._winograd or out is None:
            return self._write(out, x, self._weights[0], onto)
        pairs = range(0, out.shape[2] - 1, 2)
        # A dry run of tiles, which counts no FLOPs, needs one pair: all of them allocate and free the same.
        for t in pairs[:1] if x.is_meta and self._context.limits.tile_elements is not None else pairs:
            target = out[:, :, t : t + 2]
            frames = two_frames(
                x[:, :, t : t + 4],
                self._weights,
                self._layer.conv.bias,
                None if onto else target,
                padding=self._padding,
                fused=self._fuses,
                attempt=self._context.attempt,
            )
            if onto:
                target[:, :, 0].add_(frames[0])
                target[:, :, 1].add_(frames[1])
            del frames
        if out.shape[2] % 2:
            self._write(out[:, :, -1:], x[:, :, -3:], self._context.weight(self._layer.conv), onto)
        return out

    def _write(self, out: Tensor | None, x: Tensor, weight: Tensor, onto: bool) -> Tensor:
        if out is None or not (onto and self._fuses):
            y = self._context.attempt(lambda: self._convolve(x, weight))
            if out is None:
                return y
            return out.add_(y) if onto else out.copy_(y)
        # In tiles by way of a copy that is dense, since one call for all frames takes less than one for each.
        copies = self._packs and len(out) == 1 and not out.is_contiguous(memory_format=torch.channels_last_3d)
        target = self._dense(out).copy_(out) if copies else out
        padding, bias = (0, *self._padding), self._layer.conv.bias
        accumulate(target, x, weight, bias, padding=padding, attempt=self._context.attempt)
        return out.copy_(target) if copies else out

    def _dense(self, out: Tensor) -> Tensor:
        """A dense tensor of the same shape, which a kernel writes without leaps; the same memory for every block."""
        B, C, T, H, W = out.shape
        if self._memory is None:
            largest = self._window.shape
            rows_around = self._layer.conv.kernel_size[1] - 1 if self._tiled else 0
            shape = (B, C, largest[2] - self._layer.context_frames, largest[3] - rows_around, W)
            take = partial(self._context.buffers.take, shape, TensorKind.of(out), brief=True)
            self._memory = self._context.attempt(take)
        return dense_within(self._memory, (B, C, T, H, W))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._tiled and not weight.is_mkldnn:
            return self._layer._convolve(x, weight, self._context.limits.conv_elements)
        # A tile is within the limits of one call, and pads no rows, as parts would.
        return convolution(x, weight, self._layer.conv.bias, padding=(0, *self._padding))

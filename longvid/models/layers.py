"""The layers that causal video VAEs are built from.

Three rules keep memory low. What feeds a causal convolution is a :class:`~longvid.models.norms.Producer`, which writes
into that convolution's window. A convolution may run in blocks, slices of frames and bands of rows, through a window
that moves on, so that beside the input and the output of a layer only one block is alive; if it fits a cache of the
processor, so does everything between the two. What works frame by frame (resampling, 1x1 shortcuts) does so in a loop
over frames, so its temporaries are one frame large.

A fourth rule makes a device that runs out of memory survivable: what takes memory, and is harmless to repeat if there
is none, is called through :meth:`~longvid.models.cache.ConvCache.attempt`.

The layers are for inference: they write in place and are not differentiable. The exception is
:meth:`CausalConv3d.whole`, which small models that are trained here are built on.

Whatever memory layout comes in (contiguous or channels last) is that of everything within and of what goes out.

Axes: B batch, C channels, T time, H height, W width; lower-case t h w are those of a latent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import TensorKind, dense_within, layout_of
from longvid.models.cache import Block, ConvCache, Window
from longvid.models.convolution import (
    Conv2d,
    Conv3d,
    accumulate,
    convolution,
    filters_of_pairs,
    packed,
    paired,
    pooling_filters,
    row_bands,
    subpixel,
    subpixel_filters,
)
from longvid.models.norms import GroupNormSiLU, Producer, SpatialNormSiLU

__all__ = ["CausalConv3d", "Downsample", "ResnetBlock", "Upsample", "bands", "time_slices"]

_LEAST_PAIRED_CHANNELS = 16
_LEAST_BAND_ROWS = 16
"of a band that is meant to save time; calls of fewer cost more than a cache gives back"

Finish: TypeAlias = Callable[[Block, Tensor], None]
"""Changes a block of the output in place, knowing which it is."""


def time_slices(
    num_frames: int,
    *,
    context_frames: int,
    in_frame: int,
    out_frame: int,
    window_limit: int,
    slice_limit: int,
    multiple: int = 1,
    lead: int = 0,
) -> list[range]:
    """Cut the output frames of a causal convolution into slices.

    The slice for output frames ``[a, b)`` reads input frames ``[a - context_frames, b)``, so none is ever shorter than
    the kernel, however large a frame is.

    Args:
        num_frames: output frames.
        context_frames: kernel size in time minus 1.
        in_frame: elements of one input frame, batch and channels included.
        out_frame: elements of one output frame, likewise.
        window_limit: most elements of a slice's input, context included, and of its output.
        slice_limit: most elements of a slice's new input frames and of its output.
        multiple: all slices but the last end with a multiple of this many frames, whatever the limits say.
        lead: frames in front of the first multiple.
    """
    longest = min(
        window_limit // in_frame - context_frames,
        window_limit // out_frame,
        slice_limit // max(in_frame, out_frame),
    )
    shift = -lead % multiple
    num_steps = -(-(num_frames + shift) // multiple)
    num_slices = -(-num_steps // max(1, longest // multiple))
    edges = [0, *(num_steps * i // num_slices * multiple - shift for i in range(1, num_slices)), num_frames]
    return [range(a, b) for a, b in pairwise(edges)]


def bands(height: int, most: int, *, halo: int, step: int) -> list[range]:
    """Cut the rows of a frame into bands of at most ``most`` rows.

    What they read in turn, up to ``halo`` rows below each, ends at multiples of ``step``, or with the frame. Between
    the first and the last all are of one height: another one costs a copy of the window.
    """
    rows = max(step, most // step * step)
    edges = [0, *range(rows - halo, height, rows), height] if rows > halo else [*range(0, height, rows), height]
    return [range(a, b) for a, b in pairwise(edges)]


class _Copied:
    """A convolution's input that exists already."""

    row_step = 1

    def __init__(self, x_BCTHW: Tensor) -> None:
        self.like = x_BCTHW

    def write(self, frames: range, rows: range, out_BCTHW: Tensor) -> None:
        out_BCTHW.copy_(self.like[:, :, frames.start : frames.stop, rows.start : rows.stop])

    def release(self) -> Tensor:
        return self.like


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

    def forward(self, x_BCTHW: Tensor, cache: ConvCache) -> Tensor:
        """Convolve T new frames into T output frames. Prefer :meth:`stream`, which needs no copy of them."""
        if self.context_frames == 0:
            return cache.attempt(lambda: self._conv(x_BCTHW, cache.max_conv_elements))
        return self.stream(_Copied(x_BCTHW), cache)

    def whole(self, x_BCTHW: Tensor) -> Tensor:
        """Convolve a whole video at once, without a cache. Differentiable; for training."""
        if self.context_frames:
            first = x_BCTHW[:, :, :1] if self.initial_context == "repeat" else torch.zeros_like(x_BCTHW[:, :, :1])
            x_BCTHW = torch.cat([first] * self.context_frames + [x_BCTHW], dim=2)
        return self._conv(x_BCTHW, 2**31 - 1)

    def blocks(self, source: Producer, cache: ConvCache, *, pool: bool = False) -> list[Block]:
        """The blocks that this layer runs in for what ``source`` writes, band by band within each slice.

        If it pools, no two frames that are averaged are in different ones.
        """
        like = source.like
        B, C, T, H, W = like.shape
        slices = time_slices(
            T,
            context_frames=self.context_frames,
            in_frame=B * C * H * W,
            out_frame=B * self.conv.out_channels * H * W,
            window_limit=cache.max_conv_elements,
            slice_limit=cache.slice_elements,
            multiple=2 if pool or self._pairs(like, cache) else 1,
            lead=T % 2 if pool else 0,
        )
        longest = max(map(len, slices))
        row = B * W * max((longest + self.context_frames) * C, longest * self.conv.out_channels)
        halo, most = self.conv.kernel_size[1] // 2, H
        # Kernels for other layouts may sum in another order where no zeros are padded, and those that are flat in space
        # are computed as another convolution, which does.
        if layout_of(like) == torch.channels_last_3d and halo:
            if cache.band_elements is not None and row * H > cache.band_elements:
                most = min(H, max(_LEAST_BAND_ROWS, cache.band_elements // row - 2 * halo))
            if row * H > cache.max_conv_elements:
                most = min(most, max(1, cache.max_conv_elements // row - 2 * halo))
        found = [range(H)] if most == H else bands(H, most, halo=halo, step=source.row_step)
        return [Block(frames, rows) for frames in slices for rows in found]

    def _pairs(self, like: Tensor, cache: ConvCache) -> bool:
        """Whether frames are convolved in pairs: thin layers gain nothing, and other layouts have no dense frames."""
        return (
            cache.numerics.paired_frames
            and self.conv.kernel_size[0] == 3
            and min(self.conv.in_channels, self.conv.out_channels) >= _LEAST_PAIRED_CHANNELS
            and layout_of(like) == torch.channels_last_3d
        )

    def stream(
        self,
        source: Producer,
        cache: ConvCache,
        *,
        onto: Tensor | None = None,
        finish: Finish | None = None,
        overwrite: bool = False,
        pool: bool = False,
    ) -> Tensor:
        """Convolve what ``source`` writes, block by block, into T output frames. All blocks give the same.

        Args:
            source: writes the input into the window; let go of as soon as nothing reads from it any more.
            cache: of the video; its limits say what blocks are.
            onto: a residual in the shape of the output: the output is added to it in place, and it is returned.
            finish: changes the output of a block in place, before it is stored: the place of a residual that has yet
                to be computed.
            overwrite: the output may take the place of what the source reads, if it is in blocks and its frames are
                of the same shape. Blocks of the output then overwrite what the source has read.
            pool: give the averages of output frames in pairs, of which the first one of an odd number is not part.

        Returns:
            (B, out_channels, T, H, W) in the layout of the input; (T + 1) // 2 frames if pooled.
        """
        like = source.like
        B, C, T, H, W = like.shape
        num_frames = (T + 1) // 2 if pool else T
        kind, shape = TensorKind.of(like), (B, self.conv.out_channels, num_frames, H, W)
        blocks, in_pairs = self.blocks(source, cache, pool=pool), not pool and self._pairs(like, cache)
        out = onto
        if out is None and (len(blocks) > 1 or pool):
            reuse = overwrite and self.conv.out_channels == C
            out = like[:, :, :num_frames] if reuse else cache.attempt(partial(cache.buffers.take, shape, kind))
        halo = self.conv.kernel_size[1] // 2
        with cache.window(self, like=like, blocks=blocks, halo=halo) as window:
            banded = len(blocks[0].rows) < H
            conv = _BlockConv(self, window, cache, like, banded=banded, in_pairs=in_pairs, pool=pool)
            del like
            for block in window.blocks():
                if window.rows:  # a last row may have been read as the one below the others
                    cache.attempt(partial(source.write, block.frames, window.rows, window.new))
                if block is blocks[-1]:
                    source.release()
                if in_pairs and out is None:
                    out = cache.attempt(partial(cache.buffers.take, shape, kind))
                if out is None:
                    part = conv.fresh()
                else:
                    if pool:
                        block = Block(range((block.frames.start + 1) // 2, (block.frames.stop + 1) // 2), block.rows)
                    part = out[:, :, block.frames.start : block.frames.stop, block.rows.start : block.rows.stop]
                    conv.write_to(part, onto=onto is not None)
                if finish is not None:
                    finish(block, part)
                if out is None:
                    return part
                del part
        assert out is not None
        return out

    def convolve(self, window: Window) -> Tensor:
        """Convolve a window of whole frames whose new frames are written."""
        x = window.input()
        return window.attempt(lambda: self._conv(x, window.max_conv_elements))

    def _conv(self, x: Tensor, limit: int) -> Tensor:
        """The convolution, without padding in time, in parts of at most ``limit`` elements where that can be.

        A kernel that is flat in time or in space runs as the 2-D convolution that it is: on a CPU PyTorch's 3-D one
        is up to ten times slower for small float32 inputs (channels x frames x height up to 20,480).
        """
        kt, kh, kw = self.conv.kernel_size
        weight, bias = self.conv.weight, self.conv.bias
        B, _, T, H, W = x.shape
        if kt == 1 and kh * kw > 1:
            frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, padding=(kh // 2, kw // 2))
            return frames.view(B, T, -1, H, W).transpose(1, 2)
        if kt > 1 and kh * kw == 1:
            return F.conv2d(x.flatten(3), weight[..., 0], bias).view(B, -1, T - kt + 1, H, W)
        return self.conv.in_parts(x, limit)


class _BlockConv:
    """The convolution of one layer's window, block by block.

    Args:
        layer: whose convolution it is.
        window: what it reads.
        cache: that the window is of.
        like: what the layer's input is like.
        banded: whether blocks are bands of rows, which have the rows above and below them in the window.
        in_pairs: whether frames are convolved in pairs.
        pool: whether averages over pairs of frames are computed.
    """

    def __init__(
        self,
        layer: CausalConv3d,
        window: Window,
        cache: ConvCache,
        like: Tensor,
        *,
        banded: bool,
        in_pairs: bool,
        pool: bool,
    ) -> None:
        self._layer, self._window, self._cache, self._in_pairs, self._pool = layer, window, cache, in_pairs, pool
        conv, last = layer.conv, layout_of(like) == torch.channels_last_3d
        _, kh, kw = conv.kernel_size
        self._padding = (0 if banded else kh // 2, kw // 2)
        self._fuses = cache.numerics.fused_residuals and last
        self._in_bands = cache.band_elements is not None and last and kh > 1
        self._memory: Tensor | None = None
        "of blocks of the output that are not dense where they belong"
        B, C, T, H, W = window.shape
        rows_around = kh - 1 if banded else 0
        self._largest = (B, conv.out_channels, T - layer.context_frames, H - rows_around, W)
        self._weights: tuple[Tensor, ...] = (conv.weight,)
        if in_pairs or pool or self._in_bands:
            shape, padding = ((B, C, H, W), self._padding) if in_pairs else ((B, C, T, H, W), (0, *self._padding))
            self._weights = cache.kernels(layer, partial(self._prepared, shape, padding))
        self._is_plain = self._weights[0] is conv.weight and not banded

    def _prepared(self, shape: tuple[int, ...], padding: tuple[int, ...]) -> tuple[Tensor, ...]:
        weight = self._layer.conv.weight
        weights: tuple[Tensor, ...] = (weight,)
        if self._in_pairs:
            weights = filters_of_pairs(weight)
        elif self._pool:
            weights = (pooling_filters(weight),)
        time_stride = 2 if self._pool else 1
        return tuple(packed(w, padding, shape, time_stride) for w in weights) if self._in_bands else weights

    def fresh(self) -> Tensor:
        """The output of the block that is in the window."""
        x = self._window.input()
        return self._cache.attempt(lambda: self._convolve(x, self._weights[0]))

    def write_to(self, out: Tensor, *, onto: bool = False) -> None:
        """Write it, or add it to what is there."""
        x = self._window.input()
        if self._pool:
            self._write_averages(out, x, onto)
            return
        if not self._in_pairs:
            self._write(out, x, self._weights[0], onto)
            return
        for t in range(0, out.shape[2] - 1, 2):
            paired(
                x[:, :, t : t + 4],
                self._weights,
                self._layer.conv.bias,
                out[:, :, t : t + 2],
                padding=self._padding,
                onto=onto,
                fused=self._fuses,
                attempt=self._cache.attempt,
            )
        if out.shape[2] % 2:
            self._write(out[:, :, -1:], x[:, :, -3:], self._layer.conv.weight, onto)

    def _write_averages(self, out: Tensor, x: Tensor, onto: bool) -> None:
        lead = x.shape[2] % 2  # the window has two frames more than the block
        if lead:
            self._write(out[:, :, :1], x[:, :, :3], self._layer.conv.weight, onto)
        if out.shape[2] > lead:
            self._write(out[:, :, lead:], x[:, :, lead:], self._weights[0], onto, time_stride=2)

    def _write(self, out: Tensor, x: Tensor, weight: Tensor, onto: bool, time_stride: int = 1) -> None:
        if onto and self._fuses:
            self._accumulate(out, x, weight, time_stride)
            return
        y = self._cache.attempt(lambda: self._convolve(x, weight, time_stride))
        if onto:
            out.add_(y)
        else:
            out.copy_(y)

    def _accumulate(self, out: Tensor, x: Tensor, weight: Tensor, time_stride: int) -> None:
        """In bands by way of a copy that is dense, since one call for all frames takes less than one for each."""
        as_it_is = len(out) > 1 or out.is_contiguous(memory_format=torch.channels_last_3d) or not self._in_bands
        target = out if as_it_is else self._dense(out).copy_(out)
        padding = (0, *self._padding)
        bias, attempt = self._layer.conv.bias, self._cache.attempt
        accumulate(target, x, weight, bias, padding=padding, time_stride=time_stride, attempt=attempt)
        if target is not out:
            out.copy_(target)

    def _dense(self, out: Tensor) -> Tensor:
        """A dense tensor of the same shape, which a kernel writes without leaps; the same memory for every block."""
        B, C, T, H, W = out.shape
        if self._memory is None:
            take = partial(self._cache.buffers.take, self._largest, TensorKind.of(out), brief=True)
            self._memory = self._cache.attempt(take)
        return dense_within(self._memory, (B, C, T, H, W))

    def _convolve(self, x: Tensor, weight: Tensor, time_stride: int = 1) -> Tensor:
        if self._is_plain:
            return self._layer._conv(x, self._window.max_conv_elements)
        # A band is within the limits of one call, and pads no rows, as parts would.
        padding = (0, *self._padding)
        return convolution(
            x, weight, self._layer.conv.bias, padding=padding, time_stride=time_stride, limit=sys.maxsize
        )


class ResnetBlock(nn.Module):
    """norm, SiLU, causal conv, twice, plus the input or its 1x1 projection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_groups: groups of the norms.
        eps: epsilon of plain norms.
        latent_channels: channels of the latent that steers the norms; None for plain ones.
        pools: whether a :class:`Downsample` follows that halves the frames. With ``fused_pooling``, this block gives
            their averages.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_groups: int,
        eps: float,
        latent_channels: int | None = None,
        pools: bool = False,
    ) -> None:
        super().__init__()
        self.pools = pools

        def norm(channels: int) -> GroupNormSiLU | SpatialNormSiLU:
            if latent_channels is None:
                return GroupNormSiLU(num_groups, channels, eps=eps)
            return SpatialNormSiLU(channels, latent_channels, num_groups=num_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x_BCTHW: Tensor, cache: ConvCache, latent: Tensor | None = None) -> Tensor:
        """(B, in, T, H, W) to (B, out, T, H, W), or (T + 1) // 2 frames.

        Alive at the peak: the input, the hidden state, one window, one block.

        The input is taken over: without a shortcut, the output is added to it in place, so whoever watches a layer
        before it clones what is to outlive it. With one, the output takes the place of the hidden state.
        """
        compiled = cache.numerics.compiled
        pool = self.pools and _fuses_pooling(x_BCTHW, cache)
        h = self.conv1.stream(cache.attempt(partial(self.norm1.fit, x_BCTHW, latent, compiled=compiled)), cache)
        if pool:
            x_BCTHW = _average_pairs(x_BCTHW)
        normed = cache.attempt(partial(self.norm2.fit, h, latent, compiled=compiled))
        del h
        if not hasattr(self, "conv_shortcut"):
            return self.conv2.stream(normed, cache, onto=x_BCTHW, pool=pool)
        add_shortcut = partial(self._add_shortcut, x_BCTHW, cache)
        return self.conv2.stream(normed, cache, finish=add_shortcut, overwrite=True, pool=pool)

    def _add_shortcut(self, x_BCTHW: Tensor, cache: ConvCache, block: Block, y_BCTHW: Tensor) -> None:
        weight, bias = self.conv_shortcut.weight[:, :, 0], self.conv_shortcut.bias
        x_BCTRW = x_BCTHW[:, :, :, block.rows.start : block.rows.stop]
        for i, t in enumerate(block.frames):
            shortcut = partial(convolution, x_BCTRW[:, :, t], weight, bias, padding=(0, 0))
            y_BCTHW[:, :, i].add_(cache.attempt(shortcut))


def _fuses_pooling(x_BCTHW: Tensor, cache: ConvCache) -> bool:
    """Whether the layer before a :class:`Downsample` halves the frames; kernels of other layouts are not for that."""
    return cache.numerics.fused_pooling and layout_of(x_BCTHW) == torch.channels_last_3d


def _sources(num_frames: int) -> list[tuple[int, int]]:
    """The frames that each average is of. An odd number starts with a video's first frame, which stays alone."""
    lead = num_frames % 2
    return [(0, 0)] * lead + [(t, t + 1) for t in range(lead, num_frames, 2)]


def _average_pairs(x_BCTHW: Tensor) -> Tensor:
    """Averages of pairs of frames, in place of the first frames: no later frame is overwritten before it is read."""
    sources = _sources(x_BCTHW.shape[2])
    for t, (first, second) in enumerate(sources):
        if second != first:
            torch.lerp(x_BCTHW[:, :, first], x_BCTHW[:, :, second], 0.5, out=x_BCTHW[:, :, t])
    return x_BCTHW[:, :, : len(sources)]


class Downsample(nn.Module):
    """Half the height and width by a strided convolution, and half the frames by averaging pairs if asked.

    A chunk with an odd number of frames starts with the video's first frame, which stays alone. With ``fused_pooling``
    frames come averaged, from a :class:`ResnetBlock` that ``pools``.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)
        self.time = time

    def forward(self, x_BCTHW: Tensor, cache: ConvCache, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, (T + 1) // 2 or T, H / 2, W / 2)."""
        return cache.attempt(lambda: self._downsample(x_BCTHW, cache))

    def _downsample(self, x_BCTHW: Tensor, cache: ConvCache) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        averages = self.time and not _fuses_pooling(x_BCTHW, cache)
        sources = _sources(T) if averages else [(t, t) for t in range(T)]
        kind = TensorKind.of(x_BCTHW)
        out = cache.buffers.take((B, C, len(sources), H // 2, W // 2), kind)
        padded = cache.buffers.take((B, C, 1, H + 1, W + 1), kind, brief=True)[:, :, 0]
        padded[:, :, H:].zero_()
        padded[:, :, :H, W:].zero_()
        inner = padded[:, :, :H, :W]
        for t, (first, second) in enumerate(sources):
            if second == first:
                inner.copy_(x_BCTHW[:, :, first])
            else:
                torch.add(x_BCTHW[:, :, first], x_BCTHW[:, :, second], out=inner).mul_(0.5)
            out[:, :, t].copy_(self.conv(padded))
        return out


class Upsample(nn.Module):
    """Double the height and width, and the frames if asked, by nearest neighbour; then a 2-D convolution.

    The convolution of a doubled frame is computed once and written twice. The first frame of a video stays alone.
    Pixels that are doubled need not be read twice either: see :func:`~longvid.models.convolution.subpixel`.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)
        self.time = time

    def forward(self, x_BCTHW: Tensor, cache: ConvCache, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, T, 2 T - 1 or 2 T, 2 H, 2 W)."""
        filters = None
        if cache.numerics.subpixel_upsampling:
            B, C, _, H, W = x_BCTHW.shape
            (filters,) = cache.kernels(self, partial(self._filters, (B, C, H, W), cache.band_elements is not None))
        return cache.attempt(lambda: self._upsample(x_BCTHW, cache, filters))

    def _filters(self, shape: tuple[int, ...], pack: bool) -> tuple[Tensor, ...]:
        filters = subpixel_filters(self.conv.weight)
        return (packed(filters, (1, 1), shape) if pack else filters,)

    def _upsample(self, x_BCTHW: Tensor, cache: ConvCache, filters: Tensor | None) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        copies = [1] * T if not self.time or T == 1 else [1] * (T % 2) + [2] * (T - T % 2)
        out = cache.buffers.take((B, C, sum(copies), 2 * H, 2 * W), TensorKind.of(x_BCTHW))
        # An enlarged band is four times as large as what it is made of, and as large as what comes of it.
        limit = min(cache.max_conv_elements, cache.slice_elements, cache.band_elements or cache.max_conv_elements) // 4
        row_elements = B * C * W
        if filters is not None:  # whose phases are a row and a column longer, and share them
            row_elements = B * C * (W + 1)
            limit -= row_elements
        parts = row_bands(H, halo=1, row=row_elements, limit=limit)
        done = 0
        for t, count in enumerate(copies):
            for read, rows in parts:
                x = x_BCTHW[:, :, t, read.start : read.stop]
                first, last = rows.start - read.start, rows.stop - read.start
                target = out[:, :, done : done + count, 2 * rows.start : 2 * rows.stop]
                if filters is None:
                    band = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
                    target.copy_(band[:, :, None, 2 * first : 2 * last])
                    continue
                for row, column, band in subpixel(x, filters, self.conv.bias):
                    target[..., row::2, column::2].copy_(band[:, :, None, first:last])
            done += count
        return out

"""ResnetBlock: norm, SiLU and causal convolution, twice, around a shortcut.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from longvid.models.context import ForwardContext
from longvid.models.kernels.convolution import convolution
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.layers.norms import Producer
from longvid.models.layers.window import Block
from longvid.models.pieces import in_pieces

__all__ = ["Norm", "ResnetBlock"]


class Norm(Protocol):
    """A norm and activation in two passes: :meth:`fit` gathers statistics, what it returns writes the values."""

    def fit(self, x_BCTHW: Tensor, latent: Tensor | None = None) -> Producer:
        """Gather what has to be known of x; ``latent`` is what steers some norms."""
        ...


class ResnetBlock(nn.Module):
    """norm, SiLU, causal conv, twice, plus the input or its 1x1 projection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        norm: makes the norm, with SiLU, of so many channels; a module that is a :class:`Norm`.
        initial_context: of the convolutions.
    """

    norm1: Norm
    norm2: Norm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Callable[[int], nn.Module],
        *,
        initial_context: Literal["repeat", "zeros"] = "repeat",
    ) -> None:
        super().__init__()
        conv = partial(CausalConv3d, kernel_size=3, initial_context=initial_context)
        self.add_module("norm1", norm(in_channels))
        self.conv1 = conv(in_channels, out_channels)
        self.add_module("norm2", norm(out_channels))
        self.conv2 = conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, in, T, H, W) to (B, out, T, H, W).

        Alive at the peak: the input, the hidden state, one window, one block.

        The input is taken over: without a shortcut, the output is added to it in place, so a hook that
        watches a layer before it has to clone what it wants to keep. With one, the output takes the place of the hidden
        state.
        """
        if context.limits.pieces == "resnets" and latent is None:
            widest = max(x_BCTHW.shape[1], self.conv2.conv.out_channels)
            in_place = not hasattr(self, "conv_shortcut")
            return in_pieces([self], self._forward, x_BCTHW, context, widest=widest, in_place=in_place)
        return self._forward(x_BCTHW, context, latent)

    def _forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        h = self.conv1.stream(context.attempt(partial(self.norm1.fit, x_BCTHW, latent)), context)
        normed = context.attempt(partial(self.norm2.fit, h, latent))
        del h
        if not hasattr(self, "conv_shortcut"):
            return self.conv2.stream(normed, context, onto=x_BCTHW)
        add_shortcut = partial(self._add_shortcut, x_BCTHW, context)
        return self.conv2.stream(normed, context, finish=add_shortcut, overwrite=True)

    def _add_shortcut(self, x_BCTHW: Tensor, context: ForwardContext, block: Block, y_BCTHW: Tensor) -> None:
        weight, bias = context.weight(self.conv_shortcut), self.conv_shortcut.bias
        # In float64, which serves comparisons, BLAS rounds by the number of frames; else one frame takes less memory.
        step = len(block.frames) if y_BCTHW.dtype == torch.float64 else 1
        x_BCTRW = x_BCTHW[:, :, :, block.rows.start : block.rows.stop]
        for i in range(0, len(block.frames), step):
            x = x_BCTRW[:, :, block.frames.start + i : block.frames.start + i + step]
            shortcut = partial(convolution, x, weight, bias, padding=(0, 0, 0))
            y_BCTHW[:, :, i : i + step].add_(context.attempt(shortcut))

"""FrameAttention: every pixel of a frame attends to all pixels of that frame. Nothing looks across time.

Axes: B batch, C channels, T time, H height, W width; N pixels of a frame.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import TensorKind, layout_of
from longvid.models.context import ForwardContext
from longvid.models.kernels.convolution import Conv2d
from longvid.models.kernels.cuts import even_parts
from longvid.models.layers.pixel_norm import PixelNorm

__all__ = ["FrameAttention"]

_MOST_SCORES = 2**24
"of a block of queries: kernels that hold all scores of a call take 32 MiB for them in bfloat16"


class FrameAttention(nn.Module):
    """norm, attention with one head as wide as the channels, projection, plus the input.

    Args:
        channels: of input and output.

    Source: the spatial attention of latent diffusion's VAE, Rombach et al. 2022, arXiv 2112.10752, as used in Wan.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels, axes=2)
        self.to_qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to the same. The input is taken over: the result is added to it in place."""
        for t in range(x_BCTHW.shape[2]):
            frame = x_BCTHW[:, :, t]
            frame.add_(context.attempt(partial(self._attend, frame, context)))
        return x_BCTHW

    def _attend(self, x_BCHW: Tensor, context: ForwardContext) -> Tensor:
        B, C, H, W = x_BCHW.shape
        x_BCHW = x_BCHW.contiguous(memory_format=layout_of(x_BCHW))
        normed = torch.empty_like(x_BCHW)
        self.norm.write(x_BCHW, normed)
        qkv = self.to_qkv.with_weight(normed, context.weight(self.to_qkv))
        del normed
        wide = torch.float32 if context.widens(qkv.dtype) else qkv.dtype
        q, k, v = qkv.flatten(2).transpose(1, 2).contiguous().to(wide)[:, None].chunk(3, dim=-1)
        kind = TensorKind.of(qkv)
        del qkv
        out = torch.empty((B, C, H, W), dtype=kind.dtype, device=kind.device, memory_format=kind.layout)
        for part in even_parts(H * W, _MOST_SCORES // (B * H * W)):
            result = _attention(q[:, :, part.start : part.stop], k, v)
            out.flatten(2)[:, :, part.start : part.stop].copy_(result[:, 0].transpose(1, 2))
        return self.proj.with_weight(out, context.weight(self.proj))


def _attention(q_B1NC: Tensor, k_B1NC: Tensor, v_B1NC: Tensor) -> Tensor:
    """Attention of some queries to all keys."""
    if q_B1NC.is_meta:  # what the kernel of a CPU returns: the result and the logarithm of each sum
        torch.empty(q_B1NC.shape[:3], dtype=torch.float32, device="meta")
        return torch.empty_like(q_B1NC)
    return F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)

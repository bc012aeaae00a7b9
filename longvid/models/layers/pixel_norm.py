"""RMS norm of every pixel over its channels, and SiLU, written where the next convolution reads.

Nothing is gathered over time or space, so there is no first pass, and no cut of a video changes the result.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import layout_of
from longvid.models.layers.norms import SLAB_BYTES, Producer

__all__ = ["PixelNorm", "PixelNormSiLU", "normalize_pixels"]

_LEAST_NORM = 1e-12
"pixels that are shorter than this are divided by it"


class PixelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma, where |x| is the Euclidean norm of a pixel's channels, at least 1e-12.

    Args:
        channels: of the input.
        axes: behind the channels in the shape of gamma, as checkpoints have it.

    Source: Wan, 2025, arXiv 2503.20314; root mean square norm: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, channels: int, *, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones((channels, *(1,) * axes)))

    def write(self, x_BCHW: Tensor, out_BCHW: Tensor) -> None:
        """Write the norm of a frame, or of rows of it."""
        normalize_pixels(x_BCHW, self.gamma.view(-1, 1, 1), out_BCHW)


class PixelNormSiLU(PixelNorm):
    """:class:`PixelNorm`, then SiLU."""

    def fit(self, x_BCTHW: Tensor, latent: Tensor | None = None) -> Producer:
        """What writes silu(norm(x)); a norm of pixels has nothing to gather before."""
        return _Normed(x_BCTHW, self.gamma.view(-1, 1, 1))


class _Normed(Producer):
    """silu(norm(x)), computed in slabs of one frame that no block cuts, so that blocks change no bit."""

    def __init__(self, x_BCTHW: Tensor, gamma_C11: Tensor) -> None:
        super().__init__(x_BCTHW)
        self._gamma = gamma_C11
        _, C, _, _, W = x_BCTHW.shape
        self.row_step = max(1, SLAB_BYTES // (C * W * x_BCTHW.element_size()))

    def write(self, frames: range, rows: range, out_BCTHW: Tensor) -> None:
        """Write these frames and rows; see :meth:`Producer.write`."""
        if self.like.dtype == torch.float64:  # to compare with others, bit for bit: their SiLU runs over dense frames
            x = self.like[:, :, frames.start : frames.stop, rows.start : rows.stop].contiguous()
            normed = torch.empty_like(x)
            normalize_pixels(x, self._gamma[..., None], normed)
            out_BCTHW.copy_(F.silu(normed))
            return
        step = self.row_step if self.like.is_cpu else len(rows)
        if self.like.is_meta:  # what follows the first slab allocates and frees the same
            frames, rows = frames[:1], rows[: self.row_step]
        for i, t in enumerate(frames):
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                out = out_BCTHW[:, :, i, start - rows.start : stop - rows.start]
                normalize_pixels(self.like[:, :, t, start:stop], self._gamma, out)
                if not out.is_meta:
                    F.silu(out, inplace=True)


def normalize_pixels(x_BCHW: Tensor, gamma_C11: Tensor, out_BCHW: Tensor) -> None:
    """Write x / |x| * sqrt(C) * gamma. Narrow dtypes are normalised in float32, and rounded after each of the three."""
    narrow = x_BCHW.dtype in (torch.float16, torch.bfloat16)
    if x_BCHW.is_meta:  # nothing else is allocated, and operations on meta tensors take their time
        out_BCHW.new_empty((out_BCHW.shape[0], 1, *out_BCHW.shape[2:]), dtype=torch.float32 if narrow else None)
        return
    norm = torch.linalg.vector_norm(x_BCHW, dim=1, keepdim=True, dtype=torch.float32 if narrow else None)
    norm.clamp_min_(_LEAST_NORM)
    scale = x_BCHW.shape[1] ** 0.5
    if x_BCHW.dtype == torch.float32 and layout_of(x_BCHW) == torch.channels_last:
        torch.mul(x_BCHW, norm.reciprocal_().mul_(scale), out=out_BCHW).mul_(gamma_C11)
    else:
        torch.div(x_BCHW, norm, out=out_BCHW).mul_(scale).mul_(gamma_C11)

"""Winograd F(2,3) along time: two output frames of a convolution with three taps in time from four 2-D convolutions.

A plain convolution needs six. Source: Lavin and Gray 2016, arXiv 1509.09308, in one dimension; Winograd 1980.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longvid.models.kernels.convolution import Attempt, accumulate, convolution, run_once

__all__ = ["two_frames", "winograd_filters"]


def winograd_filters(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 2-D kernels that take the place of one with three taps in time; see :func:`two_frames`."""
    first, middle, last = weight.unbind(2)
    outer = first + last
    return first.contiguous(), outer.add(middle).mul_(0.5), outer.sub_(middle).mul_(0.5), last.contiguous()


def two_frames(
    x_BCTHW: Tensor,
    filters: tuple[Tensor, ...],
    bias: Tensor | None,
    out_BCTHW: Tensor | None,
    *,
    padding: tuple[int, int],
    fused: bool = False,
    attempt: Attempt = run_once,
) -> tuple[Tensor, Tensor]:
    """Two output frames of a convolution with three taps in time, from four input frames.

    With input frames d and taps g::

        m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    m3 = (d1 - d3) g2
        y0 = m0 + m1 + m2    y1 = m1 - m2 - m3

    of which m0 and -m3 are added last, by :func:`accumulate` if that is ``fused``.
    Sums of inputs and of taps are rounded to the dtype. In float32 the result is as near to the truth as the plain
    form; in bfloat16 its error is about twice that of the plain form. Filters in float32 (made of widened weights) make
    everything float32, rounded once at the end, also for a bfloat16 input.
    ``filters`` may be packed. The frames are written into ``out_BCTHW``, dense in each frame; None is for new memory.
    """
    if filters[0].dtype != x_BCTHW.dtype:
        wide = attempt(partial(x_BCTHW.to, filters[0].dtype))
        wide_bias = None if bias is None else bias.to(wide.dtype)
        frames = two_frames(wide, filters, wide_bias, None, padding=padding, attempt=attempt)
        if out_BCTHW is None:
            return frames[0].to(x_BCTHW.dtype), frames[1].to(x_BCTHW.dtype)
        for out, frame in zip(out_BCTHW.unbind(2), frames, strict=True):
            out.copy_(frame)
        return out_BCTHW[:, :, 0], out_BCTHW[:, :, 1]
    d0, d1, d2, d3 = x_BCTHW.unbind(2)

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
    if out_BCTHW is None:
        y0, y1 = attempt(partial(torch.add, m1, m2)), m1.sub_(m2)
    else:
        y0, y1 = out_BCTHW.unbind(2)
        torch.add(m1, m2, out=y0)
        torch.sub(m1, m2, out=y1)
    del m1, m2
    add(y0, torch.sub(d0, d2, out=d), 0)
    add(y1, torch.sub(d3, d1, out=d), 3)
    return y0, y1

"""Shortcuts without weights around blocks that change the size: averages of what is given up, repeats of what is new.

A block that halves axes gives up F pixels for one, of ``t``, ``row`` and ``column`` offsets. Its shortcut lines up the
offsets of all channels, in the order channel, t, row, column, and averages groups of them to the channels of the
output. A block that doubles axes has the opposite.

Source: residual autoencoding of DC-AE, Chen et al. 2024, arXiv 2410.10733, with time as a third axis as in Wan 2.2.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from longvid.errors import ModelError
from longvid.models.kernels.convolution import Attempt, run_once

__all__ = ["add_repeats", "average_shortcut", "require_shortcut"]


def require_shortcut(in_channels: int, out_channels: int, *, time: int, space: int) -> None:
    """Raise ModelError unless the channels of a block that halves (or doubles) these axes divide as they must."""
    factor = time * space * space
    if in_channels * factor % out_channels:
        raise ModelError(
            f"a shortcut of {in_channels} x {factor} entries cannot be averaged to {out_channels} channels"
        )


def average_shortcut(x_BCTHW: Tensor, out_BCTHW: Tensor, *, time: int, space: int) -> Tensor:
    """Write the shortcut of a block that divides time and space by 1 or 2, and return it.

    Frames are paired from the end: of an odd number the first one is paired with zeros.
    """
    B, C, T, _, _ = x_BCTHW.shape
    _, out_channels, num_frames, H, W = out_BCTHW.shape
    group = C * time * space * space // out_channels
    missing = num_frames * time - T
    for t in range(num_frames):
        start = t * time - missing
        entries = x_BCTHW.new_empty((B, C, time, space, space, H, W))
        for j in range(time):
            if start + j < 0:
                entries[:, :, j].zero_()
            else:
                frame = x_BCTHW[:, :, start + j].view(B, C, H, space, W, space)
                entries[:, :, j].copy_(frame.permute(0, 1, 3, 5, 2, 4))
        out_BCTHW[:, :, t].copy_(entries.view(B, out_channels, group, H, W).mean(dim=2))
        if x_BCTHW.is_meta:  # the others allocate and free the same
            break
    return out_BCTHW


def add_repeats(x_BCTHW: Tensor, out_BCTHW: Tensor, *, time: int, space: int, attempt: Attempt = run_once) -> None:
    """Add the shortcut of a block that multiplies time and space by 1 or 2 to its output.

    If the output lacks frames, which it does where a video starts, those are the first copies of the first frame. The
    output is changed in place, so ``attempt`` is for what takes memory, and this function must not be repeated.
    """
    B, C, T, H, W = x_BCTHW.shape
    out_channels, num_frames = out_BCTHW.shape[1:3]
    repeats = out_channels * time * space * space // C
    missing = T * time - num_frames
    for t in range(T):
        entries = attempt(partial(x_BCTHW[:, :, t].repeat_interleave, repeats, dim=1))
        entries = entries.view(B, out_channels, time, space, space, H, W).permute(0, 1, 2, 5, 3, 6, 4)
        for j in range(time):
            number = t * time + j - missing
            if number >= 0:
                target = out_BCTHW[:, :, number].view(B, out_channels, H, space, W, space)
                target.add_(entries[:, :, j])
        if x_BCTHW.is_meta:  # the others allocate and free the same
            break

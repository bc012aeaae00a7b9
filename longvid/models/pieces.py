"""Runs layers piece by piece: for a few frames of a chunk, and then again for the next ones.

Within a chunk layers look across time through their contexts only, so any cut of it is as good as another. The input of
a group of layers then exists as a whole, and so does its output, but everything between them is a few frames long. The
contexts of the group are on the device together while it runs, and move once per chunk (:class:`longvid.ConvCache`).

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from longvid.memory.buffer_pool import TensorKind
from longvid.models.context import ForwardContext
from longvid.models.kernels.cuts import even_parts

__all__ = ["Forward", "Stage", "in_pieces"]

Forward: TypeAlias = Callable[[Tensor, ForwardContext], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Layers that run one after the other, all of them piece by piece if the limits say so."""

    modules: Sequence[nn.Module]
    "that have the contexts"
    calls: Sequence[Forward]
    "in the order in which they run"
    widest: int
    "channels of the widest frames, relative to the area of the input"
    time: Fraction = Fraction(1)
    "frames of the output for each frame of the input, but for the first one of a video"

    def __call__(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        """Run it in pieces."""
        return in_pieces(self.modules, self._run, x_BCTHW, context, widest=self.widest, time=self.time, in_place=False)

    def _run(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        for call in self.calls:
            x_BCTHW = call(x_BCTHW, context)
        return x_BCTHW


def in_pieces(
    modules: Sequence[nn.Module],
    forward: Forward,
    x_BCTHW: Tensor,
    context: ForwardContext,
    *,
    widest: int,
    in_place: bool,
    time: Fraction = Fraction(1),
) -> Tensor:
    """Call ``forward`` for a few frames at a time.

    Args:
        modules: all that have contexts in ``forward``.
        forward: computes the output of some frames.
        x_BCTHW: frames of a chunk.
        context: its ``slice_elements`` say how many frames a piece has.
        widest: channels of the widest frames in ``forward``, relative to the area of the input.
        in_place: whether ``forward`` writes its output over its input.
        time: frames of the output for each frame of the input, but for the first one of a video.
    """
    B, _, T, H, W = x_BCTHW.shape
    unit = max(time.denominator, 2 if context.numerics.paired_frames else 1)
    longest = max(unit, context.limits.slice_elements // (B * widest * H * W))
    alone = int(context.at_start and T > 1)  # the first frame of a video is a latent of its own
    rest = even_parts(T - alone, longest, multiple=unit)
    parts = [range(1)] * alone + [range(part.start + alone, part.stop + alone) for part in rest]
    if x_BCTHW.is_meta:  # all between the first ones and the last allocate and free the same
        parts = [*parts[:3], *parts[3:][-1:]]
    out: Tensor | None = None
    done = 0
    for part in context.cache.pieces(modules, parts):
        x = x_BCTHW[:, :, part.start : part.stop]
        y = forward(x, context)
        if in_place:
            continue
        if len(parts) == 1:
            out = y
            continue
        if out is None:
            num_frames = int((T - alone) * time) + alone
            shape = (B, y.shape[1], num_frames, *y.shape[3:])
            out = context.attempt(partial(context.buffers.take, shape, TensorKind.of(y)))
        out[:, :, done : done + y.shape[2]].copy_(y)
        done += y.shape[2]
        del x, y
    return x_BCTHW if out is None else out

"""Window: the input of a causal layer, ``[context | new frames]`` in one tensor that the layer's producer writes into.

::

    with Window(layer, context, like=x) as window:
        norm(x, out=window.new)                 # the producer writes straight into the window
        h = convolve(window.input())
    # the window is gone; its last k - 1 frames are the context of the next chunk

There is one copy of every context and no copy of the input. A window may be smaller than a chunk, in frames or in rows,
and move over it block by block. The input is read once, row after row and in order, since the rows that two blocks
share stay in the window. The layer then pads no rows, which are there::

    with Window(layer, context, like=x, blocks=blocks, halo=1) as window:
        for block in window.blocks():
            produce(block.frames, window.rows, out=window.new)
            y = F.conv3d(window.input(), ...)   # the output frames and rows of this block

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Self

from torch import Tensor

from longvid.errors import CacheError
from longvid.memory.buffer_pool import TensorKind, dense_within
from longvid.memory.offloader import empty_context
from longvid.models.cache import CausalLayer
from longvid.models.context import ForwardContext

__all__ = ["Block", "Window"]


@dataclass(frozen=True, slots=True)
class Block:
    """Which frames and rows of a layer's output are computed at once."""

    frames: range
    rows: range


class Window:
    """The input of one causal layer for one chunk: ``[context | new frames]``.

    Args:
        layer: a layer of the module that the cache was made for, with ``context_frames > 0``.
        context: of the chunk that is running.
        like: a tensor (B, C, T, H, W) with the shape, dtype, device and memory layout of the layer's input.
        blocks: what the window holds at a time, covering all frames and, for each range of frames, all rows, in order;
            None for everything at once. Iterate over :meth:`blocks` then.
        halo: rows above and below an output row that it depends on. Row tiles have them in the window, as zeros where
            the frame ends; whole frames do not, and are padded by the layer.

    Its last frames become the layer's context when :meth:`input` is called for the last of the new frames, tiles one
    after the other, or else when the ``with`` block is left; leaving it frees the window.
    """

    def __init__(
        self,
        layer: CausalLayer,
        context: ForwardContext,
        *,
        like: Tensor,
        blocks: Sequence[Block] | None = None,
        halo: int = 0,
    ) -> None:
        self._forward, self._layer, self._context_frames = context, layer, layer.context_frames
        self._path = ""
        B, C, T, self._height, W = like.shape
        self._blocks = [Block(range(T), range(self._height))] if blocks is None else blocks
        rows = max(len(block.rows) for block in self._blocks)
        self._tiled = rows < self._height
        self._halo = halo if self._tiled else 0
        "rows of it in the window"
        frames = max(len(block.frames) for block in self._blocks)
        self.shape = (B, C, layer.context_frames + frames, rows + 2 * self._halo, W)
        "shape of the largest block with everything that it depends on"
        self._context_shape = (B, C, layer.context_frames, self._height, W)
        self._kind = TensorKind.of(like)
        self._block = self._blocks[0]
        "what is in the window now"
        self.rows = range(0)
        "rows of the frame to be written into ``new``; those before them are in the window already"
        self._first_row = 0
        "where in the window they begin"
        self._memory: Tensor | None = None
        "memory of the largest block"
        self._tensor: Tensor | None = None
        "that of the block, in this memory"
        self._context: Tensor | None = None
        "what stands before the frames of the block; overwritten row by row with what stands before the next ones"
        self._had_context = self._has_context = self._is_read = False

    def __enter__(self) -> Self:
        self._path = self._forward.cache.open_window(self._layer, self._context_shape, self._kind)
        self._memory = self._forward.attempt(self._open)
        self._tensor = self._part(self._block)
        self._begin(self._block)
        return self

    def _open(self) -> Tensor:
        self._context = self._forward.cache.offloader.open(self._path)
        self._had_context = self._context is not None
        return self._forward.buffers.take(self.shape, self._kind)

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.input()
        self._forward.cache.close_window(failed=exc_type is not None)
        self._memory = self._tensor = self._context = None
        if len(self._blocks) == 1 and not self._forward.buffers.keeps:
            # Memory of this size is better given up than kept beside the statistics of the next norm.
            self._forward.buffers.clear()

    def blocks(self) -> Iterator[Block]:
        """Iterate over all blocks; each has to be written and convolved before the next."""
        for block in _allocating(self._blocks) if self._require().is_meta else self._blocks:
            if block is not self._blocks[0]:
                self._begin(block)
            yield block

    def _part(self, block: Block) -> Tensor:
        """The window of a block in the memory of the largest. Tiles are dense, whatever their height."""
        assert self._memory is not None
        B, C, _, _, W = self.shape
        num_frames, num_rows = self._context_frames + len(block.frames), len(block.rows) + 2 * self._halo
        if not self._tiled:  # in other layouts, frames would not stay where they are
            return self._memory[:, :, :num_frames]
        return dense_within(self._memory, (B, C, num_frames, num_rows, W))

    def _begin(self, block: Block) -> None:
        """Move on: rows that the last block shares with this one stay, context stands before the others."""
        held, last = self._require(), self._block
        tensor = self._tensor = self._part(block)
        halo, above, height = self._halo, block.rows.start, self._height
        stop = min(height, block.rows.stop + halo)
        if above:
            if tensor.shape == held.shape:
                for i in range(2 * halo):  # one by one: source and target may overlap
                    tensor[:, :, :, i].copy_(tensor[:, :, :, len(last.rows) + i])
            else:  # of another height, every frame lies somewhere else
                shared = held[:, :, :, len(last.rows) : len(last.rows) + 2 * halo]
                tensor[:, :, :, : 2 * halo].copy_(self._forward.attempt(shared.clone))
            self.rows = range(min(height, above + halo), stop)
        else:
            if halo:
                tensor[:, :, :, :halo].zero_()
            self.rows = range(stop)
        end = stop - above + halo
        if end < tensor.shape[3]:
            tensor[:, :, :, end:].zero_()
        self._first_row = self.rows.start - above + halo
        self._block, self._is_read = block, False
        self._has_context = self._had_context or block.frames.start > 0
        if block.frames.start and not self._tiled:  # what stands before these frames is in the window itself
            for i in range(self._context_frames):
                tensor[:, :, i].copy_(held[:, :, len(last.frames) + i])
        elif self._has_context and self._context is not None:
            there = self._context[:, :, :, self.rows.start : self.rows.stop]
            tensor[:, :, : self._context_frames, self._first_row : end].copy_(there)

    def _require(self) -> Tensor:
        if self._tensor is None:
            raise CacheError(f"the window of layer {self._path!r} is not open")
        return self._tensor

    @property
    def new(self) -> Tensor:
        """The part (B, C, T, H, W) into which the producer writes every element of a block's frames in ``rows``."""
        rows = slice(self._first_row, self._first_row + len(self.rows))
        return self._require()[:, :, self._context_frames :, rows]

    def input(self) -> Tensor:
        """The whole window (B, C, k - 1 + T, H, W), once ``new`` is written; it may not change any more."""
        num_frames, num_rows = len(self._block.frames), len(self._block.rows)
        tensor = self._require()
        if not self._is_read:
            self._is_read = True
            if not self._has_context:
                new, rows = self.new, slice(self._first_row, self._first_row + len(self.rows))
                front = tensor[:, :, : self._context_frames, rows]
                if self._layer.initial_context == "zeros":
                    front.zero_()
                else:
                    front.copy_(new[:, :, :1].expand_as(front))
            if self._tiled or self._block is self._blocks[-1]:
                self._keep(tensor[:, :, num_frames:, self._halo : self._halo + num_rows].detach())
        return tensor

    def _keep(self, tail: Tensor) -> None:
        rows = self._block.rows
        if self._context is None:  # not before: what wrote the window may be gone by now
            self._context = self._forward.attempt(partial(empty_context, self._context_shape, self._kind))
        context = self._context
        context[:, :, :, rows.start : rows.stop].copy_(tail)
        if self._block is self._blocks[-1]:
            # Before the layer computes, so that a context that leaves is on its way meanwhile.
            self._forward.attempt(lambda: self._forward.cache.keep(context))


def _allocating(blocks: Sequence[Block]) -> Iterator[Block]:
    """What a dry run has to see: the first two and the last two tiles of a slice, since all between them are alike."""
    for _, tile_group in groupby(blocks, key=lambda block: block.frames):
        slice_blocks = list(tile_group)
        yield from slice_blocks if len(slice_blocks) <= 4 else (*slice_blocks[:2], *slice_blocks[-2:])

"""Re-cuts what arrives in slices of any length into the blocks that the schedule wants. No torch.

This is why results do not depend on how a caller slices: whatever comes in, the same blocks come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Reblocker", "pad_frames"]

Arrays = tuple[npt.NDArray[Any], ...]


class Reblocker:
    """Collects slices of parallel arrays along axis 0 into blocks of given lengths.

    What is pushed is copied at once into a new block, so a caller may reuse its buffer, and a block may be handed to
    another thread. At most one block is held. It lies in memory as its first slice does, slice after slice.
    ``capacity`` gives the length of block ``i``; ``first`` is the number of the first block.
    """

    def __init__(self, capacity: Callable[[int], int], *, first: int = 0) -> None:
        self._capacity = capacity
        self._index = first
        self._filled = 0
        self._block: Arrays | None = None

    def push(self, *slices: npt.NDArray[Any]) -> Iterator[tuple[int, Arrays]]:
        """Take slices of equal length and yield ``(index, block)`` for every block they complete.

        ValueError if the slices differ in length, or in shape or dtype from those before.
        """
        length = len(slices[0])
        if any(len(s) != length for s in slices):
            raise ValueError(f"slices of different lengths: {[len(s) for s in slices]}")
        taken = 0
        while taken < length:
            block = self._open(slices)
            step = min(length - taken, len(block[0]) - self._filled)
            for target, source in zip(block, slices, strict=True):
                target[self._filled : self._filled + step] = source[taken : taken + step]
            taken += step
            self._filled += step
            if self._filled == len(block[0]):
                index = self._index
                self._block, self._filled, self._index = None, 0, index + 1
                yield index, block

    def _open(self, slices: Arrays) -> Arrays:
        if self._block is None:
            count = self._capacity(self._index)
            self._block = tuple(_empty_like(s, (count, *s.shape[1:])) for s in slices)
        for have, got in zip(self._block, slices, strict=True):
            if have.shape[1:] != got.shape[1:] or have.dtype != got.dtype:
                raise ValueError(
                    f"a slice of {got.shape[1:]} {got.dtype} came after slices of {have.shape[1:]} {have.dtype}"
                )
        return self._block

    def rest(self) -> list[tuple[int, Arrays]]:
        """The unfinished block at the end, or nothing if everything came out in whole blocks."""
        return [] if self._block is None else [(self._index, tuple(array[: self._filled] for array in self._block))]


def pad_frames(frames_THWC: npt.NDArray[np.uint8], num_frames: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Repeat the last frame, the bottom row and the right column up to (num_frames, height, width, 3)."""
    T, H, W, _ = frames_THWC.shape
    if (num_frames, height, width) == (T, H, W):
        return frames_THWC
    padded = _empty_like(frames_THWC, (num_frames, height, width, 3))
    padded[:T, :H, :W] = frames_THWC
    padded[:T, :H, W:] = frames_THWC[:, :, -1:]
    padded[:T, H:] = padded[:T, H - 1 : H]
    padded[T:] = padded[T - 1 : T]
    return padded


def _empty_like(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Axis 0 outermost, the others in the order in which they lie in ``array``."""
    order = [0, *sorted(range(1, array.ndim), key=lambda axis: -abs(array.strides[axis]))]
    return np.empty([shape[axis] for axis in order], array.dtype).transpose(np.argsort(order))

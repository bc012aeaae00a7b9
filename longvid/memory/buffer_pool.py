"""BufferPool: large tensors that the layers of one video take turns with.

Memory that is fresh from the system costs a page fault for every 4 KiB, which is more time than a norm takes to fill
it. So windows and outputs come from here: a tensor's memory is handed out again once nothing refers to it any more.
A caller that still holds the tensor, or a view of it, keeps the memory; no call returns memory, so none can be returned
too early.

There are two ways to deal with memory that no one holds:

* A **thrifty** pool hands it to a tensor of just that size, and lets go of it unless it serves this request or one
  of the last two: what is idle is what a layer of the same level used a moment ago. It adds nothing to a peak.
* One that **keeps** hands it to any tensor that it is large enough for, and lets go of it only where more would be held
  than was ever in use at once. The levels of a model then share the memory of the widest, and so do chunks.
"""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["BufferPool", "TensorKind", "dense_within", "flattened", "layout_of"]

_HUGE_PAGES = 14
"MADV_HUGEPAGE of Linux"
_SMALL = 16
"""what is this many times smaller than the most that was in use at once is never kept: a C library hands small memory
out again by itself, and a small result would keep a large storage from others"""
_LEAST_ADVISED_BYTES = 4 * 2**20
_RECENT = 2
"requests that idle memory outlives: a layer asks for a window and an output"


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels last only if a video (B, C, T, H, W) or an image (B, C, H, W) is unmistakably so; slices of either
    layout count as what they are cut from.
    """
    strides = x.stride()
    if x.ndim not in (4, 5) or x.shape[1] == 1 or strides[1] != 1 or max(strides[2:]) <= 1:
        return torch.contiguous_format
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What a tensor is, apart from its shape and its content."""

    dtype: torch.dtype
    device: torch.device
    layout: torch.memory_format

    @classmethod
    def of(cls, x_BCTHW: Tensor) -> TensorKind:
        """The kind of a tensor."""
        return cls(x_BCTHW.dtype, x_BCTHW.device, layout_of(x_BCTHW))


def flattened(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor of either layout as one dimension, in the order in which they lie in memory."""
    return (tensor.movedim(1, -1) if layout_of(tensor) == torch.channels_last_3d else tensor).view(-1)


def dense_within(tensor: Tensor, shape: tuple[int, int, int, int, int]) -> Tensor:
    """A dense tensor of this shape, and of the same layout, in the first part of the memory of a dense one.

    Kernels want dense input, which a part of the rows of several frames is not.
    """
    return tensor.as_strided(shape, _dense_strides(shape, layout_of(tensor)))


class BufferPool:
    """Hands out uninitialised tensors, takes their memory back when they are gone, and may ``keep`` it, see above."""

    def __init__(self, *, keep: bool = False) -> None:
        self.keeps = keep
        self._storages: dict[int, torch.UntypedStorage] = {}
        "by the number of the request that each served last, the latest at the end"
        self._requests = 0
        self._asked_bytes: dict[int, int] = {}
        "by each request; less than its storage has, if it was given a larger one"
        self._most_bytes = 0
        "that were asked for and in use at once"

    @property
    def sizes(self) -> list[int]:
        """Bytes of everything that is held, in use or not, what served last longest ago first."""
        return [storage.nbytes() for storage in self._storages.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(self.sizes)

    @property
    def idle_bytes(self) -> int:
        """What of it is not in use."""
        return sum(self._storages[n].nbytes() for n in self._idle())

    def take(self, shape: tuple[int, int, int, int, int], kind: TensorKind, *, brief: bool = False) -> Tensor:
        """A tensor of this shape and kind. Its content is undefined.

        A ``brief`` one will be gone before the next request. Its memory is kept however small it is, or, by a thrifty
        pool, not a moment longer.
        """
        num_bytes = math.prod(shape) * kind.dtype.itemsize
        if not self.keeps if brief else self.keeps and num_bytes * _SMALL < self._most_bytes:
            return _fresh(shape, kind)
        self._requests += 1
        idle = self._idle()
        found = self._fitting(idle, num_bytes, kind.device)
        for n in self._superfluous(idle, found, num_bytes):
            del self._storages[n]
        if found is not None:
            storage = self._storages.pop(found)
            empty = torch.empty(0, dtype=kind.dtype, device=kind.device)
            tensor = empty.set_(storage, 0, shape, _dense_strides(shape, kind.layout))
        else:
            tensor = _fresh(shape, kind)
            storage = tensor.untyped_storage()
        self._storages[self._requests] = storage
        self._asked_bytes = {n: self._asked_bytes.get(n, num_bytes) for n in self._storages}
        return tensor

    def _idle(self) -> list[int]:
        """What nothing but the pool refers to: no tensor, no view."""
        return [n for n, s in self._storages.items() if int(torch._C._storage_Use_Count(s._cdata)) == 1]

    def _fitting(self, idle: list[int], num_bytes: int, device: torch.device) -> int | None:
        """The smallest idle storage that is large enough, or just as large if nothing is kept."""
        sizes = {n: self._storages[n].nbytes() for n in idle if self._storages[n].device == device}
        fitting = [n for n, size in sizes.items() if size == num_bytes or (self.keeps and size > num_bytes)]
        return min(fitting, key=sizes.__getitem__, default=None)

    def _superfluous(self, idle: list[int], found: int | None, num_bytes: int) -> list[int]:
        """What to let go of before ``found`` is used, or as much as is asked for is taken from the system."""
        if not self.keeps:
            return [n for n in idle if n != found and (found is None or n < self._requests - _RECENT)]
        if found is not None:
            return []
        in_use = sum(num for n, num in self._asked_bytes.items() if n not in idle)
        self._most_bytes = max(self._most_bytes, in_use + num_bytes)
        excess, gone = self.num_bytes + num_bytes - self._most_bytes, []
        for n in idle:  # what served last longest ago first
            if excess <= 0:
                break
            gone.append(n)
            excess -= self._storages[n].nbytes()
        return gone

    def clear(self) -> None:
        """Forget everything; memory that is in use is freed by its last user. May be called at any time."""
        self._storages.clear()
        self._asked_bytes.clear()


def _fresh(shape: tuple[int, int, int, int, int], kind: TensorKind) -> Tensor:
    tensor = torch.empty(shape, dtype=kind.dtype, device=kind.device, memory_format=kind.layout)
    _advise(tensor)
    return tensor


def _dense_strides(shape: tuple[int, int, int, int, int], layout: torch.memory_format) -> tuple[int, ...]:
    _, C, T, H, W = shape
    if layout == torch.channels_last_3d:
        return T * H * W * C, 1, H * W * C, W * C, C
    return C * T * H * W, T * H * W, H * W, W, 1


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _advise(tensor: Tensor) -> None:
    """Ask for 2 MiB pages under large host tensors: 512 times fewer faults. It is advice and may be ignored."""
    libc, num_bytes = _libc(), tensor.numel() * tensor.element_size()
    if libc is None or tensor.device.type != "cpu" or num_bytes < _LEAST_ADVISED_BYTES:
        return
    start = -(-tensor.data_ptr() // 4096) * 4096
    length = tensor.data_ptr() + num_bytes - start
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_HUGE_PAGES))

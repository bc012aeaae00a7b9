"""Workspace: large tensors that the layers of one video take turns with.

Memory that is fresh from the system costs a page fault for every 4 KiB, which is more time than a norm takes to fill
it. So windows and outputs come from here: a tensor's memory is handed out again, to the next tensor of just that size,
once nothing refers to it any more. Whoever still holds the tensor, or a view of it, keeps the memory; there is no call
to give it back and nothing that could be given back too early.

Memory that no one holds is let go at the next request, unless it serves that request or one of the last two: what is
idle is what a layer of the same level used a moment ago.
"""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["TensorKind", "Workspace", "flattened", "layout_of"]

_HUGE_PAGES = 14
"MADV_HUGEPAGE of Linux"
_LEAST_ADVISED_BYTES = 4 * 2**20
_RECENT = 2
"requests that idle memory outlives: a layer asks for a window and an output"


def layout_of(x_BCTHW: Tensor) -> torch.memory_format:
    """Channels last only if a tensor is unmistakably so; slices of either layout count as what they are cut from."""
    strides = x_BCTHW.stride()
    last = x_BCTHW.ndim == 5 and x_BCTHW.shape[1] > 1 and strides[1] == 1 and max(strides[2:]) > 1
    return torch.channels_last_3d if last else torch.contiguous_format


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What a tensor is, apart from its shape and its content."""

    dtype: torch.dtype
    device: torch.device
    layout: torch.memory_format

    @classmethod
    def of(cls, x_BCTHW: Tensor) -> TensorKind:
        """That of a tensor."""
        return cls(x_BCTHW.dtype, x_BCTHW.device, layout_of(x_BCTHW))


def flattened(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor of either layout as one dimension, in the order in which they lie in memory."""
    return (tensor.movedim(1, -1) if layout_of(tensor) == torch.channels_last_3d else tensor).view(-1)


class Workspace:
    """Hands out uninitialised tensors and takes their memory back when they are gone."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        "by the number of the request that each served last, the latest at the end"
        self._requests = 0

    def take(self, shape: tuple[int, int, int, int, int], kind: TensorKind) -> Tensor:
        """A tensor of this shape and kind. Its content is undefined."""
        self._requests += 1
        wanted = (math.prod(shape) * kind.dtype.itemsize, kind.device)
        idle = [n for n, storage in self._storages.items() if _is_idle(storage)]
        found = next((n for n in idle if (self._storages[n].nbytes(), self._storages[n].device) == wanted), None)
        for n in idle:
            if n != found and (found is None or n < self._requests - _RECENT):
                del self._storages[n]
        if found is not None:
            storage = self._storages.pop(found)
            tensor = _over(storage, shape, kind)
        else:
            tensor = torch.empty(shape, dtype=kind.dtype, device=kind.device, memory_format=kind.layout)
            _advise(tensor)
            storage = tensor.untyped_storage()
        self._storages[self._requests] = storage
        return tensor

    def clear(self) -> None:
        """Forget everything; memory that is in use lives on with whoever uses it. May be called at any time."""
        self._storages.clear()


def _is_idle(storage: torch.UntypedStorage) -> bool:
    """Whether nothing but the workspace refers to it: no tensor, no view."""
    return int(torch._C._storage_Use_Count(storage._cdata)) == 1


def _over(storage: torch.UntypedStorage, shape: tuple[int, int, int, int, int], kind: TensorKind) -> Tensor:
    _, C, T, H, W = shape
    if kind.layout == torch.channels_last_3d:
        strides = (T * H * W * C, 1, H * W * C, W * C, C)
    else:
        strides = (C * T * H * W, T * H * W, H * W, W, 1)
    return torch.empty(0, dtype=kind.dtype, device=kind.device).set_(storage, 0, shape, strides)


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

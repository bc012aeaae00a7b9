"""Counts device memory: tensors that are allocated, the peak of each chunk, and errors that say that none is left."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AllocationTracker", "DeviceMeter", "is_out_of_memory"]

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "unable to find an engine to execute this computation",  # of cuDNN: with no room for any workspace, for one
)


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every tensor storage that is created while the mode is active.

    A storage counts from the operation that returns it until its last reference dies, also if that happens outside
    the mode. Views and in-place results add nothing; tensors that existed before, such as weights, are not counted.
    It sees what passes the dispatcher, so it gives the same bytes for ``meta`` tensors and for real ones, and it
    does not see workspaces inside a kernel or the rounding of an allocator.

    The mode may be entered again and again, one chunk at a time; the counts carry on. One thread at a time.

    Source of the idea: PyTorch's own ``torch.distributed._tools.mem_tracker``; this is the part without hooks.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        "bytes alive now"
        self.peak_bytes = 0
        "highest value of ``live_bytes`` since the start or the last reset"
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage | torch.Tensor]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled inside the mode, so that PyTorch need not guard every call against it."""
        return False

    def reset_peak(self) -> None:
        """Let the peak start again from what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _returns_arguments(func):
            return out
        # Nearly every operation returns one tensor; walking a tree would cost more than small operations do.
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                if leaf.is_mkldnn:  # a packed kernel: it has no storage, and nothing is a view of it
                    self._add(id(leaf), leaf.nbytes, leaf)
                    continue
                storage = leaf.untyped_storage()
                if storage._cdata not in self._storages and not _aliases(storage, args, kwargs):
                    self._add(storage._cdata, storage.nbytes(), storage)
        return out

    def _add(self, key: int, num_bytes: int, memory: torch.UntypedStorage | torch.Tensor) -> None:
        self._storages[key] = (num_bytes, weakref.ref(memory, lambda _: self._remove(key)))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _remove(self, key: int) -> None:
        num_bytes, _ = self._storages.pop(key)
        self.live_bytes -= num_bytes


@cache
def _returns_arguments(func: Any) -> bool:
    """Whether all that an operation returns is memory of its arguments: a view, or what it wrote in place.

    Operations such as ``contiguous``, which may copy, are composites, and reach the mode whole in inference mode.
    """
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    returns = func._schema.returns
    return bool(returns) and not composite and all(value.alias_info is not None for value in returns)


def _aliases(storage: torch.UntypedStorage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a result only looks into the storage of one of its inputs, such as a view of a weight."""
    for value in (*args, *kwargs.values()):
        for x in tree_leaves(value) if isinstance(value, (list, tuple, dict)) else (value,):
            if isinstance(x, torch.Tensor) and not x.is_mkldnn and x.untyped_storage()._cdata == storage._cdata:
                return True
    return False


class DeviceMeter:
    """Measures the peak of device bytes over the stretches wrapped in :meth:`measure`.

    On a CPU these are exact tensor bytes from an :class:`AllocationTracker`; on an accelerator the peak that its
    allocator reports, less what others held before. ``base_bytes`` (the weights) are included in both.

    Tracking costs tens of microseconds an operation, and chunks allocate alike once the buffer pool has settled. So the
    tracker looks at the first three stretches and at every 32nd after them.
    """

    def __init__(self, device: torch.device, base_bytes: int) -> None:
        self._tracker = AllocationTracker() if device.type == "cpu" else None
        self._device = device
        self._base_bytes = base_bytes
        self._count = 0
        self.chunk_peak_bytes: int | None = None
        "the peak of the last chunk, weights included; None if it was not measured"
        self.peak_bytes = base_bytes
        "the highest of them so far"

    @contextmanager
    def measure(self, held_bytes: int = 0) -> Iterator[None]:
        """Count what is allocated inside, one chunk; ``held_bytes``, beside the weights, are there when it begins."""
        index, self._count = self._count, self._count + 1
        self.chunk_peak_bytes = None
        if self._tracker is None:
            outside_bytes = int(torch.accelerator.memory_allocated(self._device)) - self._base_bytes - held_bytes
            torch.accelerator.reset_peak_memory_stats(self._device)
            yield
            self._note(int(torch.accelerator.max_memory_allocated(self._device)) - max(0, outside_bytes))
        elif index < 3 or index % 32 == 0:
            self._tracker.reset_peak()
            with self._tracker:
                yield
            self._note(self._base_bytes + self._tracker.peak_bytes)
        elif index % 32 == 31:
            with self._tracker:  # what this stretch leaves behind belongs to the next one, which is measured
                yield
        else:
            yield

    def _note(self, chunk_peak_bytes: int) -> None:
        self.chunk_peak_bytes = chunk_peak_bytes
        self.peak_bytes = max(self.peak_bytes, chunk_peak_bytes)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error says that the device, or the CPU's allocator, has no memory left."""
    return isinstance(exc, torch.OutOfMemoryError) or any(text in str(exc) for text in _OUT_OF_MEMORY)

"""Memory as numbers: exact tensor bytes of a stretch of code, budgets, and what the OS says.

* **allowed**: what the user grants.
* **reserved**: what no dry run can see (workspaces, allocator rounding); part of the budget.
* **projected**: the peak that a dry run on ``meta`` tensors gives.
* **peak**: what a run really used.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longvid.errors import MemoryBudgetError
from longvid.units import format_bytes

__all__ = ["AllocationTracker", "DeviceMeter", "MemoryBudget", "peak_rss_bytes", "rss_bytes", "tensor_bytes"]


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
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def reset_peak(self) -> None:
        """Let the peak start again from what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # Nearly every operation returns one tensor; walking a tree would cost more than small operations do.
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._storages and not _aliases(storage, args, kwargs):
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        self._storages[key] = (num_bytes, weakref.ref(storage, lambda _: self._remove(key)))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _remove(self, key: int) -> None:
        num_bytes, _ = self._storages.pop(key)
        self.live_bytes -= num_bytes


def _aliases(storage: torch.UntypedStorage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a result only looks into the storage of one of its inputs, such as a view of a weight."""
    for value in (*args, *kwargs.values()):
        leaves = (value,) if isinstance(value, torch.Tensor) else tree_leaves(value) if _nests(value) else ()
        if any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage._cdata for x in leaves):
            return True
    return False


def _nests(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict))


class DeviceMeter:
    """Measures the peak of device bytes over the stretches wrapped in :meth:`measure`.

    On a CPU these are exact tensor bytes from an :class:`AllocationTracker`; on an accelerator the peak that its
    allocator reports. ``base_bytes`` (the weights) are added where the tracker cannot see them.

    Tracking costs tens of microseconds an operation, and all chunks after the first allocate alike. So the tracker
    looks at the first three stretches and at every 32nd after them.
    """

    def __init__(self, device: torch.device, base_bytes: int) -> None:
        self._tracker = AllocationTracker() if device.type == "cpu" else None
        self._device = device
        self._base_bytes = base_bytes
        self._count = 0
        if self._tracker is None:
            torch.accelerator.reset_peak_memory_stats(device)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count what is allocated inside; one stretch is one chunk."""
        index, self._count = self._count, self._count + 1
        if self._tracker is None or (index >= 3 and index % 32):
            yield
        else:
            with self._tracker:
                yield

    @property
    def live_bytes(self) -> int:
        """Bytes of tensors that were created under the meter and are alive now; weights not included."""
        if self._tracker is None:
            return int(torch.accelerator.memory_allocated(self._device)) - self._base_bytes
        return self._tracker.live_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest number of bytes so far, weights included."""
        if self._tracker is None:
            return int(torch.accelerator.max_memory_allocated(self._device))
        return self._base_bytes + self._tracker.peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """How many device bytes a session may use; ``allowed_bytes=None`` is no limit."""

    allowed_bytes: int | None = None
    reserved_bytes: int = 0

    def check(self, projected_bytes: int, parts: Mapping[str, int], what: str) -> None:
        """Raise MemoryBudgetError if ``projected_bytes`` and the reserve do not fit.

        Args:
            projected_bytes: the peak of the run, weights included.
            parts: what it is made of, for the message.
            what: what was to be done, for the message.
        """
        if self.allowed_bytes is None or projected_bytes + self.reserved_bytes <= self.allowed_bytes:
            return
        listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(projected_bytes)} ({listing}) and "
            f"{format_bytes(self.allowed_bytes)} are allowed; raise the budget, choose a smaller frame size or a "
            "narrower dtype",
            projected_bytes=projected_bytes,
            allowed_bytes=self.allowed_bytes,
            parts=parts,
        )


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each counted once."""
    seen = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in seen.values())


def rss_bytes() -> int:
    """Resident set size of this process now, as the OS counts it."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Highest resident set size of this process since it started, as the OS counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The two counters of the OS are updated at different moments, so the present may be above the recorded peak.
    return max(peak if sys.platform == "darwin" else peak * 1024, rss_bytes())

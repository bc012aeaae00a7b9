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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longvid.errors import MemoryBudgetError
from longvid.units import format_bytes

__all__ = [
    "AllocationTracker",
    "DeviceMeter",
    "MemoryBudget",
    "default_reserved_bytes",
    "host_available_bytes",
    "is_out_of_memory",
    "peak_rss_bytes",
    "rss_bytes",
    "tensor_bytes",
]

_ACCELERATOR_RESERVED_BYTES = 512 * 2**20
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


def _aliases(storage: torch.UntypedStorage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a result only looks into the storage of one of its inputs, such as a view of a weight."""
    for value in (*args, *kwargs.values()):
        leaves = (value,) if isinstance(value, torch.Tensor) else tree_leaves(value) if _nests(value) else ()
        if any(
            isinstance(x, torch.Tensor) and not x.is_mkldnn and x.untyped_storage()._cdata == storage._cdata
            for x in leaves
        ):
            return True
    return False


def _nests(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict))


class DeviceMeter:
    """Measures the peak of device bytes over the stretches wrapped in :meth:`measure`.

    On a CPU these are exact tensor bytes from an :class:`AllocationTracker`; on an accelerator the peak that its
    allocator reports, less what others held before. ``base_bytes`` (the weights) are included in both.

    Tracking costs tens of microseconds an operation, and chunks allocate alike once the workspace has settled. So the
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
        """Count what is allocated inside; one stretch is one chunk.

        Args:
            held_bytes: device bytes, beside the weights, that the run holds when the stretch begins.
        """
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


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """How many device bytes a session may use; ``allowed_bytes=None`` is no limit."""

    allowed_bytes: int | None = None
    reserved_bytes: int = 0

    def fits(self, needed_bytes: int) -> bool:
        """Whether ``needed_bytes`` and the reserve are within the limit."""
        left = self.left(needed_bytes)
        return left is None or left >= 0

    def left(self, needed_bytes: int) -> int | None:
        """What remains for others beside ``needed_bytes`` and the reserve; None if there is no limit."""
        return None if self.allowed_bytes is None else self.allowed_bytes - self.reserved_bytes - needed_bytes

    def check(self, projected_bytes: int, parts: Mapping[str, int], what: str, would_fit: Sequence[str] = ()) -> None:
        """Raise MemoryBudgetError if ``projected_bytes`` and the reserve do not fit.

        Args:
            projected_bytes: the peak of the run, weights included.
            parts: what it is made of, for the message.
            what: what was to be done, for the message.
            would_fit: settings that are known to fit, for the message.
        """
        if self.allowed_bytes is None or self.fits(projected_bytes):
            return
        listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        reserve = f", of which {format_bytes(self.reserved_bytes)} are reserved" if self.reserved_bytes else ""
        advice = "raise the budget, choose a smaller frame size or a narrower dtype"
        if would_fit:
            advice = f"what would fit: {'; or '.join(would_fit)}"
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(projected_bytes)} ({listing}) and "
            f"{format_bytes(self.allowed_bytes)} are allowed{reserve}; {advice}",
            projected_bytes=projected_bytes,
            allowed_bytes=self.allowed_bytes,
            parts=parts,
        )


def default_reserved_bytes(device: torch.device) -> int:
    """What is set aside for workspaces and the allocator's rounding until a profile says what they really take.

    On a CPU a plan sees all that a budget counts. On an accelerator half a GiB is an assumption; ``longvid tune``
    replaces it by a measurement.
    """
    return 0 if device.type in ("cpu", "meta") else _ACCELERATOR_RESERVED_BYTES


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error says that the device, or the CPU's allocator, has no memory left."""
    return isinstance(exc, torch.OutOfMemoryError) or any(text in str(exc) for text in _OUT_OF_MEMORY)


def host_available_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of host memory that this process can still take: the machine's, or what its container leaves if less.

    Args:
        cgroups: where control groups are mounted.
        own: the file that names the groups of this process.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_headrooms(cgroups, own)]))


def _cgroup_headrooms(cgroups: Path, own: Path) -> Iterator[int]:
    """What is left under the limit of each control group that this process is in, of both versions.

    A limit holds for all groups below it, so every level up to the mount counts. Inside a container the own path may
    not exist below the mount, which then shows the container's own group at its root.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            for level in (folder, *folder.parents):
                headroom = _headroom(level, *files)
                if headroom is not None:
                    yield headroom
                if level == root:
                    break


def _headroom(folder: Path, limit_name: str, usage_name: str, reclaimable_key: str) -> int | None:
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        if not limit.isdecimal():  # "max"
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit) - usage + int(stat.get(reclaimable_key, 0))  # page cache is given up when memory is short
    except (OSError, ValueError):
        return None


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

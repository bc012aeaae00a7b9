"""CopyEngine: copies of contexts between a device and the host, on one copy stream for each direction.

On an accelerator a copy stream is a device stream, ordered by events against the stream that computes; host buffers are
page-locked, so that copies run while kernels do. On a CPU a copy stream is a thread, and the host buffer is other
memory or a file: the order of operations is the same, so everything is tested there.

Only the work that needs a copy waits for it: :meth:`Ticket.wait` orders what is computed next behind it.

Memory rules on an accelerator. A device tensor is taken from the pool of the computing stream. A copy stream waits for
that stream before it writes to the tensor; that stream waits for the copy stream before the last reference is dropped.
So no ``record_stream`` is needed, and every byte is freed at a point that the plan knows.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longvid.events import Lane
from longvid.memory.buffer_pool import flattened
from longvid.memory.host_buffer import HostBuffer, HostSlot
from longvid.units import format_bytes

__all__ = ["CopyEngine", "Mark", "Ticket"]

_PORTABLE = 1
"cudaHostRegisterPortable: locked for every device"


Mark: TypeAlias = Callable[[], float | None]
"""a moment on a copy stream or in the computation, in seconds on the clock of ``time.perf_counter``; None while it has
not happened yet"""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A copy that was asked for."""

    started: Mark
    stopped: Mark
    wait: Callable[[], object]
    "orders whatever is computed from now on behind the copy"
    synchronize: Callable[[], object]
    "blocks until the copy is done"
    event: torch.Event | None = None
    "of a copy on a device stream: reached when it is done"


class CopyEngine:
    """Moves contexts of every video of one session. Use it in a ``with`` statement; leaving waits for all copies.

    Contexts that leave the device go to a file in ``directory``, or to host memory if that is None.
    """

    wants_pinned = False

    def __new__(cls, device: torch.device, **_: object) -> CopyEngine:
        """An engine for the device: this class itself copies at once, where there is nothing to copy beside."""
        kinds = {"cpu": _ThreadCopies, "cuda": _StreamCopies, "xpu": _StreamCopies}
        return super().__new__(kinds.get(device.type, cls) if cls is CopyEngine else cls)

    def __init__(self, device: torch.device, *, directory: Path | None = None) -> None:
        self.device = device
        self.directory = directory
        self._spare: HostBuffer | None = None

    @property
    def spare_bytes(self) -> int:
        """Host memory that is kept for the next video."""
        return 0 if self._spare is None or self.directory is not None else self._spare.num_bytes

    @property
    def tier(self) -> str:
        """Where contexts go, in words."""
        return "host memory" if self.directory is None else str(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for all copies, end the copy streams and give the host memory back. May be called again."""
        self.drain()
        self._spare = None

    def host_buffer(self, sizes: Sequence[int]) -> HostBuffer:
        """Host room for contexts of these sizes, if possible that of an earlier video: page-locking is slow.

        Raises:
            MemoryBudgetError: there is not that much.
            StoreError: no file can be made in the folder.
        """
        num_bytes, spare, self._spare = HostBuffer.room_for(sizes), self._spare, None
        if spare is not None and num_bytes <= spare.num_bytes <= 2 * num_bytes:
            return spare
        del spare  # given back before more is taken
        buffer = HostBuffer(num_bytes, self.directory, self.pin)
        if self.wants_pinned and self.directory is None and not buffer.pinned:
            warnings.warn(
                f"{format_bytes(buffer.num_bytes)} of host memory could not be page-locked; contexts are copied "
                "through pageable memory, which makes the device wait (raise the limit of locked memory, ulimit -l, "
                "or offload less)",
                stacklevel=2,
            )
        return buffer

    def release(self, buffer: HostBuffer) -> None:
        """Take a buffer back whose slots are not used any more, by copies neither: see :meth:`drain`."""
        buffer.clear()
        self._spare = buffer

    def to_host(self, source: Tensor, target: HostSlot) -> Ticket:
        """Copy a dense device tensor out, once all that was computed so far is done."""
        return self._copy("to_host", target.tensor, source, target, None)

    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket:
        """Copy into a new tensor of the slot's layout, once ``after``, the copy that filled the slot, is done."""
        return self._copy("to_device", target, source.tensor, source, after)

    def pin(self, buffer: Tensor) -> Callable[[], None] | None:
        """See :data:`Pin`."""
        return None

    def mark(self) -> Mark:
        """This moment in the computation."""
        seconds = time.perf_counter()
        return lambda: seconds

    def drain(self) -> None:
        """Block until no copy is under way on any stream."""

    def _copy(self, lane: Lane, target: Tensor, source: Tensor, slot: HostSlot, after: Ticket | None) -> Ticket:
        started = self.mark()
        target.copy_(source)
        slot.settle()
        return Ticket(started, self.mark(), wait=lambda: None, synchronize=lambda: None)


class _ThreadCopies(CopyEngine):
    """One thread for each direction. They start with the first copy.

    Bytes are copied by numpy: it lets go of the interpreter and stays in its thread, where a torch copy would open a
    second team of OpenMP threads that fights the computing one for the cores.
    """

    def __init__(self, device: torch.device, *, directory: Path | None = None) -> None:
        super().__init__(device, directory=directory)
        self._threads: dict[Lane, ThreadPoolExecutor] = {}

    def _copy(self, lane: Lane, target: Tensor, source: Tensor, slot: HostSlot, after: Ticket | None) -> Ticket:
        if lane not in self._threads:
            self._threads[lane] = ThreadPoolExecutor(1, thread_name_prefix=f"longvid-{lane.replace('_', '-')}")
        return _ticket(self._threads[lane].submit(_copy_bytes, [target, source], slot, after))

    def drain(self) -> None:
        for thread in self._threads.values():
            thread.submit(lambda: None).result()  # one thread each, in order

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        self._threads.clear()
        super().close()


def _ticket(future: Future[tuple[float, float]]) -> Ticket:
    def moment(which: int) -> float | None:
        return future.result()[which] if future.done() else None

    return Ticket(partial(moment, 0), partial(moment, 1), wait=future.result, synchronize=future.result)


def _copy_bytes(tensors: list[Tensor], slot: HostSlot, after: Ticket | None) -> tuple[float, float]:
    target, source = tensors
    tensors.clear()  # the pool holds on to arguments for a moment after the result is there
    if after is not None:
        after.synchronize()
    started = time.perf_counter()
    np.copyto(_bytes_of(target), _bytes_of(source))
    slot.settle()
    return started, time.perf_counter()


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return flattened(tensor.detach()).view(torch.uint8).numpy()


class _StreamCopies(CopyEngine):
    """One stream for each direction; an accelerator copies both ways at once while it computes."""

    def __init__(self, device: torch.device, *, directory: Path | None = None) -> None:
        super().__init__(device, directory=directory)
        self.wants_pinned = device.type == "cuda"
        self._streams: dict[Lane, torch.Stream] = {
            "to_host": torch.Stream(device=device),
            "to_device": torch.Stream(device=device),
        }
        self._origin = torch.Event(device=device, enable_timing=True)
        self._origin.record(torch.accelerator.current_stream(device))
        torch.accelerator.synchronize(device)
        self._origin_seconds = time.perf_counter()

    def pin(self, buffer: Tensor) -> Callable[[], None] | None:
        # Not torch's pin_memory: its allocator rounds up to a power of two, so that 2.7 GB would lock 4.
        if self.device.type != "cuda":
            return None
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = buffer.data_ptr()
        if int(runtime.cudaHostRegister(address, buffer.numel(), _PORTABLE)) == 0:
            return lambda: runtime.cudaHostUnregister(address)
        # The runtime reports a failed call once more, at whatever is launched next: let it be nothing that matters.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)
            torch.accelerator.synchronize(self.device)
        return None

    def _copy(self, lane: Lane, target: Tensor, source: Tensor, slot: HostSlot, after: Ticket | None) -> Ticket:
        stream = self._streams[lane]
        if after is not None and after.event is not None:
            stream.wait_event(after.event)
        stream.wait_stream(torch.accelerator.current_stream(self.device))
        with stream:
            started = self._record(stream)
            target.copy_(source, non_blocking=True)
            stopped = self._record(stream)
        slot.settle()  # of a file, which is pageable: it was copied by the time the call came back
        return Ticket(
            partial(self._seconds, started),
            partial(self._seconds, stopped),
            wait=lambda: torch.accelerator.current_stream(self.device).wait_event(stopped),
            synchronize=stopped.synchronize,
            event=stopped,
        )

    def _record(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(device=self.device, enable_timing=True)
        event.record(stream)
        return event

    def _seconds(self, event: torch.Event) -> float | None:
        if not (event.query() and self._origin.query()):
            return None
        return self._origin_seconds + self._origin.elapsed_time(event) / 1000.0

    def mark(self) -> Mark:
        return partial(self._seconds, self._record(torch.accelerator.current_stream(self.device)))

    def drain(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

"""CopyEngine: copies of contexts between a device and the host, on one copy stream for each direction.

On an accelerator a copy stream is a device stream, ordered by events against the stream that computes; host buffers are
page-locked, so that copies run while kernels do. On a CPU a copy stream is a thread, and the host buffer is other
memory or a file: the order of operations is the same, so everything is tested there. On ``meta`` nothing moves.

Only the work that needs a copy waits for it: :meth:`Ticket.wait` orders what is computed next behind it.

Memory rules on an accelerator. A device tensor is taken from the pool of the computing stream. A copy stream waits for
that stream before it writes to the tensor; that stream waits for the copy stream before the last reference is dropped.
So no ``record_stream`` is needed, and every byte is freed at a point that the plan knows.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from longvid.memory.buffer_pool import flattened
from longvid.memory.host_buffer import HostBuffer, HostSlot
from longvid.units import format_bytes

__all__ = ["CopyEngine", "Mark", "Ticket"]

_PORTABLE = 1
"cudaHostRegisterPortable: locked for every device"


class Mark(Protocol):
    """A moment on a copy stream or in the computation."""

    def seconds(self) -> float | None:
        """On the clock of ``time.perf_counter``; None while it has not happened yet."""
        ...


class Ticket(Protocol):
    """A copy that was asked for."""

    started: Mark
    stopped: Mark

    def wait(self) -> None:
        """Order whatever is computed from now on behind the copy."""
        ...

    def synchronize(self) -> None:
        """Block until the copy is done."""
        ...


class CopyEngine:
    """Moves contexts of every video of one session. Use it in a ``with`` statement; leaving waits for all copies.

    Args:
        device: where computing happens.
        directory: folder for contexts that leave the device; None for host memory.
    """

    def __init__(self, device: torch.device, *, directory: Path | None = None) -> None:
        self.device = device
        self.directory = directory
        self._made: _Streams | None = None
        self._spare: HostBuffer | None = None

    @property
    def _streams(self) -> _Streams:
        if self._made is None:
            self._made = _streams_of(self.device)
        return self._made

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

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for all copies, end the copy streams and give the host memory back. May be called again."""
        if self._made is not None:
            self._made.close()
        self._made = self._spare = None

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
        buffer = HostBuffer(num_bytes, self.directory, self._streams.pin)
        if self._streams.wants_pinned and self.directory is None and not buffer.pinned:
            warnings.warn(
                f"{format_bytes(buffer.num_bytes)} of host memory could not be page-locked; contexts are copied "
                "through pageable memory, which makes the device wait (raise the limit of locked memory, ulimit -l, "
                "or offload less)",
                stacklevel=2,
            )
        return buffer

    def drain(self) -> None:
        """Block until no copy is under way on any stream."""
        if self._made is not None:
            self._made.drain()

    def release(self, buffer: HostBuffer) -> None:
        """Take a buffer back whose slots are not used any more, by copies neither: see :meth:`drain`."""
        buffer.clear()
        self._spare = buffer

    def to_host(self, source: Tensor, target: HostSlot) -> Ticket:
        """Copy a dense device tensor out, once all that was computed so far is done."""
        return self._streams.to_host(source, target)

    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket:
        """Copy into a new tensor of the slot's layout, once ``after``, the copy that filled the slot, is done."""
        return self._streams.to_device(source, target, after)

    def mark(self) -> Mark:
        """This moment in the computation."""
        return self._streams.mark()


# --------------------------------------------------------------------------------------------------- copy streams


class _Streams(ABC):
    wants_pinned = False

    def pin(self, buffer: Tensor) -> Callable[[], None] | None:
        """Page-lock a host buffer; what undoes it, or None."""
        return None

    @abstractmethod
    def to_host(self, source: Tensor, target: HostSlot) -> Ticket: ...

    @abstractmethod
    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket: ...

    @abstractmethod
    def mark(self) -> Mark: ...

    @abstractmethod
    def drain(self) -> None:
        """Block until no copy is under way."""

    def close(self) -> None:
        """Wait for what is under way and end the copy streams."""
        self.drain()


def _streams_of(device: torch.device) -> _Streams:
    if device.type == "cpu":
        return _ThreadStreams()
    if device.type == "meta":
        return _MetaStreams()
    if device.type in ("cuda", "xpu"):
        return _DeviceStreams(device)
    return _InlineStreams()


class _Instant:
    """A moment that has passed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def seconds(self) -> float | None:
        return self._seconds


class _InlineTicket:
    def __init__(self, started: float, stopped: float) -> None:
        self.started: Mark = _Instant(started)
        self.stopped: Mark = _Instant(stopped)

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


class _InlineStreams(_Streams):
    """Copies at once, for devices without streams of their own to copy on."""

    def to_host(self, source: Tensor, target: HostSlot) -> Ticket:
        return self._copy(target.tensor, source, target)

    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket:
        return self._copy(target, source.tensor, source)

    def _copy(self, target: Tensor, source: Tensor, slot: HostSlot) -> Ticket:
        started = time.perf_counter()
        target.copy_(source)
        slot.settle()
        return _InlineTicket(started, time.perf_counter())

    def mark(self) -> Mark:
        return _Instant(time.perf_counter())

    def drain(self) -> None: ...


class _MetaStreams(_Streams):
    def to_host(self, source: Tensor, target: HostSlot) -> Ticket:
        return _InlineTicket(0.0, 0.0)

    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket:
        return _InlineTicket(0.0, 0.0)

    def mark(self) -> Mark:
        return _Instant(0.0)

    def drain(self) -> None: ...


class _ThreadTicket:
    def __init__(self, future: Future[tuple[float, float]]) -> None:
        self._future = future
        self.started: Mark = _FutureMark(future, 0)
        self.stopped: Mark = _FutureMark(future, 1)

    def wait(self) -> None:
        self._future.result()

    synchronize = wait


class _FutureMark:
    def __init__(self, future: Future[tuple[float, float]], which: int) -> None:
        self._future, self._which = future, which

    def seconds(self) -> float | None:
        return self._future.result()[self._which] if self._future.done() else None


class _ThreadStreams(_Streams):
    """One thread for each direction. They start with the first copy.

    Bytes are copied by numpy: it lets go of the interpreter and stays in its thread, where a torch copy would open a
    second team of OpenMP threads that fights the computing one for the cores.
    """

    def __init__(self) -> None:
        self._out: ThreadPoolExecutor | None = None
        self._in: ThreadPoolExecutor | None = None

    def to_host(self, source: Tensor, target: HostSlot) -> Ticket:
        if self._out is None:
            self._out = ThreadPoolExecutor(1, thread_name_prefix="longvid-to-host")
        return _ThreadTicket(self._out.submit(_copy_bytes, [target.tensor, source], target, None))

    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket:
        if self._in is None:
            self._in = ThreadPoolExecutor(1, thread_name_prefix="longvid-to-device")
        return _ThreadTicket(self._in.submit(_copy_bytes, [target, source.tensor], source, after))

    def mark(self) -> Mark:
        return _Instant(time.perf_counter())

    def drain(self) -> None:
        for stream in (self._out, self._in):
            if stream is not None:
                stream.submit(lambda: None).result()  # one thread each, in order

    def close(self) -> None:
        for stream in (self._in, self._out):
            if stream is not None:
                stream.shutdown(wait=True)
        self._in = self._out = None


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


class _StreamTicket:
    def __init__(self, device: torch.device, started: Mark, stopped: Mark, event: torch.Event) -> None:
        self._device, self.started, self.stopped, self._event = device, started, stopped, event

    @property
    def event(self) -> torch.Event:
        """Reached when the copy is done."""
        return self._event

    def wait(self) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()


class _EventMark:
    def __init__(self, event: torch.Event, origin: torch.Event, origin_seconds: float) -> None:
        self._event, self._origin, self._origin_seconds = event, origin, origin_seconds

    def seconds(self) -> float | None:
        if not (self._event.query() and self._origin.query()):
            return None
        return self._origin_seconds + self._origin.elapsed_time(self._event) / 1000.0


class _DeviceStreams(_Streams):
    """One stream for each direction; an accelerator copies both ways at once while it computes."""

    def __init__(self, device: torch.device) -> None:
        self.wants_pinned = device.type == "cuda"
        self._device = device
        self._out = torch.Stream(device=device)
        self._in = torch.Stream(device=device)
        self._origin = torch.Event(device=device, enable_timing=True)
        self._origin.record(torch.accelerator.current_stream(device))
        torch.accelerator.synchronize(device)
        self._origin_seconds = time.perf_counter()

    def pin(self, buffer: Tensor) -> Callable[[], None] | None:
        # Not torch's pin_memory: its allocator rounds up to a power of two, so that 2.7 GB would lock 4.
        if self._device.type != "cuda":
            return None
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = buffer.data_ptr()
        if int(runtime.cudaHostRegister(address, buffer.numel(), _PORTABLE)) == 0:
            return lambda: runtime.cudaHostUnregister(address)
        # The runtime reports a failed call once more, at whatever is launched next: let it be nothing that matters.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device).add_(1)
            torch.accelerator.synchronize(self._device)
        return None

    def to_host(self, source: Tensor, target: HostSlot) -> Ticket:
        return self._copy(self._out, target.tensor, source, target)

    def to_device(self, source: HostSlot, target: Tensor, after: Ticket | None) -> Ticket:
        if isinstance(after, _StreamTicket):
            self._in.wait_event(after.event)
        return self._copy(self._in, target, source.tensor, source)

    def _copy(self, stream: torch.Stream, target: Tensor, source: Tensor, slot: HostSlot) -> Ticket:
        stream.wait_stream(torch.accelerator.current_stream(self._device))
        with stream:
            started = self._record(stream)
            target.copy_(source, non_blocking=True)
            stopped = self._record(stream)
        slot.settle()  # of a file, which is pageable: it was copied by the time the call came back
        return _StreamTicket(self._device, self._as_mark(started), self._as_mark(stopped), stopped)

    def _record(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(device=self._device, enable_timing=True)
        event.record(stream)
        return event

    def _as_mark(self, event: torch.Event) -> Mark:
        return _EventMark(event, self._origin, self._origin_seconds)

    def mark(self) -> Mark:
        return self._as_mark(self._record(torch.accelerator.current_stream(self._device)))

    def drain(self) -> None:
        self._out.synchronize()
        self._in.synchronize()

"""Offloader: where each context of one video is, and having it on the device when its layer runs.

One chunk opens the window of every layer once, always in the same order. That order is learned in the first chunk;
from then on, when the window of layer l opens ::

    1. what earlier layers sent out has left the device by now: its memory is free
    2. l's context is on the device, and those of the next layers are too or are on their way, as many as fit in the
       placement's prefetch_bytes
    3. l's context is handed over; row by row its new context takes the old one's place as the layer's input becomes
       known and, if the placement says so, starts for the host while the layer computes the last of it

Layers that run several times in a chunk, each time for a few of its frames, form a **group**, which is one such layer
here: all its contexts come before it begins and stay while it runs. Each starts for the host when it is complete, and
all have left when the group ends, so each moves once per chunk.

So between two openings the device holds the resident contexts and a few others, and which ones is known in advance
(:meth:`~longvid.memory.offload.Placement.staged`). Resident contexts never move. Where a context is never changes a
result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longvid.events import Lane, Span
from longvid.memory.buffer_pool import TensorKind
from longvid.memory.copy_engine import CopyEngine, Mark, Ticket
from longvid.memory.host_buffer import HostBuffer, HostSlot
from longvid.memory.offload import Placement

__all__ = ["Offloader", "empty_context"]


@dataclass(slots=True)
class _Home:
    """The context of one layer: on the device, on the host, or on its way."""

    num_bytes: int = 0
    device: Tensor | None = None
    host: HostSlot | None = None
    arriving: Ticket | None = None
    sent: Ticket | None = None
    "the copy that filled ``host``"


class Offloader:
    """All contexts of one video, by the path of their layer.

    ``copies`` moves them; it may be None if nothing is to be moved or timed. With ``host_sizes``, the bytes of every
    context that will leave, the host memory is taken at once and now; else each takes its own when it first leaves.
    Moves and computations are timed if ``traced``, see :meth:`collect_spans`.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        copies: CopyEngine | None = None,
        *,
        host_sizes: tuple[int, ...] = (),
        traced: bool = False,
    ) -> None:
        self._placement = placement or Placement()
        if self._placement.offloaded and copies is None:
            raise ValueError("contexts are to be offloaded, and nothing is there to move them: pass a CopyEngine")
        self._copies = copies
        self._evicted = False
        self._in_use = ""
        "path of the layer whose window holds its context; it is sent when it is kept"
        self._homes: dict[str, _Home] = {}
        "in the order in which the layers run"
        self._groups: dict[str, list[str]] = {}
        "the layers of each group in that order; a layer that is in no other is a group of its own"
        self._group: str | None = None
        "the group that runs"
        self._contexts: list[tuple[str, int]] = []
        "group and bytes in that order; known when the first chunk is through"
        self._position: dict[str, int] = {}
        self._num_known = 0
        "contexts that are in these sizes"
        self._buffers: list[HostBuffer] = []
        self._leaving: list[_Home] = []
        self._log: list[tuple[Lane, str, Mark, Mark, int]] | None = [] if traced and copies is not None else None
        self._opened: tuple[str, Mark] | None = None
        if host_sizes and copies is not None:
            self._buffers.append(copies.host_buffer(host_sizes))

    # ------------------------------------------------------------------------------------------- numbers

    @property
    def num_bytes(self) -> int:
        """Bytes of all contexts that exist, wherever they are."""
        return sum(home.num_bytes for home in self._homes.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of contexts that hold device memory now, those on their way included."""
        return sum(home.num_bytes for home in self._homes.values() if home.device is not None)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the contexts that leave the device between chunks."""
        return sum(
            self._homes[path].num_bytes
            for group, paths in self._groups.items()
            if group in self._placement.offloaded
            for path in paths
        )

    def layer_bytes(self) -> dict[str, int]:
        """Bytes of each context by the path of its layer."""
        return {path: home.num_bytes for path, home in self._homes.items()}

    def layer_bytes_by_group(self) -> dict[str, dict[str, int]]:
        """Bytes of each context by the name of its group and the path of its layer, in the order in which they run."""
        return {group: {path: self._homes[path].num_bytes for path in paths} for group, paths in self._groups.items()}

    # ------------------------------------------------------------------------------------------- between chunks

    def contexts(self) -> Iterator[tuple[str, Tensor]]:
        """Path and context of every layer in the order in which they run, each where it is: read them, and let go."""
        self._free_what_left()
        for path, home in self._homes.items():
            if home.device is not None:
                if home.arriving is not None:
                    home.arriving.synchronize()
                yield path, home.device
            elif home.host is not None:
                if home.sent is not None:
                    home.sent.synchronize()
                yield path, home.host.tensor

    # ------------------------------------------------------------------------------------------- one layer

    def begin(self, group: str) -> None:
        """A group begins to run: its contexts come to the device, if they are not there. May be repeated."""
        self._stage(group)
        self._group = group

    def end(self) -> None:
        """The group has run, and holds no device memory any more if its contexts leave."""
        self._group = None
        self._free_what_left()

    def _stage(self, group: str) -> None:
        """Make room for a group that runs next, and fetch its contexts and those of coming groups."""
        self._free_what_left()
        paths = self._groups.setdefault(group, [])
        if not any(self._homes[path].num_bytes for path in paths):
            return
        known = sum(home.num_bytes > 0 for home in self._homes.values())
        if self._num_known < known:  # in a cold start a few layers come in with each chunk
            self._num_known = known
            sizes = {name: sum(self._homes[path].num_bytes for path in paths) for name, paths in self._groups.items()}
            self._contexts = list(sizes.items())
            self._position = {name: i for i, name in enumerate(sizes)}
        for position in self._placement.staged(self._position[group], self._contexts):
            for path in self._groups[self._contexts[position][0]]:
                self._fetch(path)

    def open(self, path: str) -> Tensor | None:
        """The context of a layer whose window opens, on the device; None in the first chunk of a video.

        May be repeated after it failed.
        """
        group = self._group or path
        if self._group is None:
            self._stage(path)
        home = self._homes.setdefault(path, _Home())
        if path not in self._groups[group]:
            self._groups[group].append(path)
        self._in_use = path
        if not home.num_bytes:
            self._mark_open(path)
            return None
        self._fetch(path)  # it may have left within its group, when the device ran out of memory
        if home.arriving is not None:
            home.arriving.wait()
            home.arriving = None
        self._mark_open(path)
        return home.device

    def keep(self, path: str, context: Tensor, *, complete: bool = True) -> None:
        """Make ``context`` that of a layer for the next chunk. It is taken over: nobody else may write to it.

        It is not ``complete`` while pieces of the same chunk follow.

        It is what :meth:`open` gave, changed in place, or in the first chunk a tensor of :func:`empty_context`.
        """
        home = self._homes[path]
        home.device, home.num_bytes = context, context.numel() * context.element_size()
        self._in_use = ""
        if self._evicted:  # also a context that has just come into being
            self._placement = Placement(offloaded=self._placement.offloaded | {self._group or path})
        if complete and (self._group or path) in self._placement.offloaded:
            self._send(path, home)

    def done(self, path: str) -> None:
        """The layer has computed its output."""
        if self._log is not None and self._copies is not None and self._opened is not None:
            opened, started = self._opened
            if opened == path:
                self._log.append(("compute", path, started, self._copies.mark(), self._homes[path].num_bytes))

    # ------------------------------------------------------------------------------------------- all layers

    def evict(self) -> int:
        """Move every context but the one that a window holds to the host, and have them all live there from now on.

        Returns:
            The device bytes that this set free; 0 if nothing was left to move.
        """
        if self._copies is None:
            return 0
        self._free_what_left()
        before = self.device_bytes
        self._evicted = True
        self._placement = Placement(offloaded=self._placement.offloaded.union(self._groups))
        for path, home in self._homes.items():
            if home.arriving is not None and path != self._in_use:  # a prefetched context is still on the host
                home.arriving.synchronize()
                home.device = home.arriving = None
        moving = {p: home for p, home in self._homes.items() if home.device is not None and p != self._in_use}
        homeless = [home.num_bytes for home in moving.values() if home.host is None]
        if homeless:
            self._buffers.append(self._copies.host_buffer(homeless))
        for path, home in moving.items():
            self._send(path, home)
        self._copies.drain()
        self._free_what_left()
        return before - self.device_bytes

    def drop(self) -> None:
        """Free every context, after waiting for what is on its way. May be called again."""
        try:
            # All of it, not only what is listed as leaving: to be ordered behind a copy is not to know that it is done.
            if self._copies is not None:
                self._copies.drain()
        finally:
            self._leaving.clear()
            for home in self._homes.values():
                home.device = home.host = home.arriving = home.sent = None
                home.num_bytes = 0
            buffers, self._buffers = self._buffers, []
        if self._copies is not None:
            for buffer in buffers:
                self._copies.release(buffer)

    def collect_spans(self, origin_seconds: float) -> tuple[Span, ...]:
        """Timed moves and computations that ended since the last call; times count from ``origin_seconds``."""
        spans, rest = [], []
        for entry in self._log or ():
            lane, path, started, stopped, num_bytes = entry
            start, stop = started(), stopped()
            if start is None or stop is None:
                rest.append(entry)
                continue
            start, stop = start - origin_seconds, stop - origin_seconds
            spans.append(Span(lane=lane, layer=path, start_seconds=start, stop_seconds=stop, num_bytes=num_bytes))
        if self._log is not None:
            self._log = rest
        return tuple(spans)

    # ------------------------------------------------------------------------------------------- moves

    def _send(self, path: str, home: _Home) -> None:
        assert self._copies is not None
        assert home.device is not None
        if home.host is None:
            home.host = self._slot(home.device)
        home.sent = self._copies.to_host(home.device, home.host)
        self._leaving.append(home)
        self._note("to_host", path, home.sent, home.num_bytes)

    def _fetch(self, path: str) -> None:
        home = self._homes[path]
        if home.device is not None or home.host is None:
            return
        assert self._copies is not None
        home.device = _empty_like(home.host.tensor, self._copies.device)
        home.arriving = self._copies.to_device(home.host, home.device, home.sent)
        self._note("to_device", path, home.arriving, home.num_bytes)

    def _free_what_left(self) -> None:
        while self._leaving:
            home = self._leaving.pop()
            if home.sent is not None:
                home.sent.wait()
            home.device = None

    def _slot(self, context: Tensor) -> HostSlot:
        size = context.numel() * context.element_size()
        for buffer in self._buffers:
            if buffer.free_bytes >= size:
                return buffer.take(context)
        assert self._copies is not None
        self._buffers.append(self._copies.host_buffer([size]))
        return self._buffers[-1].take(context)

    # ------------------------------------------------------------------------------------------- clock

    def _mark_open(self, path: str) -> None:
        if self._log is not None and self._copies is not None:
            self._opened = (path, self._copies.mark())

    def _note(self, lane: Lane, path: str, ticket: Ticket, num_bytes: int) -> None:
        if self._log is not None:
            self._log.append((lane, path, ticket.started, ticket.stopped, num_bytes))


def empty_context(shape: tuple[int, int, int, int, int], kind: TensorKind) -> Tensor:
    """Memory for the context of a layer: an ordinary tensor, so that chunks may run in and outside inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=kind.dtype, device=kind.device, memory_format=kind.layout)


def _empty_like(context: Tensor, device: torch.device) -> Tensor:
    B, C, T, H, W = context.shape
    return empty_context((B, C, T, H, W), replace(TensorKind.of(context), device=device))

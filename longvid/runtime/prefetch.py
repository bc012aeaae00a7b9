"""Prefetch: one thread reads ahead of the compute loop, one writes behind it, a bounded number of items each.

Whichever side is slow, the others wait for it, so memory is bounded. An error of a thread is raised in the compute loop
with its own traceback. The loop itself is a plain ``for`` in the caller's thread. Nothing polls: what is waited for
rings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

__all__ = ["Prefetcher", "StopRequest", "Writer"]

T = TypeVar("T")


class StopRequest:
    """Asks a run to end between two chunks, and wakes its compute loop.

    A signal handler may call :meth:`make`: it takes no lock, since ``SimpleQueue.put`` may interrupt itself.
    """

    def __init__(self) -> None:
        self.made = False
        self._bell: SimpleQueue[None] = SimpleQueue()

    def make(self) -> None:
        """Ask the run to end."""
        self.made = True
        self.ring()

    def ring(self, _: object = None) -> None:
        """Wake the loop, so that it looks at what it waits for."""
        self._bell.put(None)

    def wait(self) -> None:
        """Wait for a ring, one that came earlier included."""
        self._bell.get()


class _Stopwatch:
    """Adds up the time that one thread spends inside it. Any thread may read it, at any moment."""

    def __init__(self) -> None:
        self._state: tuple[float, float | None] = (0.0, None)
        "seconds until the last exit, and the moment of the last entry; one object, so that they are read as a pair"

    def __enter__(self) -> None:
        self._state = (self._state[0], time.perf_counter())

    def __exit__(self, *_: object) -> None:
        self._state = (self.seconds, None)

    @property
    def seconds(self) -> float:
        """Time inside so far; it never decreases."""
        now = time.perf_counter()  # read before the state: read after it, it could count what came after an exit
        seconds, entered = self._state
        return seconds if entered is None else seconds + max(0.0, now - entered)


class _Worker:
    """One thread, the items that it was given, and the time on both sides."""

    def __init__(self, name: str, depth: int, stop: StopRequest | None) -> None:
        self._depth = depth
        self._stop = stop or StopRequest()
        self._pool = ThreadPoolExecutor(1, name)
        self._items: deque[Future[Any]] = deque()
        self._work, self._wait = _Stopwatch(), _Stopwatch()

    @property
    def busy_seconds(self) -> float:
        """Time in which the thread worked, on the item in hand too; waiting for items or room does not count."""
        return self._work.seconds

    @property
    def wait_seconds(self) -> float:
        """Time in which the caller waited for the thread, also for the last items when it left."""
        return self._wait.seconds


class Prefetcher(_Worker, Generic[T]):
    """Runs an iterator in a thread, at most ``depth`` items and the one in hand ahead of the consumer.

    Use it in a ``with`` statement and iterate over it. Leaving stops the thread and waits for it; the iterator is
    then free to be closed. ``stop`` ends the iteration once it is made, also while the consumer waits. ``check`` is
    called when the consumer is woken while it waits, so that the error of a writer is raised although the source is
    slow.
    """

    def __init__(
        self,
        items: Iterator[T],
        *,
        depth: int = 2,
        check: Callable[[], None] = lambda: None,
        stop: StopRequest | None = None,
    ) -> None:
        super().__init__("longvid-read", depth, stop)
        self._source = items
        self._check = check
        self.ended = False
        "whether iteration ended because there are no more items"

    def _read(self) -> list[T]:
        """The next item in a list, or an empty list at the end."""
        with self._work:
            return list(islice(self._source, 1))

    def _submit(self) -> None:
        future = self._pool.submit(self._read)
        future.add_done_callback(self._stop.ring)
        self._items.append(future)

    def __enter__(self) -> Self:
        for _ in range(self._depth + 1):
            self._submit()
        return self

    def __iter__(self) -> Iterator[T]:
        while found := self._next():
            yield found.pop()  # the consumer alone holds the item

    def _next(self) -> list[T]:
        with self._wait:
            while not (self._stop.made or self._items[0].done()):
                self._check()
                self._stop.wait()
            if self._stop.made:
                return []
            future = self._items.popleft()
            self._submit()
            found: list[T] = future.result()
            self.ended = not found
            return found

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._items.clear()


class Writer(_Worker, Generic[T]):
    """Calls ``consume(item)`` in a thread for every item that is put, in order.

    Use it in a ``with`` statement. At most ``depth`` items wait beside the one in hand. Leaving it cleanly waits until
    all is consumed; leaving it by an exception drops the items that wait. An error of ``consume`` is raised at the next
    :meth:`put` or on leaving; items after it are dropped. It rings ``stop``, so that a loop that waits for its source
    looks.
    """

    def __init__(self, consume: Callable[[T], None], *, depth: int = 2, stop: StopRequest | None = None) -> None:
        super().__init__("longvid-write", depth, stop)
        self._consume = consume
        self._error: BaseException | None = None

    def _write(self, item: T) -> None:
        if self._error is None:
            try:
                with self._work:
                    self._consume(item)
            except BaseException as exc:  # raised in the producer's thread
                self._error = exc
                self._stop.ring()

    def put(self, item: T) -> None:
        """Hand over an item; waits while ``depth`` items are waiting behind the one in hand."""
        self.settle(self._depth)
        self._items.append(self._pool.submit(self._write, item))

    def settle(self, most: int = 0) -> None:
        """Wait until at most so many items are not consumed, and raise the error of ``consume``, if there was one."""
        with self._wait:
            while len(self._items) > most:
                self._items[0].result()
                self._items.popleft()
        self.check()

    def check(self) -> None:
        """Raise the error of ``consume``, if there was one."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        try:
            if exc_type is None:
                self.settle()
        finally:
            self._pool.shutdown(cancel_futures=True)

"""Threads beside the compute loop: one reads ahead, one writes behind, each through a bounded queue.

A full queue makes its producer wait, so memory is bounded whichever side is slow. Errors of a thread appear in the
compute loop with their own traceback. The compute loop itself stays a plain ``for`` in the caller's thread.

Who waits for an item or for room is woken by it; nobody waits for the next look of a poll, neither while the items flow
nor when they end or are to stop. The poll is for what a queue cannot tell: that the other thread has failed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

__all__ = ["Prefetcher", "Writer"]

T = TypeVar("T")

_POLL_SECONDS = 0.05
"how often a waiting thread looks whether the other one has failed"


class _Stopwatch:
    """Adds up the time for which one thread is inside it. Any thread may read it, at any moment."""

    def __init__(self) -> None:
        self._state: tuple[float, float | None] = (0.0, None)
        "seconds until the last exit, and the moment of the last entry; one object, so that they are read as a pair"

    def __enter__(self) -> None:
        self._state = (self._state[0], time.perf_counter())

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        seconds, entered = self._state
        assert entered is not None
        self._state = (seconds + (time.perf_counter() - entered), None)

    @property
    def seconds(self) -> float:
        """Time inside so far; never less than it was."""
        now = time.perf_counter()  # read before the state: read after it, it could count what came after an exit
        seconds, entered = self._state
        return seconds if entered is None else seconds + max(0.0, now - entered)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    """No more items."""


class _Settled(threading.Event):
    """Set by the thread that comes to it: everything before it is done."""


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread, at most ``depth`` items ahead of the consumer.

    Use it in a ``with`` statement and iterate over it. Leaving stops the thread and waits for it; the iterator is
    then free to be closed.

    Args:
        items: what is read ahead.
        depth: items that may wait.
        name: of the thread.
        check: called now and then while the consumer waits; what it raises ends the wait. So a writer that failed is
            heard of although the source is slow.
        stop: asked before every item, and now and then while the consumer waits; if true, iteration ends.
    """

    def __init__(
        self,
        items: Iterator[T],
        *,
        depth: int = 2,
        name: str = "longvid-read",
        check: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._items = items
        self._check = check
        self._asked_to_stop = stop
        self.ended = False
        "whether iteration ended because there are no more items"
        self._queue: queue.Queue[T | _Failure | type[_End]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._work = _Stopwatch()
        self.wait_seconds = 0.0
        "time for which the consumer waited"

    @property
    def busy_seconds(self) -> float:
        """Time for which the thread has been making items, the one in hand included; not that for which it waited."""
        return self._work.seconds

    def _run(self) -> None:
        try:
            while True:
                with self._work:
                    item = next(self._items, _End)
                if not self._put(item) or item is _End:
                    return
                del item  # it is the consumer's; the next one may be as large
        except BaseException as exc:  # carried to the consumer
            self._put(_Failure(exc))

    def _put(self, item: T | _Failure | type[_End]) -> bool:
        """Wait for room; False if there is no need to go on."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                return not self._stop.is_set()
        return False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[T]:
        while True:
            started = time.perf_counter()
            item = self._get()
            self.wait_seconds += time.perf_counter() - started
            if item is None:
                return
            if item is _End:
                self.ended = True
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item  # type: ignore[misc]
            del item

    def _get(self) -> T | _Failure | type[_End] | None:
        """The next item; None if there is no need to go on."""
        while not self._asked_to_stop():
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
            self._check()
        return None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        _empty(self._queue)  # wakes the thread if it waits for room
        self._thread.join()


class Writer(Generic[T]):
    """Calls ``consume(item)`` in a thread for every item that is put, in order.

    Use it in a ``with`` statement. Leaving it cleanly waits until all is consumed; leaving it by an exception drops
    what still waits. An error of ``consume`` is raised at the next :meth:`put` or on leaving.
    """

    def __init__(self, consume: Callable[[T], None], *, depth: int = 2, name: str = "longvid-write") -> None:
        self._consume = consume
        self._queue: queue.Queue[T | _Settled | type[_End]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._work = _Stopwatch()
        self.wait_seconds = 0.0
        "time for which the producer waited, also for the last items when it left"

    @property
    def busy_seconds(self) -> float:
        """Time for which the thread has been consuming items, the one in hand included."""
        return self._work.seconds

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is _End or self._stop.is_set():
                return
            if isinstance(item, _Settled):
                item.set()
                continue
            try:
                with self._work:
                    self._consume(item)  # type: ignore[arg-type]
            except BaseException as exc:  # carried to the producer
                self._error = exc
                self._stop.set()
                _empty(self._queue)  # wakes the producer if it waits for room
            del item

    def put(self, item: T) -> None:
        """Hand over an item; waits while ``depth`` items are pending."""
        self._put(item)

    def settle(self) -> None:
        """Wait until all that was put is consumed, and raise the error of ``consume``, if there was one."""
        mark = _Settled()
        self._put(mark)
        started = time.perf_counter()
        while not (mark.wait(_POLL_SECONDS) or self._stop.is_set()):
            pass
        self.wait_seconds += time.perf_counter() - started
        self.check()

    def check(self) -> None:
        """Raise the error of ``consume``, if there was one."""
        if self._error is not None:
            raise self._error

    def _put(self, item: T | _Settled | type[_End]) -> None:
        started = time.perf_counter()
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                break
        self.wait_seconds += time.perf_counter() - started
        self.check()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._put(_End)
                started = time.perf_counter()
                self._thread.join()
                self.wait_seconds += time.perf_counter() - started
        finally:
            self._stop.set()
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(_End)  # wakes the thread if it waits for an item
            self._thread.join()
        if exc_type is None and self._error is not None:
            raise self._error


def _empty(items: queue.Queue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            items.get_nowait()

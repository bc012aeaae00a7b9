"""Runs FFmpeg calls in a thread that can be abandoned if they hang."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from longvid.errors import SourceError

__all__ = ["Watchdog"]

T = TypeVar("T")
_Steps: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]"


class Watchdog:
    """Runs steps one after the other in a thread of its own and abandons a step that makes no progress.

    A decoder that hangs inside FFmpeg cannot be stopped from outside. Its thread is a daemon, which does not keep the
    process from ending. A step may go ``seconds`` without :meth:`beat`.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._seconds = seconds
        self._last_beat = 0.0
        self._steps: _Steps = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, self._steps.put, None)
        self.stalled = False
        "a step was abandoned: the objects that it uses must not be touched any more"

    def run(self, step: Callable[[], T]) -> T:
        """Do ``step`` in the thread and return what it returns, or raise what it raises.

        Raises:
            SourceError: the step stalled, now or earlier.
        """
        if self.stalled:
            raise self._error()
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._steps,), name="longvid-decoder", daemon=True)
            self._thread.start()
        done: Future[T] = Future()
        self._last_beat = time.monotonic()
        self._steps.put((step, done))
        try:
            while not done.done():
                left = self._last_beat + self._seconds - time.monotonic()
                if left <= 0:
                    self.stalled = True
                    raise self._error()
                try:
                    done.exception(timeout=left)
                except TimeoutError:
                    continue
            return done.result()
        finally:
            del done  # an error refers to this frame: a frame that refers to the error would keep a decoder alive

    def beat(self) -> None:
        """Report progress from inside a step.

        Raises:
            RuntimeError: the step was abandoned.
        """
        if self.stalled:
            raise RuntimeError("the step was abandoned")
        self._last_beat = time.monotonic()

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._end()
        if self._thread is not None and not self.stalled:
            self._thread.join(self._seconds)

    def _error(self) -> SourceError:
        return SourceError(
            f"the decoder of {self._name} has delivered nothing for {self._seconds:g} s and was abandoned; convert the "
            f"file, or allow more with Limits.stall_seconds",
            kind="stalled",
        )


def _serve(steps: _Steps) -> None:
    """The thread; it refers to the queue alone, so that it keeps nothing alive."""
    while (item := steps.get()) is not None:
        step, done = item
        try:
            result = step()
        except BaseException as exc:  # the waiting thread raises it
            done.set_exception(exc)
        else:
            done.set_result(result)
            del result
        del item, step, done

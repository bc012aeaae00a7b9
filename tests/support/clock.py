"""Time that tests move by hand, and threads that are seen to wait."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

PATIENCE = 120
"seconds after which a test gives up on something that has to happen"


class Clock:
    """A clock that runs as the real one does and jumps when a test says so.

    Jumps are far longer than any test takes, so that what they are counted as shows however slow the machine is.
    """

    JUMP = 1000.0

    def __init__(self, real: Callable[[], float]) -> None:
        self._real = real
        self._moved = 0.0

    def __call__(self) -> float:
        return self._real() + self._moved

    def jump(self, share: float = 1.0) -> None:
        self._moved += share * self.JUMP


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that has to happen."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.001)


def wait_until_blocked(function: Callable, thread: threading.Thread | None = None) -> None:
    """Wait until a thread, by default the main one, is inside of this function and cannot leave it by itself.

    A method of a queue counts when it waits for an item or for room, one of a future when it waits for the result.
    """
    ident = (thread or threading.main_thread()).ident
    needed = {function.__code__}
    if function.__module__ in ("queue", "concurrent.futures._base"):
        needed.add(threading.Condition.wait.__code__)

    def is_inside() -> bool:
        frame, found = sys._current_frames().get(ident), set()
        while frame is not None:
            found.add(frame.f_code)
            frame = frame.f_back
        return needed <= found

    wait_until(is_inside, f"the thread waits in {function.__qualname__}")

"""Signals of the command line: the first asks a run to stop where it can be resumed, the next ends the program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvid.runtime.session import VideoSession

__all__ = ["Ended", "StopRequest", "handle_signals"]


class Ended(KeyboardInterrupt):
    """Raised when a signal asks the process to end; unwinds as Ctrl-C does."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopRequest:
    """Signal handler: the first signal asks a run to stop where it can be resumed, the next one ends it at once."""

    def __init__(self) -> None:
        self.session: VideoSession | None = None
        self.signum: int | None = None

    def __call__(self, signum: int, _frame: object) -> None:
        """Handle a signal."""
        if self.session is None or self.signum is not None:
            raise Ended(signum)
        self.signum = signum
        if not self.session.stop():  # no run has begun, or it has ended
            raise Ended(signum)


@contextmanager
def handle_signals(handler: Callable[[int, Any], None], *, restore: bool) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP stop a run where it can be resumed, and unwind the program anywhere else.

    Without ``restore`` the signals are ignored afterwards: the program has reported how it ended and is about to exit.
    """
    # A signal that is ignored stays ignored, as nohup asks.
    wanted = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    try:
        before = {s: signal.signal(s, handler) for s in wanted}
    except ValueError:  # not the main thread: another program embeds the command line
        before = {}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old if restore else signal.SIG_IGN)

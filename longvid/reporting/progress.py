"""Progress of runs for people: a tqdm bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from longvid.events import ChunkEvent, RunObserver, RunStart
from longvid.units import format_bytes

__all__ = ["ProgressBar"]


class ProgressBar(RunObserver):
    """Callback that shows a tqdm bar on a terminal, and a line every ``interval`` seconds elsewhere.

    Args:
        file: where to write; standard error by default.
        interval: seconds between lines where there is no terminal.

    One bar can serve several runs, one after the other. A run that resumes starts its bar at the frames that are
    done. As a context manager it closes its bar at the end.
    """

    def __init__(self, *, file: TextIO | None = None, interval: float = 10.0) -> None:
        self._file = file or sys.stderr
        self._interval = interval
        self._bar: tqdm[Any] | None = None
        self._next_line = 0.0

    def run_started(self, start: RunStart) -> None:
        """Begin anew for this run."""
        self.close()
        self._next_line = time.monotonic() + self._interval

    def __call__(self, event: ChunkEvent) -> None:
        """Show how many frames of the video are done."""
        if self._file.isatty():
            self._show_bar(event)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._interval
            total = "" if event.frames_total is None else f" of {event.frames_total}"
            what = ", warming up" if event.warmup else ""
            print(f"{event.direction}: {event.frames_done}{total} frames{what}", file=self._file, flush=True)

    def _show_bar(self, event: ChunkEvent) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=event.frames_total,
                initial=event.frames_done - event.num_frames,
                unit="frame",
                desc=event.direction,
                file=self._file,
            )
        self._bar.set_description(event.direction + (" (warming up)" if event.warmup else ""), refresh=event.warmup)
        self._bar.set_postfix_str(
            f"device {format_bytes(event.peak_device_bytes)}, rss {format_bytes(event.rss_bytes)}", refresh=False
        )
        self._bar.update(event.frames_done - self._bar.n)

    def run_finished(self, _: object) -> None:
        """Leave the bar of this run as it stands."""
        self.close()

    def close(self) -> None:
        """Finish the bar, if one is shown. May be called again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""The report page: a callback that writes one HTML page about a run, which loads nothing from elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from longvid.errors import LongvidError, SessionStateError
from longvid.events import ChunkEvent, RunObserver, RunReport, RunStart
from longvid.files import check_file_target, write_whole
from longvid.reporting.history import RunHistory
from longvid.reporting.text import UNFINISHED, headline, page, section, short_section

__all__ = ["ReportPage"]

_MAX_DRAWN_RUNS = 5


class ReportPage(RunObserver):
    """Callback that writes a page about a run when the run is over, also when it failed.

    The page shows memory, the contexts on the device, transfers beside computation, throughput and how busy reading,
    computing and writing were, with the plan and the machine. What is kept during a run does not grow with the video.
    The page is below 3 MB.

    Args:
        path: where to write. The file appears whole when a run ends, and nothing is written before.
        overwrite: whether an existing file may be replaced. The page of a run that was not completed always may.

    Raises:
        StoreError: ``path`` cannot be written, or exists and ``overwrite`` is not set.
        LongvidError: the library that draws is not installed.

    One page can serve several runs, one after the other, with a section for each and charts for the last five.
    As a context manager it records a run that is left open as failed.
    """

    wants_spans = True

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        if find_spec("bokeh") is None:
            raise LongvidError('a report page needs bokeh, which is not installed: pip install "longvid[report]"')
        self._path = Path(path)
        check_file_target(path, overwrite=overwrite or _is_unfinished(self._path), what="report")
        self._sections: list[_Section] = []
        self._run: RunHistory | None = None

    def run_started(self, start: RunStart) -> None:
        """Begin a section."""
        self.close()
        self._run = RunHistory(start)

    def __call__(self, event: ChunkEvent) -> None:
        """Add a chunk."""
        self._running().add(event)

    def run_finished(self, report: RunReport | None) -> None:
        """Write the page, with the sections of all runs so far.

        Raises:
            StoreError: it cannot be written.
        """
        run = self._running()
        self._run, run.report = None, report
        from longvid.reporting import charts

        script, places = charts.draw(run)
        number = len(self._sections) + 1
        self._sections.append(_Section(headline(run), section(number, run, places), short_section(number, run), script))
        for old in self._sections[:-_MAX_DRAWN_RUNS]:
            old.html, old.script = old.short_html, ""
        scripts = [section.script for section in self._sections if section.script]
        if scripts:
            scripts.insert(0, charts.library_script())
        sections, titles = [section.html for section in self._sections], [section.title for section in self._sections]
        html = page(sections, titles, scripts, completed=run.completed)
        write_whole(self._path, html, what="the run itself is not affected; its report")

    def _running(self) -> RunHistory:
        if self._run is None:
            raise SessionStateError("a report page got an event before run_started was called; call it first")
        return self._run

    def close(self) -> None:
        """Record a run that is left open as failed. May be called again."""
        if self._run is not None:
            self.run_finished(None)


def _is_unfinished(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return UNFINISHED in file.read(1024)


@dataclass(slots=True)
class _Section:
    """One finished run on the page. It is drawn once, however many runs follow."""

    title: str
    html: str
    short_html: str
    script: str

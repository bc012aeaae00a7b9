"""A callback that draws what a run did: one HTML page that holds all it shows and loads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from longvid.errors import LongvidError, SessionStateError
from longvid.events import ChunkEvent, RunReport, RunStart
from longvid.files import check_file_target, write_whole
from longvid.reporting.history import RunHistory
from longvid.reporting.text import UNFINISHED, headline, page, section, short_section

__all__ = ["ReportPage"]

_MAX_DRAWN_RUNS = 5


class ReportPage:
    """Collects what a run tells, and writes a page about it when the run is over, also when it failed.

    The page shows memory, the contexts on the device, transfers beside computation, throughput and the share of time
    in which compute ran beside reading and writing, with the plan and the machine. What is kept while a run goes on
    does not grow with the video. The page is below 3 MB.

    Args:
        path: where to write. The file appears whole when a run ends, and nothing is written before.
        overwrite: whether an existing file may be replaced. The page of a run that was not completed always may.

    Raises:
        StoreError: ``path`` cannot be written.
        LongvidError: the library that draws is not installed.

    One page may serve several runs, one after the other, with a section for each; of the last five there are charts.
    As a context manager it ends a run that was left open as one that failed.
    """

    wants_spans = True

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        _require_bokeh()
        self._path = Path(path)
        check_file_target(path, overwrite=overwrite or _is_unfinished(self._path), what="report")
        self._sections: list[_Section] = []
        self._run: RunHistory | None = None

    def run_started(self, start: RunStart) -> None:
        """Begin a section."""
        self.close()
        self._run = RunHistory(start)

    def __call__(self, event: ChunkEvent) -> None:
        """Take in a chunk."""
        self._running().add(event)

    def run_finished(self, report: RunReport | None) -> None:
        """Write the page, with the sections of all runs so far.

        Raises:
            StoreError: it cannot be written.
        """
        run = self._running()
        self._run, run.report = None, report
        self._sections.append(_Section.of(len(self._sections) + 1, run))
        for old in self._sections[:-_MAX_DRAWN_RUNS]:
            old.shorten()
        write_whole(self._path, _page(self._sections), what="the run itself is not affected, but its report")

    def _running(self) -> RunHistory:
        if self._run is None:
            raise SessionStateError("a report page was told of a run before its run_started was called")
        return self._run

    def close(self) -> None:
        """End a run that was left open as one that failed. May be called again."""
        if self._run is not None:
            self.run_finished(None)

    def __enter__(self) -> ReportPage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_bokeh() -> None:
    """Ask now, not after hours of work. It is imported only here, since few runs want a report."""
    try:
        import_module("bokeh")
    except ImportError as exc:
        raise LongvidError(
            'a report page is drawn by bokeh, which is not installed: pip install "longvid[report]"'
        ) from exc


def _is_unfinished(path: Path) -> bool:
    """Whether ``path`` is a page whose last run was not completed."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return UNFINISHED in file.read(1024)


@dataclass(slots=True)
class _Section:
    """A run that is over, as it stands on the page. Drawn once, however many runs follow."""

    title: str
    words: str
    whole: str
    script: str
    completed: bool

    @classmethod
    def of(cls, number: int, run: RunHistory) -> _Section:
        from longvid.reporting import charts

        script, places = charts.draw(run)
        completed = run.report is not None and run.report.complete
        return cls(headline(run), short_section(number, run), section(number, run, places), script, completed)

    def shorten(self) -> None:
        """Keep the words alone."""
        self.whole, self.script = self.words, ""


def _page(sections: list[_Section]) -> str:
    from longvid.reporting import charts

    scripts = [section.script for section in sections if section.script]
    if scripts:
        scripts.insert(0, charts.library_script())
    return page(
        [section.whole for section in sections],
        [section.title for section in sections],
        scripts,
        completed=sections[-1].completed,
    )

"""The report page: a callback that writes one HTML page about a run, which loads nothing from elsewhere.

Text from outside is escaped here and in :mod:`longvid.reporting.charts`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from longvid import __version__
from longvid.errors import LongvidError, SessionStateError
from longvid.events import ChunkEvent, LayerContext, RunObserver, RunReport, RunStart
from longvid.files import check_file_target, write_whole
from longvid.reporting.history import RunHistory, layer_count
from longvid.units import format_bytes, format_seconds

__all__ = ["ReportPage"]

_MAX_DRAWN_RUNS = 5
_UNFINISHED = '<meta name="longvid-run" content="unfinished">'
"stands in a page whose last run was not completed, which the page of the next run may replace"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_OPEN_TABLE_ROWS = 12


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

        script, drawn = charts.draw(run)
        begin = f'<section class="run" id="run-{len(self._sections) + 1}">{_opening(run)}'
        short, full = f"{begin}</section>", f"{begin}{_details(run, drawn)}</section>"
        self._sections.append(_Section(_headline(run), full, short, script))
        for old in self._sections[:-_MAX_DRAWN_RUNS]:
            old.html, old.script = old.short_html, ""
        scripts = [section.script for section in self._sections if section.script]
        if scripts:
            scripts.insert(0, charts.library_script())
        html = _page(self._sections, scripts, completed=run.completed)
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
        return _UNFINISHED in file.read(1024)


@dataclass(slots=True)
class _Section:
    """One finished run on the page. It is drawn once, however many runs follow."""

    title: str
    html: str
    short_html: str
    script: str


def _page(sections: Sequence[_Section], scripts: Sequence[str], *, completed: bool) -> str:
    """The whole page. It contains everything that it shows, and forbids the browser to load anything else."""
    titles = [section.title for section in sections]
    what = titles[0] if len(titles) == 1 else f"{len(titles)} runs"
    links = "".join(f'<li><a href="#run-{i}">{escape(text)}</a></li>' for i, text in enumerate(titles, start=1))
    style = files("longvid.reporting").joinpath("page.css").read_text(encoding="utf-8")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{"" if completed else _UNFINISHED}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>longvid report: {escape(what)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>longvid report{"" if len(titles) == 1 else f": {what}"}</h1>
{"" if len(titles) == 1 else f"<nav><ul>{links}</ul></nav>"}
<noscript><p>The charts of this page need JavaScript; its text and tables do not.</p></noscript>
{"".join(section.html for section in sections)}
<footer>Written by longvid {escape(__version__)} on {written}.</footer>
</main>
{"".join(scripts)}
</body>
</html>
"""


def _headline(history: RunHistory) -> str:
    """The result of a run in one line, without markup."""
    start, frames = history.start, f"{history.num_frames:,}"
    verb = start.direction.capitalize()
    if not history.completed:
        total = "" if start.frames_total is None else f" of {start.frames_total:,}"
        how = "failed" if history.report is None else "stopped"
        return f"{verb.removesuffix('e')}ing {how} after {frames}{total} frames"
    return f"{verb}d {frames} frames at {history.rate} frames/s"


def _details(history: RunHistory, charts: str) -> str:
    """The charts of a run, its plan and its machine."""
    note = ""
    if not charts:
        note = '<p class="quiet">There are no charts, since no chunk was finished.</p>'
    elif not history.views:
        note = '<p class="quiet">What each layer did was not recorded.</p>'
    plan = f'<div class="block"><h3>Plan</h3><pre tabindex="0">{escape(history.start.plan)}</pre></div>'
    return "".join((charts, note, plan, _layer_table(history.start.layers), _machine(history.start.machine)))


def _opening(history: RunHistory) -> str:
    start, report = history.start, history.report
    kind = "" if history.completed else ' class="failed"'
    what = (
        f"{start.width}x{start.height} in {start.dtype} with {start.model} on {start.device}, in chunks of "
        f"{start.chunk_frames} frames, in {format_seconds(history.seconds)}."
    )
    if report is not None and report.resumed_from_frame:
        what += f" Resumed from frame {report.resumed_from_frame:,}."
    compute = ""
    if history.points:
        busy, wait = history.whole.time_shares
        words = f"Compute ran {busy:.1%} of the time and waited for the reader or the writer {wait:.1%}."
        compute = f'<p class="headline">{words}</p>\n'
    return f"""
<h2{kind}>{escape(_headline(history))}</h2>
<p class="headline">{escape(_memory_words(history))}</p>
{compute}<p>{escape(what)}</p>
<p>{escape(_context_words(start))}</p>
"""


def _memory_words(history: RunHistory) -> str:
    start, peak = history.start, history.peak_device_bytes
    measured = f"Measured peak {format_bytes(peak)}" if peak else "Peak not measured"
    allowed = "no limit set" if start.allowed_bytes is None else f"{format_bytes(start.allowed_bytes)} allowed"
    if start.allowed_bytes is not None and start.reserved_bytes:
        allowed += f" ({format_bytes(start.reserved_bytes)} of it reserved)"
    words = f"{measured}, projected {format_bytes(start.projected_bytes)}, {allowed}."
    if start.allowed_bytes is not None and peak > start.allowed_bytes:
        words += " The run used more than it was allowed."
    return words


def _context_words(start: RunStart) -> str:
    offloaded = [layer for layer in start.layers if not layer.resident]
    total, moving = (sum(layer.bytes for layer in layers) for layers in (start.layers, offloaded))
    words = f"Contexts of {layer_count(start.layers)} take {format_bytes(total)}"
    if not offloaded:
        return f"{words}, all on the device (offload {start.offload})."
    which = "all of them" if moving == total else f"{format_bytes(moving)} of {layer_count(offloaded)}"
    ahead = f"at most {format_bytes(start.prefetch_bytes)}" if start.prefetch_bytes else "none"
    return (
        f"{words}; between chunks, {which} wait in {start.host_tier} (offload {start.offload}, {ahead} fetched ahead)."
    )


def _layer_table(layers: Sequence[LayerContext]) -> str:
    largest = max((layer.bytes for layer in layers), default=0) or 1
    rows = []
    for number, layer in enumerate(layers, start=1):
        kept = "resident" if layer.resident else "offloaded"
        rows.append(
            f'<tr><td class="number">{number}</td><td class="name">{escape(layer.name).replace(".", ".<wbr>")}</td>'
            f'<td class="number">{format_bytes(layer.bytes)}</td><td>{kept}</td><td class="bar">'
            f'<span class="{kept}" style="width:{layer.bytes / largest:.1%}"></span></td></tr>'
        )
    is_open = " open" if len(layers) <= _OPEN_TABLE_ROWS else ""
    return f"""
<div class="block"><h3>Layers</h3>
<details{is_open}><summary>{layer_count(layers)} with a context, in the order in which they run</summary>
<table><thead><tr><th class="number" scope="col">#</th><th scope="col">Layer</th>
<th class="number" scope="col">Context</th><th scope="col">Kept</th><th class="bar"></th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></details></div>
"""


def _machine(facts: Mapping[str, object]) -> str:
    rows = ""
    for key, value in facts.items():
        words = format_bytes(value) if key.endswith("_bytes") and isinstance(value, int) else str(value)
        if value is not None:
            rows += f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(words)}</dd>"
    return f'<div class="block"><h3>Machine</h3><dl>{rows}</dl></div>' if rows else ""

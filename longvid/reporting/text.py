"""The words, tables and frame of a report page, as HTML. Text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import TypeAlias

from longvid import __version__
from longvid.events import LayerContext, RunStart
from longvid.reporting.history import RunHistory
from longvid.units import format_bytes

__all__ = ["COLORS", "UNFINISHED", "format_seconds", "headline", "page", "section", "short_section"]

UNFINISHED = '<meta name="longvid-run" content="unfinished">'
"stands in a page whose last run was not completed, which the page of the next run may replace"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_OPEN_TABLE_ROWS = 12
COLORS = {
    **dict.fromkeys(("measured", "throughput", "compute"), "#1f83c7"),
    **dict.fromkeys(("projected", "offloaded", "wait"), "#e69f00"),
    **dict.fromkeys(("allowed", "to_host", "write"), "#d55e00"),
    **dict.fromkeys(("process", "to_device", "read"), "#009e73"),
    "resident": "#9aa5b170",
}
"""Colours of lines and bars in charts and legends, distinct for colour-blind readers too, on light and dark pages."""

_Caption: TypeAlias = tuple[str, str, list[str]]
"title and text of a chart, and the entries of its legend as HTML"


def format_seconds(seconds: float) -> str:
    """A length of time as people write it: ``350 ms``, ``12.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def page(sections: Sequence[str], titles: Sequence[str], scripts: Sequence[str], *, completed: bool) -> str:
    """The whole page. It contains everything that it shows, and forbids the browser to load anything else."""
    what = titles[0] if len(titles) == 1 else f"{len(titles)} runs"
    links = "".join(f'<li><a href="#run-{i}">{escape(text)}</a></li>' for i, text in enumerate(titles, start=1))
    style = files("longvid.reporting").joinpath("page.css").read_text(encoding="utf-8")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{"" if completed else UNFINISHED}
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
{"".join(sections)}
<footer>Written by longvid {escape(__version__)} on {written}.</footer>
</main>
{"".join(scripts)}
</body>
</html>
"""


def headline(history: RunHistory) -> str:
    """The result of a run in one line, without markup."""
    start, frames = history.start, f"{history.num_frames:,}"
    verb = start.direction.capitalize()
    if not history.completed:
        total = "" if start.frames_total is None else f" of {start.frames_total:,}"
        how = "failed" if history.report is None else "stopped"
        return f"{verb.removesuffix('e')}ing {how} after {frames}{total} frames"
    return f"{verb}d {frames} frames at {_rate(history.frames_per_second)} frames/s"


def _rate(frames_per_second: float) -> str:
    return f"{frames_per_second:,.0f}" if frames_per_second >= 1000 else f"{frames_per_second:.3g}"


def short_section(number: int, history: RunHistory) -> str:
    """A run without charts and tables."""
    return f'<section class="run" id="run-{number}">{_opening(history)}</section>'


def section(number: int, history: RunHistory, places: Mapping[str, str]) -> str:
    """A run with its charts, which appear in ``places``, its plan and its machine."""
    parts = [_opening(history)]
    for name, caption in _CAPTIONS.items():
        if name in places:
            title, text, legend = caption(history)
            parts.append(f"""
<figure>
<figcaption><h3>{escape(title)}</h3><p>{escape(text)}</p><ul class="legend">{"".join(legend)}</ul></figcaption>
<div class="chart" role="img" aria-label="{escape(f"Chart: {title}. {text}")}">{places[name]}</div>
</figure>
""")
    if not places:
        parts.append('<p class="quiet">There are no charts, since no chunk was finished.</p>')
    elif not history.views:
        parts.append('<p class="quiet">What each layer did was not recorded.</p>')
    parts.append(f'<div class="block"><h3>Plan</h3><pre tabindex="0">{escape(history.start.plan)}</pre></div>')
    parts += [_layer_table(history.start.layers), _machine(history.start.machine)]
    return f'<section class="run" id="run-{number}">{"".join(parts)}</section>'


# ------------------------------------------------------------------------------------------------- the opening


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
<h2{kind}>{escape(headline(history))}</h2>
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
    words = f"Contexts of {_layers(len(start.layers))} take {format_bytes(total)}"
    if not offloaded:
        return f"{words}, all on the device (offload {start.offload})."
    which = "all of them" if moving == total else f"{format_bytes(moving)} of {_layers(len(offloaded))}"
    ahead = f"at most {format_bytes(start.prefetch_bytes)}" if start.prefetch_bytes else "none"
    return (
        f"{words}; between chunks, {which} wait in {start.host_tier} (offload {start.offload}, {ahead} fetched ahead)."
    )


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


# ------------------------------------------------------------------------------------------------- captions of charts


def _key(color: str, text: str, shape: str = "box") -> str:
    """One entry of a legend; the shape is ``box``, ``line`` or ``line dashed``."""
    style = "background" if shape == "box" else "border-color"
    return f'<li><i class="{shape}" style="{style}:{COLORS[color]}"></i>{escape(text)}</li>'


def _memory_caption(history: RunHistory) -> _Caption:
    start = history.start
    legend = [
        _key("measured", f"measured, highest {format_bytes(history.peak_device_bytes)}", "line"),
        _key("projected", f"projected {format_bytes(start.projected_bytes)}", "line"),
    ]
    if start.allowed_bytes is not None:
        beyond = "" if history.allowed_in_view else ", far above this chart"
        legend.append(_key("allowed", f"allowed {format_bytes(start.allowed_bytes)}{beyond}", "line dashed"))
    return "Device memory", f"Peak of each chunk that was measured, weights included.{_per_point(history)}", legend


def _process_caption(history: RunHistory) -> _Caption:
    highest = max(point.rss_bytes for point in history.points)
    if history.report is not None:
        highest = max(highest, history.report.peak_rss_bytes)
    text = f"Resident set size after each chunk, as the operating system counts it.{_per_point(history)}"
    return "Process memory", text, [_key("process", f"process, highest {format_bytes(highest)}", "line")]


def _per_point(history: RunHistory) -> str:
    chunks = history.points[0].num_chunks
    return f" Each point is the highest of {chunks:,} chunks." if chunks > 1 else ""


def _residency_caption(history: RunHistory) -> _Caption:
    legend = [_key("compute", "layer computes")]
    for is_resident, kind in ((True, "resident context"), (False, "offloaded context while it is on the device")):
        if count := sum(layer.resident == is_resident for layer in history.start.layers):
            legend.append(_key(kind.split()[0], f"{kind} ({_layers(count)})"))
    text = f"One row per layer, in the order in which they run, in {_view_words(history)}."
    return "Contexts on the device", text, legend


def _view_words(history: RunHistory) -> str:
    first, last = history.views[0].index, history.views[-1].index
    return f"chunk {first:,}" if first == last else f"chunks {first:,} to {last:,}; dotted lines separate chunks"


def _lanes_caption(history: RunHistory) -> _Caption:
    legend = []
    for lane in ("compute", "to_device", "to_host"):
        spans = [span for view in history.views for span in view.spans if span.lane == lane]
        seconds = format_seconds(sum(s.stop_seconds - s.start_seconds for s in spans))
        moved = "" if lane == "compute" else f"{format_bytes(sum(span.num_bytes for span in spans))} in "
        if spans or lane == "compute":
            legend.append(_key(lane, f"{lane.replace('_', ' ')}, {moved}{seconds}"))
    nothing = " No context was moved." if len(legend) == 1 else ""
    text = f"Compute and transfers over time, in {_view_words(history)}.{nothing}"
    return "Transfers beside computation", text, legend


def _throughput_caption(history: RunHistory) -> _Caption:
    rate = f"frames per second, {_rate(history.frames_per_second)} over the whole run"
    return "Throughput", _per_step(history), [_key("throughput", rate, "line")]


def _per_step(history: RunHistory) -> str:
    chunks = history.windows[0].num_chunks
    return "Each step is one chunk." if chunks == 1 else f"Each step is the mean of {chunks:,} chunks."


def _stages_caption(history: RunHistory) -> _Caption:
    words = {"read": "reading", "compute": "computing", "write": "writing", "wait": "compute waits"}
    legend = [_key(stage, f"{words[stage]} {share:.1%}") for stage, share in history.whole.stage_shares.items()]
    text = (
        f"{_per_step(history)} A full row means that the stage was at work all the time. Stages run at the same time, "
        "so their shares need not add up to 100 %. The numbers are those of the whole run."
    )
    return "Where the time went", text, legend


_CAPTIONS: dict[str, Callable[[RunHistory], _Caption]] = {
    "memory": _memory_caption,
    "process": _process_caption,
    "residency": _residency_caption,
    "lanes": _lanes_caption,
    "throughput": _throughput_caption,
    "stages": _stages_caption,
}


# ------------------------------------------------------------------------------------------------- tables


def _layer_table(layers: Sequence[LayerContext]) -> str:
    largest = max((layer.bytes for layer in layers), default=0) or 1
    rows = []
    for number, layer in enumerate(layers, start=1):
        kept = "resident" if layer.resident else "offloaded"
        rows.append(
            f'<tr><td class="number">{number}</td><td class="name">{escape(layer.name).replace(".", ".<wbr>")}</td>'
            f'<td class="number">{format_bytes(layer.bytes)}</td><td>{kept}</td><td class="bar">'
            f'<span style="width:{layer.bytes / largest:.1%};background:{COLORS[kept]}"></span></td></tr>'
        )
    is_open = " open" if len(layers) <= _OPEN_TABLE_ROWS else ""
    return f"""
<div class="block"><h3>Layers</h3>
<details{is_open}><summary>{_layers(len(layers))} with a context, in the order in which they run</summary>
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

"""The words, tables and frame of a report page, as HTML. Whatever comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Literal, TypeAlias

from longvid import __version__
from longvid.events import LayerContext, RunStart, Span
from longvid.reporting.history import RunHistory
from longvid.units import format_bytes

__all__ = ["COLORS", "UNFINISHED", "format_seconds", "headline", "page", "section", "short_section"]

UNFINISHED = '<meta name="longvid-run" content="unfinished">'
"stands in a page whose last run was not completed, which the page of the next run may replace"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_DOING = {"encode": "Encoding", "decode": "Decoding"}
_DONE = {"encode": "Encoded", "decode": "Decoded"}
_SHAPES = {"box": "", "line": "line", "dashed": "line dashed"}
_OPEN_TABLE_ROWS = 12
COLORS = {
    "measured": "#1f83c7",
    "projected": "#e69f00",
    "allowed": "#d55e00",
    "process": "#009e73",
    "throughput": "#1f83c7",
    "resident": "#9aa5b170",
    "offloaded": "#e69f00",
    "compute": "#1f83c7",
    "to_device": "#009e73",
    "to_host": "#d55e00",
    "wait": "#e69f00",
    "other": "#9aa5b1",
    "read": "#009e73",
    "write": "#d55e00",
}
"""of lines and bars, in charts and legends: told apart, also by the colour-blind, on a light and on a dark page"""
_MACHINE_LABELS = {
    "platform": "Platform",
    "cpu": "CPU",
    "num_cores": "Usable cores",
    "ram_bytes": "Host memory",
    "accelerator": "Accelerator",
    "accelerator_bytes": "Device memory",
    "python": "Python",
    "torch": "torch",
    "num_torch_threads": "torch threads",
    "longvid": "longvid",
}


@dataclass(frozen=True, slots=True)
class _Key:
    """One entry of a legend."""

    color: str
    shape: Literal["box", "line", "dashed"]
    text: str


_Caption: TypeAlias = tuple[str, str, list[_Key]]


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
    """The whole page. It holds all that it shows, and forbids the browser to load anything else."""
    one = len(titles) == 1
    title = f"longvid report: {titles[0]}" if one else f"longvid report: {len(titles)} runs"
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
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>longvid report{"" if one else f": {len(titles)} runs"}</h1>
{"" if one else f"<nav><ul>{links}</ul></nav>"}
<noscript><p>The charts of this page need JavaScript; its words and tables do not.</p></noscript>
{"".join(sections)}
<footer>Written by longvid {escape(__version__)} on {written}.</footer>
</main>
{"".join(scripts)}
</body>
</html>
"""


def headline(history: RunHistory) -> str:
    """What a run came to, in one line and without markup."""
    start, report = history.start, history.report
    frames = f"{history.num_frames:,}"
    if report is None or not report.complete:
        total = "" if start.frames_total is None else f" of {start.frames_total:,}"
        how = "failed" if report is None else "stopped"
        return f"{_DOING[start.direction]} {how} after {frames}{total} frames"
    return f"{_DONE[start.direction]} {frames} frames at {_rate(history.frames_per_second)} frames/s"


def _rate(frames_per_second: float) -> str:
    return f"{frames_per_second:,.0f}" if frames_per_second >= 1000 else f"{frames_per_second:.3g}"


def short_section(number: int, history: RunHistory) -> str:
    """A run in words alone."""
    return f'<section class="run" id="run-{number}">{_opening(history)}</section>'


def section(number: int, history: RunHistory, places: Mapping[str, str]) -> str:
    """A run with its charts, which appear in ``places``, its plan and its machine."""
    parts = [_opening(history)]
    captions = {
        "memory": _memory_caption,
        "process": _process_caption,
        "residency": _residency_caption,
        "lanes": _lanes_caption,
        "throughput": _throughput_caption,
        "shares": _shares_caption,
        "stages": _stages_caption,
    }
    for name, caption in captions.items():
        if name in places:
            title, text, legend = caption(history)
            parts.append(_figure(title, text, legend, places[name]))
    if not places:
        parts.append('<p class="quiet">There are no charts, since no chunk was finished.</p>')
    elif not history.views:
        parts.append('<p class="quiet">What each layer did was not recorded.</p>')
    parts += [_plan(history.start), _layer_table(history.start.layers), _machine(history.start.machine)]
    return f'<section class="run" id="run-{number}">{"".join(parts)}</section>'


def _opening(history: RunHistory) -> str:
    start, report = history.start, history.report
    failed = report is None or not report.complete
    kind = ' class="failed"' if failed else ""
    what = (
        f"{start.width}x{start.height} in {start.dtype} with {start.model} on {start.device}, in chunks of "
        f"{start.chunk_frames} frames, in {format_seconds(history.seconds)}."
    )
    if report is not None and report.resumed_from_frame:
        what += f" Resumed from frame {report.resumed_from_frame:,}."
    return f"""
<h2{kind}>{escape(headline(history))}</h2>
<p class="headline">{escape(_memory_words(history))}</p>
{_compute_line(history)}<p>{escape(what)}</p>
<p>{escape(_context_words(start))}</p>
"""


def _memory_words(history: RunHistory) -> str:
    start, peak = history.start, history.peak_device_bytes
    measured = f"Measured peak {format_bytes(peak)}" if peak else "Peak not measured"
    words = f"{measured}, projected {format_bytes(start.projected_bytes)}, {_allowed_words(start)}."
    if start.allowed_bytes is not None and peak > start.allowed_bytes:
        words += " The run used more than it was allowed."
    return words


def _compute_line(history: RunHistory) -> str:
    """How busy the device was kept; nothing if no chunk was finished."""
    if not history.points:
        return ""
    compute, wait, _ = history.whole.time_shares
    words = f"Compute ran {compute:.1%} of the time and waited for the reader or the writer {wait:.1%}."
    return f'<p class="headline">{escape(words)}</p>\n'


def _allowed_words(start: RunStart) -> str:
    if start.allowed_bytes is None:
        return "no limit set"
    reserved = f" ({format_bytes(start.reserved_bytes)} of it reserved)" if start.reserved_bytes else ""
    return f"{format_bytes(start.allowed_bytes)} allowed{reserved}"


def _context_words(start: RunStart) -> str:
    offloaded = [layer for layer in start.layers if not layer.resident]
    total = sum(layer.bytes for layer in start.layers)
    words = f"Contexts of {_layers(len(start.layers))} hold {format_bytes(total)}"
    if not offloaded:
        return f"{words}, all on the device (offload {start.offload})."
    moving = sum(layer.bytes for layer in offloaded)
    which = "all of them" if moving == total else f"{format_bytes(moving)} of {_layers(len(offloaded))}"
    ahead = (
        f"at most {format_bytes(start.prefetch_bytes)} fetched ahead" if start.prefetch_bytes else "none fetched ahead"
    )
    return f"{words}; between chunks, {which} wait in {start.host_tier} (offload {start.offload}, {ahead})."


def _figure(title: str, text: str, legend: Sequence[_Key], place: str) -> str:
    keys = "".join(
        f'<li><i class="{_SHAPES[key.shape]}" style="{"background" if key.shape == "box" else "border-color"}:'
        f'{COLORS[key.color]}"></i>{escape(key.text)}</li>'
        for key in legend
    )
    return f"""
<figure>
<figcaption><h3>{escape(title)}</h3><p>{escape(text)}</p><ul class="legend">{keys}</ul></figcaption>
<div class="chart" role="img" aria-label="{escape(f"Chart: {title}. {text}")}">{place}</div>
</figure>
"""


def _memory_caption(history: RunHistory) -> _Caption:
    start = history.start
    legend = [
        _Key("measured", "line", f"measured, highest {format_bytes(history.peak_device_bytes)}"),
        _Key("projected", "line", f"projected {format_bytes(start.projected_bytes)}"),
    ]
    if start.allowed_bytes is not None:
        beyond = "" if history.allowed_in_view else ", far above this chart"
        legend.append(_Key("allowed", "dashed", f"allowed {format_bytes(start.allowed_bytes)}{beyond}"))
    return "Device memory", f"Peak of each chunk that was measured, weights included.{_per_point(history)}", legend


def _process_caption(history: RunHistory) -> _Caption:
    highest = max(point.rss_bytes for point in history.points)
    if history.report is not None:
        highest = max(highest, history.report.peak_rss_bytes)
    text = f"Resident set size after each chunk, as the operating system counts it.{_per_point(history)}"
    return "Process memory", text, [_Key("process", "line", f"process, highest {format_bytes(highest)}")]


def _per_point(history: RunHistory) -> str:
    chunks = history.points[0].num_chunks
    return f" Each point is the highest of {chunks:,} chunks." if chunks > 1 else ""


def _residency_caption(history: RunHistory) -> _Caption:
    num_resident = sum(layer.resident for layer in history.start.layers)
    num_offloaded = len(history.start.layers) - num_resident
    legend = [_Key("compute", "box", "layer computes")]
    if num_resident:
        legend.append(_Key("resident", "box", f"resident context ({_layers(num_resident)})"))
    if num_offloaded:
        legend.append(_Key("offloaded", "box", f"offloaded context, while it is here ({_layers(num_offloaded)})"))
    text = f"One row per layer, first to last from the top, in {_view_words(history)}."
    return "Contexts on the device", text, legend


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _view_words(history: RunHistory) -> str:
    first, last = history.views[0].index, history.views[-1].index
    if first == last:
        return f"chunk {first:,}"
    return f"chunks {first:,} to {last:,}; dotted lines are where one ends"


def _lanes_caption(history: RunHistory) -> _Caption:
    spans = [span for view in history.views for span in view.spans]
    lanes = {lane: [span for span in spans if span.lane == lane] for lane in ("compute", "to_device", "to_host")}
    legend = [_Key("compute", "box", f"compute, {format_seconds(_total_seconds(lanes['compute']))}")]
    moving = [(lane, label) for lane, label in (("to_device", "to device"), ("to_host", "to host")) if lanes[lane]]
    for lane, label in moving:
        moved = format_bytes(sum(span.num_bytes for span in lanes[lane]))
        legend.append(_Key(lane, "box", f"{label}, {moved} in {format_seconds(_total_seconds(lanes[lane]))}"))
    text = f"What was under way at the same time, in {_view_words(history)}."
    if not moving:
        text += " No context was moved."
    return "Transfers beside computation", text, legend


def _total_seconds(spans: Sequence[Span]) -> float:
    return sum(span.stop_seconds - span.start_seconds for span in spans)


def _throughput_caption(history: RunHistory) -> _Caption:
    chunks = history.windows[0].num_chunks
    text = "Each step is one chunk." if chunks == 1 else f"Each step is the mean of {chunks:,} chunks."
    rate = f"frames per second, {_rate(history.frames_per_second)} over the whole run"
    return "Throughput", text, [_Key("throughput", "line", rate)]


def _shares_caption(history: RunHistory) -> _Caption:
    compute, wait, other = (f"{share:.1%}" for share in history.whole.time_shares)
    legend = [
        _Key("compute", "box", f"computing {compute}"),
        _Key("wait", "box", f"waiting for the reader or the writer {wait}"),
        _Key("other", "box", f"other {other}"),
    ]
    return "Where the time went", "Shares of the time of each step; the numbers are of the whole run.", legend


def _stages_caption(history: RunHistory) -> _Caption:
    read, compute, write = (f"{share:.1%}" for share in history.whole.stage_shares)
    legend = [
        _Key("read", "box", f"reading {read}"),
        _Key("compute", "box", f"computing {compute}"),
        _Key("write", "box", f"writing {write}"),
        _Key("wait", "box", f"compute waits {history.whole.time_shares[1]:.1%}"),
    ]
    text = (
        "How much of the time of each step a stage was at work; a full row is all of it. Stages run beside each other, "
        "so their shares need not add up to 100 %. The numbers are of the whole run."
    )
    return "Stages beside each other", text, legend


def _plan(start: RunStart) -> str:
    return f'<div class="block"><h3>Plan</h3><pre tabindex="0">{escape(start.plan)}</pre></div>'


def _layer_table(layers: Sequence[LayerContext]) -> str:
    largest = max((layer.bytes for layer in layers), default=0) or 1
    rows = "".join(
        f'<tr><td class="number">{number}</td><td class="name">{escape(layer.name).replace(".", ".<wbr>")}</td>'
        f'<td class="number">{format_bytes(layer.bytes)}</td><td>{"resident" if layer.resident else "offloaded"}</td>'
        f'<td class="bar"><span style="width:{layer.bytes / largest:.1%};'
        f'background:{COLORS["resident" if layer.resident else "offloaded"]}"></span></td></tr>'
        for number, layer in enumerate(layers, start=1)
    )
    is_open = " open" if len(layers) <= _OPEN_TABLE_ROWS else ""
    return f"""
<div class="block"><h3>Layers</h3>
<details{is_open}><summary>{_layers(len(layers))} with a context, in the order in which they run</summary>
<table><thead><tr><th class="number" scope="col">#</th><th scope="col">Layer</th>
<th class="number" scope="col">Context</th><th scope="col">Kept</th><th class="bar"></th></tr></thead>
<tbody>{rows}</tbody></table></details></div>
"""


def _machine(facts: Mapping[str, object]) -> str:
    shown = {_MACHINE_LABELS.get(key, key): _fact(key, value) for key, value in facts.items() if value is not None}
    if not shown:
        return ""
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in shown.items())
    return f'<div class="block"><h3>Machine</h3><dl>{rows}</dl></div>'


def _fact(key: str, value: object) -> str:
    return format_bytes(value) if key.endswith("_bytes") and isinstance(value, int) else str(value)

"""The charts of a report page and their captions. The only module that imports bokeh, when a run is over.

Colours of text and axes come from the page's style sheet, so that they suit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import BasicTicker, ColumnDataSource, FixedTicker, HoverTool, PlainText, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources

from longvid.events import LayerContext, Span
from longvid.reporting.history import ChunkView, Point, RunHistory, Stay, layer_count, stays_on_device
from longvid.units import format_bytes, format_seconds

__all__ = ["draw", "library_script"]

_COLORS = {
    **dict.fromkeys(("measured", "throughput", "compute"), "#1f83c7"),
    **dict.fromkeys(("projected", "offloaded", "wait"), "#e69f00"),
    **dict.fromkeys(("allowed", "to_host", "write"), "#d55e00"),
    **dict.fromkeys(("process", "to_device", "read"), "#009e73"),
    "resident": "#9aa5b170",
}
"""Colours of lines and bars in charts and legends, distinct for colour-blind readers too, on light and dark pages."""
_LANES = {"compute": "compute", "to_device": "to device", "to_host": "to host"}
_STAGES = {"read": "reading", "compute": "compute", "write": "writing", "wait": "waiting"}
_TIME_UNITS: tuple[tuple[float, float, str, str], ...] = (
    (1.0, 1e-3, "ms", "milliseconds"),
    (180.0, 1.0, "s", "seconds"),
    (3 * 3600.0, 60.0, "min", "minutes"),
    (np.inf, 3600.0, "h", "hours"),
)
"longest axis for a unit, seconds per unit, and the unit"
_LEFT, _LEFT_OF_VIEWS = 60, 112
"pixels left of a chart, so that charts that share a time axis stand flush"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def library_script() -> str:
    """The drawing library, as script elements that load nothing."""
    return Resources(mode="inline", components=["bokeh"], log_level="warn").render_js()


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    text: str
    legend: list[str]
    "its entries, as HTML"
    figure: figure


def draw(history: RunHistory) -> tuple[str, str]:
    """A script element that draws the charts of a run, and the elements that they appear in, with their captions.

    Charts without data are left out.
    """
    charts = []
    if any(point.peak_bytes is not None for point in history.points):
        charts.append(_memory(history))
    if history.points:
        charts.append(_process(history))
    if history.views and history.start.layers:
        charts += [_residency(history), _lanes(history)]
    if history.points:
        charts += [_throughput(history), _stages(history)]
    if not charts:
        return "", ""
    script, places = components([chart.figure for chart in charts])
    return str(script), "".join(map(_element, charts, places))


def _element(chart: _Chart, place: str) -> str:
    title, text = escape(chart.title), escape(chart.text)
    return f"""
<figure>
<figcaption><h3>{title}</h3><p>{text}</p><ul class="legend">{"".join(chart.legend)}</ul></figcaption>
<div class="chart" role="img" aria-label="Chart: {title}. {text}">{place}</div>
</figure>
"""


def _key(color: str, text: str, shape: str = "box") -> str:
    """One entry of a legend; the shape is ``box``, ``line`` or ``line dashed``."""
    style = "background" if shape == "box" else "border-color"
    return f'<li><i class="{shape}" style="{style}:{_COLORS[color]}"></i>{escape(text)}</li>'


class _TimeAxis:
    """A time axis from one moment to another, in a unit that suits its length."""

    def __init__(self, start: float, stop: float, since: str) -> None:
        self._start, seconds = start, stop - start
        _, self._factor, self.unit, words = next(row for row in _TIME_UNITS if seconds < row[0])
        self.stop = seconds / self._factor or 1.0
        self.label = f"{words} since {since}"

    def __call__(self, seconds: float) -> float:
        return (seconds - self._start) / self._factor


def _run_axis(history: RunHistory) -> _TimeAxis:
    return _TimeAxis(0.0, history.points[-1].stop_seconds, "the start")


def _views_axis(views: Sequence[ChunkView]) -> _TimeAxis:
    """For the chunks that are shown in full."""
    return _TimeAxis(views[0].start_seconds, views[-1].stop_seconds, f"chunk {views[0].index:,} began")


def _byte_unit(num_bytes: float) -> tuple[float, str]:
    if num_bytes < 2**20:
        return 2.0**10, "KiB"
    return (2.0**20, "MiB") if num_bytes < 2**30 else (2.0**30, "GiB")


def _hover(chart: figure, drawn: Any, *tooltips: tuple[str, str], mode: Any = "mouse") -> None:
    chart.add_tools(HoverTool(visible=False, renderers=[drawn], mode=mode, tooltips=list(tooltips)))


def _blank(
    height: int, time: _TimeAxis, y_range: tuple[float, float], y_label: str | None, left: int = _LEFT
) -> figure:
    """An empty chart as wide as the page, which leaves swipes and the wheel to the page."""
    chart = figure(
        height=height,
        sizing_mode="stretch_width",
        min_width=200,
        x_range=Range1d(start=0, end=time.stop),
        y_range=Range1d(start=y_range[0], end=y_range[1]),
        tools="xbox_zoom,xpan,reset",
        active_drag=None,
        active_scroll=None,
        toolbar_location="above",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border_left=left,
        min_border_right=12,
    )
    chart.toolbar.logo = None
    for axis, label in ((chart.xaxis, time.label), (chart.yaxis, y_label)):
        axis.axis_label = label
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
    chart.xaxis.ticker = BasicTicker(desired_num_ticks=6)
    chart.xgrid.visible = False
    return chart


def _line(chart: figure, x: Iterable[float], y: Iterable[float], color: str, label: str, unit: str) -> None:
    """A line with its value at the pointer; few points are marked."""
    source = ColumnDataSource({"x": np.fromiter(x, float), "y": np.fromiter(y, float)})
    line = chart.line("x", "y", source=source, color=color, line_width=2)
    if len(source.data["x"]) <= 60:
        chart.scatter("x", "y", source=source, color=color, size=5)
    _hover(chart, line, (label, f"@y{{0,0.00}} {unit}"), mode="vline")


def _memory(history: RunHistory) -> _Chart:
    start = history.start
    points = [p for p in history.points if p.peak_bytes is not None]
    top = max(start.projected_bytes, history.peak_device_bytes, history.allowed_in_view or 0)
    scale, unit = _byte_unit(top)
    time = _run_axis(history)
    chart = _blank(280, time, (0, top / scale * 1.06), unit)
    # Wide, to be seen under the measured line where the projection is exact.
    chart.hspan(y=start.projected_bytes / scale, line_color=_COLORS["projected"], line_width=6, line_alpha=0.6)
    if history.allowed_in_view is not None:
        chart.hspan(y=history.allowed_in_view / scale, line_color=_COLORS["allowed"], line_width=2, line_dash="dashed")
    times = (time((p.start_seconds + p.stop_seconds) / 2) for p in points)
    _line(chart, times, ((p.peak_bytes or 0) / scale for p in points), _COLORS["measured"], "peak", unit)
    legend = [
        _key("measured", f"measured, highest {format_bytes(history.peak_device_bytes)}", "line"),
        _key("projected", f"projected {format_bytes(start.projected_bytes)}", "line"),
    ]
    if start.allowed_bytes is not None:
        beyond = "" if history.allowed_in_view else ", far above this chart"
        legend.append(_key("allowed", f"allowed {format_bytes(start.allowed_bytes)}{beyond}", "line dashed"))
    text = f"Peak of each chunk that was measured, weights included.{_per_point(history)}"
    return _Chart("Device memory", text, legend, chart)


def _process(history: RunHistory) -> _Chart:
    top = max(p.rss_bytes for p in history.points)
    scale, unit = _byte_unit(top)
    time = _run_axis(history)
    chart = _blank(180, time, (0, top / scale * 1.08), unit)
    times = (time(p.stop_seconds) for p in history.points)
    _line(chart, times, (p.rss_bytes / scale for p in history.points), _COLORS["process"], "process", unit)
    highest = top if history.report is None else max(top, history.report.peak_rss_bytes)
    text = f"Resident set size after each chunk, as the operating system counts it.{_per_point(history)}"
    return _Chart("Process memory", text, [_key("process", f"process, highest {format_bytes(highest)}", "line")], chart)


def _throughput(history: RunHistory) -> _Chart:
    windows = history.windows
    time = _run_axis(history)
    rates = [p.frames_per_second for p in windows]
    chart = _blank(200, time, (0, (max(rates) or 1) * 1.1), "frames/s")
    source = ColumnDataSource({**_edges(windows, time), "rate": np.array(rates)})
    bars = chart.quad(
        "left", "right", "rate", 0, source=source, fill_color=_COLORS["throughput"], fill_alpha=0.25, line_color=None
    )
    x = np.repeat([time(windows[0].start_seconds), *(time(p.stop_seconds) for p in windows)], 2)[1:-1]
    chart.line(x, np.repeat(rates, 2), color=_COLORS["throughput"], line_width=2)
    _hover(chart, bars, ("frames/s", "@rate{0,0.00}"))
    rate = f"frames per second, {history.rate} over the whole run"
    return _Chart("Throughput", _per_step(history), [_key("throughput", rate, "line")], chart)


def _stages(history: RunHistory) -> _Chart:
    """One row per stage, filled to the share of each step in which it was at work."""
    windows = history.windows
    time = _run_axis(history)
    chart = _blank(210, time, (len(_STAGES), 0), None)
    for row, (stage, label) in enumerate(_STAGES.items()):
        share = np.array([p.stage_shares[stage] for p in windows])
        source = ColumnDataSource({**_edges(windows, time), "top": row + 1 - 0.8 * share, "share": share * 100})
        style: dict[str, Any] = {"source": source, "color": _COLORS[stage], "line_color": None}
        whole = chart.quad("left", "right", row + 0.2, row + 1.0, alpha=0.12, **style)
        chart.quad("left", "right", "top", row + 1.0, **style)
        _hover(chart, whole, (label, "@share{0.0} %"))
    chart.yaxis.major_tick_in = chart.yaxis.major_tick_out = 0  # room for the labels, so that charts are aligned
    chart.yaxis.major_label_standoff = 4
    _label_rows(chart, list(_STAGES.values()), 0.6)
    words = {**_STAGES, "compute": "computing", "wait": "compute waits"}
    legend = [_key(stage, f"{words[stage]} {share:.1%}") for stage, share in history.whole.stage_shares.items()]
    text = (
        f"{_per_step(history)} A full row means that the stage was at work all the time. Stages run at the same time, "
        "so their shares need not add up to 100 %. The numbers are those of the whole run."
    )
    return _Chart("Where the time went", text, legend, chart)


def _label_rows(chart: figure, labels: Sequence[str], offset: float) -> None:
    chart.yaxis.ticker = FixedTicker(ticks=[row + offset for row in range(len(labels))])
    chart.yaxis.major_label_overrides = {row + offset: label for row, label in enumerate(labels)}
    chart.ygrid.ticker = FixedTicker(ticks=list(range(len(labels) + 1)))


def _edges(windows: Sequence[Point], time: _TimeAxis) -> dict[str, Any]:
    return {
        "left": np.array([time(p.start_seconds) for p in windows]),
        "right": np.array([time(p.stop_seconds) for p in windows]),
    }


def _bars(chart: figure, time: _TimeAxis, bars: Sequence[tuple[int, Span | Stay]], **style: Any) -> None:
    """Bars in numbered rows, with their layer at the pointer."""
    left = np.array([max(0.0, time(bar.start_seconds)) for _, bar in bars])
    right = np.array([min(time.stop, time(bar.stop_seconds)) for _, bar in bars])
    source = ColumnDataSource(
        {
            "row": np.array([row + 0.5 for row, _ in bars], np.float32),
            "left": left,
            "right": np.maximum(left, right),
            "layer": [bar.layer for _, bar in bars],
            "duration": np.array([time(bar.stop_seconds) - time(bar.start_seconds) for _, bar in bars], np.float32),
        }
    )
    drawn = chart.hbar(y="row", left="left", right="right", source=source, **style)
    unit = time.unit
    _hover(
        chart, drawn, ("layer", "@layer"), ("from", f"@left{{0,0.00}} {unit}"), ("for", f"@duration{{0,0.00}} {unit}")
    )


def _mark_chunks(chart: figure, time: _TimeAxis, views: Sequence[ChunkView]) -> None:
    ends = [time(view.stop_seconds) for view in views[:-1]]
    if ends:
        chart.vspan(x=ends, line_color="#7f8a98", line_dash="dotted", line_width=1.5)


def _residency(history: RunHistory) -> _Chart:
    """One row per layer: when its context was on the device, and when the layer computed."""
    layers, views = history.start.layers, list(history.views)
    time = _views_axis(views)
    row_of = {layer.name: row for row, layer in enumerate(layers)}
    # Rows are low where no context moves, and where there are many layers.
    row_height = 8 if len(layers) > 60 or all(layer.resident for layer in layers) else 15
    chart = _blank(len(layers) * row_height + 90, time, (len(layers), 0), None, _LEFT_OF_VIEWS)
    _label_groups(chart, layers, row_height)
    legend = [_key("compute", "layer computes")]
    for kind, words in (("resident", "resident context"), ("offloaded", "offloaded context while it is on the device")):
        some = [layer for layer in layers if layer.resident == (kind == "resident")]
        bars = [(row_of[stay.layer], stay) for stay in stays_on_device(some, views)]
        _bars(chart, time, bars, height=0.78, fill_color=_COLORS[kind], line_color=None)
        if some:
            legend.append(_key(kind, f"{words} ({layer_count(some)})"))
    computed = [s for view in views for s in view.spans if s.lane == "compute" and s.layer in row_of]
    _bars(chart, time, [(row_of[s.layer], s) for s in computed], height=0.78, color=_COLORS["compute"], line_width=1)
    _mark_chunks(chart, time, views)
    text = f"One row per layer, in the order in which they run, in {_view_words(history)}."
    return _Chart("Contexts on the device", text, legend, chart)


def _group_of(layer: str) -> str:
    """The part of a model that a layer belongs to: ``up_blocks.3`` for ``up_blocks.3.resnets.0.conv1``."""
    first, *rest = layer.split(".")
    name = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
    return name if len(name) <= 14 else name[:13] + "\N{HORIZONTAL ELLIPSIS}"


def _label_groups(chart: figure, layers: Sequence[LayerContext], row_height: int) -> None:
    """Name groups of layers, not single layers, whose paths would fill a narrow screen."""
    ends, labels, row = [0], {}, 0
    last_label = -np.inf
    for name, run in groupby(layers, key=lambda layer: _group_of(layer.name)):
        size = len(list(run))
        middle = row + size / 2
        if (middle - last_label) * row_height >= 12:
            labels[middle] = name
            last_label = middle
        row += size
        ends.append(row)
    chart.yaxis.ticker = FixedTicker(ticks=list(labels))
    # Plain text: bokeh takes a string between dollar signs for TeX and loads a typesetter from the network.
    chart.yaxis.major_label_overrides = {middle: PlainText(text=name) for middle, name in labels.items()}
    chart.yaxis.major_tick_line_color = None
    chart.ygrid.ticker = FixedTicker(ticks=ends)


def _lanes(history: RunHistory) -> _Chart:
    views = list(history.views)
    time = _views_axis(views)
    chart = _blank(190, time, (len(_LANES), 0), None, _LEFT_OF_VIEWS)
    legend = []
    for row, (lane, words) in enumerate(_LANES.items()):
        spans = [span for view in views for span in view.spans if span.lane == lane]
        _bars(chart, time, [(row, s) for s in spans], height=0.7, color=_COLORS[lane], fill_alpha=0.7, line_width=1)
        seconds = format_seconds(sum(s.stop_seconds - s.start_seconds for s in spans))
        moved = "" if lane == "compute" else f"{format_bytes(sum(span.num_bytes for span in spans))} in "
        if spans or lane == "compute":
            legend.append(_key(lane, f"{words}, {moved}{seconds}"))
    chart.yaxis.major_tick_line_color = None
    _label_rows(chart, list(_LANES.values()), 0.5)
    _mark_chunks(chart, time, views)
    nothing = " No context was moved." if len(legend) == 1 else ""
    text = f"Compute and transfers over time, in {_view_words(history)}.{nothing}"
    return _Chart("Transfers beside computation", text, legend, chart)


def _per_point(history: RunHistory) -> str:
    chunks = history.points[0].num_chunks
    return f" Each point is the highest of {chunks:,} chunks." if chunks > 1 else ""


def _view_words(history: RunHistory) -> str:
    first, last = history.views[0].index, history.views[-1].index
    return f"chunk {first:,}" if first == last else f"chunks {first:,} to {last:,}; dotted lines separate chunks"


def _per_step(history: RunHistory) -> str:
    chunks = history.windows[0].num_chunks
    return "Each step is one chunk." if chunks == 1 else f"Each step is the mean of {chunks:,} chunks."

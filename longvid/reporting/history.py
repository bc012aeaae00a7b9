"""The history of one run, in bounded memory however long the run is: the facts that a report is drawn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from longvid.events import ChunkEvent, LayerContext, RunReport, RunStart, Span

__all__ = ["MAX_POINTS", "ChunkView", "Point", "RunHistory", "Stay", "layer_count", "merged", "stays_on_device"]

MAX_POINTS = 1500
"points that a history keeps of one run; an even number, since points are merged in pairs"
_MAX_WINDOWS = 120
_MAX_VIEWS = 4
_MAX_SPANS = 4000
_TIMES = ("compute_seconds", "wait_seconds", "read_seconds", "write_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One chunk, or neighbouring chunks merged: sums stay sums, and extremes stay extremes."""

    num_chunks: int
    num_frames: int
    start_seconds: float
    stop_seconds: float
    compute_seconds: float
    wait_seconds: float
    read_seconds: float
    write_seconds: float
    peak_bytes: int | None
    "None if no chunk of these was measured"
    rss_bytes: int

    @property
    def frames_per_second(self) -> float:
        """Frames per second in the time of this point; zero if the clock did not move."""
        seconds = self.stop_seconds - self.start_seconds
        return self.num_frames / seconds if seconds > 0 else 0.0

    @property
    def time_shares(self) -> tuple[float, float]:
        """Shares of the time spent computing and waiting, together at most one."""
        spent = self.compute_seconds + self.wait_seconds
        total = max(self.stop_seconds - self.start_seconds, spent) or 1.0
        return self.compute_seconds / total, self.wait_seconds / total

    @property
    def stage_shares(self) -> dict[str, float]:
        """Shares of the time in which each stage was at work, and in which compute waited; stages overlap."""
        total = self.stop_seconds - self.start_seconds or 1.0
        shares = {name: min(1.0, getattr(self, f"{name}_seconds") / total) for name in ("read", "compute", "write")}
        return {**shares, "wait": self.time_shares[1]}


@dataclass(frozen=True, slots=True)
class ChunkView:
    """One chunk with everything that its layers did."""

    index: int
    start_seconds: float
    stop_seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Stay:
    """A stretch of time in which the context of a layer was on the device."""

    layer: str
    start_seconds: float
    stop_seconds: float


def merged(points: Sequence[Point]) -> Point:
    """Neighbouring points as one."""
    return Point(
        **{name: sum(getattr(point, name) for point in points) for name in ("num_chunks", "num_frames", *_TIMES)},
        start_seconds=points[0].start_seconds,
        stop_seconds=points[-1].stop_seconds,
        peak_bytes=max((p.peak_bytes for p in points if p.peak_bytes is not None), default=None),
        rss_bytes=max(p.rss_bytes for p in points),
    )


class RunHistory:
    """Points over the whole run, at most :data:`MAX_POINTS`, and the last few chunks in full.

    When there are too many points, neighbours are merged and each point covers twice as many chunks as before, so
    that the whole run is always there and no peak is lost.
    """

    def __init__(self, start: RunStart) -> None:
        self.start = start
        self.points: list[Point] = []
        self.views: deque[ChunkView] = deque(maxlen=_MAX_VIEWS)
        "the last chunks that came with spans, oldest first"
        self.last_event: ChunkEvent | None = None
        self.report: RunReport | None = None
        self._stride = 1

    @property
    def completed(self) -> bool:
        """Whether the run came to the end of the video."""
        return self.report is not None and self.report.complete

    @property
    def seconds(self) -> float:
        """How long the run took; until its last chunk if it failed."""
        source = self.report or self.last_event
        return source.seconds if source is not None else 0.0

    @property
    def num_frames(self) -> int:
        """Video frames that are done."""
        done = self.last_event.frames_done if self.last_event is not None else 0
        return done if self.report is None else self.report.frames

    @property
    def rate(self) -> str:
        """Frames per second of the whole run, in three digits or more."""
        so_far = self.num_frames / self.seconds if self.seconds > 0 else 0.0
        rate = so_far if self.report is None else self.report.frames_per_second
        return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"

    @property
    def peak_device_bytes(self) -> int:
        """The measured peak; 0 if nothing was measured."""
        source = self.report or self.last_event
        return source.peak_device_bytes if source is not None else 0

    def add(self, event: ChunkEvent) -> None:
        """Add a chunk."""
        started = self.last_event.seconds if self.last_event is not None else 0.0
        self.last_event = event
        point = Point(
            num_chunks=1,
            start_seconds=started,
            stop_seconds=event.seconds,
            peak_bytes=event.chunk_peak_bytes,
            **{name: getattr(event, name) for name in ("num_frames", "rss_bytes", *_TIMES)},
        )
        self._add_point(point)
        if event.spans:
            spans = event.spans[:_MAX_SPANS]
            self.views.append(ChunkView(event.index, started, event.seconds, spans))
            while len(self.views) > 1 and sum(len(view.spans) for view in self.views) > _MAX_SPANS:
                self.views.popleft()

    def _add_point(self, point: Point) -> None:
        if self.points and self.points[-1].num_chunks < self._stride:
            self.points[-1] = merged((self.points[-1], point))
            return
        if len(self.points) == MAX_POINTS:
            self.points = [merged(self.points[i : i + 2]) for i in range(0, MAX_POINTS, 2)]
            self._stride *= 2
        self.points.append(point)

    @property
    def whole(self) -> Point:
        """All points as one; for a run that did not fail, with the time after its last chunk, such as writing."""
        whole = merged(self.points)
        if self.report is None:
            return whole
        return replace(whole, stop_seconds=self.report.seconds, **{name: getattr(self.report, name) for name in _TIMES})

    @property
    def windows(self) -> list[Point]:
        """The whole run as a bounded number of steps, each of equally many chunks but the last."""
        stride = max(1, -(-len(self.points) // _MAX_WINDOWS))
        return [merged(self.points[i : i + stride]) for i in range(0, len(self.points), stride)]

    @property
    def allowed_in_view(self) -> int | None:
        """The budget, if there is one and it does not flatten a chart that shows it with the measured bytes."""
        allowed = self.start.allowed_bytes
        highest = max(self.start.projected_bytes, self.peak_device_bytes)
        return allowed if allowed is not None and allowed <= 3 * highest else None


def layer_count(layers: Sequence[object]) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{len(layers)} layer" if len(layers) == 1 else f"{len(layers)} layers"


def stays_on_device(layers: Iterable[LayerContext], views: Sequence[ChunkView]) -> list[Stay]:
    """When each context was on the device in these chunks.

    A resident context stays all the time. An offloaded one is there from the start of its ``to_device`` to the end
    of its ``to_host``. If it was fetched before these chunks it is there from their beginning, and in the first chunk
    of a run, which has nothing to fetch, from the start of its layer's computation.
    """
    begin, end = views[0].start_seconds, views[-1].stop_seconds
    by_layer: dict[str, list[Span]] = {}
    for span in sorted((s for view in views for s in view.spans), key=lambda s: s.start_seconds):
        by_layer.setdefault(span.layer, []).append(span)
    stays = []
    for layer in layers:
        spans = by_layer.get(layer.name, [])
        if layer.resident:
            stays.append(Stay(layer.name, begin, end))
        elif spans:
            stays += _visits(spans, begin, end, in_first_chunk=views[0].index == 0)
    return stays


def _visits(spans: Sequence[Span], begin: float, end: float, *, in_first_chunk: bool) -> list[Stay]:
    """The visits of one offloaded context, from all spans of its layer in order of time."""
    visits = []
    fetched = None if in_first_chunk or spans[0].lane == "to_device" else begin
    opened: float | None = None
    for span in spans:
        start = max(begin, span.start_seconds)
        if span.lane == "to_device":
            # Overrides what was there: the window of a layer may open, and wait, before its context is fetched.
            fetched = start
        elif span.lane == "compute":
            opened = start if opened is None else opened
        else:
            arrived = opened if fetched is None else fetched
            visits.append(Stay(span.layer, begin if arrived is None else arrived, max(begin, span.stop_seconds)))
            fetched = opened = None
    still_here = opened if fetched is None else fetched
    if still_here is not None:
        visits.append(Stay(spans[0].layer, still_here, end))
    return visits

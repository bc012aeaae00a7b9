"""Events: what the engine reports while it runs, in numbers and names of layers, without tensors.

The engine prints nothing and logs nothing per chunk. A progress bar, a recorder or a report page is a callback that
takes a :class:`ChunkEvent`. A callback may also be, or look like, a :class:`RunObserver`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeAlias

__all__ = [
    "Callback",
    "ChunkEvent",
    "Direction",
    "Lane",
    "LayerContext",
    "RunObserver",
    "RunReport",
    "RunStart",
    "Span",
]

Direction: TypeAlias = Literal["encode", "decode"]
Lane: TypeAlias = Literal["compute", "to_host", "to_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time in which one lane worked for one layer."""

    lane: Lane
    """``compute``: from the opening of a layer's window to its end. ``to_host``: its context leaves the device.
    ``to_device``: it comes back."""
    layer: str
    "path of the layer"
    start_seconds: float
    "since the start of the run"
    stop_seconds: float
    num_bytes: int
    "size of the context"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContext:
    """The context of one layer as it was planned."""

    name: str
    bytes: int
    resident: bool
    "whether it stays on the device between chunks"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """What a run is about to do, and what it was planned to need."""

    direction: Direction
    model: str
    height: int
    width: int
    dtype: str
    device: str
    chunk_frames: int
    frames_total: int | None
    "None while unknown"
    offload: str
    "the policy asked for: auto, none, all or a size"
    prefetch_bytes: int
    "offloaded contexts that may be fetched ahead of their layers, together"
    host_tier: str
    "where offloaded contexts go: ``host memory``, or a folder"
    allowed_bytes: int | None
    "the budget; None for no limit"
    reserved_bytes: int
    "part of the budget that is kept for what a plan cannot see"
    projected_bytes: int
    "planned peak of device bytes, weights included"
    weights_bytes: int
    layers: tuple[LayerContext, ...]
    "in the order in which they run"
    plan: str
    "the plan as a table to read"
    machine: Mapping[str, Any]
    "facts of where it runs; see :func:`longvid.environment.describe_machine`"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEvent:
    """One chunk went through the model and was handed to the writer."""

    direction: Direction
    index: int
    "number of the chunk, from 0"
    num_frames: int
    "video frames in this chunk, padding not counted"
    frames_done: int
    "video frames so far"
    frames_total: int | None
    "video frames of the whole run, None while unknown"
    num_latents: int
    seconds: float
    "since the start of the run"
    compute_seconds: float
    "time in the model, transfers of the chunk's input and output included"
    wait_seconds: float
    "time in which compute waited for the reader or for the writer"
    read_seconds: float
    "time since the last event in which the reading thread was at work, beside all else"
    write_seconds: float
    "time since the last event in which the writing thread was at work, beside all else"
    cache_bytes: int
    "bytes of all contexts of this video, wherever they are"
    offloaded_bytes: int
    "bytes of those that were off the device when the chunk ended"
    chunk_peak_bytes: int | None
    "highest number of device bytes in this chunk, weights included; None for a chunk that was not measured"
    peak_device_bytes: int
    "highest number of device bytes so far, weights included"
    rss_bytes: int
    "resident set size of the process, as the OS counts it"
    warmup: bool = False
    "whether the chunk ran for its contexts only, before the first one with a result"
    spans: tuple[Span, ...] = ()
    "what the lanes did since the last event; empty unless a callback asks for it"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What one encode or decode did; a run that found its output complete reports zeros for what it did not do."""

    direction: Direction
    frames: int
    "video frames that went in (encode) or came out (decode), those of earlier runs that this one continued included"
    latent_frames: int
    seconds: float = 0.0
    frames_per_second: float = 0.0
    "rate of the frames that this run computed itself"
    compute_seconds: float = 0.0
    "time in the model, transfers of its input and output included"
    wait_seconds: float = 0.0
    "time in which compute waited for the reader or for the writer, at the end of the run too"
    read_seconds: float = 0.0
    "time in which the reading thread was at work, beside all else"
    write_seconds: float = 0.0
    "time in which the writing thread was at work, beside all else"
    peak_device_bytes: int = 0
    """highest number of device bytes, weights included: exact tensor bytes on a CPU (of the first three chunks and
    every 32nd), the allocator's peak elsewhere"""
    projected_bytes: int = 0
    "what the plan said that peak would be"
    peak_rss_bytes: int = 0
    "highest resident set size of the process since it started, as the OS counts it"
    cache_bytes: int = 0
    "bytes of all contexts of the video"
    offloaded_bytes: int = 0
    "bytes of the contexts that were kept off the device between chunks"
    resumed_from_frame: int = 0
    "frames that were done before this run; 0 if it started at the beginning"
    frames_computed: int = 0
    "frames that went through the model, with those of the warm-up and those that were compared with what is stored"
    complete: bool
    "whether the whole video is done; if not, the run was stopped, and the same call resumes it"

    @property
    def compute_share(self) -> float:
        """Share of the run's time in which compute ran, 0 to 1."""
        return self.compute_seconds / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and what follows from them, ready for JSON."""
        return {**asdict(self), "compute_share": self.compute_share}


Callback: TypeAlias = Callable[[ChunkEvent], None]


class RunObserver:
    """Methods and attributes that a callback may have beside being callable; each is looked up, none is required."""

    wants_spans = False
    "whether events should carry spans"

    def run_started(self, start: RunStart) -> None:
        """Before the first chunk."""

    def run_finished(self, report: RunReport | None) -> None:
        """After the last chunk; None if the run failed."""

    def close(self) -> None:
        """At the end of a ``with`` block. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

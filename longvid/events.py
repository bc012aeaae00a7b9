"""What the engine reports while it runs: numbers only, no tensors, no text.

The engine prints nothing and logs nothing per chunk. A progress bar, a recorder or a report is a callback that
takes a :class:`ChunkEvent`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["Callback", "ChunkEvent", "Direction", "RunReport"]

Direction: TypeAlias = Literal["encode", "decode"]


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
    compute_seconds: float
    "time in the model, transfers of the chunk's input and output included"
    wait_seconds: float
    "time in which compute waited for the reader or for the writer"
    cache_bytes: int
    "bytes of all contexts of this video"
    peak_device_bytes: int
    "highest number of device bytes so far, weights included"
    rss_bytes: int
    "resident set size of the process, as the OS counts it"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What one encode or decode did."""

    direction: Direction
    frames: int
    "video frames that went in (encode) or came out (decode)"
    latent_frames: int
    seconds: float
    frames_per_second: float
    peak_device_bytes: int
    """highest number of device bytes, weights included: exact tensor bytes on a CPU (of the first three chunks and
    every 32nd), the allocator's peak elsewhere"""
    peak_rss_bytes: int
    "highest resident set size of the process since it started, as the OS counts it"
    cache_bytes: int
    "bytes of all contexts of the video"
    offloaded_bytes: int
    "bytes of contexts that were kept in host memory"
    resumed_from_frame: int
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


Callback: TypeAlias = Callable[[ChunkEvent], None]

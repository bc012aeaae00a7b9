"""Limits: what a source may ask for at most, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a source may ask for at most. Beyond it, SourceError of kind ``"limit"`` is raised.

    Args:
        max_pixels: of a frame.
        max_frames: that are delivered.
        max_seconds: of video that are delivered.
        max_bytes: of a file.
        stall_seconds: in which the decoder may deliver nothing.
    """

    max_pixels: int = 8192 * 4320
    max_frames: int | None = None
    max_seconds: float | None = None
    max_bytes: int | None = None
    stall_seconds: float = 60.0

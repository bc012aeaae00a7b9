"""Limits on the size and length of a source of frames."""

from __future__ import annotations

from dataclasses import dataclass

from longvid.errors import SourceError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on a source; exceeding one raises SourceError of kind ``"limit"``.

    Frames before the limit are delivered first.
    """

    max_pixels: int = 8192 * 4320
    "largest frame of a media file or an array: checked in the header, while FFmpeg probes the file, and in its decoder"
    max_frames: int | None = None
    "frames delivered, counted from ``start``"
    max_seconds: float | None = None
    "time of the last frame delivered, counted from the first one of the source"
    max_bytes: int | None = None
    "size of a media file"
    stall_seconds: float = 60.0
    "longest time without a frame from the decoder; then SourceError of kind ``stalled`` is raised"

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_frames", "max_seconds", "max_bytes", "stall_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SourceError(f"{name}={value} lets nothing through; give a number above 0", kind="range")

    @property
    def decoder_pixels(self) -> int:
        """The limit given to FFmpeg, which counts lines padded to a multiple of 64 pixels."""
        return self.max_pixels + 64 * 2**14

    def check(self, limit: str, value: float, found: str) -> None:
        """Refuse a source whose ``value`` exceeds the limit of this name; ``found`` describes it."""
        most = getattr(self, limit)
        if most is not None and value > most:
            raise self.exceeded(limit, found)

    def check_pixels(self, name: str, height: int, width: int) -> None:
        """Refuse frames of this size if they are too large."""
        self.check("max_pixels", height * width, f"{name} has frames of {width}x{height}, {height * width} pixels")

    def check_frames(self, name: str, num_frames: int) -> None:
        """Refuse to deliver so many frames."""
        self.check("max_frames", num_frames, f"{name} has {num_frames} frames or more from where reading starts")

    def exceeded(self, limit: str, found: str) -> SourceError:
        """The error for exceeding ``limit``; ``found`` describes the source."""
        return SourceError(
            f"{found}, and {limit} is {getattr(self, limit)}; raise that limit if the source is to be trusted",
            kind="limit",
        )

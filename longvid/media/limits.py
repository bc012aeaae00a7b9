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

    def allows(self, height: int, width: int) -> bool:
        """Whether frames may have this size; one without pixels is refused."""
        return 0 < height * width <= self.max_pixels

    def check_pixels(self, name: str, height: int, width: int) -> None:
        """Refuse frames of this size if they are too large."""
        if height * width > self.max_pixels:
            raise self.exceeded("max_pixels", f"{name} has frames of {width}x{height}, {height * width} pixels")

    def check_bytes(self, name: str, num_bytes: int) -> None:
        """Refuse a file that is too large."""
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise self.exceeded("max_bytes", f"{name} has {num_bytes} bytes")

    def check_frames(self, name: str, num_frames: int) -> None:
        """Refuse to deliver so many frames."""
        if self.max_frames is not None and num_frames > self.max_frames:
            raise self.exceeded("max_frames", f"{name} has {num_frames} frames or more from where reading starts")

    def check_seconds(self, name: str, seconds: float) -> None:
        """Refuse a frame that is shown so late."""
        if self.max_seconds is not None and seconds > self.max_seconds:
            raise self.exceeded("max_seconds", f"{name} has a frame at {float(seconds):g} s")

    def exceeded(self, limit: str, found: str) -> SourceError:
        """The error for exceeding ``limit``; ``found`` describes the source."""
        return SourceError(
            f"{found}, and {limit} is {getattr(self, limit)}; raise that limit if the source is to be trusted",
            kind="limit",
        )

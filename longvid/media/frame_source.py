"""What frames are read from, and how: the common part of files, arrays and iterables."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Self, TypedDict, get_args

from longvid.errors import SourceError
from longvid.frames import Deinterlace, Fit, FrameBlock, OnError, Pixels, SourceInfo
from longvid.media.decoding.seek_index import SeekIndex
from longvid.media.limits import Limits
from longvid.media.timing.clock import Joint
from longvid.media.timing.resampling import Instants

__all__ = ["DEFAULT_FRAME_RATE", "FrameSource", "Reading", "exact_rate"]

DEFAULT_FRAME_RATE = Fraction(24)
_MOST_DENOMINATOR = 1 << 20


class Reading(TypedDict, total=False):
    """How frames are read."""

    start: int
    "index of the first frame delivered; with ``fps``, of the frames that come out, as in ``frames``"
    frames: int | None
    "how many frames at most; all by default"
    size: tuple[int, int] | None
    "(height, width) to resize to; files only"
    frame_rate: Fraction | float | None
    "frames per second of a source without time stamps; a media file that has some refuses it"
    on_error: OnError
    """what happens where a media file is damaged: ``"stop"`` raises, ``"keep"`` ends before the damage, ``"conceal"``
    repeats the last good frame and marks it"""
    fit: Fit | None
    "how frames of another shape come to ``size``; None crops them if their aspect differs by more than 2 %"
    pixels: Pixels
    "``square`` resamples frames whose pixels are not square to their display shape"
    fps: Fraction | float | None
    """frames per second to resample to by time stamps. Frame n of the result is the one that the source shows n / fps
    seconds after its first frame; the last one is shown as long as the file says"""
    deinterlace: Deinterlace
    "``auto`` makes frames that consist of two fields whole"
    background: str
    "the colour that transparent pixels are composited on, a name or #rrggbb"
    limits: Limits | None
    follow_seconds: float | None
    "a media file is read as it grows, until it has not grown for so many seconds; None reads what is there"
    interrupted: Callable[[], bool]
    "tells whether a source that waits for bytes is to give up"


def exact_rate(name: str, rate: Fraction | float | None) -> Fraction | None:
    """A number of frames per second, given as the option ``name``; 59.94 is 2997/50 and not the float next to it.

    Raises:
        SourceError: it is not a number above 0.
    """
    if rate is None:
        return None
    exact = Fraction(rate).limit_denominator(_MOST_DENOMINATOR) if math.isfinite(rate) else Fraction(0)
    if exact <= 0:
        raise SourceError(f"{name}={rate} is not a number of frames per second above 0", kind="range")
    return exact


class FrameSource(ABC):
    """Frames of one video, read once from front to back, in blocks of any length.

    ``blocks`` may be called once. ``close`` may be called at any time, also twice, also from another thread than
    the one that iterates once that one has stopped.
    """

    info: SourceInfo
    "facts known in advance"
    one_pass = False
    "whether the source can be opened once only, such as a pipe"
    grows = False
    "whether the fingerprint is that of the bytes that were read so far"
    index: SeekIndex
    "the seek points that are known; more are found as frames are read. Only media files have some"

    def __init__(
        self,
        name: str,
        *,
        start: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        frame_rate: Fraction | float | None = None,
        on_error: OnError = "stop",
        fit: Fit | None = None,
        pixels: Pixels = "kept",
        fps: Fraction | float | None = None,
        deinterlace: Deinterlace = "auto",
        background: str = "black",
        limits: Limits | None = None,
        follow_seconds: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        if on_error not in get_args(OnError):
            raise SourceError(
                f"on_error {on_error!r} is not known; choose {', '.join(get_args(OnError))}", kind="range"
            )
        if start < 0:
            raise SourceError(
                f"start={start} is before the first frame; give the index of a frame, from 0", kind="range"
            )
        if frames is not None and frames < 1:
            raise SourceError(f"frames={frames} asks for no frame; ask for at least 1, or None for all", kind="range")
        self._name = name
        self._begin = start
        self._end = None if frames is None else start + frames
        self._size, self._frame_rate, self._on_error = size, exact_rate("frame_rate", frame_rate), on_error
        self._fit, self._pixels = fit, pixels
        self._fps = exact_rate("fps", fps)
        self._deinterlace, self._background = deinterlace, background
        self._limits = limits or Limits()
        self._instants: Instants
        "those at which frames are shown, if ``fps`` was given"
        self._follow_seconds, self._interrupted = follow_seconds, interrupted
        self.index = SeekIndex()
        self._started = False
        self._closed = False

    @property
    def joints(self) -> Mapping[int, Joint]:
        """Places where the time stamps of a file do not continue, by the number of the frame, as far as it was read."""
        return {}

    @property
    def damage(self) -> int | None:
        """The first frame of a file at which ``on_error`` decided what comes out, as far as it was read."""
        return None

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What decides the frames, ready for JSON; names and places are not in it. Two equal sources give the same."""

    def grown_since(self, earlier: Mapping[str, Any]) -> bool | None:
        """Whether the source has more bytes than the one that had the fingerprint ``earlier``, and begins with those.

        None if the bytes are other ones, or if only the fingerprints tell whether they are the same.
        """
        return None

    @abstractmethod
    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the frames from number ``first`` on, counted from ``start``; SourceError where they cannot be read."""

    def count_frames(self) -> int:
        """The number of frames that will come out, by the header or the packets of a file; the real one may be smaller.

        SourceError if nothing tells it before the last frame is there.
        """
        if self.info.num_frames is None:
            raise SourceError(
                f"the length of {self._name} is not known in advance, and a part or the reference plan needs it; give "
                "a file or an array",
                kind="layout",
            )
        return self.info.num_frames

    def last_duration(self) -> int | None:
        """How long the last frame that was read is shown, in units of the time base; None if nothing tells it."""
        return None

    def close(self) -> None:
        """Release the frames; reading on afterwards raises SourceError."""
        self._closed = True

    def _beyond_end(self, count: int) -> SourceError:
        return SourceError(
            f"start={self._begin} is beyond the end of {self._name}, which has {count} frames", kind="range"
        )

    def _start(self) -> None:
        self._check_open()
        if self._started:
            raise SourceError(f"the frames of {self._name} were already read once; open the source again")
        self._started = True

    def _set_info(self, kind: str, frame_size: tuple[int, ...], num_frames: int | None) -> None:
        """Set ``info`` of frames without time stamps."""
        (height, width), size, frame_rate = frame_size, self._size, self._frame_rate
        if size is not None and tuple(size) != (height, width):
            raise SourceError(
                f"{self._name} has frames of {width}x{height} pixels and {size[1]}x{size[0]} were asked for; "
                f"arrays are not resized here, resize them beforehand",
                kind="layout",
            )
        rate = frame_rate or DEFAULT_FRAME_RATE
        self._instants = Instants(self._fps or rate, 1 / rate)
        self.info = SourceInfo(
            kind=kind,
            name=self._name,
            height=height,
            width=width,
            num_frames=num_frames,
            time_base=1 / (self._fps or rate),
            frame_rate=self._fps or rate,
            timing_assumed=frame_rate is None,
            details=None if self._fps is None else {"resampled_from": str(rate)},
        )
        self._check_known_length()

    @property
    def _timing(self) -> dict[str, str]:
        """What resampling adds to a fingerprint of frames without time stamps."""
        rate = self._frame_rate or DEFAULT_FRAME_RATE
        return {} if self._fps is None else {"fps": str(self._fps), "resampled_from": str(rate)}

    def _check_known_length(self) -> None:
        """Refuse a source whose declared size or length exceeds the limits."""
        self._limits.check_pixels(self._name, self.info.height, self.info.width)
        self._limits.check_frames(self._name, self.info.num_frames or 0)

    def _within_limits(self, blocks: Iterator[FrameBlock], *, done: int, first_pts: int = 0) -> Iterator[FrameBlock]:
        """Pass frames on until they, and the ``done`` frames before them, exceed the limits, whatever was declared."""
        for block in blocks:
            for count, pts in enumerate(block.pts_T.tolist()):
                try:
                    self._limits.check_frames(self._name, done + count + 1)
                    seconds = float((pts - first_pts) * self.info.time_base)
                    self._limits.check("max_seconds", seconds, f"{self._name} has a frame at {seconds:g} s")
                except SourceError:
                    if count:
                        yield block.first(count)
                    raise
            done += len(block.pts_T)
            yield block

    def _check_open(self) -> None:
        if self._closed:
            raise SourceError(f"{self._name} is closed; open the source again to read its frames")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

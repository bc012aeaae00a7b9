"""An animated WebP file as a source. FFmpeg does not decode it in every version, so Pillow does."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias, Unpack

import av
import numpy as np
from av.video.frame import VideoFrame

from longvid.errors import SourceError
from longvid.frames import FrameBlock, SourceInfo
from longvid.media.decoding.decoder import Fault
from longvid.media.decoding.media_file import MediaFile
from longvid.media.frame_source import FrameSource, Reading
from longvid.media.images.convert import REVISION, Converter, Wanted
from longvid.media.limits import Limits
from longvid.media.pictures.content import webp_animation
from longvid.media.pictures.picture import Still, read
from longvid.media.timing.resampling import Instants, resampled

__all__ = ["AnimatedWebP", "is_animated_webp"]

_TIME_BASE = Fraction(1, 1000)
_HEAD_BYTES = 32
_Shown: TypeAlias = tuple[VideoFrame, int, bool]
"a frame, its time, and whether it is the source's own"


def is_animated_webp(path: str) -> bool:
    """Whether a file is named as WebP and begins as an animated one does."""
    if not path.lower().endswith(".webp"):
        return False
    try:
        file = MediaFile(path, Limits())
    except SourceError:
        return False
    with file.file:
        head = file.file.read(_HEAD_BYTES)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 2)


class AnimatedWebP(FrameSource):
    """The frames of an animated WebP file, each shown as long as the file says. The bytes of the file are in memory.

    Opening decodes the first frame. Frames depend on those before, so that ``start`` decodes from the first one on.

    Raises:
        SourceError: Pillow is not installed, the file is cut short or damaged, or a frame rate was given.
    """

    def __init__(self, path: str | os.PathLike[str], **reading: Unpack[Reading]) -> None:
        super().__init__(os.fspath(path), **reading)
        if self._size is not None and (len(self._size) != 2 or min(self._size) < 1):
            raise SourceError(f"size={self._size} is not (height, width) in pixels, both at least 1", kind="range")
        if self._frame_rate is not None or self._follow_seconds is not None:
            name = "--follow (follow=True)" if self._frame_rate is None else "--assume-fps (frame_rate=)"
            raise SourceError(
                f"{self._name} is an animated WebP, which says how long each frame is shown and is read whole; leave "
                f"{name} out",
                kind="layout",
            )
        data = read(self._name, self._limits)
        if isinstance(data, Fault):
            raise SourceError(f"{self._name} {data.why}; copy the file again", kind=data.kind)
        self._data = data
        self._damage: int | None = None
        self._animation = found = webp_animation(data)
        self._durations = found.durations
        self._limits.check_pixels(self._name, *found.size)
        if found.fault is not None and (self._on_error == "stop" or not found.durations):
            raise SourceError(f"{self._name} {found.fault}; copy the file again", kind="truncated")
        self._times = [0, *itertools.accumulate(self._durations)][:-1]
        self._codec = av.CodecContext.create("webp", "r")
        self._instants = Instants(self._fps or Fraction(1), _TIME_BASE, 0)
        self._image = self._opened()
        self._describe()

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the file, and how it is read."""
        return {
            "kind": "pictures",
            "bytes": len(self._data),
            "sha256": self._digest,
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "frames": None if self._end is None else self._end - self._begin,
            "conversion": REVISION,
            **self._libraries,
            **self._converter.facts,
            **({} if self._fps is None else {"fps": str(self._fps)}),
        }

    @property
    def damage(self) -> int | None:
        """The first frame at which ``on_error`` decided what comes out, as far as they were read."""
        return self._damage

    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the frames from number ``first`` on, one by one; where one is damaged, SourceError is raised."""
        self._start()
        return self._within_limits(self._blocks(self._begin + first), done=first)

    def last_duration(self) -> int | None:
        """As the file says of the last frame that is read, in milliseconds."""
        if self._fps is not None:
            return 1
        stop = self._begin + (self.info.num_frames or 1)
        if self._damage is not None and self._on_error == "keep":
            stop = min(stop, self._damage)
        return self._durations[stop - 1]

    def close(self) -> None:
        """Release the file."""
        if not self._closed:
            super().close()
            self._image.close()

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    @cached_property
    def _libraries(self) -> dict[str, str]:
        from PIL import __version__, features

        scaler = ".".join(map(str, av.library_versions["libswscale"]))
        return {"pillow": __version__, "libwebp": str(features.version("webp")), "libswscale": scaler}

    def _opened(self) -> Any:
        try:
            from PIL import Image
        except ImportError as exc:
            raise SourceError(
                f"{self._name} is an animated WebP, which Pillow reads: pip install pillow", kind="not-video"
            ) from exc
        try:
            return Image.open(io.BytesIO(self._animation.data))
        except (OSError, ValueError) as exc:
            raise SourceError(f"{self._name} cannot be decoded: {exc}; copy the file again", kind="damaged") from exc

    def _describe(self) -> None:
        first = self._decoded(0)
        if isinstance(first, Fault):
            raise self._error(first, 0)
        wanted = Wanted(
            size=self._size, fit=self._fit, pixels=self._pixels, background=self._background, limits=self._limits
        )
        self._converter = converter = Converter(first, Still(first, self._codec), wanted, self._name)
        count = len(self._times)
        if self._fps is not None:
            count = self._instants.before(sum(self._durations))
        if count <= self._begin:
            raise self._beyond_end(count)
        count = min(count, self._end or count) - self._begin
        mean_rate = Fraction(len(self._times), sum(self._durations)) / _TIME_BASE
        self.info = SourceInfo(
            kind="pictures",
            name=self._name,
            height=converter.height,
            width=converter.width,
            num_frames=count,
            time_base=_TIME_BASE if self._fps is None else 1 / self._fps,
            frame_rate=self._fps or mean_rate,
            timing_assumed=False,
            color=converter.color.info,
            sample_aspect_ratio=converter.shape.pixel_aspect,
            details={
                "container": "webp",
                "codec": "webp",
                "pix_fmt": first.format.name,
                "coded_height": first.height,
                "coded_width": first.width,
                **converter.facts,
                "resized_from": converter.resized_from,
                "alpha": converter.has_alpha,
                "audio": None,
                "bytes": len(self._data),
                "start": self._begin,
                "resampled_from": None
                if self._fps is None
                else str(1000 / Fraction(sum(self._durations), len(self._times))),
                **self._libraries,
            },
        )
        self._check_known_length()
        converter.warn()

    def _decoded(self, index: int) -> VideoFrame | Fault:
        """A frame; Pillow decodes those between the last one and this one too."""
        try:
            self._image.seek(index)
            return VideoFrame.from_ndarray(np.asarray(self._image.convert("RGBA")), "rgba")
        except (OSError, EOFError, ValueError, RuntimeError, SyntaxError) as exc:
            return Fault("damaged", f"cannot be decoded: {exc}", exc.with_traceback(None))

    def _error(self, fault: Fault, index: int) -> SourceError:
        error = SourceError(
            f"frame {index} of {self._name} {fault.why}; copy the file again, or encode without the damaged frames "
            "(--on-error keep, or conceal)",
            kind=fault.kind,
        )
        error.__cause__ = fault.cause
        return error

    def _shown(self, first: int) -> Iterator[_Shown]:
        """The frames of the file from number ``first`` on."""
        good: VideoFrame | None = None
        for index in range(first, len(self._times)):
            self._check_open()
            found = self._decoded(index) if self._damage is None else Fault("damaged", "follows damage")
            if isinstance(found, VideoFrame):
                good = found
                yield found, self._times[index], True
                continue
            if self._on_error == "stop" or (self._on_error == "keep" and index == 0):
                raise self._error(found, index)
            if self._damage is None:
                self._damage = index
            if self._on_error == "keep":
                what = f"frame {index} of {self._name} {found.why}; the video ends there, after {index} frames"
                warnings.warn(what, stacklevel=2)
                return
            good = good or self._last_before(index)
            yield good, self._times[index], False
        if self._animation.fault is not None:
            self._damage = len(self._times) if self._damage is None else self._damage
            count = len(self._times)
            warnings.warn(
                f"{self._name} {self._animation.fault}; the video ends there, after {count} frames", stacklevel=2
            )

    def _last_before(self, index: int) -> VideoFrame:
        """The last frame before a damaged one."""
        for number in range(index - 1, -1, -1):
            found = self._decoded(number)
            if isinstance(found, VideoFrame):
                return found
        raise SourceError(f"{self._name} has no frame without damage", kind="damaged")

    def _blocks(self, index: int) -> Iterator[FrameBlock]:
        shown: Iterator[_Shown] = self._shown(index)
        if self._fps is not None:
            shown = resampled(self._shown(0), self._instants, index, lambda: self._durations[-1])
        last, image = None, np.empty(0, np.uint8)
        for frame, pts, valid in shown:
            if index == self._end:
                return
            if frame is not last:
                last, image = frame, self._converter.convert(frame, index)
            yield FrameBlock(image[None], np.array([pts], np.int64), np.array([valid]))
            index += 1

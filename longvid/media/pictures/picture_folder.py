"""Pictures in files of their own as a source: a folder, numbered names, or a single picture, a frame each."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Unpack

import av
import numpy as np

from longvid.errors import SourceError
from longvid.frames import FrameBlock, Frames, SourceInfo
from longvid.media.decoding.decoder import Fault
from longvid.media.decoding.watchdog import Watchdog
from longvid.media.frame_source import DEFAULT_FRAME_RATE, FrameSource, Reading
from longvid.media.images.color import Tags
from longvid.media.images.convert import REVISION, Converter, Wanted
from longvid.media.images.orientation import orientation_of
from longvid.media.pictures.naming import has_picture_suffix, is_pattern, list_pictures
from longvid.media.pictures.picture import UNREADABLE, Still, decode, is_still, read

__all__ = ["PictureFolder", "is_pictures"]

_LIBRARIES = ("libavcodec", "libswscale")
_DIGEST_BYTES = 32
_MOST_CONVERTERS = 8
_OF_CONTENT = ("pictures", "content")
"of a fingerprint: which bytes the pictures hold"


def is_pictures(path: str) -> bool:
    """Whether a path is a folder, a pattern of numbered pictures such as ``frames/%05d.png``, or a single picture."""
    return os.path.isdir(path) or is_pattern(path) or (has_picture_suffix(path) and is_still(path))


class PictureFolder(FrameSource):
    """The pictures of a folder in natural order, of a pattern by their numbers, or a single one: PNG, JPEG, TIFF, WebP.

    A picture is a frame. They are shown at a constant rate, which ``fps`` or ``frame_rate`` gives, 24 frames per second
    by default. Each is decoded by itself, turned as its EXIF says, and converted as frames of a video are. Opening
    decodes the first one, from ``start`` on.

    Raises:
        SourceError: there are no pictures, a number is missing, the first one is damaged, or two rates were given.
    """

    def __init__(self, path: str | os.PathLike[str], **reading: Unpack[Reading]) -> None:
        super().__init__(os.fspath(path), **reading)
        if self._size is not None and (len(self._size) != 2 or min(self._size) < 1):
            raise SourceError(f"size={self._size} is not (height, width) in pixels, both at least 1", kind="range")
        self._rate = self._rate_given()
        self._is_folder = os.path.isdir(self._name)
        self._is_single = not self._is_folder and os.path.lexists(self._name)
        if self._follow_seconds is not None:
            raise SourceError(
                f"{self._name} is no file that is followed as it grows; leave --follow out (follow=True): the same "
                "command, run again, continues with the pictures that have been added",
                kind="layout",
            )
        self._folder = self._name if self._is_folder else os.path.dirname(self._name)
        self._names = self._listed()
        self._stop = len(self._names) if self._end is None else min(self._end, len(self._names))
        if self._begin >= len(self._names):
            raise self._beyond_end(len(self._names))
        self._digests = bytearray(_DIGEST_BYTES * len(self._names))
        "of the bytes of each picture; 0 where it was not read yet"
        self._converters: OrderedDict[tuple[Any, ...], Converter] = OrderedDict()
        self._has_said_crop = False
        self._damage: int | None = None
        self._watchdog = Watchdog(self._name, self._limits.stall_seconds)
        try:
            self._describe_all()
        except BaseException:
            self.close()
            raise

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the bytes of all pictures in their order, and how they are read."""
        self._watchdog.run(self._hash_all)
        color = self._converter.color.info
        return {
            "kind": "pictures",
            "pictures": len(self._names),
            "content": self._content(len(self._names)),
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "frames": None if self._end is None else self._end - self._begin,
            "frame_rate": str(self._rate),
            "conversion": REVISION,
            "av": av.__version__,
            **self._libraries,
            **self._converter.facts,
            "matrix": color.matrix,
            "range": color.range,
        }

    def grown_since(self, earlier: Mapping[str, Any]) -> bool | None:
        """Whether there are more pictures than in the source that had the fingerprint ``earlier``, and those first."""
        own, count, nothing = self.fingerprint(), earlier.get("pictures"), dict.fromkeys(_OF_CONTENT)
        if {**own, **nothing} != {**earlier, **nothing} or not isinstance(count, int) or count >= len(self._names):
            return None
        return True if self._content(count) == earlier.get("content") else None

    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the pictures from number ``first`` on, one by one, without a look at those before; where one is damaged
        or has changed, SourceError is raised after those before it."""
        self._start()
        return self._within_limits(self._blocks(self._begin + first), done=first)

    @property
    def damage(self) -> int | None:
        """The first picture at which ``on_error`` decided what comes out, as far as they were read."""
        return self._damage

    def last_duration(self) -> int | None:
        """As long as every other frame."""
        return 1

    def close(self) -> None:
        """End the thread that decodes."""
        if not self._closed:
            super().close()
            self._watchdog.close()

    def _rate_given(self) -> Fraction:
        for what, rate in (("frame_rate", self._frame_rate), ("fps", self._fps)):
            if rate is not None and rate <= 0:
                raise SourceError(f"{what}={rate} is not a number of frames per second above 0", kind="range")
        rates = {Fraction(rate) for rate in (self._fps, self._frame_rate) if rate is not None}
        if len(rates) > 1:
            raise SourceError(
                f"{self._name} holds pictures, for which --fps {self._fps} and --assume-fps {self._frame_rate} both "
                "give the frames per second; give one of them",
                kind="range",
            )
        return next(iter(rates), DEFAULT_FRAME_RATE)

    def _listed(self) -> list[str]:
        return [os.path.basename(self._name)] if self._is_single else list_pictures(self._name)

    def _describe_all(self) -> None:
        _, still = self._first_whole()
        self._converter = converter = self._converter_for(still)
        frame = still.frame
        assumed = self._fps is None and self._frame_rate is None
        suffixes = Counter(os.path.splitext(name)[1].lower() for name in self._names)
        self.info = SourceInfo(
            kind="pictures",
            name=self._name,
            height=converter.height,
            width=converter.width,
            num_frames=self._stop - self._begin,
            time_base=1 / self._rate,
            frame_rate=self._rate,
            timing_assumed=assumed,
            color=converter.color.info,
            sample_aspect_ratio=converter.shape.pixel_aspect,
            details={
                "container": "file" if self._is_single else "folder",
                "codec": still.codec_context.name,
                "pix_fmt": frame.format.name,
                "coded_height": frame.height,
                "coded_width": frame.width,
                **converter.facts,
                "resized_from": converter.resized_from,
                "alpha": converter.has_alpha,
                "matrix_tag": converter.color.matrix_tag,
                "audio": None,
                "pictures": dict(suffixes),
                "first_picture": self._names[self._begin],
                "last_picture": self._names[self._stop - 1],
                "start": self._begin,
                "av": av.__version__,
                **self._libraries,
            },
        )
        self._check_known_length()
        if assumed and len(self._names) > 1:
            warnings.warn(
                f"{self._name} has no time stamps; {float(self._rate):.6g} frames per second are assumed, --fps (fps=) "
                "sets another rate",
                stacklevel=4,
            )
        if len(suffixes) > 1:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
            warnings.warn(
                f"{self._name} has pictures of several kinds ({kinds}), which all are frames in the order of their "
                "names; to read some of them, give a pattern such as %05d.png or move the others",
                stacklevel=4,
            )

    @property
    def _libraries(self) -> dict[str, str]:
        return {name: ".".join(map(str, av.library_versions[name])) for name in _LIBRARIES}

    def _path(self, index: int) -> str:
        return self._name if self._is_single else os.path.join(self._folder, self._names[index])

    def _load(self, index: int) -> Still | Fault:
        """Decode a picture; SourceError of kind ``"changed"`` if its bytes are not those that were hashed."""

        def load() -> Still | Fault:
            data = self._read(index)
            return data if isinstance(data, Fault) else decode(self._path(index), data, self._limits)

        return self._watchdog.run(load)

    def _read(self, index: int) -> bytes | Fault:
        path = self._path(index)
        data = read(path, self._limits)
        digest = UNREADABLE if isinstance(data, Fault) else hashlib.sha256(data).digest()
        place = slice(index * _DIGEST_BYTES, (index + 1) * _DIGEST_BYTES)
        if self._is_known(index) and self._digests[place] != digest:
            raise SourceError(
                f"{path} was written to or removed while the pictures of {self._name} were read; run again when "
                "nothing writes to them",
                kind="changed",
            )
        self._digests[place] = digest
        return data

    def _is_known(self, index: int) -> bool:
        return any(self._digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES])

    def _hash_all(self) -> None:
        for index in range(len(self._names)):
            if not self._is_known(index):
                self._check_open()
                self._read(index)
                self._watchdog.beat()

    def _content(self, count: int) -> str:
        """One digest of the first pictures."""
        return hashlib.sha256(memoryview(self._digests)[: count * _DIGEST_BYTES]).hexdigest()

    def _first_whole(self) -> tuple[int, Still]:
        """The first picture without a fault, which the others are compared with."""
        for index in range(self._begin, self._stop):
            found = self._load(index)
            if isinstance(found, Still):
                return index, found
            if self._on_error != "conceal":
                raise self._error(found, index)
        raise SourceError(f"{self._name} has no picture without damage", kind="damaged")

    def _converter_for(self, still: Still) -> Converter:
        """The one for pictures of this shape, with these tags; a few are kept."""
        frame, tags, aspect = still.frame, Tags.of(still.codec_context), still.sample_aspect_ratio or Fraction(1)
        key = frame.format.name, frame.height, frame.width, orientation_of(frame), tags, aspect
        converter = self._converters.pop(key, None)
        if converter is None:
            wanted = Wanted(
                size=self._size, fit=self._fit, pixels=self._pixels, background=self._background, limits=self._limits
            )
            converter = Converter(frame, still, wanted, self._name)
            if not self._has_said_crop and self._fit is None and converter.shape.fit == "crop":
                self._has_said_crop = True
                converter.warn()
        self._converters[key] = converter
        if len(self._converters) > _MOST_CONVERTERS:
            self._converters.popitem(last=False)
        return converter

    def _converted(self, still: Still, index: int) -> Frames:
        converter = self._converter_for(still)
        info, shape = self.info, converter.shape
        if shape.size != (info.height, info.width) or shape.pixel_aspect != info.sample_aspect_ratio:
            raise SourceError(
                f"{self._path(index)} is shown with {_words(shape.size, shape.pixel_aspect)} where the picture before "
                f"has {_words((info.height, info.width), info.sample_aspect_ratio)}; give a size that all pictures are "
                "brought to (--size), or move it out of the folder",
                kind="geometry-changed",
            )
        return converter.convert(still.frame, index)

    def _blocks(self, first: int) -> Iterator[FrameBlock]:
        good: Frames | None = None
        for index in range(first, self._stop):
            self._check_open()
            found = self._load(index)
            if isinstance(found, Still):
                image, is_whole = self._converted(found, index), True
                good = image
            else:
                if self._on_error == "stop" or (self._on_error == "keep" and index == self._begin):
                    raise self._error(found, index)
                self._damage = index if self._damage is None else self._damage
                if self._on_error == "keep":
                    warnings.warn(
                        f"{self._path(index)} {found.why}; the video ends there, after {index - self._begin} frames",
                        stacklevel=2,
                    )
                    break
                image, is_whole = self._whole_before(index) if good is None else good, False
                good = image
            del found
            yield FrameBlock(image[None], np.array([index], np.int64), np.array([is_whole]))
        self._check_listing()

    def _whole_before(self, index: int) -> Frames:
        """The last picture before a number without a fault; the first one of all if there is none before it."""
        for before in range(index - 1, self._begin - 1, -1):
            found = self._load(before)
            if isinstance(found, Still):
                return self._converted(found, before)
        first, still = self._first_whole()
        return self._converted(still, first)

    def _check_listing(self) -> None:
        """Raise SourceError of kind ``"changed"`` if there are other pictures than at the beginning."""
        try:
            names = self._watchdog.run(self._listed)
        except SourceError as exc:
            if exc.kind == "stalled":
                raise
            raise SourceError(f"{self._name} was changed while it was read: {exc}", kind="changed") from exc
        if len(names) > len(self._names) and names[: len(self._names)] == self._names:
            raise SourceError(
                f"{self._name} has grown from {len(self._names)} to {len(names)} pictures while it was read: it is "
                "still being written. Run the same command again when it is whole, which continues the store",
                kind="changed",
            )
        if names != self._names:
            raise SourceError(
                f"{self._name} had other pictures when it was opened ({len(self._names)}) than it has now "
                f"({len(names)}); run again when nothing writes to it",
                kind="changed",
            )

    def _error(self, fault: Fault, index: int) -> SourceError:
        if self._is_single:
            return SourceError(f"{self._name} {fault.why}; copy the file again", kind=fault.kind)
        error = SourceError(
            f"frame {index} of {self._name}: {self._path(index)} {fault.why}; copy it again, or encode without the "
            "damaged pictures (--on-error keep, or conceal)",
            kind=fault.kind,
        )
        error.__cause__ = fault.cause
        return error


def _words(size: tuple[int, int], pixel_aspect: Fraction) -> str:
    aspect = "" if pixel_aspect == 1 else f" of the aspect {pixel_aspect}"
    return f"{size[1]}x{size[0]} pixels{aspect}"

"""What video files can hold: containers, codecs and pixel formats, and the limits of each, checked before a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from av.codec import Codec
from av.codec.codec import UnknownCodecError

from longvid.errors import StoreError
from longvid.frames import Times

__all__ = ["CONTAINERS", "PICTURES", "Container", "Encoding", "OutputCodec", "VideoFormat", "check_times",
           "video_format"]  # fmt: skip

OutputCodec: TypeAlias = Literal["h264", "h265", "av1", "ffv1", "prores", "vp9"]
"codecs that a video file can be written with"

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
"suffixes of numbered pictures"
_SUBSAMPLED = ("yuv420p", "yuv420p10le", "yuv422p", "yuv422p10le")
_YUV = (*_SUBSAMPLED, "yuv444p", "yuv444p10le")
_LARGEST_TIME_BASE = 2**31 - 1
_HIGHEST_RATES = {"av1": 240, "vp9": 1000}
"frames per second that an encoder takes as a hint"
_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How frames are encoded in a video file; None is the default of the codec or of the container."""

    codec: OutputCodec | None = None
    "h264; vp9 in a .webm file"
    crf: int | None = None
    "quality, from 0 (best) up: 18 of h264, 20 of h265, 28 of av1 and vp9; ffv1 and prores have none"
    pix_fmt: str | None = None
    "pixel format, such as ``yuv420p``"


@dataclass(frozen=True, slots=True)
class Container:
    """A container and what it takes."""

    format: str
    "the name of FFmpeg's muxer"
    codecs: tuple[OutputCodec, ...]
    "the first is the default"
    sound: tuple[str, ...]
    "codecs of sound that are copied; the encoder of any other sound is ``sound_encoder``"
    sound_encoder: str = "aac"
    cuts_sound: bool = True
    "sound may begin before time 0: what lies before it is cut off on playing"
    tick: Fraction | None = None
    "the container keeps time in these seconds; None if it keeps any time base"


_MP4_SOUND = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")
_PCM = ("pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le")
_MKV_SOUND = (
    *_MP4_SOUND, *_PCM, "mp2", "mp1", "dts", "truehd", "vorbis", "wavpack", "tta", "pcm_u8", "pcm_f64le", "mlp",
)  # fmt: skip
CONTAINERS: Mapping[str, Container] = {
    ".mp4": Container("mp4", ("h264", "h265", "av1"), _MP4_SOUND),
    ".mov": Container("mov", ("h264", "h265", "prores"), ("aac", "mp3", "ac3", "eac3", "alac", *_PCM)),
    ".mkv": Container(
        "matroska", get_args(OutputCodec), _MKV_SOUND, cuts_sound=False, tick=_MILLISECOND
    ),
    ".webm": Container("webm", ("vp9", "av1"), ("opus", "vorbis"), "libopus", cuts_sound=False, tick=_MILLISECOND),
}  # fmt: skip
"containers by suffix"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Codec:
    encoder: str
    pix_fmts: tuple[str, ...]
    "the first is the default"
    crf: tuple[int, int] | None = None
    "the default, and the largest"
    options: Mapping[str, str] = field(default_factory=dict)
    even: bool = False
    "subsampled formats need even sizes"
    smallest: int = 1
    largest: tuple[int, int] = (65535, 65535)
    "(height, width)"


# swscale puts chroma between the pixels; without chromaloc H.264 and H.265 decoders expect it half a pixel off
_CODECS: Mapping[OutputCodec, _Codec] = {
    "h264": _Codec(
        encoder="libx264", pix_fmts=_YUV, crf=(18, 51), options={"x264-params": "chromaloc=1"}, even=True,
        largest=(16384, 16384),
    ),
    "h265": _Codec(
        encoder="libx265", pix_fmts=_YUV, crf=(20, 51), options={"x265-params": "chromaloc=1:log-level=none"},
        even=True, smallest=16,
    ),
    "av1": _Codec(
        encoder="libsvtav1", pix_fmts=("yuv420p", "yuv420p10le"), crf=(28, 63), smallest=4, largest=(8704, 16384)
    ),
    # frames of bgr0 come back bit for bit
    "ffv1": _Codec(encoder="ffv1", pix_fmts=("bgr0", *_YUV), options={"level": "3", "slicecrc": "1"}),
    "prores": _Codec(encoder="prores_ks", pix_fmts=("yuv422p10le", "yuv444p10le"), options={"vendor": "apl0"}),
    "vp9": _Codec(
        encoder="libvpx-vp9", pix_fmts=("yuv420p", "yuv422p", "yuv444p"), crf=(28, 63),
        options={"b": "0", "row-mt": "1", "cpu-used": "2"},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFormat:
    """What a video file is written as; made by :func:`video_format`."""

    container: Container
    codec: OutputCodec
    encoder: str
    pix_fmt: str
    options: Mapping[str, str]
    height: int
    width: int
    "size of the coded frames, which may be one row and one column larger than the frames"
    time_base: Fraction
    "of the encoder"

    @property
    def is_rgb(self) -> bool:
        """Whether samples are RGB, in full range."""
        return self.pix_fmt == "bgr0"

    @property
    def keeps_aspect(self) -> bool:
        """Whether the file tells that pixels are not square: the codec does, or the container as it is written here."""
        return self.codec in ("h264", "h265") or self.container.format in ("mp4", "mov")

    @property
    def tag(self) -> str | None:
        """The tag under which Apple's players know the codec."""
        return "hvc1" if self.codec == "h265" and self.container.format in ("mp4", "mov") else None

    def hint(self, frame_rate: Fraction | None) -> Fraction:
        """The frame rate that the encoder is told. The times of frames do not depend on it."""
        return min(frame_rate or Fraction(24), Fraction(_HIGHEST_RATES.get(self.codec, _LARGEST_TIME_BASE)))


def video_format(path: Path, *, size: tuple[int, int], time_base: Fraction, encoding: Encoding) -> VideoFormat:
    """Decide the format of a video file from its suffix, the (height, width) of its frames and what was asked for.

    Warns if an odd size makes the file one that few players play, or larger than the frames.

    Raises:
        StoreError: kind ``"format"``; it cannot be written like that.
    """
    container = CONTAINERS.get(path.suffix.lower())
    if container is None:
        raise _wrong(
            path,
            f"the suffix {path.suffix!r} names no format known here; use {', '.join(CONTAINERS)}, .zarr, or "
            f"numbered pictures such as {path.stem}-%05d.png",
        )
    name = encoding.codec or container.codecs[0]
    if name not in _CODECS:
        raise _wrong(path, f"the codec {name!r} is not known; choose {', '.join(container.codecs)}")
    if name not in container.codecs:
        suffixes = [suffix for suffix, other in CONTAINERS.items() if name in other.codecs]
        raise _wrong(
            path,
            f"{path.suffix} does not hold {name} here: use {' or '.join(suffixes)} for it, or for {path.suffix} one of "
            f"{', '.join(container.codecs)}",
        )
    codec = _CODECS[name]
    _check_encoder(path, name, codec)
    _check_limits(path, name, codec, size, time_base)
    pix_fmt, coded = _pixels(path, name, codec, size, encoding.pix_fmt)
    return VideoFormat(
        container=container,
        codec=name,
        encoder=codec.encoder,
        pix_fmt=pix_fmt,
        options={**codec.options, **_quality(path, name, codec, encoding.crf)},
        height=coded[0],
        width=coded[1],
        time_base=container.tick if name == "vp9" and container.tick is not None else time_base,
    )


def _wrong(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} cannot be written: {why}", kind="format")


def _check_encoder(path: Path, name: str, codec: _Codec) -> None:
    try:
        Codec(codec.encoder, "w")
    except UnknownCodecError:
        raise _wrong(
            path, f"this build of FFmpeg lacks {codec.encoder}, the encoder of {name}; choose another --codec"
        ) from None


def _check_limits(path: Path, name: str, codec: _Codec, size: tuple[int, int], time_base: Fraction) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise StoreError(f"a video of {width}x{height} pixels cannot be written", kind="format")
    most = codec.largest
    if height < codec.smallest or width < codec.smallest or height > most[0] or width > most[1]:
        others = [other for other, limit in _CODECS.items() if _fits(limit, size)]
        raise _wrong(
            path,
            f"{name} takes frames from {codec.smallest}x{codec.smallest} to {most[1]}x{most[0]} pixels, and these have "
            f"{width}x{height}; "
            + (f"choose --codec {' or '.join(others)}" if others else "decode to .zarr"),
        )  # fmt: skip
    if time_base <= 0 or max(time_base.as_integer_ratio()) > _LARGEST_TIME_BASE:
        raise StoreError(f"the time base {time_base} cannot be kept in a video file", kind="format")


def _fits(codec: _Codec, size: tuple[int, int]) -> bool:
    return all(codec.smallest <= length <= most for length, most in zip(size, codec.largest, strict=True))


def _pixels(
    path: Path, name: str, codec: _Codec, size: tuple[int, int], asked: str | None
) -> tuple[str, tuple[int, int]]:
    """The pixel format, and the (height, width) of the coded frames."""
    height, width = size
    names = {fmt.removesuffix("le"): fmt for fmt in codec.pix_fmts}
    pix_fmt = names.get((asked or codec.pix_fmts[0]).removesuffix("le"))
    if pix_fmt is None:
        raise _wrong(path, f"{name} is not written in {asked!r} here; choose --pix-fmt {', '.join(names)}")
    if not (codec.even and (height % 2 or width % 2) and pix_fmt in _SUBSAMPLED):
        return pix_fmt, size
    even = (height + height % 2, width + width % 2)
    if asked is None:
        warnings.warn(
            f"{path} is written in 4:4:4 because {width}x{height} is odd: mpv, VLC and FFmpeg play it, and browsers, "
            f"phones and QuickTime do not; --pix-fmt yuv420p pads it to {even[1]}x{even[0]}, which plays everywhere",
            stacklevel=4,
        )
        return "yuv444p", size
    if pix_fmt.startswith("yuv422p"):
        even = (height, even[1])
    if even != size:
        warnings.warn(
            f"{path} has frames of {even[1]}x{even[0]}: {pix_fmt} needs even sizes, so that the last row and column of "
            f"{width}x{height} are repeated; --pix-fmt yuv444p keeps the size, and fewer players play it",
            stacklevel=4,
        )
    return pix_fmt, even


def _quality(path: Path, name: str, codec: _Codec, crf: int | None) -> dict[str, str]:
    if codec.crf is None:
        if crf is not None:
            raise _wrong(path, f"{name} has no --crf; leave it out, or choose another --codec")
        return {}
    default, most = codec.crf
    if crf is not None and not (isinstance(crf, int) and 0 <= crf <= most):
        raise _wrong(path, f"--crf {crf} is not a quality of {name}; give 0 (best) to {most}")
    return {"crf": str(default if crf is None else crf)}


def check_times(path: Path, pts_T: Times, time_base: Fraction) -> None:
    """Raise StoreError of kind ``"format"`` if a container does not keep such time stamps apart."""
    container = CONTAINERS.get(path.suffix.lower())
    if container is None or container.tick is None or len(pts_T) < 2:
        return
    step = int(np.diff(pts_T).min()) * time_base
    if step < container.tick:
        raise _wrong(
            path,
            f"frames are {float(step * 1000):.3g} ms apart, and {path.suffix} keeps time in milliseconds; choose .mp4 "
            "or .mov",
        )

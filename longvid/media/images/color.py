"""The colour matrix and range of a video: from the tags of the file, else by a rule."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange

from longvid.errors import SourceError
from longvid.frames import ColorInfo

__all__ = ["PRIMARIES", "TRANSFERS", "Conversion", "Tags", "matrix_by_rule", "resolve_color", "warn_of_hdr"]

PRIMARIES = {
    1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020", 10: "smpte428",
    11: "smpte431", 12: "smpte432", 22: "ebu3213",
}  # fmt: skip
"colour primaries by the number that H.273 and FFmpeg give them"
TRANSFERS = {
    1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 9: "log100", 10: "log316",
    11: "iec61966-2-4", 12: "bt1361e", 13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084",
    17: "smpte428", 18: "arib-std-b67",
}  # fmt: skip
"transfer characteristics by the number that H.273 and FFmpeg give them"

# matrix tag of the file -> (name, coefficients of swscale); two rare matrices have the name of the nearest one
_MATRICES = {
    1: ("bt709", 1), 4: ("bt601", 4), 5: ("bt601", 5), 6: ("bt601", 5), 7: ("bt709", 7), 9: ("bt2020", 9),
    10: ("bt2020", 9),
}  # fmt: skip
_SWSCALE = {"bt709": 1, "bt601": 5}
_RGB, _UNSPECIFIED = 0, 2
_HDR = ("smpte2084", "arib-std-b67")


@dataclass(frozen=True, slots=True)
class Conversion:
    """How the samples of a stream become RGB."""

    info: ColorInfo
    matrix: int | None
    "coefficients of swscale; None if the samples are RGB"
    matrix_tag: int
    expand_gray: bool
    "swscale takes every gray format for full range, so that limited gray is expanded here"


@dataclass(frozen=True, slots=True)
class Tags:
    """What a stream says of the colours of frames that say nothing, by the numbers of H.273."""

    colorspace: int
    color_primaries: int
    color_trc: int
    color_range: int

    @classmethod
    def of(cls, context: VideoCodecContext) -> Tags:
        """Those of a decoder, which may come to have others while it decodes."""
        return cls(*(int(getattr(context, name)) for name in cls.__slots__))


def matrix_by_rule(height: int) -> str:
    """The matrix of a video that does not name one: ``bt709`` from 720 lines up, ``bt601`` below."""
    return "bt709" if height >= 720 else "bt601"


def resolve_color(frame: VideoFrame, context: Tags, name: str) -> Conversion:
    """Decide the conversion from the tags of the frame, then of the stream (``context``), then by the rule.

    Raises:
        SourceError: the file names a matrix that cannot be converted.
    """
    tag = _first_tag(frame.colorspace, context.colorspace)
    primaries = PRIMARIES.get(_first_tag(frame.color_primaries, context.color_primaries))
    transfer = TRANSFERS.get(_first_tag(frame.color_trc, context.color_trc))
    if frame.format.is_rgb or frame.format.has_palette:
        info = ColorInfo(matrix="rgb", range="full", primaries=primaries, transfer=transfer)
        return Conversion(info, None, tag, False)
    matrix, coefficients = _resolve_matrix(frame, tag, name)
    gray = len(frame.format.components) <= 2
    range_, range_known = _resolve_range(frame, context.color_range, gray)
    assumed = not range_known or (tag == _UNSPECIFIED and not gray)
    info = ColorInfo(matrix=matrix, range=range_, primaries=primaries, transfer=transfer, assumed=assumed)
    return Conversion(info, coefficients, tag, gray and range_ == "limited")


def _resolve_matrix(frame: VideoFrame, tag: int, name: str) -> tuple[str, int]:
    if tag in (_UNSPECIFIED, _RGB):
        matrix = matrix_by_rule(frame.height)
        return matrix, _SWSCALE[matrix]
    if tag not in _MATRICES:
        raise SourceError(
            f"{name} uses colour matrix {tag} of H.273, which cannot be converted to RGB here; "
            f"convert the file to bt709 first"
        )
    return _MATRICES[tag]


def _resolve_range(frame: VideoFrame, declared: int, gray: bool) -> tuple[str, bool]:
    """Range of the samples, and whether the file declares it."""
    if frame.format.name.startswith("yuvj"):
        return "full", True
    tag = frame.color_range or declared
    if tag:
        return ("full" if tag == ColorRange.JPEG else "limited"), True
    return ("full" if gray else "limited"), False


def _first_tag(*tags: int) -> int:
    return next((int(tag) for tag in tags if tag != _UNSPECIFIED), _UNSPECIFIED)


def warn_of_hdr(name: str, info: ColorInfo) -> None:
    """Say that the frames of an HDR video are not tone mapped."""
    if info.transfer in _HDR:
        warnings.warn(
            f"{name} is HDR ({info.transfer}) and is read without tone mapping, so that it looks pale; convert it to "
            "SDR first if that matters",
            stacklevel=4,
        )

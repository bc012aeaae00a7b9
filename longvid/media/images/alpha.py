"""Pictures with transparent parts on a background of one colour."""

from __future__ import annotations

import re
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat

from longvid.errors import SourceError

__all__ = ["background_color", "composited", "has_alpha", "has_alpha_layer"]

_OPAQUE = ("yuv420p", "yuv420p10le", "yuvj420p", "yuv422p", "yuv422p10le", "yuv444p", "rgb24", "gray")
"""formats that most files have; to look at the parts of a format takes longer than the rest of the question"""
_ALPHA_MESSAGE = re.compile(rb"\x4e[\x01\x09]\xa5")
"the header of an HEVC unit with messages, in the layer 0 or 1, and the type of the message on the alpha channel"
_COLOR = re.compile(r"#[0-9a-fA-F]{6}|[A-Za-z]+")


def background_color(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour, #rrggbb or one of the names that FFmpeg and web pages know.

    Raises:
        SourceError: there is no such colour.
    """
    if not _COLOR.fullmatch(name) or name.lower() in ("random", "bikeshed"):
        raise _unknown(name)
    if name.startswith("#"):
        red, green, blue = (int(name[i : i + 2], 16) for i in (1, 3, 5))
        return red, green, blue
    try:
        graph = Graph()
        source, sink = graph.add("color", f"c={name}:s=16x16:d=1"), graph.add("buffersink")
        graph.link_nodes(source, graph.add("format", "rgb24"), sink).configure()
        red, green, blue = (int(value) for value in graph.vpull().to_ndarray()[0, 0])
    except (av.FFmpegError, ValueError) as exc:
        raise _unknown(name) from exc
    return red, green, blue


def _unknown(name: str) -> SourceError:
    return SourceError(
        f"background={name!r} is no colour that is known; give a name such as white or #rrggbb", kind="range"
    )


def has_alpha(pixel_format: VideoFormat) -> bool:
    """Whether pixels of this format may be transparent."""
    if pixel_format.name in _OPAQUE:
        return False
    return bool(pixel_format.has_palette) or any(component.is_alpha for component in pixel_format.components)


def has_alpha_layer(codec: VideoCodecContext) -> bool:
    """Whether the header of an HEVC stream declares an alpha layer, as phones and editors from Apple write it."""
    return codec.name == "hevc" and _ALPHA_MESSAGE.search(codec.extradata or b"") is not None


def composited(
    image_HWC: npt.NDArray[np.uint8], alpha_HW: npt.NDArray[np.uint8], background: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """RGB over a background, rounded to the nearest."""
    alpha = alpha_HW[..., None].astype(np.uint16)
    over: npt.NDArray[Any] = image_HWC * alpha + np.array(background, np.uint16) * (255 - alpha)
    return ((over + 127) // 255).astype(np.uint8)

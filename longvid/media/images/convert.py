"""Converts decoded frames to upright RGB of one size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from longvid.errors import SourceError
from longvid.frames import Fit, Pixels
from longvid.media.decoding.aperture import Edges
from longvid.media.decoding.container import reason
from longvid.media.images.alpha import background_color, composited, has_alpha, has_alpha_layer
from longvid.media.images.color import Conversion, Tags, resolve_color
from longvid.media.images.orientation import Orientation, is_between, orientation_of
from longvid.media.images.shape import Geometry, Shape
from longvid.media.limits import Limits

__all__ = ["REVISION", "Converter", "Facts", "Wanted"]

REVISION = 3
"changes whenever the same file would give other bytes"
# FULL_CHR_H_INT interpolates chroma where the fast path repeats it: a third of the error on film, at half the speed
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_GBR = (1, 2, 0)
"channels of the planes of ``gbrp``"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What frames are to come out."""

    size: tuple[int, int] | None = None
    fit: Fit | None = None
    pixels: Pixels = "kept"
    background: str = "black"
    limits: Limits = field(default_factory=Limits)


class Facts(Protocol):
    """What a stream, or a picture, says of all its frames."""

    @property
    def sample_aspect_ratio(self) -> Fraction | None:
        """Width of a pixel by its height."""

    @property
    def codec_context(self) -> VideoCodecContext:
        """Its decoder, which has the tags of its colours."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Its tags."""


class Converter:
    """Converts decoded frames to upright RGB of one size: colour and size in one pass of swscale.

    Each frame is converted by its own tags and fitted by its own size. Frames with transparent pixels, or with edges
    that are not shown, take a second pass.
    """

    def __init__(self, first: VideoFrame, stream: Facts, wanted: Wanted, name: str, edges: Edges | None = None) -> None:
        self._name = name
        self._wanted = wanted
        self._edges = edges
        self._pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        self._tags = Tags.of(stream.codec_context)
        self._colors: dict[tuple[Any, ...], Conversion] = {}
        self._shapes: dict[tuple[Any, ...], Shape] = {}
        self._background = background_color(wanted.background)
        self._scaler, self._rgb_scaler = VideoReformatter(), VideoReformatter()
        self._said: set[str] = set()
        self.color = self._color(first)
        self.shape = self._shape(first)
        "that of the first frame"
        self.height, self.width = self.shape.size
        upright = self.shape.geometry.upright
        self.resized_from = list(upright) if upright != (self.height, self.width) else None
        shrinks = "area" if self.shape.shrinks else "bicubic"
        self.interpolation_name = shrinks if self.shape.is_resized else None
        self._is_between = is_between(first)
        self.has_alpha = has_alpha(first.format)
        tags = {key.lower(): value for key, value in stream.metadata.items()}
        declares_alpha = tags.get("alpha_mode") == "1" or has_alpha_layer(stream.codec_context)
        self._alpha_is_lost = declares_alpha and not self.has_alpha

    @property
    def orientation(self) -> Orientation:
        """How the first frame lies."""
        return self.shape.geometry.orientation

    @property
    def facts(self) -> dict[str, Any]:
        """What was decided for the first frame, and what decides it for others, ready for JSON."""
        geometry = self.shape.geometry
        return {
            "rotation": (self.orientation.turns * 90 + 179) % 360 - 179,
            "mirrored": self.orientation.mirrored,
            "aperture": None if geometry.box is None else list(geometry.box),
            "coded_sample_aspect_ratio": str(self._pixel_aspect),
            "interpolation": self.interpolation_name,
            "fit": self.shape.fit,
            "fit_asked": self._wanted.fit,
            "pixels": self._wanted.pixels,
            "background": self._wanted.background,
        }

    def warn(self) -> None:
        """Say that frames are cropped, if nobody asked for it, and what of the file is not followed."""
        if self._is_between:
            warnings.warn(
                f"{self._name} is turned by an angle between quarter turns; its frames are turned by the nearest one, "
                f"{self.facts['rotation']} degrees: rotate them with ffmpeg -vf rotate first",
                stacklevel=4,
            )
        if self._alpha_is_lost:
            warnings.warn(
                f"{self._name} has transparent pixels that its decoder does not read, so that their hidden colour is "
                "shown; convert it to a format such as png in mov to composite them",
                stacklevel=4,
            )
        if self._wanted.fit is not None or self.shape.fit != "crop":
            return
        shown, (height, width) = float(self.shape.geometry.display_aspect), self.shape.size
        warnings.warn(
            f"{self._name} has the display aspect {shown:.4g} and {width}x{height} has {width / height:.4g}: frames "
            "are cropped in the middle; choose another way with --fit stretch or --fit pad",
            stacklevel=4,
        )

    def convert(self, frame: VideoFrame, index: int, original: VideoFrame | None = None) -> npt.NDArray[np.uint8]:
        """RGB of one frame, of shape (height, width, 3), in memory of its own.

        Channels are stored as planes, as swscale gives them and models need them. ``original`` is the frame as it was
        decoded, if a filter made ``frame`` of it; its tags count.
        """
        tagged = original or frame
        color, shape = self._color(tagged), self._shape(tagged)
        if shape.size != self.shape.size:
            raise SourceError(
                f"frame {index} of {self._name} is shown with {shape.size[1]}x{shape.size[0]} pixels where the first "
                f"one has {self.width}x{self.height}; give a size that all frames are brought to (--size), or cut the "
                "file there",
                kind="geometry-changed",
            )
        if shape.geometry.box is not None or has_alpha(tagged.format):
            image = self._in_two_passes(frame, index, color, shape)
            if image is not None:
                return image
        height, width = shape.target
        rgb = self._rgb(frame, index, color, (height, width), self._interpolation(shape))
        image, place = self._canvas(shape)
        if color.matrix is None:
            packed = _samples(rgb.planes[0])[:, : width * 3].reshape(height, width, 3)
            place(slice(None), packed)
            return image
        for channel, plane in zip(_GBR, rgb.planes, strict=True):
            samples = _samples(plane)[:, :width]
            place(channel, _LIMITED_TO_FULL[samples] if color.expand_gray else samples)
        return image

    def _in_two_passes(
        self, frame: VideoFrame, index: int, color: Conversion, shape: Shape
    ) -> npt.NDArray[np.uint8] | None:
        """Convert, composite and crop, and then scale; None if one pass is enough, since the frame is opaque."""
        height, width = frame.height, frame.width
        is_rgba = has_alpha(frame.format)
        rgb = self._rgb(
            frame, index, color, (height, width), Interpolation.BICUBIC | _EXACT, packed=True, alpha=is_rgba
        )
        channels = 4 if is_rgba else 3
        picture = _samples(rgb.planes[0])[:, : width * channels].reshape(height, width, channels)
        opaque = not is_rgba or bool((picture[..., 3] == 255).all())
        if opaque and shape.geometry.box is None:
            return None
        colors: npt.NDArray[np.uint8] = picture[..., :3]
        if color.expand_gray:
            colors = _LIMITED_TO_FULL[colors]
        if not opaque:
            self._warn_of_alpha()
            colors = composited(colors, picture[..., 3], self._background)
        if shape.geometry.box is not None:
            top, left, *(height, width) = shape.geometry.box
            colors = colors[top : top + height, left : left + width]
        image, place = self._canvas(shape)
        for channel in range(3):
            place(channel, self._scaled(colors[..., channel], shape))
        return image

    def _scaled(self, samples: npt.NDArray[np.uint8], shape: Shape) -> npt.NDArray[np.uint8]:
        """One channel at its final size, before it is turned."""
        if not shape.is_resized:
            return samples
        height, width = shape.target
        gray = VideoFrame.from_ndarray(np.ascontiguousarray(samples), format="gray")
        gray.color_range = ColorRange.JPEG
        scaled = self._rgb_scaler.reformat(
            gray, width=width, height=height, format="gray", interpolation=self._interpolation(shape)
        )
        return _samples(scaled.planes[0])[:, :width].copy()

    def _canvas(self, shape: Shape) -> tuple[npt.NDArray[np.uint8], Any]:
        """An image to fill, and what puts channels of the picture as it was decoded in their place on it."""
        image = np.empty((3, self.height, self.width), np.uint8).transpose(1, 2, 0)
        upright = shape.geometry.orientation.upright
        if shape.scaled == shape.size:

            def place(channels: int | slice, samples: npt.NDArray[np.uint8]) -> None:
                image[..., channels] = upright(samples)
        else:
            if shape.fit == "pad":
                image[:] = self._background
            spans = [_overlap(*span) for span in zip(shape.corner, shape.scaled, shape.size, strict=True)]
            inside = image[spans[0][1], spans[1][1]]
            rows, columns = spans[0][0], spans[1][0]

            def place(channels: int | slice, samples: npt.NDArray[np.uint8]) -> None:
                inside[..., channels] = upright(samples)[rows, columns]

        return image, place

    def _rgb(
        self,
        frame: VideoFrame,
        index: int,
        color: Conversion,
        size: tuple[int, int],
        interpolation: int,
        *,
        packed: bool = False,
        alpha: bool = False,
    ) -> VideoFrame:
        """RGB of (height, width) ``size``, before the frame is turned; in planes where swscale is faster so."""
        is_rgb = color.matrix is None
        try:
            return self._scaler.reformat(
                frame,
                width=size[1],
                height=size[0],
                # the same RGB (within 1 where it is resized), but swscale has vector code for planes
                format="rgba" if alpha else "rgb24" if is_rgb or packed else "gbrp",
                src_colorspace=color.matrix,
                src_color_range=ColorRange.JPEG if color.info.range == "full" else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=interpolation,
            )
        except (av.FFmpegError, ValueError) as exc:
            raise SourceError(
                f"frame {index} of {self._name} cannot be converted from {frame.format.name} to RGB: {reason(exc)}"
            ) from exc

    def _interpolation(self, shape: Shape) -> int:
        return (Interpolation.AREA if shape.shrinks and shape.is_resized else Interpolation.BICUBIC) | _EXACT

    def _color(self, frame: VideoFrame) -> Conversion:
        """By the tags of the frame, which may change within a file."""
        key = (frame.format.name, frame.colorspace, frame.color_range, frame.height)
        if key not in self._colors:
            self._colors[key] = resolve_color(frame, self._tags, self._name)
        return self._colors[key]

    def _shape(self, frame: VideoFrame) -> Shape:
        """By the size of the frame and by how it lies, which may change within a file."""
        orientation = orientation_of(frame)
        key = (frame.height, frame.width, orientation)
        if key not in self._shapes:
            coded = frame.height, frame.width
            geometry = Geometry(
                coded=coded,
                box=None if self._edges is None else self._edges.box(*coded),
                orientation=orientation,
                pixel_aspect=self._pixel_aspect,
            )
            wanted = self._wanted
            shape = Shape.plan(geometry, wanted.size, wanted.fit, wanted.pixels)
            wanted.limits.check_pixels(f"{self._name}, scaled to be cropped or to square pixels,", *shape.scaled)
            self._shapes[key] = shape
        return self._shapes[key]

    def _warn_of_alpha(self) -> None:
        if "alpha" not in self._said:
            self._said.add("alpha")
            warnings.warn(
                f"{self._name} has transparent pixels, which are composited on {self._wanted.background}; choose "
                "another colour with --background",
                stacklevel=4,
            )


_LIMITED_TO_FULL = ((np.arange(256) - 16) * 255 / 219).round().clip(0, 255).astype(np.uint8)


def _overlap(first: int, length: int, size: int) -> tuple[slice, slice]:
    """Where ``length`` pixels that begin at ``first`` lie within ``size``: of them, and of the size."""
    begin, end = max(0, first), min(size, first + length)
    return slice(begin - first, end - first), slice(begin, end)


def _samples(plane: VideoPlane) -> npt.NDArray[np.uint8]:
    """Rows of bytes, padding included."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)

"""Reads and decodes one picture in a file of its own, and tells what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

import av
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from longvid.errors import SourceError
from longvid.media.decoding.container import reason
from longvid.media.decoding.decoder import Fault
from longvid.media.decoding.media_file import MediaFile
from longvid.media.images.orientation import Orientation
from longvid.media.limits import Limits
from longvid.media.pictures.content import Content, examine, kind_of

__all__ = ["UNREADABLE", "Still", "decode", "is_still", "read"]

UNREADABLE = hashlib.sha256(b"unreadable").digest()
"stands for the digest of a file that cannot be read"
_BYTES_PER_PIXEL = 32
"more than a pixel takes in any of the formats"
_LEAST_BYTES = 64 * 2**20
_HEAD_BYTES = 16


@dataclass(frozen=True, slots=True)
class Still:
    """A decoded picture, as a stream of one frame."""

    frame: VideoFrame
    codec_context: VideoCodecContext
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def sample_aspect_ratio(self) -> Fraction | None:
        """Width of a pixel by its height; None if the picture does not say."""
        return self.codec_context.sample_aspect_ratio


def read(path: str, limits: Limits) -> bytes | Fault:
    """The bytes of a file, or why there are none; SourceError if there are more than the limits allow."""
    try:
        file = MediaFile(path, limits, may_be_empty=True)
    except SourceError as exc:
        if exc.kind == "limit":
            raise
        return Fault("damaged", f"cannot be read: {exc}")
    try:
        return _bytes(file, path, limits)
    except OSError as exc:
        return Fault("damaged", f"cannot be read: {reason(exc)}")
    finally:
        file.close()


def _bytes(file: MediaFile, path: str, limits: Limits) -> bytes:
    most = max(_LEAST_BYTES, limits.max_pixels * _BYTES_PER_PIXEL)
    content = file.file.read(most + 1)
    if len(content) > most:
        raise limits.exceeded("max_pixels", f"{path} has more than {most} bytes, too many for one picture")
    return content


def decode(path: str, data: bytes, limits: Limits) -> Still | Fault:
    """Decode a picture; a fault if it is not whole.

    Raises:
        SourceError: the file holds several pictures, or one beyond the limits.
    """
    content = examine(data)
    if content is None:
        return Fault("damaged", "is no picture" if data else "is empty (0 bytes)")
    limits.check_pixels(path, *content.size)
    if content.animated or content.pages > 1:
        raise _several(path, content)
    if content.fault is not None:
        return Fault("truncated" if "cut short" in content.fault else "damaged", content.fault)
    context = cast("VideoCodecContext", av.CodecContext.create(content.codec, "r"))
    context.thread_count = 1
    # without this option the decoder of JPEG fills damaged places with a guess; other decoders report the damage
    detect = {"err_detect": "explode"} if content.codec == "mjpeg" else {}
    context.options = {"max_pixels": str(limits.decoder_pixels), **detect}
    try:
        frames = [*context.decode(av.Packet(data[: content.num_bytes])), *context.decode(None)]
    except av.ArgumentError as exc:
        raise limits.exceeded("max_pixels", f"{path} has more pixels, or no size at all") from exc
    except (av.FFmpegError, OSError) as exc:
        return Fault("damaged", f"cannot be decoded: {reason(exc)}", exc.with_traceback(None))
    if not frames or frames[0].is_corrupt:
        return Fault("damaged", "cannot be decoded: its data are damaged")
    limits.check_pixels(path, frames[0].height, frames[0].width)
    frames[0].opaque = Orientation.from_exif(content.orientation)
    return Still(frames[0], context)


def is_still(path: str) -> bool:
    """Whether a file holds a single picture, or what was to be one; not an animation that FFmpeg reads."""
    limits = Limits()
    try:
        file = MediaFile(path, limits)
    except SourceError:
        return False
    try:
        if kind_of(file.file.read(_HEAD_BYTES)) is None:
            return False
        file.file.seek(0)
        content = examine(_bytes(file, path, limits))
    except (OSError, SourceError):
        return False
    finally:
        file.close()
    return content is not None and not content.is_stream and not (content.animated and content.codec == "png")


def _several(path: str, content: Content) -> SourceError:
    if content.pages > 1:
        what, advice = f"has {content.pages} pages", "write each page to a file of its own and name their folder"
    else:
        what, advice = "is animated", "name that file alone as the source, or move it out of the folder"
    return SourceError(f"{path} {what}; {advice}", kind="layout")

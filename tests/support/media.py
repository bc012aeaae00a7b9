"""Small media files for the tests. Every frame carries its index in its pixels, as eight black or white bands."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

HEIGHT, WIDTH, COUNT = 48, 96, 24


def barcode(index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame whose bands from left to right are the bits of the index, lowest first."""
    bits = np.array([index >> bit & 1 for bit in range(8)], np.uint8)
    row = bits[np.minimum(np.arange(width) * 8 // width, 7)] * 200 + 20
    return np.broadcast_to(row[None, :, None], (height, width, 3)).astype(np.uint8)


def barcodes(count: int = COUNT, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.stack([barcode(index, height, width) for index in range(count)])


def indices(frames: np.ndarray) -> list[int]:
    """What the bands of these frames say."""
    width = frames.shape[2]
    centres = [(2 * bit + 1) * width // 16 for bit in range(8)]
    bits = frames[:, frames.shape[1] // 2, centres].mean(axis=-1) > 120
    return [int((row * 2 ** np.arange(8)).sum()) for row in bits]


def smooth_colors(height: int, width: int) -> np.ndarray:
    """A pattern of saturated, slowly changing colours, which chroma subsampling hardly touches."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width) * 2 * np.pi
    waves = [np.sin(x + 2 * y), np.cos(2 * x - y), np.sin(x * 1.5 - y + 2)]
    return np.stack([127.5 + 115 * wave for wave in waves], axis=-1).round().astype(np.uint8)


def write_media(
    path: Path,
    frames: np.ndarray | None = None,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container: str | None = None,
    rate: int = 24,
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    matrix: int = 5,
    full_range: bool = False,
    tags: dict[str, int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    movflags: str | None = None,
    setup: Callable[[Any], None] | None = None,
) -> Path:
    """Encode frames with PyAV alone; ``tags`` are attributes of the codec context, ``matrix`` is what is converted."""
    frames = barcodes() if frames is None else frames
    range_ = ColorRange.JPEG if full_range else ColorRange.MPEG
    muxer_options = {} if movflags is None else {"movflags": movflags}
    scaler = VideoReformatter()
    with av.open(str(path), "w", format=container, options=muxer_options) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        # chromaloc: swscale puts chroma between the pixels
        defaults = {"preset": "ultrafast", "x264-params": "chromaloc=1"} if codec == "libx264" else {}
        stream.options = {**defaults, **(options or {})}
        if codec.startswith("libvpx"):  # its threads wait for each other by spinning: for minutes on busy cores
            stream.codec_context.thread_count = 1
        if time_base is not None:
            stream.codec_context.time_base = stream.time_base = time_base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        if setup is not None:
            setup(stream)
        output.start_encoding()
        for index, image in enumerate(frames):
            frame = scaler.reformat(
                av.VideoFrame.from_ndarray(image, "rgb24"),
                format=pix_fmt,
                dst_colorspace=matrix,
                src_color_range=ColorRange.JPEG,
                dst_color_range=range_,
            )
            frame.pts = index if pts is None else pts[index]
            frame.time_base = stream.codec_context.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def cut(path: Path, share: float, name: str) -> Path:
    """A copy that ends after this share of the bytes."""
    data = path.read_bytes()
    target = path.with_name(name)
    target.write_bytes(data[: int(len(data) * share)])
    return target


def join(target: Path, *parts: Path) -> Path:
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target


def collect(source: Any) -> tuple[np.ndarray, np.ndarray]:
    """All frames and time stamps of a source, which is closed."""
    with source:
        blocks = list(source.blocks())
    return np.concatenate([block.frames_THWC for block in blocks]), np.concatenate([block.pts_T for block in blocks])

"""One file of each kind of footage that is more than frames in a row, made by ffmpeg."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.ffmpeg import ffmpeg, generated
from support.paff import write_paff

__all__ = ["KINDS", "with_aperture"]

X264 = ["-c:v", "libx264", "-qp", "12", "-pix_fmt", "yuv420p"]
VP8 = ["-c:v", "libvpx", "-threads", 1, "-b:v", "2M"]


def with_aperture(data: bytes, width: int = 80, height: int = 48, right: int = 0, down: int = 0) -> bytes:
    """A copy of an mp4 file with a clean aperture."""
    data = bytearray(data)
    at = data.index(b"avc1", data.index(b"stsd")) - 4
    size = struct.unpack(">I", data[at : at + 4])[0]
    data[at + size : at + size] = struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, right, 1, down, 1)
    data[at : at + 4] = struct.pack(">I", size + 40)
    for name in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        box = data.rindex(name, 0, at + 8) - 4
        data[box : box + 4] = struct.pack(">I", struct.unpack(">I", data[box : box + 4])[0] + 40)
    return bytes(data)


def _plain(folder: Path, *options: object, suffix: str = ".mp4") -> Path:
    path = folder / f"plain{suffix}"
    ffmpeg(*generated(0.6), *X264, *options, path)
    return path


def _turned(folder: Path, *display: object) -> Path:
    path = folder / "turned.mp4"
    ffmpeg(*display, "-i", _plain(folder), "-c", "copy", path)
    return path


def _cropped(folder: Path) -> Path:
    path = folder / "cropped.mp4"
    path.write_bytes(with_aperture(_plain(folder).read_bytes()))
    return path


def _wide(folder: Path) -> Path:
    path = folder / "wide.mpg"
    ffmpeg(*generated(0.6, size="70x64"), "-vf", "setsar=64/45", "-c:v", "mpeg2video", "-q:v", 2, path)
    return path


def _interlaced(folder: Path) -> Path:
    path = folder / "interlaced.mp4"
    fields = ["-flags", "+ildct+ilme", "-x264-params", "tff=1"]
    ffmpeg(*generated(0.6, name="testsrc2", rate=50), "-vf", "interlace=lowpass=0", *X264, *fields, path)
    return path


def _begins_inside(folder: Path) -> Path:
    path = folder / "begins.ts"
    whole = _plain(folder, "-x264-params", "open-gop=1:keyint=10:bframes=3:b-adapt=0:scenecut=0", suffix=".ts")
    ffmpeg("-ss", 0.3, "-i", whole, "-c", "copy", path)
    return path


def _two_matrices(folder: Path) -> Path:
    parts = []
    for matrix, tag in (("bt601", "smpte170m"), ("bt709", "bt709")):
        parts.append(folder / f"{matrix}.h264")
        scale = ["-vf", f"scale=out_color_matrix={matrix}:out_range=tv", "-colorspace", tag, "-color_range", "tv"]
        ffmpeg(*generated(0.4, name="smptebars"), *scale, *X264, parts[-1])
    path = folder / "matrices.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def _two_sizes(folder: Path) -> Path:
    for size in ("96x64", "64x48"):
        ffmpeg(*generated(0.4, size=size), *VP8, folder / f"{size}.webm")
    (folder / "list.txt").write_text("file 96x64.webm\nfile 64x48.webm\n")
    path = folder / "sizes.webm"
    ffmpeg("-f", "concat", "-i", folder / "list.txt", "-c", "copy", path)
    return path


def _made(name: str, *arguments: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        ffmpeg(*arguments, path)
        return path

    return make


KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "mirrored": (lambda folder: _turned(folder, "-display_hflip"), {}),
    "turned and mirrored": (lambda folder: _turned(folder, "-display_rotation", 90, "-display_vflip"), {}),
    "clean aperture": (_cropped, {}),
    "pixels that are not square": (_wide, {}),
    "square pixels": (_wide, {"pixels": "square"}),
    "two fields a frame": (_interlaced, {}),
    "a picture for each field": (lambda folder: write_paff(folder / "fields.ts", 14), {}),
    "begins inside a group": (_begins_inside, {}),
    "two matrices": (_two_matrices, {"frame_rate": 25}),
    "two sizes": (_two_sizes, {"size": (64, 96)}),
    "padded": (_plain, {"size": (80, 96), "fit": "pad"}),
    "cropped": (_plain, {"size": (64, 64), "fit": "crop"}),
    "odd size": (_made("odd.mkv", *generated(0.6, size="97x63"), "-c:v", "ffv1"), {}),
    "transparent": (
        _made("t.mov", *generated(0.6), "-vf", "format=argb,colorchannelmixer=aa=0.4", "-c:v", "qtrle"),
        {"background": "#204060"},
    ),
    "last picture held": (_made("hold.gif", *generated(0.9, rate=10), "-final_delay", 200), {}),
    "30 frames a second": (_plain, {"fps": 30}),
    "16 frames a second": (_interlaced, {"fps": 16}),
}
"""A maker of the file in a folder, and the options that it is read with, by name."""

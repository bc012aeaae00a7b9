"""The ffmpeg program as the maker of test files and as an independent reader, the referee of what longvid reads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

__all__ = ["ffmpeg", "generated", "pictures"]


def ffmpeg(*arguments: object, input_: bytes | None = None, folder: Path | None = None) -> bytes:
    """Run it in ``folder``; returns what it writes to standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=input_ or b"", capture_output=True, cwd=folder, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def generated(seconds: float, *, name: str = "testsrc", size: str = "96x64", rate: int = 25) -> list[str]:
    """The arguments for a generated picture with a counter."""
    return ["-f", "lavfi", "-i", f"{name}=s={size}:r={rate}:d={seconds}"]


def pictures(path: Path, height: int, width: int, *options: str) -> np.ndarray:
    """The frames of a file as ffmpeg shows them, turned upright, RGB (T, height, width, 3); no frame is added."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", *options, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)

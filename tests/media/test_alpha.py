"""Transparent pixels are composited on a colour, as ffmpeg's filter overlay does."""

import warnings

import numpy as np
import pytest
from support.ffmpeg import ffmpeg, pictures
from support.media import collect

from longvid.errors import SourceError
from longvid.media.video_file import VideoFile

KINDS = {
    "qtrle.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "png.mov": ["-c:v", "png", "-pix_fmt", "rgba"],
    "prores.mov": ["-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"],
    "ffv1.mkv": ["-c:v", "ffv1", "-pix_fmt", "yuva420p"],
    "gif.gif": ["-filter_complex", "split[a][b];[a]palettegen=reserve_transparent=1[p];[b][p]paletteuse"],
}
SOURCE = ["-f", "lavfi", "-i", "testsrc=s=96x64:r=10:d=0.4,format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='X*2'"]


def made(folder, name):
    path = folder / name
    ffmpeg(*SOURCE, *KINDS[name], path)
    return path


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("background", ["black", "#20c040"])
def test_transparent_pixels_are_composited(tmp_path, name, background):
    path = made(tmp_path, name)
    with pytest.warns(UserWarning, match=f"composited on {background}") as said:
        frames, _ = collect(VideoFile(path, background=background))
    assert len(said) == 1
    color = background.replace("#", "0x")
    over = f"color={color}:s=96x64,format=gbrp[c];[0:v]format=gbrap[v];[c][v]overlay=format=gbrp:shortest=1,format=gbrp"
    want = pictures(path, 64, 96, "-filter_complex", over)[: len(frames)]
    limit = 3 if name == "ffv1.mkv" else 1.5  # colour at half the size, and taken from between the pixels
    assert np.abs(frames[: len(want)].astype(int) - want).mean() < limit
    assert len(frames) == 4


def test_an_opaque_file_gives_no_warning(tmp_path):
    path = tmp_path / "opaque.mov"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:r=10:d=0.4", "-c:v", "qtrle", "-pix_fmt", "argb", path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, _ = collect(VideoFile(path))
    assert np.array_equal(frames, pictures(path, 64, 96))


def test_the_background_is_in_the_fingerprint_and_must_be_a_colour(tmp_path):
    path = made(tmp_path, "qtrle.mov")
    prints = []
    for name in ("black", "White"):
        with VideoFile(path, background=name) as video:
            prints.append(video.fingerprint())
    assert prints[0] != prints[1]
    for wrong in ("nonsense", "#12345", "random", "red@0.5", "c=red:s=8x8", ""):
        with pytest.raises(SourceError, match="background"):
            VideoFile(path, background=wrong)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.webm", ["-c:v", "libvpx-vp9", "-threads", 1]),
        ("a.mp4", ["-c:v", "libx265", "-x265-params", "log-level=none"]),
    ],
)
def test_transparency_that_the_decoder_leaves_out_is_said(tmp_path, name, codec):
    path = tmp_path / name
    ffmpeg(*SOURCE, *codec, "-pix_fmt", "yuva420p", path)
    with pytest.warns(UserWarning, match="does not read"):
        frames, _ = collect(VideoFile(path))
    assert len(frames) == 4

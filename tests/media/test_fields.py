"""Interlaced files beside the filter bwdif of the ffmpeg program."""

import numpy as np
import pytest
from support.ffmpeg import ffmpeg, generated, pictures
from support.media import collect

from longvid.media.video_file import VideoFile

BWDIF = "bwdif=mode=send_frame,scale=flags=bicubic+accurate_rnd+full_chroma_int"
KINDS = {
    "x264.mp4": ["-pix_fmt", "yuv444p", "-c:v", "libx264", "-qp", "8", "-g", "10", "-flags", "+ildct+ilme"],
    "ffv1.mkv": ["-pix_fmt", "yuv444p", "-c:v", "ffv1", "-g", "1"],
    "prores.mov": ["-pix_fmt", "yuv422p10le", "-c:v", "prores_ks", "-flags", "+ildct"],
}


def made(folder, name, scan="tff", seconds=1.0):
    path = folder / name
    params = ["-x264-params", f"{scan}=1"] if name.startswith("x264") else []
    source = generated(seconds, name="testsrc2", rate=50)
    ffmpeg(*source, "-vf", f"interlace=scan={scan}:lowpass=0", *KINDS[name], *params, path)
    return path


@pytest.mark.parametrize("scan", ["tff", "bff"])
@pytest.mark.parametrize("name", KINDS)
def test_interlaced_frames_are_made_whole(tmp_path, name, scan):
    path = made(tmp_path, name, scan)
    with pytest.warns(UserWarning, match="is interlaced: frames are made whole") as said:
        frames, pts = collect(VideoFile(path))
    assert len(said) == 1
    want = pictures(path, 64, 96, "-vf", BWDIF)
    assert len(frames) == len(want) == len(set(pts.tolist())) == 25
    # versions of FFmpeg differ in the first frame, which has no frame before it
    assert np.abs(frames[1:].astype(int) - want[1:]).mean() < 1
    assert np.abs(frames[:1].astype(int) - want[:1]).mean() < 5


@pytest.mark.filterwarnings("ignore:.*is interlaced")
@pytest.mark.parametrize("name", ["x264.mp4", "ffv1.mkv"])
def test_from_any_frame_on_it_is_the_slice_of_a_full_read(tmp_path, name):
    path = made(tmp_path, name, seconds=3)
    full, _ = collect(VideoFile(path))
    for first in (0, 1, 9, 10, 35, 47, 60):
        frames, _ = collect(VideoFile(path, start=first, frames=3))
        assert np.array_equal(frames, full[first : first + 3])
        with VideoFile(path) as video:
            rest = np.concatenate([block.frames_THWC for block in video.blocks(first=first)])
        assert np.array_equal(rest, full[first:])


def test_fields_are_left_when_asked(tmp_path):
    path = made(tmp_path, "ffv1.mkv")
    with pytest.warns(UserWarning, match="--deinterlace auto"):
        video = VideoFile(path, deinterlace="off")
        frames, _ = collect(video)
    assert video.info.details["deinterlace"] == "off"
    assert np.abs(frames.astype(int) - pictures(path, 64, 96)).mean() < 1


@pytest.mark.filterwarnings("ignore:.*(is interlaced|has no time stamps)")
def test_frames_in_between_that_are_whole_stay(tmp_path):
    """Two recordings in a row: whole frames, then interlaced ones."""
    plain, woven, path = tmp_path / "plain.h264", tmp_path / "woven.h264", tmp_path / "both.ts"
    x264 = ["-pix_fmt", "yuv444p", "-c:v", "libx264", "-qp", "8", "-bf", "0"]
    ffmpeg(*generated(0.4), *x264, plain)
    source = generated(0.4, name="testsrc2", rate=50)
    ffmpeg(*source, "-vf", "interlace=lowpass=0", *x264, "-flags", "+ildct+ilme", "-x264-params", "tff=1", woven)
    joined = tmp_path / "joined.h264"
    joined.write_bytes(plain.read_bytes() + woven.read_bytes())
    ffmpeg("-i", joined, "-c", "copy", path)
    full, _ = collect(VideoFile(path))
    whole, _ = collect(VideoFile(plain))
    assert len(full) == 20
    assert np.array_equal(full[:10], whole)
    fields, _ = collect(VideoFile(woven, deinterlace="off"))
    assert all(np.abs(a.astype(int) - b).mean() > 0.5 for a, b in zip(full[10:], fields, strict=True))
    for first in (9, 10, 11, 15, 19):
        frames, _ = collect(VideoFile(path, start=first))
        assert np.array_equal(frames, full[first:])


@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
def test_fields_that_only_the_header_declares_are_said(tmp_path, name):
    codec = ["-c:v", "utvideo", "-pix_fmt", "yuv422p"] if name == "a.mkv" else ["-c:v", "png", "-pix_fmt", "rgb24"]
    ffmpeg(*generated(0.4, name="testsrc2", rate=50), "-vf", "interlace=lowpass=0", *codec, tmp_path / name)
    with pytest.warns(UserWarning, match="interlaced by its header, but its decoder"):
        frames, _ = collect(VideoFile(tmp_path / name))
    assert len(frames) == 10

"""Decoding a store to files with sound, in other codecs and to pictures, through the command line."""

from __future__ import annotations

import av
import pytest
from support.ffmpeg import ffmpeg, generated

from longvid.cli.commands import main

MODEL = ["--size", "48x32", "--quiet"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tone = ["-f", "lavfi", "-i", "sine=r=48000:d=1"]
    ffmpeg(*generated(1), *tone, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", "in.mp4", folder=tmp_path)
    assert main(["encode", "in.mp4", "a.zarr", *MODEL]) == 0
    return tmp_path


def streams(path):
    with av.open(str(path)) as container:
        return [stream.codec_context.codec.canonical_name for stream in container.streams]


def test_the_sound_of_the_source_goes_along(made, capsys):
    assert main(["info", "a.zarr"]) == 0
    assert "with sound (aac, 48000 Hz, 1 channel)" in capsys.readouterr().out
    assert main(["decode", "a.zarr", "b.mp4", "--quiet"]) == 0
    assert streams("b.mp4") == ["h264", "aac"]
    assert main(["decode", "a.zarr", "b.webm", "--start", "5", "--frames", "10", "--quiet"]) == 0
    assert streams("b.webm") == ["vp9", "opus"]
    assert main(["decode", "a.zarr", "c.mp4", "--audio", "none", "--quiet"]) == 0
    assert streams("c.mp4") == ["h264"]
    assert capsys.readouterr().err == ""
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "own.wav", folder=made)
    assert main(["decode", "a.zarr", "d.mkv", "--audio", "own.wav", "--codec", "ffv1", "--quiet"]) == 0
    assert streams("d.mkv") == ["ffv1", "aac"]  # packets of a wav file are longer than a picture
    assert main(["decode", "a.zarr", "e.mp4", "--audio", "none.wav", "--quiet"]) == 3
    assert not (made / "e.mp4").exists()


@pytest.mark.filterwarnings("default")
def test_sound_that_is_left_out_is_said(made, capsys):
    data = bytearray((made / "in.mp4").read_bytes())
    data[-1] ^= 1
    (made / "in.mp4").write_bytes(data)
    assert main(["decode", "a.zarr", "b.mp4", "--quiet"]) == 0
    assert "sound of the source is left out: in.mp4 is not the file any more" in capsys.readouterr().err
    (made / "in.mp4").unlink()
    assert main(["decode", "a.zarr", "c.mp4", "--quiet"]) == 0
    assert capsys.readouterr().err.count("in.mp4 is not there any more; name a file with --audio") == 1
    assert streams("b.mp4") == streams("c.mp4") == ["h264"]


def test_frames_come_out_as_pictures(made, capsys):
    assert main(["decode", "a.zarr", "out/", "--start", "3", "--frames", "4", "--quiet"]) == 0
    assert sorted(p.name for p in (made / "out").iterdir()) == [f"frame-{n:06d}.png" for n in range(3, 7)]
    assert main(["decode", "a.zarr", "f-%02d.jpg", "--frames", "2", "--quiet"]) == 0
    assert (made / "f-01.jpg").exists()
    assert main(["decode", "a.zarr", "p-%d.png", "--codec", "h264", "--quiet"]) == 2
    assert main(["decode", "a.zarr", "x.mp4", "--codec", "ffv1", "--quiet"]) == 4
    assert "use .mkv" in capsys.readouterr().err

"""Codecs, pixel formats and containers of video files, and their limits; ffmpeg reads what was written."""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import nullcontext
from fractions import Fraction

import av
import numpy as np
import pytest
from support.ffmpeg import pictures
from support.media import barcodes, collect, indices, smooth_colors

from longvid.errors import StoreError
from longvid.media.output import formats
from longvid.media.output.formats import Encoding, check_times
from longvid.media.output.video_writer import VideoWriter
from longvid.media.video_file import VideoFile

WRITTEN = [
    (".mp4", "h264", "h264"), (".mov", "h264", "h264"), (".mkv", "h264", "h264"), (".mp4", "h265", "hevc"),
    (".mov", "h265", "hevc"), (".mkv", "h265", "hevc"), (".mp4", "av1", "av1"), (".mkv", "av1", "av1"),
    (".webm", "av1", "av1"), (".mkv", "ffv1", "ffv1"), (".mov", "prores", "prores"), (".mkv", "prores", "prores"),
    (".mkv", "vp9", "vp9"), (".webm", None, "vp9"),
]  # fmt: skip


EXACT = "accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
"else ffmpeg itself is off by 2 where it converts to RGB"


def write(path, frames, stamps=None, *, time_base=Fraction(1, 24), encoding=None, **options):
    stamps = np.arange(len(frames)) if stamps is None else np.array(stamps)
    size = frames.shape[1:3]
    with VideoWriter(
        path, size=size, time_base=time_base, frame_rate=Fraction(24), encoding=encoding, **options
    ) as out:
        out.write(frames, stamps)
    return path


def read(path):
    with VideoFile(path) as video:
        frames, pts = collect(video)
        return frames, [float(stamp * video.info.time_base) for stamp in pts], video.info


@pytest.mark.parametrize(("suffix", "codec", "name"), WRITTEN)
def test_every_codec_is_read_back(tmp_path, suffix, codec, name):
    stamps = [0, 1, 2, 3, 7, 8, 11, 12]
    path = write(tmp_path / f"out{suffix}", barcodes(8, 64, 96), stamps, encoding=Encoding(codec=codec))
    frames, seconds, info = read(path)
    assert indices(frames) == indices(pictures(path, 64, 96)) == list(range(8))
    assert seconds == pytest.approx([stamp / 24 for stamp in stamps], abs=1e-3)
    assert info.details["codec"] in (name, "libdav1d" if name == "av1" else name)


@pytest.mark.parametrize("height", [96, 720])
@pytest.mark.parametrize(("suffix", "codec"), [(suffix, codec) for suffix, codec, _ in WRITTEN if suffix != ".mov"])
def test_colour_comes_back(tmp_path, suffix, codec, height):
    image = smooth_colors(height, 128)
    crf = None if codec in ("ffv1", "prores") else 4
    path = write(tmp_path / f"out{suffix}", image[None], encoding=Encoding(codec=codec, crf=crf))
    for found in (read(path)[0][0], pictures(path, height, 128, "-sws_flags", EXACT)[0]):
        assert np.abs(found.astype(int) - image).mean() < 1.5


def test_ffv1_is_lossless(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), dtype=np.uint8)
    path = write(tmp_path / "out.mkv", frames, encoding=Encoding(codec="ffv1"))
    assert np.array_equal(read(path)[0], frames)
    assert np.array_equal(pictures(path, 33, 47), frames)


@pytest.mark.parametrize("codec", ["av1", "vp9", "ffv1", "prores", "h265"])
def test_odd_sizes_come_back_from_every_codec(tmp_path, codec):
    said = pytest.warns(UserWarning, match="97x63 is odd") if codec == "h265" else nullcontext()
    with said:
        path = write(tmp_path / "out.mkv", barcodes(3, 63, 97), encoding=Encoding(codec=codec))
    assert indices(pictures(path, 63, 97)) == indices(read(path)[0]) == [0, 1, 2]


@pytest.mark.parametrize(("pix_fmt", "size"), [("yuv420p", (64, 98)), ("yuv420p10", (64, 98)), ("yuv422p", (63, 98))])
def test_an_odd_size_is_padded_if_asked_for(tmp_path, pix_fmt, size):
    frames = np.repeat(smooth_colors(63, 97)[None], 2, axis=0)
    with pytest.warns(UserWarning, match=f"frames of 98x{size[0]}.*are repeated") as said:
        path = write(tmp_path / "out.mp4", frames, encoding=Encoding(pix_fmt=pix_fmt, crf=4))
    assert len(said) == 1
    found = pictures(path, *size, "-sws_flags", EXACT)
    assert np.abs(found[0, :63, :97].astype(int) - frames[0]).mean() < 1.5
    assert np.abs(found[0, :63, 97].astype(int) - frames[0, :, 96]).mean() < 8
    assert read(path)[0].shape == found.shape


def test_apples_players_know_h265_by_its_tag(tmp_path):
    path = write(tmp_path / "out.mp4", barcodes(2), encoding=Encoding(codec="h265"))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.codec_tag == "hvc1"


def test_quality_decides_the_size_of_the_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    for codec in ("h264", "h265", "av1", "vp9"):
        sizes = [
            write(tmp_path / f"{crf}.mkv", frames, overwrite=True, encoding=Encoding(codec=codec, crf=crf))
            .stat()
            .st_size
            for crf in (5, 50)
        ]
        assert sizes[0] > 2 * sizes[1], codec


REFUSED = [
    ("out.mp4", {"codec": "ffv1"}, (64, 96), "use .mkv for it"),
    ("out.mp4", {"codec": "prores"}, (64, 96), "use .mov or .mkv"),
    ("out.mov", {"codec": "av1"}, (64, 96), "use .mp4 or .mkv or .webm"),
    ("out.webm", {"codec": "h264"}, (64, 96), "one of vp9, av1"),
    ("out.avi", {}, (64, 96), "use .mp4, .mov, .mkv, .webm, .zarr, or numbered pictures such as out-%05d.png"),
    ("out.mp4", {"codec": "divx"}, (64, 96), "choose h264, h265, av1"),
    ("out.mp4", {"pix_fmt": "rgb24"}, (64, 96), "choose --pix-fmt yuv420p"),
    ("out.mp4", {"codec": "av1", "pix_fmt": "yuv444p"}, (64, 96), "yuv420p, yuv420p10"),
    ("out.mp4", {"crf": 52}, (64, 96), "0 .best. to 51"),
    ("out.mp4", {"crf": "low"}, (64, 96), "0 .best. to 51"),
    ("out.mkv", {"codec": "ffv1", "crf": 3}, (64, 96), "has no --crf"),
    ("out.mp4", {"codec": "h265"}, (8, 96), "from 16x16 .*--codec h264 or av1"),
    ("out.mp4", {}, (16, 16386), "to 16384x16384 .*choose --codec h265 or ffv1"),
    ("out.mkv", {"codec": "ffv1"}, (70000, 1), "decode to .zarr"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "encoding", "size", "words"), REFUSED)
def test_limits_are_told_before_the_run(tmp_path, name, encoding, size, words):
    with pytest.raises(StoreError, match=words) as caught:
        VideoWriter(
            tmp_path / name, size=size, time_base=Fraction(1, 24), frame_rate=None, encoding=Encoding(**encoding)
        )
    assert caught.value.kind == "format"
    assert "disk" not in str(caught.value)


def test_an_encoder_that_this_build_lacks_is_named(tmp_path, monkeypatch):
    lacking = {**formats._CODECS, "h265": formats._Codec(encoder="libnone", pix_fmts=("yuv420p",))}
    monkeypatch.setattr(formats, "_CODECS", lacking)
    with pytest.raises(StoreError, match="lacks libnone, the encoder of h265"):
        write(tmp_path / "out.mp4", barcodes(1), encoding=Encoding(codec="h265"))


def test_what_an_encoder_refuses_is_told_on_opening_and_not_of_the_disk(tmp_path):
    output = VideoWriter(
        tmp_path / "out.mp4", size=(16, 8192), time_base=Fraction(1, 24), frame_rate=None,
        encoding=Encoding(codec="h265"),
    )  # fmt: skip
    with pytest.raises(StoreError, match="libx265 does not take 8192x16") as caught:
        output.__enter__()
    assert caught.value.kind == "format"
    assert "disk" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
@pytest.mark.parametrize("rate", [Fraction(1, 100), Fraction(100000)])
def test_strange_rates_and_time_bases_are_written(tmp_path, codec, rate):
    path = tmp_path / "out.mkv"
    with VideoWriter(
        path, size=(64, 96), time_base=Fraction(1), frame_rate=rate, encoding=Encoding(codec=codec)
    ) as out:
        out.write(barcodes(3, 64, 96), np.array([0, 1, 60]))
    assert read(path)[1] == [0, 1, 60]


def test_frames_closer_than_a_millisecond_need_mp4(tmp_path):
    pts = np.arange(4) * 5
    check_times(tmp_path / "a.mp4", pts, Fraction(1, 10000))
    check_times(tmp_path / "a.mkv", pts * 2, Fraction(1, 10000))
    with pytest.raises(StoreError, match=r"0.5 ms apart.*choose .mp4 or .mov") as caught:
        check_times(tmp_path / "a.mkv", pts, Fraction(1, 10000))
    assert caught.value.kind == "format"


FULL = """
import resource, sys, signal
import numpy as np
from fractions import Fraction
from longvid.media.output.formats import Encoding
from longvid.media.output.video_writer import VideoWriter
from longvid.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
frames = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
try:
    with VideoWriter(sys.argv[1], size=(64, 96), time_base=Fraction(1, 24), frame_rate=None,
                     encoding=Encoding(codec=sys.argv[2])) as out:
        for number in range(60):
            out.write(frames[number:number + 1], np.array([number]))
except StoreError as exc:
    print(exc.kind, exc)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on the size of a file")
@pytest.mark.parametrize(("name", "codec"), [("out.mp4", "h264"), ("out.mkv", "ffv1")])
def test_a_disk_that_takes_no_more_is_told_as_such(tmp_path, name, codec):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / name), codec], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("full ")
    assert "is the disk full?" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "codec"), [(suffix, codec) for suffix, codec, _ in WRITTEN])
def test_the_shape_of_pixels_is_kept_or_its_loss_is_said(tmp_path, suffix, codec):
    lost = suffix in (".mkv", ".webm") and codec not in ("h264", "h265")
    with pytest.warns(UserWarning, match="will look narrower") if lost else nullcontext():
        path = write(
            tmp_path / f"out{suffix}",
            barcodes(2, 64, 96),
            encoding=Encoding(codec=codec),
            sample_aspect_ratio=Fraction(64, 45),
        )
    if not lost:
        with av.open(str(path)) as container:
            assert float(container.streams.video[0].sample_aspect_ratio) == pytest.approx(64 / 45, rel=0.005)

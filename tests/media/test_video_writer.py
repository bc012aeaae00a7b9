from __future__ import annotations

import os
from contextlib import nullcontext
from fractions import Fraction

import av
import numpy as np
import pytest
from support.media import barcodes, collect, indices, smooth_colors

from longvid.errors import StoreError
from longvid.frames import ColorInfo
from longvid.media.output.formats import Encoding
from longvid.media.output.video_writer import VideoWriter
from longvid.media.video_file import VideoFile

RATE = Fraction(24)


def writer(path, *, height=48, width=96, time_base=1 / RATE, frame_rate=RATE, **options):
    return VideoWriter(path, size=(height, width), time_base=time_base, frame_rate=frame_rate, **options)


def write(path, count, **options):
    with writer(path, **options) as output:
        output.write(barcodes(count), np.arange(count))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".MP4"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    with writer(path) as output:
        for begin in range(0, 24, 10):
            output.write(barcodes()[begin : begin + 10], np.arange(24)[begin : begin + 10])
        assert not path.exists()
    video = VideoFile(path)
    frames, pts = collect(video)
    assert indices(frames) == list(range(24))
    assert video.info.frame_rate == 24
    seconds = [float(stamp * video.info.time_base) for stamp in pts]
    assert seconds == pytest.approx([i / 24 for i in range(24)], abs=1e-3)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_kept_and_starts_at_zero(tmp_path, suffix):
    stamps = np.array([500, 510, 511, 550, 551, 552, 800, 801, 900, 1500])
    with writer(tmp_path / f"out{suffix}", time_base=Fraction(1, 1000), frame_rate=None) as output:
        output.write(barcodes(10)[:4], stamps[:4])
        output.write(barcodes(10)[4:], stamps[4:])
    video = VideoFile(tmp_path / f"out{suffix}")
    frames, pts = collect(video)
    assert indices(frames) == list(range(10))
    assert [stamp * video.info.time_base * 1000 for stamp in pts] == (stamps - 500).tolist()


@pytest.mark.parametrize(("height", "width"), [(47, 95), (48, 95), (47, 96), (48, 96)])
def test_the_size_comes_back_exactly(tmp_path, height, width):
    is_odd = height % 2 or width % 2
    said = pytest.warns(UserWarning, match="browsers, phones and QuickTime do not") if is_odd else nullcontext()
    with said, writer(tmp_path / "out.mp4", height=height, width=width) as output:
        output.write(barcodes(4, height, width), np.arange(4))
    video = VideoFile(tmp_path / "out.mp4")
    frames, _ = collect(video)
    assert frames.shape == (4, height, width, 3)
    assert indices(frames) == [0, 1, 2, 3]
    assert video.info.details["pix_fmt"] == ("yuv444p" if is_odd else "yuv420p")


@pytest.mark.parametrize(
    ("color", "height", "matrix"),
    [
        (None, 96, "bt601"),
        (None, 720, "bt709"),
        (ColorInfo(matrix="bt709", range="full"), 96, "bt709"),
        (ColorInfo(matrix="bt601", range="limited"), 720, "bt601"),
        (ColorInfo(matrix="rgb", range="full"), 96, "bt601"),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_colour_is_converted_and_tagged(tmp_path, color, height, matrix, suffix):
    image = smooth_colors(height, 128)
    path = tmp_path / f"out{suffix}"
    with writer(path, height=height, width=128, color=color, encoding=Encoding(crf=4)) as output:
        output.write(image[None], np.arange(1))
    video = VideoFile(path)
    frames, _ = collect(video)
    assert np.abs(frames[0].astype(int) - image).mean() < 1.5
    read = video.info.color
    assert (read.matrix, read.range, read.assumed) == (matrix, "limited", False)
    assert read.primaries == read.transfer == ("bt709" if matrix == "bt709" else "smpte170m")


def test_primaries_and_transfer_are_passed_on(tmp_path):
    color = ColorInfo(matrix="bt601", range="limited", primaries="bt470bg", transfer="gamma28")
    with writer(tmp_path / "out.mp4", color=color) as output:
        output.write(barcodes(2), np.arange(2))
    with VideoFile(tmp_path / "out.mp4") as video:
        assert video.info.color == color


def test_the_index_comes_first(tmp_path):
    with writer(tmp_path / "out.mp4") as output:
        output.write(barcodes(4), np.arange(4))
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), writer(tmp_path / "out.mp4") as output:
        output.write(barcodes(4), np.arange(4))
        raise KeyError
    assert names(tmp_path) == []


def test_an_exception_leaves_the_file_that_was_to_be_overwritten(tmp_path):
    path = tmp_path / "out.mp4"
    write(path, 2)
    old = path.read_bytes()
    with pytest.raises(KeyError), writer(path, overwrite=True) as output:
        output.write(barcodes(4), np.arange(4))
        raise KeyError
    assert names(tmp_path) == ["out.mp4"]
    assert path.read_bytes() == old


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv"])
def test_overwriting_replaces_a_file(tmp_path, name):
    path = tmp_path / name
    path.touch()
    for count in (2, 4):
        write(path, count, overwrite=True)
        assert len(collect(VideoFile(path))[0]) == count
    assert names(tmp_path) == [name]


def test_what_is_not_a_file_is_never_overwritten(tmp_path):
    path = tmp_path / "out.mp4"
    os.mkfifo(path)
    refused("foreign", path, overwrite=True)
    path.unlink()
    path.symlink_to("nowhere")
    refused("foreign", path, overwrite=True)


def test_a_file_that_appears_while_a_video_is_written_stays(tmp_path):
    path = tmp_path / "out.mp4"
    with pytest.raises(StoreError, match="--overwrite"), writer(path) as output:
        output.write(barcodes(4), np.arange(4))
        path.write_bytes(b"a film of mine")
    assert path.read_bytes() == b"a film of mine"
    assert names(tmp_path) == ["out.mp4"]


def refused(kind, path, **options):
    with pytest.raises(StoreError) as caught:
        writer(path, **options)
    assert caught.value.kind == kind
    assert path.name in str(caught.value)


def test_bad_targets_are_refused_before_anything_is_opened(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"old")
    (tmp_path / "folder.mp4").mkdir()
    before = names(tmp_path)
    refused("exists", tmp_path / "out.mp4")
    refused("foreign", tmp_path / "folder.mp4", overwrite=True)
    refused("missing", tmp_path / "none" / "out.mp4")
    refused("format", tmp_path / "out.wmv")
    refused("format", tmp_path / "out")
    assert names(tmp_path) == before


@pytest.mark.parametrize("options", [{"height": 0}, {"time_base": Fraction(1, 2**40)}, {"time_base": Fraction(0)}])
def test_what_no_video_can_be_is_refused(tmp_path, options):
    with pytest.raises(StoreError) as caught:
        writer(tmp_path / "out.mp4", **options)
    assert caught.value.kind == "format"


def test_making_a_writer_opens_nothing(tmp_path):
    output = writer(tmp_path / "out.mp4")
    assert names(tmp_path) == []
    with pytest.raises(StoreError, match="with block"):
        output.write(barcodes(1), np.arange(1))


@pytest.mark.parametrize(
    ("frames", "stamps", "kind"),
    [
        (barcodes(2), [1, 1], "range"),
        (barcodes(2), [2, 1], "range"),
        (barcodes(2), [-1, 0], "range"),
        (barcodes(2), [1, 2, 3], "format"),
        (barcodes(2).astype(np.float32), [1, 2], "format"),
        (barcodes(2, 50, 96), [1, 2], "format"),
        (barcodes(1)[0], [1], "format"),
    ],
)
def test_wrong_frames_and_time_stamps_are_refused(tmp_path, frames, stamps, kind):
    with pytest.raises(StoreError) as caught, writer(tmp_path / "out.mp4") as output:
        output.write(barcodes(1), np.array([0]))
        output.write(frames, np.array(stamps))
    assert caught.value.kind == kind
    assert names(tmp_path) == []


def test_a_video_without_frames_is_not_kept(tmp_path):
    with pytest.raises(StoreError, match="no frames"), writer(tmp_path / "out.mp4"):
        pass
    assert names(tmp_path) == []


def test_a_writer_that_is_open_is_not_opened_again(tmp_path):
    with writer(tmp_path / "out.mp4") as output:
        output.write(barcodes(1), np.arange(1))
        with pytest.raises(StoreError, match="already"):
            output.__enter__()
    assert names(tmp_path) == ["out.mp4"]


def test_an_error_of_the_muxer_is_a_store_error(tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="No space left") as caught, writer(tmp_path / "out.mp4") as output:
        output.write(barcodes(1), np.arange(1))

        def full(*_):
            raise av.FFmpegError(28, "No space left on device")

        monkeypatch.setattr(output, "_convert", full)
        output.write(barcodes(1), np.arange(1, 2))
    assert isinstance(caught.value.__cause__, av.FFmpegError)
    assert names(tmp_path) == []

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from fractions import Fraction
from itertools import combinations

import av
import numpy as np
import pytest
from support.media import (
    COUNT,
    HEIGHT,
    WIDTH,
    barcodes,
    collect,
    cut,
    indices,
    join,
    smooth_colors,
    write_audio,
    write_media,
)

from longvid.errors import SourceError
from longvid.media.video_file import VideoFile

pytestmark = pytest.mark.filterwarnings("ignore:.* has no time stamps")

FASTSTART = "+faststart"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("reader") / "clip.mp4", movflags=FASTSTART)


@pytest.fixture(scope="module")
def matroska(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("reader") / "clip.mkv")


def refused(path, kind, **options):
    with pytest.raises(SourceError) as caught, VideoFile(path, **options) as video:
        list(video.blocks())
    assert caught.value.kind == kind, caught.value
    assert os.fspath(path) in str(caught.value)
    return caught.value


def test_frames_come_in_order_with_their_time_stamps(clip):
    video = VideoFile(clip)
    frames, pts = collect(video)
    assert indices(frames) == list(range(COUNT))
    assert frames.dtype == np.uint8
    assert frames.shape == (COUNT, HEIGHT, WIDTH, 3)
    assert pts.dtype == np.int64
    assert [stamp * video.info.time_base for stamp in pts] == [Fraction(i, 24) for i in range(COUNT)]


def test_info_is_known_before_the_first_frame_and_is_ready_for_json(clip):
    with VideoFile(clip) as video:
        info = video.info
    assert (info.kind, info.name, info.height, info.width) == ("video", str(clip), HEIGHT, WIDTH)
    assert (info.num_frames, info.frame_rate, info.timing_assumed) == (COUNT, 24, False)
    details = json.loads(json.dumps(info.details))
    assert details["codec"] == "h264"
    assert details["pix_fmt"] == "yuv420p"
    assert details["bytes"] == clip.stat().st_size
    assert details["frames_in_header"] == COUNT


@pytest.mark.parametrize(("start", "frames"), [(0, 1), (0, 5), (1, None), (7, 9), (23, None), (20, 100), (0, 100)])
def test_start_and_frames_are_exact(clip, start, frames):
    video = VideoFile(clip, start=start, frames=frames)
    expected = list(range(COUNT))[start : None if frames is None else start + frames]
    images, pts = collect(video)
    assert indices(images) == expected
    assert video.info.num_frames == len(expected)
    assert [stamp * video.info.time_base for stamp in pts] == [Fraction(i, 24) for i in expected]


@pytest.mark.parametrize("suffix", ["mkv", "ts", "avi", "mov", "h264"])
@pytest.mark.parametrize("start", [0, 11])
def test_every_container_gives_the_same_frames(tmp_path, suffix, start):
    path = write_media(tmp_path / f"clip.{suffix}", codec="mpeg4" if suffix == "avi" else "libx264")
    frames, pts = collect(VideoFile(path, start=start))
    assert indices(frames) == list(range(start, COUNT))
    assert (np.diff(pts) > 0).all()


def test_b_frames_come_in_order_of_display(tmp_path):
    options = {"preset": "medium", "x264-params": "bframes=3:b-adapt=0:keyint=12"}
    path = write_media(tmp_path / "b.mp4", options=options)
    for start in (0, 5, 13):
        frames, pts = collect(VideoFile(path, start=start))
        assert indices(frames) == list(range(start, COUNT))
        assert (np.diff(pts) > 0).all()


def test_variable_frame_rate_keeps_its_time_stamps(tmp_path):
    stamps = [0, 10, 11, 50, 51, 52, 300, 301, 400, 1000]
    path = write_media(tmp_path / "vfr.mp4", barcodes(10), pts=stamps, time_base=Fraction(1, 1000))
    video = VideoFile(path)
    frames, pts = collect(video)
    assert indices(frames) == list(range(10))
    assert [stamp * video.info.time_base * 1000 for stamp in pts] == stamps


def test_a_stream_without_time_stamps_counts_on_at_its_frame_rate(tmp_path):
    video = VideoFile(write_media(tmp_path / "raw.h264"), start=3)
    assert video.info.timing_assumed
    assert video.info.num_frames is None
    frames, pts = collect(video)
    assert indices(frames) == list(range(3, COUNT))
    expected = [round(i / video.info.frame_rate / video.info.time_base) for i in range(3, COUNT)]
    assert pts.tolist() == expected


# What cannot be read


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(tmp_path / "none.mp4", "missing")
    refused(tmp_path, "not-video")


@pytest.mark.parametrize("name", ["text.txt", "text.mp4", "text.mkv"])
def test_a_text_file_is_no_video(tmp_path, name):
    path = tmp_path / name
    path.write_text("These are words.\n" * 300)
    refused(path, "not-video")


def test_an_empty_file_is_no_video(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "empty" in str(refused(path, "not-video"))


def test_a_playlist_is_refused_and_opens_nothing_else(clip):
    hls = clip.with_name("list.m3u8")
    hls.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{clip.name}\n#EXT-X-ENDLIST\n")
    refused(hls, "refused")
    concat = clip.with_name("list.mp4")
    concat.write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    refused(concat, "refused")


def test_a_name_that_looks_like_a_protocol_is_a_plain_file(clip, monkeypatch):
    monkeypatch.chdir(clip.parent)
    write_media(clip.with_name("other.mp4"), barcodes(3))
    os.replace("other.mp4", "concat:clip.mp4")
    frames, _ = collect(VideoFile("concat:clip.mp4"))
    assert len(frames) == 3


def test_audio_alone_has_no_video_stream(tmp_path):
    assert "audio" in str(refused(write_audio(tmp_path / "sound.mp4"), "no-video-stream"))


def test_a_picture_attached_to_a_song_is_no_video(tmp_path):
    def attach(stream):
        stream.disposition = av.stream.Disposition.attached_pic

    path = tmp_path / "cover.mp4"
    write_media(path, barcodes(1), codec="mjpeg", pix_fmt="yuvj420p", full_range=True, setup=attach)
    refused(path, "no-video-stream")


def test_a_video_stream_without_frames_is_refused(tmp_path):
    path = write_media(
        tmp_path / "zero.mp4", barcodes(2)[:0].reshape(0, 48, 96, 3), movflags="frag_keyframe+empty_moov"
    )
    refused(path, "no-frames")


def test_a_faststart_file_that_is_cut_is_refused_before_a_frame_is_read(clip):
    with pytest.raises(SourceError) as caught:
        VideoFile(cut(clip, 0.7, "cut.mp4"))
    assert caught.value.kind == "truncated"


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_an_mp4_without_its_index_is_refused(tmp_path, share):
    refused(cut(write_media(tmp_path / "a.mp4"), share, "cut.mp4"), "truncated")


def test_a_fragmented_mp4_that_is_cut_is_refused(tmp_path):
    path = write_media(tmp_path / "a.mp4", movflags="frag_keyframe+empty_moov", options={"g": "6"})
    frames, _ = collect(VideoFile(path))
    assert indices(frames) == list(range(COUNT))
    refused(cut(path, 0.7, "cut.mp4"), "truncated")


@pytest.mark.parametrize("share", [0.05, 0.7, 0.99])
def test_a_cut_matroska_file_is_refused(matroska, share):
    refused(cut(matroska, share, "cut.mkv"), "truncated")


def test_a_live_matroska_file_without_declared_size_is_read(tmp_path):
    path = write_media(tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("18538067")) + 4
    assert data[at] == 0x01  # eight bytes of size
    data[at : at + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(data)
    assert indices(collect(VideoFile(path))[0]) == list(range(COUNT))


def test_what_decodes_before_damage_comes_out_first(tmp_path):
    path = write_media(tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p", full_range=True)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[12:]:
        data[position + 8 : position + 8 + size] = bytes(size)  # behind the header of the AVI chunk
    path.write_bytes(data)
    with VideoFile(path) as video:
        blocks = []
        with pytest.raises(SourceError) as caught:
            for block in video.blocks():
                blocks.append(block)  # noqa: PERF402 - what came before the error counts
    assert caught.value.kind == "damaged"
    reached = sum(len(block.pts_T) for block in blocks)
    assert f"frame {reached}" in str(caught.value)
    assert indices(np.concatenate([block.frames_THWC for block in blocks])) == list(range(reached))


@pytest.mark.parametrize("name", ["clip", "matroska"])
def test_start_beyond_the_end_says_how_many_frames_there_are(request, name):
    error = refused(request.getfixturevalue(name), "range", start=COUNT)
    assert f"{COUNT} frames" in str(error)


@pytest.mark.parametrize("options", [{"start": -1}, {"frames": 0}, {"size": (0, 8)}])
def test_impossible_windows_are_refused(clip, options):
    with pytest.raises(SourceError) as caught:
        VideoFile(clip, **options)
    assert caught.value.kind == "range"


def test_a_change_of_size_is_refused_where_it_happens(tmp_path):
    small = write_media(tmp_path / "1.h264")
    large = write_media(tmp_path / "2.h264", barcodes(5, 64, 128))
    error = refused(join(tmp_path / "both.h264", small, large), "geometry-changed")
    assert f"frame {COUNT}" in str(error)


def test_a_change_of_pixel_format_is_read_on(tmp_path):
    parts = [write_media(tmp_path / f"{fmt}.h264", barcodes(6), pix_fmt=fmt) for fmt in ("yuv420p", "yuv444p")]
    frames, _ = collect(VideoFile(join(tmp_path / "both.h264", *parts)))
    assert indices(frames) == [*range(6), *range(6)]
    assert np.abs(frames.astype(int) - barcodes(6)[[*range(6), *range(6)]]).mean() < 3


# Geometry


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("size", [None, (40, 24)])
@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p"), ("libx264", "gray"), ("libx264rgb", "rgb24")])
def test_rotation_is_applied(tmp_path, rotation, size, codec, pix_fmt):
    path = write_media(tmp_path / "turned.mp4", barcodes(4), rotation=rotation, codec=codec, pix_fmt=pix_fmt)
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    turns = rotation // 90
    expected = np.stack([np.rot90(frame, turns) for frame in stored])
    video = VideoFile(path, size=size, fit="stretch")  # by default another aspect is cropped
    assert (video.info.height, video.info.width) == (size or expected.shape[1:3])
    assert video.info.details["rotation"] % 360 == rotation
    frames, _ = collect(video)
    assert frames.shape[1:3] == (video.info.height, video.info.width)
    assert indices(np.rot90(frames, -turns, axes=(1, 2))) == [0, 1, 2, 3]
    if size is None:
        assert np.abs(frames.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "bgr0"])
@pytest.mark.parametrize(("height", "width"), [(47, 95), (48, 95), (47, 96)])
def test_odd_sizes_come_out_as_they_are(tmp_path, pix_fmt, height, width):
    codec = "libx264" if pix_fmt == "yuv444p" else "ffv1"
    path = write_media(tmp_path / "odd.mkv", barcodes(4, height, width), pix_fmt=pix_fmt, codec=codec)
    frames, _ = collect(VideoFile(path))
    assert frames.shape == (4, height, width, 3)
    assert indices(frames) == [0, 1, 2, 3]


def test_odd_sizes_in_420_come_out_as_they_are(tmp_path):
    path = write_media(tmp_path / "odd.mkv", barcodes(4, 47, 95), codec="ffv1")
    frames, _ = collect(VideoFile(path, frames=2))
    assert frames.shape == (2, 47, 95, 3)
    assert indices(frames) == [0, 1]


@pytest.mark.parametrize(("size", "name"), [((24, 64), "area"), ((96, 192), "bicubic"), ((48, 96), None)])
def test_resize(clip, size, name):
    video = VideoFile(clip, size=size, fit="stretch")  # by default another aspect is cropped
    frames, _ = collect(video)
    assert frames.shape[1:3] == size == (video.info.height, video.info.width)
    assert video.info.details["interpolation"] == name
    assert indices(frames) == list(range(COUNT))


# Colour


MATRICES = {"bt709": (1, 1), "bt601": (6, 5), "bt2020": (9, 9)}


def color_clip(folder, matrix, *, tagged=True, full=False, height=96, pix_fmt="yuv420p", codec="libx264"):
    tag, coefficients = MATRICES[matrix]
    tags = {"colorspace": tag, "color_range": 2 if full else 1} if tagged else {}
    image = smooth_colors(height, 128)
    options = {"crf": "4"} if codec == "libx264" else {}
    path = folder / f"{matrix}.mkv"
    write_media(
        path, image[None].repeat(2, 0), matrix=coefficients, full_range=full, tags=tags, pix_fmt=pix_fmt,
        codec=codec, options=options,
    )  # fmt: skip
    return path, image


def error_of(path, image):
    video = VideoFile(path)
    frames, _ = collect(video)
    return np.abs(frames[0].astype(int) - image).mean(), video.info.color


@pytest.mark.parametrize("matrix", list(MATRICES))
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_tagged_colour_is_read_by_its_tag(tmp_path, matrix, full, pix_fmt):
    error, color = error_of(*color_clip(tmp_path, matrix, full=full, pix_fmt=pix_fmt))
    assert error < 1.5
    assert (color.matrix, color.range, color.assumed) == (matrix, "full" if full else "limited", False)


@pytest.mark.parametrize(("height", "matrix"), [(718, "bt601"), (720, "bt709")])
def test_untagged_colour_is_read_by_the_rule(tmp_path, height, matrix):
    error, color = error_of(*color_clip(tmp_path, matrix, tagged=False, height=height))
    assert error < 1.5
    assert (color.matrix, color.range, color.assumed) == (matrix, "limited", True)
    other = "bt709" if matrix == "bt601" else "bt601"
    wrong, _ = error_of(*color_clip(tmp_path, other, tagged=False, height=height))
    assert wrong > 4


def test_jpeg_formats_are_full_range(tmp_path):
    path = write_media(tmp_path / "j.mkv", codec="mjpeg", pix_fmt="yuvj420p", full_range=True)
    frames, _ = collect(video := VideoFile(path))
    assert video.info.color.range == "full"
    assert np.abs(frames.astype(int) - barcodes()).mean() < 2


def test_rgb_is_taken_as_it_is(tmp_path):
    image = smooth_colors(64, 96)
    path = write_media(tmp_path / "rgb.mkv", image[None], codec="ffv1", pix_fmt="bgr0")
    frames, _ = collect(video := VideoFile(path))
    assert np.array_equal(frames[0], image)
    assert (video.info.color.matrix, video.info.color.range, video.info.color.assumed) == ("rgb", "full", False)


def test_a_palette_is_read_as_rgb(tmp_path):
    path = write_media(tmp_path / "a.gif", barcodes(5), codec="gif", pix_fmt="rgb8", rate=10)
    frames, _ = collect(video := VideoFile(path))
    assert video.info.color.matrix == "rgb"
    assert indices(frames) == list(range(5))


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le"])
def test_gray_is_read_in_its_range(tmp_path, pix_fmt, limited):
    levels = barcodes()
    stored = (levels.astype(float) * 219 / 255 + 16).round().astype(np.uint8) if limited else levels
    tags = {"color_range": 1} if limited else {}
    path = write_media(tmp_path / "gray.mkv", stored, codec="ffv1", pix_fmt=pix_fmt, tags=tags, full_range=True)
    frames, _ = collect(video := VideoFile(path))
    assert video.info.color.range == ("limited" if limited else "full")
    assert np.abs(frames.astype(int) - levels).max() <= 2


@pytest.mark.parametrize(("transfer", "name"), [(16, "smpte2084"), (18, "arib-std-b67")])
def test_hdr_is_said_once(tmp_path, transfer, name):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1}
    path = write_media(tmp_path / "hdr.mp4", pix_fmt="yuv420p10le", tags=tags, matrix=9)
    with pytest.warns(UserWarning, match=name) as caught:
        frames, _ = collect(video := VideoFile(path))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (video.info.color.primaries, video.info.color.transfer) == ("bt2020", name)
    assert indices(frames) == list(range(COUNT))


# Life


def test_frames_come_one_by_one_each_in_memory_of_its_own(clip):
    with VideoFile(clip) as video:
        blocks = list(video.blocks())
    assert [block.frames_THWC.shape for block in blocks] == [(1, HEIGHT, WIDTH, 3)] * COUNT
    assert not any(np.shares_memory(a.frames_THWC, b.frames_THWC) for a, b in combinations(blocks, 2))


def test_two_readings_are_the_same_bit_by_bit(clip):
    assert np.array_equal(collect(VideoFile(clip))[0], collect(VideoFile(clip))[0])


def test_frames_are_freed_without_the_garbage_collector(clip):
    """As they are not if ``frame.side_data`` is read."""
    gc.collect()
    gc.disable()
    try:
        with VideoFile(clip) as video:
            most = max(sum(type(one) is av.VideoFrame for one in gc.get_objects()) for _ in video.blocks())
    finally:
        gc.enable()
    assert most < COUNT / 2


def test_blocks_may_be_called_once(clip):
    with VideoFile(clip) as video:
        list(video.blocks())
        with pytest.raises(SourceError, match="already read"):
            video.blocks()


def test_close_may_come_at_any_time_and_twice(clip):
    video = VideoFile(clip)
    blocks = video.blocks()
    next(blocks)
    video.close()
    video.close()
    with pytest.raises(SourceError, match="closed"):
        next(blocks)
    with pytest.raises(SourceError, match="closed"):
        video.blocks()


def test_an_intact_file_gives_no_warning(clip, matroska):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(VideoFile(clip))
        collect(VideoFile(matroska))


def test_the_door_is_light():
    code = "import sys, longvid.media.sources; print([m for m in ('av', 'zarr', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

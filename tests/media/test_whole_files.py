"""Whole files that look damaged: fields, wrong headers, missing trailers, joined segments, beginnings and ends inside
of a group of pictures. And that those which are damaged in the same places are still found."""

from __future__ import annotations

import contextlib
import struct
import warnings

import numpy as np
import pytest
from support.bad_media import outcome
from support.ffmpeg import ffmpeg, generated, pictures
from support.paff import write_paff

from longvid import Durability, VideoSession, load_model
from longvid.errors import SourceError, StoreError
from longvid.media.sources import open_source
from longvid.store.reader import open_store

X264 = ["-c:v", "libx264", "-qp", "12", "-pix_fmt", "yuv420p"]


def read(path, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_source(path, **options) as video:
            frames = np.concatenate([block.frames_THWC for block in video.blocks()])
            return frames, [str(one.message) for one in caught], video.info


def is_order_of(frames, referee):
    distance = np.abs(frames[:, None, ::4, ::4].astype(int) - referee[None, :, ::4, ::4]).mean(axis=(2, 3, 4))
    return len(frames) == len(referee) and (distance.diagonal() <= distance.min(axis=1) + 0.01).all()


@pytest.mark.parametrize(("count", "whole"), [(25, ()), (1, ()), (2, ()), (6, (1, 2, 4)), (6, (0, 5)), (3, (0, 1))])
@pytest.mark.parametrize("on_error", ["stop", "conceal"])
def test_fields_of_which_the_last_belongs_to_the_last_frame(tmp_path, count, whole, on_error):
    frames, said, _ = read(write_paff(tmp_path / "a.ts", count, whole=whole), on_error=on_error)
    assert len(frames) == count
    assert all("is interlaced" in words for words in said)
    top = frames[:, 0, 0, 1].astype(int)
    assert (np.diff(top) > 0).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "flv", "avi", "h264"])
@pytest.mark.parametrize("whole", [(), (1, 2, 4), (0, 8), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_fields_in_containers_whose_units_have_lengths(tmp_path, suffix, whole):
    stream = write_paff(tmp_path / "a.ts", 9, whole=whole)
    path = tmp_path / f"b.{suffix}"
    ffmpeg("-fflags", "+genpts", "-i", stream, "-c", "copy", path)
    frames = read(path, deinterlace="off")[0]
    assert len(frames) == 9
    assert np.abs(frames.astype(int) - pictures(path, 64, 96)).mean(axis=(1, 2, 3)).max() <= 1


def test_a_last_field_that_is_cut_off_is_not_taken_for_a_whole_frame(tmp_path):
    path = write_paff(tmp_path / "a.ts", 8)
    path.write_bytes(path.read_bytes()[: -188 * 5])
    with pytest.raises(SourceError, match=r"damaged|gave no picture"):
        read(path)


def avi(path, *, riff=None, movi=None, count=None, share=1.0):
    ffmpeg(*generated(1), "-c:v", "mjpeg", "-q:v", 2, path)
    data = bytearray(path.read_bytes())
    places = {"riff": 4, "movi": data.index(b"movi") - 4}
    for name, value in (("riff", riff), ("movi", movi)):
        if value is not None:
            data[places[name] : places[name] + 4] = struct.pack("<I", value)
    if count is not None:
        for box, offset in ((b"strh", 40 - 4), (b"avih", 24 - 4)):
            at = data.index(box) + 4 + offset
            data[at : at + 4] = struct.pack("<I", count)
    path.write_bytes(data[: int(len(data) * share)])
    return path


UNSET = 2**32 - 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0x40000000}, {"count": 0}, {"riff": UNSET, "movi": UNSET}, {"riff": 0, "movi": 0}, {"riff": 2**30},
        {"riff": 2**30, "movi": 2**30 - 2**20}, {"riff": 100, "movi": 50}, {"riff": UNSET, "movi": UNSET, "count": 0},
    ],
)  # fmt: skip
def test_an_avi_header_that_is_wrong_is_a_hint(tmp_path, wrong):
    path = avi(tmp_path / "a.avi", **wrong)
    frames, said, info = read(path)
    assert is_order_of(frames, pictures(path, 64, 96))
    assert len(frames) == 25
    assert said == []
    assert info.num_frames in (None, 25)
    with open_source(path) as video:
        assert video.count_frames() == 25


@pytest.mark.parametrize("size", [0, UNSET, 2**31 - 1])
@pytest.mark.parametrize("behind", [bytes(100_000), b"\x12\x34junk" * 500])
def test_an_avi_file_in_the_space_that_a_recorder_had_reserved(tmp_path, size, behind):
    path = avi(tmp_path / "a.avi", riff=size, movi=size)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1")] + behind)
    frames, said, _ = read(path)
    assert np.array_equal(frames, pictures(path, 64, 96))
    assert (len(frames), said) == (25, [])


def test_an_avi_file_from_a_pipe(tmp_path):
    path = tmp_path / "a.avi"
    path.write_bytes(ffmpeg(*generated(1), "-c:v", "mpeg4", "-q:v", 2, "-f", "avi", "-"))
    assert is_order_of(read(path)[0], pictures(path, 64, 96))


def test_the_disk_that_a_run_needs_is_not_what_a_header_claims(tmp_path):
    with VideoSession("tiny", device="cpu") as session:
        report = session.encode(avi(tmp_path / "a.avi", count=0x40000000), tmp_path / "a.zarr")
    assert (report.complete, report.frames) == (True, 25)


@pytest.mark.parametrize("wrong", [{}, {"riff": UNSET, "movi": UNSET}, {"riff": 0, "movi": 0}, {"riff": 2**30}])
@pytest.mark.parametrize("share", [0.3, 0.77])
def test_an_avi_file_that_is_cut_is_refused(tmp_path, wrong, share):
    with pytest.raises(SourceError, match="cut short"):
        open_source(avi(tmp_path / "a.avi", share=share, **wrong))


@pytest.mark.parametrize("behind", [b"", b";", b";\0\0junk;junk", b"\0\0junk", b"x" * 5000])
def test_a_gif_file_without_trailer_or_with_bytes_behind_it(tmp_path, behind):
    path = tmp_path / "a.gif"
    ffmpeg(*generated(1), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + behind)
    assert is_order_of(read(path)[0], pictures(path, 64, 96))
    for share in (0.2, 0.5, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)] + b";" * (share == 0.5))
        with pytest.raises(SourceError, match="cut short"):
            open_source(path)


@pytest.mark.parametrize("block", [b"!\xfe\x05hello\0", b"!\xff\x0bXMP DataXMP\x03abc\0", b"!\xf9\x04\x04\x0a\0\0\0"])
@pytest.mark.parametrize("trailer", [b";", b""])
def test_a_gif_file_with_a_comment_behind_its_last_picture(tmp_path, block, trailer):
    path = tmp_path / "a.gif"
    ffmpeg(*generated(1), path)
    path.write_bytes(path.read_bytes()[:-1] + block + trailer)
    assert np.array_equal(read(path)[0], pictures(path, 64, 96))
    with open_source(path) as video:
        assert video.count_frames() == 25


@pytest.fixture(scope="module")
def counters(tmp_path_factory):
    """Joined segments of an HLS recording, each with counters of its own; and the byte where the second one begins."""
    folder = tmp_path_factory.mktemp("segments")
    ffmpeg(
        *generated(3), "-f", "lavfi", "-i", "sine=d=3", *X264, "-g", 25, "-keyint_min", 25, "-sc_threshold", 0,
        "-bf", 2, "-c:a", "aac", "-f", "hls", "-hls_time", 1, "-hls_segment_filename", folder / "seg%d.ts",
        folder / "seg.m3u8",
    )  # fmt: skip
    parts = []
    for number in range(3):
        own = folder / f"own{number}.ts"
        ffmpeg("-i", folder / f"seg{number}.ts", "-c", "copy", "-copyts", "-muxdelay", 0, own)
        parts.append(own.read_bytes())
    path = folder / "counters.ts"
    path.write_bytes(b"".join(parts))
    return path, len(parts[0])


def test_joined_segments_whose_counters_begin_again(counters):
    frames, said, _ = read(counters[0])
    assert len(frames) == 75
    assert is_order_of(frames, pictures(counters[0], 64, 96))
    assert said == []


def test_packets_that_are_lost_before_a_joint_are_still_found(counters, tmp_path):
    """Of the picture before the joint, and of one in the middle of a segment."""
    path, joint = counters
    data = path.read_bytes()
    pieces = [data[at : at + 188] for at in range(0, len(data), 188)]
    video = [n for n, piece in enumerate(pieces) if (piece[1] & 0x1F) << 8 | piece[2] == 0x100]
    inside = [n for n in video if not pieces[n][1] & 0x40]
    for lost in (max(n for n in inside if 188 * n < joint), inside[len(inside) // 2]):
        (tmp_path / "lost.ts").write_bytes(b"".join(pieces[:lost] + pieces[lost + 1 :]))
        with pytest.raises(SourceError) as caught:
            read(tmp_path / "lost.ts")
        assert caught.value.kind == "damaged"


@pytest.mark.parametrize("codec", ["h264", "mpeg2", "hevc"])
@pytest.mark.parametrize("seek", [0.5, 0.9])
def test_a_recording_that_begins_inside_a_group_starts_at_its_first_whole_frame(tmp_path, codec, seek):
    options = {
        "h264": [*X264, "-x264-params", "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0"],
        "mpeg2": ["-c:v", "mpeg2video", "-q:v", 3, "-g", 10, "-bf", 2],
        "hevc": ["-c:v", "libx265", "-x265-params", "log-level=0:open-gop=1:keyint=10:min-keyint=10:bframes=3"],
    }[codec]
    ffmpeg(*generated(2), *options, tmp_path / "whole.ts")
    ffmpeg("-ss", seek, "-i", tmp_path / "whole.ts", "-c", "copy", tmp_path / "begins.ts")
    referee = pictures(tmp_path / "begins.ts", 64, 96)
    for on_error in ("stop", "keep", "conceal"):
        frames, said, info = read(tmp_path / "begins.ts", on_error=on_error)
        assert is_order_of(frames, referee[len(referee) - len(frames) :])
        assert len(referee) - len(frames) <= 2
        skipped = info.details["skipped_packets"]
        assert len(said) == (skipped > 0)
        if skipped:
            assert f"{skipped} packets were skipped" in said[0]
    again, _, _ = read(tmp_path / "begins.ts", start=0)
    assert np.array_equal(again, frames)
    later, _, _ = read(tmp_path / "begins.ts", start=7)
    assert np.array_equal(later, frames[7:])


@pytest.mark.filterwarnings("ignore:.*the video ends there")
def test_a_store_of_a_recording_that_ends_in_a_picture_is_continued_as_advised(tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
    path = tmp_path / "ends.ts"
    ffmpeg(*generated(2, name="testsrc2"), "-c:v", "libx264", "-b:v", "400k", "-bf", 0, "-g", 25, path)
    data = path.read_bytes()
    path.write_bytes(data[: 188 * (len(data) // 188 - 2)])
    model = load_model("tiny")

    def encode(name, **options):
        with VideoSession(model, device="cpu", chunk_frames=4) as session:
            return session.encode(
                path, tmp_path / name, durability=Durability(mode="rename", publish_seconds=0), **options
            )

    with pytest.raises(SourceError, match="--on-error keep"):
        encode("a.zarr")
    left = open_store(tmp_path / "a.zarr").num_frames
    assert left > 40
    report = encode("a.zarr", on_error="keep")
    assert (report.complete, report.resumed_from_frame) == (True, left)
    encode("whole.zarr", on_error="keep")
    a, b = open_store(tmp_path / "a.zarr"), open_store(tmp_path / "whole.zarr")
    assert np.array_equal(a.read(0, a.num_latents), b.read(0, b.num_latents))
    assert a.frame_pts.tolist() == b.frame_pts.tolist()
    assert a.metadata.reading.on_error == "keep"
    assert a.metadata.attributes["longvid"]["damage"] == {"frame": a.num_frames, "on_error": "keep"}
    with pytest.raises(StoreError, match="made with --on-error keep"):
        encode("a.zarr", on_error="conceal")
    encode("a.zarr", on_error="conceal", overwrite=True)
    assert open_store(tmp_path / "a.zarr").num_frames == a.num_frames + 1


@pytest.mark.parametrize("suffix", ["ts", "mp4", "mkv"])
def test_a_last_picture_that_is_damaged_is_found_whatever_the_threads_do(tmp_path, suffix):
    """It comes out while its thread is still decoding; every second time or so it was taken for whole."""
    whole, cut, path = tmp_path / "a.ts", tmp_path / "cut.ts", tmp_path / f"b.{suffix}"
    ffmpeg(*generated(0.2, name="testsrc2"), "-vf", "noise=alls=20", *X264, "-bf", 2, whole)
    cut.write_bytes(whole.read_bytes()[: 188 * 28])
    ffmpeg("-i", cut, "-c", "copy", path)
    for _ in range(25):
        with pytest.raises(SourceError, match=r"frame 0 of .* is damaged"):
            read(path)


def test_a_last_picture_of_h265_that_is_cut_is_found(tmp_path):
    """Its decoder says nothing. Cuts between pictures are no damage."""
    path = tmp_path / "a.ts"
    h265 = ["-c:v", "libx265", "-x265-params", "log-level=none:keyint=8:bframes=0", "-pix_fmt", "yuv420p"]
    ffmpeg(*generated(0.4, name="testsrc2"), "-vf", "noise=alls=20", *h265, path)
    data, whole = path.read_bytes(), read(path)[0]
    assert len(whole) == 10
    for count in range(len(data) // 188 - 20, len(data) // 188):
        path.write_bytes(data[: 188 * count])
        kept, said, _ = read(path, on_error="keep")
        assert np.array_equal(kept, whole[: len(kept)])
        if said:
            assert "is cut off" in said[0]
            with pytest.raises(SourceError, match=f"frame {len(kept)} .* is cut off.*--on-error keep"):
                read(path)
        else:
            with contextlib.suppress(SourceError):  # so little is left of a picture that nothing comes out
                assert np.array_equal(read(path)[0], kept)


def test_the_referee_finds_the_same_frames_in_whole_and_cut_files(tmp_path):
    """Negative control: the comparison of order fails for frames that are out of order."""
    ffmpeg(*generated(1), *X264, tmp_path / "a.mp4")
    frames, referee = read(tmp_path / "a.mp4")[0], pictures(tmp_path / "a.mp4", 64, 96)
    assert is_order_of(frames, referee)
    assert not is_order_of(frames[::-1], referee)
    assert outcome(tmp_path / "a.mp4", "stop", frames=1).count("!") == 0

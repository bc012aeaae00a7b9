"""Reading from any frame on: the frames and time stamps of a full read, in the containers and for the pictures that
mislead a seek; and whether a seek is used."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
from support.bad_media import CASES, H264, clip, damaged, noisy
from support.media import barcodes, join, write_media
from support.seeking import MAKERS, read, spy

from longvid.errors import SourceError
from longvid.media.decoding.decoder import Decoder
from longvid.media.sources import open_source

WHOLE = [
    "whole.mp4", "whole.mkv", "whole.ts", "whole.mov", "whole.flv", "whole.avi", "whole.mpg", "whole.webm",
    "whole.gif", "whole.y4m", "whole.h264", "intra.avi", "lossless.mkv", "b_frames.mp4", "b_frames.ts",
    "open_gop.mp4", "fragments.mp4", "intra_refresh.mp4", "variable_rate.mp4", "huge_gap.mp4", "start_offset.ts",
    "no_index.avi", "live.mkv", "long_claim.mp4", "joined.h264",
]  # fmt: skip
USES = {
    # by the points that were noted while decoding; by those that are found in the packets
    "open_gop.mp4": (True, True),
    "pyramid.mkv": (True, True),
    "open_gop.ts": (True, True),
    "fragments.mp4": (True, True),
    "hevc.mp4": (True, True),
    "vp9.webm": (True, True),
    "vp8.webm": (True, False),
    "av1.mp4": (True, True),
    "mjpeg.avi": (True, True),
    "ffv1.mkv": (True, True),
    "variable_rate.mp4": (True, True),
    "open_gop.mpg": (False, False),
    "packed.avi": (True, False),
    "mpeg4.avi": (True, False),
    "fields.ts": (True, False),
    "fields.mp4": (True, False),
    "joined.webm": (True, False),
    "joined.mkv": (True, False),
    "joined.mp4": (True, False),
    "joined.ts": (True, False),
    "joined.avi": (True, False),
    "equal_stamps.mkv": (True, False),
    "equal_stamps_intra.mkv": (True, False),
    "equal_stamps_ffv1.mkv": (True, False),
    "no_stamps.h264": (False, False),
    "whole.gif": (False, False),
}  # fmt: skip


@pytest.fixture(scope="module", params=USES)
def video(request, tmp_path_factory):
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("seek"))


def samples(count):
    return sorted({0, 33, 36, 40, 45, 50, 52, count - 1, count})


@pytest.mark.parametrize("how", ["noted", "scanned"])
def test_from_any_frame_on_it_is_the_slice_of_a_full_read(video, how, monkeypatch):
    name, path = video
    frames, pts, index = read(path)
    assert len(frames) == len(pts) >= 60
    decoded = spy(monkeypatch)
    used = []
    for first in samples(len(frames)):
        decoded.clear()
        rest, stamps, _ = read(path, first=first, index=index if how == "noted" else None, frames=first + 6)
        assert stamps.tolist() == pts[first : first + 6].tolist(), f"from frame {first} on"
        assert np.array_equal(rest, frames[first : first + 6]), f"from frame {first} on"
        used.append(bool(decoded.seeks) and decoded.seeks[-1])
    assert any(used) == USES[name][how == "scanned"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["noted", "scanned"])
def test_from_every_frame_to_the_end(video, how):
    _, path = video
    frames, pts, index = read(path)
    for first in range(len(frames) + 1):
        rest, stamps, _ = read(path, first=first, index=index if how == "noted" else None)
        assert stamps.tolist() == pts[first:].tolist(), f"from frame {first} on"
        assert np.array_equal(rest, frames[first:]), f"from frame {first} on"


@pytest.mark.parametrize("name", WHOLE)
def test_short_files_from_every_frame_on(tmp_path, name, monkeypatch):
    """With seeks of any length: by the points of a full read, and by those of the packets."""
    monkeypatch.setattr("longvid.media.file_reader._WORTH_A_SEEK", 1)
    monkeypatch.setattr("longvid.media.decoding.seek_index._LEAST_DISTANCE", 1)
    path = CASES[name].make(tmp_path)
    frames, pts, index = read(path)
    for first in range(0, len(frames) + 1, 5):
        for known in (index, None):
            rest, stamps, _ = read(path, first=first, index=known)
            assert stamps.tolist() == pts[first:].tolist(), f"from frame {first} on"
            assert np.array_equal(rest, frames[first:]), f"from frame {first} on"


def test_every_point_that_was_noted_is_the_frame_that_comes_out_there(video, monkeypatch):
    """Every key frame, by its packet alone: the file is opened at it and its first picture is that frame."""
    monkeypatch.setattr("longvid.media.decoding.seek_index._LEAST_DISTANCE", 1)
    name, path = video
    frames, pts, index = read(path)
    assert len(index.points) >= (0 if name == "no_stamps.h264" else 1)
    for point in index.points:
        assert pts[point.frame] == point.time  # its stamp, if the stamps of the file rise from frame to frame
        monkeypatch.setattr("longvid.media.file_reader._WORTH_A_SEEK", 1)
        rest, _, _ = read(path, first=point.frame, index=index, frames=point.frame + 1)
        assert np.array_equal(rest[0], frames[point.frame])
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.pos) for packet in container.demux(video=0) if packet.size]
    assert {(point.pts, point.position) for point in index.points} <= set(packets)


def test_a_late_frame_is_sought_and_not_decoded_up_to(tmp_path, monkeypatch):
    for suffix in ("mp4", "mkv", "ts"):
        path = clip(tmp_path, f"a.{suffix}", noisy(120, 16, 96))
        frames, pts, index = read(path)
        decoded = spy(monkeypatch)
        for known in (index, None):
            decoded.clear()
            rest, stamps, _ = read(path, first=110, index=known)
            assert np.array_equal(rest, frames[110:])
            assert stamps.tolist() == pts[110:].tolist()
            assert decoded.seeks == [True]
            assert len(decoded) < 80  # with the pictures that describe the file


def test_a_window_counts_from_its_start(tmp_path):
    path = clip(tmp_path, "a.mp4", noisy(80))
    frames, pts, index = read(path)
    for start, first in ((4, 9), (40, 0), (40, 12), (50, 3)):
        rest, stamps, _ = read(path, first=first, index=index, start=start, frames=20)
        np.testing.assert_array_equal(rest, frames[start + first : start + 20])
        assert stamps.tolist() == pts[start + first : start + 20].tolist()


@pytest.mark.parametrize("first", [0, 3, 8, 9, 10, 17, 18])
def test_arrays_and_iterables_begin_at_any_frame(first):
    frames = barcodes(20)
    for source in (frames, iter([frames[:7], frames[7:8], frames[8:]])):
        with open_source(source, start=2) as opened:
            blocks = list(opened.blocks(first=first))
        rest = [frame for block in blocks for frame in block.frames_THWC]
        assert len(rest) == len(frames[2 + first :])
        assert all(map(np.array_equal, rest, frames[2 + first :]))
        assert [int(pts) for block in blocks for pts in block.pts_T] == list(range(2 + first, 20))


@pytest.mark.parametrize("on_error", ["keep", "conceal"])
def test_with_another_policy_than_stop_a_file_is_read_from_its_start(tmp_path, monkeypatch, on_error):
    path = clip(tmp_path, "a.mp4", noisy(80))
    frames, _, index = read(path)
    decoded = spy(monkeypatch)
    rest, _, _ = read(path, first=70, index=index, on_error=on_error)
    assert np.array_equal(rest, frames[70:])
    assert decoded.seeks == []
    assert len(decoded) >= 80


@pytest.mark.parametrize("damage", [58, 62])
def test_damage_on_the_way_is_the_error_of_a_full_read(tmp_path, damage, monkeypatch):
    """The packet lies between the seek point and the frame that is wanted."""
    whole = clip(tmp_path, "whole.mkv", noisy(80))
    _, _, index = read(whole)
    path = damaged("mkv", damage, frames=noisy(80))(tmp_path)
    with pytest.raises(SourceError) as full:
        read(path)
    decoded = spy(monkeypatch)
    with pytest.raises(SourceError) as sought:
        read(path, first=63, index=index)
    assert decoded.seeks[-1] is False, "the seek was given up"
    assert str(sought.value) == str(full.value)
    assert f"frame {damage} " in str(full.value)


def test_a_concealed_file_is_repeatable_from_any_frame_on(tmp_path):
    bad = damaged("mp4", 50, frames=noisy(70))(tmp_path)
    frames, pts, index = read(bad, on_error="conceal")
    for first in (0, 40, 50, 52, 60, 66):
        rest, stamps, _ = read(bad, first=first, index=index, on_error="conceal")
        np.testing.assert_array_equal(rest, frames[first:])
        assert stamps.tolist() == pts[first:].tolist()
    assert len(frames) == 70


def test_pictures_that_are_all_alike_are_told_apart_by_their_place(tmp_path):
    """Two still recordings in a row: stamps of the file and pixels agree in both, and the number of the frame decides.

    The times that come out rise over both.
    """
    still = np.repeat(barcodes(1), 50, axis=0)
    parts = [write_media(tmp_path / f"{name}.mkv", still, options=H264) for name in "ab"]
    path = join(tmp_path / "both.mkv", *parts)
    frames, pts, index = read(path)
    assert (len(frames), len(set(pts.tolist()))) == (100, 100)
    for first in range(0, 101, 9):
        for known in (index, None):
            rest, stamps, _ = read(path, first=first, index=known)
            assert (len(rest), stamps.tolist()) == (100 - first, pts[first:].tolist())


def test_time_stamps_that_are_missing_are_counted_from_the_same_frame(tmp_path, monkeypatch):
    """Some containers give a time stamp to every few frames; those between are counted at the frame rate."""
    pictures = Decoder.pictures

    def some_without(self):
        for picture in pictures(self):
            known = picture.frame.key_frame or picture.position % 3 == 0
            yield picture if known else replace(picture, pts=None, shown_at=None)

    monkeypatch.setattr(Decoder, "pictures", some_without)
    path = clip(tmp_path, "a.mkv", noisy(80))
    frames, pts, index = read(path)
    decoded = spy(monkeypatch)
    for first in range(40, 60):
        rest, stamps, _ = read(path, first=first, index=index)
        assert np.array_equal(rest, frames[first:])
        assert stamps.tolist() == pts[first:].tolist(), f"from frame {first} on"
    assert decoded.seeks == [True] * 20

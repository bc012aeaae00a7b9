"""Resuming after any frame, in the containers and for the pictures that mislead a seek."""

from __future__ import annotations

import numpy as np
import pytest
from support.bad_media import CASES, GOP, clip, noisy
from support.media import barcodes, join, write_media

from longvid.errors import SourceError
from longvid.frames import SourcePosition, frame_digest
from longvid.media.decoder import Decoder
from longvid.media.sources import open_source

WHOLE = [
    "whole.mp4", "whole.mkv", "whole.ts", "whole.mov", "whole.flv", "whole.avi", "whole.mpg", "whole.webm",
    "whole.gif", "whole.y4m", "whole.h264", "intra.avi", "lossless.mkv", "b_frames.mp4", "b_frames.ts",
    "open_gop.mp4", "fragments.mp4", "intra_refresh.mp4", "variable_rate.mp4", "huge_gap.mp4", "start_offset.ts",
    "no_index.avi", "live.mkv", "long_claim.mp4", "joined.h264",
]  # fmt: skip
PYRAMID = {"preset": "medium", "x264-params": f"{GOP}:bframes=5:b-adapt=0:keyint=12:min-keyint=12:b-pyramid=normal"}
OPEN = {"preset": "medium", "x264-params": f"{GOP}:bframes=3:b-adapt=0:keyint=12:open-gop=1"}
MORE = {
    "pyramid.mkv": lambda folder: clip(folder, "a.mkv", options=PYRAMID),
    "open_gop.ts": lambda folder: clip(folder, "a.ts", options=OPEN),
    "open_gop.mkv": lambda folder: clip(folder, "a.mkv", options=OPEN),
    "open_gop.mpg": lambda folder: clip(folder, "a.mpg", codec="mpeg2video", rate=25, options={"g": "9", "bf": "2"}),
    "b_frames.avi": lambda folder: clip(folder, "a.avi", codec="mpeg4", options={"g": "9", "bf": "2"}),
    "cut_by_edit_list.mp4": lambda folder: clip(folder, "a.mp4", options=OPEN, pts=[i - 3 for i in range(24)]),
}


def read(path, after=None, **options):
    with open_source(path, **options) as video:
        blocks = list(video.blocks(after=after))
        height, width = video.info.height, video.info.width
    frames = [block.frames_THWC for block in blocks] or [np.zeros((0, height, width, 3), np.uint8)]
    return np.concatenate(frames), np.concatenate([*(block.pts_T for block in blocks), np.zeros(0, np.int64)])


def position(frames, pts, count):
    return SourcePosition(count, int(pts[count - 1]), frame_digest(frames[count - 1]))


@pytest.mark.parametrize("name", [*WHOLE, *MORE])
def test_what_follows_any_frame_is_what_would_have_followed(tmp_path, name):
    path = (MORE.get(name) or CASES[name].make)(tmp_path)
    frames, pts = read(path)
    for count in range(1, len(frames) + 1):
        rest, stamps = read(path, after=position(frames, pts, count))
        assert stamps.tolist() == pts[count:].tolist(), f"behind frame {count - 1}"
        assert np.array_equal(rest, frames[count:]), f"behind frame {count - 1}"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "h264"])
def test_pictures_that_are_all_alike_are_told_apart_by_time(tmp_path, suffix):
    codec = {"codec": "mpeg4", "options": {"g": "6", "bf": "0"}} if suffix == "avi" else {}
    path = clip(tmp_path, f"a.{suffix}", np.repeat(barcodes(1), 20, axis=0), **codec)
    frames, pts = read(path)
    for count in range(1, len(frames) + 1):
        _, stamps = read(path, after=position(frames, pts, count))
        assert stamps.tolist() == pts[count:].tolist()


def test_a_time_that_comes_twice_is_not_sought(tmp_path):
    """Two still recordings in a row: time stamp and pixels agree in both, and the number of the frame decides."""
    still = np.repeat(barcodes(1), 10, axis=0)
    parts = [write_media(tmp_path / f"{name}.mpg", still, codec="mpeg2video", rate=25) for name in "ab"]
    path = join(tmp_path / "both.mpg", *parts)
    frames, pts = read(path)
    assert len(frames) > 15
    assert len(set(pts.tolist())) < len(frames)
    for count in range(1, len(frames) + 1):
        rest, stamps = read(path, after=position(frames, pts, count))
        assert (len(rest), stamps.tolist()) == (len(frames) - count, pts[count:].tolist())


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_late_place_is_sought_and_not_decoded_up_to(tmp_path, suffix, monkeypatch):
    path = clip(tmp_path, f"a.{suffix}", noisy(120, 16, 96))
    frames, pts = read(path)
    decoded = []
    register = Decoder._register
    monkeypatch.setattr(Decoder, "_register", lambda self, packet: (decoded.append(1), register(self, packet))[1])
    rest, _ = read(path, after=position(frames, pts, 110))
    assert np.array_equal(rest, frames[110:])
    assert len(decoded) < 80


@pytest.mark.parametrize("suffix", ["mp4", "ts", "h264"])
def test_a_frame_that_is_another_one_now_is_found_out(tmp_path, suffix):
    path = clip(tmp_path, f"a.{suffix}")
    frames, pts = read(path)
    with pytest.raises(SourceError) as caught:
        read(path, after=SourcePosition(10, int(pts[9]), frame_digest(frames[3])))
    assert caught.value.kind == "changed"

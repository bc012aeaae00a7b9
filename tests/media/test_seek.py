"""Resuming after a frame that was read before: the same frames as without the break, in every container."""

import av
import numpy as np
import pytest
from support.media import barcodes, collect, write_media

from longvid import SourceError
from longvid.frames import SourcePosition, frame_digest
from longvid.media.sources import open_source

GOP = {"g": "7", "bf": "2"}
FORMATS = {
    "mp4, B-frames": ("a.mp4", {"options": GOP}),
    "mp4, open GOP": ("a.mp4", {"options": {**GOP, "x264-params": "open-gop=1:keyint=7:chromaloc=1"}}),
    "mp4, intra refresh": ("a.mp4", {"options": {"x264-params": "intra-refresh=1:keyint=8:chromaloc=1"}}),
    "mp4, fragmented": ("a.mp4", {"options": GOP, "movflags": "frag_keyframe+empty_moov"}),
    "mkv": ("a.mkv", {"options": GOP}),
    "ts": ("a.ts", {"options": GOP}),
    "avi": ("a.avi", {"codec": "mpeg4", "options": {"g": "6"}}),
    "avi, intra only": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True}),
    "mov": ("a.mov", {"options": GOP}),
    "flv": ("a.flv", {"options": {"g": "7", "bf": "0"}}),
    "h264 alone": ("a.h264", {"options": {"g": "7", "bf": "0"}}),
    "mpeg": ("a.mpg", {"codec": "mpeg2video", "options": GOP, "rate": 25}),
    "variable rate": ("a.mp4", {"options": GOP, "pts": [i * i // 3 + 2 * i for i in range(40)]}),
}


@pytest.fixture(scope="module", params=FORMATS)
def video(request, tmp_path_factory):
    name, options = FORMATS[request.param]
    return write_media(tmp_path_factory.mktemp("seek") / name, barcodes(40), **options)


def position(frames, pts, count):
    return SourcePosition(count, int(pts[count - 1]), frame_digest(frames[count - 1]))


@pytest.mark.parametrize("start", [0, 5])
def test_what_follows_is_what_would_have_followed(video, start):
    with open_source(video, start=start) as source:
        frames, pts = collect_all(source)
    for count in range(1, len(frames) + 1, 3):
        with open_source(video, start=start) as source:
            rest, stamps = collect_all(source, after=position(frames, pts, count))
        np.testing.assert_array_equal(rest, frames[count:])
        np.testing.assert_array_equal(stamps, pts[count:])


def collect_all(source, after=None):
    blocks = list(source.blocks(after=after))
    if not blocks:
        return np.zeros((0, source.info.height, source.info.width, 3), np.uint8), np.zeros(0, np.int64)
    return np.concatenate([b.frames_THWC for b in blocks]), np.concatenate([b.pts_T for b in blocks])


def test_a_window_counts_from_its_start(video):
    with open_source(video) as source:
        frames, pts = collect_all(source)
    with open_source(video, start=4, frames=20) as source:
        rest, _ = collect_all(source, after=position(frames[4:], pts[4:], 9))
    np.testing.assert_array_equal(rest, frames[13:24])


@pytest.mark.parametrize("kind", ["file", "array", "iterable"])
def test_other_frames_than_before_are_an_error(tmp_path, kind):
    frames = barcodes(20)
    made = {"file": lambda: write_media(tmp_path / "a.mp4", frames), "array": lambda: frames,
            "iterable": lambda: iter([frames[:7], frames[7:]])}[kind]  # fmt: skip
    wrong = SourcePosition(10, 9, frame_digest(frames[3]))
    beyond = SourcePosition(100, 99, frame_digest(frames[3]))
    for after, why in ((wrong, "has changed"), (beyond, "is missing now")):
        with open_source(made()) as source, pytest.raises(SourceError, match=why) as caught:
            collect_all(source, after)
        assert caught.value.kind == "changed"


def test_arrays_and_iterables_go_on_too():
    frames = barcodes(20)
    after = SourcePosition(8, 9, frame_digest(frames[9]))
    for source in (frames, iter([frames[:7], frames[7:8], frames[8:]])):
        with open_source(source, start=2) as opened:
            rest, stamps = collect_all(opened, after)
        np.testing.assert_array_equal(rest, frames[10:])
        assert stamps.tolist() == list(range(10, 20))


def test_a_damaged_file_goes_on_from_its_start_alone(tmp_path):
    """Pixels of damaged frames are not repeatable, so there is no other way to be sure."""
    noise = np.random.default_rng(0).integers(-20, 20, (40, 48, 96, 3))
    whole = write_media(tmp_path / "a.mp4", np.clip(barcodes(40) + noise, 0, 255).astype(np.uint8), options=GOP)
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(whole.read_bytes())
    place, size = packets[16]
    data[place + 8 : place + size - 8] = bytes(size - 16)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    runs = []
    for _ in range(2):
        with open_source(bad, on_error="conceal") as source:
            runs.append(list(source.blocks()))
    (frames, valid), (again, _) = (
        (np.concatenate([b.frames_THWC for b in run]), np.concatenate([b.valid_T for b in run])) for run in runs
    )
    np.testing.assert_array_equal(frames, again)
    assert 0 < (~valid).sum() < 20
    pts = np.concatenate([b.pts_T for b in runs[0]])
    assert (np.diff(pts) > 0).all()
    first = int(np.flatnonzero(~valid)[0])
    np.testing.assert_array_equal(frames[first], frames[first - 1])
    with open_source(bad, on_error="conceal") as source:
        rest, _ = collect_all(source, position(frames, pts, first + 2))
    np.testing.assert_array_equal(rest, frames[first + 2 :])
    with open_source(bad, on_error="keep") as source, pytest.warns(UserWarning, match="the video ends there"):
        kept, _ = collect(source)
    np.testing.assert_array_equal(kept, frames[: len(kept)])
    assert len(kept) <= first
    with open_source(bad) as source, pytest.raises(SourceError) as caught:
        list(source.blocks())
    assert caught.value.kind == "damaged"

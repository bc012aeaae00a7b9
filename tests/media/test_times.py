"""Times of frames where a container stores none, stores them twice, or begins again; the length of the last frame."""

from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pytest
from support.ffmpeg import ffmpeg, generated, pictures
from support.media import barcodes, indices, write_media
from support.seeking import read

from longvid import VideoSession, load_model
from longvid.errors import SourceError
from longvid.media.output.video_writer import VideoWriter
from longvid.media.sources import open_source
from longvid.media.timing.clock import Clock
from longvid.store.reader import open_store

X264 = ["-c:v", "libx264", "-qp", "12", "-pix_fmt", "yuv420p"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of the kinds, by name."""
    folder = tmp_path_factory.mktemp("times")

    def get(name):
        path = folder / name
        if not path.exists():
            MAKERS[name](path)
        return path

    return get


def bframes_avi(path):
    ffmpeg(*generated(1), *X264, "-bf", 2, path)


def no_ctts(path):
    whole = path.with_name("cts.mp4")
    ffmpeg(*generated(1), *X264, "-bf", 2, "-use_editlist", 0, "-movflags", "+negative_cts_offsets", whole)
    path.write_bytes(whole.read_bytes().replace(b"ctts", b"free"))


def no_ctts_variable(path):
    """Frames of several lengths, and groups that begin with B pictures, which a decoder drops behind a seek."""
    whole = path.with_name("variable.mp4")
    pace = ["-vf", "setpts=(N+floor(N/2))/25/TB", "-fps_mode", "passthrough"]
    groups = ["-c:v", "mpeg2video", "-q:v", 2, "-bf", 2, "-g", 6]
    ffmpeg(*generated(1), *pace, *groups, "-use_editlist", 0, "-movflags", "+negative_cts_offsets", whole)
    path.write_bytes(whole.read_bytes().replace(b"ctts", b"free"))


def joined_webm(path):
    parts = []
    for name in ("testsrc", "testsrc2"):
        part = path.with_name(f"{name}.webm")
        ffmpeg(
            *generated(1, name=name),
            "-c:v",
            "libvpx",
            "-threads",
            1,
            "-b:v",
            "1M",
            "-g",
            25,
            "-deadline",
            "realtime",
            part,
        )
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))


def highspeed(path):
    source = ["-f", "lavfi", "-i", "testsrc=s=96x64:r=2000:d=0.03", "-vf", "setpts=PTS+1"]
    ffmpeg(
        *source,
        "-fps_mode",
        "passthrough",
        "-copyts",
        "-c:v",
        "libx264",
        "-bf",
        0,
        "-g",
        21,
        "-pix_fmt",
        "yuv420p",
        path,
    )


def overflow(path):
    """A transport stream whose clock of 33 bits begins again in the middle."""
    ffmpeg(*generated(2), *X264, "-bf", 0, "-g", 25, "-output_ts_offset", (2**33 - 90000) / 90000, "-muxdelay", 0, path)


def jump(path):
    """A transport stream whose stamps jump ahead by an hour where a group begins."""
    pace = ["-vf", "setpts=PTS+gte(N\\,12)*3600/TB", "-fps_mode", "passthrough"]
    ffmpeg(*generated(1), *pace, *X264, "-bf", 2, "-g", 6, path)


def packed_avi(path):
    """MPEG-4 as Xvid writes it, with two pictures in a packet."""
    ffmpeg(*generated(1), "-c:v", "libxvid", "-bf", 2, "-q:v", 3, "-g", 8, path)


def first_without(path):
    """Stamps before 0, of which the demuxer of Matroska makes none."""
    whole = path.with_name("whole.mp4")
    ffmpeg(*generated(1), *X264, "-bf", 2, whole)
    ffmpeg("-itsoffset", -0.3, "-i", whole, "-c", "copy", "-avoid_negative_ts", "disabled", path)


MAKERS = {
    "bframes.avi": bframes_avi,
    "noctts.mp4": no_ctts,
    "noctts_variable.mp4": no_ctts_variable,
    "joined.webm": joined_webm,
    "highspeed.mkv": highspeed,
    "overflow.ts": overflow,
    "jump.ts": jump,
    "packed.avi": packed_avi,
    "first.mkv": first_without,
}
STEPS = {
    "bframes.avi": 1 / 25,
    "noctts.mp4": 1 / 25,
    "joined.webm": 1 / 25,
    "highspeed.mkv": 1 / 2000,
    "overflow.ts": 1 / 25,
    "jump.ts": 1 / 25,
    "packed.avi": 1 / 25,
    "first.mkv": 1 / 25,
}
SAID = {
    "bframes.avi": "does not store when",
    "noctts.mp4": "does not store when",
    "joined.webm": "do not continue",
    "jump.ts": "do not continue",
    "packed.avi": "does not store when",
    "first.mkv": "has no time stamps",
}


@pytest.mark.parametrize("name", STEPS)
def test_times_rise_from_frame_to_frame_and_nothing_is_lost(made, name):
    path = made(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_source(path) as video:
            blocks = list(video.blocks())
            time_base = video.info.time_base
    frames = np.concatenate([block.frames_THWC for block in blocks])
    seconds = np.concatenate([block.pts_T for block in blocks]) * float(time_base)
    assert (np.diff(seconds) > 0).all()
    assert np.diff(seconds) == pytest.approx(np.full(len(frames) - 1, STEPS[name]), abs=1.1e-3)
    assert seconds[-1] - seconds[0] == pytest.approx((len(frames) - 1) * STEPS[name], abs=1.1e-3)
    referee = pictures(path, 64, 96)
    assert len(referee) == len(frames)
    # the order is that of the referee: each frame is nearest to its own
    distance = np.abs(frames[:, None, ::4, ::4].astype(int) - referee[None, :, ::4, ::4]).mean(axis=(2, 3, 4))
    assert (distance.diagonal() <= distance.min(axis=1) + 0.01).all()
    assert [str(one.message) for one in caught if SAID.get(name, "?") in str(one.message)][1:] == []
    assert len(caught) == (name in SAID)


@pytest.mark.parametrize("name", MAKERS)
def test_from_any_frame_on_the_times_are_those_of_a_full_read(made, name, monkeypatch):
    monkeypatch.setattr("longvid.media.file_reader._WORTH_A_SEEK", 1)
    monkeypatch.setattr("longvid.media.decoding.seek_index._LEAST_DISTANCE", 1)
    frames, stamps, index = read(made(name))
    for first in range(0, len(frames) + 1, 7):
        for known in (index, None):
            rest, later, _ = read(made(name), first=first, index=known)
            assert later.tolist() == stamps[first:].tolist()
            assert np.array_equal(rest, frames[first:])


@pytest.mark.filterwarnings("ignore:.* do not continue", "ignore:.* does not store when", "ignore:.* has no time")
@pytest.mark.parametrize("name", MAKERS)
def test_stopped_continued_and_decoded(made, name, tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
    model = load_model("tiny")

    def encode(store, stop=None):
        def watch(event):
            if event.index == stop:
                session.stop()

        with VideoSession(model, device="cpu", chunk_frames=4, callbacks=[watch]) as session:
            return session.encode(made(name), store, durability="rename")

    encode(tmp_path / "whole.zarr")
    middle = open_store(tmp_path / "whole.zarr").num_frames // 4 // 2 + 2
    assert not encode(tmp_path / "a.zarr", middle).complete
    assert encode(tmp_path / "a.zarr").complete
    whole, store = open_store(tmp_path / "whole.zarr"), open_store(tmp_path / "a.zarr")
    assert np.array_equal(whole.read(0, whole.num_latents), store.read(0, store.num_latents))
    assert whole.frame_pts.tolist() == store.frame_pts.tolist()
    facts = [one.metadata.attributes["longvid"] for one in (whole, store)]
    assert facts[0].get("joints") == facts[1].get("joints")
    assert ("joints" in facts[0]) == (SAID.get(name) == "do not continue")
    with VideoSession(model, device="cpu") as session:
        session.decode(tmp_path / "a.zarr", tmp_path / "a.mp4")
    with open_source(tmp_path / "a.mp4") as video:
        stamps = [p * video.info.time_base for block in video.blocks() for p in block.pts_T.tolist()]
    expected = [(p - store.frame_pts[0]) * store.time_base for p in store.frame_pts]
    assert [float(a) for a in stamps] == pytest.approx([float(b) for b in expected], abs=1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_is_shown_as_long_as_in_the_source(tmp_path, suffix):
    path = tmp_path / "hold.gif"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:r=10:d=0.3", "-f", "gif", "-final_delay", 200, path)
    with VideoSession("tiny", device="cpu") as session:
        session.encode(path, tmp_path / "a.zarr")
        session.decode(tmp_path / "a.zarr", tmp_path / f"a.{suffix}")
        session.decode(tmp_path / "a.zarr", tmp_path / f"part.{suffix}", frames=2)
    assert open_store(tmp_path / "a.zarr").metadata.last_frame_duration == 200
    with open_source(tmp_path / f"a.{suffix}") as video:
        times = [p * video.info.time_base for block in video.blocks() for p in block.pts_T.tolist()]
        assert float(times[-1] + video.last_duration() * video.info.time_base) == pytest.approx(2.2, abs=2e-3)
    with open_source(path, fps=10) as video:
        assert len(list(video.blocks())) == 22


def test_every_length_of_a_last_frame_comes_back(tmp_path):
    for count in (1, 2, 5):
        with VideoWriter(
            tmp_path / f"{count}.mp4", size=(48, 96), time_base=Fraction(1, 100), frame_rate=None, last_duration=77
        ) as writer:
            writer.write(barcodes(count), np.arange(count) * 4)
        with open_source(tmp_path / f"{count}.mp4") as video:
            blocks = list(video.blocks())
            assert float(video.last_duration() * video.info.time_base) == pytest.approx(0.77, abs=1e-3)
            assert len(blocks) == count


def test_a_frame_rate_is_for_streams_without_time_stamps(tmp_path):
    raw = write_media(tmp_path / "a.h264", barcodes(12))
    with pytest.warns(UserWarning, match="frames per second are assumed, --assume-fps"), open_source(raw):
        pass
    with open_source(raw, frame_rate=Fraction(30000, 1001)) as video:
        stamps = [p for block in video.blocks() for p in block.pts_T.tolist()]
        assert (video.info.time_base, video.info.frame_rate) == (Fraction(1001, 30000), Fraction(30000, 1001))
        assert stamps == list(range(12))
    assert indices(read(raw, frame_rate=10, fps=5)[0]) == [0, 2, 4, 6, 8, 10]
    with pytest.raises(SourceError, match="carries its own time stamps; leave it out"):
        open_source(write_media(tmp_path / "a.mp4", barcodes(2)), frame_rate=10)


@pytest.mark.filterwarnings("ignore:.* do not continue")
@pytest.mark.parametrize(
    ("suffix", "count", "options", "words"),
    [
        ("mkv", 3, (), "another recording begins at byte"),
        ("flv", 2, (), "another recording begins at byte"),
        ("mp4", 2, ("-movflags", "frag_keyframe+empty_moov+default_base_moof"), "6 packets .* are left out"),
    ],
)
def test_pictures_of_joined_recordings_that_are_not_found_are_said(tmp_path, suffix, count, options, words):
    part, path = tmp_path / f"part.{suffix}", tmp_path / f"joined.{suffix}"
    ffmpeg(*generated(0.48), *X264, "-bf", 2, "-g", 6, *options, part)
    with open_source(part) as video:  # a warning is an error here
        assert len(list(video.blocks())) == 12
    path.write_bytes(part.read_bytes() * count)
    with pytest.warns(UserWarning, match=words), open_source(path) as video:
        frames = [block.frames_THWC for block in video.blocks()]
    assert len(frames) == len(pictures(path, 64, 96)) < 12 * count


def test_the_clock():
    def times(stamps, **options):
        clock = Clock(Fraction(1, 1000), Fraction(25), **options)
        return [clock.stamp(pts, 40) for pts in stamps]

    assert times([0, 40, 80, 0, 40]) == [0, 40, 80, 120, 160]
    assert times([0, 40, 40, 41, 80]) == [0, 40, 41, 42, 80]
    assert times([5, None, None, 125]) == [5, 45, 85, 125]
    assert times([0, 40, 600_000]) == [0, 40, 600_000]
    assert times([0, 40, 600_000, 600_040], transport=True) == [0, 40, 80, 120]
    assert times([2**33 - 40, 0, 40], transport=True) == [2**33 - 40, 2**33, 2**33 + 40]

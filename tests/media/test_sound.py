"""The sound of a decoded video: a click with every white flash, measured by ffmpeg, in step within one frame."""

from __future__ import annotations

import functools
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from support.ffmpeg import ffmpeg, pictures
from support.media import collect

from longvid.errors import SourceError
from longvid.media.decoding.media_file import MediaFile
from longvid.media.limits import Limits
from longvid.media.output.sound import Sound, SoundFile, Window
from longvid.media.output.video_writer import VideoWriter
from longvid.media.video_file import VideoFile

RATE = 25
CLICKS = "aevalsrc='if(lt(mod(t,0.48),0.002),0.9,0)':s={rate}:d={seconds}"
FLASHES = "color=black:s=96x64:r=25:d={seconds},drawbox=enable='lt(mod(n,12),1)':color=white:t=fill"


def source(folder, name, *options, seconds=3, rate=48000, video=("-c:v", "libx264", "-g", "25", "-bf", "2")):
    """A file in which a flash and a click come together every 12 frames."""
    inputs = ["-f", "lavfi", "-i", FLASHES.format(seconds=seconds)]
    inputs += ["-f", "lavfi", "-i", CLICKS.format(seconds=seconds, rate=rate)]
    ffmpeg(*inputs, *video, "-pix_fmt", "yuv420p", *options, folder / name)
    return folder / name


def take(path, out, start=0, stop=None, *, audio=None, **options):
    """What decode does: frames ``start`` to ``stop`` of a file with their times, and the sound."""
    with VideoFile(path) as video:
        frames, pts = collect(video)
        base, rate = video.info.time_base, video.info.frame_rate
    pts = np.array(pts)
    stop = len(pts) if stop is None else stop
    end = pts[stop] * base if stop < len(pts) else pts[-1] * base + 1 / rate
    window = Window(begin=int(pts[start]) * base, end=end, frame=1 / rate)
    opened = functools.partial(Sound, MediaFile(str(audio or path), Limits()), str(path), window)
    with VideoWriter(out, size=frames.shape[1:3], time_base=base, frame_rate=rate, sound=opened, **options) as writer:
        for number in range(start, stop):
            writer.write(frames[number : number + 1], pts[number : number + 1])
    return float(end - window.begin)


def heard(path, rate=48000):
    """Seconds at which the clicks of a file are heard, and when its sound begins and ends."""
    samples = ffmpeg("-i", path, "-map", "0:a:0", "-af", "aresample=async=1:first_pts=0", "-ac", 1, "-ar", rate,
                     "-f", "f32le", "-")  # fmt: skip
    loud = np.flatnonzero(np.abs(np.frombuffer(samples, np.float32)) > 0.15) / rate
    clicks = [seconds for number, seconds in enumerate(loud) if not number or seconds - loud[number - 1] > 0.1]
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        first = float(next(container.decode(stream)).pts * stream.time_base)
    return clicks, first, len(samples) / 4 / rate


def seen(path):
    """Seconds at which the flashes of a file are seen."""
    with VideoFile(path) as video:
        frames, pts = collect(video)
        base = video.info.time_base
    bright = frames.reshape(len(frames), -1).mean(axis=1) > 128
    return [float(stamp * base) for stamp, white in zip(pts, bright, strict=True) if white]


def in_step(path, seconds, *, frame=1 / RATE):
    clicks, first, last = heard(path)
    flashes = seen(path)
    if flashes and flashes[0] == 0 and not (clicks and clicks[0] < frame):
        flashes = flashes[1:]  # a click at the cut is heard in part
    assert len(clicks) == len(flashes) > 0
    assert clicks == pytest.approx(flashes, abs=frame)
    assert abs(first) <= frame
    assert last == pytest.approx(seconds, abs=frame)
    return clicks


SOURCES = {
    "aac.mp4": ["-c:a", "aac"],
    "aac.mkv": ["-c:a", "aac"],
    "aac.ts": ["-c:a", "aac"],
    "mp3.mp4": ["-c:a", "libmp3lame"],
    "mp3.avi": ["-c:a", "libmp3lame"],
    "opus.mkv": ["-c:a", "libopus"],
    "vorbis.mkv": ["-c:a", "libvorbis"],
    "flac.mkv": ["-c:a", "flac"],
    "ac3.mkv": ["-c:a", "ac3"],
    "mp2.ts": ["-c:a", "mp2"],
    "pcm.mov": ["-c:a", "pcm_s16le"],
    "pcm24.mkv": ["-c:a", "pcm_s24le"],
    "aac.flv": ["-c:a", "aac"],
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("name", SOURCES)
def test_sound_of_every_kind_is_in_step(tmp_path, name, suffix):
    # AVI stores no order of B pictures
    path = source(tmp_path, name, *SOURCES[name], **({"video": ("-c:v", "mpeg4")} if name.endswith("avi") else {}))
    for start, stop in ((0, None), (17, 58)):
        seconds = take(path, tmp_path / f"out{suffix}", start, stop, overwrite=True)
        in_step(tmp_path / f"out{suffix}", seconds)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_packets_that_last_longer_than_a_picture(tmp_path, suffix, rate):
    path = source(tmp_path, "slow.mp4", "-c:a", "aac", rate=rate, seconds=2)
    for start, stop in ((0, None), (17, None), (5, 20)):
        seconds = take(path, tmp_path / f"out{suffix}", start, stop, overwrite=True)
        in_step(tmp_path / f"out{suffix}", seconds)


def codec_of(path):
    with av.open(str(path)) as container:
        return container.streams.audio[0].codec_context.codec.canonical_name


def packets(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.audio[0]) if packet.size]


@pytest.mark.parametrize(
    ("name", "suffix", "codec"),
    [
        ("aac.mp4", ".mp4", "aac"), ("aac.mp4", ".mkv", "aac"), ("aac.ts", ".mkv", "aac"), ("opus.mkv", ".mp4", "opus"),
        ("opus.mkv", ".webm", "opus"), ("flac.mkv", ".mp4", "flac"), ("pcm.mov", ".mov", "pcm_s16le"),
        ("vorbis.mkv", ".mp4", None), ("pcm.mov", ".mp4", None), ("aac.mp4", ".webm", None),
    ],
)  # fmt: skip
def test_packets_are_copied_where_the_container_takes_them(tmp_path, name, suffix, codec):
    path = source(tmp_path, name, *SOURCES[name])
    take(path, tmp_path / f"out{suffix}")
    assert codec_of(tmp_path / f"out{suffix}") == codec or ("opus" if suffix == ".webm" else "aac")
    copied = set(packets(path)) & set(packets(tmp_path / f"out{suffix}"))
    assert bool(copied) == (codec is not None and name != "aac.ts")  # of a transport stream without their headers


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_stays_in_step(tmp_path, suffix):
    drop = ["-vf", "select='not(between(mod(n,24),3,10))'", "-fps_mode", "vfr"]
    path = source(tmp_path, "vfr.mp4", *drop, "-c:a", "aac")
    for start, stop in ((0, None), (5, 30)):
        seconds = take(path, tmp_path / f"out{suffix}", start, stop, overwrite=True)
        in_step(tmp_path / f"out{suffix}", seconds)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("offset", [-0.5, 0.5])
def test_sound_that_begins_before_or_after_the_picture(tmp_path, suffix, offset):
    whole = source(tmp_path, "whole.mkv", "-c:a", "flac")
    path = tmp_path / "shifted.mkv"
    ffmpeg("-i", whole, "-itsoffset", offset, "-i", whole, "-map", "0:v", "-map", "1:a", "-c", "copy", path)
    take(path, tmp_path / f"out{suffix}")
    clicks, _, _ = heard(tmp_path / f"out{suffix}")
    expected = [number * 0.48 + offset for number in range(7)]
    with av.open(str(path)) as container:  # ffmpeg moves the pictures of a file whose sound would begin before 0
        moved = float(container.streams.video[0].start_time * container.streams.video[0].time_base)
    assert moved == pytest.approx(max(0, -offset), abs=0.01)
    length = seen(path)[-1] - moved + 0.2
    assert clicks == pytest.approx([s for s in expected if 0 <= s < length], abs=1 / RATE)


def test_an_edit_list_is_followed(tmp_path):
    whole = source(tmp_path, "whole.mp4", "-c:a", "aac", seconds=4)
    ffmpeg("-ss", "1.2", "-i", whole, "-c", "copy", tmp_path / "cut.mp4")
    seconds = take(tmp_path / "cut.mp4", tmp_path / "out.mp4")
    clicks = in_step(tmp_path / "out.mp4", seconds)
    assert clicks == pytest.approx(heard(tmp_path / "cut.mp4")[0], abs=1 / RATE)


def test_long_packets_are_cut_to_the_sample(tmp_path):
    path = source(tmp_path, "slow.mp4", "-c:a", "aac", rate=8000)  # a packet lasts 128 ms
    seconds = take(path, tmp_path / "out.mkv", 17, 58)
    in_step(tmp_path / "out.mkv", seconds)
    assert heard(tmp_path / "out.mkv")[2] == pytest.approx(seconds, abs=0.03)


def test_a_late_part_is_found_by_a_seek(tmp_path, monkeypatch):
    path = source(tmp_path, "long.mp4", "-c:a", "aac", seconds=40)
    read = []
    span = Sound._span
    monkeypatch.setattr(Sound, "_span", lambda self, packet: read.append(packet.pts) or span(self, packet))
    seconds = take(path, tmp_path / "out.mp4", 900, 960)
    in_step(tmp_path / "out.mp4", seconds)
    assert min(read) > 30 * 48000


def test_a_gap_in_the_sound_is_silence(tmp_path):
    path = source(tmp_path, "gap.mkv", "-af", "aselect='not(between(t,0.9,1.6))'", "-c:a", "pcm_u8")
    take(path, tmp_path / "out.mp4")
    clicks, _, last = heard(tmp_path / "out.mp4")
    assert clicks == pytest.approx([0, 0.48, 1.92, 2.4, 2.88], abs=1 / RATE)
    assert last == pytest.approx(3, abs=1 / RATE)


def test_one_of_several_streams_is_taken_and_that_is_said(tmp_path):
    path = source(tmp_path, "two.mkv", "-c:a", "aac", "-map", "0:v", "-map", "1:a", "-map", "1:a")
    with pytest.warns(UserWarning, match="2 audio streams; only the one that players play by default, stream 1"):
        seconds = take(path, tmp_path / "out.mp4")
    in_step(tmp_path / "out.mp4", seconds)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert len(container.streams.audio) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("codec", "channels", "kept"), [("pcm_s16le", 6, 6), ("pcm_s16le", 8, 8), ("pcm_s16le", 7, 2)])
def test_all_channels_are_taken_along(tmp_path, codec, channels, kept, suffix):
    path = source(tmp_path, f"{codec}.mkv", "-c:a", codec, "-ac", channels)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seconds = take(path, tmp_path / f"out{suffix}")
    assert [str(one.message) for one in said] == (
        [] if kept == channels else [f"the 7 channels of {path} are mixed to stereo"]
    )
    in_step(tmp_path / f"out{suffix}", seconds)
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        assert container.streams.audio[0].channels == kept


def overwritten(path, start, stop):
    data = bytearray(path.read_bytes())
    begin, end = int(len(data) * start), int(len(data) * stop)
    data[begin:end] = np.random.default_rng(0).bytes(end - begin)
    return bytes(data)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_damaged_sound_never_costs_a_picture(tmp_path, suffix):
    path = source(tmp_path, "whole.mkv", "-c:a", "aac")
    damaged = tmp_path / "damaged.mkv"
    damaged.write_bytes(overwritten(path, 0.4, 0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take(path, tmp_path / f"out{suffix}", audio=damaged)
    assert len(pictures(tmp_path / f"out{suffix}", 64, 96)) == 75


def test_sound_that_the_file_does_not_take_is_left_out(tmp_path, monkeypatch):
    path = source(tmp_path, "pcm.mkv", "-c:a", "pcm_s24le")
    monkeypatch.setattr(Sound, "_may_copy", lambda *_: True)  # as if the list of codecs were wrong
    with pytest.warns(UserWarning, match="is left out: a .webm file does not take it"):
        take(path, tmp_path / "out.webm")
    assert len(pictures(tmp_path / "out.webm", 64, 96)) == 75


def test_reading_that_fails_midway_is_said(tmp_path, monkeypatch):
    path = source(tmp_path, "whole.mp4", "-c:a", "aac")
    span = Sound._span

    def failing(self, packet):
        if packet.pts > 48000:
            raise OSError(5, "Input/output error")
        return span(self, packet)

    monkeypatch.setattr(Sound, "_span", failing)
    with pytest.warns(UserWarning, match=r"left out from 0.9\d s on: it cannot be read further .Input/output error"):
        take(path, tmp_path / "out.mp4")
    assert len(pictures(tmp_path / "out.mp4", 64, 96)) == 75


def test_a_file_without_sound_is_refused(tmp_path):
    path = tmp_path / "silent.mp4"
    ffmpeg("-f", "lavfi", "-i", FLASHES.format(seconds=1), path)
    window = Window(begin=Fraction(0), end=Fraction(1), frame=Fraction(1, 25))
    with pytest.raises(SourceError, match="no sound that FFmpeg can decode"):
        Sound(MediaFile(str(path), Limits()), str(path), window)
    (tmp_path / "text.wav").write_text("no sound at all, but a text " * 20)
    with pytest.raises(SourceError, match="convert it to wav or flac"):
        Sound(SoundFile(str(tmp_path / "text.wav"), Limits()), "text.wav", window)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.m4a", "a.ogg", "a.aac"])
def test_files_of_sound_alone_are_read(tmp_path, name):
    path = source(tmp_path, "silent.mp4", "-an")
    ffmpeg("-f", "lavfi", "-i", CLICKS.format(seconds=3, rate=44100), tmp_path / name)
    window = Window(begin=Fraction(0), end=Fraction(3), frame=Fraction(1, 25))
    opened = functools.partial(Sound, SoundFile(str(tmp_path / name), Limits()), name, window, from_start=True)
    frames = pictures(path, 64, 96)
    with VideoWriter(
        tmp_path / "out.mp4", size=(64, 96), time_base=Fraction(1, 25), frame_rate=Fraction(25), sound=opened
    ) as out:
        out.write(frames, np.arange(75))
    clicks, _, last = heard(tmp_path / "out.mp4")
    assert clicks[-6:] == pytest.approx([number * 0.48 for number in range(1, 7)], abs=0.03)
    assert last == pytest.approx(3, abs=0.04)


def test_the_reader_tells_of_sound(tmp_path):
    with VideoFile(source(tmp_path, "aac.mp4", "-c:a", "aac", "-ac", 2)) as video:
        assert video.info.details["audio"] == {"codec": "aac", "sample_rate": 48000, "channels": 2, "streams": 1}
    with VideoFile(source(tmp_path, "silent.mp4", "-an")) as video:
        assert video.info.details["audio"] is None

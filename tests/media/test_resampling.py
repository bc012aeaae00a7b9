"""``fps``: at every instant the frame that the source shows then, from files, arrays and iterables, and from the middle
on as from the start."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from support.media import barcodes, indices, write_media
from support.seeking import read, spy

from longvid import VideoSession, load_model
from longvid.errors import SourceError
from longvid.media.sources import open_source

VARIABLE = [0, 1, 5, 6, 30, 31, 32, 40, 41, 60]
RATES = [60, Fraction(60000, 1001), 24, 16, 8, 30, Fraction(1, 2)]


def shown(times, end, fps):
    """The last frame that begins at each instant or before it, by counting."""
    total = math.ceil((end - times[0]) * fps)
    return [max(i for i, time in enumerate(times) if time <= times[0] + n / Fraction(fps)) for n in range(total)]


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_the_frame_at_each_instant_is_the_one_that_the_source_shows(tmp_path, suffix, fps):
    path = write_media(tmp_path / f"a.{suffix}", barcodes(10), pts=VARIABLE, rate=24)
    with open_source(path) as video:
        blocks = list(video.blocks())
        times = [Fraction(p) * video.info.time_base for block in blocks for p in block.pts_T.tolist()]
        end = times[-1] + video.last_duration() * video.info.time_base
    frames, stamps, _ = read(path, fps=fps)
    assert indices(frames) == shown(times, end, fps)
    assert stamps.tolist() == list(range(len(frames)))
    with open_source(path, fps=fps) as video:
        assert (video.info.time_base, video.info.frame_rate) == (1 / Fraction(fps), fps)
        assert video.last_duration() == 1
        assert video.count_frames() == len(frames)
        assert video.fingerprint()["fps"] == str(Fraction(fps))


@pytest.mark.parametrize("fps", RATES)
def test_arrays_and_iterables_are_resampled_alike(fps):
    array = barcodes(40)
    expected = shown([Fraction(n, 24) for n in range(40)], Fraction(40, 24), fps)
    for make in (lambda: array, lambda: iter([array[:7], array[7], array[8:]])):
        with open_source(make(), frame_rate=24, fps=fps) as source:
            blocks = list(source.blocks())
        assert indices(np.concatenate([block.frames_THWC for block in blocks])) == expected
        stamps = np.concatenate([block.pts_T for block in blocks])
        assert stamps.tolist() == list(range(len(expected)))
    if len(expected) > 5:
        with open_source(array, frame_rate=24, fps=fps, start=2, frames=3) as source:
            assert source.count_frames() == 3
            assert indices(np.concatenate([block.frames_THWC for block in source.blocks()])) == expected[2:5]


def test_from_any_instant_on_it_is_the_slice_of_a_full_read(tmp_path, monkeypatch):
    path = write_media(tmp_path / "a.mp4", barcodes(200), options={"g": "12", "preset": "ultrafast"})
    for fps in (60, 7):
        frames, stamps, index = read(path, fps=fps)
        decoded = spy(monkeypatch)
        for first in (0, 1, len(frames) // 2, len(frames) - 1, len(frames)):
            for known in (index, None):
                rest, later, _ = read(path, first=first, index=known, fps=fps)
                assert np.array_equal(rest, frames[first:])
                assert later.tolist() == stamps[first:].tolist()
        assert True in decoded.seeks


def test_a_window_counts_the_frames_that_come_out(tmp_path):
    path = write_media(tmp_path / "a.mp4", barcodes(24))
    assert indices(read(path, fps=48, start=4, frames=5)[0]) == [2, 2, 3, 3, 4]
    with open_source(path, fps=12, start=12) as video, pytest.raises(SourceError, match="has 12 frames"):
        list(video.blocks())


def test_a_stopped_run_continues_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
    path, model = (
        write_media(tmp_path / "a.mp4", barcodes(60), pts=[n * n // 8 + n for n in range(60)]),
        load_model("tiny"),
    )

    def run(name, stop=None):
        def watch(event):
            if event.index == stop:
                session.stop()

        with VideoSession(model, device="cpu", chunk_frames=4, callbacks=[watch]) as session:
            return session.encode(path, tmp_path / name, fps=16, durability="rename")

    from longvid.store.reader import open_store

    whole = run("whole.zarr")
    assert not run("a.zarr", 12).complete
    assert run("a.zarr").frames == whole.frames
    a, b = open_store(tmp_path / "whole.zarr"), open_store(tmp_path / "a.zarr")
    assert np.array_equal(a.read(0, a.num_latents), b.read(0, b.num_latents))
    assert a.frame_pts.tolist() == b.frame_pts.tolist() == list(range(a.num_frames))
    assert a.metadata.reading.fps == 16


def test_rates_are_the_numbers_that_were_written(tmp_path):
    path = write_media(tmp_path / "a.mp4", barcodes(5))
    for given in (barcodes(5), path):
        with open_source(given, fps=59.94) as source:
            assert source.info.frame_rate == Fraction(2997, 50)
        for name in ("fps", "frame_rate"):
            for wrong in (float("nan"), float("inf"), 0, -1):
                with pytest.raises(SourceError, match=f"{name}={wrong} is not a number of frames"):
                    open_source(given, **{name: wrong})

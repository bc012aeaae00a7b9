"""Animated WebP: frames, times, transparency, resume and damage."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from PIL import Image
from support.ffmpeg import pictures
from support.media import barcodes, collect, indices

from longvid import VideoSession, load_model
from longvid.errors import SourceError
from longvid.media.sources import open_source
from longvid.runtime.repair import repair
from longvid.store.reader import open_store

DURATIONS = [100, 50, 200, 100, 300]


def made(path, frames=None, **options):
    images = [Image.fromarray(frame) for frame in (barcodes(5) if frames is None else frames)]
    durations = (DURATIONS * len(images))[: len(images)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, lossless=True, **options)
    return path


def test_frames_come_with_their_times(tmp_path):
    path = made(tmp_path / "a.webp")
    frames, times = collect(video := open_source(path))
    assert np.array_equal(frames, barcodes(5))
    assert times.tolist() == [0, 100, 150, 350, 450]
    assert video.last_duration() == 300
    assert video.info.num_frames == 5
    assert np.array_equal(frames, pictures(path, *frames.shape[1:3]))
    part, _ = collect(video := open_source(path, start=2, frames=1))
    assert np.array_equal(part, frames[2:3])
    assert video.last_duration() == 200


def test_frames_are_resampled(tmp_path):
    frames, _ = collect(video := open_source(made(tmp_path / "a.webp"), fps=20))
    assert indices(frames) == [0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4]
    assert video.info.num_frames == 15
    later, _ = collect(open_source(tmp_path / "a.webp", fps=20, start=4, frames=5))
    assert np.array_equal(later, frames[4:9])


def test_transparent_pixels_are_composited(tmp_path):
    picture = np.zeros((3, 64, 96, 4), np.uint8)
    picture[..., 0], picture[..., 3] = 200, 128
    picture[:, :8, :, 0] = np.array([10, 20, 30])[:, None, None]
    with pytest.warns(UserWarning, match="transparent pixels"):
        frames, _ = collect(open_source(made(tmp_path / "a.webp", picture, exact=True), background="#0000ff"))
    assert np.abs(frames[:, 32, 32].astype(int) - [100, 0, 127]).max() <= 2


def test_stopped_continued_and_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
    path, model = made(tmp_path / "a.webp", barcodes(24)), load_model("tiny")

    def encode(store, stop=None):
        def watch(event):
            if event.index == stop:
                session.stop()

        with VideoSession(model, device="cpu", chunk_frames=4, callbacks=[watch]) as session:
            return session.encode(path, store, durability="rename")

    encode(tmp_path / "whole.zarr")
    whole = open_store(tmp_path / "whole.zarr")
    for stop in range(4):
        assert not encode(tmp_path / f"{stop}.zarr", stop).complete
        assert encode(tmp_path / f"{stop}.zarr").complete
        store = open_store(tmp_path / f"{stop}.zarr")
        assert np.array_equal(whole.read(0, whole.num_latents), store.read(0, store.num_latents))
        assert whole.frame_pts.tolist() == store.frame_pts.tolist()
    file = next((tmp_path / "0.zarr" / "latents").glob("c.2.*"))
    file.write_bytes(bytes(file.stat().st_size))
    with VideoSession(model, device="cpu", chunk_frames=4) as session:
        assert repair(session, tmp_path / "0.zarr").ok


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("on_error", ["keep", "conceal"])
def test_a_file_that_is_cut_follows_on_error(tmp_path, noise, on_error):
    path = made(tmp_path / "a.webp", noise)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(SourceError, match="is cut short: its header declares") as caught:
        open_source(path)
    assert caught.value.kind == "truncated"
    with pytest.warns(UserWarning, match="the video ends there, after 3 frames"):
        frames, _ = collect(video := open_source(path, on_error=on_error))
    assert np.array_equal(frames, noise[:3])
    assert video.damage == 3
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SourceError, match="cut short: it has no whole frame"):
        open_source(path, on_error=on_error)


def test_damage_in_the_middle_follows_on_error(tmp_path, noise):
    path = made(tmp_path / "a.webp", noise)
    data = bytearray(path.read_bytes())
    third = [at for at in range(len(data)) if data[at : at + 4] == b"ANMF"][2]
    data[third + 60 : third + 5000] = b"\x5a" * 4940
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"frame 2 .* cannot be decoded: .*--on-error keep"):
        collect(open_source(path))
    with pytest.warns(UserWarning, match="the video ends there, after 2 frames"):
        frames, _ = collect(open_source(path, on_error="keep"))
    assert np.array_equal(frames, noise[:2])
    blocks = list(open_source(path, on_error="conceal").blocks())
    assert [bool(block.valid_T[0]) for block in blocks] == [True, True, False, False, False]
    assert np.array_equal(blocks[4].frames_THWC[0], noise[1])


def test_what_it_does_not_take_is_refused(tmp_path, monkeypatch):
    path = made(tmp_path / "a.webp")
    for option in ({"frame_rate": 25}, {"follow_seconds": 1.0}):
        with pytest.raises(SourceError, match=r"says how long each frame is shown .* leave --"):
            open_source(path, **option)
    with pytest.raises(SourceError, match="5 frames"):
        open_source(path, start=5)
    found = builtins.__import__

    def without_pillow(name, *arguments):
        if name == "PIL":
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(SourceError, match="pip install pillow"):
        open_source(path)

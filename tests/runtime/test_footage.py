"""Every kind of footage through a store: stopped after any chunk and continued with the same bits, and decoded to mp4
with the same frames, times and shape."""

from __future__ import annotations

import numpy as np
import pytest
from support.footage import KINDS

from longvid import VideoSession, load_model
from longvid.cli.info import describe_store
from longvid.media.sources import open_source
from longvid.store.reader import open_store

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(is interlaced|begins in the middle|has transparent pixels|has no time|because 97x63 is odd)"
)
CHUNK = 4


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


def encode(model, source, store, stop_after=None, **options):
    def watch(event):
        if event.index == stop_after:
            session.stop()

    with VideoSession(model, device="cpu", chunk_frames=CHUNK, callbacks=[watch]) as session:
        return session.encode(source, store, durability="rename", **options)


def aspect(info):
    return info.width * info.sample_aspect_ratio / info.height


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_any_chunk_and_decoded(kind, model, tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
    make, options = KINDS[kind]
    source = make(tmp_path)
    with open_source(source, **options) as video:
        info, blocks = video.info, list(video.blocks())
    frames = np.concatenate([block.frames_THWC for block in blocks])
    times = [float((pts - blocks[0].pts_T[0]) * info.time_base) for block in blocks for pts in block.pts_T.tolist()]
    encode(model, source, tmp_path / "whole.zarr", **options)
    whole = open_store(tmp_path / "whole.zarr")
    assert whole.num_frames == len(frames)
    for stop in range(len(frames) // CHUNK - 1):
        name = tmp_path / f"{stop}.zarr"
        assert not encode(model, source, name, stop, **options).complete
        assert encode(model, source, name, **options).complete
        store = open_store(name)
        assert np.array_equal(whole.read(0, whole.num_latents), store.read(0, store.num_latents))
        assert whole.frame_pts.tolist() == store.frame_pts.tolist()

    with VideoSession(model, device="cpu") as session:
        session.decode(tmp_path / "whole.zarr", tmp_path / "again.mp4")
    with open_source(tmp_path / "again.mp4") as video:
        back, blocks = video.info, list(video.blocks())
    stamps = [float(pts * back.time_base) for block in blocks for pts in block.pts_T.tolist()]
    assert stamps == pytest.approx(times, abs=max(1e-3, float(back.time_base)))
    assert float(aspect(back) / aspect(info)) == pytest.approx(1, abs=5e-3)
    assert (back.height, back.width) == (info.height, info.width)
    # each frame is nearer to its own in the source than to one that is turned or mirrored
    shown = np.concatenate([block.frames_THWC for block in blocks]).astype(float)
    others = [frames[:, ::-1], frames[:, :, ::-1], frames[:, ::-1, ::-1]]
    far = [np.abs(shown - other).mean() for other in (frames, *others)]
    assert np.argmin(far) == 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("turned and mirrored", "and mirrored, as players show it"),
        ("clean aperture", "cropped to its clean aperture: 80x48 from column 8, row 8"),
        ("pixels that are not square", "(512/315), kept as 512/315"),
        ("square pixels", "resampled to square pixels"),
        ("two fields a frame", "interlaced, fields made whole by the filter bwdif"),
        ("begins inside a group", "packets were skipped"),
        ("two matrices", "25 frames per second are assumed"),
        ("padded", "resized from 96x64, --fit pad"),
        ("transparent", "transparent pixels composited on #204060"),
        ("last picture held", "the last frame is shown for 2"),
        ("30 frames a second", "resampled from 25 to 30 frames per second"),
    ],
)
def test_info_says_what_was_decided(kind, words, model, tmp_path):
    make, options = KINDS[kind]
    encode(model, make(tmp_path), tmp_path / "a.zarr", frames=4 if kind != "last picture held" else None, **options)
    assert words in describe_store(str(tmp_path / "a.zarr"))[1]

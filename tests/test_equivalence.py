"""Whatever way a video goes in, the same chunks run: the same bits come out, and exactly as many frames."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid import VideoSession, load_model, open_store
from longvid.media.output.video_writer import VideoWriter
from longvid.media.sources import open_source

LENGTHS = range(1, 19)
"every remainder of a chunk, in videos of one to three chunks"


@pytest.fixture(scope="module")
def session(vae):
    with VideoSession(vae) as s:
        yield s


@pytest.fixture(scope="module", params=["cogvideox", "wan2.1-nano", "wan2.2-nano"])
def family_session(request, vae):
    model = vae if request.param == "cogvideox" else load_model(request.param, random_weights=1)
    with VideoSession(model, device="cpu") as s:
        yield s


def noise(num_frames, height=16, width=24):
    return np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def pushed(session, frames, step):
    with session.encoder() as enc:
        parts = [enc.push(frames[i : i + step]) for i in range(0, len(frames), step)]
        return torch.cat([*parts, enc.finish()], dim=2)


def pulled(session, latents, step, **options):
    with session.decoder(**options) as dec:
        parts = [dec.push(latents[:, :, i : i + step]) for i in range(0, latents.shape[2], step)]
        return np.concatenate([*parts, dec.finish()])


@pytest.mark.parametrize("num_frames", LENGTHS)
def test_every_length_pushed_there_and_back(family_session, num_frames):
    session, frames = family_session, noise(num_frames)
    latents = pushed(session, frames, num_frames)
    assert latents.shape[2] == session.plan(height=16, width=24).schedule.num_latents(num_frames)
    for step in (1, 7):
        assert torch.equal(pushed(session, frames, step), latents)
    back = pulled(session, latents, latents.shape[2], num_frames=num_frames, size=(16, 24))
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    for step in (1, 3):
        again = pulled(session, latents, step, num_frames=num_frames, size=(16, 24))
        np.testing.assert_array_equal(again, back)


@pytest.mark.parametrize("name", ["wan2.1-nano", "wan2.2-nano"])
@pytest.mark.parametrize("num_frames", range(19, 41))
def test_longer_videos_of_wan_come_back_with_every_frame(name, num_frames):
    with VideoSession(load_model(name, random_weights=1), device="cpu", chunk_frames=16) as session:
        latents = pushed(session, noise(num_frames, 16, 16), 40)
        assert latents.shape[2] == 1 + -(-(num_frames - 1) // 4)
        back = pulled(session, latents, 40, num_frames=num_frames, size=(16, 16))
    assert back.shape == (num_frames, 16, 16, 3)


@pytest.mark.parametrize("num_frames", [*range(1, 11), 17, 18])
def test_every_length_by_file_there_and_back(session, num_frames, tmp_path):
    clip, store, back = tmp_path / "clip.mp4", tmp_path / "a.zarr", tmp_path / "back.mp4"
    write_clip(clip, noise(num_frames))
    with open_source(clip) as source:
        frames = np.concatenate([block.frames_THWC for block in source.blocks()])
    assert len(frames) == num_frames
    assert session.encode(clip, store).frames == num_frames
    opened = open_store(store)
    assert (opened.num_frames, opened.complete) == (num_frames, True)
    expected = pushed(session, frames, 5)[0].movedim(1, 0).half().numpy()
    np.testing.assert_array_equal(opened.latents[:], expected)
    assert session.decode(store, back).frames == num_frames
    with open_source(back) as source:
        assert (source.info.height, source.info.width) == (16, 24)
        assert sum(len(block.frames_THWC) for block in source.blocks()) == num_frames


def write_clip(path, frames):
    from fractions import Fraction

    with VideoWriter(path, size=frames.shape[1:3], time_base=Fraction(1, 24), frame_rate=Fraction(24)) as writer:
        writer.write(frames, np.arange(len(frames)))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(sum))
def test_any_slicing_gives_the_same_bits(family_session, lengths):
    session, frames = family_session, noise(sum(lengths), 8, 16)
    expected = pushed(session, frames, len(frames))
    with session.encoder() as enc:
        parts, at = [], 0
        for n in lengths:
            parts.append(enc.push(frames[at : at + n]))
            at += n
        got = torch.cat([*parts, enc.finish()], dim=2)
    assert torch.equal(got, expected)


def test_arrays_iterables_and_zarr_are_the_same_source(session, tmp_path):
    import zarr

    frames = noise(21)
    array = zarr.create_array(tmp_path / "frames.zarr", shape=frames.shape, dtype="uint8", chunks=(4, 16, 24, 3))
    array[:] = frames
    sources = {
        "numpy": frames,
        "torch": torch.from_numpy(frames),
        "zarr": array,
        "list": [frames[:2], frames[2:3], frames[3:]],
        "generator": (frame for frame in frames),
    }
    latents = {}
    for name, source in sources.items():
        session.encode(source, tmp_path / f"{name}.zarr")
        latents[name] = open_store(tmp_path / f"{name}.zarr").latents[:]
    for name, got in latents.items():
        np.testing.assert_array_equal(got, latents["numpy"], err_msg=name)


def test_odd_sizes_are_padded_and_cropped_back(session, tmp_path):
    frames = noise(11, 17, 30)
    session.encode(frames, tmp_path / "a.zarr")
    assert open_store(tmp_path / "a.zarr").latents.shape == (5, 16, 3, 4)
    got = []
    session.decode(tmp_path / "a.zarr", got.append)
    assert np.concatenate(got).shape == frames.shape


def test_decoding_to_zarr_equals_decoding_to_a_callable_and_goes_in_again(session, tmp_path):
    frames = noise(20)
    session.encode(frames, tmp_path / "a.zarr")
    got = []
    session.decode(tmp_path / "a.zarr", got.append)
    session.decode(tmp_path / "a.zarr", tmp_path / "back.zarr")
    with open_source(tmp_path / "back.zarr") as source:
        np.testing.assert_array_equal(np.concatenate([b.frames_THWC for b in source.blocks()]), np.concatenate(got))


def test_file_run_equals_itself(session, tmp_path):
    frames = noise(33)
    for name in ("a", "b"):
        session.encode(frames, tmp_path / f"{name}.zarr", representation="sample", seed=9)
    a, b = (open_store(tmp_path / f"{n}.zarr").latents[:] for n in "ab")
    np.testing.assert_array_equal(a, b)


def test_moments_in_the_store(session, tmp_path):
    frames = noise(12)
    session.encode(frames, tmp_path / "a.zarr", representation="moments")
    store = open_store(tmp_path / "a.zarr")
    assert store.moments.shape == (5, 32, 2, 3)
    np.testing.assert_array_equal(store.moments[:, :16], store.latents[:])

"""Resuming: stopped after any chunk, with any placement, in either direction, the bits are those of one run."""

import numpy as np
import pytest
import zarr

from longvid import StoreError, VideoSession, load_model

HEIGHT, WIDTH, NUM_FRAMES = 32, 48, 44


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(5).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["tiny", "cogvideox-nano", "wan2.1-nano", "wan2.2-nano"])
def model(request):
    return load_model(request.param, random_weights=None if request.param == "tiny" else 1)


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 6000)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 6 * HEIGHT * WIDTH * 3)


class StopAfter:
    def __init__(self, chunk):
        self.chunk, self.session = chunk, None

    def __call__(self, event):
        if event.index == self.chunk:
            self.session.stop()


def arrays(path):
    return {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}


def run(model, direction, source, path, *, stop_after=None, offload="none", **options):
    stop = StopAfter(stop_after)
    with VideoSession(model, device="cpu", layout="contiguous", offload=offload, callbacks=[stop]) as session:
        stop.session = session
        return getattr(session, direction)(source, path, **options)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_stopped_after_any_chunk_the_bits_are_the_same(model, video, tmp_path, direction, offload, every):
    source = video
    if direction == "decode":
        source = tmp_path / "latents.zarr"
        run(model, "encode", video, source)
    run(model, direction, source, tmp_path / "whole.zarr")
    whole = arrays(tmp_path / "whole.zarr")
    num_chunks = model.geometry.schedule.num_chunks(NUM_FRAMES)
    for chunk in range(0, num_chunks - 1, every):
        path = tmp_path / f"{chunk}.zarr"
        first = run(model, direction, source, path, stop_after=chunk, offload=offload)
        assert not first.complete
        second = run(model, direction, source, path, offload="all" if offload == "none" else "none")
        assert second.complete
        assert second.resumed_from_frame <= first.frames == model.geometry.schedule.full(chunk).frame_stop
        found = arrays(path)
        assert found.keys() == whole.keys()
        for name in whole:
            np.testing.assert_array_equal(found[name], whole[name], err_msg=f"{name} after chunk {chunk}")


def test_a_run_that_is_stopped_after_every_chunk_comes_to_its_end(model, video, tmp_path):
    run(model, "encode", video, tmp_path / "whole.zarr", representation="moments")
    for chunk in range(99):
        if run(model, "encode", video, tmp_path / "a.zarr", stop_after=chunk, representation="moments").complete:
            break
    whole, found = arrays(tmp_path / "whole.zarr"), arrays(tmp_path / "a.zarr")
    assert all(np.array_equal(whole[name], found[name]) for name in whole)


CHANGES = {
    "source.content": {"source": "other"},
    "source.end": {"frames": 30},
    "source.start": {"start": 3},
    "model.weights": {"model": "scalar"},
    "compute.dtype": {"dtype": "bfloat16"},
    "store_dtype": {"store_dtype": "float32"},
    "representation": {"representation": "moments"},
    "seed": {"representation": "sample", "seed": 4},
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_decides_the_bits_may_not_change_and_nothing_is_written(video, tmp_path, field):
    def attempt(change, stop_after=None):
        model = load_model("cogvideox-nano", random_weights=1)
        if change.get("model"):
            model.encoder.conv_in.conv.bias.data[0] += 1e-3
        source = video.copy()
        if change.get("source"):
            source[0, 0, 0, 0] ^= 1
        stop = StopAfter(stop_after)
        settings = {"device": "cpu", "layout": "contiguous", "dtype": change.get("dtype"), "callbacks": [stop]}
        options = {k: v for k, v in change.items() if k not in ("model", "source", "dtype")}
        with VideoSession(model, **settings) as session:
            stop.session = session
            return session.encode(source, tmp_path / "a.zarr", **options)

    first = {"representation": "sample", "seed": 3} if field == "seed" else {}
    attempt(first, stop_after=2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(StoreError, match=field.replace(".", r"\.") + " is .* in the store and ") as caught:
        attempt(CHANGES[field])
    assert caught.value.kind == "mismatch"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert attempt(first).complete

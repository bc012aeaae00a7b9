"""A decode from the middle computes its warm-up and what was asked for, and has the bits of a decode of the whole."""

import numpy as np
import pytest
import torch

from longvid import ModelError, VideoSession, load_model
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.planning.warmup import Warmup
from longvid.runtime.admission import AdmissionControl
from longvid.runtime.span import Span

WARMUP = Warmup(direction="decode", chunks=3, ready={"a": 1, "b": 2, "c": 3}, begins={"a": 1, "b": 2, "c": 3})


def test_a_span_begins_as_early_as_its_warmup_and_never_before_the_video():
    assert Span.of(0, None, pytest.fail) == Span()
    assert Span.of(3, None, lambda: WARMUP) == Span(0, 3)
    span = Span.of(10, 12, lambda: WARMUP)
    assert (span.start, span.first, span.stop) == (7, 10, 12)
    assert [span.is_warmup(chunk) for chunk in (7, 9, 10)] == [True, True, False]
    assert [span.last_layer(chunk) for chunk in (7, 8, 9, 10)] == ["a", "b", "c", None]


def test_a_proof_is_one_chunk_more_and_all_that_is_computed_anyway():
    assert Span.of(10, None, lambda: WARMUP, proof=True) == Span(6, 9, None, WARMUP)
    assert Span.of(10, None, lambda: WARMUP, origin=10, proof=True) == Span(7, 10, None, WARMUP)
    assert Span.of(4, None, lambda: WARMUP, proof=True) == Span(0, 0)  # what is stored of chunks 0 to 3 is compared too
    assert Span.of(3, None, lambda: WARMUP, origin=1, proof=True) == Span(0, 1)


def decoded(session, store, **window):
    pieces = []
    report = session.decode(store, pieces.append, **window)
    return np.concatenate(pieces), report


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (330, 16, 24, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("tiny") / "a.zarr"
    with VideoSession("tiny", device="cpu") as session:
        session.encode(frames, path)
    return path


@pytest.mark.parametrize("chunk_frames", [16, 4])
def test_from_any_frame_of_tiny_it_is_the_slice_of_the_whole(tiny_store, chunk_frames):
    with VideoSession("tiny", device="cpu", chunk_frames=chunk_frames) as session:
        whole, _ = decoded(session, tiny_store)
        for start in (*range(0, 12 * chunk_frames, 7), *np.random.default_rng(1).integers(0, 325, 20).tolist()):
            part, _ = decoded(session, tiny_store, start=start, frames=5)
            np.testing.assert_array_equal(part, whole[start : start + 5], err_msg=str(start))


@pytest.mark.parametrize("name", ["wan2.1-nano", "wan2.2-nano"])
def test_from_the_middle_of_wan_it_is_the_slice_of_the_whole(name, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (32 * 7, 16, 16, 3), dtype=np.uint8)
    events = []
    model = load_model(name, random_weights=1)
    with VideoSession(model, device="cpu", chunk_frames=32, callbacks=[events.append]) as session:
        session.encode(frames, tmp_path / "a.zarr")
        whole, _ = decoded(session, tmp_path / "a.zarr")
        for start in (32 * 5 + 1, 32 * 6 + 7):
            events.clear()
            part, _ = decoded(session, tmp_path / "a.zarr", start=start, frames=5)
            np.testing.assert_array_equal(part, whole[start : start + 5], err_msg=str(start))
            assert len(events) <= 4 + 2


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """CogVideoX with all its layers, and a store of 52 chunks of its latents."""
    torch.manual_seed(1)
    model = CogVideoXVAE(CogVideoXConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2)).eval()
    frames = np.random.default_rng(2).integers(0, 256, (1 + 8 * 52, 8, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("deep") / "a.zarr"
    with VideoSession(model) as session:
        session.encode(frames, path)
        whole, _ = decoded(session, path)
    return model, path, whole


def test_from_the_middle_of_a_deep_model_it_is_the_slice_of_the_whole(deep):
    model, store, whole = deep
    events = []
    with VideoSession(model, callbacks=[events.append]) as session:
        for start in (8 * 38, 8 * 39, 8 * 39 + 1, 8 * 45 + 3):
            events.clear()
            part, report = decoded(session, store, start=start, frames=9)
            np.testing.assert_array_equal(part, whole[start : start + 9], err_msg=str(start))
            assert report.frames == 9
            assert sum(event.num_frames for event in events) == 9
            assert len(events) <= 38 + 3
            assert events[-1].index == (start + 8 - 1) // 8


@pytest.mark.slow
def test_from_every_frame_of_a_deep_model_it_is_the_slice_of_the_whole(deep):
    model, store, whole = deep
    with VideoSession(model) as session:
        for start in (*range(8 * 41), *np.random.default_rng(3).integers(0, len(whole) - 3, 20).tolist()):
            part, _ = decoded(session, store, start=start, frames=3)
            np.testing.assert_array_equal(part, whole[start : start + 3], err_msg=str(start))


def test_negative_control_half_the_warmup_is_seen(deep, monkeypatch):
    model, store, whole = deep
    real = AdmissionControl.warmup

    def half(self, direction, schedule):
        found = real(self, direction, schedule)
        return Warmup(direction=direction, chunks=found.chunks // 2, ready=found.ready, begins=found.begins)

    monkeypatch.setattr(AdmissionControl, "warmup", half)
    with VideoSession(model) as session:
        part, _ = decoded(session, store, start=8 * 45, frames=9)
    assert not np.array_equal(part, whole[8 * 45 : 8 * 45 + 9])


def test_a_model_that_never_forgets_runs_from_frame_0(tiny_store, monkeypatch):
    def never(self, direction, schedule):
        raise ModelError("it never forgets")

    with VideoSession("tiny", device="cpu") as session:
        expected, _ = decoded(session, tiny_store, start=200, frames=20)
    events = []
    monkeypatch.setattr(AdmissionControl, "warmup", never)
    with VideoSession("tiny", device="cpu", callbacks=[events.append]) as session:
        got, _ = decoded(session, tiny_store, start=200, frames=20)
    np.testing.assert_array_equal(got, expected)
    assert events[0].index == 0


@pytest.mark.parametrize("stop_at", [1, 3])
def test_stopped_in_its_warmup_or_after_it_a_window_is_continued_to_the_same_bits(tiny_store, tmp_path, stop_at):
    out, events = tmp_path / "out.zarr", []

    def stop(event):
        events.append(event)
        if len(events) == stop_at:
            session.stop()

    with VideoSession("tiny", device="cpu", callbacks=[stop]) as session:
        assert not session.decode(tiny_store, out, start=200, frames=100).complete
    with VideoSession("tiny", device="cpu") as session:
        assert session.decode(tiny_store, out, start=200, frames=100).complete
        expected, _ = decoded(session, tiny_store, start=200, frames=100)
    np.testing.assert_array_equal(open_frames(out), expected)


def open_frames(path):
    from longvid.media.sources import open_source

    with open_source(path) as source:
        return np.concatenate([block.frames_THWC for block in source.blocks()])

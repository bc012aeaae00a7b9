"""Whole videos: what happens where a run, its store, its source or its model is not what it should be."""

import shutil
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
import zarr

from longvid import Durability, NonFiniteError, SessionStateError, StoreError, VideoSession, load_model, open_store
from longvid.store.verify import verify

EAGER = Durability(publish_seconds=0)


@pytest.fixture
def video():
    return np.random.default_rng(5).integers(0, 256, (60, 32, 48, 3), dtype=np.uint8)


@pytest.fixture
def nano():
    return load_model("cogvideox-nano", random_weights=1)


def stored(path):
    store = open_store(path)
    return {name: array[:] for name, array in store.arrays.items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


class Poison:
    """A hook that makes the output of a layer useless in some chunks."""

    def __init__(self, module, chunks, value=float("nan"), once=False):
        self.chunks, self.value, self.once, self.calls = set(chunks), value, once, 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        index, self.calls = self.calls, self.calls + 1
        if index in self.chunks:
            if self.once:
                self.chunks.discard(index)
            return torch.full_like(output, self.value)
        return None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_chunk_that_is_not_finite_is_never_published(nano, video, tmp_path, value, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 3)
    Poison(nano.encoder.conv_in.conv, {3}, value)
    with VideoSession(nano, layout="contiguous") as session, pytest.raises(NonFiniteError, match="chunk 3") as caught:
        session.encode(video, tmp_path / "a.zarr", durability=EAGER)
    assert caught.value.chunk == 3
    assert open_store(tmp_path / "a.zarr").num_latents == 6
    # the weights are as they were: without the fault the same call resumes, to the bits of a run that never had one
    with VideoSession(load_model("cogvideox-nano", random_weights=1), layout="contiguous") as session:
        report = session.encode(video, tmp_path / "a.zarr")
        session.encode(video, tmp_path / "b.zarr")
    assert report.resumed_from_frame == 21
    assert same(stored(tmp_path / "a.zarr"), stored(tmp_path / "b.zarr"))


def test_quarantine_replaces_the_frames_of_such_a_chunk_and_marks_them(nano, video, tmp_path):
    with VideoSession(nano, layout="contiguous") as session:
        repaired = video.copy()
        repaired[25:33] = video[24]
        session.encode(repaired, tmp_path / "expected.zarr")
    Poison(nano.encoder.conv_in.conv, {3}, once=True)
    with VideoSession(nano, layout="contiguous") as session, pytest.warns(UserWarning, match="chunk 3 was encoded"):
        report = session.encode(video, tmp_path / "a.zarr", durability=EAGER, on_non_finite="quarantine")
    assert report.complete
    a, expected = stored(tmp_path / "a.zarr"), stored(tmp_path / "expected.zarr")
    assert np.array_equal(a["latents"], expected["latents"])
    assert np.flatnonzero(~a["frame_valid"]).tolist() == list(range(25, 33))
    assert expected["frame_valid"].all()
    assert verify(tmp_path / "a.zarr").ok
    with VideoSession(nano, layout="contiguous") as session:  # the marks go with the frames
        session.decode(tmp_path / "a.zarr", tmp_path / "f.zarr")
    assert np.array_equal(zarr.open_group(tmp_path / "f.zarr")["frame_valid"][:], a["frame_valid"])


@pytest.mark.parametrize(("source", "why"), [("first chunk", "no good frame"), ("one pass", "only once")])
def test_what_cannot_be_quarantined_says_why(nano, video, tmp_path, source, why):
    Poison(nano.encoder.conv_in.conv, {0 if source == "first chunk" else 2})
    pieces = video if source == "first chunk" else iter([video])
    with VideoSession(nano) as session, pytest.raises(NonFiniteError) as caught:
        session.encode(pieces, tmp_path / "a.zarr", on_non_finite="quarantine")
    assert why in str(caught.value)
    assert "on-non-finite" not in str(caught.value)  # it was given


def test_a_chunk_that_stays_useless_is_an_error_under_quarantine_too(nano, video, tmp_path):
    Poison(nano.encoder.conv_in.conv, range(2, 99))
    with VideoSession(nano) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteError):
            session.encode(video, tmp_path / "a.zarr", on_non_finite="quarantine")


@pytest.mark.parametrize("change", ["weights", "dtype", "load", "swap"])
def test_a_model_that_changes_midway_ends_the_run(nano, video, tmp_path, change, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 3)
    weight = nano.encoder.conv_in.conv.weight

    def meddle(event):
        if event.index != 2:
            return
        if change == "weights":
            with torch.no_grad():
                weight.mul_(1.0)
        elif change == "dtype":
            nano.to(torch.bfloat16)
        elif change == "load":
            nano.load_state_dict(load_model("cogvideox-nano", random_weights=2).state_dict())
        else:
            nano.encoder.conv_in.conv.weight = torch.nn.Parameter(weight.clone())

    with VideoSession(nano, callbacks=[meddle]) as session:
        with pytest.raises(SessionStateError, match="the model was changed") as caught:
            session.encode(video, tmp_path / "a.zarr", durability=EAGER)
        assert "chunk 3 of encode" in str(caught.value)
        assert "conv_in" in str(caught.value)
    assert not open_store(tmp_path / "a.zarr").complete  # what was whole until then can be continued


def test_too_little_room_is_told_before_anything_is_computed(nano, video, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with VideoSession(nano) as session:
        with pytest.raises(StoreError, match=r"at least .* of disk, and .* are free") as caught:
            session.encode(video, tmp_path / "a.zarr")
        assert caught.value.kind == "full"
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        session.encode(video, tmp_path / "a.zarr")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
        with pytest.raises(StoreError, match=r"at least .* of disk"):
            session.decode(tmp_path / "a.zarr", tmp_path / "f.zarr")
    assert not (tmp_path / "f.zarr").exists()


def test_a_complete_store_is_left_as_it_is_and_another_run_is_told_apart(nano, video, tmp_path):
    with VideoSession(nano) as session:
        session.encode(video, tmp_path / "a.zarr")
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        report = session.encode(video, tmp_path / "a.zarr")
        assert (report.frames, report.resumed_from_frame, report.complete) == (60, 60, True)
        with pytest.raises(StoreError, match=r"source\.end is 60 in the store and 59 in this run") as caught:
            session.encode(video, tmp_path / "a.zarr", frames=59)
        assert caught.value.kind == "mismatch"
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
        session.encode(video, tmp_path / "a.zarr", frames=59, overwrite=True)
    assert open_store(tmp_path / "a.zarr").num_frames == 59


def test_a_stop_while_no_run_is_running_does_nothing(nano, video, tmp_path):
    with VideoSession(nano) as session:
        assert session.stop() is False
        assert session.encode(video, tmp_path / "a.zarr").complete
        assert session.stop() is False  # a late one
        assert session.decode(tmp_path / "a.zarr", lambda _: None).complete
    assert session.stop() is False


def test_a_stop_reaches_the_run_that_is_running_and_no_other(nano, video, tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 3)
    asked = []

    def stop(event):
        if not asked:
            asked.append(session.stop())

    with VideoSession(nano, callbacks=[stop]) as session:
        first = session.encode(video, tmp_path / "a.zarr")
        second = session.encode(video, tmp_path / "a.zarr")
    assert asked == [True]
    assert (first.complete, first.frames) == (False, 9)
    assert (second.complete, second.resumed_from_frame) == (True, 9)  # three latents


@pytest.mark.parametrize("overwrite", [False, True])
def test_quarantine_goes_with_a_run_that_does_not_resume(nano, video, tmp_path, overwrite):
    if overwrite:
        with VideoSession(nano) as session:
            session.encode(video[:9], tmp_path / "a.zarr")
    Poison(nano.encoder.conv_in.conv, {3}, once=True)
    options = {"on_non_finite": "quarantine", "resume": "never", "overwrite": overwrite, "durability": EAGER}
    with VideoSession(nano) as session, pytest.warns(UserWarning, match="chunk 3 was encoded"):
        assert session.encode(video, tmp_path / "a.zarr", **options).complete
    assert np.flatnonzero(~open_store(tmp_path / "a.zarr").frame_valid).tolist() == list(range(25, 33))


def test_resume_keeps_the_numerics_of_the_run(nano, video, tmp_path, monkeypatch):
    """A probe that would decide otherwise today must not change the bits of a store that was begun yesterday."""

    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 3)

    class Stop:
        def __call__(self, event):
            if event.index == 2:
                self.session.stop()

    stop = Stop()
    with VideoSession(nano, layout="channels_last", callbacks=[stop]) as session:
        stop.session = session
        assert not session.encode(video, tmp_path / "a.zarr").complete
    with VideoSession(nano) as session:  # auto would be contiguous at this size
        report = session.encode(video, tmp_path / "a.zarr")
        assert report.resumed_from_frame == 21
    with VideoSession(nano, layout="channels_last") as session:
        session.encode(video, tmp_path / "b.zarr")
    assert same(stored(tmp_path / "a.zarr"), stored(tmp_path / "b.zarr"))
    assert open_store(tmp_path / "a.zarr").attrs["longvid"]["numerics"]["layout"] == "channels_last"
    expected = r"numerics\.layout is channels_last in the store"
    with VideoSession(nano, layout="contiguous") as session, pytest.raises(StoreError, match=expected):
        session.encode(video, tmp_path / "b.zarr")

"""Where the time of a run went: what events and the report say of it."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest
from support.clock import PATIENCE, Clock, wait_until_blocked

from longvid import VideoSession
from longvid.events import RunReport
from longvid.runtime.prefetch import StopRequest


def test_a_report_adds_up_what_the_chunks_took(vae, frames, tmp_path):
    events = []
    with VideoSession(vae, callbacks=[events.append]) as session:
        reports = [session.encode(frames, tmp_path / "a.zarr"), session.decode(tmp_path / "a.zarr", lambda _: None)]
    for report in reports:
        chunks = [event for event in events if event.direction == report.direction]
        assert len(chunks) == 4
        assert sum(c.compute_seconds for c in chunks) == pytest.approx(report.compute_seconds)
        for name in ("wait_seconds", "read_seconds", "write_seconds"):
            parts = [getattr(chunk, name) for chunk in chunks]
            assert all(part >= 0 for part in parts)
            assert sum(parts) <= getattr(report, name) + 1e-9  # the end of a run belongs to no chunk
        assert 0 < report.compute_seconds + report.wait_seconds <= report.seconds
        assert 0 < report.read_seconds <= report.seconds
        assert 0 < report.write_seconds <= report.seconds
        facts = report.to_dict()
        assert facts["compute_share"] == report.compute_share == report.compute_seconds / report.seconds
        assert RunReport(**{k: v for k, v in facts.items() if k != "compute_share"}) == report


def slices(frames, before=lambda number: None):
    """The video in parts of 8 frames, and what is done before each of them is read."""
    for number in range(len(frames) // 8):
        before(number)
        yield frames[8 * number : 8 * number + 8]


def test_a_slow_source_shows_as_reading_and_waiting(vae, frames, tmp_path, clock):
    def before(number):
        if number:  # the first part is read before the run, to know the size
            wait_until_blocked(StopRequest.wait)
            clock.jump()

    with VideoSession(vae) as session:
        report = session.encode(slices(frames, before), tmp_path / "a.zarr", frame_rate=25)
    assert 2 <= report.read_seconds / Clock.JUMP < 3
    assert 2 <= report.wait_seconds / Clock.JUMP < 3
    assert report.compute_seconds < Clock.JUMP


def test_a_slow_sink_shows_as_writing_and_waiting_also_at_the_end(vae, frames, tmp_path, clock):
    events, parts = [], []

    def sink(part):
        parts.append(part)
        if len(parts) == 1 or len(parts) == 4:
            wait_until_blocked(Future.result)
            clock.jump()

    with VideoSession(vae, callbacks=[events.append]) as session:
        session.encode(frames, tmp_path / "a.zarr")
        events.clear()
        report = session.decode(tmp_path / "a.zarr", sink)
    assert len(parts) == 4
    assert 2 <= report.write_seconds / Clock.JUMP < 3
    assert 2 <= report.wait_seconds / Clock.JUMP < 3
    assert 1 <= sum(event.wait_seconds for event in events) / Clock.JUMP < 2  # the end belongs to no chunk


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_reading_and_writing_go_on_while_chunks_are_computed(vae, frames, tmp_path, clock, direction):
    computing, beside = threading.Event(), threading.Event()

    def during_a_chunk(number):
        if number == 2 - (direction == "decode"):
            assert computing.wait(PATIENCE)
            clock.jump()
            beside.set()

    def callback(event):
        if event.direction == direction and not computing.is_set() and event.index == (direction == "decode"):
            computing.set()
            assert beside.wait(PATIENCE)

    parts = []
    with VideoSession(vae, callbacks=[callback]) as session:
        if direction == "encode":
            report = session.encode(slices(frames, during_a_chunk), tmp_path / "a.zarr", frame_rate=25)
        else:
            session.encode(frames, tmp_path / "a.zarr")
            report = session.decode(tmp_path / "a.zarr", lambda part: (parts.append(part), during_a_chunk(len(parts))))
    busy = report.read_seconds if direction == "encode" else report.write_seconds
    assert 1 <= busy / Clock.JUMP < 2
    assert report.wait_seconds < Clock.JUMP


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_events_of_a_resumed_run_count_on(vae, frames, tmp_path, direction, monkeypatch):
    """Also after another video in the same session, and for a window of a store."""
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 2)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 5 * frames[0].nbytes)
    video, window = np.concatenate([frames] * 2), {} if direction == "encode" else {"start": 5, "frames": 40}
    events, stops = [], []

    def watch(event):
        events.append(event)
        if len(events) in stops:
            session.stop()

    with VideoSession(vae, callbacks=[watch]) as session:
        session.encode(video, tmp_path / "latents.zarr")
        run, source = getattr(session, direction), video if direction == "encode" else tmp_path / "latents.zarr"
        events.clear()
        whole = run(source, tmp_path / "whole.zarr", **window)
        expected = [(e.index, e.num_frames, e.frames_done, e.frames_total) for e in events]
        events.clear()
        stops.append(3)
        first = run(source, tmp_path / "parts.zarr", **window)
        stopped_at = len(events)
        second = run(source, tmp_path / "parts.zarr", **window)
    assert expected[-1][2:] == (whole.frames, whole.frames)
    assert (first.complete, second.complete) == (False, True)
    assert 0 < second.resumed_from_frame <= first.frames == expected[2][2]
    again = events[stopped_at:]
    assert again[0].frames_done == second.resumed_from_frame
    new = [e for e in again if e.num_frames]
    assert [(e.index, e.frames_done, e.frames_total) for e in new] == [
        (index, done, total) for index, _, done, total in expected if done > second.resumed_from_frame
    ]
    assert sum(e.num_frames for e in again) == whole.frames - second.resumed_from_frame
    assert second.latent_frames == whole.latent_frames

"""Where the time of a run went: what events and the report say of it."""

import time

import numpy as np
import pytest

from longvid import VideoSession
from longvid.events import RunReport


def slices(frames, seconds):
    for i in range(0, len(frames), 8):
        time.sleep(seconds)
        yield frames[i : i + 8]


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


def test_a_slow_source_shows_as_reading_and_waiting(vae, frames, tmp_path):
    with VideoSession(vae) as session:
        session.encode(frames, tmp_path / "warm.zarr")
        report = session.encode(slices(frames, 0.2), tmp_path / "a.zarr", frame_rate=25)
    assert report.read_seconds >= 3 * 0.2  # the first slice is read before the run, to know the size
    assert report.wait_seconds > 0.3
    assert report.compute_share < 0.75


def test_a_slow_sink_shows_as_writing_and_waiting_also_at_the_end(vae, frames, tmp_path):
    events = []
    with VideoSession(vae, callbacks=[events.append]) as session:
        session.encode(frames, tmp_path / "a.zarr")
        events.clear()
        report = session.decode(tmp_path / "a.zarr", lambda _: time.sleep(0.3))
    assert report.write_seconds >= 1.2
    assert report.wait_seconds - sum(event.wait_seconds for event in events) > 0.3


def test_reading_and_writing_go_on_while_chunks_are_computed(vae, tmp_path):
    frames = np.zeros((65, 32, 48, 3), np.uint8)

    def busy(event):  # counts as neither
        time.sleep(0.05)

    with VideoSession(vae, callbacks=[busy]) as session:
        report = session.encode(slices(frames, 0.03), tmp_path / "a.zarr", frame_rate=25)
    assert report.read_seconds >= 8 * 0.03
    assert report.wait_seconds < report.read_seconds  # all of it, had nothing overlapped

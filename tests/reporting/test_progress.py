"""The progress bar: what it shows on a terminal and elsewhere, for one run after another and for a resumed run."""

import io
import re

import pytest
from support.runs import chunk_event, run_report, run_start

from longvid import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(bar, *, done, total, chunk=8):
    """A run that starts with ``done`` frames of an earlier one."""
    bar.run_started(run_start(frames_total=total))
    for index, frames in enumerate(range(done + chunk, total + 1, chunk)):
        event = chunk_event(index + done // chunk, num_frames=chunk, frames_done=frames, frames_total=total)
        bar(event)
    bar.run_finished(run_report(event))


def counts(text):
    """What the last state of each bar says: frames done and in all."""
    lines = [line.split("\r")[-1] for line in text.strip().split("\n")]
    return [tuple(map(int, re.search(r"(\d+)/(\d+) ", line).groups())) for line in lines]


@pytest.mark.parametrize("done", [0, 24])
def test_a_bar_starts_at_what_is_done_and_ends_full(done):
    terminal = Terminal()
    with ProgressBar(file=terminal) as bar:
        show(bar, done=done, total=48)
    first = re.search(r"(\d+)/48", terminal.getvalue())[1]
    assert int(first) == done
    assert counts(terminal.getvalue()) == [(48, 48)]


def test_every_run_has_a_bar_of_its_own():
    terminal = Terminal()
    with ProgressBar(file=terminal) as bar:
        show(bar, done=0, total=96)
        show(bar, done=24, total=48)
    assert counts(terminal.getvalue()) == [(96, 96), (48, 48)]


def test_elsewhere_there_are_lines():
    file = io.StringIO()
    with ProgressBar(file=file, interval=0) as bar:
        show(bar, done=24, total=48)
    assert file.getvalue().splitlines() == [f"encode: {n} of 48 frames" for n in (32, 40, 48)]


def test_lines_keep_their_distance_in_every_run():
    file = io.StringIO()
    with ProgressBar(file=file, interval=3600) as bar:
        show(bar, done=0, total=48)
        show(bar, done=24, total=48)
    assert file.getvalue() == ""


def test_a_warmup_is_told_and_counts_no_frames():
    terminal, file = Terminal(), io.StringIO()
    for bar in (ProgressBar(file=terminal), ProgressBar(file=file, interval=0)):
        with bar:
            bar.run_started(run_start(frames_total=48))
            for index, frames in ((1, 0), (2, 0), (3, 8)):
                done = 24 + frames
                bar(chunk_event(index, num_frames=frames, frames_done=done, frames_total=48, warmup=not frames))
    assert "encode (warming up):" in terminal.getvalue()
    assert counts(terminal.getvalue()) == [(32, 48)]
    assert "warming up" not in terminal.getvalue().split("\r")[-1]
    assert file.getvalue().splitlines() == [
        *["encode: 24 of 48 frames, warming up"] * 2,
        "encode: 32 of 48 frames",
    ]

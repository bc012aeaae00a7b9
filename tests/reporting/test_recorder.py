"""A recording gives back the events that were written, and survives kills and damage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS
from support.runs import chunk_event, encoder_layers, run_report, run_start, simulated

from longvid import SessionStateError, StoreError
from longvid.events import ChunkEvent, RunStart
from longvid.reporting.recorder import Recorder, read_recording


def record(path, items, **options):
    with Recorder(path, **options) as recorder:
        for item in items:
            if isinstance(item, RunStart):
                recorder.run_started(item)
            elif isinstance(item, ChunkEvent):
                recorder(item)
            else:
                recorder.run_finished(item)


def a_run(num_chunks=3):
    layers = encoder_layers(4)
    events = list(simulated(layers, num_chunks))
    return [run_start(layers, frames_total=None), *events, run_report(events[-1])]


def test_what_was_told_comes_back(tmp_path):
    told = [*a_run(), *a_run(1), run_start(), None]
    record(tmp_path / "runs.jsonl", told)
    assert list(read_recording(tmp_path / "runs.jsonl")) == told


def test_a_line_is_an_object_with_the_fields(tmp_path):
    record(tmp_path / "runs.jsonl", [*a_run(1), run_start(), None])
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "chunk", "finish", "start", "finish"]
    assert lines[0]["layers"][0] == {"name": "conv_in", "bytes": 90 * 2**20, "resident": False}
    assert lines[1]["spans"][0]["lane"] == "compute"
    assert lines[1]["read_seconds"] == 0.2
    assert lines[2]["complete"] is True
    assert lines[2]["write_seconds"] == 0.25 * lines[2]["seconds"]
    assert lines[4] == {"event": "finish", "failed": True}


def test_it_asks_for_spans_unless_told_not_to(tmp_path):
    assert Recorder(tmp_path / "a").wants_spans is True
    assert Recorder(tmp_path / "a", wants_spans=False).wants_spans is False


def test_nothing_is_written_before_a_run_starts(tmp_path):
    with Recorder(tmp_path / "a"):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"my notes\n", b"{}\n", b"\xff\x00"])
def test_an_existing_file_is_replaced_only_when_asked(tmp_path, content):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"replace it with --overwrite \(overwrite=True\)") as caught:
        Recorder(path)
    assert caught.value.kind == "exists"
    assert path.read_bytes() == content
    record(path, [run_start(), None], overwrite=True)
    assert list(read_recording(path)) == [run_start(), None]


def test_the_recording_of_a_completed_run_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "runs.jsonl"
    record(path, a_run())
    with pytest.raises(StoreError, match="--overwrite"):
        Recorder(path)
    assert list(read_recording(path)) == a_run()
    record(path, [run_start(), None], overwrite=True)
    assert list(read_recording(path)) == [run_start(), None]


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_the_recording_of_a_run_that_was_not_completed_is_continued(tmp_path, cut):
    path = tmp_path / "runs.jsonl"
    failed, stopped = [*a_run()[:-1], None], [*a_run()[:-1], run_report(chunk_event(), complete=False)]
    for earlier in (failed, stopped, a_run()[:-1], a_run()[:1]):
        path.unlink(missing_ok=True)
        record(path, earlier)
        os.truncate(path, path.stat().st_size - cut)  # as a kill in the middle of a line leaves it
        record(path, a_run())
        assert list(read_recording(path)) == [*(earlier[:-1] if cut else earlier), *a_run()]
    record(path, a_run(1), overwrite=True)
    assert list(read_recording(path)) == a_run(1)


def test_an_empty_file_may_be_written(tmp_path):
    (tmp_path / "runs.jsonl").touch()
    record(tmp_path / "runs.jsonl", a_run())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("no/such/runs.jsonl", "missing", "there is no folder"), ("folder", "foreign", "is not a file")],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, name, kind, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=message) as caught:
        Recorder(tmp_path / name)
    assert caught.value.kind == kind


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused_at_once():
    with pytest.raises(StoreError, match="no file can be made in /proc"):
        Recorder("/proc/runs.jsonl")


def test_after_close_nothing_is_written(tmp_path):
    record(tmp_path / "runs.jsonl", a_run())
    recorder = Recorder(tmp_path / "runs.jsonl", overwrite=True)
    recorder.close()
    recorder.close()
    with pytest.raises(SessionStateError, match="is closed"):
        recorder(chunk_event())
    assert len(list(read_recording(tmp_path / "runs.jsonl"))) == 5


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_leaves_whole_lines(tmp_path):
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from support.runs import *\n"
        "from longvid.reporting.recorder import Recorder\n"
        "recorder = Recorder(sys.argv[1])\n"
        "recorder.run_started(run_start())\n"
        "for i in range(5): recorder(chunk_event(i))\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    path = tmp_path / "runs.jsonl"
    done = subprocess.run([sys.executable, "-c", code, os.fspath(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(read_recording(path)) == [run_start(), *(chunk_event(i) for i in range(5))]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "runs.jsonl"
    told = a_run()
    record(path, told)
    data = path.read_bytes()
    for cut in (1, 20, len(data.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(data[:-cut].rstrip(b"\n"))
        assert list(read_recording(path)) in (told[:-1], told)
    path.write_bytes(data[:30])
    assert list(read_recording(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        '{"event":"chunk","index":1',
        '{"event":"wedding"}',
        '{"event":"chunk","color":"red"}',
        "[1]",
        "7",
        '{"index":3}',
        "\udcff",
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    record(path, a_run())
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = line.encode(errors="surrogateescape") + b"\n"
    path.write_bytes(b"".join(lines))
    reading = read_recording(path)
    assert isinstance(next(reading), RunStart)
    assert isinstance(next(reading), ChunkEvent)
    with pytest.raises(StoreError, match="line 3 is damaged") as caught:
        next(reading)
    assert caught.value.kind == "corrupt"


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(StoreError, match="line 1 is damaged"):
        list(read_recording(tmp_path / "notes.txt"))
    with pytest.raises(StoreError, match="there is no recording") as caught:
        read_recording(tmp_path / "nothing")
    assert caught.value.kind == "missing"

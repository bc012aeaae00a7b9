"""The same command again: after an interruption, after the end, and what becomes of its report and its recording."""

import json
import signal

import pytest

from longvid.cli.commands import main
from longvid.demo.__main__ import CLIP
from longvid.events import RunReport
from longvid.reporting.progress import ProgressBar
from longvid.reporting.recorder import read_recording

SMALL = ["--size", "64x48", "--fit", "stretch", "--frames", "45", "--chunk-frames", "4", "--json"]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    """A run that is interrupted after its second chunk has committed one."""
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 2)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 1)


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a command that gets SIGINT after its second chunk, also where the parent of the tests ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    real = ProgressBar.__call__

    def call(self, event):
        real(self, event)
        if event.index == 1:
            signal.raise_signal(signal.SIGINT)

    def run(args):
        with monkeypatch.context() as patch:
            patch.setattr(ProgressBar, "__call__", call)
            return main(args)

    yield run
    signal.signal(signal.SIGINT, previous)


def ends(recording):
    return [item.complete for item in read_recording(recording) if isinstance(item, RunReport)]


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_report_and_recording_do_not_block_the_same_command(tmp_path, interrupted, capsys, direction):
    store, page, recording = tmp_path / "a.zarr", tmp_path / "r.html", tmp_path / "r.jsonl"
    if direction == "decode":
        assert main(["encode", str(CLIP), str(store), *SMALL]) == 0
        command = ["decode", str(store), str(tmp_path / "b.zarr"), *SMALL[4:]]
    else:
        command = ["encode", str(CLIP), str(store), *SMALL]
    command += ["--report", str(page), "--record", str(recording)]
    assert interrupted(command) == 130
    assert ends(recording) == [False]
    assert "stopped after" in page.read_text()
    capsys.readouterr()

    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"]
    assert 0 < report["resumed_from_frame"] < report["frames"] == 45
    assert ends(recording) == [False, True]
    assert f"Resumed from frame {report['resumed_from_frame']}" in page.read_text()

    before = page.read_bytes(), recording.read_bytes()
    assert main(command) == 0  # nothing to do
    assert (page.read_bytes(), recording.read_bytes()) == before


@pytest.mark.parametrize("option", ["--report", "--record"])
def test_a_file_of_another_run_is_not_replaced(tmp_path, interrupted, capsys, option):
    out = tmp_path / "out"
    assert main(["encode", str(CLIP), str(tmp_path / "a.zarr"), *SMALL, option, str(out)]) == 0
    before = out.read_bytes()
    assert main(["encode", str(CLIP), str(tmp_path / "b.zarr"), *SMALL, option, str(out)]) == 4
    assert "--overwrite" in capsys.readouterr().err
    assert interrupted(["encode", str(CLIP), str(tmp_path / "b.zarr"), *SMALL]) == 130
    assert main(["encode", str(CLIP), str(tmp_path / "b.zarr"), *SMALL, option, str(out)]) == 4
    assert out.read_bytes() == before

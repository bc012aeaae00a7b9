"""The command line as users and scripts meet it: a real process, exit codes, one clear line, nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support import media

import longvid
from longvid.cli.commands import main
from longvid.demo import __main__ as demo

CLIP = demo.CLIP
NANO = ["--model", "cogvideox-nano", "--random-weights", "0"]
SIZE = ["--size", "64x48", "--fit", "stretch"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "clip.zarr"
    assert main(["encode", str(CLIP), str(path), *NANO, *SIZE, "--frames", "20", "--quiet"]) == 0
    return path


def one_line(err):
    lines = [line for line in err.splitlines() if line and "weights are random" not in line]
    assert 1 <= len(lines) <= 2, err
    assert lines[0].startswith("longvid: ")
    assert "Traceback" not in err
    return lines[0]


def test_encode_decode_info_as_json(run, tmp_path):
    code, out, err = run("encode", CLIP, tmp_path / "a.zarr", *NANO, *SIZE, "--start", 3, "--frames", 20, "--json")
    assert code == 0, err
    report = json.loads(out)
    for key in (
        "frames", "latent_frames", "seconds", "frames_per_second", "peak_device_bytes", "peak_rss_bytes",
        "cache_bytes", "offloaded_bytes", "resumed_from_frame", "complete",
    ):  # fmt: skip
        assert key in report
    assert (report["frames"], report["latent_frames"], report["complete"]) == (20, 7, True)
    assert "weights are random" in err

    code, out, _ = run("info", tmp_path / "a.zarr", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["frames"], facts["latent_shape"], facts["complete"]) == (20, [7, 16, 6, 8], True)
    assert facts["model"]["random_weights"] == 0
    assert facts["chunk_plan"]["first_chunk_frames"] == 9
    assert facts["stored_bytes"] > 0
    assert facts["source"]["name"].endswith("clip.mp4")

    # the model is the one the store names
    code, out, _ = run("decode", tmp_path / "a.zarr", tmp_path / "b.mp4", "--json")
    assert code == 0
    assert json.loads(out)["frames"] == 20
    code, out, _ = run("decode", tmp_path / "a.zarr", tmp_path / "b.zarr", "--start", 5, "--frames", 4, "--json")
    assert json.loads(out)["frames"] == 4


def test_info_shows_a_store_of_frames(run, store, tmp_path):
    assert run("decode", store, tmp_path / "frames.zarr", "--frames", 4, "--quiet")[0] == 0
    code, out, _ = run("info", tmp_path / "frames.zarr", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["frames"], facts["frame_shape"]) == ("frames", 4, [4, 48, 64, 3])
    assert (facts["complete"], facts["model"]["random_weights"]) == (True, 0)
    assert facts["stored_bytes"] > 0
    assert facts["source"]["name"].endswith("clip.mp4")
    code, out, _ = run("info", tmp_path / "frames.zarr")
    assert code == 0
    assert "complete, 4 decoded frames of 64x48" in out


def test_encode_says_which_model_runs(run, tmp_path):
    small = [*SIZE, "--frames", 5]
    code, out, err = run("encode", CLIP, tmp_path / "a.zarr", *small, "--json")
    assert code == 0
    assert json.loads(out)
    assert "longvid: encoding with tiny, the built-in model for previews; choose another with --model" in err
    code, _, err = run("encode", CLIP, tmp_path / "b.zarr", *small, "--quiet")
    assert (code, err) == (0, "")


def test_a_source_that_is_missing_is_all_that_is_said(run, tmp_path):
    code, _, err = run("encode", tmp_path / "none.mp4", tmp_path / "a.zarr")
    assert (code, err) == (3, f"longvid: there is no file {tmp_path / 'none.mp4'}; check the name\n")


@pytest.mark.parametrize("command", ["decode", "repair"])
def test_a_model_folder_that_was_moved_is_named_with_the_store(run, tmp_path, command):
    shutil.copytree(Path(longvid.__file__).parent / "weights" / "tiny", tmp_path / "model")
    small = [*SIZE, "--frames", 5, "--quiet"]
    assert run("encode", CLIP, tmp_path / "a.zarr", "--model", tmp_path / "model", *small)[0] == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    out = [tmp_path / "b.mp4"] if command == "decode" else []
    code, _, err = run(command, tmp_path / "a.zarr", *out, "--quiet")
    assert code == 6
    assert f"{tmp_path / 'a.zarr'} records the model {tmp_path / 'model'}, which cannot be loaded" in err
    assert "--model" in err
    assert run(command, tmp_path / "a.zarr", *out, "--quiet", "--model", tmp_path / "moved")[0] == 0


def test_text_for_people(run, store):
    code, out, _ = run("info", store)
    assert code == 0
    assert "complete, 20 frames of 64x48" in out
    assert "cogvideox-nano with random weights (seed 0)" in out


def test_plan_needs_no_weights(run):
    code, out, _ = run("plan", "--model", "cogvideox-2b", "--size", "96x64", "--json")
    assert code == 0
    plan = json.loads(out)
    for direction in ("encode", "decode"):
        part = plan[direction]
        for key in (
            "projected_bytes", "steady_chunk_bytes", "weights_bytes", "cache_bytes", "activation_bytes",
            "resident_cache_bytes", "offloaded_cache_bytes", "chunk_frames", "layers",
        ):  # fmt: skip
            assert key in part
        assert {"name", "bytes", "resident"} <= set(part["layers"][0])
    code, out, _ = run("plan", "--model", "cogvideox-nano", "--size", "64x64", "--memory", "1MiB")
    assert code == 0
    assert "fits" in out


def bad_inputs(tmp_path, store):
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    whole = CLIP.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 7 // 10])
    cut_mkv = media.cut(media.write_media(tmp_path / "whole.mkv"), 0.7, "cut.mkv")
    no_index = media.cut(media.write_media(tmp_path / "whole.mp4"), 0.9, "no_index.mp4")
    sound = media.write_audio(tmp_path / "sound.mp4")
    nothing = media.write_media(
        tmp_path / "zero.mp4", media.barcodes(2)[:0].reshape(0, 48, 96, 3), movflags="frag_keyframe+empty_moov"
    )
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"_class_name": "AutoencoderKLCogVideoX"}')
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    out = tmp_path / "out.zarr"
    small = [*NANO, *SIZE]
    return {
        "missing file": (["encode", tmp_path / "none.mp4", out, *small], 3, "none.mp4"),
        "a folder": (["encode", foreign, out, *small], 3, "thesis"),
        "text file": (["encode", text, out, *small], 3, "text.mp4"),
        "truncated mp4": (["encode", cut, out, *small], 3, "cut.mp4"),
        "truncated mkv": (["encode", cut_mkv, out, *small], 3, "cut.mkv is cut short"),
        "mp4 without its index": (["encode", no_index, out, *small], 3, "cut short"),
        "audio only": (["encode", sound, out, *small], 3, "no video stream; it has audio"),
        "zero frames": (["encode", nothing, out, *small], 3, "without a single frame"),
        "start beyond the end": (["encode", CLIP, out, *small, "--start", 10_000], 3, "frames"),
        "wrong folder as model": (["encode", CLIP, out, "--model", foreign], 6, "no config.json"),
        "pickled weights": (["encode", CLIP, out, "--model", pickled], 6, "pickled weights"),
        "unknown model": (["encode", CLIP, out, "--model", "nothing"], 6, "there is no such file or folder"),
        "no weights": (["encode", CLIP, out, "--model", "cogvideox-nano"], 6, "--random-weights SEED"),
        "chunks of its own": (["encode", CLIP, out, *NANO, "--chunk-frames", 16], 2, "leave chunk_frames out"),
        "chunks of no latents": (["encode", CLIP, out, "--chunk-frames", 6], 2, "multiple of frames_per_latent"),
        "foreign folder": (["encode", CLIP, foreign, *small], 4, "thesis"),
        "foreign folder, overwrite": (["encode", CLIP, foreign, *small, "--overwrite"], 4, "thesis"),
        "store exists": (["encode", CLIP, store, *small], 4, "--overwrite"),
        "store on standard output": (["encode", CLIP, "-", *small], 2, "cannot be written to standard output"),
        "no such parent": (["encode", CLIP, tmp_path / "no" / "out.zarr", *small], 4, "no"),
        "budget too small": (["encode", CLIP, out, *small, "--memory", "1MB"], 5, "976.56 KiB are allowed"),
        "decode of nothing": (["decode", tmp_path / "none.zarr", out], 4, "none.zarr"),
        "decode of a foreign folder": (["decode", foreign, out], 4, "thesis"),
        "decode to an unknown format": (["decode", store, tmp_path / "out.gif"], 4, ".gif"),
        "decode beyond the end": (["decode", store, out, "--start", 20], 2, "0 to 19"),
        "decode with a budget too small": (["decode", store, out, "--memory", "1MB"], 5, "are allowed"),
        "decode onto itself": (["decode", store, store, "--overwrite"], 4, "one is the other"),
        "decode into itself": (["decode", store, store / "back.mp4"], 4, "lies in it"),
        "info of a foreign folder": (["info", foreign], 4, "thesis"),
        "unknown device": (["encode", CLIP, out, *small, "--device", "abacus"], 6, "abacus"),
        "no such folder for contexts": (
            ["encode", CLIP, out, *small, "--offload", "all", "--offload-dir", tmp_path / "none"],
            4,
            "--offload-dir",
        ),
    }


CASES = [
    "missing file", "a folder", "text file", "truncated mp4", "truncated mkv", "mp4 without its index", "audio only",
    "zero frames", "start beyond the end", "wrong folder as model", "pickled weights", "unknown model", "no weights",
    "chunks of its own", "chunks of no latents", "foreign folder", "foreign folder, overwrite", "store exists",
    "store on standard output",
    "no such parent", "budget too small", "decode of nothing", "decode of a foreign folder",
    "decode to an unknown format",
    "decode beyond the end", "decode with a budget too small", "info of a foreign folder", "unknown device",
    "no such folder for contexts", "decode onto itself", "decode into itself",
]  # fmt: skip


def test_every_case_runs(tmp_path, store):
    assert set(CASES) == set(bad_inputs(tmp_path, store))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_its_code_and_one_clear_line(run, tmp_path, store, case):
    args, expected, said = bad_inputs(tmp_path, store)[case]
    before = snapshot(tmp_path), snapshot(store)
    code, out, err = run(*args)
    assert code == expected, err
    assert said in one_line(err)
    assert out == ""
    assert (snapshot(tmp_path), snapshot(store)) == before


def snapshot(folder: Path):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["encode"],
        ["nonsense"],
        ["plan", "--size", "0x0"],
        *(
            ["encode", "a", "b", *option.split()]
            for option in (
                "--size 7", "--memory lots", "--dtype int8", "--frames 0", "--seed -1", "--start x",
                "--random-weights -1", "--representation median",
            )
        ),
        ["decode", "a", "b", "--start", "-1"],
    ],
)  # fmt: skip
def test_wrong_usage_is_2(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "usage: longvid" in err


def test_debug_shows_the_traceback(run, tmp_path):
    code, _, err = run("info", tmp_path / "none.zarr", "--debug")
    assert code == 4
    assert "Traceback" in err


def test_overwrite_replaces_a_store(run, tmp_path):
    for extra in ([], ["--overwrite"]):
        code, _, err = run("encode", CLIP, tmp_path / "a.zarr", *NANO, *SIZE, "--frames", 5, "--quiet", *extra)
        assert code == 0, err
    assert longvid.open_store(tmp_path / "a.zarr").num_frames == 5


def test_help_names_every_command():
    done = subprocess.run([sys.executable, "-m", "longvid", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("encode", "decode", "info", "plan"))


def test_every_command_has_help(capsys):
    for command in ("encode", "decode", "info", "plan", "verify", "repair", "join"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert (left.value.code, command in capsys.readouterr().out) == (0, True)


ENDLESS = """
import itertools, sys, numpy as np, longvid.cli.commands as cli, longvid.runtime.session as s
frames = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
real = s.VideoSession.encode
def endless(self, source, *a, **k):
    return real(self, itertools.repeat(frames), *a, **{**k, "size": None})
s.VideoSession.encode = endless
sys.exit(cli.main(sys.argv[1:]))
"""


@contextmanager
def endless_encode(store, signum, handler):
    """The command line on an endless source, in a process that starts with this handling of the signal."""
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "encode", "x.mp4", str(store), *NANO],
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signum, handler),
    )  # fmt: skip
    try:
        while child.poll() is None and frames_published(store) == 0:
            time.sleep(0.05)
        yield child
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_cleanly_with_their_code(tmp_path, signum, code):
    store = tmp_path / "a.zarr"
    with endless_encode(store, signum, signal.SIG_DFL) as child:
        child.send_signal(signum)
        _, err = child.communicate(timeout=120)
    assert child.returncode == code, err
    assert "interrupted; " in err
    assert "Traceback" not in err
    left = longvid.open_store(store)
    assert not left.complete
    assert left.num_frames > 0
    assert not np.isnan(left.latents[:]).any()  # every published frame was written


def test_a_run_under_nohup_survives_a_hangup(tmp_path):
    store = tmp_path / "a.zarr"
    with endless_encode(store, signal.SIGHUP, signal.SIG_IGN) as child:
        child.send_signal(signal.SIGHUP)
        before = frames_published(store)
        while child.poll() is None and frames_published(store) == before:
            time.sleep(0.05)
        assert child.poll() is None


def frames_published(store):
    try:
        return longvid.open_store(store).num_frames
    except longvid.StoreError:
        return 0


def test_demo(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out")])
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert "peak tensor memory" in out
    assert float(re.search(r"([0-9.]+) dB PSNR", out)[1]) > 20
    for name in ("clip.zarr", "back.mp4", "side-by-side.png"):
        assert str(tmp_path / "out" / name) in out
        assert (tmp_path / "out" / name).exists()
    assert longvid.open_store(tmp_path / "out" / "clip.zarr").complete


def test_first_try_without_a_model(run, tmp_path):
    """What a newcomer types."""
    code, _, err = run("encode", CLIP, tmp_path / "out.zarr", "--frames", "9")
    assert code == 0, err
    code, out, _ = run("info", tmp_path / "out.zarr")
    assert code == 0
    assert "model     tiny" in out
    code, _, err = run("decode", tmp_path / "out.zarr", tmp_path / "back.mp4", "--chunk-frames", "4")
    assert code == 0, err


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    code = "import sys; from longvid.cli.commands import main; sys.exit(main(['plan', '--size', '64x64']))"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 141

"""Training: repeatable, killed and continued to the same bits, honest about what it was not shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import longvid as lv
from longvid.errors import SourceError
from longvid.media.output.video_writer import VideoWriter
from longvid.media.picture import write_png
from longvid.models.tiny import TinyConfig, TinyVAE
from longvid.train.__main__ import main
from longvid.train.fit import LinearCoder, fit
from longvid.train.footage import Footage, HoldOut, find_files, read_middle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three short videos of drifting texture and one image."""
    root = tmp_path_factory.mktemp("footage")
    rng = np.random.default_rng(0)
    for name, speed in (("slow", 1), ("fast", 3), ("secret", 2)):
        texture = np.kron(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        frames = np.stack([np.roll(texture, t * speed, axis=1) for t in range(30)])
        path = root / f"{name}.mp4"
        with VideoWriter(path, size=(192, 320), time_base=Fraction(1, 25), frame_rate=Fraction(25)) as video:
            video.write(frames, np.arange(30))
    write_png(root / "image.png", texture)
    return root


def command(folder, out, *more):
    settings = {"steps": 6, "batch": 1, "frames": 9, "size": 32, "every": 2, "threads": 1, "fit-clips": 10}
    return [str(folder), "--out", str(out), *(f"--{k}={v}" for k, v in settings.items()), *map(str, more)]


def weights(out):
    return (out / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    threads = torch.get_num_threads()
    assert main(command(folder, out, "--hold-out", "secret*")) == 0
    torch.set_num_threads(threads)
    return out


def test_the_result_is_a_model_folder(trained):
    model = lv.load_model(trained)
    assert isinstance(model, TinyVAE)
    record = json.loads((trained / "training.json").read_text())
    assert [entry["step"] for entry in record["curve"]] == [2, 4, 6]
    assert set(record["figures"]) == {"secret.mp4"}
    assert record["settings"]["seed"] == 0
    assert record["settings"]["hold_out"] == ["secret*"]
    assert not (trained / "diffusion_pytorch_model.part").exists()


KILLED = """
import os, signal, sys
from longvid.train.__main__ import main
real = os.replace
def replace(source, target, **options):
    real(source, target, **options)
    if os.path.basename(target) == "checkpoint.pt":
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
main(sys.argv[1:])
"""


def test_killed_and_continued_it_ends_with_the_same_bits(folder, trained, tmp_path):
    out = tmp_path / "out"
    settings = command(folder, out, "--hold-out", "secret*")
    killed = subprocess.run([sys.executable, "-c", KILLED, *settings], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] < 6
    subprocess.run(
        [sys.executable, "-m", "longvid.train", *command(folder, out, "--hold-out", "secret*")],
        check=True,
        capture_output=True,
    )
    assert weights(out) == weights(trained)


@pytest.mark.parametrize("kernels", [True, False])
def test_training_computes_in_bfloat16_only_where_the_library_has_kernels(folder, tmp_path, monkeypatch, kernels):
    monkeypatch.setattr("longvid.train.__main__.has_bfloat16", lambda: kernels)
    narrow, autocast = [], torch.autocast

    def recorded(device, dtype, *, enabled=True):
        narrow.append(enabled)
        return autocast(device, dtype, enabled=False)

    monkeypatch.setattr(torch, "autocast", recorded)
    assert main(command(folder, tmp_path / "out")) == 0
    assert set(narrow) == {kernels}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hold-out", "secret*", "--seed", 1], "seed 0, now 1"),
        ([], "hold_out ['secret*'], now []"),
        (["--hold-out", "secret*", "--hold-out", "slow*"], "hold_out"),
    ],
)
def test_another_run_does_not_continue_this_one(folder, trained, capsys, more, said):
    assert main(command(folder, trained, *more)) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "another --out" in err


def test_what_is_held_out_is_not_drawn(folder, tmp_path):
    files = find_files([folder])
    everything = Footage.prepare(files, tmp_path / "a", [])
    rest = Footage.prepare(files, tmp_path / "b", [HoldOut.parse("secret*"), HoldOut.parse("fast*@0.4-0.8")])
    assert [sum(map(len, runs)) for runs in everything.motion] == [30, 30, 30]
    assert [sum(map(len, runs)) for runs in rest.motion] == [20, 30]  # fast without its frames 10 to 19, slow
    assert [len(run) for run in rest.motion[0]] == [10, 10]
    assert len(rest.images) == 1


def test_clips_depend_on_the_generator_alone(folder, tmp_path):
    footage = Footage.prepare(find_files([folder]), tmp_path, [])
    for i in range(20):
        a, b = (footage.clip(np.random.default_rng([0, i]), num_frames=9, size=48) for _ in range(2))
        assert np.array_equal(a, b)
        assert a.shape == (9, 48, 48, 3)
        assert a.min() >= 0
        assert a.max() <= 255
        assert np.array_equal(a, np.rint(a))


def test_the_closed_form_is_the_best_linear_coder(folder, tmp_path):
    """Before any training the model equals the linear coder, which beats another basis of the same size."""
    footage = Footage.prepare(find_files([folder]), tmp_path, [])
    model = TinyVAE(TinyConfig(coefficients=64, encoder_blocks=1, decoder_blocks=1))
    coder = fit(model, footage, seed=0, num_clips=8)
    clip = footage.clip(np.random.default_rng(9), num_frames=17, size=64, augment=False)
    x = torch.from_numpy(clip).div(127.5).sub(1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        z = model.encoder(model.transform(x, True), None, True)
        ours = model.transform.inverse(model.decoder(z, None, True), True)
    linear = coder.reconstruct(x, 16)
    assert torch.allclose(ours[:, :, 1:], linear[:, :, 1:], atol=1e-3)
    assert 0.5 < float(z[:, :, 1:].std()) < 2
    shuffled = torch.linalg.qr(torch.randn(768, 768)).Q
    other = LinearCoder(coder.mean, shuffled, coder.first_mean, coder.first_basis)
    assert (linear - x).square().mean() < (other.reconstruct(x, 16) - x).square().mean()


@pytest.mark.parametrize("text", ["@1-2", "a@2-1", "a@x-y", "a@5", "a@-3-2"])
def test_hold_outs_that_say_nothing_are_refused(text):
    with pytest.raises(ValueError):
        HoldOut.parse(text)


@pytest.mark.parametrize("text", ["a", "a*@1-2", "a@0.5-7.25"])
def test_hold_outs_read_back(text):
    assert str(HoldOut.parse(text)) == text


def test_judged_is_only_what_is_held_out(folder):
    path = folder / "fast.mp4"
    whole = read_middle(path, HoldOut("*"), size=(24, 40), frames=99)
    assert len(whole) == 29
    part = read_middle(path, HoldOut.parse("fast*@0.4-0.8"), size=(24, 40), frames=49)
    assert np.array_equal(part, read_middle(path, HoldOut("*"), size=(24, 40), frames=29)[10:19])
    with pytest.raises(SourceError, match="2 frames lie in"):
        read_middle(path, HoldOut.parse("fast*@0.4-0.48"), size=(24, 40), frames=49)


def test_a_runs_own_output_is_not_footage(folder, tmp_path):
    files = find_files([folder])
    assert find_files([folder], leave_out=[folder / "other", tmp_path]) == files
    with pytest.raises(SourceError, match="no videos"):
        find_files([folder], leave_out=[folder])


def test_nothing_to_train_on(tmp_path, folder, capsys):
    with pytest.raises(SourceError, match="no videos or images"):
        find_files([tmp_path])
    with pytest.raises(SourceError, match="does not exist"):
        find_files([tmp_path / "none"])
    assert main(command(folder / "image.png", tmp_path)) == 1
    assert "images alone do not move" in capsys.readouterr().err
    for option, said in (("--frames=8", "1 + 4 n frames"), ("--frames=1", "at least 5"), ("--size=0", "multiple of 8"),
                         ("--every=0", "at least 1"), ("--seed=-1", "at least 0")):  # fmt: skip
        assert main([*command(folder, tmp_path), option]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "there",
    [
        {"config.json": '{"_class_name": "AutoencoderKLCogVideoX"}', "diffusion_pytorch_model.safetensors": "theirs"},
        {"config.json": "{}"},
        {"config.json": "[1]"},
        {"config.json": "torn"},
        {"diffusion_pytorch_model.safetensors": "theirs"},
    ],
)
def test_the_model_of_somebody_else_is_not_overwritten(folder, tmp_path, capsys, there):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in there.items():
        (out / name).write_text(text)
    assert main(command(folder, out)) == 1
    assert "holds a model that was not trained here" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == there

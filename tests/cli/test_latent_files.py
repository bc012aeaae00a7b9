"""`longvid decode` of a file of latents: options, exit codes, and what is left behind."""

import json
import tempfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.stores import files

import longvid as lv

NANO = ["--model", "wan2.1-nano", "--random-weights", "0", "--layout", "contiguous", "--paired-frames", "off"]


@pytest.fixture
def run(run):
    """Without the warning that weights are random."""

    def call(*args):
        code, out, err = run(*args)
        return code, out, "".join(line for line in err.splitlines(True) if "weights are random" not in line)

    return call


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A temporary folder of its own, which has to be empty again."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    own = SimpleNamespace(TemporaryDirectory=partial(tempfile.TemporaryDirectory, dir=folder))
    monkeypatch.setattr("longvid.runtime.exchange.importer.tempfile", own)
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def z(tmp_path):
    z = torch.randn(1, 16, 3, 4, 6)
    torch.save(z, tmp_path / "z.pt")
    return z


def frames_of(z, folder, **options):
    model = lv.load_model("wan2.1-nano", random_weights=0)
    store, frames = lv.import_latents(z, folder / "expected.zarr", model=model, **options), []
    with lv.VideoSession(model, device="cpu", layout="contiguous", paired_frames="off") as session:
        session.decode(store, frames.append)
    return np.concatenate(frames)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_file_is_decoded_like_a_store(run, tmp_path, z, normalized):
    flag = ["--normalized"] if normalized else []
    args = ["decode", tmp_path / "z.pt", tmp_path / "o.zarr", *NANO, *flag, "--num-frames", 8, "--fps", "30000/1001"]
    code, out, err = run(*args, "--json")
    assert code == 0, err
    assert json.loads(out)["frames"] == 8
    frames = lv.store.reader.open_frames(tmp_path / "o.zarr")
    assert np.array_equal(frames[:], frames_of(z, tmp_path, normalized=normalized, num_frames=8))
    assert str(frames.frame_rate) == "30000/1001"
    assert json.loads(run("info", tmp_path / "o.zarr", "--json")[1])["latents"] == str(tmp_path / "z.pt")

    before = files(tmp_path)
    code, out, _ = run(*args)
    assert (code, "complete already" in out) == (0, True)
    assert files(tmp_path) == before
    other = [arg for arg in args if arg != "--normalized"] + ([] if normalized else ["--normalized"])
    code, _, err = run(*other)
    assert (code, "made by another run" in err) == (4, True)


def test_to_a_video_file(run, tmp_path, z):
    code, out, err = run("decode", tmp_path / "z.pt", tmp_path / "o.mp4", *NANO, "--start", 2, "--frames", 4)
    assert code == 0, err
    assert "4 frames" in out
    assert (tmp_path / "o.mp4").stat().st_size


def test_a_store_of_its_frames_is_repaired_from_a_store_of_it(run, tmp_path, z):
    out = tmp_path / "o.zarr"
    assert run("decode", tmp_path / "z.pt", out, "--model", "tiny", "--quiet")[0] == 0
    before = files(out)
    chunk = out / "frames" / "c.0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    code, _, err = run("repair", out)
    assert (code, "a file of latents; make a store of it" in err) == (4, True)
    lv.import_latents(tmp_path / "z.pt", tmp_path / "z.zarr", model="tiny")
    code, _, err = run("repair", out, "--source", tmp_path / "z.zarr")
    assert code == 0, err
    assert files(out) == before


def test_a_store_of_latents_says_that_it_cannot_be_computed_again(run, tmp_path, z):
    store = lv.import_latents(tmp_path / "z.pt", tmp_path / "z.zarr", model="wan2.1-nano").path
    assert "imported" in run("info", store)[1]
    (store / "latents" / "c.0.0.0.0").unlink()
    code, _, err = run("repair", store)  # needs no weights to say so
    assert (code, "z.pt: another program made them" in err) == (4, True)


def test_padding_and_scale_are_shown(run, tmp_path):
    frames = np.zeros((20, 16, 24, 3), np.uint8)
    with lv.VideoSession(lv.load_model("cogvideox-nano", random_weights=0), device="cpu") as session:
        session.encode(frames, tmp_path / "a.zarr")
    store = lv.open_store(tmp_path / "a.zarr")
    assert store.latents_valid.tolist() == [True] * 6 + [False]
    assert "the last 1 stand for no frame" in run("info", store.path)[1]
    assert json.loads(run("info", store.path, "--json")[1])["latents_valid"] == 6
    lv.import_latents(torch.zeros(1, 16, 1, 2, 2), tmp_path / "b.zarr", model="wan2.1")
    shown = run("info", tmp_path / "b.zarr")[1]
    assert "latents_mean and latents_std by channel" in shown
    assert "no frame" not in shown


EVEN = ["--model", "cogvideox-nano", "--random-weights", "0", "--num-frames", "9"]
BAD = {
    "no model": (["z.pt"], 6, "name the model with --model"),
    "no file": (["none.npy", *NANO], 3, "there is no file of latents"),
    "damaged": (["bad.safetensors", *NANO], 3, "cannot be read as latents"),
    "another model": (["z.pt", "--model", "wan2.2-nano", "--random-weights", "0"], 3, "48 latent channels"),
    "several tensors": (["two.pt", *NANO], 3, "2 tensors (a, b)"),
    "two axes": (["square.npy", *NANO], 3, "--channel-axis"),
    "too many frames": (["z.pt", *NANO, "--num-frames", "10"], 2, "at most 9 frames"),
    "even": (["even.npy", *EVEN], 2, "5 to 8 frames, 9 were asked for"),
    "not finite": (["nan.npy", *NANO], 6, "latent frame 1 "),
    "a store": (["a.zarr", "--normalized", "--fps", "8"], 2, "--normalized, --fps: only for a file of latents"),
    "onto itself": (["z.pt", *NANO, "--overwrite"], 4, "one is the other"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_its_code_and_one_clear_line(run, tmp_path, z, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 99)
    torch.save({"a": z, "b": z}, "two.pt")
    np.save("square.npy", np.zeros((16, 16, 4, 6), np.float32))
    np.save("even.npy", np.zeros((16, 2, 4, 6), np.float32))
    np.save("nan.npy", np.where(np.arange(3)[:, None, None, None] == 1, np.nan, np.zeros((3, 16, 4, 6))))
    (file, *options), expected, said = BAD[case]
    before = files(tmp_path)
    code, out, err = run("decode", file, "z.pt" if case == "onto itself" else "o.zarr", *options)
    assert (code, out) == (expected, ""), err
    assert said in err
    assert len(err.splitlines()) == 1
    assert err.startswith("longvid: ")
    assert files(tmp_path) == before


@pytest.mark.parametrize("option", [["--fps", "0"], ["--fps", "x"], ["--num-frames", "0"], ["--channel-axis", "-1"]])
def test_wrong_usage_is_2(run, option):
    code, _, err = run("decode", "a.pt", "b.mp4", *option)
    assert (code, "usage: longvid" in err) == (2, True)


def test_the_axis_and_the_tensor_can_be_named(run, tmp_path):
    z = torch.randn(16, 16, 4, 6)
    torch.save({"a": z, "b": z.movedim(0, 1)}, tmp_path / "z.pt")
    frames = []
    for name, axis in (("a", 0), ("b", 1)):
        out = tmp_path / f"{name}.zarr"
        code, _, err = run(
            "decode", tmp_path / "z.pt", out, *NANO, "--tensor", name, "--channel-axis", axis, "--frames", 9, "--quiet"
        )
        assert code == 0, err
        frames.append(lv.store.reader.open_frames(out)[:])
    assert np.array_equal(*frames)

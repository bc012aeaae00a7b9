"""make_plan, session.plan and `longvid plan` plan the same run, and the run keeps to it to the byte."""

import json

import numpy as np
import pytest
from support.plans import without_measurements

from longvid import MemoryBudgetError, VideoSession, load_model, make_plan
from longvid.cli.commands import main

SIZE = {"height": 16, "width": 24}


def from_command_line(capsys, model, *options):
    capsys.readouterr()
    assert main(["plan", "--model", model, "--size", "24x16", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "dtype", "tight"),
    [("tiny", None, True), ("cogvideox-nano", None, False), ("cogvideox-nano", "bfloat16", False)],
)
def test_all_three_give_the_same_plan(name, dtype, tight, capsys, monkeypatch):
    without_measurements(monkeypatch)
    asked = {"device": "cpu", "dtype": dtype}
    if tight:
        asked["memory"] = make_plan(name, **SIZE, **asked).projected_bytes - 1
    plan = make_plan(name, **SIZE, **asked)
    assert all(plan.fits(direction) for direction in ("encode", "decode"))
    with VideoSession(name if name == "tiny" else load_model(name, random_weights=0), **asked) as session:
        of_session = session.plan(**SIZE).to_dict()
    options = ["--device", "cpu", *(["--dtype", dtype] if dtype else [])]
    options += ["--memory", f"{asked['memory']}B"] if tight else []
    expected = plan.to_dict()
    assert of_session == expected
    assert from_command_line(capsys, name, *options) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_what_a_plan_says_fits_runs_and_a_byte_less_does_not(direction, tmp_path):
    model, frames = load_model("tiny"), np.zeros((49, 16, 24, 3), np.uint8)
    asked = {"device": "cpu", "chunk_frames": model.geometry.chunk_frames}  # a shorter chunk would fit in less
    if direction == "decode":
        with VideoSession(model, **asked) as session:
            session.encode(frames, tmp_path / "a.zarr")

    def run(session):
        if direction == "encode":
            return session.encode(frames, tmp_path / "b.zarr")
        return session.decode(tmp_path / "a.zarr", lambda _: None)

    least = make_plan(model, **SIZE, **asked).direction(direction).minimum_bytes
    plan = make_plan(model, **SIZE, **asked, memory=least)
    assert plan.fits(direction)
    assert not make_plan(model, **SIZE, **asked, memory=least - 1).fits(direction)
    with VideoSession(model, **asked, memory=least) as session:
        assert run(session).peak_device_bytes == plan.direction(direction).projected_bytes == least
    with VideoSession(model, **asked, memory=least - 1) as session, pytest.raises(MemoryBudgetError):
        run(session)


def test_a_plan_for_a_device_that_is_not_here_needs_no_device(capsys):
    record = from_command_line(capsys, "tiny", "--device", "xpu")
    assert (record["device"], record["dtype"], record["reserved_bytes"]) == ("xpu", "bfloat16", 512 * 2**20)
    assert main(["plan", "--model", "tiny", "--size", "24x16", "--device", "abacus"]) == 6
    assert "choose auto, cpu, cuda" in capsys.readouterr().err

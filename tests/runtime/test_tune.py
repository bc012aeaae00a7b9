"""The sweep runs for real, its profile comes back, applies where it should, and is refused elsewhere."""

import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest
from support.plans import fixed_plan

from longvid import MemoryBudgetError, ModelError, Profile, StoreError, VideoSession
from longvid.cli.commands import main
from longvid.planning.options import ComputeOptions
from longvid.planning.profile import DirectionProfile, ProfileScope
from longvid.reporting.tuning_plot import draw
from longvid.runtime.tune import Sweep, tune

HEIGHT, WIDTH = 16, 24


@pytest.fixture(scope="module")
def tuning(vae):
    return tune(vae, height=HEIGHT, width=WIDTH, device="cpu", sweep=Sweep(thresholds=4, rounds=2))


def test_the_sweep_goes_from_nothing_to_everything_and_is_exact(vae, tuning):
    plan = fixed_plan(vae, height=HEIGHT, width=WIDTH, keep_buffers=True)
    for direction in ("encode", "decode"):
        row = [point for point in tuning.points if point.direction == direction]
        part = plan.direction(direction)
        assert len(row) >= 3
        assert row[0].offloaded_bytes == row[-1].resident_bytes == 0
        assert row[0].peak_bytes == part.projected_bytes
        assert all(point.peak_bytes == point.projected_bytes for point in row)
        assert all(point.resident_bytes + point.offloaded_bytes == part.cache_bytes for point in row)
        assert all(point.seconds > 0 and point.spread >= 1 for point in row)
        assert row[0].slowdown == 1
        slices = [point.slice_frames for point in row]
        assert slices == sorted(slices, reverse=True)
        assert slices[0] == 8
        assert slices[-1] < 8
        assert all(point.slice_frames == slices[-1] for point in row if point.offloaded_bytes)
        (knee,) = (point for point in row if point.knee)
        assert knee.slowdown <= 1 + tuning.slack
        assert knee.peak_bytes == min(point.peak_bytes for point in row if point.slowdown <= 1 + tuning.slack)
        assert tuning.profile.directions[direction].peak_bytes == knee.peak_bytes
    assert tuning.profile.reserved_bytes == 0  # on a CPU a plan misses nothing
    text = tuning.explain()
    assert text.count("<- knee") == 2
    assert "24x16 in float32" in text


def test_thresholds_beyond_the_budget_are_left_out(vae):
    part = fixed_plan(vae, height=HEIGHT, width=WIDTH, offload="all", slice_frames=1).encode
    most = part.nothing_offloaded_bytes - 1
    sweep = Sweep(directions=["encode"], thresholds=3, rounds=1)
    budget = ComputeOptions(allowed_bytes=most)
    found = tune(vae, height=HEIGHT, width=WIDTH, device="cpu", options=budget, sweep=sweep)
    assert found.points
    assert all(point.offloaded_bytes > 0 and point.peak_bytes <= most for point in found.points)
    assert set(found.profile.directions) == {"encode"}
    with pytest.raises(MemoryBudgetError, match="with every context offloaded"):
        less = ComputeOptions(allowed_bytes=part.minimum_bytes - 1)
        tune(vae, height=HEIGHT, width=WIDTH, device="cpu", options=less, sweep=sweep)


def test_a_profile_comes_back(tuning, tmp_path):
    path = tmp_path / "p.toml"
    tuning.profile.write(path)
    assert Profile.read(path) == tuning.profile
    assert tomllib.loads(path.read_text())["scope"]["size"] == "24x16"
    with pytest.raises(StoreError, match="--overwrite"):
        tuning.profile.write(path)
    tuning.profile.write(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["p.toml"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no profile"),
        ("nonsense = [", "cannot be read"),
        ("a = 1", "is not a profile"),
        ('[longvid]\nkind = "profile"\nformat_version = 99', "is not a profile"),
    ],
)
def test_what_is_not_a_profile_is_refused(tmp_path, content, said):
    path = tmp_path / "p.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelError, match=said):
        VideoSession("tiny", profile=path)
    if content is not None:
        with pytest.raises(StoreError, match="--overwrite"):
            replace_profile().write(path)
        assert path.read_text() == content


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("resident_bytes = 0", 'resident_bytes = "512MiB"'), ("reserved_bytes = 0", "reserved_bytes = -5"),
        ("flops_per_second = 1000000000.0", "flops_per_second = 0.0"), ("slowdown = 1.0", "slowdown = true"),
    ],
)  # fmt: skip
def test_a_profile_that_was_edited_badly_is_refused(tmp_path, old, new):
    path = tmp_path / "p.toml"
    replace_profile().write(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ModelError, match=r"is not a (number of bytes|rate)"):
        Profile.read(path)


def replace_profile(**changes):
    scope = ProfileScope(model="m", architecture="a", size="24x16", dtype="float32", device="d")
    part = DirectionProfile(
        slice_frames=2,
        resident_bytes=0,
        prefetch_bytes=0,
        peak_bytes=1,
        slowdown=1.0,
        flops_per_second=1e9,
        link_bytes_per_second=1e9,
    )
    return Profile(scope=replace(scope, **changes), reserved_bytes=0, directions={"encode": part})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "b", "model": "other"}, "model other instead of m"),
        ({"size": "8x8"}, "frame size 8x8 instead of 24x16"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 instead of float32"),
        ({"device": "abacus"}, "device abacus instead of d"),
        ({"size": "8x8", "device": "abacus"}, "frame size 8x8 instead of 24x16, device abacus instead of d"),
    ],
)
def test_a_profile_of_another_setting_says_what_differs(changes, said):
    with pytest.raises(ModelError, match=said):
        replace_profile(**changes).check(replace_profile().scope)
    replace_profile().check(replace(replace_profile().scope, model="same config, other weights"))


def test_a_session_runs_as_its_profile_says(vae, tuning, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (17, HEIGHT, WIDTH, 3), dtype=np.uint8)
    part = tuning.profile.directions["encode"]
    half = replace(part, resident_bytes=fixed_plan(vae, height=HEIGHT, width=WIDTH).encode.cache_bytes // 2)
    profile = replace(tuning.profile, directions={"encode": half})
    setting = {"offload": half.policy, "slice_frames": half.slice_frames}
    expected = fixed_plan(vae, height=HEIGHT, width=WIDTH, **setting).encode
    assert expected.placement.prefetch_bytes == half.prefetch_bytes
    with VideoSession(vae, device="cpu", profile=profile) as session:
        report = session.encode(frames, tmp_path / "a.zarr")
        assert report.offloaded_bytes == expected.offloaded_cache_bytes > 0
        assert report.peak_device_bytes == expected.projected_bytes
        plan = session.plan(height=HEIGHT, width=WIDTH)
        assert plan.encode.rates.measured
        assert not plan.decode.placement.offloaded  # was not tuned
        with pytest.raises(ModelError, match="frame size 24x16 instead of 8x8"):
            session.encode(frames[:, :8, :8], tmp_path / "b.zarr")
    # A budget decides for itself, and what is asked for by name counts most.
    with VideoSession(vae, device="cpu", profile=profile, memory="1GiB") as session:
        assert session.encode(frames, tmp_path / "c.zarr").offloaded_bytes == 0
    with VideoSession(vae, device="cpu", profile=profile, offload="all") as session:
        assert session.encode(frames, tmp_path / "d.zarr").offloaded_bytes == expected.cache_bytes
    with (
        VideoSession(vae, device="cpu", dtype="bfloat16", profile=profile) as session,
        pytest.raises(ModelError, match="dtype float32 instead of bfloat16"),
    ):
        session.encode(frames, tmp_path / "e.zarr")
    assert not (tmp_path / "b.zarr").exists()
    assert not (tmp_path / "e.zarr").exists()


def test_a_reserve_is_part_of_the_budget(vae, tuning):
    profile = replace(tuning.profile, reserved_bytes=1000)
    need = fixed_plan(vae, height=HEIGHT, width=WIDTH).encode.minimum_bytes
    for memory, fits in ((need + 1000, True), (need + 999, False)):
        with VideoSession(vae, device="cpu", profile=profile, memory=memory) as session:
            assert session.plan(height=HEIGHT, width=WIDTH).fits("encode") == fits


def test_the_plot_is_a_picture(tuning, tmp_path):
    draw(tuning, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_saves_what_encode_reads(tmp_path, capsys):
    profile, clip = tmp_path / "p.toml", np.zeros((9, 16, 24, 3), np.uint8)
    np.save(tmp_path / "clip.npy", clip)
    model = ["--model", "cogvideox-nano", "--random-weights", "0", "--device", "cpu"]
    sweep = ["tune", *model, "--size", "24x16", "--thresholds", "2", "--rounds", "1"]
    assert main([*sweep, "--save", str(profile), "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {point["direction"] for point in record["points"]} == {"encode", "decode"}
    assert (tmp_path / "p.png").exists()
    assert main([*sweep, "--save", str(profile)]) == 4
    for option, name in (("--plot", "sweep.foo"), ("--save", "q.png")):
        with pytest.raises(SystemExit) as usage:
            main([*sweep, option, str(tmp_path / name)])
        assert usage.value.code == 2
    (tmp_path / "holiday.png").write_bytes(b"a picture of somebody else")
    assert main([*sweep, "--plot", str(tmp_path / "holiday.png")]) == 4
    assert (tmp_path / "holiday.png").read_bytes() == b"a picture of somebody else"
    assert main([*sweep, "--plot", str(tmp_path / "p.png"), "--overwrite", "--quiet", "--json"]) == 0
    capsys.readouterr()
    assert main([*sweep, "--save", str(profile)]) == 4
    assert "--overwrite" in capsys.readouterr().err
    from longvid.demo.__main__ import CLIP

    encode = [
        "encode",
        str(CLIP),
        str(tmp_path / "a.zarr"),
        *model,
        "--profile",
        str(profile),
        "--quiet",
        "--frames",
        "9",
        "--fit",
        "stretch",
    ]
    assert main([*encode, "--size", "24x16"]) == 0
    assert main([*encode, "--size", "32x16", "--overwrite"]) == 6
    assert "frame size 24x16 instead of 32x16" in capsys.readouterr().err

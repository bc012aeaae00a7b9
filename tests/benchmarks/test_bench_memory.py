"""Memory may not grow unnoticed: the planned bytes of every architecture against the committed baseline."""

import importlib
import json

import pytest
from support import REPOSITORY
from support.plans import fixed_plan

from longvid.units import parse_size

ROW = "cogvideox-2b 720x480 decode all"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield importlib.import_module("bench_memory")


@pytest.fixture(scope="module")
def measured(bench):
    return bench.measure_tensor_bytes()


@pytest.fixture
def check(bench, measured, monkeypatch, tmp_path):
    """Run the command on a baseline of these rows, what is measured standing still: exit code and baseline after."""
    monkeypatch.setattr(bench, "measure_tensor_bytes", lambda: measured)

    def run(rows, *options):
        baseline = tmp_path / "baseline.json"
        baseline.write_text(json.dumps({"tensor_bytes": {"rows": rows}}))
        code = bench.main(["--baseline", str(baseline), *options])
        return code, json.loads(baseline.read_text())["tensor_bytes"]["rows"]

    return run


def with_number(rows, factor, key="projected_bytes"):
    return {**rows, ROW: {**rows[ROW], key: round(rows[ROW][key] * factor)}}


def test_nothing_needs_more_memory_than_the_baseline(bench, measured, capsys):
    rows = json.loads(bench.BASELINE.read_text())["tensor_bytes"]["rows"]
    comparison = bench.Comparison.of(rows, measured)
    assert bench.verdict("tensor bytes", comparison, gate=bench.GATE, noise=0.0), capsys.readouterr().out


def test_rows_are_what_a_plan_says(measured):
    """One dry run answers for both policies and for all models that are alike; this plans each anew."""
    for model, size, direction, offload in (
        ("cogvideox1.5-5b", "720x480", "decode", "all"),
        ("tiny", "1920x1088", "encode", "none"),
    ):
        height, width = parse_size(size)
        part = fixed_plan(model, height=height, width=width, dtype="bfloat16", offload=offload).direction(direction)
        row = measured[f"{model} {size} {direction} {offload}"]
        assert row["projected_bytes"] == part.projected_bytes
        assert row["steady_chunk_bytes"] == part.steady_chunk_bytes
        assert row.get("minimum_bytes", part.minimum_bytes) == part.minimum_bytes


def test_only_models_that_differ_in_scaling_alone_share_numbers(bench):
    assert bench.alike(["cogvideox-2b", "tiny", "cogvideox-5b", "cogvideox-nano"]) == [
        ["cogvideox-2b", "cogvideox-5b"],
        ["tiny"],
        ["cogvideox-nano"],
    ]


def test_growth_beyond_the_gate_fails_and_names_row_and_numbers(check, measured, capsys):
    code, _ = check(with_number(measured, 1 / 1.006))
    said = capsys.readouterr().out
    old, new = round(measured[ROW]["projected_bytes"] / 1.006), measured[ROW]["projected_bytes"]
    assert code == 1
    assert f"GREW: {ROW} projected_bytes: {old:,} -> {new:,} (+0.600%)" in said


@pytest.mark.parametrize("key", ["projected_bytes", "steady_chunk_bytes", "minimum_bytes", "cache_bytes"])
def test_growth_within_the_gate_passes(check, measured, key):
    assert check(with_number(measured, 1 / 1.004, key))[0] == 0


def test_shrinkage_passes_and_is_to_be_recorded(check, measured, capsys):
    assert check(with_number(measured, 1.1))[0] == 0
    assert "record them with --update" in capsys.readouterr().out


def test_a_row_or_a_number_that_one_side_lacks_is_an_error(check, measured, capsys):
    less = {row: values for row, values in measured.items() if row != ROW}
    assert check(less)[0] == 1
    assert f"{ROW} projected_bytes is not in the baseline" in capsys.readouterr().out
    assert check({**measured, "gone 8x8 encode none": {"projected_bytes": 1}})[0] == 1
    assert "gone 8x8 encode none projected_bytes was not measured" in capsys.readouterr().out
    assert check({**measured, ROW: {**measured[ROW], "gone_bytes": 1}})[0] == 1


def test_the_baseline_goes_down_and_up_only_when_told(check, measured):
    assert check(with_number(measured, 1.1), "--update") == (0, measured)
    doctored = with_number(measured, 1 / 1.001)
    assert check(doctored, "--update") == (1, doctored)
    assert check(doctored, "--update", "--accept-growth") == (0, measured)

"""Does longvid need more memory than it did? Exact tensor bytes, and peak RSS of whole processes, against a baseline.

    python benchmarks/bench_memory.py [--rss [--repeat 5]] [--update [--accept-growth]]

Tensor bytes come from dry runs on ``meta``: every architecture and `tiny`, both directions, three sizes, bfloat16,
nothing offloaded and everything offloaded. They are the same on every machine. A number that is more than 0.5 % above
``results/memory_baseline.json`` fails (exit code 1), and so does a row that only one side has.

``--rss`` adds the peak resident set size of whole `longvid encode` and `longvid decode` processes, as the OS counts
it: medians of five, compared only on the machine of the baseline and otherwise printed. The gate is 0.5 % here too:
of nine runs of each kind, single ones spread over 0.15 to 0.47 %, and medians of any four and the other five of them
differed by at most 0.21 %.

``--update`` writes the baseline. Numbers only go down: it refuses if one grew, unless ``--accept-growth`` says that
this is wanted. An RSS that moved by less than its gate keeps its old value, so that noise adds up in neither direction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from common import fixed_plan, loop_clip, run_command

from longvid.demo.__main__ import CLIP
from longvid.environment import describe_machine
from longvid.memory.offload import OffloadPolicy
from longvid.models.loading import ARCHITECTURES, BUILT_IN, load_model
from longvid.planning.cost_model import choose_placement
from longvid.planning.options import ComputeOptions, parse_dtype
from longvid.planning.plan import DirectionPlan
from longvid.units import parse_size

Rows: TypeAlias = Mapping[str, Mapping[str, int]]

BASELINE = Path(__file__).parent / "results" / "memory_baseline.json"
SIZES = ("720x480", "1280x720", "1920x1088")
DTYPE = "bfloat16"
GATE = 0.005
RSS_GATE = 0.005
RSS_FRAMES = 120
RSS_MODELS = {"cogvideox-nano": ("96x64", ("--random-weights", 0)), "tiny": ("320x176", ())}
SAME_MACHINE = ("cpu", "num_cores", "python", "torch")
"facts that must agree before RSS is compared"
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents")
"keys of a config that change no computation here"


# --------------------------------------------------------------------------------------------------- measuring


def alike(names: Sequence[str]) -> list[list[str]]:
    """Names of models whose configs are identical but for the scaling of latents, together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        facts = load_model(name).describe()
        config = {key: value for key, value in facts["config"].items() if key not in SCALING}
        groups.setdefault(json.dumps([facts["class_name"], config], sort_keys=True), []).append(name)
    return list(groups.values())


def measure_tensor_bytes() -> dict[str, dict[str, int]]:
    """Exact bytes of every model, size, direction and policy. One dry run answers for all placements."""
    rows: dict[str, dict[str, int]] = {}
    for names in alike([*ARCHITECTURES, *BUILT_IN]):
        model = load_model(names[0])
        for size in SIZES:
            height, width = parse_size(size)
            options = ComputeOptions(dtype=parse_dtype(DTYPE), offload=OffloadPolicy("none"), keep_buffers=False)
            for direction in ("encode", "decode"):
                none = fixed_plan(model, direction, (height, width), options)
                for name in names:
                    rows[f"{name} {size} {direction} none"] = numbers(none)
                    rows[f"{name} {size} {direction} all"] = numbers(everything_offloaded(none))
    return rows


def everything_offloaded(part: DirectionPlan) -> DirectionPlan:
    """The plan that offload="all" makes from the same dry run."""
    placement = choose_placement(part.cost_model, OffloadPolicy("all"), lambda _: True, part.rates)
    return replace(part, placement=placement, offload="all")


def numbers(part: DirectionPlan) -> dict[str, int]:
    """What is held to the baseline."""
    least = {"minimum_bytes": part.minimum_bytes} if part.offload == "all" else {}
    return {
        "projected_bytes": part.projected_bytes,
        "steady_chunk_bytes": part.steady_chunk_bytes,
        "cache_bytes": part.cache_bytes,
        "activation_bytes": part.activation_bytes,
        **least,
    }


def measure_rss(repeat: int) -> dict[str, list[int]]:
    """Peak RSS of every run of whole processes, one model after the other in each repetition."""
    runs: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop_clip(CLIP, folder / "loop.mp4", RSS_FRAMES)
        for _ in range(repeat):
            for model, (size, options) in RSS_MODELS.items():
                store = folder / f"{model}.zarr"
                encoded = run_command(
                    *("encode", folder / "loop.mp4", store, "--model", model, *options, "--device", "cpu"),
                    *("--size", size, "--frames", RSS_FRAMES, "--overwrite"),
                    threads=1,
                )
                decoded = run_command("decode", store, folder / "back.mp4", "--device", "cpu", "--overwrite", threads=1)
                for direction, report in (("encode", encoded), ("decode", decoded)):
                    assert report["frames"] == RSS_FRAMES
                    runs.setdefault(f"{model} {size} {direction}", []).append(report["peak_rss_bytes"])
    return runs


# --------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Change:
    """A number that is not what it was."""

    row: str
    key: str
    old: int
    new: int

    @property
    def share(self) -> float:
        """Growth over the old number."""
        return self.new / self.old - 1 if self.old else float("inf")

    def __str__(self) -> str:
        return f"{self.row} {self.key}: {self.old:,} -> {self.new:,} ({self.share:+.3%})"


@dataclass(frozen=True)
class Comparison:
    """Measured rows beside a baseline."""

    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    "rows and numbers that only one side has"

    @classmethod
    def of(cls, old: Rows, new: Rows) -> Comparison:
        """Compare every number of every row."""
        before = {(row, key): value for row, values in old.items() for key, value in values.items()}
        after = {(row, key): value for row, values in new.items() for key, value in values.items()}
        unmatched = [f"{row} {key} is not in the baseline" for row, key in after if (row, key) not in before]
        unmatched += [f"{row} {key} was not measured" for row, key in before if (row, key) not in after]
        changes = [
            Change(*at, before[at], value) for at, value in after.items() if at in before and value != before[at]
        ]
        return cls(tuple(changes), tuple(unmatched))

    def grown(self, gate: float) -> list[Change]:
        """Numbers that grew by more than the gate."""
        return [change for change in self.changes if change.share > gate]

    def shrunk(self, gate: float) -> list[Change]:
        """Numbers that shrank by more than the gate."""
        return [change for change in self.changes if change.share < -gate]


def verdict(what: str, comparison: Comparison, *, gate: float, noise: float) -> bool:
    """Say what changed; whether nothing is wrong.

    Args:
        what: is compared.
        comparison: of it.
        gate: growth beyond which it fails.
        noise: shrinkage up to which nothing is worth recording.
    """
    grown, shrunk = comparison.grown(gate), comparison.shrunk(noise)
    for change in grown:
        print(f"GREW: {change}")
    for text in comparison.unmatched:
        print(f"MISSING: {text}")
    for change in shrunk:
        print(f"shrank: {change}")
    if shrunk:
        print(f"{what}: {len(shrunk)} numbers shrank; record them with --update")
    within = [change for change in comparison.changes if noise < change.share <= gate]
    if within:
        print(f"{what}: {len(within)} numbers grew within {gate:.1%}, most {max(within, key=lambda c: c.share)}")
    good = not grown and not comparison.unmatched
    print(f"{what}: {'nothing grew' if good else 'FAILED'} (gate {gate:.1%})")
    return good


def may_update(what: str, comparison: Comparison, *, noise: float, accept_growth: bool) -> bool:
    """Whether a new baseline may replace the old one."""
    grown = comparison.grown(noise)
    if not grown or accept_growth:
        return True
    for change in grown:
        print(f"REFUSED: {change}")
    print(f"{what}: not updated, since numbers grew; --accept-growth records them if that is wanted")
    return False


# --------------------------------------------------------------------------------------------------- for people


def print_tensor_bytes(rows: Rows) -> None:
    """A table in MB, models that are alike once."""
    keys = ("projected_bytes", "steady_chunk_bytes", "minimum_bytes", "cache_bytes", "activation_bytes")
    groups = alike([*ARCHITECTURES, *BUILT_IN])
    for first, *others in groups:
        if others:
            print(f"{first}: {', '.join(others)} are the same architecture and have the same numbers")
    print(f"\n{'MB, ' + DTYPE:42}" + "".join(f"{key.removesuffix('_bytes'):>14}" for key in keys))
    shown = {names[0] for names in groups}
    for row, values in rows.items():
        if row.split()[0] in shown:
            cells = [f"{values[key] / 1e6:,.1f}" if key in values else "" for key in keys]
            print(f"{row:42}" + "".join(f"{cell:>14}" for cell in cells))
    print()


def print_rss(runs: Mapping[str, Sequence[int]]) -> None:
    """A table in MB with the spread of single runs."""
    print(f"\n{'peak RSS of processes, MB':34}{'median':>10}{'lowest':>10}{'highest':>10}{'spread':>9}")
    for row, values in runs.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        print(f"{row:34}{median / 1e6:>10.2f}{min(values) / 1e6:>10.2f}{max(values) / 1e6:>10.2f}{spread:>9.2%}")
    print()


# --------------------------------------------------------------------------------------------------- the two parts


def check_tensor_bytes(record: dict[str, Any], args: argparse.Namespace, command: str) -> bool:
    """Measure and compare, or renew the part of the baseline; whether it went well."""
    rows = measure_tensor_bytes()
    print_tensor_bytes(rows)
    old: Rows = record.get("tensor_bytes", {}).get("rows", {})
    comparison = Comparison.of(old, rows)
    if not args.update:
        return verdict("tensor bytes", comparison, gate=GATE, noise=0.0)
    if not may_update("tensor bytes", comparison, noise=0.0, accept_growth=args.accept_growth):
        return False
    record["tensor_bytes"] = {"command": command, "torch": str(torch.__version__), "dtype": DTYPE, "rows": rows}
    return True


def check_rss(record: dict[str, Any], args: argparse.Namespace, command: str) -> bool:
    """The same for the peak RSS of processes."""
    runs = measure_rss(args.repeat)
    print_rss(runs)
    rows = {row: {"peak_rss_bytes": int(statistics.median(values))} for row, values in runs.items()}
    machine, part = describe_machine("cpu"), record.get("peak_rss", {})
    differing = [key for key in SAME_MACHINE if part and machine[key] != part["machine"][key]]
    comparable = bool(part) and not differing
    if not args.update:
        if not comparable:
            print(f"peak RSS: not compared; the baseline has another {', '.join(differing) or 'state: none'}")
            return True
        return verdict("peak RSS", Comparison.of(part["rows"], rows), gate=RSS_GATE, noise=RSS_GATE)
    if comparable:
        comparison = Comparison.of(part["rows"], rows)
        if not may_update("peak RSS", comparison, noise=RSS_GATE, accept_growth=args.accept_growth):
            return False
        moved = {change.row for change in (*comparison.grown(RSS_GATE), *comparison.shrunk(RSS_GATE))}
        for row in rows.keys() & part["rows"].keys() - moved:
            rows[row], runs[row] = part["rows"][row], part["runs"][row]
    record["peak_rss"] = {"command": command, "machine": machine, "frames": RSS_FRAMES, "rows": rows, "runs": runs}
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and compare with the baseline or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--rss", action="store_true", help="peak RSS of processes too; minutes")
    parser.add_argument("--repeat", type=int, default=5, help="processes of each kind for --rss")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--accept-growth", action="store_true", help="with --update, also where numbers grew")
    args = parser.parse_args(argv)
    if args.accept_growth and not args.update:
        parser.error("--accept-growth goes with --update")
    if not args.update and not args.baseline.is_file():
        parser.error(f"there is no baseline {args.baseline}; write one with --update")
    record: dict[str, Any] = json.loads(args.baseline.read_text()) if args.baseline.is_file() else {}
    command = "python benchmarks/bench_memory.py " + " ".join(sys.argv[1:] if argv is None else argv)
    good = check_tensor_bytes(record, args, command)
    if args.rss:
        good = check_rss(record, args, command) and good
    if args.update and good:
        args.baseline.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {args.baseline.name}")
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())

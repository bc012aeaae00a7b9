"""Whether kernel choice is the same on a busy machine, and whether it would by the clock on the wall.

    python benchmarks/races.py [--size 480x272] [--busy 0 1 4] [--repeats 3] [--out benchmarks/results/races.json]

The full width of CogVideoX with random weights, on the CPU, beside so many processes that keep a core each busy and
copy memory. Every race is run as longvid runs it (seconds that one thread computes) and by the clock on the wall, with
all threads. A figure is the plain form's time over the other form's, least to most of all repeats.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import CPU, DIRECTIONS, new_parser, write_results

from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.kernels.cpu import has_matrix_unit
from longvid.planning import kernel_choice
from longvid.planning.dry_run import DryRuns
from longvid.planning.workload import Workload
from longvid.units import parse_size

BUSY = "x = bytearray(2**26)\nprint(flush=True)\nwhile True: bytes(x), sum(range(10**5))"
Makers = Sequence[Callable[[], Callable[[], object]]]


def by_the_wall(makers: Makers) -> list[float]:
    """As many rounds as kernel choice has, in seconds that pass, with all threads."""
    runners = [make() for make in makers]
    rounds: list[list[float]] = []
    for _ in range(kernel_choice._ROUNDS + 1):
        rounds.append([])
        for run in runners:
            started = time.perf_counter()
            run()
            rounds[-1].append(time.perf_counter() - started)
    return [min(times) for times in zip(*rounds[1:], strict=True)]


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """So many processes that do nothing else."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(num_processes)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


def names_of_races(dtype: torch.dtype, direction: str) -> list[str]:
    """In the order in which kernel choice runs them."""
    rounds_alike = dtype == torch.float32 or direction == "decode" or not has_matrix_unit()
    return ["layout", "Winograd"] if rounds_alike else ["layout"]


def measure(model: CogVideoXVAE, size: str, dtype: torch.dtype, direction: Any, repeats: int) -> dict[str, Any]:
    """What was chosen, and the ratios of each race by both clocks."""
    height, width = parse_size(size)
    ratios: dict[str, dict[str, list[float]]] = {clock: defaultdict(list) for clock in ("thread", "wall")}
    real, chosen = kernel_choice._benchmark, []
    for _ in range(repeats):
        races = iter(names_of_races(dtype, direction))

        def recorded(makers: Makers, device: torch.device, races: Iterator[str] = races) -> list[float]:
            name = next(races)
            found = {"thread": real(makers, device), "wall": by_the_wall(makers)}
            for clock, (plain, other) in found.items():
                ratios[clock][name].append(plain / other)
            return found["thread"]

        kernel_choice._benchmark = recorded
        kernel_choice._seconds_of_layouts.cache_clear()
        kernel_choice._seconds_of_winograd.cache_clear()
        try:
            schedule = model.geometry.schedule
            workload = Workload(direction=direction, height=height, width=width, dtype=dtype, schedule=schedule)
            numerics = kernel_choice.choose_numerics(DryRuns.of(model), workload, device=CPU)
        finally:
            kernel_choice._benchmark = real
        chosen.append(numerics.to_dict())
    return {"chosen": chosen, "ratios": ratios}


def main() -> int:
    """Measure, print and write."""
    parser = new_parser(__doc__)
    parser.add_argument("--size", default="480x272")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = CogVideoXVAE(CogVideoXConfig()).eval()
    rows, alike = [], True
    print(f"{'':20}{'busy':6}{'race':14}{'one thread':20}{'on the wall':20}")
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        model = model.to(dtype)
        for direction in DIRECTIONS:
            chosen: list[dict[str, Any]] = []
            for num in args.busy:
                with busy(num):
                    row = measure(model, args.size, dtype, direction, args.repeats)
                chosen += row["chosen"]
                rows.append({"dtype": name, "direction": direction, "busy": num, **row})
                for race in row["ratios"]["thread"]:
                    spans = (row["ratios"][clock][race] for clock in ("thread", "wall"))
                    text = "".join(f"{f'{min(span):.2f} to {max(span):.2f}':20}" for span in spans)
                    print(f"{name:11}{direction:9}{num:<6}{race:14}{text}", flush=True)
            alike = alike and all(one == chosen[0] for one in chosen)
    print("the same forms every time" if alike else "NOT the same forms every time")
    write_results(args.out, size=args.size, rows=rows)
    return 0 if alike else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""What does a start in the middle of a video cost? Chunks of warm-up, and what they cost in whole chunks.

    python benchmarks/warmup.py [--out results/warmup.json]

A chunk of a warm-up ends behind the last layer whose input counts, so 30 chunks cost less than 30. The cost is counted
in multiplications of the full architecture at 720x480, on tensors without data: it is the same on every machine.
``seconds`` is the time of a warm-up in chunks, measured on a model of full depth and 1/16 of the width.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import CPU, DIRECTIONS, new_parser, write_results

from longvid import ConvCache, load_model, warmup
from longvid.events import Direction
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.planning.dry_run import DryRuns
from longvid.planning.warmup import Warmup
from longvid.planning.workload import Execution, Workload

ROUNDS = 3


def in_multiplications(found: Warmup, height: int = 480, width: int = 720) -> float:
    """The warm-up of CogVideoX in chunks, by multiplications."""
    model = load_model("cogvideox-2b")
    schedule = model.geometry.schedule
    workload = Workload(direction=found.direction, height=height, width=width, dtype=torch.bfloat16, schedule=schedule)
    cost = DryRuns.of(model).cost_model(workload, Execution())
    layers = [step.layer for step in cost.steps]
    assert layers == list(found.ready), "the layers of the probe are not those of the plan"
    flops = [step.flops for step in cost.steps]
    total = 0
    for chunk in range(found.chunks):
        last = found.last_layer(chunk)
        assert last is not None
        total += cost.lead_flops + sum(flops[: layers.index(last)])
    return total / (cost.lead_flops + sum(flops))


def in_seconds(model: CogVideoXVAE, found: Warmup, direction: Direction) -> float:
    """The warm-up of a model in chunks, by the clock: medians of rounds, whole chunks right behind each warm-up."""
    forward, module = (model.encode, model.encoder) if direction == "encode" else (model.decode, model.decoder)
    chunk = model.geometry.schedule.full(1)
    shape = (1, 3, chunk.padded_frames, 64, 64) if direction == "encode" else (1, 16, chunk.num_latents, 8, 8)
    x, ratios = torch.randn(shape, device=CPU), []
    for _ in range(ROUNDS):
        with ConvCache(module) as cache:
            cache.start_at(1)
            started = time.perf_counter()
            for index in range(found.chunks):
                cache.last_layer = found.last_layer(index)
                forward(x, cache)
            warm = time.perf_counter() - started
            cache.last_layer = None
            whole = []
            for _ in range(5):
                started = time.perf_counter()
                forward(x, cache)
                whole.append(time.perf_counter() - started)
        ratios.append(warm / statistics.median(whole))
    return statistics.median(ratios)


def main() -> int:
    """Measure and print."""
    args = new_parser(__doc__).parse_args()
    torch.manual_seed(0)
    narrow = CogVideoXVAE(CogVideoXConfig(block_out_channels=(8, 16, 16, 32), norm_num_groups=4)).eval()
    rows: dict[str, dict[str, Any]] = {}
    for direction in DIRECTIONS:
        found = warmup(narrow, direction)
        rows[direction] = {
            "chunks": found.chunks,
            "multiplications": round(in_multiplications(found), 2),
            "seconds": round(in_seconds(narrow, found, direction), 2),
        }
        print(f"{direction}: {rows[direction]}")
    write_results(args.out, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How far bfloat16 results are from the same weights in float32, and from diffusers' own bfloat16 result.

    python benchmarks/accuracy.py [--size 240x160] [--directions encode decode] [--out benchmarks/results/accuracy.json]

The full width of CogVideoX with random weights, on the CPU: the second chunk of a video of noise, by diffusers, by
diffusers with its kernels in channels last, and by longvid in every form. Both distances are relative (norm of the
difference over norm of the reference). The reference is diffusers in float32, on the bfloat16 weights.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from common import DIRECTIONS, Step, chunk, new_parser, open_diffusers, random_models, write_results
from speed import in_channels_last, open_longvid
from torch import Tensor
from tqdm import tqdm

from longvid import load_model
from longvid.events import Direction
from longvid.models.numerics import Numerics
from longvid.units import parse_size

LAST = Numerics(layout="channels_last")
FORMS = {
    "contiguous": Numerics(),
    "channels last": LAST,
    "channels last, Winograd": replace(LAST, paired_frames=True),
    "channels last, residuals in convolutions": replace(LAST, fused_residuals=True),
    "channels last, products in float32": replace(LAST, float32_products=True),
    "channels last, products in float32, Winograd": replace(LAST, float32_products=True, paired_frames=True),
    "channels last, Winograd, residuals in convolutions": replace(LAST, paired_frames=True, fused_residuals=True),
}


def second_chunk(step: Step, direction: Direction, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The result of the second chunk, in float32."""
    for index in (0, 1):
        out = step(chunk(direction, height, width, torch.bfloat16, index).to(dtype))
    return out.float()


def measure(theirs: Any, direction: Direction, size: str) -> list[dict[str, Any]]:
    """A row for each contestant."""
    height, width = parse_size(size)
    truth = second_chunk(open_diffusers(deepcopy(theirs).float(), direction), direction, height, width, torch.float32)
    rows, base = [], None
    with ExitStack() as stack:
        steps = {
            "diffusers": open_diffusers(theirs, direction),
            "diffusers channels last": open_diffusers(in_channels_last(deepcopy(theirs)), direction),
        }
        ours = load_model(theirs)
        for name, numerics in FORMS.items():
            steps[f"longvid {name}"] = open_longvid(stack, ours, direction, numerics, height, width)
        for name, step in tqdm(steps.items(), desc=direction, leave=False):
            out = second_chunk(step, direction, height, width, torch.bfloat16)
            base = out if base is None else base
            distances = {"to_float32": distance(out, truth), "to_diffusers": distance(out, base)}
            rows.append({"direction": direction, "size": size, "contestant": name, **distances})
    return rows


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


def main() -> int:
    """Measure, print and write."""
    parser = new_parser(__doc__)
    parser.add_argument("--size", default="240x160")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    args = parser.parse_args()
    theirs, _ = random_models(torch.bfloat16)
    rows = [row for direction in args.directions for row in measure(theirs, direction, args.size)]
    print(f"{'':10}{'':65}{'to float32':>12}{'to diffusers':>14}")
    for row in rows:
        print(f"{row['direction']:10}{row['contestant']:65}{row['to_float32']:>12.4f}{row['to_diffusers']:>14.4f}")
    write_results(args.out, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Peak tensor bytes of Wan beside diffusers, exact and on ``meta``: a step of one latent in the middle of a video.

    python benchmarks/wan_memory.py [--models wan2.1 wan2.2] [--out benchmarks/results/wan_memory.json]

diffusers runs its own step of one latent (4 frames while encoding) with its feature caches. longvid runs chunks of 4
frames in channels last and row tiles, without kept buffers, as on a CPU:

* resident: no context leaves; whole chunks, and stages that run frame by frame.
* offloaded: every context leaves, none is fetched early; whole chunks, and blocks that run frame by frame.

Weights are not counted; input, output and contexts on the device are. Every figure is tracked while the operations run
on meta tensors; that of longvid is also the figure of its plan. Bars, of diffusers' bytes: resident at most 0.55
encoding and 0.60 decoding, offloaded at most 0.25; the exit code is 1 if frame by frame misses one.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from common import CPU, DIRECTIONS, Step, chunk, new_parser, open_diffusers, open_model, write_results
from peers_memory import META, measure_bytes
from tqdm import tqdm

from longvid import load_model
from longvid.memory.copy_engine import CopyEngine, Ticket
from longvid.memory.offload import Placement
from longvid.memory.offloader import Offloader
from longvid.models.context import Limits, Pieces
from longvid.models.loading import ARCHITECTURES
from longvid.models.numerics import Numerics
from longvid.planning.dry_run import DryRuns, dry_run, skeleton_of
from longvid.planning.kernel_choice import preferred_band_bytes
from longvid.planning.planner import SMALL_TILE_BYTES
from longvid.planning.workload import Execution, Workload
from longvid.units import parse_size

SIZES = {"wan2.1": ("832x480", "1280x720"), "wan2.2": ("832x480", "1280x704")}
BARS = {"resident": {"encode": 0.55, "decode": 0.60}, "offloaded": {"encode": 0.25, "decode": 0.25}}
PIECES: dict[str, Pieces] = {"resident": "stages", "offloaded": "resnets"}
ONE_LATENT = 4
"frames"


def without_weights(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """An architecture on ``meta`` as diffusers and as longvid have it."""
    import diffusers

    config = dict(ARCHITECTURES[name])
    with META:
        theirs: Any = getattr(diffusers, config.pop("_class_name"))(**config)
    return theirs.to(dtype).eval(), cast("Any", load_model(name)).to(dtype)


class _NoCopies(CopyEngine):
    """Contexts on ``meta`` have nothing that could be copied; they leave and come back all the same."""

    def _copy(self, *_: Any) -> Ticket:
        return Ticket(self.mark(), self.mark(), wait=lambda: None, synchronize=lambda: None)


def _open_longvid(ours: Any, direction: Any, placement: Placement, limits: Limits, stack: ExitStack) -> Step:
    offloader = Offloader(placement, stack.enter_context(_NoCopies(META)))
    return open_model(stack, ours, direction, offloader, limits, torch.channels_last_3d)[0]


def measure(theirs: Any, ours: Any, direction: Any, size: str, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of one direction at one size."""
    height, width = parse_size(size)
    geometry = replace(ours.geometry, chunk_frames=ONE_LATENT)
    inputs = [chunk(direction, height, width, dtype, index, META, geometry=geometry) for index in range(3)]
    row: dict[str, Any] = {"size": size, "direction": direction}
    row["diffusers"] = measure_bytes(lambda _: open_diffusers(theirs, direction), inputs)[0]["peak_bytes"]
    workload = Workload(
        direction=direction, height=height, width=width, dtype=dtype, schedule=geometry.schedule_for(ONE_LATENT)
    )
    largest = DryRuns.of(ours).largest_frame(workload, Execution())
    tiles = Limits(tile_elements=(preferred_band_bytes(CPU) or 0) // dtype.itemsize)
    small = Limits(tile_elements=SMALL_TILE_BYTES // dtype.itemsize)
    for where in BARS:
        for how, limits in (
            ("whole chunks", tiles),
            ("frame by frame", replace(small, pieces=PIECES[where], slice_elements=largest)),
        ):
            execution = Execution(numerics=Numerics(layout="channels_last"), limits=limits)
            model = dry_run(skeleton_of(ours, dtype), workload, execution)
            placement = model.least if where == "offloaded" else Placement()
            opener = partial(_open_longvid, ours, direction, placement, limits)
            row[f"{where}, {how}"] = measure_bytes(opener, inputs)[0]["peak_bytes"]
            row[f"{where}, {how}, run as planned"] = model.peak(placement).total_bytes
    return row


def main() -> int:
    """Measure, print the table and write the results."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    dtype, rows, missed = getattr(torch, args.dtype), [], False
    names = [f"{where}, {how}" for where in BARS for how in ("whole chunks", "frame by frame")]
    print(f"{'GB (share of diffusers)':34}{'diffusers':>10}" + "".join(f"{name:>28}" for name in names))
    for name in args.models:
        theirs, ours = without_weights(name, dtype)
        for size in tqdm(SIZES[name], desc=name, leave=False):
            for direction in DIRECTIONS:
                row = {"model": name, **measure(theirs, ours, direction, size, dtype)}
                rows.append(row)
                cells = [f"{row[n] / 1e9:.2f} ({row[n] / row['diffusers']:.3f})" for n in names]
                label = f"{name} {size} {direction}"
                print(f"{label:34}{row['diffusers'] / 1e9:>10.2f}" + "".join(f"{cell:>28}" for cell in cells))
                for where, bars in BARS.items():
                    share = row[f"{where}, frame by frame"] / row["diffusers"]
                    if share > bars[direction]:
                        print(f"above {bars[direction]}: {label} {where}, {share:.3f}")
                        missed = True
    write_results(args.out, dtype=args.dtype, rows=rows)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())

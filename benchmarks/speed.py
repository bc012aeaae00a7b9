"""Speed of the compute path: longvid and diffusers chunk by chunk in one process, and the bare convolutions as a floor.

    python benchmarks/speed.py [--model wan2.1] [--sizes 240x160 480x272] [--dtypes bfloat16 float32] [--rounds 3]
        [--threads 2] [--contestants ...] [--no-floor] [--no-diffusers]
        [--out benchmarks/results/speed.json] [--plot docs/images/speed.png]
    python benchmarks/speed.py --merge A.json B.json --out ... --plot ...

Contestants, all with the same random weights at the full width of an architecture, on the CPU:

* diffusers (unless left out): its encoder or decoder with its own ``conv_cache``, as its ``encode`` and ``decode`` loop
  over chunks.
* longvid: layout, form of the convolutions and slices as a session chooses them.
* longvid plain: the same with every multiplication of the model (only where the session uses Winograd filtering).
* longvid pairs: with Winograd filtering along time (only where the session does not use it).
* longvid thrifty (only if named): the same as longvid, without memory that is kept from chunk to chunk.
* longvid stages (only if named, Wan): layers at one frame size run together, frame by frame, and contexts stay.
* longvid least (only if named): every context moved to host memory and back and slices of one frame, or blocks that run
  frame by frame where the model allows it, as a session does whose budget is the least that the model runs in.
* diffusers channels last (only if named): a copy of its model whose convolutions have kernels in channels last. Its
  error says how far diffusers is from itself when only the order of the sums in the libraries' kernels changes.

Each runs the first chunk of a video, which is not timed, and then as many middle chunks of 8 frames as there are
rounds; contestants take turns chunk by chunk. The error is that of the first chunk timed against diffusers' output. If
diffusers is left out, since at 720x480 it takes minutes for a chunk, the first contestant named takes its place.

Bare convolutions: every convolution of the model on whole chunks, by shape and as often as longvid would run it,
context frames included, upsampled frames at their full size, called as ``torch.nn.functional`` does on tensors that are
there already; each shape in the layout that won a race before. They take turns with the contestants, as one of them,
since a machine that is shared, or whose clock falls under load, is not equally fast at all times. So what a contestant
takes beyond that is norms, activations, residuals, resampling, caches and copies.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from common import CPU, DIRECTIONS, Step, chunk, fixed_plan, new_parser, open_diffusers, random_models, write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from longvid import ConvCache
from longvid.events import Direction
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offload import OffloadPolicy
from longvid.models.base import CausalVAE
from longvid.models.context import Limits, Pieces
from longvid.models.forward import memory_format
from longvid.models.numerics import Numerics
from longvid.planning.dry_run import DryRuns, skeleton_of
from longvid.planning.kernel_choice import choose_numerics, preferred_band_bytes
from longvid.planning.options import ComputeOptions
from longvid.planning.planner import SMALL_TILE_BYTES
from longvid.planning.workload import Execution, Workload
from longvid.runtime.run import context_of
from longvid.units import parse_size

Shape: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Input, weight, stride and padding of a convolution."""

BARS = {"cogvideox-2b": {"encode": 1.35, "decode": 1.8}, "wan2.1": {"encode": 1.4, "decode": 1.5}}
COLOURS = {
    "diffusers": "#8a8a8a",
    "diffusers channels last": "#c9c9c9",
    "longvid": "#1b4f80",
    "longvid plain": "#7fb0d8",
    "longvid pairs": "#a6c9b4",
    "longvid thrifty": "#d8b26a",
    "longvid stages": "#7a5aa6",
    "longvid least": "#3f9b7f",
}
LABELS = {"longvid plain": "longvid, all multiplications", "longvid pairs": "longvid, Winograd"}
USUAL = ("longvid", "longvid plain", "longvid pairs")

FLOOR = "bare convolutions"

_OPERATIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts convolutions by shape."""

    def __init__(self, found: Counter[Shape]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATIONS:
            x, weight = args[:2]
            axes = x.ndim - 2
            given = tuple(args[3:5])
            stride, padding = (*given, *((1,) * axes, (0,) * axes)[len(given) :])
            self.found[tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding)] += 1
        return func(*args, **(kwargs or {}))


def in_channels_last(vae: Any) -> Any:
    """Lay the kernels out in channels last, which convolutions then use whatever layout their input has."""
    for parameter in vae.parameters():
        if parameter.ndim in (4, 5):
            last = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=last)
    return vae


def open_longvid(
    stack: ExitStack,
    model: CausalVAE,
    direction: Direction,
    numerics: Numerics,
    height: int,
    width: int,
    *,
    least: bool = False,
    thrifty: bool = False,
    pieces: Pieces | None = None,
) -> Step:
    """As a session would run it without a budget, or with the ``least`` one, or ``thrifty`` between chunks.

    With ``pieces`` it runs frame by frame in small row tiles, as a session does for a budget below whole chunks.
    """
    asked = ComputeOptions(
        numerics=numerics,
        offload=OffloadPolicy("all" if least else "auto"),
        slice_frames=1 if least and pieces is None else None,
        keep_buffers=not thrifty and pieces is None,
    )
    part = fixed_plan(model, direction, (height, width), asked, preferred_band_bytes(CPU))
    if pieces is not None:
        workload = part.workload
        limits = Limits(
            tile_elements=SMALL_TILE_BYTES // workload.dtype.itemsize,
            slice_elements=DryRuns.of(model).largest_frame(workload, Execution()),
            pieces=pieces,
        )
        part = replace(part, execution=replace(part.execution, limits=limits))
    module, run = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)
    copies = stack.enter_context(CopyEngine(CPU))
    context = stack.enter_context(context_of(part, module, copies))
    return lambda x: run(x.contiguous(memory_format=memory_format(numerics)), context)


def convolutions_of(model: CausalVAE, direction: str, height: int, width: int, dtype: torch.dtype) -> Counter[Shape]:
    """Of a middle chunk, in whole chunks, without Winograd filtering."""
    skeleton = skeleton_of(model, dtype)
    module, run = (skeleton.encoder, skeleton.encode) if direction == "encode" else (skeleton.decoder, skeleton.decode)
    with ConvCache(module) as cache:
        run(chunk(direction, height, width, dtype, 0, geometry=model.geometry).to("meta"), cache)
        found: Counter[Shape] = Counter()
        with _Convolutions(found):
            run(chunk(direction, height, width, dtype, 1, geometry=model.geometry).to("meta"), cache)
    return found


class BareConvolutions:
    """All convolutions of a chunk, one after the other, in tensors that are there already.

    Args:
        shapes: which, and how often.
        dtype: of all tensors.
        rounds: of the race between the layouts, by the medians of which each shape gets its own.
    """

    @torch.inference_mode()
    def __init__(self, shapes: Counter[Shape], dtype: torch.dtype, rounds: int) -> None:
        self._calls: list[tuple[Callable[[], Tensor], int]] = []
        for (x_shape, w_shape, stride, padding), count in tqdm(shapes.items(), desc=FLOOR, leave=False):
            function = F.conv3d if len(x_shape) == 5 else F.conv2d
            last = torch.channels_last_3d if len(x_shape) == 5 else torch.channels_last
            x, weight, bias = (torch.randn(shape).to(dtype) for shape in (x_shape, w_shape, w_shape[:1]))
            calls = [
                partial(function, one, weight, bias, stride=stride, padding=padding)
                for one in (x, x.contiguous(memory_format=last))
            ]
            seconds: list[list[float]] = [[], []]
            for turn in range(rounds + 1):
                for call, times in zip(calls, seconds, strict=True):
                    started = time.perf_counter()
                    call()
                    if turn:
                        times.append(time.perf_counter() - started)
            medians = list(map(statistics.median, seconds))
            self._calls.append((calls[medians.index(min(medians))], count))

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Compute them all. A step like those of the contestants; what goes in comes out."""
        for call, count in self._calls:
            for _ in range(count):
                call()
        return x


def measure(
    theirs: Any,
    ours: CausalVAE,
    direction: Direction,
    size: str,
    dtype: torch.dtype,
    rounds: int,
    wanted: Sequence[str],
    with_floor: bool,
    with_diffusers: bool,
) -> dict[str, Any]:
    """One row of the results: every contestant at one setting."""
    height, width = parse_size(size)
    workload = Workload(direction=direction, height=height, width=width, dtype=dtype, schedule=ours.geometry.schedule)
    numerics = choose_numerics(DryRuns.of(ours), workload, device=CPU)
    variants = {
        "longvid": numerics,
        "longvid plain": replace(numerics, paired_frames=False),
        "longvid pairs": replace(numerics, layout="channels_last", paired_frames=True),
        "longvid thrifty": numerics,
        "longvid stages": numerics,
        "longvid least": numerics,
    }
    pieces: dict[str, Pieces] = {"longvid stages": "stages", "longvid least": "resnets"}
    forms = ("longvid plain", "longvid pairs")
    variants = {name: choice for name, choice in variants.items() if name not in forms or choice != numerics}
    x = chunk(direction, height, width, dtype, 1, geometry=ours.geometry)
    with ExitStack() as stack:
        steps = {"diffusers": open_diffusers(theirs, direction)} if with_diffusers else {}
        if "diffusers channels last" in wanted:
            steps["diffusers channels last"] = open_diffusers(in_channels_last(deepcopy(theirs)), direction)
        for name in wanted:
            if name in variants:
                mode = {"least": name == "longvid least", "thrifty": name == "longvid thrifty"}
                how = pieces.get(name) if ours.geometry.chunk_invariant else None
                steps[name] = open_longvid(stack, ours, direction, variants[name], height, width, pieces=how, **mode)
        if not steps:
            raise SystemExit(f"a session {direction}s in the form of {', '.join(wanted)} by itself: name longvid")
        base_name = next(iter(steps))
        for step in steps.values():
            step(chunk(direction, height, width, dtype, 0, geometry=ours.geometry))
        if with_floor:
            shapes = convolutions_of(ours, direction, height, width, dtype)
            steps[FLOOR] = BareConvolutions(shapes, dtype, max(2, rounds))
        errors, names = {}, list(steps)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in tqdm(range(rounds), desc=f"{direction} {size} {dtype}"):
            outs = {}
            # In turns forwards and backwards: who comes after a step that fills memory finds it otherwise.
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order[:: -1 if turn % 2 else 1]:
                started = time.perf_counter()
                outs[name] = steps[name](x)
                seconds[name].append(time.perf_counter() - started)
            outs.pop(FLOOR, None)
            if turn == 0:
                expected = outs[base_name].float()
                errors = {n: float((out.float() - expected).norm() / expected.norm()) for n, out in outs.items()}
            outs.clear()
    base, floor = seconds[base_name], seconds.pop(FLOOR, None)
    return {
        "size": size,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "numerics": numerics.to_dict(),
        "bare_convolutions_seconds": None if floor is None else statistics.median(floor),
        "bare_convolutions_rounds": floor,
        "contestants": {
            name: {
                "seconds": times,
                "frames_per_second": ours.geometry.chunk_frames / statistics.median(times),
                "speedup": statistics.median(b / t for b, t in zip(base, times, strict=True)),
                "over_bare_convolutions": None
                if floor is None
                else statistics.median(t / f for t, f in zip(times, floor, strict=True)),
                "relative_error": errors[name],
            }
            for name, times in seconds.items()
        },
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table."""
    print(f"\n{'':34}{'contestant':24}{'frames/s':>10}{'speedup':>9}{'range':>15}{'/ bare convs':>14}{'error':>10}")
    for row in rows:
        label = f"{row['direction']} {row['size']} {row['dtype']}, {row['threads']} thr."
        base = next(iter(row["contestants"].values()))["seconds"]
        for name, got in row["contestants"].items():
            ratios = [b / t for b, t in zip(base, got["seconds"], strict=True)]
            over = got["over_bare_convolutions"]
            print(
                f"{label:34}{name:24}{got['frames_per_second']:>10.3f}{got['speedup']:>9.2f}"
                f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>15}{'-' if over is None else f'{over:.2f}':>14}"
                f"{got['relative_error']:>10.1e}"
            )
            label = ""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time of a chunk over that of the bare convolutions, as bars."""
    from matplotlib.figure import Figure

    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads and row["bare_convolutions_seconds"] is not None]
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    labels, seen = [], set()
    for i, row in enumerate(rows):
        labels.append(f"{row['direction']}\n{row['size']}\n{row['dtype']}")
        width = 0.84 / len(row["contestants"])
        for k, (name, got) in enumerate(row["contestants"].items()):
            label = LABELS.get(name, name)
            bar = axes.bar(
                i + (k - (len(row["contestants"]) - 1) / 2) * width,
                got["over_bare_convolutions"],
                width * 0.93,
                color=COLOURS[name],
                label=None if label in seen else label,
            )
            axes.bar_label(bar, fmt="%.2f", padding=2, fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 0.5})
            seen.add(label)
    axes.axhline(1, color="#c8553d", linewidth=1, linestyle=":", label="bare convolutions")
    axes.set_xticks(range(len(rows)), labels, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("time of a chunk / its bare convolutions")
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> int:
    """Measure, print the table, write the results and draw."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=list(BARS), default="cogvideox-2b")
    parser.add_argument("--sizes", nargs="+", default=["240x160", "480x272"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--contestants", nargs="+", choices=list(COLOURS)[1:], default=USUAL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-floor", action="store_true", help="do without the bare convolutions")
    parser.add_argument("--no-diffusers", action="store_true", help="compare with the first of --contestants instead")
    parser.add_argument("--merge", type=Path, nargs="+", help="results to put together instead of measuring")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(path.read_text()) for path in args.merge]
        record = {
            **parts[0],
            "command": " ; ".join(p["command"] for p in parts),
            "rows": [r for p in parts for r in p["rows"]],
        }
    else:
        torch.set_num_threads(args.threads)
        rows = []
        for name in args.dtypes:
            dtype = getattr(torch, name)
            theirs, ours = random_models(dtype, name=args.model)
            for size in args.sizes:
                for direction in args.directions:
                    row = measure(
                        theirs,
                        ours,
                        direction,
                        size,
                        dtype,
                        args.rounds,
                        args.contestants,
                        not args.no_floor,
                        not args.no_diffusers,
                    )
                    rows.append(row)
                    show(rows[-1:])
        record = {"model": args.model, "rows": rows}
    show(record["rows"])
    write_results(args.out, **record)
    if args.plot:
        draw(record["rows"], args.plot)
    for row in record["rows"]:
        if not {"diffusers", "longvid"} <= row["contestants"].keys():
            continue
        bar = BARS[record.get("model", "cogvideox-2b")][row["direction"]]
        if row["contestants"]["longvid"]["speedup"] < bar:
            print(f"below {bar}: {row['direction']} {row['size']} {row['dtype']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

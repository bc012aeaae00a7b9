"""Peak memory beside diffusers: tensor bytes of a chunk in the middle, and resident memory of whole processes.

    python benchmarks/peers_memory.py [--meta-only | --processes] [--size 96x64] [--dtype bfloat16] [--device cpu]
        [--threads N] [--out benchmarks/results/peers_memory.json] [--plot docs/images/peers-memory.png ...]

All contestants have the same random weights at the full width of CogVideoX and the same chunks.

**Tensor bytes.** Weights are not counted; the chunk's input, output and contexts are. Contestants:

* diffusers: its encoder or decoder with its own ``conv_cache``, as its ``encode`` and ``decode`` loop over chunks.
* blocking .cpu(): longvid's model, but each context leaves by ``.contiguous().detach().clone().cpu()`` as soon as its
  window is complete and comes back by a blocking ``.to(device)`` when its layer runs again: what CogVideo's SAT code
  does, and SeedVR with ``memory_device="cpu"``.
* longvid with offload none, auto (a budget halfway between the least possible and no offload, in slices as planned),
  all (as planned, and on meta with no context fetched early), all in channels last, slices of one frame and bands of
  rows with none fetched early, which is the least possible, and all to a file.

First exact bytes on ``meta`` at real sizes; these need no device, and with ``--meta-only`` they are all. Then real
tensors at ``--size``: peak of the third chunk, contexts on the device after it, and whether the outputs agree. On a CPU
bytes come from an AllocationTracker, on CUDA they are the allocator's peaks.

**Resident memory** (``--processes``): each contestant runs the first chunks of a video on the CPU in a process of its
own, which builds the model, so weights, libraries and all are included; the figure is the peak that the OS reports.
longvid runs as a session does: without a budget, and with ``offload="all"`` to a folder, since on a CPU host memory is
the device's own and only a file takes contexts out of it; memory is mapped as the command line has it. Bars, for the
latter: encode at most 0.5, decode at most 0.4 of diffusers; the exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from common import (
    CPU,
    DIRECTIONS,
    Step,
    chunk,
    fixed_plan,
    new_parser,
    open_diffusers,
    open_model,
    random_models,
    write_results,
)
from torch import Tensor
from tqdm import tqdm

from longvid import AllocationTracker, VideoSession, load_model
from longvid.environment import map_large_allocations
from longvid.events import Direction
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.host import peak_rss_bytes
from longvid.memory.offload import OffloadPolicy, Placement
from longvid.memory.offloader import Offloader
from longvid.models.base import NativeVAE
from longvid.models.context import Limits
from longvid.models.device import placed
from longvid.models.numerics import Numerics
from longvid.planning.kernel_choice import preferred_band_bytes
from longvid.planning.options import ComputeOptions, parse_dtype
from longvid.planning.plan import DirectionPlan
from longvid.units import format_bytes, parse_size

Opener: TypeAlias = Callable[[ExitStack], Step]
"""Makes what runs one chunk after the other of a new video; what it holds dies with the stack."""

META = torch.device("meta")
META_SIZES = ("720x480", "1280x720", "1920x1088")
REFERENCE = "longvid none"
LABELS = {
    "diffusers": "diffusers",
    "blocking .cpu()": "longvid's model, blocking .cpu()",
    "longvid none": "longvid, offload none",
    "longvid auto": "longvid, auto with half the room",
    "longvid all": "longvid, offload all",
    "longvid all, least": "longvid, offload all, no early fetch",
    "longvid all, slices": "the same in slices and bands",
}
COLOURS = ("#8a8a8a", "#d9a441", "#b3d4ea", "#7fb0d8", "#4280b8", "#2b649c", "#12385e")
BARS = {"encode": 0.5, "decode": 0.4}
IN_A_FILE = "longvid, contexts in a file"
PROCESSES = ("diffusers", "longvid", IN_A_FILE)


# --------------------------------------------------------------------------------------------------- contestants


class _Held:
    """A context in pageable host memory, taken there and back while everything waits."""

    def __init__(self, context: Tensor) -> None:
        self._shape, self._dtype, self._device = context.shape, context.dtype, context.device
        self._bytes: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None
        self._host: Tensor | None = None
        if context.device.type == "cpu":  # .cpu() would be an alias; numpy's memory is not counted as the device's
            self._bytes = context.view(-1).view(torch.uint8).numpy().copy()
        elif not context.is_meta:
            self._host = context.cpu()

    def back(self) -> Tensor:
        """A new tensor on the device."""
        if self._host is not None:
            return self._host.to(self._device)
        context = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if self._bytes is not None:
            np.copyto(context.view(-1).view(torch.uint8).numpy(), self._bytes)
        return context


class BlockingOffloader(Offloader):
    """Every context to the host and back in the computing thread, as module-held caches with ``.cpu()`` do."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, _Held] = {}

    def open(self, path: str) -> Tensor | None:
        """Bring the context back now."""
        held = self._held.pop(path, None)
        return None if held is None else held.back()

    def keep(self, path: str, tail: Tensor, *, complete: bool = True) -> None:
        """Take it out now, before the layer computes. The chain of calls is SAT's."""
        self._held[path] = _Held(tail.contiguous().detach().clone())

    def drop(self) -> None:
        """Free every context."""
        self._held.clear()


def open_longvid(
    model: NativeVAE,
    direction: Direction,
    placement: Placement | None,
    device: torch.device,
    folder: Path | None = None,
    limits: Limits | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Opener:
    """longvid with this placement, or with blocking moves if there is none."""

    def opened(stack: ExitStack) -> Step:
        offloader: Offloader = BlockingOffloader()
        if placement is not None:
            offloader = Offloader(placement, stack.enter_context(CopyEngine(device, directory=folder)))
        return open_model(stack, model, direction, offloader, limits or Limits(), layout)[0]

    return opened


def contestants(
    theirs: Any, ours: NativeVAE, direction: Direction, size: str, dtype: str, device: torch.device
) -> dict[str, Opener]:
    """Openers by name. On a real device contexts go to a file once; on meta none is fetched early once."""
    plain = ComputeOptions(dtype=parse_dtype(dtype), offload=OffloadPolicy("none"), keep_buffers=False)

    def plan(tile_bytes: int | None = None, **asked: Any) -> DirectionPlan:
        return fixed_plan(ours, direction, parse_size(size), replace(plain, **asked), tile_bytes)

    part, auto = plan(), OffloadPolicy()
    halfway = plan(offload=auto, allowed_bytes=(part.minimum_bytes + part.nothing_offloaded_bytes) // 2)
    everything = plan(offload=OffloadPolicy("all")).placement
    numerics = Numerics(layout="channels_last")
    least = plan(preferred_band_bytes(CPU), numerics=numerics, slice_frames=1, offload=auto)

    def in_a_file(stack: ExitStack) -> Step:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return open_longvid(ours, direction, everything, device, folder)(stack)

    found = {
        "diffusers": lambda _: open_diffusers(theirs, direction),
        "blocking .cpu()": open_longvid(ours, direction, None, device),
        REFERENCE: open_longvid(ours, direction, part.placement, device),
        "longvid auto": open_longvid(ours, direction, halfway.placement, device, limits=halfway.execution.limits),
        "longvid all": open_longvid(ours, direction, everything, device),
        "longvid all, slices": open_longvid(
            ours, direction, least.cost_model.least, device, None, least.execution.limits, torch.channels_last_3d
        ),
    }
    if device == META:
        return found | {"longvid all, least": open_longvid(ours, direction, part.cost_model.least, device)}
    return found | {"longvid all, file": in_a_file}


# --------------------------------------------------------------------------------------------------- tensor bytes


def measure_bytes(opener: Opener, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
    """Peak of the last chunk, contexts on the device after it, and the outputs of all on the host."""
    outputs: list[Tensor] = []
    device = inputs[0].device
    with ExitStack() as stack:
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            step = opener(stack)
            for x in inputs:
                torch.cuda.reset_peak_memory_stats(device)
                out = step(x.clone())
                torch.cuda.synchronize(device)
                peak_bytes = torch.cuda.max_memory_allocated(device) - before
                outputs.append(out.cpu())
                del out
            idle_bytes = torch.cuda.memory_allocated(device) - before
        else:
            tracker, step = AllocationTracker(), opener(stack)
            for x in inputs:
                tracker.reset_peak()
                with tracker:
                    out = step(x.clone())
                if device != META:
                    outputs.append(out.clone())
                del out
            peak_bytes, idle_bytes = tracker.peak_bytes, tracker.live_bytes
    return {"peak_bytes": peak_bytes, "idle_bytes": idle_bytes}, outputs


def measure_sizes(
    theirs: Any, ours: NativeVAE, sizes: Sequence[str], dtype: str, device: torch.device
) -> list[dict[str, Any]]:
    """A row for every size, direction and contestant."""
    rows = []
    for size in tqdm(sizes, desc=str(device)):
        for direction in DIRECTIONS:
            inputs = [chunk(direction, *parse_size(size), getattr(torch, dtype), index, device) for index in range(3)]
            outputs: dict[str, list[Tensor]] = {}
            for name, opener in contestants(theirs, ours, direction, size, dtype, device).items():
                row: dict[str, Any] = {"size": size, "direction": direction, "contestant": name}
                try:
                    found, outputs[name] = measure_bytes(opener, inputs)
                    row |= found
                except RuntimeError as exc:
                    row["error"] = str(exc).splitlines()[0]
                rows.append(row)
            if device != META:
                for row in rows[-len(outputs) :]:
                    row["outputs"] = agreement(outputs[row["contestant"]], outputs[REFERENCE])
    return rows


def agreement(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, Any]:
    """How far outputs are from the reference's."""
    pairs = list(zip(outputs, reference, strict=True))
    return {
        "bitwise": all(torch.equal(a, b) for a, b in pairs),
        "max_abs_difference": max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
    }


def print_meta(rows: Sequence[Mapping[str, Any]]) -> None:
    """Peaks at real sizes as a table in GB, beside diffusers."""
    print(f"\nexact peak tensor bytes of a middle chunk (and contexts on the device after it), GB\n{'':20}", end="")
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    print("".join(f"{name:>19}" for name in names) + f"{'all / diffusers':>19}{'slices / diffusers':>19}")
    for size in dict.fromkeys(row["size"] for row in rows):
        for direction in DIRECTIONS:
            by_name = {r["contestant"]: r for r in rows if (r["size"], r["direction"]) == (size, direction)}
            cells = [
                f"{r['peak_bytes'] / 1e9:.2f} ({r['idle_bytes'] / 1e9:.2f})" if "peak_bytes" in r else "raises"
                for r in by_name.values()
            ]
            peak = by_name["diffusers"].get("peak_bytes")
            ours = (by_name[name]["peak_bytes"] for name in ("longvid all", "longvid all, slices"))
            cells += [f"{ours_bytes / peak:.3f}" if peak else "-" for ours_bytes in ours]
            print(f"{size + ' ' + direction:20}" + "".join(f"{cell:>19}" for cell in cells))
    for row in rows:
        if "error" in row:
            print(f"{row['contestant']} raises at {row['size']} {row['direction']}: {row['error']}")


def print_real(rows: Sequence[Mapping[str, Any]]) -> None:
    """The measured chunks as a table."""
    print(f"\n{'':40}{'peak MB':>10}{'idle MB':>10}  outputs")
    for row in rows:
        label = f"{row['size']} {row['direction']} {row['contestant']}"
        agreed = row["outputs"]
        said = "bitwise equal" if agreed["bitwise"] else f"differ by at most {agreed['max_abs_difference']:.3g}"
        print(f"{label:40}{row['peak_bytes'] / 1e6:>10.1f}{row['idle_bytes'] / 1e6:>10.1f}  {said}")


def draw(rows: Sequence[Mapping[str, Any]], paths: Sequence[Path], dtype: str) -> None:
    """Bars of the peaks at the two smaller sizes."""
    from matplotlib.figure import Figure

    groups = [(size, direction) for size in META_SIZES[:2] for direction in DIRECTIONS]
    peaks = {(r["size"], r["direction"], r["contestant"]): r.get("peak_bytes", 0) / 1e9 for r in rows}
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.125
    for i, (name, label) in enumerate(LABELS.items()):
        at = [k + (i - 3) * width for k in range(len(groups))]
        heights = [peaks[*group, name] for group in groups]
        bars = axes.bar(at, heights, width * 0.92, label=label, color=COLOURS[i])
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8.5)
    axes.set_xticks(range(len(groups)), [f"{direction}\n{size}" for size, direction in groups], fontsize=11)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("peak of a middle chunk, GB")
    axes.set_title(f"CogVideoX VAE, {dtype}: tensor bytes beside the weights", loc="left", fontsize=12)
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(visible=True, color="#e4e4e4")
    axes.set_axisbelow(True)
    for path in paths:
        figure.savefig(path)


def compare_tensor_bytes(args: argparse.Namespace) -> int:
    """Measure, print tables, write the results and draw."""
    dtype = getattr(torch, args.dtype)
    theirs, _ = random_models(dtype)
    skeleton = cast("NativeVAE", load_model("cogvideox-2b")).to(dtype)
    meta = measure_sizes(theirs.to(META), skeleton, META_SIZES, args.dtype, META)
    print_meta(meta)
    real: list[dict[str, Any]] = []
    if not args.meta_only:
        device = torch.empty(0, device=args.device).device
        theirs, ours = random_models(dtype, device)
        real = measure_sizes(theirs, ours, [args.size], args.dtype, device)
        print_real(real)
    if args.plot:
        draw(meta, args.plot, args.dtype)
    write_results(args.out, args.device, dtype=args.dtype, meta=meta, real=real)
    # Offloading never changes a result. diffusers' kernels and those in another layout add in another order.
    other = ("diffusers", "longvid all, slices")
    moved = [row for row in real if row["contestant"] not in other and not row["outputs"]["bitwise"]]
    for row in moved:
        print(f"DIFFERS: {row['direction']} {row['contestant']}")
    return int(bool(moved))


# --------------------------------------------------------------------------------------------------- processes


def run_here(contestant: str, direction: str, size: str, dtype: torch.dtype, num_chunks: int) -> int:
    """Peak resident bytes of this process after the first chunks."""
    height, width = parse_size(size)
    torch.set_default_dtype(dtype)
    chunks = [chunk(direction, height, width, dtype, index) for index in range(num_chunks)]
    with ExitStack() as stack, torch.inference_mode():
        if contestant == "diffusers":
            step = open_diffusers(random_models(dtype)[0], direction)
            for x in chunks:
                step(x)
            return peak_rss_bytes()
        map_large_allocations()
        ours = placed(cast("NativeVAE", load_model("cogvideox-2b", random_weights=0)), CPU, dtype)
        where = stack.enter_context(tempfile.TemporaryDirectory()) if contestant == IN_A_FILE else None
        offload = "none" if where is None else "all"
        session = stack.enter_context(VideoSession(ours, device="cpu", offload=offload, offload_dir=where))
        if direction == "encode":
            encoder = stack.enter_context(session.encoder())
            for index in range(num_chunks):
                encoder.push(np.full((8 + (index == 0), height, width, 3), 9 * index, np.uint8))
            encoder.finish()
        else:
            decoder = stack.enter_context(session.decoder())
            for x in chunks:
                decoder.push(x)
            decoder.finish()
    return peak_rss_bytes()


def compare_processes(args: argparse.Namespace) -> int:
    """Run each contestant in a process of its own; whether a bar is missed."""
    rows: list[dict[str, Any]] = []
    for direction in DIRECTIONS:
        row: dict[str, Any] = {"direction": direction, "size": args.size, "dtype": args.dtype}
        for contestant in PROCESSES:
            command = [sys.executable, __file__, "--process", contestant, direction]
            command += ["--size", args.size, "--dtype", args.dtype, "--chunks", str(args.chunks)]
            # read when torch is imported; the command line sets it for itself
            env = os.environ if contestant == "diffusers" else {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            row[contestant] = int(done.stdout)
            print(
                f"{direction}: {contestant} {format_bytes(row[contestant])}, "
                f"{row[contestant] / row['diffusers']:.3f} of diffusers (bar {BARS[direction]})"
            )
        row["ratio"] = row["longvid"] / row["diffusers"]
        row["ratio in a file"] = row[IN_A_FILE] / row["diffusers"]
        rows.append(row)
    write_results(args.out, rows=rows)
    return int(any(row["ratio in a file"] > BARS[row["direction"]] for row in rows))


def main() -> int:
    """Compare tensor bytes, or whole processes."""
    parser = new_parser(__doc__)
    parser.add_argument("--size", help="of the real chunks; 96x64 by default, 480x272 with --processes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--meta-only", action="store_true", help="only the bytes at real sizes; seconds")
    parser.add_argument("--processes", action="store_true", help="resident memory of whole processes instead")
    parser.add_argument("--chunks", type=int, default=2, help="that a process runs")
    parser.add_argument("--process", nargs=2, metavar=("CONTESTANT", "DIRECTION"), help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    args.size = args.size or ("480x272" if args.processes else "96x64")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.process:
        print(run_here(args.process[0], args.process[1], args.size, getattr(torch, args.dtype), args.chunks))
        return 0
    return compare_processes(args) if args.processes else compare_tensor_bytes(args)


if __name__ == "__main__":
    raise SystemExit(main())

"""Memory and time of a chunk in the middle: longvid, diffusers, and contexts moved the way others move them.

    python benchmarks/peers_memory.py [--size 96x64] [--dtype bfloat16] [--rounds 5] [--device cpu] [--threads N]
        [--out benchmarks/results/peers_memory.json] [--plot docs/images/peers-memory.png ...]

Contestants, all with the same random weights at the full width of CogVideoX and the same chunks:

* diffusers: its encoder or decoder with its own ``conv_cache``, as its ``encode`` and ``decode`` loop over chunks.
* blocking .cpu(): longvid's model, but each context leaves by ``.contiguous().detach().clone().cpu()`` as soon as its
  window is complete and comes back by a blocking ``.to(device)`` when its layer runs again: what CogVideo's SAT code
  does, and SeedVR with ``memory_device="cpu"``.
* longvid with offload none, auto (a budget halfway between the least possible and no offload, in slices as planned),
  all (as planned, and on meta with no context fetched early), all in channels last, slices of one frame and bands of
  rows with none fetched early, which is the least possible, and all to a file.

First exact tensor bytes on ``meta`` at real sizes; these need no device. Then the real thing at ``--size``: peak bytes
of the third chunk and contexts on the device after it, whether the outputs agree, and seconds per chunk, medians over
rounds in which the contestants alternate. Weights are not counted; the chunk's input, output and contexts are.

On a CPU bytes come from an AllocationTracker, and since "device" and host are one memory there, times say what the
moving costs in work, not what a bus would add. On CUDA bytes are the allocator's peaks and times those of events.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longvid import AllocationTracker, ConvCache, load_model, make_plan
from longvid.environment import describe_machine
from longvid.events import Direction
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offload import Placement
from longvid.memory.offloader import Offloader
from longvid.models.cogvideox import CogVideoXVAE
from longvid.models.numerics import Numerics
from longvid.planning.kernel_choice import preferred_band_bytes
from longvid.planning.plan import Slicing
from longvid.units import parse_size

Step: TypeAlias = Callable[[Tensor], Tensor]
Opener: TypeAlias = Callable[[ExitStack], Step]
"""Makes what runs one chunk after the other of a new video; what it holds dies with the stack."""

META = torch.device("meta")
META_SIZES = ("720x480", "1280x720", "1920x1088")
PLOT_SIZES = ("720x480", "1280x720")
DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")
REFERENCE = "longvid none"
COLOURS = ("#8a8a8a", "#d9a441", "#b3d4ea", "#7fb0d8", "#4280b8", "#2b649c", "#12385e")


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

    def keep(self, path: str, tail: Tensor) -> None:
        """Take it out now, before the layer computes. The chain of calls is SAT's."""
        self._held[path] = _Held(tail.contiguous().detach().clone())

    def drop(self) -> None:
        """Free every context."""
        self._held.clear()


def open_diffusers(vae: Any, direction: str) -> Opener:
    """Its own modules with its own cache handling."""
    module = vae.encoder if direction == "encode" else vae.decoder

    def opened(stack: ExitStack) -> Step:
        kept: dict[str, Any] = {"cache": None}
        stack.callback(kept.clear)

        @torch.no_grad()
        def step(x: Tensor) -> Tensor:
            out, kept["cache"] = module(x, conv_cache=kept["cache"])
            assert isinstance(out, Tensor)
            return out

        return step

    return opened


def open_longvid(
    model: CogVideoXVAE,
    direction: Direction,
    placement: Placement | None,
    device: torch.device,
    folder: Path | None = None,
    slicing: Slicing | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Opener:
    """longvid with this placement, or with blocking moves if there is none."""
    module, run = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)

    def opened(stack: ExitStack) -> Step:
        if placement is None:
            offloader: Offloader = BlockingOffloader()
        else:
            transfer = stack.enter_context(CopyEngine(device, directory=folder))
            offloader = Offloader(placement, transfer)
        limits = slicing or Slicing()
        cache = stack.enter_context(
            ConvCache(module, slice_elements=limits.elements, band_elements=limits.band_elements, offloader=offloader)
        )
        return lambda x: run(x.contiguous(memory_format=layout), cache)

    return opened


def contestants(
    theirs: Any,
    ours: CogVideoXVAE,
    direction: Direction,
    size: str,
    dtype: str,
    device: torch.device,
    folder: Path | None,
) -> dict[str, Opener]:
    """Openers by name. With a folder, contexts in a file there; without, no early fetches instead."""
    height, width = parse_size(size)

    plan = partial(make_plan, ours, height=height, width=width, dtype=dtype, directions=(direction,))
    part = plan(offload="none").direction(direction)
    halfway = plan(memory=(part.minimum_bytes + part.nothing_offloaded_bytes) // 2).direction(direction)
    everything = plan(offload="all").direction(direction).placement
    found = {
        "diffusers": open_diffusers(theirs, direction),
        "blocking .cpu()": open_longvid(ours, direction, None, device),
        REFERENCE: open_longvid(ours, direction, part.placement, device),
        "longvid auto": open_longvid(ours, direction, halfway.placement, device, slicing=halfway.slicing),
        "longvid all": open_longvid(ours, direction, everything, device),
    }
    numerics = Numerics(layout="channels_last")
    limits: dict[str, Any] = {"slice_frames": 1, "band_bytes": preferred_band_bytes(torch.device("cpu"))}
    least = plan(numerics=numerics, **limits).direction(direction)
    found["longvid all, slices"] = open_longvid(
        ours, direction, least.timeline.least, device, None, least.slicing, torch.channels_last_3d
    )
    if folder is None:
        found["longvid all, least"] = open_longvid(ours, direction, part.timeline.least, device)
    else:
        found["longvid all, file"] = open_longvid(ours, direction, everything, device, folder)
    return found


# --------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Chunks:
    """Inputs of a video: the first chunk is one frame, or one latent, longer."""

    direction: Direction
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def make(self, index: int) -> Tensor:
        """Noise that depends on the index only; a tensor without data on meta."""
        if self.direction == "encode":
            shape = (1, 3, 8 + (index == 0), self.height, self.width)
        else:
            shape = (1, 16, 2 + (index == 0), self.height // 8, self.width // 8)
        if self.device == META:
            return torch.empty(shape, dtype=self.dtype, device=META)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        return (noise.clamp(-1, 1) if self.direction == "encode" else noise).to(self.device, self.dtype)


def measure_bytes(opener: Opener, chunks: Chunks) -> tuple[dict[str, Any], list[Tensor]]:
    """Peak of the third chunk, contexts on the device after it, and the outputs of all three on the host."""
    outputs: list[Tensor] = []
    inputs = [chunks.make(index) for index in range(3)]
    with ExitStack() as stack:
        if chunks.device.type == "cuda":
            before = torch.cuda.memory_allocated(chunks.device)
            step = opener(stack)
            for x in inputs:
                torch.cuda.reset_peak_memory_stats(chunks.device)
                out = step(x.clone())
                torch.cuda.synchronize(chunks.device)
                peak_bytes = torch.cuda.max_memory_allocated(chunks.device) - before
                outputs.append(out.cpu())
                del out
            idle_bytes = torch.cuda.memory_allocated(chunks.device) - before
        else:
            tracker, step = AllocationTracker(), opener(stack)
            for x in inputs:
                tracker.reset_peak()
                with tracker:
                    out = step(x.clone())
                if chunks.device != META:
                    outputs.append(out.clone())
                del out
            peak_bytes, idle_bytes = tracker.peak_bytes, tracker.live_bytes
    return {"peak_bytes": peak_bytes, "idle_bytes": idle_bytes}, outputs


def on_meta(dtype: str) -> list[dict[str, Any]]:
    """Exact bytes at real sizes."""
    with META:
        theirs: Any = diffusers.AutoencoderKLCogVideoX()  # type: ignore[no-untyped-call]
        theirs = theirs.to(getattr(torch, dtype)).eval()
    ours = load_model("cogvideox-2b")
    assert isinstance(ours, CogVideoXVAE)
    ours = ours.to(getattr(torch, dtype))
    rows = []
    for size in tqdm(META_SIZES, desc="meta"):
        for direction in DIRECTIONS:
            chunks = Chunks(direction, *parse_size(size), getattr(torch, dtype), META)
            for name, opener in contestants(theirs, ours, direction, size, dtype, META, None).items():
                row: dict[str, Any] = {"size": size, "direction": direction, "contestant": name}
                try:
                    row |= measure_bytes(opener, chunks)[0]
                except RuntimeError as exc:
                    row["error"] = str(exc).splitlines()[0]
                rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------- the real thing


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of some work, by events on CUDA."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.accelerator.current_stream(device))
    work()
    stop.record(torch.accelerator.current_stream(device))
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(stop)) / 1000


def measure_seconds(openers: Mapping[str, Opener], chunks: Chunks, rounds: int, burst: int) -> dict[str, list[float]]:
    """Seconds per chunk of each contestant in each round. All videos are open at once and take turns, a few chunks
    each, and every round begins with another one."""
    names, x = list(openers), chunks.make(1)
    with ExitStack() as stack:
        steps = {name: opener(stack) for name, opener in openers.items()}

        def several(step: Step, count: int) -> None:
            for _ in range(count):
                step(x)

        first = chunks.make(0)
        for step in steps.values():
            step(first)
            several(step, 1)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in tqdm(range(rounds), desc=f"{chunks.direction} rounds"):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(timed(partial(several, steps[name], burst), chunks.device) / burst)
    return seconds


def agreement(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, Any]:
    """How far outputs are from the reference's."""
    pairs = list(zip(outputs, reference, strict=True))
    return {
        "bitwise": all(torch.equal(a, b) for a, b in pairs),
        "max_abs_difference": max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
        "rms_difference": max(float((a.float() - b.float()).square().mean().sqrt()) for a, b in pairs),
        "rms_reference": max(float(b.float().square().mean().sqrt()) for _, b in pairs),
    }


def for_real(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Bytes, outputs and seconds on the device."""
    device, dtype = torch.empty(0, device=args.device).device, getattr(torch, args.dtype)
    torch.manual_seed(0)
    theirs: Any = diffusers.AutoencoderKLCogVideoX()  # type: ignore[no-untyped-call]
    theirs = theirs.to(device, dtype).eval().requires_grad_(False)
    ours = load_model(theirs)
    assert isinstance(ours, CogVideoXVAE)
    assert ours.encoder.conv_in.conv.weight.data_ptr() == theirs.encoder.conv_in.conv.weight.data_ptr()
    rows = []
    for direction in DIRECTIONS:
        chunks = Chunks(direction, *parse_size(args.size), dtype, device)
        openers = contestants(theirs, ours, direction, args.size, args.dtype, device, folder)
        measured = {name: measure_bytes(opener, chunks) for name, opener in openers.items()}
        seconds = measure_seconds(openers, chunks, args.rounds, args.burst)
        # The ratio of each round, then their median: what slows the machine down for a while slows both.
        for name, (sizes, outputs) in measured.items():
            ratios = [a / b for a, b in zip(seconds[name], seconds[REFERENCE], strict=True)]
            rows.append(
                {
                    "size": args.size,
                    "direction": direction,
                    "contestant": name,
                    **sizes,
                    "seconds_per_chunk": statistics.median(seconds[name]),
                    "seconds": seconds[name],
                    "ratio_to_none": statistics.median(ratios),
                    "ratios": ratios,
                    "outputs": agreement(outputs, measured[REFERENCE][1]),
                }
            )
    return rows


# --------------------------------------------------------------------------------------------------- for people


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


def print_real(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """The measured chunks as a table."""
    print(f"\nmeasured on {args.device} at {args.size} in {args.dtype}, {args.rounds} rounds of {args.burst} chunks")
    print(f"{'':27}{'peak MB':>10}{'idle MB':>10}{'s / chunk':>11}{'ratio':>8}{'range':>16}  outputs")
    for row in rows:
        agreed, ratios = row["outputs"], row["ratios"]
        said = "bitwise equal" if agreed["bitwise"] else f"differ by at most {agreed['max_abs_difference']:.3g}"
        spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
        print(
            f"{row['direction'] + ' ' + row['contestant']:27}{row['peak_bytes'] / 1e6:>10.1f}"
            f"{row['idle_bytes'] / 1e6:>10.1f}{row['seconds_per_chunk']:>11.3f}{row['ratio_to_none']:>8.3f}"
            f"{spread:>16}  {said}"
        )


def draw(rows: Sequence[Mapping[str, Any]], paths: Sequence[Path], dtype: str) -> None:
    """Bars of the peaks at two sizes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "diffusers": f"diffusers {diffusers.__version__}",
        "blocking .cpu()": "longvid's model, blocking .cpu()",
        "longvid none": "longvid, offload none",
        "longvid auto": "longvid, auto with half the room",
        "longvid all": "longvid, offload all",
        "longvid all, least": "longvid, offload all, no early fetch",
        "longvid all, slices": "the same in slices and bands",
    }
    groups = [(size, direction) for size in PLOT_SIZES for direction in DIRECTIONS]
    figure, axes = plt.subplots(figsize=(11, 4.8), dpi=150, layout="constrained")
    width = 0.125
    for i, (name, label) in enumerate(labels.items()):
        values = [
            next(r["peak_bytes"] / 1e9 for r in rows if (r["size"], r["direction"], r["contestant"]) == (*g, name))
            for g in groups
        ]
        at = [k + (i - 3) * width for k in range(len(groups))]
        bars = axes.bar(at, values, width * 0.92, label=label, color=COLOURS[i])
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
    plt.close(figure)


def main() -> int:
    """Measure, print tables, write the results and draw."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="96x64", help="of the real chunks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=int, default=1, help="chunks that a contestant runs in a round")
    parser.add_argument("--meta-only", action="store_true", help="only the bytes at real sizes; seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    meta = on_meta(args.dtype)
    print_meta(meta)
    real: list[dict[str, Any]] = []
    if not args.meta_only:
        with tempfile.TemporaryDirectory() as folder:
            real = for_real(args, Path(folder))
        print_real(real, args)
    if args.plot:
        draw(meta, args.plot, args.dtype)
    if args.out:
        record = {
            "command": "python " + " ".join(sys.argv),
            "machine": describe_machine(args.device),
            "diffusers": diffusers.__version__,
            "dtype": args.dtype,
            "meta": meta,
            "real": real,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    # Where contexts are never changes a result: on a CPU the kernels are the same, so the bits must be.
    other = ("diffusers", "longvid all, slices")  # the latter in another layout, which agrees to rounding
    moved = [row for row in real if row["contestant"] not in other and not row["outputs"]["bitwise"]]
    for row in moved:
        print(f"DIFFERS: {row['direction']} {row['contestant']}")
    return int(bool(moved))


if __name__ == "__main__":
    raise SystemExit(main())

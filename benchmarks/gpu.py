"""All of it on CUDA in one call, a few minutes: rates of the device, then longvid and diffusers chunk by chunk.

    python benchmarks/gpu.py [--size 720x480] [--rounds 5] [--skip-large] [--out benchmarks/results/gpu.json]

1. Convolutions in bfloat16 in both layouts for the widths of the model, with a look for the slow fallback that some
   versions of PyTorch take (``slow_conv_dilated3d``, vol2col).
2. Norms: PyTorch's GroupNorm and SiLU against longvid's two passes (Triton where it runs).
3. The link: pinned and pageable, each way, and both ways at once.
4. A middle chunk of the full CogVideoX model, encode and decode, alternating: diffusers, longvid with nothing and with
   everything offloaded; times by events, peaks by the allocator, beside the plan.
5. A first and a middle chunk of a 1920x1088 decode, which diffusers cannot run untiled.

Bars: decode at least 2.5 times and encode at least 2 times the speed of diffusers at 720x480; measured peak within 10 %
of the plan and the reserve; no fallback; the large decode runs. Exit code 1 if one is missed, 2 without a device.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DIRECTIONS,
    chunk,
    fixed_plan,
    new_parser,
    open_diffusers,
    open_model,
    random_models,
    take_turns,
    write_results,
)
from torch import Tensor

from longvid import ConvCache
from longvid.events import Direction
from longvid.memory.budget import default_reserved_bytes
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offload import OffloadPolicy
from longvid.memory.offloader import Offloader
from longvid.models.base import NativeVAE
from longvid.models.device import tensor_bytes
from longvid.models.layers.norms import GroupNormSiLU
from longvid.models.numerics import Numerics
from longvid.planning.options import ComputeOptions
from longvid.units import parse_size

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
LAST = torch.channels_last_3d
BARS = {"encode": 2.0, "decode": 2.5}
_LINK_BYTES = 256 * 2**20


def by_events(work: Callable[[], object]) -> float:
    """Seconds that some work takes on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Median by events, after one call that is not counted."""
    work()
    return statistics.median(by_events(work) for _ in range(rounds))


def convolution_rates() -> list[dict[str, Any]]:
    """TFLOP/s of 3x3x3 convolutions by width, frames and layout, and whether a kernel for dilation or im2col ran."""
    rows = []
    for channels, height, width in ((96, 480, 720), (128, 480, 720), (256, 240, 360), (512, 60, 90)):
        weight = torch.randn(channels, channels, 3, 3, 3, device=CUDA, dtype=DTYPE)
        for frames in (1, 4, 8):
            row: dict[str, Any] = {"channels": channels, "size": f"{width}x{height}", "frames": frames}
            for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", LAST)):
                x = torch.randn(1, channels, frames + 2, height, width, device=CUDA, dtype=DTYPE)
                x = x.contiguous(memory_format=layout)
                flops = 2 * 27 * channels**2 * frames * height * width
                row[f"{name}_tflops"] = flops / seconds(lambda x=x, w=weight: F.conv3d(x, w, padding=(0, 1, 1))) / 1e12  # type: ignore[misc]
                with torch.profiler.profile() as profile:
                    F.conv3d(x, weight, padding=(0, 1, 1))
                names = " ".join(event.key for event in profile.key_averages())
                row[f"{name}_fallback"] = any(word in names for word in ("slow_conv", "vol2col"))
            rows.append(row)
    return rows


@torch.inference_mode()
def norm_rates() -> list[dict[str, Any]]:
    """GB/s, counting one read for the statistics, one for the second pass and one write."""
    rows = []
    for channels, height, width in ((128, 480, 720), (256, 240, 360), (512, 60, 90)):
        norm = GroupNormSiLU(32, channels, eps=1e-6).to(CUDA, DTYPE)
        x = torch.randn(1, channels, 8, height, width, device=CUDA, dtype=DTYPE)
        y, out = x.contiguous(memory_format=LAST), torch.empty_like(x, memory_format=LAST)
        moved = 3 * x.numel() * x.element_size()

        def theirs(x: Tensor = x, norm: GroupNormSiLU = norm) -> Tensor:
            return F.silu(F.group_norm(x, 32, norm.weight, norm.bias, norm.eps))

        def ours(y: Tensor = y, out: Tensor = out, norm: GroupNormSiLU = norm) -> None:
            norm.fit(y).write(range(y.shape[2]), range(y.shape[3]), out)

        rates = {"torch": moved / seconds(theirs) / 1e9, "longvid": moved / seconds(ours) / 1e9}
        rows.append({"channels": channels, **{f"{name}_gb_per_second": rate for name, rate in rates.items()}})
    return rows


def link_rates() -> dict[str, float]:
    """GB/s of host and device, one way at a time and both at once."""
    device = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=CUDA)
    other = torch.empty_like(device)
    pageable, pinned = (
        torch.empty(_LINK_BYTES, dtype=torch.uint8),
        torch.empty(_LINK_BYTES, dtype=torch.uint8).pin_memory(),
    )
    second = torch.empty(_LINK_BYTES, dtype=torch.uint8).pin_memory()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second.copy_(other, non_blocking=True)
        device.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)

    works: dict[str, Callable[[], object]] = {
        "pinned_to_device": lambda: device.copy_(pinned, non_blocking=True),
        "pinned_to_host": lambda: pinned.copy_(device, non_blocking=True),
        "pageable_to_device": lambda: device.copy_(pageable),
        "pageable_to_host": lambda: pageable.copy_(device),
        "both_ways_each": both,
    }
    return {name: _LINK_BYTES / seconds(work) / 1e9 for name, work in works.items()}


def held_bytes(model: NativeVAE, cache: ConvCache) -> int:
    """Of weights and contexts that are on the device before a chunk."""
    return tensor_bytes(model) + cache.device_bytes


@torch.no_grad()
def chunks(theirs: Any, ours: NativeVAE, direction: Direction, size: str, rounds: int) -> dict[str, Any]:
    """Seconds, peaks and plans of the contestants, which take turns chunk by chunk."""
    height, width = parse_size(size)
    numerics, reserved = Numerics(layout="channels_last"), default_reserved_bytes(CUDA)
    row: dict[str, Any] = {"direction": direction, "size": size}
    with ExitStack() as stack:
        steps: dict[str, Callable[[Tensor], Tensor]] = {}
        held: dict[str, Callable[[], int]] = {"diffusers": lambda: 0}
        "what the peak of each has in it and those of the others do not"
        if theirs is not None:
            reference = open_diffusers(theirs, direction)
            steps["diffusers"] = lambda x: reference(x.contiguous())
        for offload in ("none", "all"):
            asked = ComputeOptions(numerics=numerics, offload=OffloadPolicy.parse(offload), keep_buffers=False)
            part = fixed_plan(ours, direction, (height, width), asked)
            transfer = stack.enter_context(CopyEngine(CUDA))
            offloader = Offloader(part.placement, transfer, host_sizes=part.host_sizes)
            steps[f"longvid {offload}"], cache = open_model(
                stack, ours, direction, offloader, part.execution.limits, LAST
            )
            held[f"longvid {offload}"] = partial(held_bytes, ours, cache)
            row[f"planned longvid {offload}"] = part.steady_chunk_bytes
            row["reserved"] = reserved
        for index in range(2):
            for step in steps.values():
                step(chunk(direction, height, width, DTYPE, index, CUDA).contiguous(memory_format=LAST))
        x = chunk(direction, height, width, DTYPE, 1, CUDA).contiguous(memory_format=LAST)

        def measured(name: str) -> None:
            others = torch.cuda.memory_allocated() - held[name]()
            torch.cuda.reset_peak_memory_stats()
            steps[name](x)
            row[f"peak {name}"] = torch.cuda.max_memory_allocated() - others

        works = {name: partial(measured, name) for name in steps}
        row["seconds"] = found = take_turns(works, rounds, f"{direction} {size}", by_events)
        for name, times in found.items():
            row[f"frames per second {name}"] = 8 / statistics.median(times)
    return row


def main() -> int:
    """Measure everything, print it, write it."""
    parser = new_parser(__doc__)
    parser.add_argument("--size", default="720x480")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-large", action="store_true", help="no 1920x1088 decode")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 2
    theirs, ours = random_models(DTYPE, CUDA)
    record: dict[str, Any] = {
        "convolutions": convolution_rates(),
        "norms": norm_rates(),
        "link": link_rates(),
        "chunks": [chunks(theirs, ours, direction, args.size, args.rounds) for direction in DIRECTIONS],
    }
    if not args.skip_large:
        record["large"] = chunks(None, ours, "decode", "1920x1088", 2)
    print(json.dumps(record, indent=1))
    write_results(args.out, "cuda", **record)
    missed = [
        f"fallback at {row['channels']} channels, {row['frames']} frames, in channels last"
        for row in record["convolutions"]
        if row["channels_last_fallback"]
    ]
    for row in record["chunks"]:
        ratio = row["frames per second longvid none"] / row["frames per second diffusers"]
        if ratio < BARS[row["direction"]]:
            missed.append(f"{row['direction']} is {ratio:.2f} times diffusers, the bar is {BARS[row['direction']]}")
    for row in (*record["chunks"], *([record["large"]] if "large" in record else [])):
        for name in ("longvid none", "longvid all"):
            planned, peak = row[f"planned {name}"], row[f"peak {name}"]
            if not 0.9 * planned <= peak <= 1.1 * (planned + row["reserved"]):
                what = f"{row['direction']} {row['size']}, {name}"
                missed.append(f"{what}: a peak of {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f}")
    for line in missed:
        print(line, file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())

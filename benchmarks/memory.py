"""Peak tensor bytes of a middle chunk, longvid beside diffusers: same architecture, same chunk, one tracker.

    python benchmarks/memory.py [--size 720x480 ...] [--out benchmarks/results/memory.json]

Runs on meta tensors, so it needs neither a device nor weights, and the numbers are exact and the same everywhere.
Weights are not counted; contexts are. diffusers keeps the old and the new contexts during a chunk, and both count.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longvid import AllocationTracker, ConvCache, load_model
from longvid.units import parse_size

META = torch.device("meta")
DTYPE = torch.bfloat16


def chunk(direction: str, index: int, height: int, width: int) -> Tensor:
    """A chunk's input on meta: pixels to encode or latents to decode."""
    if direction == "encode":
        return torch.empty((1, 3, 8 + (index == 0), height, width), dtype=DTYPE, device=META)
    return torch.empty((1, 16, 2 + (index == 0), height // 8, width // 8), dtype=DTYPE, device=META)


def peak(run: Callable[[Tensor], Any], direction: str, height: int, width: int) -> int:
    """Peak bytes of the third chunk, whatever the second left alive included."""
    tracker = AllocationTracker()
    with tracker:
        for index in range(3):
            tracker.reset_peak()
            run(chunk(direction, index, height, width))
    return tracker.peak_bytes


def measure_longvid(model: Any, direction: str, height: int, width: int) -> dict[str, Any]:
    """longvid, every context resident."""
    module, step = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)
    with ConvCache(module) as cache:
        peak_bytes = peak(lambda x: step(x, cache), direction, height, width)
        return {"peak_bytes": peak_bytes, "cache_bytes": cache.nbytes}


def measure_diffusers(vae: Any, direction: str, height: int, width: int) -> dict[str, Any]:
    """diffusers' own encoder or decoder with its own cache handling, as its encode() and decode() loop over chunks."""
    module, kept = (vae.encoder if direction == "encode" else vae.decoder), {"cache": None}

    def run(x: Tensor) -> None:
        _, kept["cache"] = module(x, conv_cache=kept["cache"])

    with torch.no_grad():
        try:
            return {"peak_bytes": peak(run, direction, height, width)}
        except RuntimeError as exc:
            return {"error": str(exc).splitlines()[0]}


def main() -> int:
    """Measure, print a table and write the results."""
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["720x480", "1280x720", "1920x1088"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with META:
        theirs: Any = diffusers.AutoencoderKLCogVideoX()  # type: ignore[no-untyped-call]
        theirs = theirs.to(DTYPE).eval()
    ours: Any = load_model("cogvideox-2b")
    ours = ours.to(DTYPE)
    rows = []
    print(f"{'':20}{'diffusers GB':>14}{'longvid GB':>14}{'ratio':>8}{'contexts GB':>14}")
    for text in args.size:
        height, width = parse_size(text)
        for direction in ("encode", "decode"):
            a = measure_diffusers(theirs, direction, height, width)
            b = measure_longvid(ours, direction, height, width)
            ratio = b["peak_bytes"] / a["peak_bytes"] if "peak_bytes" in a else None
            rows.append({"size": text, "direction": direction, "diffusers": a, "longvid": b, "ratio": ratio})
            shown = f"{a['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in a else "raises"
            print(
                f"{text + ' ' + direction:20}{shown:>14}{b['peak_bytes'] / 1e9:>14.2f}"
                f"{'-' if ratio is None else f'{ratio:.3f}':>8}{b['cache_bytes'] / 1e9:>14.2f}"
            )
    if args.out:
        record = {
            "command": "python " + " ".join(sys.argv),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "dtype": "bfloat16",
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Speed of whole runs: a session and diffusers encode and decode the same video, in turns.

    python benchmarks/whole_runs.py [--size 240x160] [--frames 17] [--dtype bfloat16] [--rounds 3] [--threads 2]
        [--directions encode decode] [--out benchmarks/results/whole_runs.json]

longvid runs as its users run it: one open session, an array in and a store out, then that store in and a callable out,
with the session's own defaults. diffusers gets the same array, converts it to a tensor in [-1, 1], calls
``vae.encode`` and takes the mode; decoding, it gets the latents as a tensor, calls ``vae.decode`` and converts the
result to uint8 frames. Both have the same seeded weights at the full width of CogVideoX. The two take turns, forwards
and backwards; the first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import longvid as lv
from longvid.environment import describe_machine
from longvid.units import parse_size


def main() -> int:
    """Measure, print the medians and write the results."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="240x160")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directions", nargs="+", choices=("encode", "decode"), default=("encode", "decode"))
    parser.add_argument("--no-warm-up", action="store_true", help="count the first round, for runs that take an hour")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    height, width = parse_size(args.size)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    vae: Any = diffusers.AutoencoderKLCogVideoX()  # type: ignore[no-untyped-call]
    vae = vae.to(dtype).eval().requires_grad_(False)
    video = np.random.default_rng(0).integers(0, 256, (args.frames, height, width, 3), dtype=np.uint8)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, lv.VideoSession(lv.load_model(vae), device="cpu") as session:
        store = Path(scratch) / "latents.zarr"

        def encode() -> None:
            shutil.rmtree(store, ignore_errors=True)
            session.encode(video, store)

        def decode() -> None:
            session.decode(store, lambda frames: None)

        encode()
        latents = lv.open_store(store)
        z = torch.from_numpy(latents.read(0, latents.latents.shape[0]))

        @torch.inference_mode()
        def encode_with_diffusers() -> None:
            x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1.0).to(dtype)
            vae.encode(x).latent_dist.mode().float().numpy()

        @torch.inference_mode()
        def decode_with_diffusers() -> None:
            y = vae.decode(z.movedim(0, 1)[None].to(dtype)).sample
            y.float().add_(1.0).mul_(127.5).round_().clamp_(0, 255)[0].permute(1, 2, 3, 0).to(torch.uint8).numpy()

        runs: dict[str, dict[str, Callable[[], None]]] = {
            "encode": {"diffusers": encode_with_diffusers, "longvid": encode},
            "decode": {"diffusers": decode_with_diffusers, "longvid": decode},
        }
        for direction in args.directions:
            seconds: dict[str, list[float]] = {"diffusers": [], "longvid": []}
            for turn in tqdm(range(args.rounds + (not args.no_warm_up)), desc=f"{direction} {args.size} {args.dtype}"):
                for name in list(seconds)[:: -1 if turn % 2 else 1]:
                    started = time.perf_counter()
                    runs[direction][name]()
                    if turn or args.no_warm_up:
                        seconds[name].append(time.perf_counter() - started)
            ratios = [theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)]
            rows[direction] = {"seconds": seconds, "speedup": statistics.median(ratios), "ratios": ratios}
            print(
                f"{direction} {args.size} {args.dtype}: {statistics.median(ratios):.2f} times as fast as diffusers "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )
    if args.out:
        record = {
            "command": "python " + shlex.join(sys.argv),
            "machine": describe_machine("cpu"),
            "diffusers": diffusers.__version__,
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Resident memory of a whole process on the CPU: the full CogVideoX model in diffusers and in longvid.

    python benchmarks/rss.py [--size 480x272] [--dtype bfloat16] [--chunks 2] [--out benchmarks/results/rss.json]

Each contestant runs the first chunks of a video in a process of its own, which builds the model with random weights in
the dtype, so weights, libraries and all are included; the figure is the peak that the OS reports. longvid runs as a
session does: without a budget, and with ``offload="all"`` to a folder, since on a CPU host memory is the device's own
and only a file takes contexts out of it; memory is mapped as the command line has it. Bars, for the latter: encode at
most 0.5, decode at most 0.4 of diffusers; exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from speed import CPU, DIRECTIONS, chunk, open_diffusers

from longvid import VideoSession, load_model
from longvid.environment import describe_machine, map_large_allocations
from longvid.events import Direction
from longvid.memory.host import peak_rss_bytes
from longvid.models.cogvideox import CogVideoXVAE
from longvid.models.device import placed
from longvid.units import format_bytes, parse_size

BARS = {"encode": 0.5, "decode": 0.4}
IN_A_FILE = "longvid, contexts in a file"
CONTESTANTS = ("diffusers", "longvid", IN_A_FILE)


def run(contestant: str, direction: Direction, size: str, dtype: torch.dtype, chunks: int) -> int:
    """Peak resident bytes of this process after the chunks."""
    height, width = parse_size(size)
    torch.set_default_dtype(dtype)
    with ExitStack() as stack, torch.inference_mode():
        if contestant == "diffusers":
            import diffusers

            logging.getLogger("diffusers").setLevel(logging.ERROR)
            theirs: Any = diffusers.AutoencoderKLCogVideoX()  # type: ignore[no-untyped-call]
            step = open_diffusers(theirs.eval(), direction)
            for index in range(chunks):
                step(chunk(direction, height, width, dtype, index))
            return peak_rss_bytes()
        map_large_allocations()
        ours = placed(cast("CogVideoXVAE", load_model("cogvideox-2b", random_weights=0)), CPU, dtype)
        where = stack.enter_context(tempfile.TemporaryDirectory()) if contestant == IN_A_FILE else None
        session = stack.enter_context(
            VideoSession(ours, device="cpu", offload="none" if where is None else "all", offload_dir=where)
        )
        if direction == "encode":
            encoder = stack.enter_context(session.encoder())
            for index in range(chunks):
                encoder.push(np.full((8 + (index == 0), height, width, 3), 9 * index, np.uint8))
        else:
            decoder = stack.enter_context(session.decoder())
            for index in range(chunks):
                decoder.push(chunk(direction, height, width, dtype, index))
    return peak_rss_bytes()


def main() -> int:
    """Run both in processes of their own, or one of them in this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="480x272")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--contestant", choices=CONTESTANTS, help="run this one here and print its bytes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.contestant:
        print(run(args.contestant, args.directions[0], args.size, getattr(torch, args.dtype), args.chunks))
        return 0
    rows: list[dict[str, Any]] = []
    for direction in args.directions:
        row: dict[str, Any] = {"direction": direction, "size": args.size, "dtype": args.dtype}
        for contestant in CONTESTANTS:
            command = [sys.executable, __file__, "--contestant", contestant, "--directions", direction]
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
    if args.out:
        record = {"command": "python " + " ".join(sys.argv), "machine": describe_machine("cpu"), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row["ratio in a file"] > BARS[row["direction"]] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

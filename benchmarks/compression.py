"""Which codec for which array: rate and ratio of blosc's on frames and on latents of real footage.

    python benchmarks/compression.py VIDEO [VIDEO ...] [--frames 32] [--rounds 3]
        [--out benchmarks/results/compression.json]

Of every video the first frames at their own size, packed RGB as a store of frames has them, and the float16 latents
that `tiny` makes of them, in chunks of about 4 MiB; one thread, the best of the rounds, in CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from tqdm import tqdm

import longvid as lv
from longvid.environment import describe_machine
from longvid.media.sources import open_source

CHOICES = [*product(("zstd",), (1, 3), ("noshuffle", "shuffle", "bitshuffle")), ("lz4", 1, "noshuffle")]
SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
CHUNK_BYTES = 4 * 2**20


def arrays_of(video: Path, num_frames: int) -> dict[str, npt.NDArray[Any]]:
    """Frames (T, H, W, 3) uint8 and latents (t, c, h, w) float16 of the beginning of a video."""
    with open_source(video, frames=num_frames) as source:
        frames = np.concatenate([block.frames_THWC for block in source.blocks()])
    with tempfile.TemporaryDirectory() as folder, lv.VideoSession("tiny", device="cpu") as session:
        session.encode(frames, f"{folder}/a.zarr", frame_rate=24)
        latents = lv.open_store(f"{folder}/a.zarr").latents[:]
    return {"frames": np.ascontiguousarray(frames), "latents": np.asarray(latents)}


def measure(array: npt.NDArray[Any], rounds: int) -> list[dict[str, Any]]:
    """Rate and ratio of every codec."""
    step = max(1, CHUNK_BYTES // array[0].nbytes)
    chunks = [array[i : i + step] for i in range(0, len(array), step)]
    rows = []
    for name, level, shuffle in CHOICES:
        codec = blosc.Blosc(cname=name, clevel=level, shuffle=SHUFFLES[shuffle])
        writes, reads = [], []
        for _ in range(rounds):
            started = time.process_time()
            packed = [codec.encode(chunk) for chunk in chunks]
            halfway = time.process_time()
            for one in packed:
                codec.decode(one)
            writes.append(halfway - started)
            reads.append(time.process_time() - halfway)
        rows.append(
            {
                "codec": f"{name} {level} {shuffle}",
                "write_mb_per_second": array.nbytes / min(writes) / 1e6,
                "read_mb_per_second": array.nbytes / min(reads) / 1e6,
                "ratio": array.nbytes / sum(map(len, packed)),
            }
        )
    return rows


def main() -> int:
    """Measure, print tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    blosc.use_threads = False
    results = []
    for video in tqdm(args.videos):
        for name, array in arrays_of(video, args.frames).items():
            rows = measure(array, args.rounds)
            print(f"\n{name} of {video.name}, {' x '.join(map(str, array.shape))} {array.dtype}")
            for row in rows:
                print(
                    f"  {row['codec']:20} write {row['write_mb_per_second']:6.0f} MB/s   read "
                    f"{row['read_mb_per_second']:6.0f} MB/s   {row['ratio']:6.3f} to 1"
                )
            results.append({"video": video.name, "array": name, "shape": array.shape, "codecs": rows})
    if args.out is not None:
        names = " ".join(video.name for video in args.videos)
        command = f"python benchmarks/compression.py {names} --frames {args.frames} --rounds {args.rounds}"
        record = {"command": command, "machine": describe_machine("cpu"), "rows": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How quick is the built-in model? Frames per second of `tiny`, CogVideoX beside it in the same process.

    python benchmarks/tiny.py [--size 640x360] [--repeat 5] [--threads 2] [--out benchmarks/results/tiny.json]

`tiny` is timed as people use it: `VideoSession.encode` from an H.264 file to a zarr store and `decode` back to frames,
float32. CogVideoX-2b (random weights, bfloat16, its faster dtype on a CPU) is timed on a middle chunk of 8 frames,
without file or store. They alternate; medians, and the ratio of frames per second.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import new_parser, write_results
from tqdm import tqdm

import longvid as lv
from longvid.demo.__main__ import CLIP
from longvid.media.output.video_writer import VideoWriter
from longvid.media.video_file import VideoFile
from longvid.models.cogvideox import CogVideoXVAE
from longvid.units import parse_size


def make_video(path: Path, size: tuple[int, int]) -> None:
    """The demo clip enlarged to ``size`` and played there and back, 97 frames."""
    with VideoFile(CLIP, size=size) as video:
        frames = np.concatenate([block.frames_THWC for block in video.blocks()])
    frames = np.concatenate([frames, frames[-2::-1]])
    with VideoWriter(path, size=size, time_base=Fraction(1, 25), frame_rate=Fraction(25)) as out:
        out.write(frames, np.arange(len(frames)))


class CogVideoX:
    """One video of CogVideoX, chunk after chunk."""

    def __init__(self, size: tuple[int, int]) -> None:
        model = lv.load_model("cogvideox-2b", random_weights=0)
        assert isinstance(model, CogVideoXVAE)
        self.model = model.to(torch.bfloat16)
        height, width = model.geometry.padded_size(*size)
        self.x = torch.rand((1, 3, 8, height, width)).mul_(2).sub_(1).to(torch.bfloat16)
        self.z = torch.randn((1, 16, 2, height // 8, width // 8)).to(torch.bfloat16)

    def seconds_per_frame(self, direction: str, cache: lv.ConvCache) -> float:
        """Time of one more chunk."""
        started = time.perf_counter()
        self.model.encode(self.x, cache) if direction == "encode" else self.model.decode(self.z, cache)
        return (time.perf_counter() - started) / 8


def main() -> int:
    """Measure, print and write."""
    parser = new_parser(__doc__)
    parser.add_argument("--size", type=parse_size, default=(360, 640), metavar="WxH")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds: dict[str, list[float]] = {f"{m} {d}": [] for m in ("tiny", "cogvideox") for d in ("encode", "decode")}
    with tempfile.TemporaryDirectory() as folder, lv.VideoSession("tiny", device="cpu") as session:
        video, store = Path(folder, "video.mp4"), Path(folder, "store.zarr")
        make_video(video, args.size)
        cog = CogVideoX(args.size)
        with lv.ConvCache(cog.model.encoder) as encoding, lv.ConvCache(cog.model.decoder) as decoding:
            for _ in tqdm(range(args.repeat + 1), desc="repeat"):
                encoded = session.encode(video, store, overwrite=True)
                seconds["tiny encode"].append(encoded.seconds / encoded.frames)
                seconds["cogvideox encode"].append(cog.seconds_per_frame("encode", encoding))
                decoded = session.decode(store, lambda _: None)
                seconds["tiny decode"].append(decoded.seconds / decoded.frames)
                seconds["cogvideox decode"].append(cog.seconds_per_frame("decode", decoding))
    rates: dict[str, Any] = {}
    for name, values in seconds.items():
        warm = values[1:]  # the first makes kernels and caches
        rates[name] = {
            "frames_per_second": round(1 / statistics.median(warm), 3),
            "range": [round(1 / max(warm), 3), round(1 / min(warm), 3)],
        }
    for direction in ("encode", "decode"):
        ours, theirs = (rates[f"{m} {direction}"]["frames_per_second"] for m in ("tiny", "cogvideox"))
        rates[f"{direction} ratio"] = round(ours / theirs, 1)
    print(json.dumps(rates, indent=1))
    write_results(args.out, **rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Is memory flat in the length of the video? Peak RSS of whole processes on a short and a long loop of one clip.

    python benchmarks/flat.py [--frames 300 3000] [--size 96x64] [--repeat 3] [--out benchmarks/results/flat.json]

Each measurement is one `longvid encode` or `longvid decode` process of its own, with the small CogVideoX architecture
and random weights; the loop is made by copying packets. Medians over the repetitions, short and long alternating.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import torch

from longvid.demo.__main__ import CLIP


def loop_clip(clip: Path, out: Path, num_frames: int) -> None:
    """Copy the clip's packets again and again, time stamps moved on, until there are at least ``num_frames``."""
    with av.open(str(clip)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [p for p in source.demux(stream) if p.pts is not None and p.duration is not None]
        clip_ticks = sum(p.duration or 0 for p in packets)
        content = [(bytes(p), p.pts or 0, p.dts or 0, p.duration, p.is_keyframe) for p in packets]
        for turn in range(-(-num_frames // len(content))):
            for data, pts, dts, duration, is_keyframe in content:
                packet = av.Packet(data)
                packet.stream = copy
                if stream.time_base is not None:
                    packet.time_base = stream.time_base
                packet.pts, packet.dts, packet.duration = pts + turn * clip_ticks, dts + turn * clip_ticks, duration
                packet.is_keyframe = bool(is_keyframe)
                target.mux(packet)


def run(*args: object, threads: int | None = None) -> dict[str, Any]:
    """One process of the command line, its computing threads as torch chooses or as given; its JSON report."""
    command = [sys.executable, "-m", "longvid", *map(str, args), "--json", "--quiet"]
    env = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> int:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs=2, default=[300, 3000], metavar=("SHORT", "LONG"))
    parser.add_argument("--size", default="96x64")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    peaks: dict[str, dict[int, list[int]]] = {d: {n: [] for n in args.frames} for d in ("encode", "decode")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop_clip(CLIP, folder / "loop.mp4", max(args.frames))
        model = ["--model", "cogvideox-nano", "--random-weights", 0]
        for _ in range(args.repeat):
            for n in args.frames:
                store = folder / f"{n}.zarr"
                options = ["--size", args.size, "--frames", n, "--overwrite"]
                for direction, report in (
                    ("encode", run("encode", folder / "loop.mp4", store, *model, *options)),
                    ("decode", run("decode", store, folder / "back.mp4", "--overwrite")),
                ):
                    assert report["frames"] == n
                    peaks[direction][n].append(report["peak_rss_bytes"])
    short, long = args.frames
    rows = []
    for direction, by_length in peaks.items():
        a, b = (statistics.median(by_length[n]) for n in (short, long))
        rows.append({"direction": direction, "peak_rss_bytes": by_length, "ratio_of_medians": b / a})
        print(f"{direction}: {short} frames {a / 2**20:.1f} MiB, {long} frames {b / 2**20:.1f} MiB, ratio {b / a:.4f}")
    if args.out:
        record = {
            "command": "python " + " ".join(sys.argv),
            "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "size": args.size,
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

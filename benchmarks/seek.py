"""How long does it take from the middle of an hour? Time to the first frame of a decode that starts there.

    python benchmarks/seek.py [--frames 108000] [--starts 500 80000] [--rounds 7] [--out results/seek.json]

An hour of noise at 30 frames per second is encoded with ``tiny`` at 24x16 pixels. A decode of one frame from each start
takes turns with the others; what is shown are medians, and ratios to the first start.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import new_parser, write_results

from longvid import VideoSession
from longvid.frames import Frames


def noise(num_frames: int) -> Iterator[Frames]:
    """Frames in pieces."""
    generator = np.random.default_rng(0)
    for start in range(0, num_frames, 1000):
        yield generator.integers(0, 256, (min(1000, num_frames - start), 16, 24, 3), dtype=np.uint8)


def first_frame_seconds(session: VideoSession, store: Path, start: int) -> float:
    """Seconds from the call to the first frame."""
    began, arrived = time.perf_counter(), []
    session.decode(store, lambda _: arrived.append(time.perf_counter()), start=start, frames=1)
    return arrived[0] - began


def main() -> int:
    """Run the benchmark."""
    parser = new_parser(__doc__)
    parser.add_argument("--frames", type=int, default=108_000)
    parser.add_argument("--starts", type=int, nargs="+", default=[500, 80_000])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {start: [] for start in args.starts}
    with tempfile.TemporaryDirectory() as folder, VideoSession("tiny", device="cpu") as session:
        store = Path(folder, "hour.zarr")
        session.encode(noise(args.frames), store, frame_rate=30)
        first_frame_seconds(session, store, args.starts[0])  # finds the warm-up
        for _ in range(args.rounds):
            for start in args.starts:
                seconds[start].append(first_frame_seconds(session, store, start))
    medians = {start: statistics.median(found) for start, found in seconds.items()}
    rows = [
        {"start": start, "seconds": round(found, 4), "ratio": round(found / medians[args.starts[0]], 3)}
        for start, found in medians.items()
    ]
    for row in rows:
        print(f"from frame {row['start']}: {row['seconds']} s to the first frame, {row['ratio']} times the first start")
    write_results(args.out, frames=args.frames, rounds=args.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What durability costs, and how soon a killed run resumes: the embedded clip in a loop through `tiny` on the CPU.

    python benchmarks/durability.py [--frames 12000] [--size 320x176] [--rounds 5]
        [--out benchmarks/results/durability.json]
    python benchmarks/durability.py --resume [--hours 1] ...
    python benchmarks/durability.py --parts ...

Cost: two kinds of run take turns in one process. *bare*: nothing waits for the disk, and one commit comes at the end.
*default*: a commit every second, with fsync. Two figures: the medians of the rounds compared, which is what a user pays
and noisy, and the time inside ``commit`` as a share of the run, which is more than a user pays, since it is spent in
the writing thread while the next chunk is computed. Bars: each at most 3 %.

Resume (``--resume``): `longvid encode` of an hour of video is killed (SIGKILL) when fifty minutes of it are committed,
and started again. Reported are the seconds from the start of the new process to the first frame that was not committed
before, and the frames that were computed again. Bars: at most the warm-up, the chunk that is compared and the chunk in
which the store ends are computed again; the store is, array for array, that of a run that was left alone.

Parts (``--parts``): the digest of a MiB. Median.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from common import loop_clip, new_parser
from tqdm import tqdm

import longvid as lv
from longvid.demo.__main__ import CLIP
from longvid.environment import describe_machine
from longvid.store.format import unit_digest
from longvid.store.writer import StoreWriter
from longvid.units import parse_size

FOREVER = float("inf")
KINDS = {
    "bare": lv.Durability(mode="rename", publish_seconds=FOREVER),
    "default": lv.Durability(),
}
BARS = {"fsync and commits": 0.03, "inside commits": 0.03}
FRAMES_PER_MINUTE = 24 * 60


class CommitClock:
    """Adds up the time inside ``StoreWriter.commit``, in whose place :meth:`wrapped` stands."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrapped(self) -> Callable[..., None]:
        """``commit`` with a clock."""
        real = StoreWriter.commit

        def commit(writer: StoreWriter, *status: Literal["writing", "complete"]) -> None:
            started = time.perf_counter()
            real(writer, *status)
            self.seconds += time.perf_counter() - started

        return commit


def cost(folder: Path, num_frames: int, size: str, rounds: int) -> dict[str, Any]:
    """Time of both kinds, in turns, there and back."""
    loop_clip(CLIP, folder / "loop.mp4", num_frames)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shares: list[float] = []
    inside = CommitClock()
    clocked = patch.object(StoreWriter, "commit", inside.wrapped())
    with clocked, lv.VideoSession("tiny", device="cpu", dtype="float32") as session:
        for turn in tqdm(range(rounds + 1), desc="cost"):
            for kind in KINDS if turn % 2 else reversed(KINDS):
                inside.seconds = 0.0
                report = session.encode(
                    folder / "loop.mp4",
                    folder / f"{kind}.zarr",
                    size=parse_size(size),
                    durability=KINDS[kind],
                    overwrite=True,
                    resume="never",
                )
                if turn:  # the first one warms up
                    seconds[kind].append(report.seconds)
                    if kind == "default":
                        shares.append(inside.seconds / report.seconds)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    pairs = [default / bare - 1 for default, bare in zip(seconds["default"], seconds["bare"], strict=True)]
    found = {
        "fsync and commits": medians["default"] / medians["bare"] - 1,
        "inside commits": statistics.median(shares),
    }
    print(f"\n{num_frames} frames of {size}: " + ", ".join(f"{kind} {value:.2f} s" for kind, value in medians.items()))
    print(f"default over bare by round: {', '.join(f'{pair:+.1%}' for pair in pairs)}")
    for name, value in found.items():
        verdict = "" if value <= BARS[name] else "   MISSED"
        print(f"{name}: {value:+.2%} (bar {BARS[name]:.0%}){verdict}")
    return {"frames": num_frames, "size": size, "seconds": seconds, "medians": medians, "shares": found}


def committed(store: Path) -> int:
    """Frames that readers see now."""
    try:
        facts = json.loads((store / "zarr.json").read_bytes())
        return int(facts["attributes"]["longvid"]["num_frames"]) if "consolidated_metadata" in facts else 0
    except (OSError, ValueError, KeyError):
        return 0


def command(video: Path, store: Path, size: str) -> list[str]:
    """The same command every time."""
    return [sys.executable, "-m", "longvid", "encode", str(video), str(store), "--size", size, "--json", "--quiet"]


def resume(folder: Path, hours: float, size: str) -> dict[str, Any]:
    """Kill a run late, start it again, and compare it with one that was left alone."""
    num_frames = int(hours * 60 * FRAMES_PER_MINUTE)
    mark = num_frames * 5 // 6
    video, store = folder / "loop.mp4", folder / "killed.zarr"
    loop_clip(CLIP, video, num_frames)
    first = subprocess.Popen(command(video, store, size), stdout=subprocess.DEVNULL)
    while committed(store) < mark:
        if first.poll() is not None:
            raise SystemExit(f"the run ended by itself with {first.returncode}")
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = committed(store)
    began = time.monotonic()
    second = subprocess.Popen(command(video, store, size), stdout=subprocess.PIPE, text=True)
    while committed(store) <= before and second.poll() is None:
        time.sleep(0.01)
    waited = time.monotonic() - began
    told = json.loads(second.communicate()[0])
    again = told["frames_computed"] - (told["frames"] - told["resumed_from_frame"])
    model = lv.load_model("tiny")
    most = (lv.warmup(model, "encode").chunks + 2) * model.geometry.schedule.chunk_frames
    with lv.VideoSession(model, device="cpu", dtype="float32") as session:
        session.encode(video, folder / "alone.zarr", size=parse_size(size))
    a, b = lv.open_store(store), lv.open_store(folder / "alone.zarr")
    same = all(np.array_equal(a.arrays[name][:], b.arrays[name][:]) for name in b.arrays)
    print(f"\nkilled at frame {before} of {told['frames']} ({before / FRAMES_PER_MINUTE:.1f} min of video)")
    print(f"resumed from frame {told['resumed_from_frame']}; {again} frames were computed again (bar {most})")
    print(f"first new frame after {waited:.1f} s, start of the process included")
    print(f"the same bits as a run left alone: {same}")
    return {
        "frames": told["frames"],
        "size": size,
        "killed_at": before,
        "resumed_from_frame": told["resumed_from_frame"],
        "frames_computed_again": again,
        "seconds_to_first_new_frame": waited,
        "same_bits": same,
        "ok": same and again <= most,
    }


def parts() -> dict[str, Any]:
    """What the pieces take by themselves."""
    rows, times = np.random.default_rng(0).random(2**21, np.float32), []  # 8 MiB
    for _ in range(9):
        started = time.perf_counter()
        unit_digest([rows])
        times.append(time.perf_counter() - started)
    found = {"digest_ms_per_mib": 1e3 * statistics.median(times) / 8}
    print(f"digest of a MiB: {found['digest_ms_per_mib']:.2f} ms")
    return found


def main() -> int:
    """Measure, print and write the results; exit code 1 if a bar is missed."""
    parser = new_parser(__doc__)
    parser.add_argument("--frames", type=int, default=12_000)
    parser.add_argument("--size", default="320x176")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--hours", type=float, default=1.0)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine("cpu")}
    if args.out is not None and args.out.exists():
        results |= json.loads(args.out.read_text())
    with tempfile.TemporaryDirectory() as name:
        if args.resume:
            results["resume"] = resume(Path(name), args.hours, args.size)
            ok = bool(results["resume"]["ok"])
        elif args.parts:
            results["parts"] = parts()
            ok = True
        else:
            results["cost"] = cost(Path(name), args.frames, args.size, args.rounds)
            ok = all(results["cost"]["shares"][key] <= bar for key, bar in BARS.items())
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

"""What durability costs, and how soon a killed run resumes: the embedded clip in a loop through `tiny` on the CPU.

    python benchmarks/durability.py [--frames 12000] [--size 320x176] [--rounds 5]
        [--out benchmarks/results/durability.json]
    python benchmarks/durability.py --resume [--hours 1] ...
    python benchmarks/durability.py --parts ...

Cost: three kinds of run take turns in one process. *bare*: nothing waits for the disk, one publish at the end, no
snapshots. *fsync*: as by default, without snapshots. *default*: all of it. Two figures for publishing: the medians of
the rounds compared, which is what a user pays and noisy, and the time inside ``publish`` as a share of the run, which
is more than a user pays, since it is spent in the writing thread while the next chunk is computed. Bars: fsync and
publish at most 3 %, snapshots at most 2 %.

Resume (``--resume``): `longvid encode` of an hour of video is killed (SIGKILL) when fifty minutes of it are published,
and started again. Reported are the seconds from the new process's start to the first frame that was not published
before, beside the interval between two snapshots that the run had chosen; bar: at most two intervals. The store must
then be, array for array, that of a run that was left alone.

Parts (``--parts``): the digest of a MiB, and a snapshot of 1.65 GiB of contexts, about what CogVideoX has at 720x480,
with its digest and sync. Medians.
"""

from __future__ import annotations

import itertools
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
import torch
from common import loop_clip, new_parser
from tqdm import tqdm

import longvid as lv
from longvid.demo.__main__ import CLIP
from longvid.environment import describe_machine
from longvid.runtime.snapshot import snapshots_in, write_snapshot
from longvid.store.format import PRIVATE, unit_digest
from longvid.store.writer import StoreWriter
from longvid.units import parse_size

FOREVER = float("inf")
KINDS = {
    "bare": lv.Durability(mode="rename", publish_seconds=FOREVER, snapshot_seconds=FOREVER),
    "fsync": lv.Durability(snapshot_seconds=FOREVER),
    "default": lv.Durability(),
}
BARS = {"fsync and publish": 0.03, "inside publish": 0.03, "snapshots": 0.02}
FRAMES_PER_MINUTE = 24 * 60


class PublishClock:
    """Adds up the time inside ``StoreWriter.commit``, in whose place :meth:`wrapped` stands."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrapped(self) -> Callable[..., None]:
        """``publish`` with a clock."""
        real = StoreWriter.commit

        def publish(writer: StoreWriter, *status: Literal["writing", "complete"]) -> None:
            started = time.perf_counter()
            real(writer, *status)
            self.seconds += time.perf_counter() - started

        return publish


def cost(folder: Path, num_frames: int, size: str, rounds: int) -> dict[str, Any]:
    """Time of the three kinds, in turns, there and back."""
    loop_clip(CLIP, folder / "loop.mp4", num_frames)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shares: dict[str, list[float]] = {"snapshots": [], "inside publish": []}
    inside = PublishClock()
    publish = patch.object(StoreWriter, "commit", inside.wrapped())
    with publish, lv.VideoSession("tiny", device="cpu", dtype="float32") as session:
        for turn in tqdm(range(rounds + 1), desc="cost"):
            for kind in KINDS if turn % 2 else reversed(KINDS):
                inside.seconds = 0.0
                report = session.encode(
                    folder / "loop.mp4",
                    folder / f"{kind}.zarr",
                    size=parse_size(size),
                    durability=KINDS[kind],
                    overwrite=True,
                    resume=False,
                )
                if turn:  # the first one warms up
                    seconds[kind].append(report.seconds)
                    if kind == "default":
                        shares["snapshots"].append(report.snapshot_seconds / report.seconds)
                    if kind == "fsync":
                        shares["inside publish"].append(inside.seconds / report.seconds)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    pairs = [fsync / bare - 1 for fsync, bare in zip(seconds["fsync"], seconds["bare"], strict=True)]
    found = {
        "fsync and publish": medians["fsync"] / medians["bare"] - 1,
        **{name: statistics.median(values) for name, values in shares.items()},
    }
    print(f"\n{num_frames} frames of {size}: " + ", ".join(f"{kind} {value:.2f} s" for kind, value in medians.items()))
    print(f"fsync over bare by round: {', '.join(f'{pair:+.1%}' for pair in pairs)}")
    for name, value in found.items():
        verdict = "" if value <= BARS[name] else "   MISSED"
        print(f"{name}: {value:+.2%} (bar {BARS[name]:.0%}){verdict}")
    return {"frames": num_frames, "size": size, "seconds": seconds, "medians": medians, "shares": found}


def published(store: Path) -> int:
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
    started = time.monotonic()
    taken: dict[str, float] = {}
    while published(store) < mark:
        for path in snapshots_in(store / PRIVATE / "snapshots"):
            taken.setdefault(path.name, time.monotonic() - started)
        if first.poll() is not None:
            raise SystemExit(f"the run ended by itself with {first.returncode}")
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = published(store)
    moments = sorted(taken.values())
    interval = statistics.median(b - a for a, b in itertools.pairwise(moments))
    began = time.monotonic()
    second = subprocess.Popen(command(video, store, size), stdout=subprocess.PIPE, text=True)
    while published(store) <= before and second.poll() is None:
        time.sleep(0.01)
    waited = time.monotonic() - began
    told = json.loads(second.communicate()[0])
    with lv.VideoSession("tiny", device="cpu", dtype="float32") as session:
        session.encode(video, folder / "alone.zarr", size=parse_size(size))
    a, b = lv.open_store(store), lv.open_store(folder / "alone.zarr")
    same = all(np.array_equal(a.arrays[name][:], b.arrays[name][:]) for name in b.arrays)
    print(f"\nkilled at frame {before} of {num_frames} ({before / FRAMES_PER_MINUTE:.1f} min of video)")
    print(f"snapshots every {interval:.1f} s; went on from frame {told['resumed_from_frame']}")
    print(f"first new frame after {waited:.1f} s, start of the process included (bar {2 * interval:.1f} s)")
    print(f"the same bits as a run left alone: {same}")
    return {
        "frames": num_frames,
        "killed_at": before,
        "resumed_from_frame": told["resumed_from_frame"],
        "snapshot_interval_seconds": interval,
        "seconds_to_first_new_frame": waited,
        "snapshots": len(moments),
        "same_bits": same,
        "ok": same and waited <= 2 * interval,
    }


def parts(folder: Path) -> dict[str, Any]:
    """What the pieces take by themselves."""

    def seconds(step: Callable[[], object], rounds: int) -> float:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    rows = np.random.default_rng(0).random(2**21, np.float32)  # 8 MiB
    contexts = [(f"layer{i}", torch.randn(1, 128, 2, 480, 720).bfloat16()) for i in range(10)]
    numbers = itertools.count(1)

    def snapshot() -> None:
        write_snapshot(
            folder,
            chunk=next(numbers),
            units=0,
            position=None,
            rows={},
            contexts=contexts,
            fingerprint="",
            sync=True,
            keep_all=False,
        )

    found = {
        "digest_ms_per_mib": 1e3 * seconds(lambda: unit_digest([rows]), 9) / 8,
        "snapshot_gib": sum(z.numel() * z.element_size() for _, z in contexts) / 2**30,
        "snapshot_seconds": seconds(snapshot, 3),
    }
    print(", ".join(f"{name} {value:.2f}" for name, value in found.items()))
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
            results["parts"] = parts(Path(name))
            ok = True
        else:
            results["cost"] = cost(Path(name), args.frames, args.size, args.rounds)
            ok = all(results["cost"]["shares"][key] <= bar for key, bar in BARS.items())
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

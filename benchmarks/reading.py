"""Is reading a file as fast as in an earlier commit? Frames of 1280x720 H.264, beside that commit.

    python benchmarks/reading.py --against 85ae403 [--video FILE] [--rounds 10] [--out results/reading.json]

Both trees read all frames, each in a process of its own, in turns. What is shown are medians of the ratio of a round,
in wall seconds, in CPU seconds of all threads, and in page faults, since memory that is not used again costs time. A
ratio above 1 means that this tree takes less. Without ``--video`` the clip of the demo is scaled up and looped.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from common import loop_clip, new_parser, write_results
from tqdm import tqdm

from longvid.demo.__main__ import CLIP

REPOSITORY = Path(__file__).parents[1]
READ = """
import json, resource, sys, time, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from longvid.environment import map_large_allocations
from longvid.media.sources import open_source
map_large_allocations()  # as the command does; else it is up to chance how often the heap shrinks
with open_source(sys.argv[2]) as video:
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    frames = sum(len(block.pts_T) for block in video.blocks())
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
print(json.dumps({"frames": frames, "wall": seconds, "cpu": cpu, "faults": after.ru_minflt - before.ru_minflt}))
"""


def checked_out(commit: str, folder: Path) -> Path:
    """The tree of a commit."""
    content = subprocess.run(["git", "archive", commit], cwd=REPOSITORY, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def scaled_clip(path: Path, num_frames: int) -> Path:
    """The clip of the demo at 1280x720, looped."""
    scaled = path.with_name("scaled.mp4")
    with av.open(str(CLIP)) as source, av.open(str(scaled), "w") as output:
        stream: Any = output.add_stream("libx264", rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            larger = frame.reformat(1280, 720, "yuv420p")
            larger.pts, larger.time_base = number, Fraction(1, 24)
            output.mux(stream.encode(larger))
        output.mux(stream.encode(None))
    loop_clip(scaled, path, num_frames)
    return path


def measured(tree: Path, video: Path) -> dict[str, float]:
    """What reading takes in a new process."""
    command = [sys.executable, "-c", READ, str(tree), str(video)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=tree).stdout)
    return found


def main() -> int:
    """Run the benchmark."""
    parser = new_parser(__doc__)
    parser.add_argument("--against", required=True, help="commit to compare with")
    parser.add_argument("--video", type=Path)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = {"before": checked_out(args.against, Path(folder, "before")), "now": REPOSITORY}
        video = args.video or scaled_clip(Path(folder, "clip.mp4"), args.frames)
        rounds = [{name: measured(tree, video) for name, tree in trees.items()} for _ in tqdm(range(args.rounds))]
    ratios = {
        what: [round(one["before"][what] / one["now"][what], 3) for one in rounds] for what in ("wall", "cpu", "faults")
    }
    rows = [
        {"what": what, "ratio": round(statistics.median(found), 3), "least": min(found), "most": max(found)}
        for what, found in ratios.items()
    ]
    for row in rows:
        print(f"{row['what']}: {row['ratio']} ({row['least']} to {row['most']})")
    write_results(args.out, against=args.against, frames=rounds[0]["now"]["frames"], rounds=args.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Is memory flat in the length of a video? One process encodes an hour; the last minute beside the first.

    python benchmarks/flat.py [--frames 86400] [--size 96x64] [--model tiny] [--threads 1] [--directions encode decode]
        [--suffix .mkv] [--out benchmarks/results/flat.json]

The embedded clip, its packets copied again and again, goes through `longvid encode --offload all` on the CPU, and back
through `longvid decode` to a file whose frames are counted, each with a report page and a recording. From the
recording: resident set size and measured device peak, medians over 100 chunks around the end of the first minute of
video (24 frames a second) and over the last 100. They must agree within 2 %, and the report page must stay below 3 MB,
or the exit code is 1.

The file is Matroska, since an MP4 file ends with a list of all its frames, which FFmpeg keeps in memory until then: 72
bytes a frame or 6 MB an hour (``--suffix .mp4`` shows it). One thread computes by default: frames this small gain
nothing from a second, and on a busy machine two that wait for each other are ten times slower.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
from common import DIRECTIONS, loop_clip, new_parser, run_command, write_results

from longvid import ChunkEvent
from longvid.demo.__main__ import CLIP
from longvid.reporting.recorder import read_recording

FRAMES_PER_MINUTE = 24 * 60
WINDOW = 100
"chunks in a median"
TOLERANCE = 0.02
MAX_REPORT_BYTES = 3_000_000


def window_around(chunks: Sequence[ChunkEvent], num_frames: int) -> Sequence[ChunkEvent]:
    """The chunks around the moment at which ``num_frames`` were done, moved inwards at the ends."""
    centre = sum(chunk.frames_done <= num_frames for chunk in chunks)
    first = max(0, min(centre - WINDOW // 2, len(chunks) - WINDOW))
    return chunks[first : first + WINDOW]


def medians(chunks: Sequence[ChunkEvent]) -> dict[str, float]:
    """Resident set size, and device peak of those chunks in which it was measured."""
    peaks = [chunk.chunk_peak_bytes for chunk in chunks if chunk.chunk_peak_bytes is not None]
    rss = statistics.median(chunk.rss_bytes for chunk in chunks)
    return {"rss_bytes": rss, "chunk_peak_bytes": statistics.median(peaks)}


def by_minute(chunks: Sequence[ChunkEvent]) -> list[float]:
    """Median resident set size in MB of every minute of the video."""
    minutes: dict[int, list[int]] = {}
    for chunk in chunks:
        minutes.setdefault((chunk.frames_done - 1) // FRAMES_PER_MINUTE, []).append(chunk.rss_bytes)
    return [round(statistics.median(values) / 1e6, 2) for values in minutes.values()]


def judge(direction: str, report: dict[str, Any], recording: Path, page: Path, num_frames: int) -> dict[str, Any]:
    """Numbers of one run, and what is wrong with them."""
    chunks = [event for event in read_recording(recording) if isinstance(event, ChunkEvent)]
    early, late = medians(window_around(chunks, FRAMES_PER_MINUTE)), medians(chunks[-WINDOW:])
    ratios = {key: late[key] / early[key] for key in early}
    problems = [f"{key} changed by {ratio - 1:+.2%}" for key, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE]
    if report["frames"] != num_frames:
        problems.append(f"{report['frames']} frames instead of {num_frames}")
    if page.stat().st_size > MAX_REPORT_BYTES:
        problems.append(f"the report page has {page.stat().st_size} bytes")
    minutes = by_minute(chunks)
    print(f"\n{direction}: {report['frames']} frames in {report['seconds']:.0f} s, {len(chunks)} chunks")
    print(f"{'median over 100 chunks':26}{'minute 1':>12}{'minute ' + str(len(minutes)):>12}{'ratio':>9}")
    for key, label in (("rss_bytes", "resident set, MB"), ("chunk_peak_bytes", "device peak, MB")):
        print(f"{label:26}{early[key] / 1e6:>12.2f}{late[key] / 1e6:>12.2f}{ratios[key]:>9.4f}")
    print(f"resident set by minute of video, MB: lowest {min(minutes):.2f}, highest {max(minutes):.2f}")
    wanted = ("frames", "seconds", "peak_rss_bytes", "peak_device_bytes", "projected_bytes")
    return {
        "direction": direction,
        **{key: report[key] for key in wanted},
        "chunks": len(chunks),
        "minute_1": early,
        "last_minute": late,
        "ratios": ratios,
        "rss_mb_by_minute": minutes,
        "report_page_bytes": page.stat().st_size,
        "recording_bytes": recording.stat().st_size,
        "problems": problems,
    }


def count_frames(video: Path) -> int:
    """Video packets in a file, which are frames."""
    with av.open(str(video)) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def main() -> int:
    """Measure, print tables and write the results."""
    parser = new_parser(__doc__)
    parser.add_argument("--frames", type=int, default=86_400)
    parser.add_argument("--size", default="96x64")
    parser.add_argument("--model", default="tiny", help="built in, or the name of an architecture")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--suffix", default=".mkv", help="of the decoded file")
    args = parser.parse_args()
    weights = () if args.model == "tiny" else ("--random-weights", 0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop, store, back = folder / "loop.mp4", folder / "out.zarr", folder / f"back{args.suffix}"
        loop_clip(CLIP, loop, args.frames)
        targets = {
            "encode": (loop, store, "--size", args.size, "--model", args.model, *weights),
            "decode": (store, back),
        }
        for direction in args.directions:
            page, recording = folder / f"{direction}.html", folder / f"{direction}.jsonl"
            report = run_command(
                *(direction, *targets[direction], "--frames", args.frames, "--device", "cpu", "--offload", "all"),
                *("--report", page, "--record", recording),
                threads=args.threads,
            )
            rows.append(judge(direction, report, recording, page, args.frames))
            if direction == "decode" and (found := count_frames(back)) != args.frames:
                rows[-1]["problems"].append(f"the file holds {found} frames")
    for row in rows:
        for problem in row["problems"]:
            print(f"WRONG: {row['direction']}: {problem}")
    write_results(args.out, size=args.size, threads=args.threads, tolerance=TOLERANCE, rows=rows)
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

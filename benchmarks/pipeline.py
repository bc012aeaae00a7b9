"""Does anything wait for what it does not need? Each stage of the pipeline alone against the whole, with `tiny`.

    python benchmarks/pipeline.py [VIDEO] [--size 640x360] [--frames 241] [--rounds 5] [--threads 2]
        [--chunk-frames 16] [--directions encode decode] [--out benchmarks/results/pipeline.json]

In one process on the CPU, alternating, after a round that is not counted; medians over the rounds. Encoding: ``read``
decodes the file's frames, re-blocks and pads them; ``compute`` takes the same chunks from memory through the engine,
as the session does, to latents on the host; ``write`` takes those from memory into a zarr store; ``session.encode`` is
all of it at once. Decoding: ``read`` takes latents from the store, ``compute`` makes frames of them on the host,
``write`` puts those into a Matroska file or into a zarr store of frames, and ``session.decode`` does it all.

A time is that of the whole call: opening, the first chunk and the end are in it, of a stage as of the whole, and so is
the plan, which is made once. The whole should reach 0.9 of the rate of ``compute`` alone, or the exit code is 1.

Cores are CPU seconds of all threads of the process per second: what a stage takes from the others. Stages that take c
seconds of the CPU together cannot be done in less than c / cores, however they overlap, so that the ratio has a
ceiling: what the time of ``compute`` is of the longest stage, or of c / cores if that is longer. Threads of OpenMP that
wait for each other count as busy, which makes c too large, and the ceiling too low.

VIDEO is the clip in the package by default, played again and again, and is read from its first frame on. The shorter
the run, the more what happens once weighs. Frames are held in memory: 2.8 MB each at 1280x720. Nothing else should run
on the machine: threads of OpenMP that are kept from a core hold up all others, which is slower than one thread alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from common import DIRECTIONS, loop_clip, new_parser, write_results
from tqdm import tqdm

import longvid as lv
from longvid.demo.__main__ import CLIP
from longvid.environment import describe_machine
from longvid.events import Direction
from longvid.frames import Frames, Times
from longvid.media.output.picture_writer import PictureWriter
from longvid.media.output.video_writer import VideoWriter
from longvid.media.sources import open_source
from longvid.models.base import CausalVAE
from longvid.planning.plan import Plan
from longvid.runtime.decode import DecodeOptions, latent_chunks, video_sink
from longvid.runtime.encode import EncodedChunk, frame_chunks, store_latents
from longvid.runtime.engine import Engine
from longvid.runtime.run import DecodeRun, EncodeRun
from longvid.store.durability import WriteOptions
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import RunFacts
from longvid.store.reader import open_store
from longvid.units import parse_size

Stage: TypeAlias = Callable[[], object]

BAR = 0.9
"of the rate of compute alone"


@dataclass(slots=True)
class Timing:
    """Seconds of each round, on the clock and of the CPU."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def measure(self, stage: Stage) -> None:
        """One more round."""
        cpu, started = time.process_time(), time.perf_counter()
        stage()
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu)

    @property
    def median_seconds(self) -> float:
        """On the clock."""
        return statistics.median(self.seconds)

    @property
    def median_cpu_seconds(self) -> float:
        """Of all threads of the process."""
        return statistics.median(self.cpu_seconds)


class Bench:
    """A stretch of a video, the session under test and an engine of the same kind for its stages.

    Args:
        session: the session, which is open.
        model: the one it was made with.
        video: a file of frames.
        window: of ``open_source``: frames and size.
        folder: for what is written.
    """

    def __init__(
        self, session: lv.VideoSession, model: CausalVAE, video: Path, window: dict[str, Any], folder: Path
    ) -> None:
        self.session = session
        self.engine = Engine.on_device(model, "cpu", None)
        self.video, self.window, self.folder = video, window, folder
        self.store = folder / "store.zarr"
        self.num_frames = session.encode(video, self.store, **window).frames
        with open_source(video, **window) as source:
            self.info = source.info
        self.plan: Plan = session.plan(height=self.info.height, width=self.info.width)
        self.padded = model.geometry.padded_size(self.info.height, self.info.width)

    # ------------------------------------------------------------------------------------------- encoding

    def read_frames(self, keep: Callable[[Any], object] = lambda _: None) -> None:
        """Decode, re-block and pad, as the reading thread does."""
        with open_source(self.video, **self.window) as source:
            for piece in frame_chunks(source, self.plan.schedule, self.padded):
                keep(piece)

    def encode_chunks(self, pieces: list[Any], keep: Callable[[EncodedChunk], object] = lambda _: None) -> None:
        """Frames in memory to latents on the host, as the session computes them."""
        with EncodeRun(self.engine, self.plan.encode, "mode", 0) as run:
            for piece in pieces:
                keep((piece.chunk, piece.pts, piece.valid, *run.latents(piece.chunk, piece.values)))

    def write_latents(self, pieces: list[EncodedChunk]) -> None:
        """Latents in memory to a store, as the writing thread does, with its beginning and its end."""
        shape = pieces[0][3].shape
        with LatentWriter(
            self.folder / "alone.zarr",
            schedule=self.plan.schedule,
            source=self.info,
            layout=LatentLayout(shape_CYX=(shape[1], shape[3], shape[4]), representation="mode"),
            facts=RunFacts(vae=self.engine.model.describe()),
            options=WriteOptions(overwrite=True, resume="never"),
        ) as target:
            for piece in pieces:
                store_latents(target, *piece)

    def encode_stages(self) -> dict[str, Stage]:
        """What is timed, by name. Frames and latents of the stretch are held in memory."""
        frames: list[Any] = []
        self.read_frames(frames.append)
        latents: list[EncodedChunk] = []
        self.encode_chunks(frames, latents.append)
        return {
            "read": self.read_frames,
            "compute": lambda: self.encode_chunks(frames),
            "write": lambda: self.write_latents(latents),
            "session.encode": lambda: self.session.encode(self.video, self.store, **self.window, overwrite=True),
        }

    # ------------------------------------------------------------------------------------------- decoding

    def read_latents(self, keep: Callable[[Any], object] = lambda _: None) -> None:
        """Read chunk after chunk from the store, as the reading thread does."""
        for item in latent_chunks(open_store(self.store), self.plan.schedule, self.num_frames):
            keep(item)

    def decode_chunks(self, items: list[Any], keep: Callable[[Frames], object] = lambda _: None) -> None:
        """Latents in memory to frames on the host, as the session computes them."""
        with DecodeRun(self.engine, self.plan.decode, (self.info.height, self.info.width)) as run:
            for item in items:
                keep(run.frames(item.chunk, item.values))

    def write_frames(self, pieces: list[tuple[Frames, Times]], suffix: str) -> None:
        """Frames in memory to a file or a store, as the writing thread does, with its beginning and its end."""
        latents = open_store(self.store)
        out = self.folder / f"alone{suffix}"
        sink: VideoWriter | PictureWriter | FrameStoreWriter
        if suffix != ".zarr":
            sink = video_sink(
                latents, out, DecodeOptions(overwrite=True, output={"audio": "none"}), (0, len(latents.frame_pts))
            )
        else:
            sink = FrameStoreWriter(
                out,
                size=(latents.height, latents.width),
                time_base=latents.time_base,
                frame_rate=latents.frame_rate,
                source=latents.source,
                facts=RunFacts(),
                options=WriteOptions(overwrite=True, resume="never"),
            )
        with sink:
            for piece in pieces:
                sink.write(*piece)

    def decode_stages(self) -> dict[str, Stage]:
        """What is timed, by name. Latents and frames of the stretch are held in memory."""
        latents: list[Any] = []
        self.read_latents(latents.append)
        frames: list[Frames] = []
        self.decode_chunks(latents, frames.append)
        pts = open_store(self.store).frame_pts
        chunks = [item.chunk for item in latents]
        pieces = [(f, pts[c.frame_start : c.frame_stop]) for c, f in zip(chunks, frames, strict=True)]

        def decode(suffix: str) -> None:
            self.session.decode(self.store, self.folder / f"back{suffix}", overwrite=True)

        return {
            "read": self.read_latents,
            "compute": lambda: self.decode_chunks(latents),
            "write .mkv": lambda: self.write_frames(pieces, ".mkv"),
            "write .zarr": lambda: self.write_frames(pieces, ".zarr"),
            "session.decode .mkv": lambda: decode(".mkv"),
            "session.decode .zarr": lambda: decode(".zarr"),
        }


def measure(stages: dict[str, Stage], rounds: int, label: str) -> dict[str, Timing]:
    """Time all stages in turn, there and back so that a drift of the machine meets them alike."""
    timings = {name: Timing() for name in stages}
    order = list(stages)
    for turn in tqdm(range(rounds + 1), desc=label):
        for name in order if turn % 2 else reversed(order):
            if turn == 0:
                stages[name]()
            else:
                timings[name].measure(stages[name])
    return timings


def judge(direction: Direction, timings: dict[str, Timing], num_frames: int) -> dict[str, Any]:
    """Print a table; rates and ratios, and those that are below the bar."""
    wholes = [name for name in timings if name.startswith("session")]
    cores = describe_machine("cpu")["num_cores"]
    print(f"\n{direction}, {num_frames} frames")
    columns = "".join(f"{'of ' + name.removeprefix('session.'):>18}" for name in wholes)
    print(f"{'stage':22}{'frames/s':>10}{'cores':>8}{columns}")
    rows, compute = {}, timings["compute"]
    for name, timing in timings.items():
        rate, busy = num_frames / timing.median_seconds, timing.median_cpu_seconds / timing.median_seconds
        shares = {whole: timing.median_seconds / timings[whole].median_seconds for whole in wholes}
        print(f"{name:22}{rate:>10.2f}{busy:>8.2f}" + "".join(f"{share:>18.1%}" for share in shares.values()))
        rows[name] = {
            "frames_per_second": rate,
            "cores": busy,
            "share_of_end_to_end": shares,
            "seconds": timing.seconds,
            "cpu_seconds": timing.cpu_seconds,
        }
    ratios = {}
    for whole in wholes:
        parts = [timings[n] for n in timings if n not in wholes and (n[:5] != "write" or whole.endswith(n[5:].strip()))]
        ratio = compute.median_seconds / timings[whole].median_seconds
        by_round = [c / w for c, w in zip(compute.seconds, timings[whole].seconds, strict=True)]
        work = sum(part.median_cpu_seconds for part in parts) / cores
        ceiling = compute.median_seconds / max(work, *(part.median_seconds for part in parts))
        verdict = "" if ratio >= BAR else f", BELOW {BAR}"
        print(
            f"{whole} / compute only: {ratio:.3f} (rounds {min(by_round):.3f} to {max(by_round):.3f}, ceiling with "
            f"{cores} cores {ceiling:.3f}){verdict}"
        )
        ratios[whole] = {"end_to_end_of_compute": ratio, "by_round": by_round, "ceiling": ceiling, "ok": ratio >= BAR}
    return {"direction": direction, "frames": num_frames, "stages": rows, "ratios": ratios}


def main() -> int:
    """Measure, print tables and write the results."""
    parser = new_parser(__doc__)
    parser.add_argument("video", nargs="?", type=Path, help="the clip in the package by default")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="that of the video by default")
    parser.add_argument("--frames", type=int, default=241)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--chunk-frames", type=int, help="that of the model by default")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = lv.load_model("tiny")
    window = {"frames": args.frames, "size": args.size}
    rows = []
    with (
        tempfile.TemporaryDirectory() as name,
        lv.VideoSession(model, device="cpu", chunk_frames=args.chunk_frames) as session,
    ):
        folder = Path(name)
        video = args.video
        if video is None:
            video = folder / "loop.mp4"
            loop_clip(CLIP, video, args.frames)
        bench = Bench(session, model, video, window, folder)
        for direction in args.directions:
            stages = bench.encode_stages() if direction == "encode" else bench.decode_stages()
            rows.append(judge(direction, measure(stages, args.rounds, direction), bench.num_frames))
            del stages
        height, width = bench.info.height, bench.info.width
    name = CLIP.name if args.video is None else args.video.name
    settings = {"size": f"{width}x{height}", "threads": args.threads, "rounds": args.rounds, "bar": BAR}
    write_results(args.out, video=name, **settings, rows=rows)
    return int(not all(ratio["ok"] for row in rows for ratio in row["ratios"].values()))


if __name__ == "__main__":
    sys.exit(main())

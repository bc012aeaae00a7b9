"""What the benchmarks share: models, inputs, contestants, turns, the looped clip, and how results are written."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, cast

import av
import torch
from torch import Tensor
from tqdm import tqdm

from longvid import ConvCache, ForwardContext, load_model
from longvid.environment import describe_machine
from longvid.events import Direction
from longvid.memory.offloader import Offloader
from longvid.models.base import CausalVAE, LatentGeometry, NativeVAE
from longvid.models.context import Limits
from longvid.models.loading import ARCHITECTURES
from longvid.models.numerics import Numerics
from longvid.planning.options import ComputeOptions
from longvid.planning.plan import DirectionPlan
from longvid.planning.planner import Planner

Step: TypeAlias = Callable[[Tensor], Tensor]
"""Runs the next chunk of a video."""

DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")
CPU = torch.device("cpu")
COGVIDEOX = LatentGeometry(latent_channels=16, frames_per_latent=4, pixels_per_latent=8, chunk_frames=8)


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script, with ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def write_results(path: Path | None, device: str = "cpu", **facts: Any) -> None:
    """Write the results with the command and the machine they come from, if there is a path."""
    if path is not None:
        words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
        facts = {
            "command": "python " + shlex.join(words),
            "machine": describe_machine(device),
            "diffusers": version("diffusers"),
        } | facts
        path.write_text(json.dumps(facts, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------- models


def random_models(dtype: torch.dtype, device: torch.device = CPU, name: str = "cogvideox-2b") -> tuple[Any, NativeVAE]:
    """An architecture at its full width as diffusers and as longvid have it, with the same seeded random weights."""
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = dict(ARCHITECTURES[name])
    theirs: Any = getattr(diffusers, config.pop("_class_name"))(**config)
    theirs = theirs.to(device, dtype).eval().requires_grad_(False)
    return theirs, cast("NativeVAE", load_model(theirs))


def chunk(
    direction: str,
    height: int,
    width: int,
    dtype: torch.dtype,
    index: int,
    device: torch.device = CPU,
    *,
    geometry: LatentGeometry = COGVIDEOX,
) -> Tensor:
    """Input of a chunk: noise that depends on the index only; the first chunk is one frame, or one latent, longer."""
    p, frames, latents = geometry.pixels_per_latent, geometry.chunk_frames, geometry.schedule.chunk_latents
    shape = (1, 3, frames, height, width)
    if direction == "decode":
        shape = (1, geometry.latent_channels, latents, height // p, width // p)
    if index == 0:
        shape = (*shape[:2], shape[2] + 1, *shape[3:])
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(index))
    return (noise.clamp(-1, 1) if direction == "encode" else noise).to(device, dtype)


def fixed_plan(
    model: CausalVAE,
    direction: Direction,
    size: tuple[int, int],
    options: ComputeOptions,
    tile_bytes: int | None = None,
) -> DirectionPlan:
    """The plan of a direction on a CPU with given numerics, contiguous and plain by default."""
    options = replace(options, numerics=options.numerics or Numerics())
    planner = Planner(model, CPU)
    planner.tile_bytes = tile_bytes
    return planner.plan(size, options, (direction,)).direction(direction)


def open_diffusers(vae: Any, direction: str) -> Step:
    """Its own modules with its own cache handling, as its ``encode`` and ``decode`` loop over the frames."""
    if hasattr(vae, "clear_cache"):
        return _open_wan(vae, direction)
    module, kept = (vae.encoder if direction == "encode" else vae.decoder), {"cache": None}

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        out, kept["cache"] = module(x, conv_cache=kept["cache"])
        return cast("Tensor", out)

    return step


def _open_wan(vae: Any, direction: str) -> Step:
    """Wan takes one latent at a time: its frames while encoding, itself while decoding."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

    vae.clear_cache()
    encodes, size = direction == "encode", vae.config.patch_size or 1
    contexts: list[Any] = [None] * (vae._enc_conv_num if encodes else vae._conv_num)
    started = False

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        nonlocal started
        outs = []
        x = cast("Any", patchify)(x, size) if encodes else vae.post_quant_conv(x)
        first = [] if started else [x[:, :, :1]]
        for part in (*first, *torch.split(x[:, :, len(first) :], 4 if encodes else 1, dim=2)):
            more = {} if encodes else {"first_chunk": not started}
            run = vae.encoder if encodes else vae.decoder
            outs.append(run(part, feat_cache=contexts, feat_idx=[0], **more))
            started = True
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return cast(
            "Tensor", vae.quant_conv(out) if encodes else torch.clamp(cast("Any", unpatchify)(out, size), -1.0, 1.0)
        )

    return step


def open_model(
    stack: ExitStack,
    model: CausalVAE,
    direction: Direction,
    offloader: Offloader,
    limits: Limits,
    layout: torch.memory_format,
    **options: Any,
) -> tuple[Step, ConvCache]:
    """A video of longvid's model; ``options`` are those of its context, which lives as long as the stack."""
    module, run = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)
    cache = ConvCache(module, offloader=offloader)
    context = stack.enter_context(ForwardContext(cache, limits=limits, **options))
    return lambda x: run(x.contiguous(memory_format=layout), context), cache


# --------------------------------------------------------------------------------------------------- time


def seconds_of(work: Callable[[], object]) -> float:
    """Time that some work takes on the clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def take_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    label: str,
    measure: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, list[float]]:
    """Time each work in every round, forwards and backwards, so that a drift of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in tqdm(range(rounds), desc=label):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order[:: -1 if turn % 2 else 1]:
            seconds[name].append(measure(works[name]))
    return seconds


# --------------------------------------------------------------------------------------------------- whole processes


def loop_clip(clip: Path, out: Path, num_frames: int) -> None:
    """Copy the clip's packets again and again, with later time stamps, until there are at least ``num_frames``."""
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


def run_command(*args: object, threads: int | None = None) -> dict[str, Any]:
    """One process of the command line, with as many computing threads as torch chooses or as given; its report."""
    command = [sys.executable, "-m", "longvid", *map(str, args), "--json", "--quiet"]
    env = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    report: dict[str, Any] = json.loads(done.stdout)
    return report

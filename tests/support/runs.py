"""Runs that never took place: events as an engine would tell them, with a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Iterator

from longvid.events import ChunkEvent, LayerContext, RunReport, RunStart, Span

MIB = 2**20
CHUNK_FRAMES = 8
BASE_BYTES, RSS_BYTES = 2900 * MIB, 1800 * MIB


def encoder_layers(num_offloaded: int = 0) -> tuple[LayerContext, ...]:
    """The causal convolutions of a CogVideoX encoder; the first ones are the largest, and go first."""
    names = ["conv_in"]
    names += [f"down_blocks.{b}.resnets.{r}.conv{c}" for b in range(4) for r in range(3) for c in (1, 2)]
    names += [f"mid_block.resnets.{r}.conv{c}" for r in range(2) for c in (1, 2)]
    names += ["conv_out"]
    return tuple(
        LayerContext(name=name, bytes=int(90 * MIB / 1.12**i), resident=i >= num_offloaded)
        for i, name in enumerate(names)
    )


def decoder_layers(num_offloaded: int = 0) -> tuple[LayerContext, ...]:
    """The causal convolutions of a CogVideoX decoder, three times as many; the last ones are the largest."""

    def resnet(path: str) -> list[str]:
        norms = [[f"{path}.norm{c}.conv_y", f"{path}.norm{c}.conv_b", f"{path}.conv{c}"] for c in (1, 2)]
        return [name for norm in norms for name in norm]

    names = ["conv_in", *resnet("mid_block.resnets.0"), *resnet("mid_block.resnets.1")]
    names += [name for b in range(4) for r in range(4) for name in resnet(f"up_blocks.{b}.resnets.{r}")]
    names += ["norm_out.conv_y", "norm_out.conv_b", "conv_out"]
    first_away = len(names) - num_offloaded
    return tuple(
        LayerContext(name=name, bytes=int(MIB * 1.04**i), resident=i < first_away) for i, name in enumerate(names)
    )


def run_start(layers: tuple[LayerContext, ...] | None = None, **changes) -> RunStart:
    layers = encoder_layers() if layers is None else layers
    facts = {
        "direction": "encode", "model": "THUDM/CogVideoX-2b", "height": 480, "width": 720, "dtype": "bfloat16",
        "device": "cpu", "chunk_frames": CHUNK_FRAMES, "frames_total": None, "offload": "auto",
        "prefetch_bytes": 160 * MIB, "host_tier": "host memory", "allowed_bytes": 4096 * MIB,
        "reserved_bytes": 512 * MIB, "projected_bytes": BASE_BYTES + 200 * MIB, "weights_bytes": 412 * MIB,
        "layers": layers, "machine": {"cpu": "a processor", "num_cores": 2},
        "plan": "THUDM/CogVideoX-2b at 720x480 in bfloat16, 4.00 GiB allowed\n\nencode   3.03 GiB",
    }  # fmt: skip
    return RunStart(**{**facts, **changes})


def chunk_event(index: int = 0, **changes) -> ChunkEvent:
    facts = {
        "direction": "encode", "index": index, "num_frames": CHUNK_FRAMES, "frames_done": (index + 1) * CHUNK_FRAMES,
        "frames_total": None, "num_latents": 2, "seconds": (index + 1) * 0.5, "compute_seconds": 0.42,
        "wait_seconds": 0.05, "read_seconds": 0.2, "write_seconds": 0.1, "cache_bytes": 700 * MIB,
        "offloaded_bytes": 0, "chunk_peak_bytes": BASE_BYTES, "peak_device_bytes": BASE_BYTES, "rss_bytes": RSS_BYTES,
        "spans": (),
    }  # fmt: skip
    return ChunkEvent(**{**facts, **changes})


def run_report(last: ChunkEvent, **changes) -> RunReport:
    facts = {
        "direction": last.direction, "frames": last.frames_done, "latent_frames": 2 * (last.index + 1),
        "seconds": last.seconds, "frames_per_second": last.frames_done / last.seconds,
        "compute_seconds": 0.75 * last.seconds, "wait_seconds": 0.125 * last.seconds,
        "read_seconds": 0.5 * last.seconds, "write_seconds": 0.25 * last.seconds,
        "peak_device_bytes": last.peak_device_bytes, "projected_bytes": BASE_BYTES + 200 * MIB,
        "peak_rss_bytes": last.rss_bytes, "cache_bytes": last.cache_bytes, "offloaded_bytes": last.offloaded_bytes,
        "resumed_from_frame": 0, "complete": True,
    }  # fmt: skip
    return RunReport(**{**facts, **changes})


def chunk_spans(layers: tuple[LayerContext, ...], begin: float, *, first: bool) -> tuple[Span, ...]:
    """One chunk, layer after layer; offloaded contexts come two layers early and leave when their layer is done."""
    spans, clock, lanes = [], begin, {"to_device": begin, "to_host": begin}

    def move(lane: str, layer: LayerContext, earliest: float) -> float:
        start = max(lanes[lane], earliest)
        lanes[lane] = start + layer.bytes / 12e9
        spans.append(
            Span(lane=lane, layer=layer.name, start_seconds=start, stop_seconds=lanes[lane], num_bytes=layer.bytes)
        )
        return lanes[lane]

    starts = [begin, begin]
    for layer in layers:
        starts.append(clock)
        if not layer.resident and not first:
            clock = max(clock, move("to_device", layer, starts[-3]))
        stop = clock + 0.002 + layer.bytes / 9e9
        spans.append(
            Span(lane="compute", layer=layer.name, start_seconds=clock, stop_seconds=stop, num_bytes=layer.bytes)
        )
        if not layer.resident:
            move("to_host", layer, stop)
        clock = stop
    return tuple(spans)


def simulated(layers: tuple[LayerContext, ...], num_chunks: int, **facts) -> Iterator[ChunkEvent]:
    """Events of a run with noise, waits, and one chunk that needs more than the others."""
    rng, clock, frames = random.Random(4), 0.0, 0
    high = num_chunks // 3
    peak = BASE_BYTES
    for index in range(num_chunks):
        spans = chunk_spans(layers, clock + 0.004, first=index == 0)
        computed = max(span.stop_seconds for span in spans if span.lane == "compute") - clock
        waited = abs(rng.gauss(0, 0.02)) + (0.4 if index % 40 == 17 else 0)
        clock, frames = clock + computed + waited + 0.006, frames + CHUNK_FRAMES + (index == 0)
        chunk_peak = BASE_BYTES + (180 if index == high else rng.randrange(40)) * MIB
        peak = max(peak, chunk_peak)
        yield chunk_event(
            index, num_frames=CHUNK_FRAMES + (index == 0), frames_done=frames, seconds=clock, spans=spans,
            compute_seconds=computed, wait_seconds=waited, chunk_peak_bytes=chunk_peak, peak_device_bytes=peak,
            rss_bytes=RSS_BYTES + rng.randrange(90) * MIB, **facts,
        )  # fmt: skip

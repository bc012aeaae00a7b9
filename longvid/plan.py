"""Plan: what a run will need, known before it starts.

A dry run of the first and of a middle chunk on ``meta`` tensors, under the :class:`AllocationTracker`, gives the
exact peak of tensor bytes without a device, without weights and in about a second. The real run executes the same
code, so on a CPU its tracked peak is the same to the byte. Workspaces of kernels and the rounding of an allocator
are not tensors and are not in these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from longvid.cache import ConvCache
from longvid.errors import ModelError, ScheduleError
from longvid.events import Direction
from longvid.memory import AllocationTracker, MemoryBudget, tensor_bytes
from longvid.models.base import CausalVAE, placed
from longvid.models.loading import load_model
from longvid.schedule import ChunkSchedule
from longvid.step import decode_chunk, encode_chunk
from longvid.units import format_bytes, parse_bytes

__all__ = ["DirectionPlan", "LayerPlan", "Plan", "make_plan", "parse_dtype", "require_resident"]

_META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """The context of one layer."""

    name: str
    bytes: int
    resident: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionPlan:
    """Bytes of one direction, encode or decode."""

    projected_bytes: int
    "highest peak of the whole run: first chunk and weights included"
    steady_chunk_bytes: int
    "highest peak of a chunk in the middle, weights included"
    weights_bytes: int
    cache_bytes: int
    "all contexts of one video"
    activation_bytes: int
    "what a middle chunk needs at its peak beside weights and contexts"
    resident_cache_bytes: int
    offloaded_cache_bytes: int
    chunk_frames: int
    layers: tuple[LayerPlan, ...]

    @property
    def parts(self) -> dict[str, int]:
        """The projection by cause; the first chunk's excess over a middle one, if any, counts as activations."""
        return {
            "weights": self.weights_bytes,
            "contexts": self.resident_cache_bytes,
            "activations": self.projected_bytes - self.weights_bytes - self.resident_cache_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Schedule and memory of encoding and decoding videos of one size with one model."""

    model: str
    height: int
    width: int
    "frame size after padding to whole latents"
    dtype: str
    schedule: ChunkSchedule
    allowed_bytes: int | None
    encode: DirectionPlan
    decode: DirectionPlan

    @property
    def projected_bytes(self) -> int:
        """The higher peak of the two directions."""
        return max(self.encode.projected_bytes, self.decode.projected_bytes)

    def direction(self, direction: Direction) -> DirectionPlan:
        """The part for encoding or decoding."""
        return self.encode if direction == "encode" else self.decode

    def check(self, direction: Direction, *, others_bytes: int = 0) -> None:
        """Raise MemoryBudgetError if the direction does not fit the budget.

        Args:
            direction: what is about to run.
            others_bytes: contexts of other videos that are open at the same time.
        """
        part = self.direction(direction)
        parts = {**part.parts, **({"contexts of other open videos": others_bytes} if others_bytes else {})}
        what = f"{direction} at {self.width}x{self.height} in {self.dtype}"
        MemoryBudget(allowed_bytes=self.allowed_bytes).check(part.projected_bytes + others_bytes, parts, what)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        record = asdict(self)
        record["schedule"] = self.schedule.to_dict()
        record["projected_bytes"] = self.projected_bytes
        return record

    def explain(self) -> str:
        """The plan as a table to read."""
        first = 1 + self.schedule.chunk_frames
        budget = "no limit" if self.allowed_bytes is None else f"{format_bytes(self.allowed_bytes)} allowed"
        rows = [
            ("peak of the run", "projected_bytes"),
            ("peak of a middle chunk", "steady_chunk_bytes"),
            ("  weights", "weights_bytes"),
            ("  contexts", "cache_bytes"),
            ("  activations", "activation_bytes"),
        ]
        lines = [
            f"{self.model} at {self.width}x{self.height} in {self.dtype}, {budget}",
            f"chunks of {first}, {self.schedule.chunk_frames}, {self.schedule.chunk_frames}, ... frames",
            "",
            f"{'':24}{'encode':>14}{'decode':>14}",
        ]
        for label, key in rows:
            lines.append(
                f"{label:24}{format_bytes(getattr(self.encode, key)):>14}{format_bytes(getattr(self.decode, key)):>14}"
            )
        if self.allowed_bytes is not None:
            fits = [
                "yes" if self.direction(d).projected_bytes <= self.allowed_bytes else "no"
                for d in cast("tuple[Direction, ...]", ("encode", "decode"))
            ]
            lines.append(f"{'fits':24}{fits[0]:>14}{fits[1]:>14}")
        for name, part in (("encode", self.encode), ("decode", self.decode)):
            largest = sorted(part.layers, key=lambda layer: -layer.bytes)[:5]
            lines += ["", f"largest of {len(part.layers)} contexts, {name}:"]
            lines += [f"  {layer.name:36}{format_bytes(layer.bytes):>14}" for layer in largest]
        return "\n".join(lines)


def make_plan(
    model: CausalVAE | str,
    *,
    height: int,
    width: int,
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    offload: str = "auto",
    chunk_frames: int | None = None,
) -> Plan:
    """Plan encoding and decoding of ``height`` x ``width`` frames. Needs no weights, no device and about a second.

    Args:
        model: a model, or what :func:`longvid.load_model` takes.
        height: frame height in pixels; sizes that are not whole latents are padded up.
        width: frame width in pixels.
        dtype: compute dtype, a name or a torch dtype; None for that of the model's weights.
        memory: the budget, such as ``"8GiB"``; None for no limit.
        offload: where contexts live; see :func:`require_resident`.
        chunk_frames: frames of a chunk after the first; None for the model's own. If the model is chunk-invariant
            and its own length does not fit the budget, None takes the longest of a half, a quarter, ... that does.

    Raises:
        ModelError: the model or the dtype cannot be used.
        ScheduleError: the frame size is not positive, or ``chunk_frames`` is not for this model.
    """
    if height < 1 or width < 1:
        raise ScheduleError(f"a frame of {width}x{height} pixels has no area")
    require_resident(offload)
    vae = load_model(model)
    if not isinstance(vae, nn.Module):
        raise ModelError(f"{type(vae).__name__} is not a torch module, so its memory cannot be planned")
    facts = vae.describe()
    compute = parse_dtype(dtype) if dtype is not None else next(vae.parameters()).dtype
    skeleton = cast("CausalVAE", placed(vae, _META, compute))
    padded = vae.geometry.padded_size(height, width)
    allowed = None if memory is None else parse_bytes(memory)
    for schedule in _schedules(vae, chunk_frames):
        plan = Plan(
            model=str(facts.get("name_or_path") or facts.get("class_name") or type(vae).__name__),
            height=padded[0],
            width=padded[1],
            dtype=str(compute).removeprefix("torch."),
            schedule=schedule,
            allowed_bytes=allowed,
            encode=_dry_run(skeleton, "encode", *padded, compute, schedule),
            decode=_dry_run(skeleton, "decode", *padded, compute, schedule),
        )
        if allowed is None or plan.projected_bytes <= allowed:
            break
    return plan


def _schedules(model: CausalVAE, chunk_frames: int | None) -> Iterator[ChunkSchedule]:
    """The plans to try, best first; at least one."""
    geometry = model.geometry
    yield geometry.schedule_for(chunk_frames)
    length = geometry.chunk_frames
    while geometry.chunk_invariant and chunk_frames is None and length % (2 * geometry.frames_per_latent) == 0:
        length //= 2
        yield geometry.schedule_for(length)


def _dry_run(
    model: CausalVAE, direction: Direction, height: int, width: int, dtype: torch.dtype, plan: ChunkSchedule
) -> DirectionPlan:
    """Run the first chunk and a middle one on meta tensors and read the tracker."""
    geometry = model.geometry
    tracker = AllocationTracker()
    peaks = []
    with ConvCache(model.encoder if direction == "encode" else model.decoder) as cache:
        for chunk in (plan.full(0), plan.full(1)):
            if direction == "encode":
                host = torch.empty((chunk.padded_frames, height, width, 3), dtype=torch.uint8, device=_META)
            else:
                p = geometry.pixels_per_latent
                shape = (chunk.num_latents, geometry.latent_channels, height // p, width // p)
                host = torch.empty(shape, dtype=torch.float32, device=_META)
            tracker.reset_peak()
            with tracker:
                if direction == "encode":
                    encode_chunk(model, cache, host, device=_META, dtype=dtype)
                else:
                    decode_chunk(model, cache, host, device=_META, dtype=dtype)
            peaks.append(tracker.peak_bytes)
        layers = tuple(LayerPlan(name=n, bytes=b, resident=True) for n, b in cache.layer_bytes().items())
        cache_bytes = cache.nbytes
    weights = tensor_bytes(cast("nn.Module", model))
    return DirectionPlan(
        projected_bytes=weights + max(peaks),
        steady_chunk_bytes=weights + peaks[1],
        weights_bytes=weights,
        cache_bytes=cache_bytes,
        activation_bytes=peaks[1] - cache_bytes,
        resident_cache_bytes=cache_bytes,
        offloaded_cache_bytes=0,
        chunk_frames=plan.chunk_frames,
        layers=layers,
    )


def require_resident(offload: str) -> None:
    """Accept the offload policies of this version: ``"auto"`` and ``"none"``, which both keep contexts on the device.

    Raises:
        ModelError: another policy, which a later version will know.
    """
    if offload not in ("auto", "none"):
        raise ModelError(
            f"offload {offload!r} is not in this version, which keeps every context on the device; use 'auto' or 'none'"
        )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"``, ``"float16"`` or ``"float32"`` as a torch dtype.

    Raises:
        ModelError: another dtype.
    """
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    found = known.get(dtype) if isinstance(dtype, str) else (dtype if dtype in known.values() else None)
    if found is None:
        raise ModelError(f"dtype {dtype!r} cannot be computed in; choose {', '.join(known)}")
    return found

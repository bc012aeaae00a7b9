"""Plan table: a plan as text to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from longvid.events import Direction
from longvid.units import format_bytes

if TYPE_CHECKING:
    from longvid.planning.plan import DirectionPlan, Plan

__all__ = ["explain"]

_ROWS = (
    ("peak without offloading", "nothing_offloaded_bytes"),
    ("lowest possible peak", "minimum_bytes"),
    ("peak of the run, as planned", "projected_bytes"),
    ("peak of a middle chunk", "steady_chunk_bytes"),
    ("  weights", "weights_bytes"),
    ("  activations", "activation_bytes"),
    ("all contexts", "cache_bytes"),
    ("  stay on the device", "resident_cache_bytes"),
    ("  are offloaded", "offloaded_cache_bytes"),
)
_MOST_ROWS = 12
"most contexts in a table"


def explain(plan: Plan) -> str:
    """The plan as tables: peaks by direction, then the contexts."""
    directions, parts = list(plan.parts), list(plan.parts.values())
    first = 1 + plan.schedule.chunk_frames
    allowed, reserved = plan.budget.allowed_bytes, plan.budget.reserved_bytes
    budget = "no limit" if allowed is None else f"{format_bytes(allowed)} allowed"
    if reserved:
        budget += f", {format_bytes(reserved)} of it reserved for kernels and the allocator"
    lines = [
        f"{plan.model} at {plan.width}x{plan.height} in {plan.dtype} on {plan.device}, {budget}",
        f"chunks of {first}, {plan.schedule.chunk_frames}, {plan.schedule.chunk_frames}, ... frames",
        f"computed in the {_by_direction(plan.parts)}",
        "",
        " " * 28 + "".join(f"{direction:>14}" for direction in directions),
    ]
    for label, key in _ROWS:
        lines.append(f"{label:28}" + "".join(f"{format_bytes(getattr(part, key)):>14}" for part in parts))
    lines.append(f"{'layers run in':28}" + "".join(f"{part.execution.slices:>14}" for part in parts))
    how = [part.execution for part in parts]
    kept = (("all kept" if e.keeps_kernels else "buffers kept") if e.keeps_buffers else "freed" for e in how)
    lines.append(f"{'memory between chunks':28}" + "".join(f"{words:>14}" for words in kept))
    if allowed is not None:
        lines.append(f"{'fits':28}" + "".join(f"{'yes' if plan.fits(d) else 'no':>14}" for d in directions))
    for direction, part in zip(directions, parts, strict=True):
        lines += ["", *_explain_direction(direction, part)]
    return "\n".join(lines)


def _explain_direction(direction: Direction, part: DirectionPlan) -> list[str]:
    leaving = [layer for layer in part.layers if not layer.resident]
    if not leaving:
        lines = [f"{direction}: every context stays on the device; nothing is transferred"]
        listed, title = sorted(part.layers, key=lambda layer: -layer.bytes)[:5], "largest contexts"
    else:
        compute = part.cost_model.compute_seconds(part.rates)
        transfer = part.cost_model.transfer_seconds(part.placement, part.rates)
        extra = part.cost_model.chunk_seconds(part.placement, part.rates) / compute - 1 if compute else 0.0
        early = part.placement.prefetch_bytes
        rates = part.rates
        how = "measured" if rates.measured else "a fast GPU's"
        lines = [
            f"{direction}: {len(leaving)} of {len(part.layers)} contexts are offloaded between chunks and come back "
            + (f"up to {format_bytes(early)} ahead of need" if early else "when needed"),
            f"  predicted for a chunk, at {how} {rates.flops_per_second / 1e12:.3g} TFLOP/s and "
            f"{rates.link_bytes_per_second / 1e9:.3g} GB/s each way: compute {compute * 1e3:.1f} ms, transfer "
            f"{transfer * 1e3:.1f} ms each way, {max(0.0, extra):.1%} longer than without",
        ]
        listed, title = leaving, "contexts that are offloaded"
    if part.suggestions:
        lines += ["  does not fit; these settings would:", *(f"    {text}" for text in part.suggestions)]
    lines += [f"  {title:38}{'bytes':>12}{'transfer/compute':>18}"]
    shown = listed if len(listed) <= _MOST_ROWS else sorted(listed, key=lambda layer: -layer.bytes)[:_MOST_ROWS]
    lines += [f"    {layer.name:36}{format_bytes(layer.bytes):>12}{layer.exposure:>18.2f}" for layer in shown]
    if len(shown) < len(listed):
        rest = sum(layer.bytes for layer in listed) - sum(layer.bytes for layer in shown)
        lines.append(f"    and {len(listed) - len(shown)} smaller ones, {format_bytes(rest)}; --json lists all")
    return lines


def _by_direction(parts: Mapping[Direction, DirectionPlan]) -> str:
    """The numerics in words, by direction where they differ."""
    words_of = {direction: part.execution.numerics.words for direction, part in parts.items()}
    if len(set(words_of.values())) == 1:
        return next(iter(words_of.values()))
    return "; ".join(f"{words} ({direction})" for direction, words in words_of.items())

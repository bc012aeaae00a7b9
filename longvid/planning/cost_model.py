"""CostModel: what a chunk needs from moment to moment, and what a placement of contexts makes of it. Arithmetic only.

A chunk is a row of *steps*, one for each window that opens. During a step the device holds the weights, what the step
computes with, the resident contexts, and the offloaded ones that are in use or were fetched early (see
:mod:`longvid.memory.offloader`, whose rules these are). So the peak of any placement is a maximum of sums, exact to the
byte, and one dry run answers for all placements.

Seconds are another matter: they are estimates from assumed rates, used to prefer one placement to another and to show
what to expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from longvid.memory.offload import OffloadPolicy, Placement

__all__ = ["CostModel", "DeviceRates", "LayerCost", "Need", "choose_placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """How fast a device computes and copies. Unless ``measured``, these are assumptions.

    The defaults are those of a fast card on a PCIe 5 bus: 350 TFLOP/s is the most that convolutions of a video VAE are
    known to reach in practice, so a transfer that hides behind it hides on slower cards with the same bus.
    """

    flops_per_second: float = 350e12
    link_bytes_per_second: float = 50e9
    "in each direction, both at once"
    measured: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """From the opening of one layer's window to the opening of the next. Bytes are without weights and contexts."""

    layer: str
    "its path, or the name of a group of layers that run piece by piece"
    context_bytes: int
    first_open_bytes: int
    "first chunk, before the layer's context has come into being"
    first_kept_bytes: int
    "first chunk, after that"
    steady_bytes: int
    "any later chunk"
    flops: int
    "counted in a later chunk"
    sizes: tuple[int, ...] = ()
    "bytes of each context of a group"
    left_bytes: int | None = None
    "any later chunk, between the end of a group and the next step: its contexts have left if they are to"

    @property
    def bytes_per_flop(self) -> float:
        """How hard the context's transfer is to hide, whatever the rates: layers are put in order by it."""
        return self.context_bytes / self.flops if self.flops else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Device bytes at a peak, by cause."""

    working_bytes: int
    "activations: inputs, windows, outputs, temporaries"
    resident_bytes: int
    "contexts that stay"
    transit_bytes: int
    "offloaded contexts that are in use or on their way"

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return self.working_bytes + self.resident_bytes + self.transit_bytes


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Steps of a chunk in the order in which they run; ``lead`` is what comes before the first window opens."""

    steps: tuple[LayerCost, ...]
    first_lead_bytes: int
    steady_lead_bytes: int
    lead_flops: int

    @cached_property
    def cache_bytes(self) -> int:
        """All contexts."""
        return sum(step.context_bytes for step in self.steps)

    @cached_property
    def total_flops(self) -> int:
        """Of a chunk in the middle."""
        return self.lead_flops + sum(step.flops for step in self.steps)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers in the order in which they run."""
        return tuple(step.layer for step in self.steps)

    @cached_property
    def contexts(self) -> tuple[tuple[str, int], ...]:
        """Path and bytes of every context in that order."""
        return tuple((step.layer, step.context_bytes) for step in self.steps)

    # ------------------------------------------------------------------------------------------- bytes, exact

    def _transit(self, position: int, placement: Placement) -> int:
        """Offloaded contexts on the device during step ``position`` of a later chunk."""
        return sum(self.steps[i].context_bytes for i in placement.staged(position, self.contexts))

    def resident_bytes(self, placement: Placement) -> int:
        """Contexts that stay on the device."""
        return sum(step.context_bytes for step in self.steps if step.layer not in placement.offloaded)

    def idle_need(self, placement: Placement) -> Need:
        """Between two chunks: the last layer's context is still there, and nothing is computed."""
        transit = self._transit(len(self.steps) - 1, placement) if self.steps else 0
        if self.steps and self.steps[-1].left_bytes is not None and self.steps[-1].layer in placement.offloaded:
            transit -= self.steps[-1].context_bytes
        return Need(working_bytes=0, resident_bytes=self.resident_bytes(placement), transit_bytes=transit)

    def steady_needs(self, placement: Placement) -> list[Need]:
        """A chunk in the middle, the lead first."""
        needs = [replace(self.idle_need(placement), working_bytes=self.steady_lead_bytes)]
        for position, step in enumerate(self.steps):
            transit = self._transit(position, placement)
            need = replace(needs[0], working_bytes=step.steady_bytes, transit_bytes=transit)
            if step.left_bytes is not None:
                own = step.context_bytes if step.layer in placement.offloaded else 0
                left = replace(need, working_bytes=step.left_bytes, transit_bytes=transit - own)
                need = max(need, left, key=lambda need: need.total_bytes)
            needs.append(need)
        return needs

    def first_needs(self, placement: Placement) -> list[Need]:
        """The first chunk, in which contexts come into being one by one; the lead first."""
        needs = [Need(working_bytes=self.first_lead_bytes, resident_bytes=0, transit_bytes=0)]
        resident = 0
        for step in self.steps:
            needs.append(Need(working_bytes=step.first_open_bytes, resident_bytes=resident, transit_bytes=0))
            leaves = step.layer in placement.offloaded
            resident += 0 if leaves else step.context_bytes
            transit = step.context_bytes if leaves and step.left_bytes is None else 0
            needs.append(Need(working_bytes=step.first_kept_bytes, resident_bytes=resident, transit_bytes=transit))
        return needs

    def steady_peak(self, placement: Placement) -> Need:
        """The highest need of a chunk in the middle."""
        return max(self.steady_needs(placement), key=lambda need: need.total_bytes)

    def peak(self, placement: Placement) -> Need:
        """The highest need of a whole run."""
        needs = [*self.steady_needs(placement), *self.first_needs(placement)]
        return max(needs, key=lambda need: need.total_bytes)

    @property
    def least(self) -> Placement:
        """The placement with the lowest peak: everything leaves, nothing comes early."""
        return Placement(offloaded=frozenset(self.layers))

    # ------------------------------------------------------------------------------------------- seconds, estimated

    def compute_seconds(self, rates: DeviceRates) -> float:
        """Of a chunk in the middle, without any transfer."""
        return self.total_flops / rates.flops_per_second

    def transfer_seconds(self, placement: Placement, rates: DeviceRates) -> float:
        """Time that each direction of the link is busy in a chunk."""
        return (self.cache_bytes - self.resident_bytes(placement)) / rates.link_bytes_per_second

    def exposure(self, step: LayerCost, rates: DeviceRates) -> float:
        """Transfer time of a layer's context over the computing time of its own step; above 1 it cannot hide there."""
        return step.bytes_per_flop * rates.flops_per_second / rates.link_bytes_per_second

    def chunk_seconds(self, placement: Placement, rates: DeviceRates) -> float:
        """Of a chunk in the middle, transfers included: a small simulation of computation and the two lanes."""
        now = start = in_free = out_free = left = 0.0
        arrived: dict[str, float] = {}
        for _ in range(2):  # the second chunk finds the lanes as every later one does
            start = now
            now += self.lead_flops / rates.flops_per_second
            for position, step in enumerate(self.steps):
                now = max(now, left)
                for i in placement.staged(position, self.contexts):
                    other = self.steps[i]
                    if other.layer not in arrived:
                        in_free = max(in_free, now) + other.context_bytes / rates.link_bytes_per_second
                        arrived[other.layer] = in_free
                if step.layer in placement.offloaded:
                    now = max(now, arrived.pop(step.layer))
                    left = out_free = max(out_free, now) + step.context_bytes / rates.link_bytes_per_second
                now += step.flops / rates.flops_per_second
        return now - start


def choose_placement(
    cost_model: CostModel, policy: OffloadPolicy, fits: Callable[[Placement], bool], rates: DeviceRates
) -> Placement:
    """The placement with the least cost among those that the policy allows and that fit; if none fits, the smallest.

    Cost is the predicted time of a chunk, then the bytes that move. If ``fits`` holds for a placement, it must hold for
    any that needs less at each moment.
    """
    if policy.kind == "none":
        return Placement()
    if policy.kind == "auto" and fits(Placement()):
        return Placement()
    candidates: list[Placement] = []
    windows = _windows(cost_model) if policy.prefetch_bytes is None else [policy.prefetch_bytes]
    for prefetch_bytes in windows:
        if policy.kind == "all":
            sets: Iterable[frozenset[str]] = [frozenset(cost_model.layers)]
        elif policy.kind == "size":
            sets = [_beyond(cost_model, policy.resident_bytes or 0)]
        else:
            sets = _covering_sets(cost_model, prefetch_bytes, fits, rates)
        candidates += [Placement(offloaded=s, prefetch_bytes=prefetch_bytes if s else 0) for s in sets]
    fitting = [placement for placement in candidates if fits(placement)]
    if not fitting:
        return min(candidates, key=lambda p: cost_model.peak(p).total_bytes, default=cost_model.least)

    def cost(placement: Placement) -> tuple[float, float, int]:
        # A thousandth of a chunk is nothing: then fewer bytes in motion and less memory are worth more.
        seconds = cost_model.chunk_seconds(placement, rates) / max(cost_model.compute_seconds(rates), 1e-12)
        moved = cost_model.transfer_seconds(placement, rates)
        return round(seconds, 3), moved, cost_model.peak(placement).total_bytes

    return min(fitting, key=cost)


def _windows(cost_model: CostModel) -> list[int]:
    """Sizes of the prefetch window worth trying: those that let one more context of some size in."""
    sizes = {step.context_bytes for step in cost_model.steps}
    largest = max(sizes, default=0)
    return sorted({0, *sizes, 2 * largest, 3 * largest})


def _beyond(cost_model: CostModel, resident_bytes: int) -> frozenset[str]:
    """What leaves when contexts of at most ``resident_bytes`` may stay: those that are hardest to hide stay."""
    left, staying = resident_bytes, set()
    for step in sorted(cost_model.steps, key=lambda s: s.bytes_per_flop, reverse=True):
        if step.context_bytes <= left:
            left -= step.context_bytes
            staying.add(step.layer)
    return frozenset(cost_model.layers) - staying


def _covering_sets(
    cost_model: CostModel, prefetch_bytes: int, fits: Callable[[Placement], bool], rates: DeviceRates
) -> list[frozenset[str]]:
    """Sets whose leaving makes the plan fit and of which no member can stay; none if there are none.

    Layers whose transfer hides join before those whose does not. Two such orders are tried, the least exposed first and
    the largest first, since one large context may do the work of several small ones. Then each set is thinned out, the
    costliest member first.
    """

    def placement(offloaded: Iterable[str]) -> Placement:
        return Placement(offloaded=frozenset(offloaded), prefetch_bytes=prefetch_bytes)

    if not fits(placement(cost_model.layers)):
        return []
    orders = (
        sorted(cost_model.steps, key=lambda s: s.bytes_per_flop),
        sorted(cost_model.steps, key=lambda s: (cost_model.exposure(s, rates) > 1, -s.context_bytes, s.bytes_per_flop)),
    )
    found = []
    for order in orders:
        chosen: list[str] = []
        for step in order:
            if fits(placement(chosen)):
                break
            chosen.append(step.layer)
        for layer in reversed(chosen.copy()):
            without = [other for other in chosen if other != layer]
            if fits(placement(without)):
                chosen = without
        found.append(frozenset(chosen))
    return found

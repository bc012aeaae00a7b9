"""Which contexts leave the device between chunks: the policy that a user asks for, and the placement that a plan makes.

Access to contexts is cyclic: every chunk touches each of them once, always in the same order. The least recently used
one is then the very next one that is needed, so nothing here evicts by age. A placement is fixed before the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from longvid.errors import OptionError
from longvid.units import format_bytes, parse_bytes

__all__ = ["OffloadPolicy", "Placement"]

Kind: TypeAlias = Literal["auto", "none", "all", "size"]
_NAMED: dict[str, Kind] = {"auto": "auto", "none": "none", "all": "all", "0": "all"}


@dataclass(frozen=True, slots=True)
class OffloadPolicy:
    """What may leave the device: ``auto`` as much as the budget needs, ``none``, ``all``, or all beyond a size."""

    kind: Kind = "auto"
    resident_bytes: int | None = None
    "for ``size``: contexts up to this many bytes stay on the device"
    prefetch_bytes: int | None = None
    "the window of :class:`Placement`; None for whatever the plan finds best"

    @classmethod
    def parse(cls, value: str | int | OffloadPolicy) -> OffloadPolicy:
        """Read ``"auto"``, ``"none"``, ``"all"`` or a size such as ``"512MiB"``.

        Raises:
            OptionError: it is none of these.
        """
        if isinstance(value, OffloadPolicy):
            return value
        if isinstance(value, str) and value in _NAMED:
            return cls(_NAMED[value])
        try:
            return cls("size", parse_bytes(value))
        except OptionError as exc:
            raise OptionError(
                f"offload {value!r} is not known; choose auto, none, all, or the size of the contexts that may stay on "
                "the device, with its unit, such as 512MiB"
            ) from exc

    def __str__(self) -> str:
        return self.kind if self.resident_bytes is None else f"beyond {format_bytes(self.resident_bytes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the contexts of one video live, fixed for its whole life. Never changes a result."""

    offloaded: frozenset[str] = frozenset()
    "paths of the layers whose contexts leave the device between chunks"
    prefetch_bytes: int = 0
    "offloaded contexts of coming layers that may be on the device early, together; 0 to fetch each when its layer runs"

    def staged(self, position: int, contexts: Sequence[tuple[str, int]]) -> Iterator[int]:
        """Positions of the offloaded contexts that are on the device while layer ``position`` runs, its own first.

        ``contexts`` are path and bytes of every layer in running order; after the last comes the first, of the next
        chunk.
        """
        n, room = len(contexts), self.prefetch_bytes
        if contexts[position][0] in self.offloaded:
            yield position
        for ahead in range(1, n):
            path, num_bytes = contexts[(position + ahead) % n]
            if path in self.offloaded:
                room -= num_bytes
                if room < 0:
                    return
                yield (position + ahead) % n

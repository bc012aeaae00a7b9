"""Numerics: the choices that decide the last bits of a result. They are fixed for a video and recorded in its store.

All of them are correct: kernels add the same products in another order, round less often, or compute fewer products
whose sum is the same. Budgets, offloading and prefetch never change a bit and are not here. Row tiles are not here
either: they may change the last bits of float32 on processors whose library picks its kernel by the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from longvid.errors import ModelError

__all__ = ["Layout", "Numerics", "parse_layout", "parse_paired_frames"]

Layout: TypeAlias = Literal["contiguous", "channels_last"]

_REMOVED = {"subpixel_upsampling": False, "compiled": False}
"""forms that earlier versions had: a run without them has the fingerprint that it had there, so that it can be resumed,
and one with them has another"""
_LATER = frozenset({"float32_products"})
"forms that came when stores had been recorded without them; recorded only where they are taken, for the same reason"


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How a model is computed, as far as it can be seen in the result."""

    layout: Layout = "contiguous"
    """order of axes in memory. ``contiguous``: B C T H W, in which the bfloat16 encoder of CogVideoX is diffusers' bit
    for bit on a CPU. ``channels_last``: B T H W C, in which convolutions need no reordering"""
    paired_frames: bool = False
    "whether convolutions over three frames use Winograd F(2,3) along time, with a third fewer multiplications"
    fused_residuals: bool = False
    "whether a convolution adds onto its residual within the kernel, where a separate sum would round once more"
    float32_products: bool = False
    """whether convolutions of bfloat16 widen their input and weights to float32 and round the result once, for CPUs
    whose library has no bfloat16 kernels"""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, and part of the fingerprint by which a store knows the runs that can resume it."""
        facts = asdict(self) | _REMOVED
        return {name: value for name, value in facts.items() if value or name not in _LATER}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Numerics:
        """Read what :meth:`to_dict` gave, in this version or an earlier one."""
        pairs, fuses, widens = (bool(facts.get(f)) for f in ("paired_frames", "fused_residuals", "float32_products"))
        layout = parse_layout(facts.get("layout", "auto")) or "contiguous"
        return cls(layout=layout, paired_frames=pairs, fused_residuals=fuses, float32_products=widens)

    @property
    def words(self) -> str:
        """In words, for people."""
        facts = {
            f"{self.layout.replace('_', ' ')} layout": True,
            "Winograd along time": self.paired_frames,
            "residuals in the convolutions": self.fused_residuals,
            "products in float32": self.float32_products,
        }
        return ", ".join(words for words, holds in facts.items() if holds)


def parse_layout(layout: str) -> Layout | None:
    """A layout by name; None for ``"auto"``, and ModelError for any other word."""
    known: dict[str, Layout | None] = {"auto": None, **{name: name for name in get_args(Layout)}}
    if layout not in known:
        raise ModelError(f"layout {layout!r} is not known; choose {', '.join(known)}")
    return known[layout]


def parse_paired_frames(paired_frames: str | bool) -> bool | None:
    """``True`` or ``"on"``, ``False`` or ``"off"``; None for ``"auto"``, and ModelError for anything else."""
    known = {"auto": None, "on": True, "off": False, True: True, False: False}
    if paired_frames not in known:
        raise ModelError(f"paired_frames {paired_frames!r} is not known; choose auto, on or off")
    return known[paired_frames]

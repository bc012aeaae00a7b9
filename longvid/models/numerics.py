"""Numerics: choices that decide the last bits of a result. Fixed for a video, recorded in its store.

None is a matter of right or wrong: kernels add the same products in another order, round less often, or compute fewer
products that amount to the same. What never changes a bit (budgets, offloading, slices, prefetch) is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from longvid.errors import ModelError

__all__ = ["Layout", "Numerics", "parse_layout", "parse_paired_frames"]

Layout: TypeAlias = Literal["contiguous", "channels_last"]

_LATER = frozenset({"fused_pooling"})
"forms that came when stores had been recorded without them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How a model is computed, as far as it can be seen in the result."""

    layout: Layout = "contiguous"
    """of activations in memory. ``contiguous``: B C T H W, in which the bfloat16 encoder of CogVideoX is diffusers' bit
    for bit on a CPU. ``channels_last``: B T H W C, in which convolutions need no reordering"""
    paired_frames: bool = False
    "whether convolutions over three frames take two frames at a time, with a third fewer multiplications"
    fused_residuals: bool = False
    "whether a convolution adds onto its residual within the kernel, where a sum apart would round once more"
    fused_pooling: bool = False
    """whether a convolution whose output is averaged over pairs of frames computes the averages, with a third fewer
    multiplications"""
    subpixel_upsampling: bool = False
    "whether upsampling and its convolution are a sub-pixel convolution, with 4/9 of the multiplications"
    compiled: bool = False
    "whether norm and activation are one kernel made by torch.compile, where PyTorch's own would round between them"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON. Of forms that older versions did not know, those that are taken.

        So a run without them has the fingerprint that it had then, and what was begun then can be continued.
        """
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Numerics:
        """What :meth:`to_dict` gave, of an older version too: what it does not know was not done."""
        return cls(
            layout=parse_layout(facts.get("layout", "auto")) or "contiguous",
            paired_frames=bool(facts.get("paired_frames")),
            fused_residuals=bool(facts.get("fused_residuals")),
            fused_pooling=bool(facts.get("fused_pooling")),
            subpixel_upsampling=bool(facts.get("subpixel_upsampling")),
            compiled=bool(facts.get("compiled")),
        )

    @property
    def words(self) -> str:
        """In words, for people."""
        told = f"{self.layout.replace('_', ' ')} layout"
        facts = {
            "frames in pairs": self.paired_frames,
            "residuals in the convolutions": self.fused_residuals,
            "averages in the convolutions": self.fused_pooling,
            "sub-pixel upsampling": self.subpixel_upsampling,
            "norms compiled": self.compiled,
        }
        return ", ".join([told, *(words for words, holds in facts.items() if holds)])


def parse_layout(layout: str) -> Layout | None:
    """A layout by name; None for ``"auto"``.

    Raises:
        ModelError: there is no such layout.
    """
    known: dict[str, Layout | None] = {"auto": None, **{name: name for name in get_args(Layout)}}
    if layout not in known:
        raise ModelError(f"layout {layout!r} is not known; choose {', '.join(known)}")
    return known[layout]


def parse_paired_frames(paired_frames: str | bool) -> bool | None:
    """``True`` or ``"on"``, ``False`` or ``"off"``; None for ``"auto"``.

    Raises:
        ModelError: it is none of these.
    """
    known = {"auto": None, "on": True, "off": False, True: True, False: False}
    if paired_frames not in known:
        raise ModelError(f"paired_frames {paired_frames!r} is not known; choose auto, on or off")
    return known[paired_frames]

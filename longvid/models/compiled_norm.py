"""silu(norm(x)) of known statistics as one kernel, made by ``torch.compile``: one read and one write of every value.

PyTorch's own operations go over a slab several times, in a cache at best. This is for tensors on a CPU in channels
last; a CUDA device has :mod:`longvid.models.triton_norms`.

``torch.compile`` does not work under a dispatch mode, and the memory meter is one. A custom operator is called beneath
the modes, sees no allocation of its own and hides none.

Axes: B batch, C channels, H height, W width; lower-case h w are those of a latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["apply_silu", "available"]

_MOST_KERNELS = 64
"of a function, before torch.compile gives up. Sizes are variables, but for sizes of one and sizes that are equal"


@cache
def available() -> bool:
    """Whether a kernel can be made here and computes what it should.

    The first call makes two (seconds), because what can be missing shows only then, such as a C++ compiler. A failure
    is a warning, once, and False from then on.
    """
    last = torch.channels_last
    x = torch.linspace(-3, 3, 192).view(1, 8, 4, 6).contiguous(memory_format=last)
    y = torch.linspace(-1, 1, 48).view(1, 8, 2, 3).contiguous(memory_format=last)
    scale, shift, outs = torch.full((1, 8), 2.0), torch.full((1, 8), 0.5), (torch.empty_like(x), torch.empty_like(x))
    with torch.inference_mode():
        try:
            for out, maps in zip(outs, (None, (y, y)), strict=True):
                apply_silu(x, out, scale, shift, maps)
        except Exception as failure:  # a missing compiler or header, a full disk: each has an exception of its own
            reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
            warnings.warn(f"norms cannot be compiled here and run as they are: {reason}", stacklevel=2)
            return False
    large = F.interpolate(y, scale_factor=2)
    expected = F.silu(2 * x + 0.5), F.silu((2 * x + 0.5) * large + large)
    return all(torch.allclose(out, right, rtol=1e-5, atol=1e-5) for out, right in zip(outs, expected, strict=True))


def apply_silu(
    x_BCHW: Tensor, out_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor, maps: tuple[Tensor, Tensor] | None
) -> None:
    """Write silu((x * scale + shift) * y + b), computed in float32 and rounded once, into ``out``.

    Args:
        x_BCHW: one frame, in channels last.
        out_BCHW: likewise.
        scale_BC: float32.
        shift_BC: float32.
        maps: y and b, (B, C, h, w), read as if enlarged to H x W by nearest neighbour; None for 1 and 0.
    """
    B, C, H, W = x_BCHW.shape
    x_BHWC, out_BHWC = x_BCHW.permute(0, 2, 3, 1), out_BCHW.permute(0, 2, 3, 1)
    for batch in range(B):
        scale, shift = scale_BC[batch], shift_BC[batch]
        if maps is None:
            shape: tuple[int, ...] = (H * W, C)
            y = b = None
        else:
            h, w = maps[0].shape[2:]
            shape = (h, H // h, w, W // w, C)
            y, b = (m[batch].permute(1, 2, 0)[:, None, :, None] for m in maps)
        _affine_silu(x_BHWC[batch].view(shape), scale, shift, y, b, out_BHWC[batch].view(shape))


@torch.library.custom_op("longvid::affine_silu", mutates_args=("out",), device_types="cpu")
def _affine_silu(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, b: Tensor | None, out: Tensor) -> None:
    from torch._dynamo import config  # a second to import, and few want it

    with config.patch(recompile_limit=_MOST_KERNELS):
        if y is None or b is None:
            _compiled(_plain)(x, scale, shift, out)
        else:
            _compiled(_mapped)(x, scale, shift, y, b, out)


@_affine_silu.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, b: Tensor | None, out: Tensor) -> None:
    """A dry run has nothing to see here: the kernel allocates nothing."""


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    # Of a full graph, torch.compile raises an error where it would otherwise go on in other numerics.
    return torch.compile(function, dynamic=True, fullgraph=True)


def _plain(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    out.copy_(F.silu(x.float() * scale + shift))


def _mapped(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(F.silu((x.float() * scale + shift) * y.float() + b.float()))

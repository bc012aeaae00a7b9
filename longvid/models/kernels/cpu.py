"""Which kernels the CPU's library, oneDNN, has on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from longvid.environment import onednn_limit

__all__ = ["compute_threads", "has_bfloat16", "has_matrix_unit", "has_onednn"]

_NARROW_ISAS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}


@cache
def has_onednn() -> bool:
    """Whether PyTorch was built with oneDNN."""
    return bool(torch._C._has_mkldnn)


def has_bfloat16() -> bool:
    """Whether oneDNN convolves bfloat16 here. PyTorch's own kernels are hundreds of times slower."""
    return has_onednn() and onednn_limit() not in _NARROW_ISAS and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_matrix_unit() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices in a unit of the processor made for that (AMX)."""
    limit = onednn_limit()
    return has_bfloat16() and (not limit or "AMX" in limit) and bool(torch.cpu._is_amx_tile_supported())


@contextmanager
def compute_threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; None for as many as are set.

    The setting is that of the thread that calls, and of those that begin meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

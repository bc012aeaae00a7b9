"""Which kernels the CPU's library, oneDNN, has on this machine."""

from __future__ import annotations

import os
from functools import cache

import torch

__all__ = ["has_bfloat16", "has_matrix_unit", "has_onednn"]

_NARROW_ISAS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}


@cache
def has_onednn() -> bool:
    """Whether PyTorch was built with oneDNN."""
    return bool(torch._C._has_mkldnn)


def _isa_limit() -> str:
    """The instruction set that the user limits oneDNN to; empty if there is no limit."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return "" if limit in ("ALL", "DEFAULT") else limit


def has_bfloat16() -> bool:
    """Whether oneDNN convolves bfloat16 here. PyTorch's own kernels are hundreds of times slower."""
    return has_onednn() and _isa_limit() not in _NARROW_ISAS and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_matrix_unit() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices in a unit of the processor made for that (AMX)."""
    limit = _isa_limit()
    return has_bfloat16() and (not limit or "AMX" in limit) and bool(torch.cpu._is_amx_tile_supported())

"""Facts of the machine for records and reports, without names of owners or paths, and settings of its allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from longvid import __version__

__all__ = ["describe_machine", "kernels_of", "map_large_allocations", "onednn_limit"]

_M_MMAP_THRESHOLD = -3
"as defined in malloc.h of glibc"


def describe_machine(device: str) -> dict[str, Any]:
    """Facts of this machine, ready for JSON. Holds no host name, no user name and no path.

    The name of a ``device`` that this machine does not have is the only fact of it.
    """
    import torch

    name, memory_bytes = _accelerator(device)
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cores": _usable_cores(),
        "ram_bytes": int(psutil.virtual_memory().total),
        "accelerator": name,
        "accelerator_bytes": memory_bytes,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "num_torch_threads": torch.get_num_threads(),
        "longvid": __version__,
    }


def kernels_of(device: str) -> str:
    """What decides, beside the version of torch, which kernels run: the instruction set of a CPU; the name of a GPU and
    the versions of the libraries that have its kernels."""
    import torch

    kind = torch.device(device).type
    if kind != "cpu":
        libraries = {}
        if kind == "cuda":
            # torch declares no types for it
            libraries["cuDNN"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
            with suppress(PackageNotFoundError):
                libraries["Triton"] = version("triton")
        return ", ".join([str(_accelerator(device)[0]), *(f"{name} {there}" for name, there in libraries.items())])
    capability, limit = str(torch.backends.cpu.get_cpu_capability()), onednn_limit()
    is_lower = limit and not (capability == "AVX2" and limit.startswith(("AVX2", "AVX512", "AVX10")))
    units = [("BF16", torch.cpu._is_avx512_bf16_supported), ("AMX", torch.cpu._is_amx_tile_supported)]
    capability += "".join(f" {name}" for name, is_there in units if capability == "AVX512" and is_there())
    return f"cpu {capability}" + (f", oneDNN up to {limit}" if is_lower else "")


def onednn_limit() -> str:
    """The instruction set that the user limits the CPU's library to; empty if there is no limit."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return "" if limit in ("ALL", "DEFAULT") else limit


def _cpu_model() -> str:
    """Name of the processor, or its architecture where the name is unknown."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores that this process may run on, which a container or ``taskset`` can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerator(device: str) -> tuple[str | None, int | None]:
    """Name and bytes of the device; None for the CPU, whose facts stand beside it."""
    import torch

    try:
        where = torch.device(device)
        if where.type == "cpu":
            return None, None
        facts = torch.get_device_module(where).get_device_properties(where)
        return str(facts.name), int(facts.total_memory)
    except (RuntimeError, AssertionError, AttributeError):
        return device, None


def map_large_allocations() -> None:
    """Make glibc map every large tensor by itself, so that the peak memory does not depend on heap fragmentation.

    By default glibc raises its limit up to 32 MiB during a run, and the small tensors of three threads share one heap.
    Newly mapped pages have to be zeroed, so torch is asked to use pages of 2 MiB. For programs, not libraries, to call
    before torch is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 * 1024)

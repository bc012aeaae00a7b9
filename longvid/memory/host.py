"""Reads from the operating system how much memory this process uses and how much more it can take."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["host_available_bytes", "peak_rss_bytes", "rss_bytes"]


def host_available_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of host memory that this process can still take: the machine's, or what its container leaves if less.

    Control groups are mounted at ``cgroups``; those of this process are named in the file ``own``.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_headrooms(cgroups, own)]))


def _cgroup_headrooms(cgroups: Path, own: Path) -> Iterator[int]:
    """What is left under the limit of each control group that this process is in, of both versions.

    A limit holds for all groups below it, so every level up to the mount counts. Inside a container the own path may
    not exist below the mount, which then shows the container's own group at its root.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            for level in (folder, *folder.parents):
                headroom = _headroom(level, *files)
                if headroom is not None:
                    yield headroom
                if level == root:
                    break


def _headroom(folder: Path, limit_name: str, usage_name: str, reclaimable_key: str) -> int | None:
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        if not limit.isdecimal():  # "max"
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit) - usage + int(stat.get(reclaimable_key, 0))  # page cache is given up when memory is short
    except (OSError, ValueError):
        return None


def rss_bytes() -> int:
    """Resident set size of this process now, as the OS counts it."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Highest resident set size of this program since it started, as the operating system counts it.

    On Linux this is VmHWM in ``status``. ``ru_maxrss`` survives exec, so it includes the memory of the process that
    forked this one.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    # The counters are updated at different moments, so the present value may be above the recorded peak.
    return max(peak, rss_bytes())

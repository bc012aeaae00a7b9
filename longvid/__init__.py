"""longvid: arbitrarily long video through a cached causal-conv VAE, in bounded memory, to and from zarr.

Names are imported when they are first used, so that ``import longvid`` and ``longvid --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from longvid.errors import (
        CacheError,
        LongvidError,
        MemoryBudgetError,
        ModelError,
        NonFiniteError,
        ScheduleError,
        SessionStateError,
        SourceError,
        StoreError,
    )
    from longvid.events import ChunkEvent, RunReport, RunStart
    from longvid.media.limits import Limits
    from longvid.memory.tracker import AllocationTracker
    from longvid.models.base import CausalVAE, LatentGeometry
    from longvid.models.cache import ConvCache
    from longvid.models.layers import CausalConv3d
    from longvid.models.loading import load_model
    from longvid.planning.plan import Plan
    from longvid.planning.planner import make_plan
    from longvid.planning.profile import Profile
    from longvid.reporting.page import ReportPage
    from longvid.reporting.progress import ProgressBar
    from longvid.reporting.recorder import Recorder
    from longvid.runtime.session import VideoSession
    from longvid.schedule import Chunk, ChunkSchedule
    from longvid.store.durability import Durability
    from longvid.store.reader import LatentStore, open_store

__all__ = [
    "AllocationTracker",
    "CacheError",
    "CausalConv3d",
    "CausalVAE",
    "Chunk",
    "ChunkEvent",
    "ChunkSchedule",
    "ConvCache",
    "Durability",
    "LatentGeometry",
    "LatentStore",
    "Limits",
    "LongvidError",
    "MemoryBudgetError",
    "ModelError",
    "NonFiniteError",
    "Plan",
    "Profile",
    "ProgressBar",
    "Recorder",
    "ReportPage",
    "RunReport",
    "RunStart",
    "ScheduleError",
    "SessionStateError",
    "SourceError",
    "StoreError",
    "VideoSession",
    "load_model",
    "make_plan",
    "open_store",
]

_HOMES = {
    "longvid.models.cache": ("ConvCache",),
    "longvid.store.durability": ("Durability",),
    "longvid.errors": (
        "CacheError",
        "LongvidError",
        "MemoryBudgetError",
        "ModelError",
        "NonFiniteError",
        "ScheduleError",
        "SessionStateError",
        "SourceError",
        "StoreError",
    ),
    "longvid.events": ("ChunkEvent", "RunReport", "RunStart"),
    "longvid.memory.tracker": ("AllocationTracker",),
    "longvid.models.base": ("CausalVAE", "LatentGeometry"),
    "longvid.models.layers": ("CausalConv3d",),
    "longvid.models.loading": ("load_model",),
    "longvid.planning.plan": ("Plan",),
    "longvid.planning.planner": ("make_plan",),
    "longvid.planning.profile": ("Profile",),
    "longvid.reporting.progress": ("ProgressBar",),
    "longvid.reporting.recorder": ("Recorder",),
    "longvid.reporting.page": ("ReportPage",),
    "longvid.schedule": ("Chunk", "ChunkSchedule"),
    "longvid.runtime.session": ("VideoSession",),
    "longvid.store.reader": ("LatentStore", "open_store"),
    "longvid.media.limits": ("Limits",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'longvid' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""longvid: arbitrarily long video through a cached causal-conv VAE, in bounded memory, to and from zarr.

Names are imported when they are first used, so that ``import longvid`` and ``longvid --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from longvid.cache import ConvCache
    from longvid.durability import Durability
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
    from longvid.memory import AllocationTracker
    from longvid.models.base import CausalVAE, LatentGeometry
    from longvid.models.layers import CausalConv3d
    from longvid.models.loading import load_model
    from longvid.plan import Plan
    from longvid.planner import make_plan
    from longvid.profile import Profile
    from longvid.progress import ProgressBar
    from longvid.recorder import Recorder
    from longvid.report import ReportPage
    from longvid.schedule import Chunk, ChunkSchedule
    from longvid.session import VideoSession
    from longvid.store import LatentStore, open_store
    from longvid.video.limits import Limits

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
    "longvid.cache": ("ConvCache",),
    "longvid.durability": ("Durability",),
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
    "longvid.memory": ("AllocationTracker",),
    "longvid.models.base": ("CausalVAE", "LatentGeometry"),
    "longvid.models.layers": ("CausalConv3d",),
    "longvid.models.loading": ("load_model",),
    "longvid.plan": ("Plan",),
    "longvid.planner": ("make_plan",),
    "longvid.profile": ("Profile",),
    "longvid.progress": ("ProgressBar",),
    "longvid.recorder": ("Recorder",),
    "longvid.report": ("ReportPage",),
    "longvid.schedule": ("Chunk", "ChunkSchedule"),
    "longvid.session": ("VideoSession",),
    "longvid.store": ("LatentStore", "open_store"),
    "longvid.video.limits": ("Limits",),
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

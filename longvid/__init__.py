"""longvid: arbitrarily long video through a cached causal-conv VAE, in bounded memory, to and from zarr.

Public names are imported when they are first used, so that ``import longvid`` and ``longvid --help`` do not wait for
torch. The list of names stands here twice: once for type checkers, which follow import statements only, and once for
:func:`__getattr__`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from longvid.errors import (
        CacheError as CacheError,
        LongvidError as LongvidError,
        MemoryBudgetError as MemoryBudgetError,
        ModelError as ModelError,
        NonFiniteError as NonFiniteError,
        OptionError as OptionError,
        ScheduleError as ScheduleError,
        SessionStateError as SessionStateError,
        SourceError as SourceError,
        StoreError as StoreError,
    )
    from longvid.events import ChunkEvent as ChunkEvent, RunReport as RunReport, RunStart as RunStart
    from longvid.latents import denormalize as denormalize, normalize as normalize
    from longvid.media.limits import Limits as Limits
    from longvid.memory.tracker import AllocationTracker as AllocationTracker
    from longvid.models.base import CausalVAE as CausalVAE, LatentGeometry as LatentGeometry
    from longvid.models.cache import ConvCache as ConvCache
    from longvid.models.context import ForwardContext as ForwardContext
    from longvid.models.layers.causal_conv import CausalConv3d as CausalConv3d
    from longvid.models.loading import load_model as load_model
    from longvid.planning.check import ModelCheck as ModelCheck, check_model as check_model
    from longvid.planning.plan import Plan as Plan
    from longvid.planning.planner import make_plan as make_plan
    from longvid.planning.profile import Profile as Profile
    from longvid.planning.warmup import Warmup as Warmup, warmup as warmup
    from longvid.reporting.page import ReportPage as ReportPage
    from longvid.reporting.progress import ProgressBar as ProgressBar
    from longvid.reporting.recorder import Recorder as Recorder
    from longvid.runtime.exchange.importer import import_latents as import_latents
    from longvid.runtime.session import VideoSession as VideoSession
    from longvid.schedule import Chunk as Chunk, ChunkSchedule as ChunkSchedule
    from longvid.store.durability import Durability as Durability
    from longvid.store.parts import join as join
    from longvid.store.reader import LatentStore as LatentStore, open_store as open_store

_HOMES = {
    "errors": "CacheError LongvidError MemoryBudgetError ModelError NonFiniteError OptionError ScheduleError "
    "SessionStateError SourceError StoreError",
    "events": "ChunkEvent RunReport RunStart",
    "latents": "denormalize normalize",
    "media.limits": "Limits",
    "memory.tracker": "AllocationTracker",
    "models.base": "CausalVAE LatentGeometry",
    "models.cache": "ConvCache",
    "models.context": "ForwardContext",
    "models.layers.causal_conv": "CausalConv3d",
    "models.loading": "load_model",
    "planning.check": "ModelCheck check_model",
    "planning.plan": "Plan",
    "planning.planner": "make_plan",
    "planning.profile": "Profile",
    "planning.warmup": "Warmup warmup",
    "reporting.page": "ReportPage",
    "reporting.progress": "ProgressBar",
    "reporting.recorder": "Recorder",
    "runtime.exchange.importer": "import_latents",
    "runtime.session": "VideoSession",
    "schedule": "Chunk ChunkSchedule",
    "store.durability": "Durability",
    "store.parts": "join",
    "store.reader": "LatentStore open_store",
}
_HOME_OF = {name: f"longvid.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'longvid' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

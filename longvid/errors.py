"""Errors: every exception that longvid raises on purpose.

Each one is also the builtin that a caller would expect, so that code without knowledge of longvid handles it too,
and can be pickled with its attributes:

* LongvidError
    * OptionError         ValueError    a size, a policy or a name that was given cannot be read
    * ScheduleError       ValueError    the video cannot be cut as asked
    * ModelError          ValueError    weights, config, class or profile cannot be used
        * NonFiniteError                values that are not finite, computed or given
    * MemoryBudgetError   MemoryError   projected > allowed
    * CacheError          RuntimeError  cache and input disagree: other video, batch, size, dtype, device, layer
    * SessionStateError   RuntimeError  not open, closed, busy, wrong thread, forked
    * SourceError         OSError       frames cannot be read
    * StoreError          OSError       exists, incomplete, corrupt, out of range, not a store

A message says what was asked, what is there, and what to do. Exceptions of other libraries are wrapped once, at
the edge, with ``raise ... from exc``.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "CacheError",
    "LongvidError",
    "MemoryBudgetError",
    "ModelError",
    "NonFiniteError",
    "OptionError",
    "ScheduleError",
    "SessionStateError",
    "SourceError",
    "StoreError",
]


class LongvidError(Exception):
    """Base of all errors of this package."""


class OptionError(LongvidError, ValueError):
    """An option has a value that cannot be read: a size without a unit, an offload policy that does not exist."""


class ScheduleError(LongvidError, ValueError):
    """The video cannot be cut into chunks as asked."""


class ModelError(LongvidError, ValueError):
    """Weights, configuration, class or tuning profile of a model cannot be used."""


class MemoryBudgetError(LongvidError, MemoryError):
    """There is not enough memory: of the budget, of the host or of the disk, before the first frame is read; or of
    the device in the middle of a run, when something else took it.

    Attributes:
        projected_bytes: what the run would need at its peak.
        allowed_bytes: the budget.
        parts: what the projection is made of, in bytes, by name.
    """

    def __init__(
        self,
        message: str,
        *,
        projected_bytes: int = 0,
        allowed_bytes: int = 0,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.projected_bytes = projected_bytes
        self.allowed_bytes = allowed_bytes
        self.parts = dict(parts or {})


class NonFiniteError(ModelError):
    """The model computed values that are not finite, or was given latents with such values.

    Attributes:
        chunk: number of the chunk.
    """

    def __init__(self, message: str, *, chunk: int = 0) -> None:
        super().__init__(message)
        self.chunk = chunk


class CacheError(LongvidError, RuntimeError):
    """A ConvCache does not fit the tensor or the layer that it is used with, or is not open."""


class SessionStateError(LongvidError, RuntimeError):
    """A session or one of its scopes is used when it is not open, is busy, or from the wrong thread or process."""


class _KindedError(LongvidError, OSError):
    def __init__(self, message: str, *, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class SourceError(_KindedError):
    """Frames cannot be read.

    Attributes:
        kind: ``"missing"``, ``"not-video"``, ``"no-video-stream"``, ``"no-frames"``, ``"truncated"``,
            ``"damaged"``, ``"geometry-changed"``, ``"refused"``
            (an address, a playlist, a device), ``"changed"`` (a file that changed while it was read), ``"stopped"``
            (asked to give up while it waited), ``"limit"`` (more than :class:`longvid.Limits` allows), ``"stalled"``,
            ``"layout"`` (wrong dtype or axes of an array), ``"range"`` (start or count outside the video) or
            ``"other"``.
    """


class StoreError(_KindedError):
    """A store, or the place where one should be written, cannot be used.

    Attributes:
        kind: ``"missing"``, ``"exists"``, ``"foreign"`` (not written by longvid), ``"incomplete"``, ``"corrupt"``,
            ``"mismatch"`` (of another source, model or setting), ``"locked"`` (another run writes), ``"full"``,
            ``"read-only"``, ``"refused"`` (metadata that is not safe to read, or an address), ``"range"`` (a value
            that the stored dtype cannot hold), ``"format"`` or ``"other"``.
    """

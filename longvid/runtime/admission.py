"""Admission: who may use a session, and whether a video fits beside those that are open.

:class:`SessionGuard` owns the life of a session. :class:`AdmissionControl` owns its plans, the form in which it
computes, and the budget. Push mode and whole videos take these two and know nothing of the session.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TypeAlias

import torch

from longvid.environment import kernels_of
from longvid.errors import MemoryBudgetError, SessionStateError
from longvid.events import Callback, Direction
from longvid.memory.budget import MemoryBudget
from longvid.memory.host import host_available_bytes
from longvid.memory.host_buffer import HostBuffer
from longvid.models.numerics import Numerics
from longvid.planning.kernel_choice import can_compute
from longvid.planning.options import ComputeOptions
from longvid.planning.plan import DirectionPlan, Plan
from longvid.planning.planner import Planner
from longvid.planning.warmup import Warmup, warmup
from longvid.runtime.engine import Engine
from longvid.runtime.prefetch import StopRequest
from longvid.schedule import ChunkSchedule
from longvid.store.metadata import StoreMetadata
from longvid.units import format_bytes

__all__ = ["Admission", "AdmissionControl", "Job", "SessionGuard"]

Size: TypeAlias = tuple[int, int]
"height and width"
_MOST_THREADS = 1024
"a store that records more compute threads than this is not believed"


class _State(Enum):
    UNOPENED = "is not open; use it in a with statement"
    OPEN = "is open"
    CLOSED = "is closed and cannot be opened again; make a new one"


class SessionGuard:
    """State of a session, the thread and process that own it, and what it is busy with."""

    def __init__(self) -> None:
        self._state = _State.UNOPENED
        self._owner = (0, 0)
        self._busy_with: str | None = None

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Make the calling thread the owner, once the block has done what opening takes. It may be opened once."""
        if self._state is not _State.UNOPENED:
            raise SessionStateError(f"the session cannot be entered: it {self._state.value}")
        yield
        self._owner = (os.getpid(), threading.get_ident())
        self._state = _State.OPEN

    def close(self) -> None:
        """End the life of the session. May be called again."""
        self._state = _State.CLOSED

    def check(self, what: str) -> None:
        """Raise SessionStateError unless the calling thread may do ``what`` now."""
        if self._state is not _State.OPEN:
            raise SessionStateError(f"{what}: the session {self._state.value}")
        pid, thread = self._owner
        if os.getpid() != pid:
            raise SessionStateError(
                f"{what}: the session was opened in process {pid} and this is its fork {os.getpid()}, where compute "
                "threads do not exist; open a session in the child, and start children with 'spawn'"
            )
        if threading.get_ident() != thread:
            raise SessionStateError(
                f"{what}: the session belongs to the thread that opened it; open one session per thread (they may "
                "share the model)"
            )
        if self._busy_with is not None:
            raise SessionStateError(f"{what}: the session is busy with {self._busy_with}; one thing at a time")

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Check, and refuse every other use until ``what`` is done."""
        self.check(what)
        self._busy_with = what
        try:
            yield
        finally:
            self._busy_with = None


@dataclass(frozen=True, slots=True)
class Admission:
    """A video's place in the budget of a session."""

    plan: Plan
    direction: Direction
    num_threads: int | None = None
    """threads that compute on a CPU, whose library may add in another order with another number: those of the run that
    is continued, if there is one; None on an accelerator, and where that run did not record them"""

    @property
    def schedule(self) -> ChunkSchedule:
        """How the video is cut."""
        return self.plan.schedule

    @property
    def part(self) -> DirectionPlan:
        """What the video was planned to need."""
        return self.plan.direction(self.direction)


class AdmissionControl:
    """Plans videos and admits them, under the limits of the device and, without an ``offload_dir``, of the host."""

    def __init__(self, engine: Engine, options: ComputeOptions, offload_dir: Path | None) -> None:
        self.engine = engine
        self._options = replace(options, dtype=engine.dtype)
        self._offload_dir = offload_dir
        self._planner = Planner(engine.model, engine.device)
        self._held: list[Admission] = []
        self._warmups: dict[tuple[Direction, int], Warmup] = {}

    def admit(
        self,
        direction: Direction,
        size: Size,
        *,
        earlier: StoreMetadata | None = None,
        whole: bool = False,
        first_frames: int | None = None,
    ) -> Admission:
        """Check a video with frames of this size against all limits, beside those that are held, and plan it.

        One video computes at a time while the contexts of all are held; contexts count as planned, whether or not they
        exist yet. ``earlier`` is the store whose run is continued. A ``whole`` video may keep memory from chunk to
        chunk. ``first_frames`` are those of the first chunk in the reference plan. MemoryBudgetError if the video does
        not fit.
        """
        others = [admission.part for admission in self._held]
        held_bytes = sum(part.idle_bytes for part in others)
        budget = MemoryBudget(allowed_bytes=self._options.allowed_bytes, reserved_bytes=self.engine.reserved_bytes)
        # What this video may hold while the largest of the others computes.
        room = [budget.left(other.projected_bytes + held_bytes - other.idle_bytes) for other in others]
        idle_limit = min((r for r in room if r is not None), default=None)
        options = replace(self._options_for(earlier, whole), first_frames=first_frames)
        plan = self.plan(size, (direction,), options, held_bytes=held_bytes, idle_limit_bytes=idle_limit)
        plan.check(direction)
        part = plan.direction(direction)
        for other in others:
            beside = held_bytes - other.idle_bytes + part.idle_bytes
            replace(budget, held_bytes=beside).check(
                other.projected_bytes,
                other.parts,
                f"{direction} at {plan.width}x{plan.height} beside a larger video that is open",
            )
        self._check_host(part)
        num_threads = None
        if self.engine.device.type == "cpu":
            num_threads = torch.get_num_threads() if earlier is None else _threads_of(earlier)
        return Admission(plan, direction, num_threads)

    def warmup(self, direction: Direction, schedule: ChunkSchedule) -> Warmup:
        """What a start in the middle of a video takes. Found once, since it takes a while."""
        key = (direction, schedule.chunk_frames)
        if key not in self._warmups:
            self._warmups[key] = warmup(self.engine.model, direction, chunk_frames=schedule.chunk_frames)
        return self._warmups[key]

    def hold(self, admission: Admission) -> None:
        """Count a video against those that come after it."""
        self._held.append(admission)

    def release(self, admission: Admission) -> None:
        """Give back the place of a video that was held."""
        self._held = [held for held in self._held if held is not admission]

    def plan(
        self,
        size: Size,
        directions: tuple[Direction, ...] = ("encode", "decode"),
        options: ComputeOptions | None = None,
        *,
        held_bytes: int = 0,
        idle_limit_bytes: int | None = None,
    ) -> Plan:
        """The plan under what other videos leave of the budget, with the options of the session if none are given."""
        engine, profile = self.engine, self._options.profile
        if profile is not None:
            profile.check(engine.scope(size))
        if engine.model.geometry.chunk_invariant and self._options.allowed_bytes is not None:
            directions = ("encode", "decode")  # the budget may shorten chunks, and both directions share their length
        return self._planner.plan(
            size, options or self._options, directions, held_bytes=held_bytes, idle_limit_bytes=idle_limit_bytes
        )

    def _options_for(self, earlier: StoreMetadata | None, whole: bool) -> ComputeOptions:
        """The options of the session, with the choices of the run that is continued where the user left them."""
        options = replace(self._options, keep_buffers=whole)
        if earlier is None:
            return options
        numerics = _numerics_of(earlier, self.engine)
        if (
            numerics is not None
            and options.layout in (None, numerics.layout)
            and options.paired_frames in (None, numerics.paired_frames)
            and can_compute(numerics, self.engine.dtype)
        ):
            options = replace(options, numerics=numerics)
        if options.slice_frames is None:
            options = replace(options, tiling=earlier.tiling)
        if earlier.schedule and options.chunk_frames is None and self.engine.model.geometry.chunk_invariant:
            options = replace(options, chunk_frames=earlier.schedule.chunk_frames)
        return options

    def _check_host(self, part: DirectionPlan) -> None:
        """Host memory is a limit too, the machine's as well as a container's."""
        parts = {}
        if self._offload_dir is None:
            parts["offloaded contexts"] = HostBuffer.room_for(part.host_sizes)
        if self.engine.device.type == "cpu":
            parts["tensors"] = part.projected_bytes - part.weights_bytes
        available, needed = host_available_bytes() + self.engine.copy_engine.spare_bytes, sum(parts.values())
        if needed > available:
            listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
            raise MemoryBudgetError(
                f"the run needs {format_bytes(needed)} of host memory ({listing}), and this machine or its container "
                f"has {format_bytes(available)} left; send contexts to a folder with offload_dir (--offload-dir), or "
                "choose a smaller frame size or a narrower dtype",
                projected_bytes=needed,
                allowed_bytes=available,
                parts=parts,
            )


def _threads_of(store: StoreMetadata) -> int | None:
    """The number of compute threads that a store records; None if there is none that makes sense."""
    recorded = store.compute.get("threads")
    return recorded if type(recorded) is int and 1 <= recorded <= _MOST_THREADS else None


def _numerics_of(store: StoreMetadata, engine: Engine) -> Numerics | None:
    """The numerics that a store records; None if it was computed in another dtype or by other kernels."""
    have = store.compute.get("dtype"), store.compute.get("kernels")
    if store.numerics is None or have != (engine.dtype_name, kernels_of(str(engine.device))):
        return None
    with suppress(KeyError, TypeError, ValueError):  # another version of longvid wrote them
        return Numerics.from_dict(store.numerics)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a session hands to the run of a whole video."""

    control: AdmissionControl
    callbacks: tuple[Callback, ...]
    stop: StopRequest

    @property
    def engine(self) -> Engine:
        """The model where it computes."""
        return self.control.engine

    @property
    def traced(self) -> bool:
        """Whether a callback wants copies and layers to be timed."""
        return any(getattr(callback, "wants_spans", False) for callback in self.callbacks)

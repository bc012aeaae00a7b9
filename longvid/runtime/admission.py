"""Admission: who may use a session, and whether a video fits beside those that are open.

:class:`SessionGuard` owns the life of a session. :class:`AdmissionControl` owns its plans, the form in which it
computes, and the budget. Push mode and whole videos take these two and know nothing of the session.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from longvid.environment import kernels_of
from longvid.errors import MemoryBudgetError, SessionStateError, StoreError
from longvid.events import Callback, Direction
from longvid.memory.budget import MemoryBudget
from longvid.memory.host import host_available_bytes
from longvid.memory.host_buffer import HostBuffer
from longvid.memory.offload import OffloadPolicy
from longvid.models.numerics import Layout, Numerics
from longvid.planning.kernel_choice import can_compute, choose_numerics, fresh_memory_is_slow, preferred_band_bytes
from longvid.planning.plan import DirectionPlan, Plan
from longvid.planning.planner import Offload, make_plan
from longvid.planning.profile import Profile, ProfileScope
from longvid.planning.workload import Workload
from longvid.runtime.engine import Engine
from longvid.runtime.prefetch import StopRequest
from longvid.schedule import ChunkSchedule
from longvid.store.durability import WriteOptions
from longvid.store.target import Found, settle_complete
from longvid.units import format_bytes

__all__ = [
    "Admission",
    "AdmissionControl",
    "Job",
    "Recorded",
    "RunOptions",
    "SessionGuard",
    "SessionOptions",
]

_SHORT_RUN_ROWS = 256
"a shorter run ends before a snapshot is worth its cost"


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
        """Make the calling thread the owner, once the block has done what opening takes.

        Raises:
            SessionStateError: the session is or was open.
        """
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What a session was asked for; see :class:`longvid.VideoSession`. None leaves the choice open."""

    allowed_bytes: int | None
    offload: OffloadPolicy
    offload_dir: Path | None
    profile: Profile | None
    chunk_frames: int | None
    slice_frames: int | None
    layout: Layout | None
    paired_frames: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Choices of the run that is to be continued. They count where the session was left the choice."""

    numerics: Numerics | None = None
    chunk_frames: int | None = None

    @classmethod
    def of(cls, found: Found, engine: Engine, *, overwrite: bool) -> Recorded:
        """The choices in the store that was found; none if it is not continued, or computes in another dtype."""
        metadata = found.metadata
        if metadata is None or (metadata.complete and overwrite):
            return cls()
        compute = metadata.compute
        alike = (compute.get("dtype"), compute.get("kernels")) == (engine.dtype_name, kernels_of(str(engine.device)))
        numerics = metadata.numerics if alike else None
        chunk_frames = None if metadata.schedule is None else metadata.schedule.chunk_frames
        try:
            return cls(numerics=None if numerics is None else Numerics.from_dict(numerics), chunk_frames=chunk_frames)
        except (KeyError, TypeError, ValueError):
            return cls()


_NOTHING_RECORDED = Recorded()


@dataclass(frozen=True, slots=True)
class Admission:
    """A video's place in the budget of a session."""

    plan: Plan
    direction: Direction

    @property
    def schedule(self) -> ChunkSchedule:
        """How the video is cut."""
        return self.plan.schedule

    @property
    def part(self) -> DirectionPlan:
        """What the video was planned to need."""
        return self.plan.direction(self.direction)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(WriteOptions):
    """What a run may replace, continue and lose; see :meth:`longvid.VideoSession.encode`."""

    def is_done(self, found: Found, fingerprint: Mapping[str, Any]) -> bool:
        """Whether the store that was found is what the run would write; it is tidied then.

        Raises:
            StoreError: the store forbids the run.
        """
        decision = found.decide(fingerprint, overwrite=self.overwrite, resume=self.resume)
        if decision != "done" or self.mend:
            return False
        settle_complete(found, self.durability)
        return True

    def check_disk(self, found: Found, part: DirectionPlan, num_rows: int | None, row_bytes: float) -> None:
        """Fail early if the estimated output does not fit on the disk.

        Args:
            found: what is there; its bytes count as written.
            part: the plan of the run.
            num_rows: rows of the store, None if unknown.
            row_bytes: a low estimate of the bytes of a row on the disk.

        Raises:
            StoreError: kind ``"full"``.
        """
        if num_rows is None or self.mend:
            return
        parts = {"results": int(num_rows * row_bytes)}
        if num_rows > _SHORT_RUN_ROWS and self.durability.snapshot_seconds != float("inf"):
            parts["three snapshots, one of them being written"] = 3 * part.cache_bytes
        there = sum(f.stat().st_size for f in found.path.rglob("*") if f.is_file()) if found.state != "nothing" else 0
        free, needed = shutil.disk_usage(found.path.parent).free, sum(parts.values()) - there
        if needed > free:
            listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
            raise StoreError(
                f"{found.path} needs at least {format_bytes(needed)} of disk ({listing}), and {format_bytes(free)} are "
                "free; make room or choose another folder (snapshots can be left out: --snapshot-seconds off)",
                kind="full",
            )


class AdmissionControl:
    """Plans videos and admits them, under the limits of the device and of the host.

    Args:
        engine: the model where it computes.
        options: what the session was asked for.
    """

    def __init__(self, engine: Engine, options: SessionOptions) -> None:
        self.engine = engine
        self._options = options
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._numerics: dict[tuple[Direction, int, int], Numerics] = {}
        self._held: list[Admission] = []

    def admit(
        self,
        direction: Direction,
        height: int,
        width: int,
        *,
        recorded: Recorded = _NOTHING_RECORDED,
        whole: bool = False,
    ) -> Admission:
        """Check a video of this size against all limits, beside those that are held, and give it its plan.

        One video computes at a time while the contexts of all are held; contexts count as planned, whether or not they
        exist yet.

        Args:
            direction: of the video.
            height: of its frames.
            width: of its frames.
            recorded: what the run that is continued has chosen.
            whole: whether chunk follows chunk, so that memory may be kept from one to the next.

        Raises:
            MemoryBudgetError: the video does not fit.
        """
        others = [admission.part for admission in self._held]
        held_bytes = sum(part.idle_bytes for part in others)
        budget = MemoryBudget(allowed_bytes=self._options.allowed_bytes, reserved_bytes=self.engine.reserved_bytes)
        # What this video may hold while the largest of the others computes.
        room = [budget.left(other.projected_bytes + held_bytes - other.idle_bytes) for other in others]
        idle_limit = min((r for r in room if r is not None), default=None)
        plan = self.plan(
            height, width, (direction,), held_bytes=held_bytes, idle_limit_bytes=idle_limit, recorded=recorded,
            whole=whole,
        )  # fmt: skip
        plan.check(direction)
        part = plan.direction(direction)
        for other in others:
            beside = held_bytes - other.idle_bytes + part.idle_bytes
            budget.check(
                other.projected_bytes + beside,
                {**other.parts, "contexts of other open videos": beside},
                f"{direction} at {plan.width}x{plan.height} beside a larger video that is open",
            )
        self._check_host(part)
        return Admission(plan, direction)

    def hold(self, admission: Admission) -> None:
        """Count a video against those that come after it."""
        self._held.append(admission)

    def release(self, admission: Admission) -> None:
        """Give back the place of a video that was held."""
        self._held = [held for held in self._held if held is not admission]

    def plan(
        self,
        height: int,
        width: int,
        directions: tuple[Direction, ...],
        *,
        held_bytes: int = 0,
        idle_limit_bytes: int | None = None,
        recorded: Recorded = _NOTHING_RECORDED,
        whole: bool = False,
    ) -> Plan:
        """The plan under what ``held_bytes`` of other videos leave of the budget; the same call gives the same plan."""
        engine, options = self.engine, self._options
        height, width = engine.model.geometry.padded_size(height, width)
        if engine.model.geometry.chunk_invariant and options.allowed_bytes is not None:
            directions = ("encode", "decode")  # the budget may shorten chunks, and both directions share their length
        key = (height, width, directions, held_bytes, idle_limit_bytes, recorded, whole)
        if key not in self._plans:
            profile = options.profile
            offload, slice_frames = self._thresholds(height, width)
            self._plans[key] = make_plan(
                engine.model,
                height=height,
                width=width,
                dtype=engine.dtype,
                memory=options.allowed_bytes,
                offload=offload,
                chunk_frames=self._chunk_frames(recorded),
                reserved=engine.reserved_bytes,
                held_bytes=held_bytes,
                idle_limit_bytes=idle_limit_bytes,
                directions=directions,
                rates=None if profile is None else profile.rates,
                numerics={d: self._numerics_for(d, height, width, recorded) for d in directions},
                slice_frames=slice_frames,
                band_bytes=preferred_band_bytes(engine.device),
                keep_buffers=whole and fresh_memory_is_slow(engine.device),
            )
        return self._plans[key]

    def _thresholds(
        self, height: int, width: int
    ) -> tuple[Offload | Mapping[Direction, OffloadPolicy], int | Mapping[Direction, int | None] | None]:
        """Offload policy and slices: those of the profile where it applies, else what was asked for."""
        engine, options = self.engine, self._options
        profile, slice_frames = options.profile, options.slice_frames
        if profile is None:
            return options.offload, slice_frames
        profile.check(
            ProfileScope.of(engine.model, height=height, width=width, dtype=engine.dtype, device=engine.device)
        )
        if options.offload.kind != "auto" or options.allowed_bytes is not None:
            return options.offload, slice_frames
        return profile.policies(options.offload), profile.slice_frames if slice_frames is None else slice_frames

    def _chunk_frames(self, recorded: Recorded) -> int | None:
        if self._options.chunk_frames is None and self.engine.model.geometry.chunk_invariant:
            return recorded.chunk_frames
        return self._options.chunk_frames

    def _numerics_for(self, direction: Direction, height: int, width: int, recorded: Recorded) -> Numerics:
        """The numerics for frames of this size; chosen once, so that all videos of a session are computed alike."""
        engine, options, earlier = self.engine, self._options, recorded.numerics
        if (
            earlier is not None
            and options.layout in (None, earlier.layout)
            and options.paired_frames in (None, earlier.paired_frames)
            and can_compute(earlier, engine.dtype)
        ):
            return earlier
        key = (direction, height, width)
        if key not in self._numerics:
            schedule = engine.model.geometry.schedule
            workload = Workload(direction=direction, height=height, width=width, dtype=engine.dtype, schedule=schedule)
            self._numerics[key] = choose_numerics(
                engine.model,
                workload,
                device=engine.device,
                layout=options.layout,
                paired_frames=options.paired_frames,
            )
        return self._numerics[key]

    def _check_host(self, part: DirectionPlan) -> None:
        """Host memory is a limit too, the machine's as well as a container's."""
        parts = {}
        if self._options.offload_dir is None:
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

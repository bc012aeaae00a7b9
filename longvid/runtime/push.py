"""Push: one video whose frames, or latents, the caller hands over in slices of any length.

Axes: B batch (1), C channels, T time, H height, W width; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longvid.errors import ScheduleError, SessionStateError, SourceError
from longvid.events import Direction
from longvid.frames import Frames
from longvid.media.arrays import check_layout, to_numpy
from longvid.planning.plan import DirectionPlan
from longvid.runtime.admission import Admission, AdmissionControl, SessionGuard
from longvid.runtime.engine import Engine
from longvid.runtime.reblock import Reblocker, pad_frames
from longvid.runtime.run import DecodeRun, EncodeRun, Representation, Run
from longvid.schedule import Chunk, ChunkSchedule

__all__ = ["PushDecoder", "PushEncoder", "Scope"]


class Scope:
    """Life of a push-mode video: open in a ``with`` block, until it is finished, fails or is closed.

    Leaving the block without an exception, with something pushed and neither :meth:`finish` nor :meth:`close` called,
    is an error, since the tail of the video would be lost.
    """

    direction: ClassVar[Direction]
    kind: ClassVar[str]

    def __init__(
        self, guard: SessionGuard, control: AdmissionControl, make_run: Callable[[Engine, DirectionPlan], Run]
    ) -> None:
        self._guard, self._control, self._make_run = guard, control, make_run
        self._entered = False
        self._run: Run | None = None
        self._reblock: Reblocker | None = None
        "both are made with the admission"
        self.admission: Admission | None = None
        "set when the size of the frames is known, until the video ends"
        self._size = (0, 0)
        "height and width of the frames, as they are pushed or decoded"
        self._ended = ""

    def __enter__(self) -> Self:
        if self._entered or self._ended:
            raise SessionStateError(f"the {self.kind} cannot be entered twice; ask the session for a new one")
        self._guard.check(self.kind)
        self._entered = True
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        forgotten = exc_type is None and self.admission is not None
        self.close()
        if forgotten:
            raise SessionStateError(
                f"the {self.kind} was left without finish(), so the tail of its video is missing; call finish() in the "
                "with block and keep what it returns, or close() to drop the video"
            )

    def close(self) -> None:
        """Drop the video and free its contexts. May be called again."""
        self._end("is closed")

    @property
    def closed(self) -> bool:
        """Whether the scope holds nothing any more."""
        return bool(self._ended)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the video's contexts now, wherever they are."""
        return 0 if self._run is None else self._run.cache.nbytes

    def _end(self, why: str) -> None:
        if self._run is not None:
            self._run.__exit__(None, None, None)
        if self.admission is not None:
            self._control.release(self.admission)
        self._run = self._reblock = self.admission = None
        self._ended = self._ended or why

    @contextmanager
    def _working(self, what: str) -> Iterator[Engine]:
        """Run a part of the video; after an exception the video cannot be continued."""
        with self._guard.busy(f"{self.kind}.{what}"):
            if self._ended or not self._entered:
                raise SessionStateError(
                    f"{self.kind}.{what}: this video {self._ended or 'is not open; use it in a with statement'}"
                )
            try:
                yield self._control.engine
            except BaseException:
                self._end("failed in an earlier call; start it again with a new one")
                raise

    def _admitted(self, size: tuple[int, int]) -> tuple[ChunkSchedule, Reblocker]:
        """How the video is cut. Its place is asked for, and its run is made, when its size is first known."""
        if self.admission is None or self._reblock is None:
            self._size = size
            self.admission = self._control.admit(self.direction, size)
            self._control.hold(self.admission)
            schedule = self.admission.schedule
            if self.direction == "encode":
                self._reblock = Reblocker(schedule.capacity)
            else:
                self._reblock = Reblocker(lambda index: schedule.full(index).num_latents)
            self._run = self._make_run(self._control.engine, self.admission.part).__enter__()
        return self.admission.schedule, self._reblock


class PushEncoder(Scope):
    """Encodes one video from frames as they come. Made by :meth:`VideoSession.encoder`, used in a ``with`` block.

    Whatever slices are pushed, the same chunks run, so the latents are the same bit for bit.
    """

    direction = "encode"
    kind = "encoder"

    def __init__(
        self, guard: SessionGuard, control: AdmissionControl, representation: Representation, seed: int
    ) -> None:
        super().__init__(guard, control, lambda engine, part: EncodeRun(engine, part, representation, seed))
        self._representation = representation
        self.num_frames = 0
        "frames pushed so far"

    def push(self, frames_THWC: Any) -> Tensor:
        """Take uint8 frames (T, H, W, 3), numpy or torch, any number; return the latents finished so far.

        Returns:
            (1, c, t, h, w) on the host, t possibly 0; with ``representation="moments"`` (1, 2 c, t, h, w).

        Raises:
            SourceError: wrong dtype, axes or size.
            MemoryBudgetError: frames of this size do not fit the session's budget.
        """
        with self._working("push") as engine:
            check_layout(frames_THWC, "what was pushed", ranks=(4,))
            frames = to_numpy(frames_THWC)
            plan, reblock = self._admitted((frames.shape[1], frames.shape[2]))
            if frames.shape[1:3] != self._size:
                raise SourceError(
                    f"frames of {frames.shape[2]}x{frames.shape[1]} came after frames of "
                    f"{self._size[1]}x{self._size[0]}; one video has one size",
                    kind="geometry-changed",
                )
            self.num_frames += len(frames)
            return self._joined(engine, [self._encode(plan.full(i), block) for i, (block,) in reblock.push(frames)])

    def finish(self) -> Tensor:
        """Encode what is left, the tail padded by repeating the last frame; the video is then complete.

        Raises:
            SourceError: no frame was pushed.
        """
        with self._working("finish") as engine:
            if not self.num_frames:
                raise SourceError("the video has no frames; push at least one before finish()", kind="no-frames")
            plan, reblock = self._admitted(self._size)
            rest = [self._encode(plan.tail(i, len(block)), block) for i, (block,) in reblock.rest()]
            latents = self._joined(engine, rest)
            self._end("is finished")
            return latents

    def _encode(self, chunk: Chunk, block: Frames) -> Tensor:
        run = self._run
        assert isinstance(run, EncodeRun)
        size = run.engine.model.geometry.padded_size(*self._size)
        latents, moments = run.latents(chunk, pad_frames(block, chunk.padded_frames, *size))
        return latents if moments is None else moments

    def _joined(self, engine: Engine, done: list[Tensor]) -> Tensor:
        if done:
            return torch.cat(done, dim=2)
        geometry = engine.model.geometry
        height, width = geometry.padded_size(*self._size)
        channels = geometry.latent_channels * (2 if self._representation == "moments" else 1)
        dtype = torch.float32 if self._representation == "sample" else engine.dtype
        p = geometry.pixels_per_latent
        return torch.empty((1, channels, 0, height // p, width // p), dtype=dtype)


class PushDecoder(Scope):
    """Decodes one video from latents as they come. Made by :meth:`VideoSession.decoder`, used in a ``with`` block."""

    direction = "decode"
    kind = "decoder"

    def __init__(
        self, guard: SessionGuard, control: AdmissionControl, num_frames: int | None, size: tuple[int, int] | None
    ) -> None:
        super().__init__(guard, control, lambda engine, part: DecodeRun(engine, part, size))
        if num_frames is not None and num_frames < 1:
            raise ScheduleError(f"a video has at least one frame, num_frames={num_frames} was given")
        self._num_frames = num_frames
        self._crop = size
        self._num_latents = 0

    def push(self, z_BCTHW: Tensor) -> Frames:
        """Take raw latents (1, c, t, h, w), any number; return the frames finished so far.

        Returns:
            uint8 frames (T, H, W, 3), T possibly 0.

        Raises:
            ScheduleError: wrong axes or channels, or more latents than ``num_frames`` has.
            MemoryBudgetError: latents of this size do not fit the session's budget.
        """
        with self._working("push") as engine:
            z_TCHW = self._as_latents(engine, z_BCTHW)
            p = engine.model.geometry.pixels_per_latent
            size = (z_TCHW.shape[2] * p, z_TCHW.shape[3] * p)
            crop = self._crop or size
            if self.admission is None and not all(0 < c <= f for c, f in zip(crop, size, strict=True)):
                raise ScheduleError(
                    f"a crop to {crop[1]}x{crop[0]} was asked for, the latents decode to frames of {size[1]}x{size[0]}"
                )
            plan, reblock = self._admitted(size)
            self._num_latents += len(z_TCHW)
            if self._num_frames is not None and self._num_latents > plan.num_latents(self._num_frames):
                plan.check_length(self._num_frames, self._num_latents)
            try:
                blocks = list(reblock.push(z_TCHW))
            except ValueError as exc:
                raise ScheduleError(f"the latents changed within a video: {exc}") from exc
            return self._joined([self._decode(plan.full(i), block) for i, (block,) in blocks])

    def finish(self) -> Frames:
        """Decode what is left; the video is then complete.

        Raises:
            ScheduleError: the number of latents is not that of a whole video, or not that of ``num_frames``.
        """
        with self._working("finish") as engine:
            plan = self.admission.schedule if self.admission else engine.model.geometry.schedule
            most = plan.max_frames(self._num_latents)
            plan.check_length(self._num_frames or most, self._num_latents)
            rest = [] if self._reblock is None else self._reblock.rest()
            frames = self._joined([self._decode(plan.tail_of_latents(i, len(block)), block) for i, (block,) in rest])
            self._end("is finished")
            return frames

    def _as_latents(self, engine: Engine, z: Any) -> npt.NDArray[np.float32]:
        channels = engine.model.geometry.latent_channels
        if not isinstance(z, Tensor) or z.ndim != 5 or z.shape[:2] != (1, channels) or 0 in z.shape[3:]:
            given = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ScheduleError(f"latents are a torch tensor (1, {channels}, t, h, w), {given} was given")
        return cast("npt.NDArray[np.float32]", z[0].detach().movedim(1, 0).to("cpu", torch.float32).numpy())

    def _decode(self, chunk: Chunk, z_TCHW: npt.NDArray[np.float32]) -> Frames:
        assert isinstance(self._run, DecodeRun)
        frames = self._run.frames(chunk, z_TCHW)
        return frames if self._num_frames is None else frames[: max(0, self._num_frames - chunk.frame_start)]

    def _joined(self, done: list[Frames]) -> Frames:
        if done:
            return np.concatenate(done)
        height, width = self._crop or self._size
        return np.empty((0, height, width, 3), np.uint8)

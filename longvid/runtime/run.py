"""Run: one video in one direction, with its contexts and the meter of its memory.

Axes: B batch (1), C channels, T time, H height, W width; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, Self, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longvid.errors import MemoryBudgetError, ModelError, NonFiniteError
from longvid.events import Direction
from longvid.frames import Frames
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offloader import Offloader
from longvid.memory.tracker import DeviceMeter, is_out_of_memory
from longvid.models.context import ForwardContext
from longvid.models.forward import decode_chunk, encode_chunk, sample_posterior
from longvid.models.kernels.convolution import faithful
from longvid.planning.plan import DirectionPlan
from longvid.runtime.engine import Engine
from longvid.schedule import Chunk
from longvid.units import format_bytes

__all__ = ["DecodeRun", "EncodeRun", "Representation", "Run", "check_representation", "context_of"]

Representation: TypeAlias = Literal["mode", "moments", "sample"]


def check_representation(representation: str, seed: int) -> None:
    """Raise ModelError unless these are a representation and the seed of a sample."""
    if representation not in get_args(Representation):
        raise ModelError(f"representation {representation!r} is not known; choose mode, moments or sample")
    if seed < 0:
        raise ModelError(f"seed {seed} is negative; seeds are whole numbers from 0")


def context_of(part: DirectionPlan, module: nn.Module, copies: CopyEngine, *, traced: bool = False) -> ForwardContext:
    """The context in which ``module`` runs one video as planned."""
    offloader = Offloader(part.placement, copies, host_sizes=part.host_sizes, traced=traced)
    return part.execution.context(module, offloader)


class Run:
    """One video in one direction as ``part`` plans it: its cache and its meter. ``traced`` times copies and layers."""

    direction: ClassVar[Direction]

    def __init__(self, engine: Engine, part: DirectionPlan, *, traced: bool = False) -> None:
        self.engine = engine
        self.part = part
        module = engine.model.encoder if self.direction == "encode" else engine.model.decoder
        self.context = context_of(part, module, engine.copy_engine, traced=traced)
        self.cache = self.context.cache
        self.meter = DeviceMeter(engine.device, engine.weights_bytes)
        self._expected_bytes = part.projected_bytes + engine.reserved_bytes
        self._warned = False

    def __enter__(self) -> Self:
        self.context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def warm_up(self, chunk: Chunk, values: npt.NDArray[Any], last_layer: str | None) -> None:
        """Run one chunk for its contexts only, up to the last layer that counts; None for all layers."""
        self.check(chunk, values)
        self.cache.last_layer = last_layer
        try:
            self._compute(values)
        finally:
            self.cache.last_layer = None

    def check(self, chunk: Chunk, values: npt.NDArray[Any]) -> None:
        """Raise an error for values that would spoil all that comes after them. Frames are always good."""

    def _compute(self, chunk: npt.NDArray[Any]) -> Tensor:
        """Run one chunk under the meter. MemoryBudgetError if the device runs out of memory."""
        index, engine = self.cache.num_chunks, self.engine
        engine.guard.check(f"chunk {index} of {self.direction}")
        forward = encode_chunk if self.direction == "encode" else decode_chunk
        try:
            with self.meter.measure(self.cache.device_bytes), faithful(engine.device):
                host = torch.from_numpy(chunk)
                result = forward(engine.model, self.context, host, device=engine.device, dtype=engine.dtype)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            said = str(exc).splitlines()[0]
        else:
            self._compare_with_plan()
            return result
        # Raised out here, since the frames of the error's traceback hold the chunk's tensors.
        raise MemoryBudgetError(
            f"the device ran out of memory in chunk {index} of {self.direction}: {format_bytes(self._expected_bytes)} "
            f"were planned, {format_bytes(self.meter.peak_bytes)} measured until then{_device_numbers(engine)}; "
            f"free memory on the device, or run again with a smaller memory= (--memory) or offload='all' ({said})",
            projected_bytes=self.part.projected_bytes,
            parts=self.part.parts,
        )

    def _compare_with_plan(self) -> None:
        measured = self.meter.chunk_peak_bytes or 0
        excess = measured - self._expected_bytes
        if excess > 0 and not self._warned:
            self._warned = True
            planned, reserved = format_bytes(self.part.projected_bytes), format_bytes(self.engine.reserved_bytes)
            warnings.warn(
                f"the measured peak of {format_bytes(measured)} is {format_bytes(excess)} above the plan of {planned} "
                f"and the {reserved} that are reserved for workspaces; lower the budget by that much, or let longvid "
                "tune measure the reserve",
                stacklevel=2,
            )


class EncodeRun(Run):
    """Encodes one video, chunk by chunk."""

    direction = "encode"

    def __init__(
        self, engine: Engine, part: DirectionPlan, representation: Representation, seed: int, *, traced: bool = False
    ) -> None:
        super().__init__(engine, part, traced=traced)
        self.representation = representation
        self.seed = seed

    def moments(self, frames_THWC: Frames) -> Tensor:
        """Padded frames of one chunk to moments (1, 2 c, t, h, w) on the host."""
        moments = _to_host(self._compute(frames_THWC))
        if not bool(torch.isfinite(moments).all()):
            index, dtype = self.cache.num_chunks - 1, self.engine.dtype
            advice = "" if dtype == torch.float32 else "; compute in float32 (--dtype float32)"
            raise NonFiniteError(
                f"chunk {index} was encoded to values that are not finite in {dtype}, and so are its contexts; "
                f"nothing of it was kept{advice}",
                chunk=index,
            )
        return moments

    def latents(self, chunk: Chunk, frames_THWC: Frames) -> tuple[Tensor, Tensor | None]:
        """Padded frames to latents (1, c, t, h, w) and, if asked for, moments (1, 2 c, t, h, w), on the host."""
        moments = self.moments(frames_THWC)
        if self.representation == "sample":
            return sample_posterior(moments, seed=self.seed, first_latent=chunk.latent_start), None
        mean = moments.chunk(2, dim=1)[0]
        return mean, moments if self.representation == "moments" else None


class DecodeRun(Run):
    """Decodes one video, chunk by chunk."""

    direction = "decode"

    def __init__(
        self, engine: Engine, part: DirectionPlan, size: tuple[int, int] | None, *, traced: bool = False
    ) -> None:
        super().__init__(engine, part, traced=traced)
        self.size = size

    def frames(self, chunk: Chunk, z_TCHW: npt.NDArray[np.float32]) -> Frames:
        """Latents of one chunk to its true frames (T, H, W, 3) on the host, cropped to size."""
        self.check(chunk, z_TCHW)
        frames = self._compute(z_TCHW)
        height, width = self.size or frames.shape[1:3]
        return cast("Frames", _to_host(frames).numpy()[: chunk.num_frames, :height, :width])

    def check(self, chunk: Chunk, z_TCHW: npt.NDArray[Any]) -> None:
        """Raise NonFiniteError if a latent holds a value that would spoil all that comes after it."""
        bad = np.flatnonzero(~np.isfinite(z_TCHW).all(axis=(1, 2, 3)))
        if len(bad):
            raise NonFiniteError(
                f"latent frame {chunk.latent_start + bad[0]}, in chunk {chunk.index}, holds values that are not finite "
                "(NaN or infinity) before it is decoded; correct the latents, or encode the video again",
                chunk=chunk.index,
            )


def _device_numbers(engine: Engine) -> str:
    if engine.device.type in ("cpu", "meta"):
        return ""
    free, total = torch.accelerator.get_memory_info(engine.device)
    return f", {format_bytes(free)} of the device's {format_bytes(total)} are free now"


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, also from the CPU: results wait for the writer and must not count as device memory."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    torch.accelerator.current_stream(tensor.device).synchronize()
    return host

"""Session: one model on one device, through which whole videos and push-mode videos run.

It composes: :mod:`longvid.runtime.admission` guards it and plans, :mod:`longvid.runtime.encode` and
:mod:`longvid.runtime.decode` run whole videos, :mod:`longvid.runtime.push` runs videos in slices. Every video and
direction has a :class:`~longvid.models.cache.ConvCache` of its own, freed at its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Unpack

import torch

from longvid.errors import SourceError, StoreError
from longvid.events import Callback, RunReport
from longvid.files import local_path
from longvid.frames import Frames
from longvid.media.frame_source import Reading, exact_rate
from longvid.media.limits import Limits
from longvid.media.output.picture_writer import picture_path
from longvid.memory.offload import OffloadPolicy
from longvid.models.base import CausalVAE
from longvid.models.device import resolve_device
from longvid.models.loading import load_model
from longvid.models.numerics import parse_layout, parse_paired_frames
from longvid.planning.options import ComputeOptions, default_dtype, parse_dtype
from longvid.planning.plan import Plan
from longvid.planning.planner import Offload
from longvid.planning.profile import Profile
from longvid.runtime.admission import AdmissionControl, Job, SessionGuard
from longvid.runtime.decode import DecodeOptions, Output, decode_video
from longvid.runtime.encode import ChunkPlan, EncodeOptions, OnNonFinite, encode_video
from longvid.runtime.engine import Engine
from longvid.runtime.prefetch import StopRequest
from longvid.runtime.push import PushDecoder, PushEncoder, Scope
from longvid.runtime.run import Representation, check_representation
from longvid.store.durability import Durability, Resume, parse_durability
from longvid.store.metadata import ReadOptions
from longvid.store.reader import LatentStore
from longvid.units import parse_bytes, parse_reserve

__all__ = ["VideoSession"]

ScopeT = TypeVar("ScopeT", bound=Scope)


class VideoSession:
    """Encodes and decodes videos with one model on one device, in bounded memory.

    Use it in a ``with`` statement. Leaving it frees the device memory that it took; the model passed in is never
    changed. A session belongs to the thread and the process that opened it, and does one thing at a time; several
    push-mode videos may be open at once and interleave.

    Args:
        model: a :class:`~longvid.models.base.CausalVAE`, or anything :func:`longvid.load_model` takes; the built-in
            ``tiny`` by default, which is for previews.
        device: ``"auto"`` (the accelerator if there is one, else the CPU) or a torch device.
        dtype: compute dtype, a name such as ``"bfloat16"`` or a torch dtype. None is float32 on a CPU and
            bfloat16 on an accelerator for a model given by name, and the dtype of the weights for an object.
        memory: budget of device bytes such as ``"8GiB"``, weights included; None for no limit. A run that would not
            fit is refused before anything is read or written.
        offload: which contexts leave the device between chunks: ``"auto"`` (as much as ``memory`` needs), ``"none"``,
            ``"all"``, or a size such as ``"512MiB"`` up to which they stay. The results are the same, bit for bit.
        offload_dir: folder for an unnamed file that offloaded contexts go to; None for host memory.
        reserved: part of ``memory`` for what a plan cannot see, such as workspaces; None for 0 on a CPU and 512 MiB on
            an accelerator.
        profile: what ``longvid tune`` found, or the path of it. Its thresholds take the place of ``offload="auto"``
            where there is no ``memory``; its measured rates and reserve are used in any case. One of another model,
            size, dtype or device is refused.
        chunk_frames: frames of a chunk after the first, for a model whose result does not depend on it; None for the
            model's own, or shorter where the budget asks for it.
        slice_frames: frames of a slice, in which the layers with the largest frames run; None for whole chunks, and
            fewer where the budget asks for it. May change the last bits on some processors.
        layout: of activations in memory: ``"auto"``, ``"contiguous"`` or ``"channels_last"``. Seen in the last bits of
            a result and recorded in the store. ``"auto"`` is channels last where it is not slower, except for small
            frames on a CPU, for which contiguous is bit for bit what diffusers computes in the bfloat16 encoder.
        paired_frames: whether convolutions compute two frames at a time (Winograd F(2,3) along time), with a third
            fewer multiplications: ``"auto"`` (on a CPU, if it is faster; for a bfloat16 encoder only on a CPU without a
            matrix unit), ``"on"`` or ``"off"``, which keeps the rounding of diffusers. Recorded in the store.
        callbacks: called with a :class:`~longvid.events.ChunkEvent` after every chunk, in the caller's thread.
    """

    def __init__(
        self,
        model: CausalVAE | Any = "tiny",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        memory: str | int | None = None,
        offload: Offload = "auto",
        offload_dir: str | os.PathLike[str] | None = None,
        reserved: str | int | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        chunk_frames: int | None = None,
        slice_frames: int | None = None,
        layout: str = "auto",
        paired_frames: str | bool = "auto",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._options = ComputeOptions(
            dtype=parse_dtype(dtype),
            layout=parse_layout(layout),
            paired_frames=parse_paired_frames(paired_frames),
            chunk_frames=chunk_frames,
            slice_frames=slice_frames,
            offload=OffloadPolicy.parse(offload),
            allowed_bytes=None if memory is None else parse_bytes(memory),
            reserved_bytes=None if reserved is None else parse_reserve(reserved),
            profile=profile if isinstance(profile, Profile) or profile is None else Profile.read(profile),
        )
        self._offload_dir = None if offload_dir is None else Path(offload_dir)
        self._source = model
        self._source_model = load_model(model)
        self._source_model.geometry.schedule_for(chunk_frames)  # raises before anything is placed on the device
        self._requested_device = device
        self._callbacks = tuple(callbacks)
        self._guard = SessionGuard()
        self._admission_control: AdmissionControl | None = None
        self._scopes: list[Scope] = []
        self._stop: StopRequest | None = None

    # ------------------------------------------------------------------------------------------- lifecycle

    def __enter__(self) -> Self:
        with self._guard.opening():
            device = resolve_device(self._requested_device)
            options = replace(self._options, dtype=self._options.dtype or default_dtype(self._source, device))
            engine = Engine.on_device(
                self._source_model,
                device,
                options.dtype,
                offload_dir=self._offload_dir,
                reserved_bytes=options.reserved_on(device),
            )
            self._admission_control = AdmissionControl(engine, options, self._offload_dir)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything the session holds, open push-mode videos included. May be called again."""
        control, self._admission_control = self._admission_control, None
        self._guard.close()
        with ExitStack() as stack:  # each of them, whichever fails
            if control is not None:
                stack.callback(control.engine.copy_engine.close)
            for scope in self._scopes:
                stack.callback(scope.close)
            self._scopes.clear()

    @property
    def _control(self) -> AdmissionControl:
        """Of an open session; the guard has checked that it is."""
        assert self._admission_control is not None
        return self._admission_control

    @property
    def model(self) -> CausalVAE:
        """The model as it was passed in."""
        return self._source_model

    def plan(self, *, height: int, width: int) -> Plan:
        """The plan for frames of this size under the session's dtype and budget; see :func:`longvid.make_plan`."""
        self._guard.check("plan")
        return self._control.plan((height, width))

    # ------------------------------------------------------------------------------------------- whole videos

    def encode(
        self,
        source: Any,
        store: str | os.PathLike[str],
        *,
        representation: Representation = "mode",
        chunk_plan: ChunkPlan = "online",
        store_dtype: Literal["float16", "float32"] = "float16",
        seed: int = 0,
        on_non_finite: OnNonFinite = "stop",
        overwrite: bool = False,
        resume: Resume = "exact",
        part: tuple[int, int] | None = None,
        durability: str | Durability = "fsync",
        follow: bool = False,
        **reading: Unpack[Reading],
    ) -> RunReport:
        """Encode a video into a zarr store of latents, or resume one that was not finished.

        Args:
            source: a file, FIFO, folder of pictures, ``in/%05d.png``, ``"-"``; uint8 (T, H, W, 3), one or an iterable.
            store: where the store goes; its parent folder exists.
            representation: the posterior's ``"mode"``, a ``"sample"`` by ``seed``, or all its ``"moments"``.
            chunk_plan: of a model with norms over time: ``"online"`` pads the last chunk; ``"reference"`` makes the
                first one longer by the remainder, as diffusers does, for its very latents at any length. It needs a
                source whose length is known. The latents of other models do not depend on it.
            store_dtype: dtype of the stored latents. Values it cannot hold are an error, never clipped.
            on_non_finite: where the model computes NaN or infinity: ``"stop"`` raises NonFiniteError, ``"quarantine"``
                encodes the chunk again with the last good frame in place of its own, and marks it.
            overwrite: replace what is there, unless it is an unfinished store of this very run.
            resume: ``"exact"`` continues such a store if the end of what is stored comes out again bit for bit;
                ``"close"`` also if not, and records the seam; ``"never"`` refuses.
            part: ``(3, 8)`` encodes the third of eight parts to ``STORE.part-3-of-8``; see :func:`longvid.join`.
            durability: ``"fsync"`` survives power loss, ``"rename"`` a killed process; or :class:`~longvid.Durability`.
            follow: read a file as it grows, until it has not done so for ``follow_seconds`` (10 by default).
            reading: how the source is read, such as ``start``: :class:`~longvid.media.frame_source.Reading`.

        Raises:
            SourceError: frames cannot be read. If nothing was committed yet, no store is left behind.
            StoreError: the store exists, is of another run, is being written by another run, or cannot be written.
            MemoryBudgetError, ScheduleError: it would not fit, or has no such ``part`` or plan; raised before a store
                is made, unless a file is not as long as its header says and the plan is the reference plan.
            SessionStateError: the session is closed, busy or of another thread, or its model was changed.
        """
        options = EncodeOptions(
            reading=_read_options(reading),
            representation=representation,
            chunk_plan=chunk_plan,
            store_dtype=store_dtype,
            seed=seed,
            on_non_finite=on_non_finite,
            limits=reading.get("limits") or Limits(),
            follow_seconds=_follow_seconds(reading.get("follow_seconds")) if follow else None,
            overwrite=overwrite,
            resume=resume,
            part=part,
            durability=parse_durability(durability),
        )
        with self.running("encode") as job:
            return encode_video(job, source, _target(store, beside=source), options)

    def decode(
        self,
        store: str | os.PathLike[str] | LatentStore,
        out: str | os.PathLike[str] | Callable[[Frames], None],
        *,
        start: int = 0,
        frames: int | None = None,
        overwrite: bool = False,
        resume: Resume = "exact",
        part: tuple[int, int] | None = None,
        durability: str | Durability = "fsync",
        **output: Unpack[Output],
    ) -> RunReport:
        """Decode a store of latents into exactly the frames that were encoded.

        diffusers decodes some videos to fewer frames than it encoded, and so does this if their store has the reference
        plan: up to three frames at the beginning are left out then, with a warning.

        Returns what was done; ``complete`` is False if :meth:`stop` ended it. An unfinished video file is removed then.

        Args:
            store: a store that :meth:`encode` completed, or its path.
            out: path ending in ``.mp4``, ``.mov``, ``.mkv`` or ``.webm`` for a video file, in ``.zarr`` for a store of
                frames; pictures such as ``out/%05d.png``, or a folder by a slash at its end; or a callable that takes
                uint8 frames (T, H, W, 3); it is called in order, in a thread of its own.
            start: frames to skip. Of them, only as many are decoded as :func:`longvid.warmup` says, for the same bits.
            frames: frames to write at most.
            overwrite: replace what is there, unless it is an unfinished store of this very run, which is continued.
            resume: how such a store is continued, as for :meth:`encode`. A video file cannot be continued and starts
                over.
            part: ``(3, 8)`` decodes the third of eight parts, as for :meth:`encode`; for a store of frames.
            durability: of a store of frames, as for :meth:`encode`.
            output: of a video file: ``codec``, ``crf``, ``pix_fmt``, ``audio``; see
                :class:`~longvid.runtime.decode.Output`.

        Raises:
            StoreError: the store is missing, incomplete, damaged or of another kind of model; the output exists or
                cannot be written. A file that is not finished is removed.
            ScheduleError: the store has another chunk plan, or ``start``, ``frames`` and ``part`` leave nothing.
            MemoryBudgetError: it would not fit; raised before anything is written.
            SessionStateError: as for :meth:`encode`.
        """
        options = DecodeOptions(
            start=start,
            frames=frames,
            overwrite=overwrite,
            resume=resume,
            part=part,
            durability=parse_durability(durability),
            output=output,
        )
        with self.running("decode") as job:
            return decode_video(job, store, out if callable(out) else _target(picture_path(out), beside=store), options)

    def stop(self) -> bool:
        """Ask the :meth:`encode` or :meth:`decode` that is running to end at the next boundary between chunks.

        That run commits what is whole, and returns its report with ``complete=False``. If none is
        running, nothing happens, later runs are not affected, and False is returned. May be called from a signal
        handler, a callback or another thread.
        """
        stop = self._stop
        if stop is not None:
            stop.make()
        return stop is not None

    @contextmanager
    def running(self, what: str) -> Iterator[Job]:
        """The session is busy with the run of one whole video, which :meth:`stop` reaches."""
        with self._guard.busy(what):
            self._stop = StopRequest()
            try:
                yield Job(control=self._control, callbacks=self._callbacks, stop=self._stop)
            finally:
                self._stop = None

    # ------------------------------------------------------------------------------------------- push mode

    def encoder(self, *, representation: Representation = "mode", seed: int = 0) -> PushEncoder:
        """A scope that encodes one video of unknown length from frames as they come; see :class:`PushEncoder`."""
        check_representation(representation, seed)
        self._guard.check("encoder")
        return self._scope(PushEncoder(self._guard, self._control, representation, seed))

    def decoder(self, *, num_frames: int | None = None, size: tuple[int, int] | None = None) -> PushDecoder:
        """A scope that decodes one video from latents as they come; see :class:`PushDecoder`.

        Args:
            num_frames: true length of the video; None gives the frames of the padded tail as well.
            size: (height, width) to crop to; None for whole latents.
        """
        self._guard.check("decoder")
        return self._scope(PushDecoder(self._guard, self._control, num_frames, size))

    def _scope(self, scope: ScopeT) -> ScopeT:
        self._scopes = [*(s for s in self._scopes if not s.closed), scope]
        return scope


def _target(out: Any, *, beside: Any) -> Path:
    """The path of an output, which is neither what is being read, nor in it, nor around it."""
    if not isinstance(out, (str, os.PathLike)):
        raise StoreError(
            f"a {type(out).__name__} was given as the place to write to; give the path of a folder or file, as a "
            "string or a Path",
            kind="missing",
        )
    target, source = local_path(out), _path_of(beside)
    if source is not None:
        a, b = source.resolve(), target.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise StoreError(
                f"{out} cannot be written while {source} is read: one is the other, or lies in it; choose another name",
                kind="foreign",
            )
    return target


_NOT_RECORDED = ("limits", "follow_seconds", "interrupted")
"options of reading that decide no frame"


def _follow_seconds(seconds: float | None) -> float:
    if seconds is not None and not seconds > 0:
        raise SourceError(f"follow_seconds={seconds} is not a time to wait; give seconds above 0", kind="range")
    return 10.0 if seconds is None else seconds


def _read_options(reading: Reading) -> ReadOptions:
    """What is recorded of them; TypeError for an option that does not exist."""
    given: dict[str, Any] = {name: value for name, value in reading.items() if name not in _NOT_RECORDED}
    for name in ("frame_rate", "fps"):
        given[name] = exact_rate(name, given.get(name))
    return ReadOptions(**given)


def _path_of(source: Any) -> Path | None:
    """Where a source lies on disk, if it does: a file, a folder, a store, or a zarr array in a folder."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    root = source.path if isinstance(source, LatentStore) else getattr(getattr(source, "store", None), "root", None)
    return root if isinstance(root, Path) else None

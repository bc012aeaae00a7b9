"""Decode: a whole store of latents to a video file, a store of frames or a callable.

Axes: T time, H height, W width, C channels; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from longvid.errors import ScheduleError, StoreError
from longvid.events import RunReport
from longvid.frames import ColorInfo, Frames, Marks, Times
from longvid.media.output.video_writer import VideoWriter
from longvid.models.base import CausalVAE, model_name
from longvid.runtime.admission import Job
from longvid.runtime.run import DecodeRun
from longvid.runtime.span import Piece, RunOptions, VideoTask
from longvid.schedule import ChunkSchedule
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.metadata import RunFacts
from longvid.store.reader import LatentStore, open_store, require_complete
from longvid.store.target import Found, check_target

__all__ = ["DecodeOptions", "decode_video", "latent_chunks", "video_sink"]

_Frames: TypeAlias = tuple[Frames, Times, Marks]
_SHRINK = 0.05
"least share of their bytes that frames take on the disk: drawings compress well, film to about 0.4"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions(RunOptions):
    """How a store is decoded; see :meth:`longvid.VideoSession.decode`."""

    start: int = 0
    frames: int | None = None


class _Decoding(VideoTask[_Frames]):
    """One store that is decoded."""

    direction = "decode"
    _options: DecodeOptions
    _sink: VideoWriter | FrameStoreWriter

    def __init__(
        self,
        job: Job,
        options: DecodeOptions,
        found: Found | None,
        latents: LatentStore,
        out: Path | Callable[[Frames], None],
    ) -> None:
        first, last = _frame_window(latents.num_frames, options.start, options.frames)
        first_frames = None
        self._before = 0
        "frames that come out in front of the video's first one; if negative, frames of the video that do not come out"
        if latents.schedule.is_reference:
            plan, num_frames = latents.schedule.reference_decode(latents.num_latents)
            first_frames, self._before = plan.first_frames, num_frames - latents.num_frames
            first = _from_first_that_comes_out(latents, first, last, -self._before)
        window = first + self._before, last + self._before
        super().__init__(job, options, found, (latents.height, latents.width), window, first_frames)
        self._latents, self._out = latents, out
        self._first, self._last = self.window[0], self.window[1] or window[1]

    def fingerprint(self, compute: dict[str, Any]) -> dict[str, Any]:
        latents = self._latents
        facts = {"digests": latents.metadata.digests, "num_frames": latents.num_frames}
        return {
            "kind": "frames",
            "latents": {**facts, "dtype": str(latents.latents.dtype)},
            "window": [self._first - self._before, self._last - self._before],
            "size": [latents.height, latents.width],
            **compute,
        }

    def least_bytes(self, num_frames: int) -> float:
        return num_frames * self._latents.height * self._latents.width * 3 * _SHRINK

    def sink(self, fingerprint: dict[str, Any], facts: dict[str, Any]) -> AbstractContextManager[Any]:
        latents = self._latents
        if not isinstance(self._out, Path):
            return nullcontext()
        if self._found is None:
            self._sink = video_sink(latents, self._out, self._options.overwrite)
            return self._sink
        self._sink = FrameStoreWriter(
            self._found.path,
            size=(latents.height, latents.width),
            time_base=latents.time_base,
            frame_rate=latents.frame_rate,
            source=latents.source,
            facts=RunFacts(fingerprint=fingerprint, vae=latents.vae, extra={**facts, "latents": str(latents.path)}),
            options=self._options,
            part=self.part,
        )
        return self._sink

    def make_run(self) -> DecodeRun:
        size = (self._latents.height, self._latents.width)
        self._run = DecodeRun(self.job.engine, self.admission.part, size, traced=self.job.traced)
        return self._run

    def read(self, start: int) -> Iterator[Piece]:
        return latent_chunks(self._latents, self.schedule, self._last, first=start, before=self._before)

    def compute(self, piece: Piece) -> _Frames:
        start, stop = (frame - piece.chunk.frame_start for frame in self.inside(piece.chunk, self._first))
        pixels = self._run.frames(piece.chunk, piece.values)
        return pixels[start:stop], piece.pts[start:stop], piece.valid[start:stop]

    def write(self, result: _Frames) -> None:
        if isinstance(self._out, Path):
            self._sink.write(*result)
        else:
            self._out(result[0])


def decode_video(
    job: Job, store: str | os.PathLike[str] | LatentStore, out: Path | Callable[[Frames], None], options: DecodeOptions
) -> RunReport:
    """Decode a store, or resume it. Arguments and errors are those of ``VideoSession.decode``."""
    latents = store if isinstance(store, LatentStore) else open_store(store)
    _require_decodable(latents, job.engine.model)
    target = _store_path(out, options)
    return _Decoding(job, options, None if target is None else check_target(target), latents, out).run()


def _store_path(out: Path | Callable[[Frames], None], options: DecodeOptions) -> Path | None:
    """Where frames are written to a store; None for a video file and for a callable."""
    if isinstance(out, Path) and (out.suffix == ".zarr" or options.mend):
        return options.path_of(out)
    if options.part is not None:
        raise StoreError(
            f"a part of {out} was asked for; nothing joins video files exactly, so give a path that ends in .zarr",
            kind="format",
        )
    return None


def _frame_window(num_frames: int, start: int, frames: int | None) -> tuple[int, int]:
    if start < 0 or start >= num_frames or (frames is not None and frames < 1):
        raise ScheduleError(
            f"frames from {start}{'' if frames is None else f', {frames} of them,'} were asked for; the video has "
            f"{num_frames} frames, 0 to {num_frames - 1}"
        )
    return start, num_frames if frames is None else min(num_frames, start + frames)


def _from_first_that_comes_out(latents: LatentStore, first: int, last: int, missing: int) -> int:
    """``first``, or the first frame that diffusers decodes; ScheduleError if none of the frames comes out."""
    if first >= missing:
        return first
    why = (
        f"{latents.path} has the reference plan, and of {latents.num_frames} frames in {latents.num_latents} latents "
        f"diffusers decodes all but the first {missing}"
    )
    if last <= missing:
        raise ScheduleError(f"frames {first} to {last - 1} do not come out: {why}; ask for later ones")
    warnings.warn(f"frames {first} to {missing - 1} are left out: {why}", stacklevel=5)
    return missing


def latent_chunks(
    store: LatentStore, plan: ChunkSchedule, stop_frame: int, *, first: int = 0, before: int = 0
) -> Iterator[Piece]:
    """Latents of every chunk from ``first`` up to ``stop_frame``; runs in the reader thread.

    Of the frames that come out, ``before`` stand in front of the video's first one, which is shown at their time, too.
    """
    for chunk in plan.chunks(store.num_frames + before, first=first):
        if chunk.frame_start >= stop_frame:
            return
        frames = np.maximum(0, np.arange(chunk.frame_start, chunk.frame_stop) - before)
        latents = store.read(chunk.latent_start, chunk.latent_stop)
        yield Piece(chunk, latents, store.frame_pts[frames], store.frame_valid[frames])


def video_sink(store: LatentStore, out: Path, overwrite: bool) -> VideoWriter:
    """What writes the frames of ``store`` to a video file. Nothing is created yet."""
    color = store.source.get("color")
    return VideoWriter(
        out,
        size=(store.height, store.width),
        time_base=store.time_base,
        frame_rate=store.frame_rate,
        color=None if color is None else ColorInfo(**color),
        sample_aspect_ratio=store.metadata.sample_aspect_ratio,
        overwrite=overwrite,
    )


def _require_decodable(store: LatentStore, model: CausalVAE) -> None:
    require_complete(store)
    if store.metadata.part is not None:
        raise StoreError(
            f"{store.path} is {store.metadata.part} of a video; join the parts first (longvid join)", kind="incomplete"
        )
    geometry, theirs = model.geometry, store.vae.get("name_or_path") or store.vae.get("class_name") or "another model"

    def differs(found: str, expected: str) -> str:
        return (
            f"{store.path} was encoded with the model {theirs}, in {found}; the model of this session, "
            f"{model_name(model)}, works in {expected}. Decode with the model of the store (--model {theirs})"
        )

    p, size = geometry.pixels_per_latent, geometry.padded_size(store.height, store.width)
    stored, ours = store.latents.shape[1:], (geometry.latent_channels, size[0] // p, size[1] // p)
    if stored != ours:
        frames = f"for frames of {store.width}x{store.height}, with"
        sizes = [f"latents of {w}x{h} {frames} {channels} channels" for channels, h, w in (stored, ours)]
        raise StoreError(differs(*sizes), kind="format")
    if not geometry.schedule.same_latents(store.schedule) or (
        store.schedule.is_reference and not geometry.has_reference_plan
    ):
        raise ScheduleError(differs(str(store.schedule), str(geometry.schedule)))
    have, want = model.describe().get("weights_sha256"), store.vae.get("weights_sha256")
    if have and want and have != want:
        warnings.warn(
            f"{store.path} was encoded with other weights ({theirs}) than this session has; frames may look wrong",
            stacklevel=4,
        )

"""Makes a store of latents that another program made, such as the output of a diffusion pipeline.

Nothing is computed, so nothing can compute it again: the fingerprint of such a store is a digest of its values, which
no run of an encoder has.

Axes: t time, c channels, h height, w width of latents.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from longvid.errors import NonFiniteError, OptionError, ScheduleError, SourceError
from longvid.frames import SourceInfo
from longvid.latents import denormalize, find_channel_axis
from longvid.media.frame_source import DEFAULT_FRAME_RATE
from longvid.models.base import CausalVAE, LatentGeometry
from longvid.models.loading import load_architecture
from longvid.runtime.exchange.latent_files import read_latents
from longvid.schedule import ChunkSchedule
from longvid.store.durability import Durability, WriteOptions, parse_durability
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import RunFacts, ratio
from longvid.store.reader import LatentStore, open_store
from longvid.store.target import check_target, settle_complete

__all__ = ["ImportOptions", "import_latents", "latent_file_as_store", "schedule_of"]

_MODEL_FACTS = ("class_name", "name_or_path", "revision", "random_weights", "weights_sha256")
"what tells models apart in a fingerprint"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What latents from elsewhere are; see :func:`import_latents`."""

    normalized: bool = False
    num_frames: int | None = None
    fps: Fraction | float | None = None
    size: tuple[int, int] | None = None
    channel_axis: int | None = None
    tensor: str | None = None
    store_dtype: Literal["float16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if self.store_dtype not in ("float16", "float32"):
            raise OptionError(f"store_dtype {self.store_dtype!r} is not known; choose float16 or float32")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise OptionError(f"fps={self.fps} is not a number of frames per second above 0")

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, assumed if they are not known."""
        return DEFAULT_FRAME_RATE if self.fps is None else Fraction(self.fps).limit_denominator(1 << 20)


def import_latents(
    z: Any,
    store: str | os.PathLike[str],
    *,
    model: CausalVAE | Any,
    normalized: bool = False,
    num_frames: int | None = None,
    fps: Fraction | float | None = None,
    size: tuple[int, int] | None = None,
    channel_axis: int | None = None,
    tensor: str | None = None,
    store_dtype: Literal["float16", "float32"] = "float32",
    overwrite: bool = False,
    durability: str | Durability = "fsync",
) -> LatentStore:
    """Make a store of the latents of one video that another program made, such as a diffusion pipeline.

    The store is read, decoded and verified like one that :meth:`VideoSession.encode` wrote. It cannot be computed
    again: a damaged one is repaired by importing the latents once more.

    Args:
        z: numpy array or torch tensor of one video: (c, t, h, w), (1, c, t, h, w), (t, c, h, w) or (1, t, c, h, w); or
            the path of a ``.safetensors``, ``.npy``, ``.pt`` or ``.pth`` file with one.
        store: where the store goes; its parent folder exists.
        model: of whose VAE they are: anything that :func:`longvid.load_model` takes. Its weights are not read.
        normalized: whether they are what a pipeline's transformer works on, and what ``output_type="latent"`` gives;
            they are stored raw, see :func:`longvid.denormalize`.
        num_frames: frames of the video, if the last latents are of a padded tail; None for all that t latents have.
        fps: frames per second; None assumes 24.
        size: (height, width) of the frames, if they are smaller than whole latents; None for whole latents.
        channel_axis: the axis of the channels in ``z``; None finds it if only one fits.
        tensor: name of the tensor, in a file with several.
        store_dtype: dtype of the stored latents. Values that it cannot hold are an error.
        overwrite: replace a longvid store that is there.
        durability: as for :meth:`VideoSession.encode`.

    Returns:
        the store, opened. If these latents are in a store at that place already, it stays as it is.

    Raises:
        SourceError: the file cannot be read, or the array is not the latents of one video of this model.
        NonFiniteError: a latent frame holds NaN or infinity.
        ScheduleError: no video has this number of latents, or the latents have another number of frames.
        StoreError: something is in the way, or the disk refuses.
        ModelError: there is no such model, or it does not say how its latents are scaled.
        OptionError: ``size``, ``fps`` or ``store_dtype`` cannot be used.
    """
    options = ImportOptions(
        normalized=normalized,
        num_frames=num_frames,
        fps=fps,
        size=size,
        channel_axis=channel_axis,
        tensor=tensor,
        store_dtype=store_dtype,
    )
    writing = WriteOptions(durability=parse_durability(durability), overwrite=overwrite)
    check_target(store)  # before anything is read
    return _Import(z, load_architecture(model), options).write(store, writing)


@contextmanager
def latent_file_as_store(path: str, model: CausalVAE, options: ImportOptions) -> Iterator[LatentStore]:
    """A file of latents as a store, which is removed at the end; it goes by the name of the file."""
    with tempfile.TemporaryDirectory(prefix="longvid-") as folder:
        writing = WriteOptions(durability=Durability(mode="rename", lock=False))
        store = _Import(Path(path), model, options).write(Path(folder) / "latents.zarr", writing)
        store.path = Path(path)  # in messages, and in what is recorded of the frames
        yield store


def schedule_of(geometry: LatentGeometry, num_latents: int, num_frames: int | None = None) -> ChunkSchedule:
    """The chunk plan by which a model decodes latents of a pipeline to the frames that diffusers decodes them to.

    diffusers puts the remainder into the first chunk. For CogVideoX these are chunks of 3, 2, 2, ... latents if the
    number is odd, as in the online plan, and of 2, 2, ... if it is even, which is the reference plan.

    Raises:
        ScheduleError: no plan of this model has such chunks.
    """
    schedule = geometry.schedule
    if not schedule.whole_chunks or (num_latents - 1) % schedule.chunk_latents == 0:
        return schedule
    if not geometry.has_reference_plan:
        schedule.max_frames(num_latents)  # raises
    most = schedule.reference_decode(num_latents)[1]
    plan = schedule.reference(most if num_frames is None else num_frames)
    if num_frames is not None and plan.num_latents(num_frames) != num_latents:
        raise ScheduleError(
            f"{num_latents} latent frames are those of {most - schedule.frames_per_latent + 1} to {most} frames, "
            f"{num_frames} were asked for"
        )
    return plan


class _Import:
    """Latents of one video, ready to be written.

    Args:
        z: an array, or the path of a file.
        model: of whose VAE they are.
        options: what they are.
    """

    def __init__(self, z: Any, model: CausalVAE, options: ImportOptions) -> None:
        self._model, self._options = model, options
        self._name, found = "an array of latents", z
        if isinstance(z, (str, os.PathLike)):
            self._name, found = str(z), read_latents(Path(z), options.tensor)
        self._given = {"shape": list(np.shape(found)), "dtype": str(getattr(found, "dtype", "")).removeprefix("torch.")}
        geometry = model.geometry
        try:
            rows = _rows(found, geometry.latent_channels, options.channel_axis)
        except OptionError as exc:
            raise SourceError(f"{self._name}: {exc}" if found is not z else str(exc), kind="layout") from exc
        self._schedule = schedule_of(geometry, len(rows), options.num_frames)
        most = self._schedule.max_frames(len(rows))
        self._num_frames = most if options.num_frames is None else options.num_frames
        self._schedule.check_length(self._num_frames, len(rows))
        _require_finite(rows, self._schedule)
        self._size = _size(geometry, rows.shape, options.size)
        if options.normalized:
            rows = denormalize(rows, model, channel_axis=1)
        self._rows = np.ascontiguousarray(rows, np.float32)

    def write(self, path: str | os.PathLike[str], writing: WriteOptions) -> LatentStore:
        """Write the store, or leave it if it holds these very latents."""
        fingerprint, rate = self._fingerprint(), self._options.frame_rate
        found = check_target(path)
        if found.decide(fingerprint, overwrite=writing.overwrite, resume=writing.resume) == "done":
            settle_complete(found, writing.durability)
            return open_store(path)
        height, width = self._size
        source = SourceInfo(
            kind="latents",
            name=self._name,
            height=height,
            width=width,
            num_frames=self._num_frames,
            time_base=1 / rate,
            frame_rate=rate,
            timing_assumed=self._options.fps is None,
            details={**self._given, "normalized": self._options.normalized},
        )
        padded = self._model.geometry.padded_size(height, width)
        extra = {"padded_size": list(padded), "pixel_range": [-1, 1]}
        layout = LatentLayout(
            shape_CYX=(self._rows.shape[1], self._rows.shape[2], self._rows.shape[3]),
            representation="imported",
            dtype=self._options.store_dtype,
        )
        with LatentWriter(
            found.path,
            schedule=self._schedule,
            source=source,
            layout=layout,
            facts=RunFacts(fingerprint=fingerprint, vae=self._model.describe(), extra=extra),
            options=writing,
        ) as target:
            for chunk in self._schedule.chunks(self._num_frames):
                times = np.arange(chunk.frame_start, chunk.frame_stop, dtype=np.int64)
                target.write(chunk, self._rows[chunk.latent_start : chunk.latent_stop], times)
        return open_store(path)

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bits of the store. The field ``imported`` is in no fingerprint of an encode."""
        facts = {
            "sha256": hashlib.sha256(self._rows.astype("<f4", copy=False).data).hexdigest(),
            "shape": list(self._rows.shape),
            "num_frames": self._num_frames,
            "size": list(self._size),
            "frame_rate": ratio(self._options.frame_rate),
        }
        return {
            "kind": "latents",
            "imported": facts,
            "model": {name: value for name, value in self._model.describe().items() if name in _MODEL_FACTS},
            "chunk_plan": self._schedule.to_dict(),
            "store_dtype": self._options.store_dtype,
        }


def _rows(z: Any, channels: int, channel_axis: int | None) -> npt.NDArray[np.float32]:
    """Latents of one video as (t, c, h, w) in float32."""
    shape = np.shape(z)
    if len(shape) == 5 and shape[0] != 1:
        raise OptionError(
            f"latents of shape {' x '.join(map(str, shape))} are those of {shape[0]} videos; import one at a time, "
            "such as z[0], each into a store of its own"
        )
    if 0 in shape:
        raise OptionError(f"latents of shape {' x '.join(map(str, shape))} hold nothing")
    axis = find_channel_axis(shape, channels, channel_axis)
    array = np.moveaxis(_float32(z), axis, -3)
    return array[0] if array.ndim == 5 else array


def _float32(z: Any) -> npt.NDArray[np.float32]:
    if isinstance(z, torch.Tensor):
        floating = z.is_floating_point() and z.device.type != "meta"
        array = z.detach().to("cpu", torch.float32).numpy() if floating else np.zeros(0)
    else:
        z = np.asarray(z)
        floating, array = z.dtype.kind == "f", z
    if not floating:
        raise OptionError(f"latents of dtype {z.dtype} were given; floating numbers are expected")
    return array.astype(np.float32, copy=False)


def _require_finite(rows: npt.NDArray[np.float32], schedule: ChunkSchedule) -> None:
    bad = [row for row, latent in enumerate(rows) if not np.isfinite(latent).all()]
    if bad:
        more = "" if len(bad) == 1 else f", and so do {len(bad) - 1} more"
        raise NonFiniteError(
            f"latent frame {bad[0]} holds values that are not finite (NaN or infinity){more}; nothing was written. "
            "Correct the latents, or make them in float32 or bfloat16",
            chunk=schedule.index_of_frame(schedule.frame_range(bad[0])[0]),
        )


def _size(geometry: LatentGeometry, shape: tuple[int, ...], size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the frames of latents (t, c, h, w)."""
    whole = shape[2] * geometry.pixels_per_latent, shape[3] * geometry.pixels_per_latent
    if size is None:
        return whole
    if min(size) < 1 or geometry.padded_size(*size) != whole:
        raise OptionError(
            f"frames of {size[1]}x{size[0]} were asked for; latents of {shape[3]}x{shape[2]} hold frames of up to "
            f"{whole[1]}x{whole[0]}, less than {geometry.pixels_per_latent} pixels of which may be padding"
        )
    return size

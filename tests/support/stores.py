"""Small stores of latents and of frames, written as an encode or a decode would."""

import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import xarray

from longvid.frames import ColorInfo, SourceInfo
from longvid.schedule import ChunkSchedule
from longvid.store.durability import Durability, WriteOptions
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import RunFacts

SHAPE = (16, 2, 3)
PLAN = ChunkSchedule()


def video(time_base=Fraction(1, 24), frame_rate=Fraction(24)):
    return SourceInfo(
        kind="video", name="a.mp4", height=15, width=23, num_frames=None, time_base=time_base, frame_rate=frame_rate,
        color=ColorInfo(matrix="bt709", range="limited"), details={"codec": "h264"},
    )  # fmt: skip


def arguments(*, fingerprint=None, vae=None, extra=None, **options):
    """The arguments of a writer that say what is recorded, and what may be replaced."""
    facts = RunFacts(fingerprint=fingerprint or {}, vae=vae or {}, extra=extra or {})
    return {"facts": facts, "options": WriteOptions(**options)}


def writer(path, *, plan=PLAN, shape=SHAPE, representation="mode", dtype="float16", source=None, **options):
    options = {"vae": {"class_name": "X"}, "durability": Durability(publish_seconds=0), **options}
    layout = LatentLayout(shape_CYX=shape, representation=representation, dtype=dtype)
    return LatentWriter(path, schedule=plan, layout=layout, source=source or video(), **arguments(**options))


def latents_of(chunk, shape=SHAPE):
    rng = np.random.default_rng(chunk.index)
    return rng.normal(size=(chunk.num_latents, *shape)).astype(np.float32)


def write(path, num_frames, *, plan=PLAN, shape=SHAPE, **options):
    with writer(path, plan=plan, shape=shape, **options) as store:
        for chunk in plan.chunks(num_frames):
            store.write(chunk, latents_of(chunk, shape), np.arange(chunk.frame_start, chunk.frame_stop) * 2)
    return np.concatenate([latents_of(c, shape) for c in plan.chunks(num_frames)])


def xr_open(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return xarray.open_zarr(path).load()


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def frame_store(path, size=(90, 120), time_base=Fraction(1, 25), frame_rate=Fraction(25), **options):
    rates = {"time_base": time_base, "frame_rate": frame_rate}
    return FrameStoreWriter(path, size=size, **rates, source={"name": "a"}, **arguments(**options))

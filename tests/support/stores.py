"""Small stores of latents and of frames, written as an encode or a decode would."""

import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import xarray

from longvid.frames import ColorInfo, SourceInfo
from longvid.schedule import ChunkSchedule
from longvid.store.durability import Durability
from longvid.store.frame_writer import FrameStoreWriter
from longvid.store.latent_writer import LatentWriter

SHAPE = (16, 2, 3)
PLAN = ChunkSchedule()


def source(time_base=Fraction(1, 24), frame_rate=Fraction(24)):
    return SourceInfo(
        kind="video", name="a.mp4", height=15, width=23, num_frames=None, time_base=time_base, frame_rate=frame_rate,
        color=ColorInfo(matrix="bt709", range="limited"), details={"codec": "h264"},
    )  # fmt: skip


def writer(path, *, plan=PLAN, shape=SHAPE, representation="mode", **options):
    every = Durability(publish_seconds=0)
    options = {"source": source(), "vae": {"class_name": "X"}, "durability": every, **options}
    return LatentWriter(path, schedule=plan, latent_shape_CYX=shape, representation=representation, **options)


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


def frame_store(path, **options):
    return FrameStoreWriter(
        path, height=90, width=120, time_base=Fraction(1, 25), frame_rate=Fraction(25), source={"name": "a"}, **options
    )

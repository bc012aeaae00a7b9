"""A writing run without a model: a recurrence that forgets computes the latents, and the span is that of a real run."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np

import longvid.store.lock
from longvid.frames import SourceInfo
from longvid.media.decoding.seek_index import SeekIndex, SeekPoint
from longvid.planning.warmup import Warmup
from longvid.runtime.span import Span
from longvid.schedule import ChunkSchedule
from longvid.store.durability import WriteOptions
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import RunFacts

SHAPE, NUM_FRAMES = (4, 2, 3), 79
"21 latents, which are units of 3 without a rest: a run may end when all is committed and the store is not complete"
PLAN = ChunkSchedule()
CHUNKS = list(PLAN.chunks(NUM_FRAMES))
FINGERPRINT = {"kind": "latents", "model": "recurrence"}
NUM_LAYERS = 5
WARMUP = Warmup(direction="encode", chunks=3, ready={}, begins={})
"""Each layer looks one latent back, so five latents are wrong after a cold start, which lie in three chunks"""


class Recurrence:
    """What computes: layers that each keep the last row of their input; ``bias`` is the machine."""

    def __init__(self, bias=0.0):
        self.contexts = np.zeros((NUM_LAYERS, 1, *SHAPE))
        self.bias = bias

    def latents(self, chunk):
        rows = np.arange(chunk.latent_start, chunk.latent_stop, dtype=float)
        values = np.cos(rows[:, None, None, None] * np.arange(1, 1 + np.prod(SHAPE)).reshape(SHAPE))
        for layer, context in enumerate(self.contexts):
            earlier = np.concatenate([context, values])
            self.contexts[layer] = values[-1]
            values = np.sin(3 * earlier[:-1] + 2 * values + layer)
        return (values + self.bias).astype(np.float32)


def computed(bias=0.0):
    """All latents of a run that nothing disturbs."""
    run = Recurrence(bias)
    return np.concatenate([run.latents(chunk) for chunk in CHUNKS]).astype(np.float16).astype(np.float32)


TRUTH, ELSEWHERE = computed(), 0.01


class Attempt:
    """One run that writes: the store, what computes, and where it stands. It spans what a real one would."""

    def __init__(self, path, durability, mend=frozenset(), *, resume="exact", bias=0.0, warmup=WARMUP, proof=True):
        info = SourceInfo(kind="array", name="a", height=16, width=24, num_frames=None, time_base=Fraction(1, 24),
                          frame_rate=Fraction(24), color=None, details={})  # fmt: skip
        self.target = LatentWriter(
            path, schedule=PLAN, source=info, layout=LatentLayout(shape_CYX=SHAPE, representation="mode"),
            facts=RunFacts(fingerprint=FINGERPRINT, vae={"class_name": "X"}),
            options=WriteOptions(durability=durability, mend=mend, resume=resume),
        )  # fmt: skip
        self.target.__enter__()
        self.run, self.index = Recurrence(bias), SeekIndex()
        wanted, stop = self.target.wanted_frames
        stop = None if stop is None else PLAN.index_of_frame(stop - 1) + 1
        proof = proof and wanted > 0 and not mend
        self.span = Span.of(PLAN.index_of_frame(wanted), stop, lambda: warmup, proof=proof)
        self.target.start_at(PLAN.full(self.span.first).frame_start)
        self.index.load(self.target.seek_index, FINGERPRINT)
        self.next = self.span.start

    def step(self):
        chunk, num_units = CHUNKS[self.next], self.target.committed_units
        latents = self.run.latents(chunk)
        if not self.span.is_warmup(self.next):
            self.target.write(chunk, latents, np.arange(chunk.frame_start, chunk.frame_stop))
        self.index.add(SeekPoint(chunk.frame_start, chunk.frame_start, 8 * chunk.frame_start))
        if self.target.committed_units > num_units:
            self.index.save(self.target.seek_index)
        self.next += 1

    @property
    def at_end(self):
        return self.next == len(CHUNKS)

    def close(self):
        if not self.at_end:
            self.target.pause()
        self.target.__exit__(None, None, None)

    def finish(self):
        """Run to the end, or to an error."""
        try:
            while not self.at_end:
                self.step()
        except BaseException as exc:
            self.target.__exit__(type(exc), exc, None)
            raise
        self.close()

    def die(self):
        """As if the process had gone: the kernel takes the lock back, and the files stay as they are."""
        lock = self.target._lock
        longvid.store.lock._held.pop(lock._identity, None)
        os.close(lock._fd)
        lock._fd = -1

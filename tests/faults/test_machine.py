"""A store in all orders of events: open, write, snapshot, die, go on, corrupt, verify, repair, read, close.

What readers see is always the beginning of the same video. In place of a model stands a recurrence: each chunk depends
on the state that those before it left, so that a run resumed from a wrong state, or from none, computes others.
"""

# ruff: noqa: PT017 - whether a step may fail depends on what happened before it

import json
import os
import shutil
import tempfile
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import longvid.store.lock
from longvid import Durability, StoreError, open_store
from longvid.frames import SourceInfo, SourcePosition
from longvid.runtime.repair import repair
from longvid.runtime.snapshot import Checkpoints, snapshots_in
from longvid.schedule import ChunkSchedule
from longvid.store.durability import WriteOptions
from longvid.store.format import COORDINATE_NAMES, PRIVATE
from longvid.store.latent_writer import LatentLayout, LatentWriter
from longvid.store.metadata import RunFacts
from longvid.store.verify import verify

SHAPE, UNIT, NUM_FRAMES = (4, 2, 3), 3, 59
PLAN = ChunkSchedule()
CHUNKS = list(PLAN.chunks(NUM_FRAMES))
FINGERPRINT = {"kind": "latents", "model": "recurrence"}
VIDEO = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 16, 24, 3), dtype=np.uint8)
LAYERS = ("conv_in", "conv_out")
SETTLED = SimpleNamespace(settle=lambda: None)


class Recurrence:
    """What a run is to :class:`Checkpoints`: contexts that can be saved and put back."""

    def __init__(self):
        self.states = {layer: torch.zeros(1, 4, 1, 2, 3) for layer in LAYERS}
        self.cache = SimpleNamespace(contexts=self.states.items, restore=self._restore)
        self.engine = SimpleNamespace(device="cpu")

    def _restore(self, _, contexts, device):
        self.states.update((layer, context.clone()) for layer, context in contexts)

    def latents(self, chunk):
        rows = []
        for latent in range(chunk.latent_start, chunk.latent_stop):
            for layer, state in self.states.items():
                self.states[layer] = torch.sin(3 * state + latent + len(layer))
            rows.append(sum(self.states.values())[0, :, 0])
        return torch.stack(rows).numpy()


def truth():
    run = Recurrence()
    return np.concatenate([run.latents(chunk) for chunk in CHUNKS]).astype(np.float16).astype(np.float32)


TRUTH = truth()


class Attempt:
    """One run that writes: the store, the state and where it stands."""

    def __init__(self, path, durability, mend=frozenset()):
        info = SourceInfo(kind="array", name="a", height=16, width=24, num_frames=None, time_base=Fraction(1, 24),
                          frame_rate=Fraction(24), color=None, details={})  # fmt: skip
        self.target = LatentWriter(
            path, schedule=PLAN, source=info, layout=LatentLayout(shape_CYX=SHAPE, representation="mode"),
            facts=RunFacts(fingerprint=FINGERPRINT, vae={"class_name": "X"}),
            options=WriteOptions(durability=durability, mend=mend),
        )  # fmt: skip
        self.target.__enter__()
        self.run = Recurrence()
        self.checkpoints = Checkpoints(self.target, self.run, FINGERPRINT)
        snapshot = self.checkpoints.restore()
        self.first = self.next = 0 if snapshot is None else snapshot.chunk
        if snapshot is not None and snapshot.chunk:
            assert snapshot.position == self.position(snapshot.chunk)

    @staticmethod
    def position(chunk):
        stop = CHUNKS[chunk - 1].frame_stop
        return SourcePosition(num_frames=stop, pts=stop - 1, digest="")

    def step(self):
        chunk = CHUNKS[self.next]
        self.target.write(chunk, self.run.latents(chunk), np.arange(chunk.frame_start, chunk.frame_stop))
        self.next += 1

    def snapshot(self):
        self.checkpoints.take(self.next, self.position(self.next), SETTLED)

    @property
    def at_end(self):
        return self.next == len(CHUNKS)

    def close(self):
        if not self.at_end:
            self.target.pause()
        self.target.__exit__(None, None, None)

    def die(self):
        """As if the process had gone: the kernel takes the lock back, and the files stay as they are."""
        lock = self.target._lock
        longvid.store.lock._held.pop(lock._identity, None)
        os.close(lock._fd)
        lock._fd = -1


class Session:
    """What a session is to :func:`repair`."""

    def running(self, _):
        return nullcontext()

    @staticmethod
    def encode(_, __, path, options):
        attempt = Attempt(path, options.durability, options.mend)
        while not (attempt.at_end or attempt.target.wants_nothing_from(CHUNKS[attempt.next].latent_start)):
            attempt.step()
        attempt.close()
        frames = [0 if chunk == 0 else CHUNKS[chunk - 1].frame_stop for chunk in (attempt.first, attempt.next)]
        return SimpleNamespace(frames=frames[1], resumed_from_frame=frames[0])


class StoreMachine(RuleBasedStateMachine):
    ledger = None

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.zarr"
        (self.folder / "thesis.txt").write_text("work")
        self.attempt = None
        self.shown = 0
        "latents that readers have seen"
        self.complete = False
        self.damaged = {}
        "of every damaged file its bytes, as they were and as they are"

    def teardown(self):
        if self.attempt is not None:
            self.attempt.die()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------- what a run does

    idle = precondition(lambda self: self.attempt is None)
    busy = precondition(lambda self: self.attempt is not None)
    there = precondition(lambda self: self.attempt is None and self.published > 0)

    @initialize()
    def begin(self):
        self.attempt = Attempt(self.path, Durability(mode="rename", publish_seconds=0))

    @idle
    @rule(units=st.sampled_from([1, 2, None]), keep=st.booleans())
    def go_on(self, units, keep):
        seconds = 0 if units is None else 1e9
        durability = Durability(mode="rename", publish_seconds=seconds, publish_units=units, keep_snapshots=keep)
        try:
            self.attempt = Attempt(self.path, durability)
        except StoreError as exc:
            assert self.complete or self.damaged, exc
            assert getattr(exc, "kind", "corrupt") in ("other", "exists", "corrupt", "mismatch"), exc
        else:
            assert not self.complete

    def carry_out(self, step):
        """Part of a run. It may end at damage that is there, by saying so, and not otherwise."""
        try:
            step()
        except StoreError as exc:
            assert self.damaged, exc
            self.attempt.target.__exit__(type(exc), exc, None)
            self.attempt = None

    @busy
    @rule(count=st.integers(1, 4))
    def write(self, count):
        def step():
            for _ in range(min(count, len(CHUNKS) - self.attempt.next)):
                self.attempt.step()

        self.carry_out(step)

    @precondition(lambda self: self.attempt is not None and self.attempt.next > 0)
    @rule()
    def snapshot(self):
        self.carry_out(self.attempt.snapshot)

    @busy
    @rule()
    def close(self):
        attempt = self.attempt
        self.carry_out(attempt.close)
        self.attempt = None
        self.complete = self.complete or (attempt.at_end and self.status == "complete")

    @busy
    @rule(piece=st.sampled_from([".zarr.json.partial", "t/.c.0.partial", "latents/c.18.0.0.0"]))
    def die(self, piece):
        self.attempt.die()
        self.attempt = None
        if (self.path / piece).parent.is_dir() and self.published:
            (self.path / piece).write_bytes(b"half")

    @busy
    @rule(survived=st.integers(0, 16))
    def die_while_it_publishes(self, survived):
        """Before one of the replacements of files that make a step."""
        real, done = os.replace, []

        def replace(*paths):
            if len(done) == survived:
                raise KeyboardInterrupt
            done.append(paths)
            real(*paths)

        target = self.attempt.target
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                if target.num_units > target.committed_units:
                    target.commit()
            except KeyboardInterrupt:
                pass
            except StoreError as exc:
                assert self.damaged, exc
        self.attempt.die()
        self.attempt = None

    # ------------------------------------------------------------------------------------------- what happens to it

    @precondition(lambda self: self.attempt is None and self.published > 0 and len(self.damaged) < 3)
    @rule(data=st.data())
    def corrupt(self, data):
        name = data.draw(st.sampled_from(sorted(set(self.published_files()) - set(self.damaged))))
        content = (self.path / name).read_bytes()
        changed = bytearray(content)
        if name.count("/") == 1 and name.endswith("zarr.json"):
            del changed[len(content) // 2 :]  # a flip of a length may give a shorter one, as a killed run leaves it
        else:
            bit = data.draw(st.integers(0, 8 * len(content) - 1))
            changed[bit // 8] ^= 1 << bit % 8
        self.damaged[name] = content, bytes(changed)
        (self.path / name).write_bytes(changed)

    @there
    @rule()
    def lose_the_newest_snapshot(self):
        for path in snapshots_in(self.path / PRIVATE / "snapshots")[-1:]:
            path.write_bytes(path.read_bytes()[:-1])

    @there
    @rule()
    def verify(self):
        try:
            found = verify(self.path)
        except StoreError:
            assert {"zarr.json", f"{PRIVATE}/root.json"} <= self.damaged.keys()
            return
        assert found.ok == (not self.damaged), found.explain()
        if "zarr.json" not in self.damaged:
            for name in self.damaged:
                if name.startswith("latents/c."):
                    assert any(damage.unit == int(name.split(".")[1]) for damage in found.damages)
        if self.ledger is not None and self.damaged:
            self.ledger.add("machine: found", survived=not found.ok)

    @precondition(lambda self: self.attempt is None and self.published > 0 and self.damaged)
    @rule()
    def repair(self):
        copy = (self.path / PRIVATE / "root.json").read_bytes()
        try:
            with patch("longvid.runtime.repair.encode_video", Session.encode):
                report = repair(Session(), self.path, source=VIDEO)
        except StoreError as exc:
            assert len(self.damaged) > 1, exc  # of two witnesses both are gone
            assert exc.kind == "corrupt", exc
            for name, (content, there) in self.damaged.items():
                assert (self.path / name).read_bytes() in (content, there), name
                (self.path / name).write_bytes(content)
        else:
            assert report.ok, report.explain()
            if "zarr.json" in self.damaged:  # a copy may be one step behind, and with it what comes back
                assert (self.path / "zarr.json").read_bytes() == copy
                self.shown = self.published_in(copy)
                self.complete = json.loads(copy)["attributes"]["longvid"]["status"] == "complete"
            else:
                for name, (content, _) in self.damaged.items():
                    # a run that died may have left rows in these that were never published, and do not come back
                    beyond = not self.complete and name.partition("/")[0] in (*COORDINATE_NAMES, "digest")
                    assert beyond or (self.path / name).read_bytes() == content, name
            if self.ledger is not None:
                self.ledger.add("machine: repaired", survived=report.ok)
        self.damaged.clear()
        assert verify(self.path).ok

    @busy
    @rule()
    def others_keep_away(self):
        for call in (lambda path: Attempt(path, Durability()), verify):
            with pytest.raises(StoreError) as caught:
                call(self.path)
            assert caught.value.kind == "locked" or self.damaged

    @rule()
    def read(self):
        try:
            store = open_store(self.path)
            latents = store.read(0, store.num_latents)
        except StoreError as exc:
            assert self.damaged or not self.published, exc
            return
        np.testing.assert_array_equal(latents, TRUTH[: len(latents)])
        if "zarr.json" not in self.damaged:
            assert len(latents) >= self.shown

    # ------------------------------------------------------------------------------------------- what always holds

    @property
    def root(self):
        """The root metadata as it was before anything happened to it."""
        content, _ = self.damaged.get("zarr.json", (None, None))
        if content is None and (self.path / "zarr.json").is_file():
            content = (self.path / "zarr.json").read_bytes()
        return content

    @staticmethod
    def members(root):
        return {} if root is None else json.loads(root).get("consolidated_metadata", {}).get("metadata", {})

    def published_in(self, root):
        members = self.members(root)
        return members["latents"]["shape"][0] if members else 0

    @property
    def published(self):
        return self.published_in(self.root)

    @property
    def status(self):
        return json.loads(self.root)["attributes"]["longvid"]["status"]

    def published_files(self):
        yield from ("zarr.json", f"{PRIVATE}/root.json")
        for name, member in self.members(self.root).items():
            if (self.path / name / "zarr.json").is_file():
                yield f"{name}/zarr.json"
            rows, length = member["shape"][0], member["chunk_grid"]["configuration"]["chunk_shape"][0]
            yield from (f"{name}/c.{i}" + ".0" * (len(member["shape"]) - 1) for i in range(-(-rows // length)))

    @invariant()
    def what_was_published_stays(self):
        for name, (_, there) in list(self.damaged.items()):
            if (self.path / name).read_bytes() != there:
                del self.damaged[name]  # a run wrote it anew
        assert self.published >= self.shown
        self.shown = self.published
        assert {path.name for path in self.folder.iterdir()} <= {"a.zarr", "thesis.txt"}
        assert (self.folder / "thesis.txt").read_text() == "work"
        if self.complete:
            assert self.status == "complete"
            assert self.published == len(TRUTH)


@pytest.mark.timeout(3600)
def test_a_store_in_any_order_of_events(monkeypatch, ledger, all_faults):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: UNIT)
    monkeypatch.setattr(StoreMachine, "ledger", ledger)
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=300 if all_faults else 12,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate],
            derandomize=not all_faults,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_machine_sees_a_run_that_goes_on_from_a_wrong_state(monkeypatch):
    """Negative control: without the contexts of the snapshot, the latents are other ones, and that is noticed."""
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: UNIT)
    monkeypatch.setattr(Recurrence, "_restore", lambda *_: None)
    machine = StoreMachine()
    try:
        machine.begin()
        machine.write(3)
        machine.snapshot()
        machine.close()
        machine.go_on(None, False)
        machine.write(4)
        machine.close()
        with pytest.raises(AssertionError):
            machine.read()
    finally:
        machine.teardown()

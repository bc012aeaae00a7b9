"""A store in all orders of events: open, write, die, go on, corrupt, verify, repair, read, close.

What readers see is always the beginning of the same video. In place of a model stands a recurrence that forgets: a run
that starts in the middle too late computes other latents, and so does one on another machine.
"""

# ruff: noqa: PT017 - whether a step may fail depends on what happened before it

import json
import os
import shutil
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
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
from support.file_operations import foreign_paths
from support.recurrence import CHUNKS, ELSEWHERE, NUM_FRAMES, TRUTH, WARMUP, Attempt, computed

from longvid import Durability, StoreError, open_store
from longvid.planning.warmup import Warmup
from longvid.runtime.repair import repair
from longvid.store.format import COORDINATE_NAMES, PRIVATE
from longvid.store.verify import verify

UNIT = 3
VIDEO = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 16, 24, 3), dtype=np.uint8)


class Session:
    """What a session is to :func:`repair`."""

    def running(self, _):
        return nullcontext(SimpleNamespace(control=SimpleNamespace(warmup=lambda *_: WARMUP)))

    @staticmethod
    def encode(_, __, path, options):
        attempt = Attempt(path, options.durability, options.mend)
        chunks = CHUNKS[attempt.span.start : attempt.span.stop]
        for _ in chunks:
            attempt.step()
        attempt.close()
        return SimpleNamespace(frames_computed=sum(chunk.num_frames for chunk in chunks))


class StoreMachine(RuleBasedStateMachine):
    ledger = None
    in_the_middle = 0
    "runs of all machines that did not begin with frame 0"

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.zarr"
        (self.folder / "thesis.txt").write_text("work")
        self.attempt = None
        self.shown = 0
        "latents that readers have seen"
        self.complete = False
        self.accepted_at = 0
        "what was published when other values were accepted last, in a copy"
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

    @initialize(count=st.integers(0, 9))
    def begin(self, count):
        self.attempt = Attempt(self.path, Durability(mode="rename", publish_seconds=0))
        self.write_chunks(count)

    @idle
    @rule(units=st.sampled_from([1, 2, None]))
    def go_on(self, units):
        seconds = 0 if units is None else 1e9
        durability = Durability(mode="rename", publish_seconds=seconds, publish_units=units)
        try:
            self.attempt = Attempt(self.path, durability)
        except StoreError as exc:
            assert self.complete or self.damaged, exc
            assert getattr(exc, "kind", "corrupt") in ("other", "exists", "corrupt", "mismatch"), exc
        else:
            assert not self.complete
            StoreMachine.in_the_middle += self.attempt.span.start > 0

    unfinished = precondition(
        lambda self: self.attempt is None and self.published > 0 and not (self.complete or self.damaged)
    )

    @unfinished
    @rule()
    def go_on_elsewhere(self):
        """A machine that computes other values is refused by what it reproduces, and changes no byte before."""
        before = {name: (self.path / name).read_bytes() for name in (*self.published_files(), *self.left_over())}
        attempt = Attempt(self.path, Durability(mode="rename", publish_seconds=0), bias=ELSEWHERE)
        with pytest.raises(StoreError) as caught:
            attempt.finish()
        assert caught.value.kind == "mismatch"
        assert attempt.next == attempt.span.first
        assert {name: (self.path / name).read_bytes() for name in before} == before
        if self.ledger is not None:
            self.ledger.add("machine: other values refused", survived=True)

    @unfinished
    @precondition(lambda self: self.published != self.accepted_at)
    @rule()
    def accept_other_values(self):
        """In a copy: readers see where they begin, and what was there before stays."""
        self.accepted_at = self.published
        shutil.copytree(self.path, copy := self.folder / "copy.zarr")
        published, frames = self.published, json.loads(self.root)["attributes"]["longvid"]["num_frames"]
        attempt = Attempt(copy, Durability(mode="rename", publish_seconds=1e9), resume="close", bias=ELSEWHERE)
        attempt.finish()
        found, store = verify(copy), open_store(copy)
        assert found.ok, found.explain()
        assert found.complete
        assert [seam.frame for seam in found.seams] == [frames]
        expected = np.concatenate([TRUTH[:published], computed(ELSEWHERE)[published:]])
        np.testing.assert_array_equal(store.read(0, store.num_latents), expected)
        shutil.rmtree(copy)

    def carry_out(self, step):
        """Part of a run. It may end at damage that is there, by saying so, and not otherwise."""
        try:
            step()
        except StoreError as exc:
            assert self.damaged, exc
            self.attempt.target.__exit__(type(exc), exc, None)
            self.attempt = None

    def write_chunks(self, count):
        for _ in range(min(count, len(CHUNKS) - self.attempt.next)):
            self.attempt.step()

    @busy
    @rule(count=st.integers(1, 4))
    def write(self, count):
        self.carry_out(lambda: self.write_chunks(count))

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
        """Before one of the replacements of files that take a store over or make a commit."""
        real, done = os.replace, []

        def replace(*paths):
            if threading.current_thread() is threading.main_thread():  # not those of zarr
                if len(done) == survived:
                    raise KeyboardInterrupt
                done.append(paths)
            real(*paths)

        target = self.attempt.target
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                while not (self.attempt.at_end or done or target.num_units > target.committed_units):
                    self.attempt.step()
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
    @rule(length=st.integers(0, 100))
    def damage_the_seek_points(self, length):
        (self.path / PRIVATE / "seek").write_bytes(b"\1" * length)

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
                    beyond = not self.complete and name.partition("/")[0] in (*COORDINATE_NAMES["latents"], "digest")
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

    def left_over(self):
        """Files of chunks that were written and not published."""
        return [path.relative_to(self.path) for path in self.path.glob("latents/c.*")]

    @invariant()
    def what_was_published_stays(self):
        for name, (_, there) in list(self.damaged.items()):
            if (self.path / name).read_bytes() != there:
                del self.damaged[name]  # a run wrote it anew
        assert self.published >= self.shown
        self.shown = self.published
        assert foreign_paths(self.path) == []
        assert {path.name for path in self.folder.iterdir()} <= {"a.zarr", "thesis.txt"}
        assert (self.folder / "thesis.txt").read_text() == "work"
        if self.complete:
            assert self.status == "complete"
            assert self.published == len(TRUTH)


@pytest.mark.timeout(3600)
def test_a_store_in_any_order_of_events(monkeypatch, ledger, all_faults):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: UNIT)
    monkeypatch.setattr(StoreMachine, "ledger", ledger)
    monkeypatch.setattr(StoreMachine, "in_the_middle", 0)
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
    assert StoreMachine.in_the_middle >= (100 if all_faults else 4)


@pytest.mark.parametrize("proof", [True, False])
@pytest.mark.parametrize("chunks", [WARMUP.chunks, WARMUP.chunks - 1])
def test_the_machine_sees_a_run_that_starts_too_late(monkeypatch, tmp_path, chunks, proof):
    """Negative control: with a warm-up that is one chunk too short the latents are other ones. The proof refuses them,
    and without a proof readers would get them."""
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: UNIT)
    eager, path = Durability(mode="rename", publish_seconds=0), tmp_path / "a.zarr"
    attempt = Attempt(path, eager)
    while attempt.target.committed_units < 5:
        attempt.step()
    attempt.close()
    root, warmup = (path / "zarr.json").read_bytes(), Warmup(direction="encode", chunks=chunks, ready={}, begins={})
    attempt, is_short = Attempt(path, eager, warmup=warmup, proof=proof), chunks < WARMUP.chunks
    assert attempt.span.start > 0
    with pytest.raises(StoreError, match="computed again") if is_short and proof else nullcontext():
        attempt.finish()
    store = open_store(path)
    latents = store.read(0, store.num_latents)
    assert np.array_equal(latents, TRUTH[: len(latents)]) == (proof or not is_short)
    assert ((path / "zarr.json").read_bytes() == root) == (proof and is_short)

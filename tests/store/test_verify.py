"""What verify says: which frames, in which words, and that it is right about stores that nobody damaged."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stores import PLAN, files, frame_store, latents_of, write, writer

from longvid import StoreError
from longvid.cli.commands import main
from longvid.store.format import PRIVATE, with_checksum
from longvid.store.reader import open_reader
from longvid.store.verify import Damage, Verification, verify
from longvid.store.writer import StoreWriter

UNIT = 4
"latents"
NUM_FRAMES = 57
"15 latents: three whole units and a shorter one"
COPY = f"{PRIVATE}/root.json"


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", UNIT * 16 * 2 * 3 * 2)


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "a.zarr", NUM_FRAMES, fingerprint={"made": "here"})
    return tmp_path / "a.zarr"


def begun(path, num_chunks):
    """A store that a run left unfinished."""
    with writer(path, fingerprint={"made": "here"}) as target:
        for chunk in list(PLAN.chunks(NUM_FRAMES))[:num_chunks]:
            target.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop) * 2)
        target.pause()


def damaged(path, name):
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def frames_of_unit(unit):
    return PLAN.frame_range(unit * UNIT)[0], min(PLAN.frame_range(unit * UNIT + UNIT - 1)[1], NUM_FRAMES)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10))))
def test_frame_ranges_are_those_of_all_damage_merged(spans):
    damages = [Damage(kind="data", name="x", what="y", frames=(a, a + n)) for a, n in spans]
    damages += [Damage(kind="metadata", name="x", what="y")]
    found = Verification(path="a", num_frames=50, num_units=1, complete=True, damages=tuple(damages))
    ranges = found.frame_ranges
    covered = [frame for start, stop in ranges for frame in range(start, stop)]
    assert set(covered) == {frame for a, n in spans for frame in range(a, a + n)}
    assert len(covered) == len(set(covered))
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    assert json.loads(json.dumps(found.to_dict()))["damaged_frames"] == [list(pair) for pair in ranges]


def test_what_is_whole_is_ok_and_nothing_is_changed(store):
    before = files(store)
    found = verify(store)
    assert (found.ok, found.complete, found.num_frames, found.num_units) == (True, True, NUM_FRAMES, 4)
    assert found.frame_ranges == []
    assert "complete, 57 frames in 4 commit units; everything is as it was committed" in found.explain()
    assert files(store) == before


@pytest.mark.parametrize("unit", range(4))
def test_damage_to_a_unit_concerns_its_frames_and_no_others(store, unit, capsys):
    damaged(store, f"latents/c.{unit}.0.0.0")
    found = verify(store)
    start, stop = frames_of_unit(unit)
    assert [(d.kind, d.unit) for d in found.damages] == [("data", unit)]
    assert found.frame_ranges == [(start, stop)]
    assert f"damaged frames: {start} to {stop - 1};" in found.explain()
    assert main(["verify", str(store)]) == 1
    assert f"latents/c.{unit}.0.0.0: damaged; frames {start} to {stop - 1}" in capsys.readouterr().out
    assert main(["verify", str(store), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged_frames"] == [[start, stop]]


def test_every_unit_of_a_store_of_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 90 * 120 * 3 * 4)
    with frame_store(tmp_path / "f.zarr") as target:
        target.write(np.random.default_rng(0).integers(0, 256, (20, 90, 120, 3), dtype=np.uint8), np.arange(20))
    for unit, frames in enumerate([(0, 8), (8, 16), (16, 20)]):
        file = tmp_path / "f.zarr" / "frames" / f"c.{unit}.0.0.0"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert verify(tmp_path / "f.zarr").frame_ranges == [frames]
        file.write_bytes(whole)
    assert verify(tmp_path / "f.zarr").ok


def test_the_list_of_damage_is_cut_short_for_people_only(store):
    found = verify(store)
    many = replace(found, damages=tuple(Damage(kind="data", name=f"n{i}", what="x") for i in range(23)))
    assert "and 3 more (--json lists them)" in many.explain()
    assert len(many.to_dict()["damages"]) == 23


@pytest.mark.parametrize("num_chunks", range(8))
def test_an_unfinished_store_is_whole_and_its_damage_is_found(tmp_path, num_chunks):
    path = tmp_path / "a.zarr"
    begun(path, num_chunks)
    units = PLAN.full(num_chunks - 1).latent_stop // UNIT if num_chunks else 0
    found = verify(path)
    assert (found.ok, found.complete, found.num_units) == (True, False, units), found.explain()
    if units:
        assert found.num_frames == PLAN.frame_range(units * UNIT - 1)[1]
        damaged(path, f"latents/c.{units - 1}.0.0.0")
        assert verify(path).frame_ranges == [frames_of_unit(units - 1)]


def test_what_a_killed_run_leaves_is_whole(tmp_path):
    """Chunks that were never published, a copy and metadata of arrays that are one step behind, pieces of files."""
    behind, path = tmp_path / "behind.zarr", tmp_path / "a.zarr"
    begun(behind, 3)
    begun(path, 3)
    begun(path, 7)
    for name, content in files(behind).items():
        if name.name in ("root.json", "zarr.json") and len(name.parts) > 1:
            (path / name).write_bytes(content)
    (path / "latents" / "c.3.0.0.0").write_bytes(b"half")
    (path / "t" / ".c.0.partial").write_bytes(b"half")
    (path / PRIVATE / "lock").write_bytes(b"{}")
    found = verify(path)
    assert found.ok, found.explain()
    damaged(path, "latents/c.2.0.0.0")
    assert [(d.kind, d.unit) for d in verify(path).damages] == [("data", 2)]


def test_what_is_left_over_in_a_complete_store_and_what_is_foreign(store):
    (store / "latents" / "c.4.0.0.0").write_bytes(b"x")
    (store / ".zarr.json.partial").write_bytes(b"x")
    (store / "t" / "notes.txt").write_bytes(b"x")
    (store / "folder").mkdir()
    (store / "folder" / "more.txt").write_bytes(b"x")
    found = verify(store)
    assert {(d.kind, d.name) for d in found.damages} == {
        ("stale", "latents/c.4.0.0.0"), ("stale", ".zarr.json.partial"),
        ("foreign", "t/notes.txt"), ("foreign", "folder/more.txt"),
    }  # fmt: skip
    assert found.frame_ranges == []


def test_a_store_that_is_being_written_is_left_alone(tmp_path):
    with writer(tmp_path / "a.zarr") as target:
        for chunk in PLAN.chunks(NUM_FRAMES):
            target.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop) * 2)
            with pytest.raises(StoreError, match="is being written; verify it when the run has ended") as caught:
                verify(tmp_path / "a.zarr")
            assert caught.value.kind == "locked"
    assert verify(tmp_path / "a.zarr").ok


def test_what_is_no_store_is_said(tmp_path, store):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for name, kind in {"nothing": "missing", "file": "missing", "folder": "foreign"}.items():
        with pytest.raises(StoreError) as caught:
            verify(tmp_path / name)
        assert caught.value.kind == kind
    for name in ("zarr.json", COPY):
        damaged(store, name)
    with pytest.raises(StoreError, match="are both damaged") as caught:
        verify(store)
    assert caught.value.kind == "corrupt"
    assert main(["verify", str(store)]) > 1


# ------------------------------------------------------------------------------------------- the root and its copy


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A complete store, and its root metadata as each step of its two runs left it."""
    seen, write_root = [], StoreWriter._write_root

    def noted(self, members):
        write_root(self, members)
        seen.append((self.path / "zarr.json").read_bytes())

    monkeypatch.setattr(StoreWriter, "_write_root", noted)
    begun(tmp_path / "a.zarr", 4)
    assert len(seen) > 2
    write(tmp_path / "a.zarr", 61, fingerprint={"made": "here"})  # 16 latents: the last step changes the status only
    return tmp_path / "a.zarr", seen


def test_an_older_root_that_is_put_back_is_found_whichever_it_is(steps):
    path, seen = steps
    for number, older in enumerate(seen[:-1]):
        (path / "zarr.json").write_bytes(older)
        found = verify(path)
        assert not found.ok, number
        assert found.frame_ranges == [(0, 61)]
        assert open_reader(path, strict=False).content == seen[-1]
    (path / "zarr.json").write_bytes(seen[-1])
    assert verify(path).ok


def test_an_older_copy_is_found_in_a_complete_store_and_may_be_there_in_an_unfinished_one(tmp_path, steps):
    path, seen = steps
    for older in seen[:-1]:
        (path / COPY).write_bytes(older)
        assert [d.name for d in verify(path).damages] == [COPY]
    del seen[:]
    begun(tmp_path / "b.zarr", 5)
    assert len(seen) > 2
    for older in seen[:-1]:
        (tmp_path / "b.zarr" / COPY).write_bytes(older)
        assert verify(tmp_path / "b.zarr").ok


def test_two_whole_roots_that_contradict_each_other(store):
    whole = (store / "zarr.json").read_bytes()
    root = json.loads(whole)
    root["attributes"]["longvid"]["created_by"] = "somebody"
    other = with_checksum(root)
    for root, copy in ((other, whole), (whole, other)):
        (store / "zarr.json").write_bytes(root)
        (store / COPY).write_bytes(copy)
        found = verify(store)
        assert [d.kind for d in found.damages] == ["root"]
        assert "contradict each other" in found.explain()
        assert open_reader(store, strict=False).disputed


def test_of_two_whole_roots_the_one_that_fits_the_store_is_right(store, tmp_path):
    write(tmp_path / "b.zarr", NUM_FRAMES - 8, fingerprint={"made": "here"})
    damaged(tmp_path / "b.zarr", "zarr.json")
    whole, other = (store / "zarr.json").read_bytes(), (tmp_path / "b.zarr" / COPY).read_bytes()
    for root, copy, name in ((other, whole, "zarr.json"), (whole, other, COPY)):
        (store / "zarr.json").write_bytes(root)
        (store / COPY).write_bytes(copy)
        assert [d.name for d in verify(store).damages] == [name]
        assert open_reader(store, strict=False).content == whole

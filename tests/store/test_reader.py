"""The store as other readers see it, and what it does when things go wrong."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TESTS
from support.stores import PLAN, SHAPE, files, frame_store, latents_of, video, write, writer, xr_open

from longvid import SourceError, StoreError, open_store
from longvid.media.sources import open_source
from longvid.schedule import ChunkSchedule
from longvid.store.durability import Durability
from longvid.store.format import OWN_NAMES, PRIVATE
from longvid.store.target import check_target
from longvid.store.validation import read_document


def test_xarray_and_tensorstore_read_it_without_a_word(tmp_path):
    expected = write(tmp_path / "a.zarr", 300)
    data = xr_open(tmp_path / "a.zarr")
    assert data.latents.dims == ("t", "c", "y", "x")
    assert set(data.latents.coords) == {"t", "frame_start", "frame_stop"}
    np.testing.assert_array_equal(data.latents, expected.astype(np.float16))
    np.testing.assert_array_equal(data.frame_pts, np.arange(300) * 2)
    np.testing.assert_allclose(data.t[:3], [0, 2 / 24, 10 / 24])
    for name in ("latents", "t", "frame_start", "frame_stop", "frame_pts"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a.zarr" / name)}}
        other = tensorstore.open(spec, open=True).result()
        np.testing.assert_array_equal(other[...].read().result(), data[name])


def test_the_layout_follows_the_conventions(tmp_path):
    write(tmp_path / "a.zarr", 30, representation="mode", extra={"seed": 4})
    root = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    attributes = root["attributes"]
    assert attributes["Conventions"] == "CF-1.11"
    assert attributes["longvid"]["chunk_plan"] == PLAN.to_dict()
    assert {k: attributes["longvid"][k] for k in ("status", "num_frames", "scaled", "seed", "frame_rate")} == {
        "status": "complete", "num_frames": 30, "scaled": False, "seed": 4, "frame_rate": "24/1",
    }  # fmt: skip
    assert attributes["source"]["color"]["matrix"] == "bt709"
    assert attributes["ome"]["multiscales"][0]["datasets"][0]["path"] == "latents"
    members = root["consolidated_metadata"]["metadata"]
    assert all(m["dimension_names"] for m in members.values())
    latents = members["latents"]
    assert latents["fill_value"] == "NaN"
    assert [c["name"] for c in latents["codecs"]] == ["bytes", "blosc", "crc32c"]
    shuffles = {name: m["codecs"][1]["configuration"]["shuffle"] for name, m in members.items()}
    assert (shuffles["latents"], shuffles["frame_valid"]) == ("bitshuffle", "noshuffle")
    assert all(m["codecs"][-1]["name"] == "crc32c" for m in members.values())
    assert {p.name for p in (tmp_path / "a.zarr").iterdir()} <= OWN_NAMES
    assert [p.name for p in (tmp_path / "a.zarr" / PRIVATE).iterdir()] == ["root.json"]


def test_the_published_metadata_is_what_zarr_itself_would_consolidate(tmp_path):
    write(tmp_path / "a.zarr", 30)
    ours = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(tmp_path / "a.zarr")
    assert json.loads((tmp_path / "a.zarr" / "zarr.json").read_text()) == ours


@settings(max_examples=20)
@given(
    st.integers(1, 60),
    st.sampled_from([(8, 4), (4, 4), (6, 2), (5, 1), (16, 8)]),
    st.sampled_from([(1, 1, 1), (16, 2, 3), (4, 64, 64), (16, 300, 400)]),
    st.sampled_from(["float16", "float32"]),
)
def test_any_video_comes_back(num_frames, plan, shape, dtype):
    plan = ChunkSchedule(chunk_frames=plan[0], frames_per_latent=plan[1])
    if shape[1] > 100:
        num_frames = min(num_frames, 9)
    with tempfile.TemporaryDirectory() as folder:
        expected = write(Path(folder) / "a.zarr", num_frames, plan=plan, shape=shape, dtype=dtype)
        store = open_store(Path(folder) / "a.zarr")
        assert (store.num_frames, store.complete, store.schedule) == (num_frames, True, plan)
        assert store.num_latents == plan.num_latents(num_frames)
        np.testing.assert_array_equal(store.latents[:], expected.astype(dtype))
        np.testing.assert_array_equal(store.frame_pts, np.arange(num_frames) * 2)
        data = xr_open(Path(folder) / "a.zarr")
        starts, stops = data.frame_start.values, data.frame_stop.values
        assert starts[0] == 0
        assert stops[-1] == num_frames
        np.testing.assert_array_equal(starts[1:], stops[:-1])
        np.testing.assert_allclose(data.t.values[stops > starts], (starts / 12)[stops > starts], rtol=1e-14)
        assert (np.diff(data.t.values) > 0).all()


def test_a_reader_in_the_middle_sees_a_consistent_prefix(tmp_path):
    seen = set()
    with writer(tmp_path / "a.zarr", shape=(16, 60, 90)) as store:
        for chunk in PLAN.chunks(200):
            store.write(chunk, latents_of(chunk, (16, 60, 90)), np.arange(chunk.frame_start, chunk.frame_stop))
            if chunk.index == 0:
                with pytest.raises(StoreError, match="nothing was committed yet"):
                    open_store(tmp_path / "a.zarr")
            else:
                try:
                    now = open_store(tmp_path / "a.zarr")
                except StoreError:
                    continue
                assert not now.complete
                data = xr_open(tmp_path / "a.zarr")
                assert not np.isnan(data.latents).any()
                assert data.frame_stop[-1] == len(data.frame_pts) == now.num_frames
                seen.add(now.num_frames)
    assert len(seen) > 3
    assert open_store(tmp_path / "a.zarr").complete


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from support.stores import *
count, real = 0, os.replace
def replace(*args, **options):
    global count
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    real(*args, **options)
os.replace = replace
with writer(sys.argv[1], shape=(16, 60, 90)) as store:
    for chunk in PLAN.chunks(4000):
        store.write(chunk, latents_of(chunk, (16, 60, 90)), np.arange(chunk.frame_start, chunk.frame_stop))
"""


@pytest.mark.parametrize("at", [30, 31, 80])
def test_a_killed_writer_leaves_finished_frames_only(tmp_path, at):
    """Killed before it renames a file for the nth time."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.zarr"), str(TESTS), str(at)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    store = open_store(tmp_path / "a.zarr")
    assert not store.complete
    assert store.num_frames > 0
    expected = np.concatenate([latents_of(c, (16, 60, 90)) for c in PLAN.chunks(store.num_frames)])
    data = xr_open(tmp_path / "a.zarr")
    np.testing.assert_array_equal(data.latents, expected[: store.num_latents].astype(np.float16))
    # and the next run may start over
    write(tmp_path / "a.zarr", 9, overwrite=True, resume="never")
    assert open_store(tmp_path / "a.zarr").num_frames == 9


def chunk_file(path):
    return min((path / "latents").glob("c.*"))


def test_damage_is_never_returned_as_data(tmp_path):
    write(tmp_path / "a.zarr", 30)
    file = chunk_file(tmp_path / "a.zarr")
    whole = file.read_bytes()
    store = open_store(tmp_path / "a.zarr")
    for at in range(0, len(whole) * 8, 997):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged") as caught:
            store.read(0, 3)
        assert caught.value.kind == "corrupt"
    for length in (1, 3, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="damaged"):
            store.read(0, 3)
    for gone in (lambda: file.write_bytes(b""), file.unlink):
        gone()
        with pytest.raises(StoreError, match=r"damaged|missing"):
            store.read(0, 3)
    file.write_bytes(whole)
    assert store.read(0, 3).dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0, -70000.0])
@pytest.mark.parametrize("late", [False, True])
def test_values_that_do_not_fit_are_refused(tmp_path, value, late):
    shape = (16, 300, 400) if late else SHAPE
    chunks = list(PLAN.chunks(30))
    with pytest.raises(StoreError) as caught, writer(tmp_path / "a.zarr", shape=shape) as store:
        for chunk in chunks[: 2 if late else 0]:
            store.write(chunk, latents_of(chunk, shape), np.arange(chunk.frame_start, chunk.frame_stop))
        bad = chunks[2 if late else 0]
        z = latents_of(bad, shape)
        z[0, 3, 1, 1] = value
        store.write(bad, z, np.arange(bad.frame_start, bad.frame_stop))
    assert caught.value.kind == "range"
    assert ("--store-dtype float32" in str(caught.value)) == (abs(value) == 70000)
    if late:  # what was published before stays
        left = open_store(tmp_path / "a.zarr")
        assert not left.complete
        assert left.num_frames == 17
    else:
        assert list(tmp_path.iterdir()) == []


def test_float32_holds_what_float16_does_not(tmp_path):
    chunk = PLAN.tail(0, 1)
    with writer(tmp_path / "a.zarr", dtype="float32") as store:
        store.write(chunk, np.full((1, *SHAPE), 70000, np.float32), np.zeros(1, np.int64))
    assert open_store(tmp_path / "a.zarr").latents[0, 0, 0, 0] == 70000


def test_latents_of_a_wrong_shape_or_dtype_are_refused(tmp_path):
    first, second = list(PLAN.chunks(17))
    for z in (latents_of(second), latents_of(first).astype(np.float64)):
        with pytest.raises(StoreError, match="is expected"), writer(tmp_path / "a.zarr") as store:
            store.write(first, z, np.arange(9))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_before_the_first_publish_leaves_nothing_and_after_it_a_prefix(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a.zarr"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="no frames"), writer(tmp_path / "a.zarr"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), writer(tmp_path / "a.zarr") as store:
        for chunk in PLAN.chunks(2000):
            store.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop))
            if chunk.index == 50:
                raise KeyError
    left = open_store(tmp_path / "a.zarr")
    assert (left.complete, left.num_frames > 0) == (False, True)


def test_nothing_foreign_is_touched(tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "thesis.txt").write_text("work")
    file.write_text("work")
    link.symlink_to(folder)
    other = tmp_path / "other.zarr"
    zarr.create_group(other)
    mixed = tmp_path / "mixed.zarr"
    write(mixed, 9)
    (mixed / "notes.txt").write_text("work")
    before = files(tmp_path)
    for path in (folder, file, link, other, mixed):
        for overwrite in (False, True):
            with pytest.raises(StoreError) as caught:
                check_target(path)
            assert caught.value.kind == "foreign"
            with pytest.raises(StoreError), writer(path, overwrite=overwrite):
                pass
    with pytest.raises(StoreError, match="there is no folder") as caught:
        check_target(tmp_path / "no" / "a.zarr")
    assert files(tmp_path) == before


def test_files_and_addresses_are_not_stores(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"video")
    with pytest.raises(StoreError, match="is a file and not a store"):
        open_store(tmp_path / "clip.mp4")
    for look in (open_store, check_target):
        with pytest.raises(StoreError, match=r"^s3://bucket/a\.zarr is an address"):
            look("s3://bucket/a.zarr")


def test_overwrite_and_empty_folders(tmp_path):
    write(tmp_path / "a.zarr", 30)
    found, before = check_target(tmp_path / "a.zarr"), files(tmp_path)
    with pytest.raises(StoreError, match="a complete store of 30 frames; --overwrite"):
        found.decide({}, overwrite=False, resume="never")
    with pytest.raises(StoreError, match=r"source\.sha256 is missing in the store and 17 in this run") as caught:
        found.decide({"source": {"sha256": 17}}, overwrite=False, resume="exact")
    assert caught.value.kind == "mismatch"
    assert found.decide({}, overwrite=False, resume="exact") == "done"
    assert files(tmp_path) == before
    write(tmp_path / "a.zarr", 5, overwrite=True)
    assert open_store(tmp_path / "a.zarr").num_frames == 5
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 5)


def test_a_foreign_file_that_appears_meanwhile_survives_a_failure(tmp_path):
    with pytest.raises(KeyError), writer(tmp_path / "a.zarr"):
        (tmp_path / "a.zarr" / "thesis.txt").write_text("work")
        raise KeyError
    assert (tmp_path / "a.zarr" / "thesis.txt").read_text() == "work"


@pytest.mark.skipif(sys.platform != "linux", reason="file-size limits and their signal are Linux's")
def test_a_disk_that_says_no_is_a_store_error(tmp_path):
    """A file-size limit stands in for a full disk: the kernel refuses the write for real."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from support.stores import *; from longvid.errors import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: write(sys.argv[1], 100, shape=(16, 60, 90))\n"
        "except StoreError as e: print(e)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.zarr"), str(TESTS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "cannot be written: File too large; make room" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    zarr.create_group(tmp_path / "other.zarr")
    write(tmp_path / "newer.zarr", 9)
    write(tmp_path / "broken.zarr", 9)
    write(tmp_path / "half.zarr", 9)
    newer = tmp_path / "newer.zarr" / "zarr.json"
    newer.write_text(newer.read_text().replace('"format_version": 2', '"format_version": 3'))
    broken = tmp_path / "broken.zarr" / "zarr.json"
    broken.write_text(broken.read_text()[:200])
    half = json.loads((tmp_path / "half.zarr" / "zarr.json").read_text())
    del half["consolidated_metadata"]["metadata"]["latents"]
    (tmp_path / "half.zarr" / "zarr.json").write_text(json.dumps(half))
    with frame_store(tmp_path / "frames.zarr", (2, 2), frame_rate=None) as store:
        store.write(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64))
    for name, kind in {
        "nothing.zarr": "missing", "folder": "foreign", "other.zarr": "foreign", "newer.zarr": "format",
        "broken.zarr": "corrupt", "half.zarr": "corrupt", "frames.zarr": "format",
    }.items():  # fmt: skip
        with pytest.raises(StoreError) as caught:
            open_store(tmp_path / name)
        assert caught.value.kind == kind, name


def test_frames_come_back_black_ones_too(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (300, 90, 120, 3), dtype=np.uint8)
    frames[100:200] = 0
    with frame_store(tmp_path / "f.zarr", time_base=Fraction(1, 50)) as store:
        for at in range(0, 300, 7):
            part = frames[at : at + 7]
            store.write(part, np.arange(at, at + len(part)) * 2)
    data = xr_open(tmp_path / "f.zarr")
    np.testing.assert_array_equal(data.frames, frames)
    np.testing.assert_allclose(data.t, np.arange(300) / 25)
    assert len(list((tmp_path / "f.zarr" / "frames").glob("c.*"))) == -(-300 // store.unit_rows)
    with pytest.raises(StoreError, match="are expected"), frame_store(tmp_path / "g.zarr", frame_rate=None) as store:
        store.write(frames[:, :50], np.arange(300))


def test_moments(tmp_path):
    with writer(tmp_path / "a.zarr", representation="moments") as store:
        for chunk in PLAN.chunks(20):
            mean = latents_of(chunk)
            pts = np.arange(chunk.frame_start, chunk.frame_stop)
            store.write(chunk, mean, pts, np.concatenate([mean, -np.abs(mean)], axis=1))
    opened = open_store(tmp_path / "a.zarr")
    np.testing.assert_array_equal(opened.moments[:, :16], opened.latents[:])
    assert xr_open(tmp_path / "a.zarr").moments.dims == ("t", "c2", "y", "x")


def test_variable_frame_rate_times(tmp_path):
    pts = np.array([0, 10, 11, 40, 41, 42, 43, 100, 101, 102])
    plan = ChunkSchedule(chunk_frames=4, frames_per_latent=4)
    with writer(tmp_path / "a.zarr", plan=plan, source=video(Fraction(1, 10), None)) as store:
        for chunk in plan.chunks(10):
            store.write(chunk, latents_of(chunk), pts[chunk.frame_start : chunk.frame_stop])
    data = xr_open(tmp_path / "a.zarr")
    np.testing.assert_allclose(data.t, np.array([0, 10, 42, 102]) / 10)
    np.testing.assert_array_equal(data.frame_pts, pts)
    assert open_store(tmp_path / "a.zarr").frame_rate is None


def test_a_store_of_frames_cut_short_is_not_a_source(tmp_path):
    """Its arrays may already be longer than what was published."""
    frames = np.full((200, 90, 120, 3), 7, np.uint8)
    with pytest.raises(KeyboardInterrupt), frame_store(tmp_path / "f.zarr") as store:
        store.write(frames, np.arange(200))
        assert store.committed_units
        raise KeyboardInterrupt
    with pytest.raises(SourceError, match="incomplete") as caught:
        open_source(tmp_path / "f.zarr")
    assert caught.value.kind == "truncated"
    with frame_store(tmp_path / "f.zarr", overwrite=True, resume="never") as store:
        store.write(frames, np.arange(200))
    with open_source(tmp_path / "f.zarr") as again:
        assert sum(len(b.frames_THWC) for b in again.blocks()) == 200


def test_a_damaged_store_of_frames_gives_nothing_but_what_was_published(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (200, 90, 120, 3), dtype=np.uint8)
    with frame_store(tmp_path / "f.zarr") as store:
        store.write(frames, np.arange(200))
    known = open_source(tmp_path / "f.zarr").fingerprint()
    chunk = tmp_path / "f.zarr" / "frames" / "c.1.0.0.0"
    shutil.copy(chunk.with_name("c.0.0.0.0"), chunk)  # whole by its own checksum
    with pytest.raises(SourceError, match=f"frames {store.unit_rows} to"), open_source(tmp_path / "f.zarr") as source:
        given = []
        for block in source.blocks():
            given += [block.frames_THWC]
    np.testing.assert_array_equal(np.concatenate(given), frames[: store.unit_rows])
    assert open_source(tmp_path / "f.zarr").fingerprint() == known  # of what was published


def test_a_store_that_grows_while_it_is_opened_is_what_its_root_said(tmp_path, monkeypatch):
    chunks, opened = list(PLAN.chunks(1500)), []
    with writer(tmp_path / "a.zarr", durability=Durability(publish_seconds=0)) as store:

        def write_until_committed(count):
            while store.committed_units < count:
                chunk = chunks.pop(0)
                store.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop))

        def read_and_grow(path):
            document = read_document(path)
            write_until_committed(2)
            return document

        write_until_committed(1)
        monkeypatch.setattr("longvid.store.reader.read_document", read_and_grow)
        opened.append(open_store(tmp_path / "a.zarr"))
        monkeypatch.undo()
        opened.append(open_store(tmp_path / "a.zarr"))
        store.pause()
    early, late = (one.num_latents for one in opened)
    assert 0 < early < late
    np.testing.assert_array_equal(opened[0].read(0, early), opened[1].read(0, late)[:early])
    np.testing.assert_array_equal(opened[0].frame_pts, opened[1].frame_pts[: opened[0].num_frames])


@pytest.mark.parametrize("survivors", [0, 1, 4])
def test_replacing_cut_short_never_shows_the_old_store_as_whole(tmp_path, monkeypatch, survivors):
    """After any number of deletions the folder is one of ours, says that it holds nothing, and can be replaced."""
    write(tmp_path / "a.zarr", 30)
    deleted, real = [], shutil.rmtree

    def rmtree(path, **options):
        if len(deleted) == survivors:
            raise KeyboardInterrupt
        deleted.append(path)
        real(path, **options)

    monkeypatch.setattr("longvid.store.staging.shutil.rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a.zarr", overwrite=True, resume="never"):
        pass
    monkeypatch.undo()
    if (tmp_path / "a.zarr").exists():
        with pytest.raises(StoreError, match="nothing was committed") as caught:
            open_store(tmp_path / "a.zarr")
        assert caught.value.kind == "incomplete"
    write(tmp_path / "a.zarr", 5, overwrite=True, resume="never")
    assert open_store(tmp_path / "a.zarr").num_frames == 5


@pytest.mark.parametrize("name", ["latents", "digest"])
def test_what_a_failed_run_cannot_remove_the_next_one_clears(tmp_path, monkeypatch, name):
    real = shutil.rmtree

    def rmtree(path, **options):
        if Path(path).name == name:
            raise OSError(24, "Too many open files")
        real(path, **options)

    monkeypatch.setattr("longvid.store.staging.shutil.rmtree", rmtree)
    never = Durability(publish_seconds=float("inf"))
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a.zarr", durability=never) as store:
        store._last_commit = float("inf")  # nor at the first unit
        for chunk in PLAN.chunks(700):
            store.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop))
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert (tmp_path / "a.zarr" / name).is_dir()
    write(tmp_path / "a.zarr", 5)
    assert open_store(tmp_path / "a.zarr").complete


def test_missing_time_stamps_are_not_data(tmp_path):
    write(tmp_path / "a.zarr", 30)
    (tmp_path / "a.zarr" / "frame_pts" / "c.0").unlink()
    with pytest.raises(StoreError, match="coordinates of frames from 0 are damaged or missing") as caught:
        open_store(tmp_path / "a.zarr")
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize("attribute", ["source", "vae"])
def test_missing_facts_are_damage(tmp_path, attribute):
    write(tmp_path / "a.zarr", 5)
    root = tmp_path / "a.zarr" / "zarr.json"
    content = json.loads(root.read_text())
    del content["attributes"][attribute]
    root.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="damaged"):
        open_store(tmp_path / "a.zarr")

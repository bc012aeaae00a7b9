"""Stores in ordinary surroundings: other users, files of the operating system, file systems without locks or fsync."""

import errno
import os

import numpy as np
import pytest
from support.stores import PLAN, frame_store, latents_of, write, writer

from longvid import StoreError, open_store
from longvid.store.durability import Durability
from longvid.store.format import PRIVATE
from longvid.store.target import check_target
from longvid.store.verify import verify

NOBODY = 65534
SYSTEM_FILES = [".DS_Store", "._latents", "Thumbs.db", "desktop.ini", "@eaDir/x", ".nfs0001", "latents/.DS_Store"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of four units, and its latents."""
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 4 * 16 * 2 * 3 * 2)
    return tmp_path / "a.zarr", write(tmp_path / "a.zarr", 57).astype(np.float16)


def begun(path):
    with writer(path) as target:
        for chunk in list(PLAN.chunks(57))[:5]:
            target.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop) * 2)
        target.pause()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_look_at_a_store(store, tmp_path):
    begun(tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / PRIVATE / "lock").write_text("{}")  # of a run that was killed
    for folder in (tmp_path, *tmp_path.parents):
        if folder != folder.parent and folder.parent != folder.parent.parent:
            folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        seen = [verify(tmp_path / name).ok and open_store(tmp_path / name).num_frames for name in ("a.zarr", "b.zarr")]
        os._exit(0 if all(seen) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_swapped_chunks_are_not_given_out(store):
    path, _ = store
    first, second = (path / "latents" / f"c.{n}.0.0.0" for n in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    opened = open_store(path)
    for read in (lambda: opened.latents[:], lambda: opened.latents[0], lambda: np.asarray(opened.latents)):
        with pytest.raises(StoreError, match="latents 0 to 3 are damaged") as caught:
            read()
        assert caught.value.kind == "corrupt"


KEYS = [
    np.s_[:], np.s_[3:9], np.s_[90:1000], np.s_[-3:], np.s_[::3], np.s_[::-2], np.s_[5], np.s_[-1], np.s_[2:7, 3],
    np.s_[..., 0], np.s_[1, ..., 1], np.s_[[1, 9, 3]], np.s_[[1, 9], :, [0, 1]], np.s_[None, 2:4], np.s_[12:3],
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_slices_are_those_of_numpy_in_memory_of_the_caller(store, key):
    opened, expected = open_store(store[0]).latents, store[1]
    found = opened[key]
    np.testing.assert_array_equal(found, expected[key])
    found[...] = 7
    np.testing.assert_array_equal(opened[key], expected[key])
    assert (opened.shape, opened.dtype, opened.ndim, len(opened)) == (expected.shape, expected.dtype, 4, len(expected))
    with pytest.raises(IndexError):
        opened[len(expected)]


def test_reading_past_the_end_gives_what_is_there(store):
    opened = open_store(store[0])
    assert opened.read(90, 1000).shape == (0, 16, 2, 3)
    np.testing.assert_array_equal(opened.read(-2, 1000), store[1][-2:].astype(np.float32))


def test_repr_is_one_line_with_shapes(store):
    text = repr(open_store(store[0]))
    assert "complete, 57 frames of 23x15, latents (15, 16, 2, 3) float16" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_files_of_the_operating_system_are_listed_and_do_no_harm(store, tmp_path, name):
    begun(tmp_path / "b.zarr")
    for path in (store[0], tmp_path / "b.zarr"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
        found = verify(path)
        assert (found.ok, found.foreign) == (True, (name,))
        assert name in found.explain()
    assert check_target(tmp_path / "b.zarr").decide({}, overwrite=False, resume="exact") == "resume"
    write(tmp_path / "b.zarr", 57)
    assert open_store(tmp_path / "b.zarr").complete


def test_a_file_system_without_locks_names_the_option(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("longvid.store.lock.fcntl.lockf", lockf)
    with pytest.raises(StoreError, match=r"a\.zarr cannot be locked: .*--no-lock"):
        write(tmp_path / "a.zarr", 9)
    write(tmp_path / "a.zarr", 9, durability=Durability(lock=False))
    assert verify(tmp_path / "a.zarr").ok


def test_a_file_system_without_fsync_names_the_option(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(StoreError, match=r"no fsync .*--durability rename"):
        write(tmp_path / "a.zarr", 9)
    write(tmp_path / "a.zarr", 9, durability=Durability(mode="rename"))
    assert verify(tmp_path / "a.zarr").ok


def test_another_model_is_named_with_the_store_and_the_option(tmp_path):
    write(tmp_path / "a.zarr", 9, fingerprint={"model": {"class_name": "A", "config": {"x": 1}}})
    other = {"model": {"class_name": "B", "config": {"x": 2}}}
    with pytest.raises(StoreError) as caught:
        check_target(tmp_path / "a.zarr").decide(other, overwrite=False, resume="exact")
    text = str(caught.value)
    assert "a.zarr" in text
    assert "model.class_name is A in the store and B in this run" in text
    assert "--model" in text
    assert "{" not in text


def test_black_frames_of_a_resumed_run_are_on_the_disk(tmp_path):
    """A chunk of fill values is a file like any other."""
    frames = np.zeros((300, 90, 120, 3), np.uint8)
    with frame_store(tmp_path / "f.zarr") as target:
        target.write(frames[:64], np.arange(64))
        target.pause()
    with frame_store(tmp_path / "f.zarr") as target:
        target.write(frames, np.arange(300))
    assert len(list((tmp_path / "f.zarr" / "frames").glob("c.*"))) == 5

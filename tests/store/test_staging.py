"""Files that are whole or not there, and a store that shows nothing before it is committed."""

import os

import numpy as np
import pytest
import tensorstore
import zarr

from longvid.files import write_durably
from longvid.store.format import array_document
from longvid.store.staging import StagedStore, is_partial, open_array


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call, old):
    path = tmp_path / "a"
    if old is not None:
        path.write_bytes(old)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new", sync=True)
    monkeypatch.undo()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])
    write_durably(path, b"new", sync=True)
    assert path.read_bytes() == b"new"


def test_pieces_and_names_of_what_is_not_finished(tmp_path):
    write_durably(tmp_path / "a", lambda file: file.writelines([b"x", b"y"]), sync=False)
    assert (tmp_path / "a").read_bytes() == b"xy"
    assert is_partial(".zarr.json.partial")
    assert is_partial("c.0.0.0." + "0" * 32 + ".partial")
    assert not is_partial("thesis.partial")
    assert not is_partial("c.0")


def length_on_disk(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return tensorstore.open(spec, open=True).result().shape[0]


def test_readers_of_a_single_array_never_run_ahead_of_what_is_committed(tmp_path):
    path = tmp_path / "a.zarr"
    store = StagedStore(path, sync=True, rewritten=lambda name: name == "t")
    documents = {
        "frames": array_document("frames", "frames", (0, 2, 1, 3), "uint8", 4),
        "t": array_document("frames", "t", (0,), "float64", 4),
    }
    path.mkdir()
    for step in range(1, 4):
        for name, rows in (("frames", np.full((4, 2, 1, 3), step, np.uint8)), ("t", np.arange(4.0) + 4 * step)):
            start = documents[name]["shape"][0]
            documents[name]["shape"][0] += 4
            open_array(store, name, documents[name])[start:] = rows
        if step > 1:  # written, not committed: direct readers see the commit before
            assert length_on_disk(path / "frames") == 4 * (step - 1)
            seen = zarr.open_array(path / "t", mode="r")
            assert seen.shape == (4 * (step - 1),)
            np.testing.assert_array_equal(seen[:], np.arange(4, 4 * step))
        assert len(list(path.rglob("zarr.json"))) == (0 if step == 1 else 3)
        store.commit(b'{"zarr_format": 3, "node_type": "group"}', documents, settled=True)
        assert length_on_disk(path / "frames") == 4 * step
    np.testing.assert_array_equal(zarr.open_array(path / "t", mode="r")[:], np.arange(4, 16))

"""Files that are whole or not there, and a store that shows nothing before it is committed."""

import json
import os

import numpy as np
import pytest
import tensorstore
import zarr

from longvid.store.staging import StagedStore, is_partial, write_durably


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
    store = StagedStore(tmp_path / "a.zarr", sync=True, rewritten=lambda name: name == "t")
    group = zarr.create_group(store, zarr_format=3)
    options = {"chunk_key_encoding": {"name": "default", "separator": "."}, "fill_value": np.nan}
    data = group.create_array("data", shape=(0, 2), chunks=(4, 2), dtype="float32", **options)
    t = group.create_array("t", shape=(0,), chunks=(64,), dtype="float64", **options)
    assert not list((tmp_path / "a.zarr").rglob("zarr.json"))
    for step in range(1, 4):
        for array, rows in ((data, np.full((4, 2), step, np.float32)), (t, np.arange(4.0) + 4 * step)):
            start = array.shape[0]
            array.resize((start + 4, *array.shape[1:]))
            array[start:] = rows
        if step > 1:  # written, not committed: direct readers see the commit before
            assert length_on_disk(tmp_path / "a.zarr" / "data") == 4 * (step - 1)
            seen = zarr.open_array(tmp_path / "a.zarr" / "t", mode="r")
            assert seen.shape == (4 * (step - 1),)
            np.testing.assert_array_equal(seen[:], np.arange(4, 4 * step))
        documents = store.documents()
        root = {"zarr_format": 3, "node_type": "group", "attributes": {"documents": len(documents)}}
        store.commit(json.dumps(root).encode(), settled=True)
        assert length_on_disk(tmp_path / "a.zarr" / "data") == 4 * step

"""Snapshots: what goes in comes out, damage is passed over, and what would spoil a video is refused."""

import numpy as np
import pytest
import safetensors.torch
import torch

from longvid.frames import SourcePosition
from longvid.runtime.snapshot import newest_snapshot, snapshots_in, write_snapshot

POSITION = SourcePosition(17, 400, "ab")


def contexts(dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(1)
    return [
        (f"layers.{i}.conv", torch.randn(1, 4, 2, 3, 5).to(dtype).contiguous(memory_format=layout)) for i in (3, 1, 2)
    ]


def rows():
    return {"latents": np.arange(6.0).astype(np.float16).reshape(3, 2), "frame_pts": np.arange(2),
            "frame_valid": np.array([True, False]), "empty": np.zeros((0, 4), np.uint8)}  # fmt: skip


def write(folder, chunk=3, **changes):
    facts = {"chunk": chunk, "units": 2, "position": POSITION, "rows": rows(), "contexts": contexts(),
             "fingerprint": "f", "sync": False, **changes}  # fmt: skip
    return write_snapshot(folder, **facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_what_goes_in_comes_out(tmp_path, dtype, layout):
    path = write(tmp_path / "s", contexts=contexts(dtype, layout))
    found = newest_snapshot(tmp_path / "s", fingerprint="f", units=2)
    assert (found.chunk, found.units, found.position, found.path) == (3, 2, POSITION, path)
    for name, array in rows().items():
        assert found.rows[name].dtype == array.dtype
        np.testing.assert_array_equal(found.rows[name], array)
    back = list(found.contexts())
    assert [name for name, _ in back] == ["layers.3.conv", "layers.1.conv", "layers.2.conv"]
    for (_, a), (_, b) in zip(back, contexts(dtype, layout), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert len(safetensors.torch.load_file(path)) == 7  # anybody can read it


def test_damage_anywhere_is_passed_over_for_an_older_one(tmp_path):
    write(tmp_path / "s", chunk=2)
    path = write(tmp_path / "s", chunk=3)
    whole = path.read_bytes()
    for at in range(0, len(whole), 13):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            found = newest_snapshot(tmp_path / "s", fingerprint="f", units=9)
            assert found is not None
            assert found.chunk == 2, (at, bit)
    for length in (0, 1, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert newest_snapshot(tmp_path / "s", fingerprint="f", units=9).chunk == 2
    path.write_bytes(whole)
    assert newest_snapshot(tmp_path / "s", fingerprint="f", units=9).chunk == 3


def test_only_those_that_lean_on_what_is_there_count(tmp_path):
    write(tmp_path / "s", chunk=2, units=1)
    write(tmp_path / "s", chunk=3, units=2)
    assert newest_snapshot(tmp_path / "s", fingerprint="f", units=1).chunk == 2
    assert newest_snapshot(tmp_path / "s", fingerprint="f", units=0) is None
    assert newest_snapshot(tmp_path / "s", fingerprint="f", units=9, chunk=2).chunk == 2
    assert newest_snapshot(tmp_path / "s", fingerprint="g", units=9) is None
    assert newest_snapshot(tmp_path / "nothing", fingerprint="f", units=9) is None


def test_the_last_two_are_kept_or_all(tmp_path):
    for chunk in range(5):
        write(tmp_path / "s", chunk=chunk)
        write(tmp_path / "all", chunk=chunk, keep_all=True)
    assert [path.stem for path in snapshots_in(tmp_path / "s")] == ["000000003", "000000004"]
    assert len(snapshots_in(tmp_path / "all")) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_leaves_the_older_ones(tmp_path, value):
    write(tmp_path / "s", chunk=2)
    bad = contexts()
    bad[1][1][0, 1, 1, 1, 1] = value
    with pytest.raises(ValueError, match=r"layers\.1\.conv holds values that are not finite"):
        write(tmp_path / "s", chunk=3, contexts=bad)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["000000002.safetensors"]

"""A run that is resumed computes with the number of threads that it was begun with, and says so if it cannot."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from longvid import StoreError, VideoSession, open_store
from longvid.environment import kernels_of
from longvid.models.kernels.cpu import compute_threads


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (33, 16, 24, 3), dtype=np.uint8)


def encode(vae, video, path, *, stop=False):
    seen = []

    def look(event):
        seen.append(torch.get_num_threads())
        if stop:
            session.stop()

    with VideoSession(vae, device="cpu", callbacks=[look]) as session:
        report = session.encode(video, path)
    return report, set(seen)


def test_a_resumed_run_takes_up_the_number_of_threads(vae, video, tmp_path):
    with compute_threads(2):
        report, seen = encode(vae, video, tmp_path / "a.zarr", stop=True)
        assert (report.complete, seen) == (False, {2})
        encode(vae, video, tmp_path / "whole.zarr")
    with compute_threads(1):
        report, seen = encode(vae, video, tmp_path / "a.zarr")
        assert (report.complete, seen) == (True, {2})
        assert torch.get_num_threads() == 1
        assert encode(vae, video, tmp_path / "a.zarr")[0].complete  # the same command, done already
    store = open_store(tmp_path / "a.zarr")
    assert store.attrs["longvid"]["fingerprint"]["compute"]["threads"] == 2
    np.testing.assert_array_equal(store.latents[:], open_store(tmp_path / "whole.zarr").latents[:])


def test_a_run_of_another_number_that_replaces_it_uses_its_own(vae, video, tmp_path):
    with compute_threads(2):
        encode(vae, video, tmp_path / "a.zarr")
    with compute_threads(1), VideoSession(vae, device="cpu") as session:
        session.encode(video, tmp_path / "a.zarr", overwrite=True)
    assert open_store(tmp_path / "a.zarr").attrs["longvid"]["fingerprint"]["compute"]["threads"] == 1


KERNELS = "from longvid.environment import kernels_of; print(kernels_of('cpu'))"


def test_a_lower_instruction_set_counts_as_other_kernels():
    told = subprocess.run(
        [sys.executable, "-c", KERNELS], env={"ONEDNN_MAX_CPU_ISA": "SSE41"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == f"{kernels_of('cpu').partition(',')[0]}, oneDNN up to SSE41"


def test_an_unfinished_store_of_other_kernels_is_refused_by_name(vae, video, tmp_path, monkeypatch):
    encode(vae, video, tmp_path / "a.zarr", stop=True)
    before = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    with pytest.raises(StoreError, match=r"compute\.kernels is .* in the store and .*SSE41 in this run"):
        encode(vae, video, tmp_path / "a.zarr")
    assert json.loads((tmp_path / "a.zarr" / "zarr.json").read_text()) == before

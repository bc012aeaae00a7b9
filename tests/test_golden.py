"""Results that must not change: latents and frames of seeded models against values that are stored beside this file.

Bits differ between processors, so the comparison has a tolerance; ``benchmarks/golden.py`` compares bits on one.
``python tests/test_golden.py`` writes the values again, after a change that is meant to change results.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import longvid as lv
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE

VALUES = Path(__file__).with_name("golden.json")
NUM_SAMPLES = 48
CASES = ["tiny", "cogvideox"]


def model_and_source(case):
    if case == "tiny":
        return lv.load_model("tiny"), Path(lv.__file__).parent / "demo" / "clip.mp4"
    torch.manual_seed(7)
    config = CogVideoXConfig(block_out_channels=(8, 16, 16, 32), norm_num_groups=4, layers_per_block=1)
    noise = np.random.default_rng(3).integers(0, 256, (26, 48, 64, 3), dtype=np.uint8)
    return CogVideoXVAE(config).eval().requires_grad_(False), noise


def results(case, layout, folder):
    """Latents and frames, each as its norm and a few of its values."""
    model, source = model_and_source(case)
    frames = []
    options = {"device": "cpu", "dtype": "float32", "layout": layout, "paired_frames": "off"}
    with lv.VideoSession(model, **options) as session:
        session.encode(source, folder / f"{case}.zarr", store_dtype="float32", frames=26)
        session.decode(folder / f"{case}.zarr", frames.append)
    store = lv.open_store(folder / f"{case}.zarr")
    arrays = {"latents": store.read(0, store.latents.shape[0]), "frames": np.concatenate(frames)}
    return {name: summary(np.asarray(array, np.float64)) for name, array in arrays.items()}


def summary(array):
    places = np.random.default_rng(0).choice(array.size, NUM_SAMPLES, replace=False)
    return {"shape": list(array.shape), "norm": float(np.linalg.norm(array)), "samples": array.ravel()[places].tolist()}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_results_are_the_stored_ones(case, layout, tmp_path):
    expected, found = json.loads(VALUES.read_text())[case], results(case, layout, tmp_path)
    for name, tolerance in (("latents", 1e-5), ("frames", 1.0)):
        have, want = found[name], expected[name]
        assert have["shape"] == want["shape"]
        assert have["norm"] == pytest.approx(want["norm"], rel=1e-5 if name == "latents" else 1e-4)
        scale = np.abs(want["samples"]).max() if name == "latents" else 1.0  # frames: one step of uint8
        assert np.abs(np.subtract(have["samples"], want["samples"])).max() <= tolerance * scale


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        VALUES.write_text(
            json.dumps({case: results(case, "contiguous", Path(scratch)) for case in CASES}, indent=1) + "\n"
        )

"""Norm and activation as one kernel of torch.compile: the same numbers, under a meter too, and never a must."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import longvid.planning.kernel_choice
from longvid import AllocationTracker, StoreError, VideoSession, open_store
from longvid.models import compiled_norm
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.norms import GroupNormSiLU, SpatialNormSiLU
from longvid.models.numerics import Numerics
from longvid.planning.kernel_choice import can_compute, choose_numerics

LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def _a_compiler():
    if not compiled_norm.available():
        pytest.skip("nothing can be compiled here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(6, 8), (5, 3)])
@pytest.mark.parametrize("factor", [0, 1, 2, 8])
def test_one_kernel_equals_the_definition_in_float64(dtype, size, factor):
    """Also written in parts, into a window, for two batch elements, and where a dispatch mode is on."""
    h, w = size
    x = torch.randn(2, 16, 5, h * (factor or 1), w * (factor or 1)).to(dtype).contiguous(memory_format=LAST)
    z = torch.randn(2, 4, 3, h, w).to(dtype).contiguous(memory_format=LAST)
    norm = (SpatialNormSiLU(16, 4, num_groups=4) if factor else GroupNormSiLU(4, 16, eps=1e-6)).to(dtype)
    window = torch.full((2, 16, 7, *x.shape[3:]), float("nan"), dtype=dtype).contiguous(memory_format=LAST)
    tracker = AllocationTracker()
    with torch.inference_mode():
        fitted = norm.fit(x, z, compiled=True)
        rows = range(x.shape[3])
        fitted.write(range(3), rows, window[:, :, 2:5])
        with tracker:
            fitted.write(range(3, 5), rows, window[:, :, 5:])
        if factor:
            y, b = (conv.conv(z).double()[:, :, [0, 1, 1, 2, 2]] for conv in (norm.conv_y, norm.conv_b))
            y, b = (F.interpolate(m, size=x.shape[2:]) for m in (y, b))
        else:
            y, b = 1, 0
        inner = norm.norm_layer if factor else norm
        weight, bias = inner.weight.double(), inner.bias.double()
        expected = F.silu(F.group_norm(x.double(), 4, weight, bias, inner.eps) * y + b)
    assert tracker.peak_bytes == 0
    assert window[:, :, :2].isnan().all()
    error = (window[:, :, 2:].double() - expected).norm() / expected.norm()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]  # one rounding to 8 bits is 1.7e-3


def test_a_few_kernels_serve_all_sizes():
    """torch.compile makes one where a size is one or sizes are equal; it must not make one for every size."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    norm = SpatialNormSiLU(8, 4, num_groups=2)
    for dtype in (torch.float32, torch.bfloat16):
        norm.to(dtype)
        for h, w in ((1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (9, 4), (9, 6), (17, 30), (12, 11), (5, 20)):
            for factor in (1, 2, 4, 8):
                for frames, latents in ((1, 1), (2, 2), (8, 2), (9, 3)):
                    x = torch.randn(1, 8, frames, h * factor, w * factor, dtype=dtype).contiguous(memory_format=LAST)
                    z = torch.randn(1, 4, latents, h, w, dtype=dtype).contiguous(memory_format=LAST)
                    with torch.inference_mode():
                        norm.fit(x, z, compiled=True).write(range(frames), range(h * factor), torch.empty_like(x))
    assert counters["stats"]["unique_graphs"] - before <= 14


@pytest.fixture
def wide():
    torch.manual_seed(0)
    config = CogVideoXConfig(block_out_channels=(16, 16, 16, 16), norm_num_groups=4, layers_per_block=1)
    return CogVideoXVAE(config).eval()


@pytest.fixture
def footage():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)


def choose(model, **asked):
    device = torch.device("cpu")
    return choose_numerics(model, device=device, dtype=torch.float32, height=64, width=96, **asked)


@pytest.mark.parametrize(("seconds", "wins"), [((1.2, 1.0), True), ((1.0, 1.0), False)])
def test_it_is_used_if_it_wins(wide, monkeypatch, seconds, wins):
    monkeypatch.setattr(longvid.planning.kernel_choice, "_race", lambda makers, device: list(seconds))
    assert choose(wide, layout="channels_last", paired_frames=False, compile=True).compiled == wins
    assert not choose(wide, layout="channels_last", paired_frames=False).compiled
    assert not choose(wide, layout="contiguous", paired_frames=False, compile=True).compiled


def test_without_a_compiler_it_warns_once_and_goes_on(wide, monkeypatch):
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nin a list of places")

    monkeypatch.setattr(compiled_norm, "_compiled", no_compiler)
    compiled_norm.available.cache_clear()
    try:
        with pytest.warns(UserWarning, match="run as they are: No working C\\+\\+ compiler found$"):
            assert not choose(wide, layout="channels_last", paired_frames=False, compile=True).compiled
        assert not choose(wide, layout="channels_last", paired_frames=False, compile=True).compiled
        assert can_compute(Numerics(), torch.float32)
        assert not can_compute(Numerics(compiled=True), torch.float32)
    finally:
        monkeypatch.undo()
        compiled_norm.available.cache_clear()


def test_a_compiled_run_is_continued_compiled_or_not_at_all(wide, footage, tmp_path, monkeypatch):
    """Whether or not compiling is asked for again, since the store says so."""
    asked = {"layout": "channels_last", "paired_frames": "off"}
    monkeypatch.setattr(longvid.planning.kernel_choice, "_race", lambda makers, device: [2.0, 1.0])

    def encode(path, *, stop=None, **more):
        callbacks = [lambda event: session.stop()] if stop else []
        with VideoSession(wide, **asked, **more, callbacks=callbacks) as session:
            return session.encode(footage, path, store_dtype="float32")

    encode(tmp_path / "whole.zarr", compile=True)
    encode(tmp_path / "plain.zarr")
    assert not encode(tmp_path / "stopped.zarr", compile=True, stop=True).complete
    with monkeypatch.context() as patch:
        patch.setattr(longvid.runtime.admission, "can_compute", lambda *_: False)
        with pytest.raises(StoreError, match=r"compute\.numerics\.compiled was True and is False"):
            encode(tmp_path / "stopped.zarr")
    report = encode(tmp_path / "stopped.zarr")
    assert report.complete
    assert report.resumed_from_frame
    whole, plain, stopped = (open_store(tmp_path / f"{name}.zarr") for name in ("whole", "plain", "stopped"))
    assert whole.attrs["longvid"]["numerics"]["compiled"]
    assert np.array_equal(stopped.latents[:], whole.latents[:])
    difference = np.linalg.norm(plain.latents[:] - whole.latents[:]) / np.linalg.norm(plain.latents[:])
    assert 0 < difference < 1e-5

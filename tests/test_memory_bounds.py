"""Memory does not grow with the length of a video, and the largest frames run."""

import importlib

import numpy as np
import pytest
import torch
from support import REPOSITORY
from support.contexts import forward_context

from longvid import AllocationTracker, ConvCache, VideoSession
from longvid.demo.__main__ import CLIP
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE

NANO = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}


def test_cache_bytes_are_constant_from_the_second_chunk_on(vae):
    """And equal to the closed formula: two frames of every 3x3x3 convolution's input."""
    sizes = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel() // args[0].shape[2]))
        for layer in vae.encoder.modules()
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size[0] == 3
    ]
    with VideoSession(vae) as session, session.encoder() as enc:
        seen = []
        for _ in range(12):
            enc.push(np.random.default_rng(0).integers(0, 256, (8, 32, 40, 3), dtype=np.uint8))
            seen.append(enc.cache_bytes)
        enc.close()
    for hook in hooks:
        hook.remove()
    assert seen[0] == 0  # eight frames are no first chunk yet
    expected = 2 * 4 * sum(sizes[: len(hooks)])
    assert set(seen[1:]) == {expected}


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_tracked_bytes_are_flat_over_chunks(vae, direction):
    peaks, tracker = [], AllocationTracker()
    module, step = (vae.encoder, vae.encode) if direction == "encode" else (vae.decoder, vae.decode)
    with ConvCache(module) as cache:
        for index in range(30):
            shape = (1, 3, 8 + (index == 0), 16, 24) if direction == "encode" else (1, 16, 2 + (index == 0), 2, 3)
            x = torch.randn(shape)
            with tracker:
                tracker.reset_peak()
                step(x, cache)
            peaks.append((tracker.peak_bytes, tracker.live_bytes))
    assert len(set(peaks[1:])) == 1


@pytest.mark.parametrize("size", [(272, 480), pytest.param((1088, 1920), marks=pytest.mark.slow)], ids=str)
def test_large_frames_run_for_real_with_convolutions_split_in_time(size):
    """Small widths. The limit is lowered so that wide layers are cut, as they are at full width."""
    height, width = size
    vae = CogVideoXVAE(CogVideoXConfig(**{**NANO, "block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2})).eval()
    lengths, limit = [], 3 * 4 * height * width
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: lengths.append((args[0].shape[2], args[0].numel())))
        for layer in vae.decoder.modules()
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size[0] == 3
    ]
    z = torch.randn(1, 16, 3, height // 8, width // 8)
    with forward_context(vae.decoder, conv_elements=limit) as cache:
        frames = vae.decode(z, cache)
    for hook in hooks:
        hook.remove()
    assert frames.shape == (1, 3, 9, height, width)
    assert torch.isfinite(frames).all()
    assert min(length for length, _ in lengths) == 3
    assert max(numel for _, numel in lengths) <= limit
    assert len(lengths) > len(hooks)
    small = torch.randn(1, 16, 3, 8, 8)
    with ConvCache(vae.decoder) as whole, forward_context(vae.decoder, conv_elements=1) as cut:
        torch.testing.assert_close(vae.decode(small, cut), vae.decode(small, whole), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_resident_memory_of_3000_frames_is_that_of_300(tmp_path, monkeypatch):
    """Whole processes, as the OS counts them; `python benchmarks/flat.py` goes through an hour of video."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    common = importlib.import_module("common")
    run = common.run_command
    common.loop_clip(CLIP, tmp_path / "loop.mp4", 3000)
    model, peaks = ["--model", "cogvideox-nano", "--random-weights", 0, "--size", "64x48", "--fit", "stretch"], {}
    for n in (300, 3000):
        encoded = run("encode", tmp_path / "loop.mp4", tmp_path / f"{n}.zarr", *model, "--frames", n)
        decoded = run("decode", tmp_path / f"{n}.zarr", tmp_path / f"{n}.mp4")
        assert encoded["frames"] == decoded["frames"] == n
        peaks[n] = encoded["peak_rss_bytes"], decoded["peak_rss_bytes"]
    for short, long in zip(peaks[300], peaks[3000], strict=True):
        assert long <= 1.03 * short, peaks

"""An exception anywhere, a signal at any time: nothing is held, and the next video is as if nothing had happened."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

from longvid import AllocationTracker, SessionStateError, VideoSession

NUM_CHUNKS = 3


class Injected(Exception):
    pass


def convolutions(module):
    """All of them but the projections of residuals, whose weights are used without a call of the module."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d))}
    return [name for name in found if not name.endswith("conv_shortcut")]


def frames():
    return np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)


def encode(session):
    with session.encoder() as enc:
        return torch.cat([enc.push(frames()), enc.finish()], dim=2)


def decode(session):
    z = torch.randn(1, 16, 7, 1, 1, generator=torch.Generator().manual_seed(0))
    with session.decoder() as dec:
        return torch.from_numpy(np.concatenate([dec.push(z), dec.finish()]))


def failing(layer, chunk, error):
    """Raise in the layer's forward of the given chunk."""
    calls = []

    def hook(*_):
        calls.append(0)
        if len(calls) == chunk + 1:
            raise error

    return layer.register_forward_hook(hook)


def run_and_drop(call, error):
    """Run until the error; keep no reference to its traceback."""
    try:
        call()
    except error:
        return True
    return False


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_an_exception_in_any_layer_of_any_chunk(vae, direction):
    module, run = (vae.encoder, encode) if direction == "encode" else (vae.decoder, decode)
    with VideoSession(vae) as session:
        expected = run(session)
        assert torch.equal(expected, run_fresh(vae, run))
        for count, name in enumerate(convolutions(module)):
            for chunk in range(NUM_CHUNKS):
                error = (Injected, KeyboardInterrupt)[(count + chunk) % 2]
                hook, tracker = failing(module.get_submodule(name), chunk, error), AllocationTracker()
                with tracker:
                    failed = run_and_drop(lambda: run(session), error)
                hook.remove()
                if tracker.live_bytes:
                    gc.collect()
                assert failed, (name, chunk)
                assert tracker.live_bytes == 0, (name, chunk)
            assert torch.equal(run(session), expected), name


def run_fresh(vae, run):
    with VideoSession(vae) as session:
        return run(session)


def test_a_failed_video_cannot_go_on_but_another_can(vae):
    with VideoSession(vae) as session:
        expected = encode(session)
        with session.encoder() as enc, session.encoder() as other:
            other.push(frames()[:12])
            enc.push(frames()[:9])
            hook = failing(vae.encoder.conv_in.conv, 0, Injected)
            with pytest.raises(Injected):
                enc.push(frames()[9:])
            hook.remove()
            assert enc.cache_bytes == 0
            with pytest.raises(SessionStateError, match="failed in an earlier call"):
                enc.push(frames())
            assert other.cache_bytes > 0
            latents = torch.cat([other.push(frames()[12:]), other.finish()], dim=2)
        assert latents.shape == expected[:, :, : latents.shape[2]].shape


def test_negative_control_leaked_contexts_would_be_seen(vae):
    """If a video saw the contexts of the one before, the comparisons above would notice."""
    from longvid import ConvCache

    x = torch.rand(1, 3, 9, 8, 8) * 2 - 1
    with ConvCache(vae.encoder) as cache:
        first = vae.encode(x, cache)
        leaked = vae.encode(x, cache)
    assert not torch.equal(first, leaked)


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("chunk", range(NUM_CHUNKS + 1))
def test_a_whole_encode_that_fails_leaves_no_tensors_threads_or_half_written_store(vae, tmp_path, chunk, error):
    import threading

    long = np.concatenate([frames()] * 2)
    with VideoSession(vae) as session:
        hook = failing(vae.encoder.conv_out.conv, chunk, error)
        tracker = AllocationTracker()
        with tracker:
            assert run_and_drop(lambda: session.encode(long, tmp_path / "a.zarr"), error)
        hook.remove()
        gc.collect()
        assert tracker.live_bytes == 0
        assert not [t.name for t in threading.enumerate() if t.name.startswith("longvid")]
        assert list(tmp_path.iterdir()) == []  # nothing had been published yet
        assert session.encode(long, tmp_path / "a.zarr").complete


def test_a_decode_that_fails_leaves_no_file(vae, tmp_path):
    with VideoSession(vae) as session:
        session.encode(frames(), tmp_path / "a.zarr")
        for out in ("b.mp4", "b.zarr"):
            hook = failing(vae.decoder.conv_out.conv, 2, Injected)
            assert run_and_drop(lambda out=out: session.decode(tmp_path / "a.zarr", tmp_path / out), Injected)
            hook.remove()
        assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]

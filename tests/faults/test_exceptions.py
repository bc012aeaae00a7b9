"""An exception anywhere, a signal at any time: nothing is held, and the next video is as if nothing had happened."""

import gc
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from longvid import AllocationTracker, MemoryBudgetError, SessionStateError, VideoSession

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
def test_an_exception_in_any_layer_of_any_chunk(vae, direction, all_faults):
    """In `make test` every fifth layer fails in one chunk, and the chunks take turns."""
    module, run = (vae.encoder, encode) if direction == "encode" else (vae.decoder, decode)
    with VideoSession(vae) as session:
        expected = run(session)
        assert torch.equal(expected, run_fresh(vae, run))
        for count, name in enumerate(convolutions(module)[:: 1 if all_faults else 5]):
            for chunk in range(NUM_CHUNKS) if all_faults else (count % NUM_CHUNKS,):
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


@pytest.mark.parametrize(
    ("chunk", "error"),
    [(0, Injected), (1, KeyboardInterrupt), (NUM_CHUNKS - 1, Injected), (NUM_CHUNKS, KeyboardInterrupt)],
)
def test_a_whole_encode_that_fails_leaves_no_tensors_threads_or_half_written_store(vae, tmp_path, chunk, error):
    import threading

    long = np.concatenate([frames()] * 2)
    with VideoSession(vae) as session:
        session.plan(height=long.shape[1], width=long.shape[2])  # its model on meta stays, and holds no memory
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


# ------------------------------------------------------------------------------------------- out of memory


def memory_error():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free")


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("offload", ["none", "all"])
def test_memory_that_runs_out_in_a_layer_is_survived_bit_for_bit_or_told(vae, direction, offload, all_faults):
    """Once: the same bits, since contexts or idle memory make room; if there is neither: an error with the numbers.

    Every layer with --all-faults.
    """
    module, run = (vae.encoder, encode) if direction == "encode" else (vae.decoder, decode)
    with VideoSession(vae, offload=offload) as session:
        expected, survived, told = run(session), 0, 0
        layers = convolutions(module)[:: 1 if all_faults else 7 if direction == "encode" else 17]
        for count, name in enumerate(layers):
            hook = failing(module.get_submodule(name), count % NUM_CHUNKS, memory_error())
            tracker = AllocationTracker()
            with warnings.catch_warnings(record=True) as said, tracker:
                warnings.simplefilter("always")
                try:
                    got = run(session)
                except MemoryBudgetError as exc:
                    told += bool(re.search(rf"in chunk \d of {direction}: .* were planned", str(exc)))
                else:
                    survived += 1
                    assert torch.equal(got, expected), name
                    made_room = "all contexts were moved|memory that the layers keep was given up"
                    assert any(re.search(f"ran out of memory in chunk .*({made_room})", str(w.message)) for w in said)
                    del got
            hook.remove()
            gc.collect()
            assert tracker.live_bytes == 0, name
            assert torch.equal(run(session), expected), name  # the session stays usable
        assert survived
        assert survived + told == len(layers)


def test_memory_that_stays_short_is_an_error_with_the_numbers(vae, tmp_path):
    hooks = [vae.encoder.mid_block.resnets[0].conv1.conv.register_forward_pre_hook(lambda *_: raise_(memory_error()))]
    with VideoSession(vae) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MemoryBudgetError, match="the device ran out of memory in chunk 0 of encode") as caught:
            session.encode(frames(), tmp_path / "a.zarr")
        assert caught.value.projected_bytes > 0
        assert caught.value.__context__ is None  # its frames would hold the chunk's tensors
        hooks[0].remove()
        assert session.encode(frames(), tmp_path / "a.zarr").complete


def raise_(error):
    raise error


class FailingCall(TorchFunctionMode):
    """Raises once, at the n-th call of a torch function that can take memory."""

    def __init__(self, number):
        self.left, self.reached = number, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "").startswith(
            ("conv", "empty", "group_norm", "native_group", "add", "pad", "to")
        ):
            self.left -= 1
            if self.left == 0:
                self.reached = True
                raise memory_error()
        return func(*args, **(kwargs or {}))


def test_memory_that_runs_out_at_any_call_gives_the_same_bits_or_an_error(vae):
    with VideoSession(vae) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, outcomes = encode(session), {"same": 0, "told": 0}
        for number in range(1, 10_000, 23):
            with FailingCall(number) as fault:
                try:
                    got = encode(session)
                except MemoryBudgetError:
                    outcomes["told"] += 1
                else:
                    assert torch.equal(got, expected), number
                    outcomes["same"] += 1
            if not fault.reached:
                break
            assert torch.equal(encode(session), expected)
    assert outcomes["same"] > 2 * outcomes["told"]


def test_a_measured_peak_above_the_plan_is_told_once(vae, monkeypatch):
    from longvid.models.layers.causal_conv import CausalConv3d
    from longvid.planning.dry_run import DryRuns

    real, kept = CausalConv3d.stream, []

    def wasteful(self, *args, **options):
        out = real(self, *args, **options)
        kept.append(torch.empty(300_000))
        return out

    monkeypatch.setattr(CausalConv3d, "stream", wasteful)
    monkeypatch.setattr(DryRuns, "_known", {})
    with VideoSession(vae) as session, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encode(session)
    messages = [str(w.message) for w in said if "measured peak" in str(w.message)]
    assert len(messages) == 1
    assert "above the plan of" in messages[0]

"""The device runs out of memory in any layer: the same bits after recovery, or a clean error; then the run resumes."""

import gc
import warnings

import numpy as np
import pytest
import torch
import zarr
from support.clock import wait_until
from support.fault_runs import published_frames

from longvid import Durability, MemoryBudgetError, VideoSession, load_model
from longvid.memory.offloader import Offloader
from longvid.models.kernels.convolution import Conv2d, Conv3d

EAGER = Durability(publish_seconds=0)
COMMITTED = {"encode": 13, "decode": 16}
"frames in the whole units of two chunks"
FRAMES = np.random.default_rng(5).integers(0, 256, (28, 32, 48, 3), dtype=np.uint8)


class OutOfMemory:
    """A hook that stands in for a device that has nothing left, once or for ever, from a chunk on."""

    def __init__(self, module, *, chunk, once, ready=lambda: True):
        self.chunk, self.once, self.raised, self.ready = chunk, once, 0, ready
        self._handle = module.register_forward_pre_hook(self)

    def on_chunk(self, event):
        self.now = event.index + 1

    now = 0

    def __call__(self, module, args):
        if self.now >= self.chunk and not (self.once and self.raised):
            wait_until(self.ready, "what came before is committed")
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def remove(self):
        self._handle.remove()


def arrays(path):
    return {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}


def tensors_alive():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def convolutions(direction):
    model = load_model("cogvideox-nano", random_weights=1)
    half = model.encoder if direction == "encode" else model.decoder
    return [name for name, module in half.named_modules() if isinstance(module, (Conv2d, Conv3d))]


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("once", [True, False])
def test_out_of_memory_in_any_layer(tmp_path, monkeypatch, ledger, all_faults, direction, once):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 2 * 16 * 4 * 6 * 2)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 4 * 32 * 48 * 3)
    model = load_model("cogvideox-nano", random_weights=1)
    half = model.encoder if direction == "encode" else model.decoder
    settings = {"device": "cpu", "layout": "contiguous", "paired_frames": "off"}
    with VideoSession(model, **settings) as session:
        session.encode(FRAMES, tmp_path / "latents.zarr")
        source = FRAMES if direction == "encode" else tmp_path / "latents.zarr"
        getattr(session, direction)(source, tmp_path / "whole.zarr")
    truth, layers = arrays(tmp_path / "whole.zarr"), convolutions(direction)
    before, committed = tensors_alive(), COMMITTED[direction]
    for number, name in enumerate(layers if all_faults else layers[:: len(layers) // 2]):
        path = tmp_path / f"{number}.zarr"
        fault = OutOfMemory(
            half.get_submodule(name), chunk=2, once=once, ready=lambda p=path: published_frames(p) == committed
        )
        with VideoSession(model, callbacks=[fault.on_chunk], **settings) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            run = getattr(session, direction)
            if once:
                recovered = run(source, path, durability=EAGER).complete
            else:
                with pytest.raises(MemoryBudgetError, match="ran out of memory in chunk 2"):
                    run(source, path, durability=EAGER)
                fault.remove()
                fault.now = 0
                report = run(source, path)
                # the model takes longer to forget than this video lasts, so that all of it is computed and compared
                recovered = (report.resumed_from_frame, report.frames_computed) == (committed, len(FRAMES))
        assert fault.raised
        fault.remove()
        same = all(np.array_equal(arrays(path)[key], truth[key]) for key in truth)
        ledger.add(f"out of memory: {direction}", survived=recovered and same, silently_wrong=recovered and not same)
        assert recovered, name
        assert same, name
    assert tensors_alive() <= before


@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("name", ["cogvideox-nano", "tiny"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_context_is_forced_off_the_device_after_every_layer(
    tmp_path, ledger, monkeypatch, direction, name, offload
):
    model = load_model(name, random_weights=1) if name == "cogvideox-nano" else load_model(name)
    settings = {"device": "cpu", "layout": "contiguous", "paired_frames": "off", "chunk_frames": 8}
    with VideoSession(model, **settings) as session:
        session.encode(FRAMES, tmp_path / "latents.zarr")
        source = FRAMES if direction == "encode" else tmp_path / "latents.zarr"
        getattr(session, direction)(source, tmp_path / "whole.zarr")
    freed, keep = [], Offloader.keep

    def keep_and_evict(self, path, tail, *, complete=True):
        keep(self, path, tail, complete=complete)
        if type(self) is Offloader:  # not the one of a plan
            freed.append(self.evict())
            assert self.device_bytes == 0

    monkeypatch.setattr(Offloader, "keep", keep_and_evict)
    with VideoSession(model, offload=offload, **settings) as session:
        getattr(session, direction)(source, tmp_path / "evicted.zarr")
    truth, got = arrays(tmp_path / "whole.zarr"), arrays(tmp_path / "evicted.zarr")
    same = all(np.array_equal(got[key], truth[key]) for key in truth)
    for _ in freed:
        ledger.add(f"eviction of all: {direction}", survived=same, silently_wrong=not same)
    half = model.encoder if direction == "encode" else model.decoder
    contexts = sum(getattr(module, "context_frames", 0) > 0 for module in half.modules())
    assert len(freed) in (3 * contexts, 4 * contexts)  # chunks of 9, 8, 8 and 3 frames, or of whole eights
    assert same

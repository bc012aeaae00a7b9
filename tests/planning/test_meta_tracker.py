"""Counting on ``meta`` leaves operations out, and its numbers are those of counting all of them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longvid import ConvCache, load_model
from longvid.memory.tracker import AllocationTracker
from longvid.models.context import ForwardContext
from longvid.planning.dry_run import skeleton_of
from longvid.planning.meta_tracker import MetaTracker

META = torch.device("meta")


@pytest.mark.parametrize("name", ["tiny", "cogvideox-nano", "wan2.1-nano", "wan2.2-nano"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_bytes_and_flops_are_those_of_every_operation(name, direction):
    model = skeleton_of(load_model(name), torch.float32)
    geometry, encodes = model.geometry, direction == "encode"
    module, step = (model.encoder, model.encode) if encodes else (model.decoder, model.decode)
    p = geometry.pixels_per_latent
    frames = (3, geometry.chunk_frames + 1, 4 * p, 6 * p)
    shape = frames if encodes else (geometry.latent_channels, geometry.schedule.chunk_latents + 1, 4, 6)

    def run(tracker):
        peaks = []
        with ForwardContext(ConvCache(module)) as context, tracker:
            step(torch.empty((1, *shape), device=META), context)
            peaks.append((tracker.peak_bytes, tracker.live_bytes))
        return peaks

    fast = MetaTracker()
    fast.counts_flops = True
    with FlopCounterMode(display=False) as counter:
        expected = run(AllocationTracker())
    assert run(fast) == expected
    assert fast.flops == counter.get_total_flops() > 0


def test_what_writes_and_has_flops_or_another_shape_is_not_left_out():
    tracker = MetaTracker()
    tracker.counts_flops = True
    a, b, out = torch.empty(8, 16, device=META), torch.empty(16, 4, device=META), torch.empty(8, 4, device=META)
    x = torch.empty(2, 3, device=META)
    with tracker:
        assert torch.mm(a, b, out=out) is out
        assert x.t_().shape == (3, 2)
        assert (x.add_(1) is x, x.copy_(x) is x, torch.mul(x, x, out=x) is x) == (True, True, True)
        x + x
    assert tracker.flops == 2 * 8 * 16 * 4
    assert tracker.peak_bytes == x.nbytes

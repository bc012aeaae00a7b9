"""Offloader: who is where at which moment, and that the order of moves holds under the most adverse lanes."""

import contextlib
import gc
import itertools
import warnings

import pytest
import torch
from torch import nn

from longvid import AllocationTracker, CausalConv3d, ConvCache
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offload import Placement
from longvid.memory.offloader import Offloader

CPU = torch.device("cpu")
CHUNK, SIZE = 4, (6, 5)


class Chain(nn.Module):
    """Convolutions of different widths one after the other."""

    def __init__(self, widths=(3, 4, 8, 2, 6, 3)):
        super().__init__()
        self.layers = nn.ModuleList(CausalConv3d(a, b, 3) for a, b in itertools.pairwise(widths))

    @torch.inference_mode()
    def forward(self, x, cache):
        with cache.chunk():
            for layer in self.layers:
                x = layer(x, cache)
            return x


@pytest.fixture
def model():
    return Chain().eval()


@pytest.fixture
def video():
    return torch.randn(1, 3, 6 * CHUNK, *SIZE)


def sizes(model):
    return {f"layers.{i}": layer.conv.in_channels * 2 * 30 * 4 for i, layer in enumerate(model.layers)}


def run(model, video, placement=None, copies=None, **options):
    with ConvCache(model, offloader=Offloader(placement, copies, **options)) as cache:
        out = torch.cat([model(part, cache) for part in video.split(CHUNK, dim=2)], dim=2)
        assert cache.nbytes == sum(sizes(model).values())
    assert cache.nbytes == cache.device_bytes == 0
    return out


class _LazyCopies(CopyEngine):
    """The worst lanes that are allowed: a copy happens when somebody waits for it, and not a moment sooner."""

    def __init__(self, device):
        super().__init__(device)
        self.pending = []

    def _copy(self, lane, target, source, slot, after):
        if lane == "to_device":
            target.fill_(torch.nan)  # a layer that reads too early sees this
        ticket = _LazyTicket(self, target, source)
        ticket.after = after
        self.pending.append(ticket)
        return ticket

    def drain(self):
        for ticket in list(self.pending):
            ticket.wait()


class _LazyTicket:
    after = None

    def __init__(self, lanes, target, source):
        self.lanes, self.target, self.source, self.done = lanes, target, source, False

    def wait(self):
        if not self.done:
            if self.after is not None:
                self.after.wait()
            self.target.copy_(self.source)
            self.done = True
            self.lanes.pending.remove(self)

    synchronize = wait


def placements(model):
    names, total = list(sizes(model)), sum(sizes(model).values())
    for offloaded in (names, names[:1], names[-1:], names[::2], names[1::2]):
        for prefetch_bytes in (0, 1500, 3000, total):
            yield Placement(offloaded=frozenset(offloaded), prefetch_bytes=prefetch_bytes)


@pytest.mark.parametrize("lanes", ["threads", "lazy"])
def test_every_placement_gives_the_same_bits(model, video, lanes):
    expected = run(model, video)
    for placement in placements(model):
        with (_LazyCopies if lanes == "lazy" else CopyEngine)(CPU) as copies:
            assert torch.equal(run(model, video, placement, copies), expected), placement


def test_negative_control_a_copy_that_nobody_waits_for_is_seen(model, video, monkeypatch):
    monkeypatch.setattr(_LazyTicket, "wait", lambda self: None)
    with _LazyCopies(CPU) as copies:
        got = run(model, video, Placement(offloaded=frozenset(sizes(model))), copies)
        copies.pending.clear()
    assert not torch.equal(got, run(model, video))


def test_only_what_was_planned_is_on_the_device(model, video):
    """At each opening: the resident ones, the layer's own, and as many of the next as fit in the window."""
    contexts = list(sizes(model).items())
    for placement in placements(model):
        seen = []

        class Watched(Offloader):
            def keep(self, path, tail, *, complete=True, seen=seen):
                super().keep(path, tail, complete=complete)
                seen.append((path, self.device_bytes))

        with CopyEngine(CPU) as copies, ConvCache(model, offloader=Watched(placement, copies)) as cache:
            for part in video.split(CHUNK, dim=2):
                model(part, cache)
        resident = sum(size for path, size in contexts if path not in placement.offloaded)
        for path, device_bytes in seen[len(contexts) :]:
            staged = placement.staged([p for p, _ in contexts].index(path), contexts)
            assert device_bytes == resident + sum(contexts[i][1] for i in staged)


@pytest.mark.parametrize("known", [False, True])
def test_host_memory_is_taken_once(model, video, monkeypatch, known):
    """Nothing is allocated on the host after the first chunk, with or without the sizes known in advance."""
    made, real = [], CopyEngine.host_buffer
    monkeypatch.setattr(CopyEngine, "host_buffer", lambda self, wanted: made.append(wanted) or real(self, wanted))
    host_sizes = tuple(sizes(model).values()) if known else ()
    with CopyEngine(CPU) as copies:
        offloader = Offloader(Placement(offloaded=frozenset(sizes(model))), copies, host_sizes=host_sizes)
        with ConvCache(model, offloader=offloader) as cache:
            counts = [(model(part, cache), len(made))[1] for part in video.split(CHUNK, dim=2)]
    assert set(counts) == {1 if known else len(sizes(model))}


def test_contexts_that_stay_are_never_moved(model, video):
    offloaded = frozenset(["layers.1", "layers.3"])
    with CopyEngine(CPU) as copies:
        offloader = Offloader(Placement(offloaded=offloaded), copies)
        with ConvCache(model, offloader=offloader) as cache:
            model(video[:, :, :CHUNK], cache)
            staying = {p: h.device.data_ptr() for p, h in offloader._homes.items() if p not in offloaded}
            for part in video.split(CHUNK, dim=2)[1:]:
                model(part, cache)
            assert staying == {p: h.device.data_ptr() for p, h in offloader._homes.items() if p not in offloaded}


def test_offloading_without_anything_to_move_with_is_refused():
    with pytest.raises(ValueError, match="pass a CopyEngine"):
        Offloader(Placement(offloaded=frozenset("a")))


class _OrderingCopies(CopyEngine):
    """As on a stream: to wait orders what is computed next; only draining knows that a copy is done."""

    under_way = 0

    def _copy(self, *copy):
        self.under_way += 1
        return super()._copy(*copy)

    def drain(self):
        self.under_way = 0


@pytest.mark.parametrize("fails_in", [None, 0, 2, 4])
def test_no_arena_is_given_back_while_a_copy_may_be_under_way(model, video, monkeypatch, fails_in):
    released, real = [], CopyEngine.release
    monkeypatch.setattr(
        CopyEngine, "release", lambda self, buffer: released.append(self.under_way) or real(self, buffer)
    )
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == 3:
            raise ZeroDivisionError

    handle = None if fails_in is None else model.layers[fails_in].conv.register_forward_pre_hook(fail)
    placement = Placement(offloaded=frozenset(sizes(model)), prefetch_bytes=3000)
    with _OrderingCopies(CPU) as copies, contextlib.suppress(ZeroDivisionError):
        run(model, video, placement, copies, host_sizes=tuple(sizes(model).values()))
    if handle is not None:
        handle.remove()
    assert released == [0]


def test_a_copy_that_fails_ends_the_video_and_frees_everything(model, video, monkeypatch):
    import longvid.memory.copy_engine

    calls, real = [], longvid.memory.copy_engine._bytes_of

    def failing(tensor):
        calls.append(0)
        if len(calls) == 25:
            raise OSError(5, "Input/output error")
        return real(tensor)

    monkeypatch.setattr(longvid.memory.copy_engine, "_bytes_of", failing)
    offloader = None
    with CopyEngine(CPU) as copies:
        offloader = Offloader(Placement(offloaded=frozenset(sizes(model))), copies)
        with ConvCache(model, offloader=offloader) as cache:  # leaving raises nothing of its own
            with pytest.raises(OSError, match="Input/output"):
                for part in video.split(CHUNK, dim=2):
                    model(part, cache)
            assert cache.nbytes == cache.device_bytes == 0
        assert copies.spare_bytes > 0


@pytest.mark.parametrize("offloaded", [(), ("layers.1",), ("layers.0", "layers.1", "layers.2")])
@pytest.mark.parametrize("after_chunk", range(3))
@pytest.mark.parametrize("layer", range(5))
def test_eviction_at_any_layer_changes_nothing(model, video, offloaded, after_chunk, layer):
    """Contexts are forced off the device after a layer of a chunk; the rest of the video is the same bit for bit."""
    expected = run(model, video)
    with CopyEngine(CPU) as copies:
        offloader = Offloader(Placement(offloaded=frozenset(offloaded), prefetch_bytes=2000), copies)
        calls = []

        def evict(*_):
            calls.append(0)
            if len(calls) == after_chunk + 1:
                offloader.evict()

        handle = model.layers[layer].conv.register_forward_hook(evict)
        with ConvCache(model, offloader=offloader) as cache:
            got = torch.cat([model(part, cache) for part in video.split(CHUNK, dim=2)], dim=2)
            assert cache.device_bytes < max(sizes(model).values()) + 1
        handle.remove()
    assert torch.equal(got, expected)


def test_evicting_twice_frees_nothing_more(model, video):
    with CopyEngine(CPU) as copies:
        offloader = Offloader(None, copies)
        with ConvCache(model, offloader=offloader) as cache:
            model(video[:, :, :CHUNK], cache)
            assert offloader.evict() == sum(sizes(model).values())
            assert offloader.evict() == 0
            assert cache.device_bytes == 0
            assert cache.nbytes == sum(sizes(model).values())


def test_nothing_is_held_after_an_exception_with_copies_under_way(model, video):
    tracker, calls = AllocationTracker(), []

    def fail(*_):
        calls.append(0)
        if len(calls) == 3:
            raise ZeroDivisionError

    handle = model.layers[3].conv.register_forward_hook(fail)
    placement = Placement(offloaded=frozenset(sizes(model)), prefetch_bytes=3000)
    with CopyEngine(CPU) as copies:
        with tracker, contextlib.suppress(ZeroDivisionError):
            run(model, video, placement, copies)
        gc.collect()
        assert tracker.live_bytes == 0
    handle.remove()
    assert len(calls) == 3


class OutOfMemory:
    """Fails the next ``times`` convolutions of a layer as a device without memory does."""

    def __init__(self, layer, *, at_call, times=1):
        self.calls, self.at_call, self.times = 0, at_call, times
        self.handle = layer.conv.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.at_call <= self.calls - 1 < self.at_call + self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("chunk", range(3))
def test_a_device_that_runs_out_once_is_survived_bit_for_bit(model, video, layer, chunk):
    expected = run(model, video)
    fault = OutOfMemory(model.layers[layer], at_call=chunk)
    warned = pytest.warns(UserWarning, match=f"ran out of memory in chunk {chunk}; all contexts were moved")
    with CopyEngine(CPU) as copies, warned:
        assert torch.equal(run(model, video, None, copies), expected)
    fault.handle.remove()


def test_a_device_that_runs_out_twice_fails_with_its_own_error(model, video):
    fault = OutOfMemory(model.layers[2], at_call=1, times=2)
    with CopyEngine(CPU) as copies, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            run(model, video, None, copies)
    fault.handle.remove()


def test_other_errors_are_not_retried(model, video):
    handle = model.layers[1].conv.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("other")))
    with CopyEngine(CPU) as copies, pytest.raises(RuntimeError, match="other"):
        run(model, video, None, copies)
    handle.remove()

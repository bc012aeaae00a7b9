"""The pool: memory is handed out again when it is free, and never a moment earlier."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.contexts import forward_context

from longvid import AllocationTracker, CausalConv3d
from longvid.memory.buffer_pool import BufferPool, TensorKind, dense_within, flattened, layout_of

CPU = torch.device("cpu")
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
SHAPE = (1, 4, 3, 5, 6)


def kind(layout=torch.contiguous_format, device=CPU):
    return TensorKind(torch.float32, device, layout)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_a_dead_tensor_is_handed_out_again(layout, device):
    pool, tracker = BufferPool(), AllocationTracker()
    with tracker:
        for _ in range(5):
            tensor = pool.take(SHAPE, kind(layout, torch.device(device)))
            assert tensor.shape == SHAPE
            assert tensor.is_contiguous(memory_format=layout)
            assert layout_of(tensor) == layout
            del tensor
    assert tracker.peak_bytes == tracker.live_bytes == 4 * 360
    pool.clear()
    assert tracker.live_bytes == 0


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t[:, :, 1:], lambda t: t.permute(0, 2, 1, 3, 4).detach()])
def test_memory_that_anything_refers_to_is_not(hold):
    pool = BufferPool()
    tensor = pool.take(SHAPE, kind()).fill_(1.0)
    held = hold(tensor)
    del tensor
    for _ in range(4):
        pool.take(SHAPE, kind()).fill_(2.0)
    assert (held == 1.0).all()
    pool.clear()
    pool.take(SHAPE, kind()).fill_(3.0)
    assert (held == 1.0).all()


def test_idle_memory_of_another_size_is_let_go_before_more_is_taken():
    pool, tracker = BufferPool(), AllocationTracker()
    with tracker:
        for t in (7, 5, 3):
            pool.take((1, 4, t, 5, 6), kind())
    assert tracker.peak_bytes == 7 * 480
    assert tracker.live_bytes == 3 * 480


def test_what_is_not_asked_for_again_goes_after_two_requests():
    pool, tracker = BufferPool(), AllocationTracker()
    with tracker:
        large, small = pool.take((1, 4, 9, 5, 6), kind()), pool.take(SHAPE, kind())
        del large, small
        live = []
        for _ in range(3):
            pool.take(SHAPE, kind())
            live.append(tracker.live_bytes)
    assert live[-1] == 3 * 480
    assert live[0] == 12 * 480


def test_kept_memory_serves_what_is_smaller_and_is_not_hoarded():
    pool, tracker = BufferPool(keep=True), AllocationTracker()
    with tracker:
        wide = [pool.take((1, 4, t, 5, 6), kind()) for t in (9, 4, 9)]
        addresses = {t.data_ptr() for t in wide}
        del wide
        for _ in range(3):  # the levels of a model, chunk after chunk
            for t in (3, 4, 8):
                a, b = pool.take((1, 4, t, 5, 6), kind()).fill_(1.0), pool.take((1, 4, 9, 5, 6), kind())
                b.fill_(2.0)
                assert (a == 1.0).all()
                assert {a.data_ptr(), b.data_ptr()} <= addresses
                del a, b
            assert tracker.live_bytes == pool.num_bytes == 22 * 480
        larger = pool.take((1, 4, 12, 5, 6), kind())  # what served last longest ago makes room for it
        assert pool.num_bytes <= 22 * 480
        del larger
        assert pool.take((1, 4, 1, 5, 6), kind()).untyped_storage().nbytes() == 480  # none of its business
    pool.clear()
    assert tracker.live_bytes == 0


@pytest.mark.parametrize("keep", [False, True])
def test_memory_that_is_gone_before_the_next_request(keep):
    pool, tracker = BufferPool(keep=keep), AllocationTracker()
    small, large = (1, 1, 1, 1, 8), (1, 1, 1, 100, 8)
    with tracker:
        held = pool.take(large, kind())
        for _ in range(3):
            pool.take(small, kind(), brief=True)
            assert tracker.live_bytes == 3200 + 32 * keep  # thrifty ones hold it not a moment longer
    assert tracker.peak_bytes == 3232
    assert pool.sizes == ([3200, 32] if keep else [3200])
    del held


def test_a_dense_part_lies_at_the_beginning_in_the_same_layout():
    for layout in LAYOUTS:
        tensor = torch.arange(360.0).view(SHAPE).contiguous(memory_format=layout)
        part = dense_within(tensor, (1, 4, 3, 2, 6))
        assert part.is_contiguous(memory_format=layout)
        assert part.data_ptr() == tensor.data_ptr()
        assert torch.equal(flattened(part), flattened(tensor)[:144])


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=60), st.booleans())
def test_no_two_living_tensors_share_memory(requests, keep):
    """Tensors live for a few requests each; every one keeps what was written into it."""
    pool, living = BufferPool(keep=keep), []
    for number, (frames, life) in enumerate(requests):
        living = [(t, n, left - 1) for t, n, left in living if left]
        living.append((pool.take((1, 1, frames, 2, 2), kind()).fill_(number), number, life))
        assert all((t == n).all() for t, n, _ in living)
        assert all(t.shape[2:] == (t.shape[2], 2, 2) for t, _, _ in living)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flattened_is_a_view_in_the_order_of_memory(layout):
    tensor = torch.arange(360.0).view(SHAPE).contiguous(memory_format=layout)
    flat = flattened(tensor)
    assert flat.data_ptr() == tensor.data_ptr()
    assert flat.shape == (360,)
    assert torch.equal(torch.as_strided(tensor, (360,), (1,)), flat)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5, 6), (1, 4, 1, 1, 1), (2, 3, 1, 1, 2), (1, 8, 2, 1, 1)])
def test_layouts_of_odd_shapes_survive_a_slice(shape):
    for layout in LAYOUTS:
        tensor = torch.zeros(shape).contiguous(memory_format=layout)
        found = layout_of(tensor)
        assert tensor.is_contiguous(memory_format=found)
        assert tensor[:, :, :1].is_contiguous(memory_format=layout_of(tensor[:, :, :1])) or layout_of(tensor) == found


def test_kept_memory_is_given_up_before_a_chunk_fails_and_is_not_kept_again():
    layer, x, calls = CausalConv3d(4, 4, 3), torch.randn(1, 4, 4, 6, 6), []

    def fails(times):
        calls.append(1)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return "done"

    with forward_context(layer, keep_buffers=True) as context, torch.inference_mode():
        with context.chunk():
            layer(x, context)
        assert context.buffers.idle_bytes
        with context.chunk():
            with pytest.warns(UserWarning, match="ran out of memory in chunk 1; memory that the layers .* given up"):
                assert context.attempt(lambda: fails(1)) == "done"  # no context can leave, but this memory can
            assert len(calls) == 2
            layer(x, context)
        assert context.buffers.num_bytes == 0
        with pytest.raises(torch.OutOfMemoryError), context.chunk():
            context.attempt(lambda: fails(10))
    assert len(calls) == 3


def test_kept_kernels_are_made_once_and_given_up_before_a_chunk_fails():
    layer, made = CausalConv3d(4, 4, 3), []

    def prepare():
        made.append(1)
        return (torch.ones(5),)

    def fails_once():
        if context.kernel_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return "done"

    with forward_context(layer, keep_kernels=True) as context:
        kernels = context.prepared(layer, prepare)
        assert context.prepared(layer, prepare) is kernels
        assert (len(made), context.kernel_bytes) == (1, 20)
        with pytest.warns(UserWarning, match="was given up, which set 20 B free"):
            assert context.attempt(fails_once) == "done"
        assert torch.equal(context.prepared(layer, prepare)[0], kernels[0])
        assert (len(made), context.kernel_bytes) == (2, 0)  # there is no room for them any more
    with forward_context(layer, keep_kernels=True) as context:
        assert context.prepared(layer, lambda: (layer.conv.weight,))[0] is layer.conv.weight
        assert context.kernel_bytes == 0  # it is the model's
        context.prepared(layer, prepare)
    assert context.kernel_bytes == 0
    with forward_context(layer) as thrifty:
        thrifty.prepared(layer, prepare)
        assert thrifty.kernel_bytes == 0

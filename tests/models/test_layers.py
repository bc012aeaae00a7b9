import itertools
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.contexts import forward_context

from longvid import CausalConv3d
from longvid.models.kernels import convolution
from longvid.models.kernels.convolution import fuses_residuals
from longvid.models.kernels.cpu import has_bfloat16
from longvid.models.kernels.cuts import row_tiles
from longvid.models.layers import norms
from longvid.models.layers.norms import Producer
from longvid.models.layers.resampling import Downsample, Upsample
from longvid.models.layers.residual import ResnetBlock
from longvid.models.layers.window import Window
from longvid.models.numerics import Numerics

DTYPES = [torch.float32, torch.bfloat16]


def group_norm(num_groups, latent_channels=None):
    if latent_channels is None:
        return partial(norms.GroupNormSiLU, num_groups)
    return partial(norms.SpatialNormSiLU, latent_channels=latent_channels, num_groups=num_groups)


LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@given(
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.booleans(),
)
def test_slices_cover_all_frames_within_the_limits(num_frames, taps, width, channels, window_limit, slice_limit, pairs):
    last = torch.channels_last_3d if pairs else torch.contiguous_format
    with torch.device("meta"):
        conv, like = CausalConv3d(channels, 17, (taps, 1, 1)), torch.empty(1, channels, num_frames, 2, width)
    source, multiple = Producer(like.contiguous(memory_format=last)), 2 if pairs and taps == 3 and channels > 15 else 1
    numerics = Numerics(paired_frames=pairs)
    with forward_context(conv, numerics=numerics, conv_elements=window_limit, slice_elements=slice_limit) as context:
        pieces = [block.frames for block in conv.blocks(source, context)]
    assert [t for piece in pieces for t in piece] == list(range(num_frames))
    assert all(pieces)
    assert all(piece.stop % multiple == 0 for piece in pieces[:-1])
    for piece in pieces:
        # reads len(piece) + context frames, so never fewer than the kernel's context + 1
        if len(piece) > multiple:
            area = 2 * width
            assert (len(piece) + taps - 1) * channels * area <= window_limit
            assert len(piece) * 17 * area <= window_limit
            assert len(piece) * max(channels, 17) * area <= slice_limit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [1, 300, 700, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_in_parts_is_the_whole_bit_for_bit(limit, dtype, layout):
    """Frames too large for a call go in row tiles, chunks too long in slices; both through the same layer."""
    conv = CausalConv3d(4, 6, 3).to(dtype)
    for parameter in conv.parameters():  # of integers, for which every order of sums is exact
        parameter.data = small_integers(*parameter.shape).to(dtype)
    x = small_integers(1, 4, 9, 7, 5).to(dtype).contiguous(memory_format=layout)

    def run(**limits):
        with forward_context(conv, **limits) as context, torch.inference_mode(), context.chunk():
            return conv(x, context)

    whole = run()
    assert torch.equal(run(conv_elements=limit), whole)
    assert torch.equal(run(slice_elements=limit), whole)
    if dtype == torch.float32 or has_bfloat16():  # PyTorch's own kernel forgets the layout
        assert whole.is_contiguous(memory_format=layout)


def test_a_slice_is_never_shorter_than_the_kernel():
    conv, seen = CausalConv3d(2, 2, 3), []
    conv.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    with forward_context(conv, slice_elements=1) as context, torch.inference_mode(), context.chunk():
        conv(torch.randn(1, 2, 8, 4, 4), context)
    assert seen == [3] * 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_in_slices_is_the_whole_bit_for_bit(dtype, widths, paired, fused, layout):
    if fused and not fuses_residuals(dtype):
        pytest.skip("this build of PyTorch cannot")
    # Without kernels for bfloat16, products in float32, or else this takes minutes.
    numerics = Numerics(paired_frames=paired, fused_residuals=fused, float32_products=not has_bfloat16())
    block = ResnetBlock(*widths, group_norm(4)).to(dtype)
    chunks = [torch.randn(1, widths[0], t, 6, 10, dtype=dtype).contiguous(memory_format=layout) for t in (9, 8, 3)]

    def run(slice_elements):
        with (
            forward_context(block, slice_elements=slice_elements, numerics=numerics) as context,
            torch.inference_mode(),
        ):
            outs = []
            for x in chunks:
                owned = x.clone(memory_format=torch.preserve_format)
                with context.chunk():
                    out = block(owned, context)
                # without a shortcut the output takes the input's place, and with one the input stays as it is
                assert torch.equal(owned, x) == (len(set(widths)) == 2) != (out.data_ptr() == owned.data_ptr())
                outs.append(out.clone())
            return outs

    whole = run(2**31 - 1)
    for frames in (1, 2, 3, 5):
        for got, expected in zip(run(frames * max(widths) * 60), whole, strict=True):
            assert torch.equal(got, expected)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), st.integers(1, 20))
def test_row_tiles_cover_all_rows_and_read_whole_multiples(height, most, halo, multiple):
    found = row_tiles(height, most, halo=halo, multiple=multiple)
    assert [row for tile in found for row in tile] == list(range(height))
    assert all(len(tile) <= max(most, multiple) for tile in found)
    assert len({len(tile) for tile in found[1:-1]}) <= 1
    if max(most, multiple) > halo:
        assert all((tile.stop + halo) % multiple == 0 for tile in found if tile.stop + halo < height)


TILINGS = [
    {"tile_elements": 1},
    {"tile_elements": 1, "slice_elements": 1, "keep_kernels": True},
    {"tile_elements": 20_000, "slice_elements": 50_000},
    {"conv_elements": 1},
    {"conv_elements": 30_000},
]


def small_integers(*shape):
    return torch.randint(-1, 2, shape).float()


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(64, 64), (64, 128), (16, 24), (10, 14)]),
    st.booleans(),
    st.sampled_from([False, *([True] if fuses_residuals(torch.float32) else [])]),
    st.booleans(),
    st.integers(1, 2),
    st.sampled_from([16, 17, 24, 37]),
    st.sampled_from(TILINGS),
)
def test_tiles_of_integers_are_the_whole_bit_for_bit(widths, winograd, fused, adds, batch, rows, limits):
    """Every order of sums is exact for small integers, so only a wrong row, frame or context can differ."""
    torch.manual_seed(0)
    conv = CausalConv3d(*widths, 3)
    for parameter in conv.parameters():
        parameter.data = small_integers(*parameter.shape)
    numerics = Numerics(layout="channels_last", paired_frames=winograd, fused_residuals=fused)
    chunks = [
        tuple(small_integers(batch, c, t, rows, 12).contiguous(memory_format=LAYOUTS[1]) for c in widths)
        for t in (9, 8, 3)
    ]

    def run(**limits):
        with forward_context(conv, numerics=numerics, **limits) as context, torch.inference_mode():
            outs = []
            for x, residual in chunks:
                onto = residual.clone(memory_format=torch.preserve_format) if adds else None
                with context.chunk():
                    outs.append(conv.stream(Producer(x), context, onto=onto).clone())
            return outs, dict(context.cache.contexts())

    (outs, contexts), (expected, expected_contexts) = run(**limits), run()
    assert all(map(torch.equal, outs, expected))
    assert all(torch.equal(contexts[path], context) for path, context in expected_contexts.items())


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(64, 64), (64, 128), (16, 24), (10, 14)]),
    st.sampled_from([*itertools.product(DTYPES, [False, True], [False, True])]),
    st.sampled_from([None, 5]),
    st.sampled_from([16, 17, 37]),
    st.sampled_from([1, 3]),
    st.sampled_from(TILINGS),
)
def test_a_tiled_block_agrees_with_the_whole(widths, form, latent_channels, rows, threads, limits):
    """Kernels may add in another order when the number of rows changes. What is normed before them has the same bits,
    so the context of the first convolution has."""
    dtype, winograd, fused = form
    assume(not fused or fuses_residuals(dtype))
    torch.manual_seed(0)
    block = ResnetBlock(*widths, group_norm(2, latent_channels)).to(dtype)
    numerics = Numerics(
        layout="channels_last",
        paired_frames=winograd,
        fused_residuals=fused,
        float32_products=not has_bfloat16(),  # or else bfloat16 takes minutes
    )
    videos = [
        [torch.randn(1, c, t, h, w).to(dtype).contiguous(memory_format=LAYOUTS[1]) for t in times]
        for c, times, h, w in ((widths[0], (9, 8, 3), rows * 2, 12), (5, (3, 2, 2), rows, 3))
    ]

    def run(**limits):
        with forward_context(block, numerics=numerics, **limits) as context, torch.inference_mode():
            outs = []
            for x, z in zip(*videos, strict=True):
                with context.chunk():
                    outs.append(block(x.clone(memory_format=torch.preserve_format), context, z).clone())
            return outs, dict(context.cache.contexts())

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    slabs = mock.patch.object(norms, "SLAB_BYTES", 4000)  # less than a tile of these frames
    try:
        with slabs:
            (outs, contexts), (expected, expected_contexts) = run(**limits), run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(contexts["conv1"], expected_contexts["conv1"])
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for got, whole in zip((*outs, contexts["conv2"]), (*expected, expected_contexts["conv2"]), strict=True):
        assert (got.double() - whole.double()).norm() <= tolerance * whole.double().norm()


def test_layers_with_large_frames_really_run_in_tiles():
    conv = CausalConv3d(64, 64, 3)
    x = torch.randn(1, 64, 8, 40, 10).contiguous(memory_format=LAYOUTS[1])

    def tiles_of(x, **limits):
        with forward_context(conv, **limits) as context:
            return [(len(block.frames), len(block.rows)) for block in conv.blocks(Producer(x), context)]

    assert tiles_of(x) == [(8, 40)]
    assert tiles_of(x, tile_elements=1) == [(8, 15), (8, 16), (8, 9)]
    assert tiles_of(x, tile_elements=64 * 10 * 10 * 22) == [(8, 19), (8, 20), (8, 1)]
    assert tiles_of(x, tile_elements=64 * 10 * 10 * 40) == [(8, 40)]
    assert set(tiles_of(x, conv_elements=1)) == {(1, 1)}
    assert tiles_of(x.contiguous(), tile_elements=1) == [(8, 40)]


def test_what_a_convolution_reads_is_dense_in_every_tile(monkeypatch):
    """Also in the first and the last, which are lower: a kernel would copy what is not."""
    conv, found = CausalConv3d(64, 64, 3), set()
    x = torch.randn(1, 64, 8, 40, 10).contiguous(memory_format=LAYOUTS[1])
    read = Window.input

    def watched(window):
        tensor = read(window)
        found.add((tensor.shape[3], tensor.is_contiguous(memory_format=LAYOUTS[1])))
        return tensor

    monkeypatch.setattr(Window, "input", watched)
    with forward_context(conv, tile_elements=1) as context, torch.inference_mode(), context.chunk():
        conv.stream(Producer(x), context)
    assert found == {(17, True), (18, True), (11, True)}


@pytest.mark.skipif(not fuses_residuals(torch.float32), reason="this build of PyTorch cannot")
@pytest.mark.parametrize(("batch", "tile_elements", "kernel_calls"), [(1, 1, 3), (1, None, 1), (2, 1, 0)])
def test_a_residual_of_a_tile_is_added_in_one_call(monkeypatch, batch, tile_elements, kernel_calls):
    """And not in one for each of its frames. The library has no way for more than one video."""
    block, calls = ResnetBlock(64, 64, group_norm(2)), []
    real = convolution._accumulate
    monkeypatch.setattr(convolution, "_accumulate", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(norms, "SLAB_BYTES", 1)
    x = torch.randn(batch, 64, 8, 40, 10).contiguous(memory_format=LAYOUTS[1])
    numerics = Numerics(layout="channels_last", fused_residuals=True)
    context = forward_context(block, tile_elements=tile_elements, numerics=numerics)
    with context, torch.inference_mode(), context.chunk():
        block(x, context)
    assert len(calls) == kernel_calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_agree_to_rounding_and_pass_through(dtype):
    block = ResnetBlock(16, 24, group_norm(4, 5)).to(dtype)
    x, z = torch.randn(1, 16, 4, 8, 12, dtype=dtype), torch.randn(1, 5, 2, 2, 3, dtype=dtype)

    def run(layout, paired=False):
        # PyTorch's own bfloat16 kernels, where the library has none, forget the layout.
        numerics = Numerics(paired_frames=paired, float32_products=not has_bfloat16())
        with forward_context(block, numerics=numerics) as context, torch.inference_mode(), context.chunk():
            out = block(
                *(a.contiguous(memory_format=layout) for a in (x,)), context, z.contiguous(memory_format=layout)
            )
        assert out.is_contiguous(memory_format=layout)
        return out.float()

    plain, last, pairs = run(LAYOUTS[0]), run(LAYOUTS[1]), run(LAYOUTS[1], paired=True)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for got in (last, pairs):
        assert (got - plain).norm() / plain.norm() <= tolerance
        assert not torch.equal(got, plain)  # another order of sums: were it equal, the layout would not be used


@pytest.mark.parametrize("kernel", [(3, 2, 3), (1, 1, 4), 2])
def test_even_kernels_in_space_are_refused(kernel):
    with pytest.raises(ValueError, match="even"):
        CausalConv3d(1, 1, kernel)


@pytest.mark.parametrize("frames", [1, 2, 8, 9])
@pytest.mark.parametrize("time", [False, True])
def test_downsample_halves(frames, time):
    layer, x = Downsample(3, time=time), torch.randn(1, 3, frames, 6, 8)
    with torch.inference_mode(), forward_context(layer) as context:
        out = layer(x, context)
    kept = frames % 2 + frames // 2 if time else frames
    assert out.shape == (1, 3, kept, 3, 4)
    last = x[:, :, -2:].mean(2) if time and frames > 1 else x[:, :, -1]
    torch.testing.assert_close(out[:, :, -1], layer.conv(F.pad(last, (0, 1, 0, 1))))


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("time", [False, True])
def test_upsample_doubles(frames, time):
    layer, x = Upsample(3, time=time), torch.randn(1, 3, frames, 3, 4)
    with torch.inference_mode(), forward_context(layer) as context:
        out = layer(x, context)
    doubled = time and frames > 1
    assert out.shape == (1, 3, (2 * frames - frames % 2) if doubled else frames, 6, 8)
    torch.testing.assert_close(out[:, :, 0], layer.conv(F.interpolate(x[:, :, 0], scale_factor=2.0)))
    torch.testing.assert_close(out[:, :, -1], layer.conv(F.interpolate(x[:, :, -1], scale_factor=2.0)))


def test_no_call_of_a_kernel_exceeds_the_limit_when_upsampling(monkeypatch):
    layer, x, sizes = Upsample(4, time=False), torch.randn(1, 4, 1, 30, 5), []
    real = convolution._call
    monkeypatch.setattr(convolution, "_call", lambda *args: sizes.append(real(*args)) or sizes[-1])
    with forward_context(layer, conv_elements=1000) as context, torch.inference_mode():
        layer(x.contiguous(memory_format=LAYOUTS[1]), context)
    assert len(sizes) > 2
    assert max(y.numel() for y in sizes) <= 1000

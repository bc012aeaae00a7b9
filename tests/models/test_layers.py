import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from longvid import CausalConv3d, ConvCache
from longvid.models import convolution, norms
from longvid.models.cache import Window
from longvid.models.convolution import fuses_residuals
from longvid.models.layers import Downsample, ResnetBlock, Upsample, _Copied, bands, time_slices
from longvid.models.numerics import Numerics

DTYPES = [torch.float32, torch.bfloat16]


LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@given(
    st.integers(1, 40),
    st.integers(0, 6),
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2),
)
def test_time_slices_cover_all_frames_within_the_limits(
    num_frames, context, in_frame, out_frame, window_limit, slice_limit, multiple, lead
):
    lead = min(lead, multiple - 1)
    pieces = time_slices(
        num_frames,
        context_frames=context,
        in_frame=in_frame,
        out_frame=out_frame,
        window_limit=window_limit,
        slice_limit=slice_limit,
        multiple=multiple,
        lead=lead,
    )
    assert [t for piece in pieces for t in piece] == list(range(num_frames))
    assert all(pieces)
    assert all(piece.stop % multiple == lead for piece in pieces[:-1])
    for piece in pieces:
        # reads len(piece) + context frames, so never fewer than the kernel's context + 1
        assert len(piece) >= 1
        if len(piece) > multiple:
            assert (len(piece) + context) * in_frame <= window_limit
            assert len(piece) * out_frame <= window_limit
            assert len(piece) * max(in_frame, out_frame) <= slice_limit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [1, 300, 700, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_in_parts_is_the_whole_bit_for_bit(limit, dtype, layout):
    """Frames too large for a call go in bands of rows, chunks too long in slices; both through the same layer."""
    conv = CausalConv3d(4, 6, 3).to(dtype)
    x = torch.randn(1, 4, 9, 7, 5, dtype=dtype).contiguous(memory_format=layout)

    def run(**limits):
        with ConvCache(conv, **limits) as cache, torch.inference_mode(), cache.chunk():
            return conv(x, cache)

    whole = run()
    assert torch.equal(run(max_conv_elements=limit), whole)
    assert torch.equal(run(slice_elements=limit), whole)
    assert whole.is_contiguous(memory_format=layout)


def test_a_slice_is_never_shorter_than_the_kernel():
    conv, seen = CausalConv3d(2, 2, 3), []
    conv.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    with ConvCache(conv, slice_elements=1) as cache, torch.inference_mode(), cache.chunk():
        conv(torch.randn(1, 2, 8, 4, 4), cache)
    assert seen == [3] * 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_in_slices_is_the_whole_bit_for_bit(dtype, widths, paired, fused, layout):
    if fused and not fuses_residuals(dtype):
        pytest.skip("this build of PyTorch cannot")
    numerics = Numerics(paired_frames=paired, fused_residuals=fused)
    block = ResnetBlock(*widths, num_groups=4, eps=1e-6).to(dtype)
    chunks = [torch.randn(1, widths[0], t, 6, 10, dtype=dtype).contiguous(memory_format=layout) for t in (9, 8, 3)]

    def run(slice_elements):
        with ConvCache(block, slice_elements=slice_elements, numerics=numerics) as cache, torch.inference_mode():
            outs = []
            for x in chunks:
                owned = x.clone(memory_format=torch.preserve_format)
                with cache.chunk():
                    out = block(owned, cache)
                # without a shortcut the output takes the input's place, and with one the input stays as it is
                assert torch.equal(owned, x) == (len(set(widths)) == 2) != (out.data_ptr() == owned.data_ptr())
                outs.append(out.clone())
            return outs

    whole = run(2**31 - 1)
    for frames in (1, 2, 3, 5):
        for got, expected in zip(run(frames * max(widths) * 60), whole, strict=True):
            assert torch.equal(got, expected)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), st.integers(1, 20))
def test_bands_cover_all_rows_and_read_in_steps(height, most, halo, step):
    found = bands(height, most, halo=halo, step=step)
    assert [row for band in found for row in band] == list(range(height))
    assert all(len(band) <= max(most, step) for band in found)
    assert len({len(band) for band in found[1:-1]}) <= 1
    if max(most, step) > halo:
        assert all((band.stop + halo) % step == 0 for band in found if band.stop + halo < height)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(64, 64), (64, 128), (16, 24), (10, 14)]),
    st.sampled_from([*itertools.product(DTYPES, [False, True], [False, True])]),
    st.sampled_from([None, 5]),
    st.integers(1, 2),
    st.sampled_from([16, 17, 24, 37]),
    st.sampled_from([1, 3]),
    st.sampled_from(
        [
            {"band_elements": 1},
            {"band_elements": 1, "slice_elements": 1},
            {"band_elements": 20_000, "slice_elements": 50_000},
            {"max_conv_elements": 1},
            {"max_conv_elements": 30_000},
        ]
    ),
)
def test_a_block_in_bands_is_the_whole_bit_for_bit(widths, form, latent_channels, batch, rows, threads, limits):
    """Bands of rows, alone and within slices of frames, with the context of three chunks and every kind of residual."""
    dtype, paired, fused = form
    assume(not fused or fuses_residuals(dtype))
    torch.manual_seed(0)
    block = ResnetBlock(*widths, num_groups=2, eps=1e-6, latent_channels=latent_channels).to(dtype)
    numerics = Numerics(layout="channels_last", paired_frames=paired, fused_residuals=fused)
    videos = [
        [torch.randn(batch, c, t, h, w).to(dtype).contiguous(memory_format=LAYOUTS[1]) for t in times]
        for c, times, h, w in ((widths[0], (9, 8, 3), rows * 2, 12), (5, (3, 2, 2), rows, 3))
    ]

    def run(**limits):
        with ConvCache(block, numerics=numerics, **limits) as cache, torch.inference_mode():
            outs = []
            for x, z in zip(*videos, strict=True):
                with cache.chunk():
                    outs.append(block(x.clone(memory_format=torch.preserve_format), cache, z).clone())
            return outs, dict(cache.contexts())

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    slabs = mock.patch.object(norms, "_SLAB_BYTES", 4000)  # less than a band of these frames
    try:
        with slabs:
            (outs, contexts), (expected, expected_contexts) = run(**limits), run()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, outs, expected))
    assert all(torch.equal(contexts[path], context) for path, context in expected_contexts.items())


def test_layers_with_large_frames_really_run_in_bands():
    conv = CausalConv3d(64, 64, 3)
    x = torch.randn(1, 64, 8, 40, 10).contiguous(memory_format=LAYOUTS[1])

    def bands_of(x, **limits):
        with ConvCache(conv, **limits) as cache:
            return [(len(block.frames), len(block.rows)) for block in conv.blocks(_Copied(x), cache)]

    assert bands_of(x) == [(8, 40)]
    assert bands_of(x, band_elements=1) == [(8, 15), (8, 16), (8, 9)]
    assert bands_of(x, band_elements=64 * 10 * 10 * 22) == [(8, 19), (8, 20), (8, 1)]
    assert bands_of(x, band_elements=64 * 10 * 10 * 40) == [(8, 40)]
    assert set(bands_of(x, max_conv_elements=1)) == {(1, 1)}
    assert bands_of(x.contiguous(), band_elements=1) == [(8, 40)]


def test_what_a_convolution_reads_is_dense_in_every_band(monkeypatch):
    """Also in the first and the last, which are lower: a kernel would copy what is not."""
    conv, found = CausalConv3d(64, 64, 3), set()
    x = torch.randn(1, 64, 8, 40, 10).contiguous(memory_format=LAYOUTS[1])
    read = Window.input

    def watched(window):
        tensor = read(window)
        found.add((tensor.shape[3], tensor.is_contiguous(memory_format=LAYOUTS[1])))
        return tensor

    monkeypatch.setattr(Window, "input", watched)
    with ConvCache(conv, band_elements=1) as cache, torch.inference_mode(), cache.chunk():
        conv.stream(_Copied(x), cache)
    assert found == {(17, True), (18, True), (11, True)}


@pytest.mark.skipif(not fuses_residuals(torch.float32), reason="this build of PyTorch cannot")
@pytest.mark.parametrize(("batch", "band_elements", "kernel_calls"), [(1, 1, 3), (1, None, 1), (2, 1, 0)])
def test_a_residual_of_a_band_is_added_in_one_call(monkeypatch, batch, band_elements, kernel_calls):
    """And not in one for each of its frames. The library has no way for more than one video."""
    block, calls = ResnetBlock(64, 64, num_groups=2, eps=1e-6), []
    real = convolution._accumulate
    monkeypatch.setattr(convolution, "_accumulate", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(norms, "_SLAB_BYTES", 1)
    x = torch.randn(batch, 64, 8, 40, 10).contiguous(memory_format=LAYOUTS[1])
    numerics = Numerics(layout="channels_last", fused_residuals=True)
    cache = ConvCache(block, band_elements=band_elements, numerics=numerics)
    with cache, torch.inference_mode(), cache.chunk():
        block(x, cache)
    assert len(calls) == kernel_calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_agree_to_rounding_and_pass_through(dtype):
    block = ResnetBlock(16, 24, num_groups=4, eps=1e-6, latent_channels=5).to(dtype)
    x, z = torch.randn(1, 16, 4, 8, 12, dtype=dtype), torch.randn(1, 5, 2, 2, 3, dtype=dtype)

    def run(layout, paired=False):
        with ConvCache(block, numerics=Numerics(paired_frames=paired)) as cache, torch.inference_mode(), cache.chunk():
            out = block(*(a.contiguous(memory_format=layout) for a in (x,)), cache, z.contiguous(memory_format=layout))
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
    with torch.inference_mode(), ConvCache(layer) as cache:
        out = layer(x, cache)
    kept = frames % 2 + frames // 2 if time else frames
    assert out.shape == (1, 3, kept, 3, 4)
    last = x[:, :, -2:].mean(2) if time and frames > 1 else x[:, :, -1]
    torch.testing.assert_close(out[:, :, -1], layer.conv(F.pad(last, (0, 1, 0, 1))))


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(64, 64), (64, 128), (16, 24), (10, 14)]),
    st.sampled_from([*itertools.product(DTYPES, [False, True])]),
    st.integers(1, 2),
    st.sampled_from([(9, 8, 4), (1, 2), (5, 4), (3, 8, 2)]),
    st.sampled_from([1, 3]),
    st.sampled_from(
        [
            {"band_elements": 1},
            {"slice_elements": 1},
            {"band_elements": 1, "slice_elements": 1, "keep_kernels": True},
            {"band_elements": 20_000, "slice_elements": 200_000},
            {"max_conv_elements": 1},
            {"max_conv_elements": 30_000},
        ]
    ),
)
def test_averages_in_convolutions_are_the_same_in_blocks_and_near_to_the_plain_form(
    widths, form, batch, times, threads, limits
):
    """Of a block that pools and what halves space behind it, over the chunks of a video."""
    dtype, fused = form
    assume(not fused or fuses_residuals(dtype))
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [ResnetBlock(*widths, num_groups=2, eps=1e-6, pools=True), Downsample(widths[1], time=True)]
    ).to(dtype)
    video = [torch.randn(batch, widths[0], t, 34, 12).to(dtype, memory_format=LAYOUTS[1]) for t in times]

    def run(pooling, layout=LAYOUTS[1], **limits):
        numerics = Numerics(layout="channels_last", fused_residuals=fused, fused_pooling=pooling)
        outs = []
        with ConvCache(layers, numerics=numerics, **limits) as cache, torch.inference_mode():
            for x in video:
                with cache.chunk():
                    out = x.clone(memory_format=layout)
                    for layer in layers:
                        out = layer(out, cache)
                    outs.append(out.clone())
        return outs

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        blocks, whole, plain = run(True, **limits), run(True), run(False)
    finally:
        torch.set_num_threads(before)
    assert [out.shape[2] for out in whole] == [(t + 1) // 2 for t in times]
    assert all(map(torch.equal, blocks, whole))
    for got, expected in zip(whole, plain, strict=True):
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error <= {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert not all(map(torch.equal, whole, plain))  # or else nothing would be averaged in a convolution
    contiguous = [run(pooling, layout=LAYOUTS[0]) for pooling in (False, True)]
    assert all(map(torch.equal, *contiguous))  # kernels of that layout are not for it


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("time", [False, True])
def test_upsample_doubles(frames, time):
    layer, x = Upsample(3, time=time), torch.randn(1, 3, frames, 3, 4)
    with torch.inference_mode(), ConvCache(layer) as cache:
        out = layer(x, cache)
    doubled = time and frames > 1
    assert out.shape == (1, 3, (2 * frames - frames % 2) if doubled else frames, 6, 8)
    torch.testing.assert_close(out[:, :, 0], layer.conv(F.interpolate(x[:, :, 0], scale_factor=2.0)))
    torch.testing.assert_close(out[:, :, -1], layer.conv(F.interpolate(x[:, :, -1], scale_factor=2.0)))


@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_upsampling_by_subpixels_is_the_same_in_bands_and_near_to_the_plain_form(dtype, channels, frames):
    layer = Upsample(channels, time=True).to(dtype)
    x = torch.randn(1, channels, frames, 9, 4).to(dtype, memory_format=LAYOUTS[1])

    def run(**limits):
        numerics = Numerics(layout="channels_last", subpixel_upsampling=True)
        with ConvCache(layer, numerics=numerics, **limits) as cache, torch.inference_mode():
            return [layer(x, cache) for _ in range(2)][-1]

    with torch.inference_mode(), ConvCache(layer) as cache:
        plain = layer(x, cache)
    row = x[:, :, 0, 0].numel()
    whole = run(band_elements=10**9)
    for limits in ({"band_elements": 16 * row}, {"band_elements": 1}, {"band_elements": 1, "keep_kernels": True}):
        assert torch.equal(run(**limits), whole)
    assert whole.is_contiguous(memory_format=LAYOUTS[1])
    assert not torch.equal(whole, plain)
    for found in (whole, run()):  # without bands nothing is packed
        error = (found.double() - plain.double()).norm() / plain.double().norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]


def test_no_call_of_a_kernel_exceeds_the_limit_when_upsampling(monkeypatch):
    layer, x, sizes = Upsample(4, time=False), torch.randn(1, 4, 1, 30, 5), []
    real = convolution._call
    monkeypatch.setattr(convolution, "_call", lambda *args: sizes.append(real(*args)) or sizes[-1])
    numerics = Numerics(layout="channels_last", subpixel_upsampling=True)
    with ConvCache(layer, numerics=numerics, max_conv_elements=1000) as cache, torch.inference_mode():
        layer(x.contiguous(memory_format=LAYOUTS[1]), cache)
    assert len(sizes) > 2
    assert max(y.numel() for y in sizes) <= 1000

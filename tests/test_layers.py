import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from longvid import CausalConv3d, ConvCache
from longvid.models.convolution import fuses_residuals
from longvid.models.layers import Downsample, ResnetBlock, Upsample, time_slices
from longvid.numerics import Numerics

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
)
def test_time_slices_cover_all_frames_within_the_limits(
    num_frames, context, in_frame, out_frame, window_limit, slice_limit, multiple
):
    pieces = time_slices(
        num_frames,
        context_frames=context,
        in_frame=in_frame,
        out_frame=out_frame,
        window_limit=window_limit,
        slice_limit=slice_limit,
        multiple=multiple,
    )
    assert [t for piece in pieces for t in piece] == list(range(num_frames))
    assert all(len(piece) % multiple == 0 for piece in pieces[:-1])
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

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from longvid import CausalConv3d, ConvCache
from longvid.models.layers import (
    Downsample,
    GroupNormSiLU,
    SpatialNormSiLU,
    Upsample,
    _moments_by_frame,
    group_moments,
    time_pieces,
)

DTYPES = [torch.float32, torch.bfloat16]


@given(st.integers(1, 40), st.integers(0, 6), st.integers(1, 500), st.integers(1, 500), st.integers(1, 10_000))
def test_time_pieces_cover_all_frames_within_the_limit(num_frames, context, in_frame, out_frame, limit):
    pieces = time_pieces(num_frames, context_frames=context, in_frame=in_frame, out_frame=out_frame, limit=limit)
    assert [t for piece in pieces for t in piece] == list(range(num_frames))
    for piece in pieces:
        # reads len(piece) + context frames, so never fewer than the kernel's context + 1
        assert len(piece) >= 1
        if len(piece) > 1:
            assert (len(piece) + context) * in_frame <= limit
            assert len(piece) * out_frame <= limit


@pytest.mark.parametrize("limit", [1, 700, 5000, 10**9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_in_pieces_equals_one_in_whole(limit, dtype):
    conv = CausalConv3d(4, 6, 3).to(dtype)
    x = torch.randn(1, 4, 9, 7, 5, dtype=dtype)

    def run(limit):
        with ConvCache(conv, max_conv_elements=limit) as cache, torch.inference_mode(), cache.chunk():
            return conv(x, cache)

    whole = run(10**9)
    torch.testing.assert_close(run(limit), whole, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_piece_is_never_shorter_than_the_kernel(monkeypatch):
    conv, seen = CausalConv3d(2, 2, 3), []
    real = conv.conv.forward
    monkeypatch.setattr(conv.conv, "forward", lambda x: seen.append(x.shape[2]) or real(x))
    with ConvCache(conv, max_conv_elements=1) as cache, torch.inference_mode(), cache.chunk():
        conv(torch.randn(1, 2, 8, 4, 4), cache)
    assert seen == [3] * 8


@pytest.mark.parametrize("kernel", [(3, 2, 3), (1, 1, 4), 2])
def test_even_kernels_in_space_are_refused(kernel):
    with pytest.raises(ValueError, match="even"):
        CausalConv3d(1, 1, kernel)


def torch_norm_silu(norm, x):
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_norm_equals_torch(dtype, frames):
    norm = GroupNormSiLU(4, 16, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, 16, frames, 6, 10) * 3 + 5).to(dtype)
    window = torch.full((2, 16, frames + 2, 6, 10), float("nan"), dtype=dtype)
    with torch.inference_mode():
        norm.fit(x).write_silu(x, window[:, :, 2:])
        expected = torch_norm_silu(norm, x)
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(window[:, :, 2:], expected, **tolerance)
    assert window[:, :, :2].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_frame_by_frame_equal_those_over_the_chunk(offset):
    """The path of devices whose kernel has no float32 moments for a narrow dtype."""
    x = torch.randn(2, 12, 5, 4, 6) * torch.rand(1, 1, 5, 1, 1) + offset
    for got, expected in zip(_moments_by_frame(x, 3, 1e-6), group_moments(x, 3, 1e-6), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(1, 1), (2, 2), (4, 2), (8, 2), (3, 3), (5, 3), (9, 3)]), st.sampled_from([1, 2, 4]))
def test_spatial_norm_equals_its_definition(times, factor):
    """Against the plain form: interpolate the latent to the feature size, then convolve it."""
    T, t = times
    norm = SpatialNormSiLU(8, 5, num_groups=2)
    x, z = torch.randn(1, 8, T, 3 * factor, 4 * factor), torch.randn(1, 5, t, 3, 4)
    out = torch.empty_like(x)
    with torch.inference_mode():
        norm.fit(x, z).write_silu(x, out)
        if T > 1 and T % 2:
            first = F.interpolate(z[:, :, :1], size=(1, *x.shape[3:]))
            large = torch.cat([first, F.interpolate(z[:, :, 1:], size=(T - 1, *x.shape[3:]))], dim=2)
        else:
            large = F.interpolate(z, size=x.shape[2:])
        expected = F.silu(norm.norm_layer(x) * norm.conv_y.conv(large) + norm.conv_b.conv(large))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_spatial_norm_needs_a_latent():
    with pytest.raises(ValueError, match="latent"):
        SpatialNormSiLU(4, 2, num_groups=1).fit(torch.zeros(1, 4, 1, 2, 2))


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

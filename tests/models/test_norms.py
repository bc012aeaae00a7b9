"""Norm and activation in two passes, in both layouts, against plain PyTorch."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from longvid.models.layers import norms
from longvid.models.layers.norms import GroupNormSiLU, SpatialNormSiLU, _moments_by_frame, group_moments

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def torch_norm_silu(norm, x):
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_norm_equals_torch(dtype, frames, layout):
    norm = GroupNormSiLU(4, 16, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, 16, frames, 6, 10) * 3 + 5).to(dtype).contiguous(memory_format=layout)
    window = torch.full((2, 16, frames + 2, 6, 10), float("nan"), dtype=dtype).contiguous(memory_format=layout)
    with torch.inference_mode():
        norm.fit(x).write(range(frames), range(6), window[:, :, 2:])
        expected = torch_norm_silu(norm, x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.bfloat16:  # contiguous is bit for bit; otherwise the moments differ in the last bit of a float32
        tolerance = {"rtol": 0, "atol": 0} if layout == torch.contiguous_format else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(window[:, :, 2:], expected, **tolerance)
    assert window[:, :, :2].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_frame_by_frame_equal_those_over_the_chunk(offset):
    """The path of devices whose kernel has no float32 moments for a narrow dtype."""
    x = torch.randn(2, 12, 5, 4, 6) * torch.rand(1, 1, 5, 1, 1) + offset
    for got, expected in zip(_moments_by_frame(x, 3, 1e-6), group_moments(x, 3, 1e-6), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_moments_against_float64(layout, scale):
    """Also where the mean is large beside the deviation."""
    x = (torch.randn(2, 12, 5, 40, 60) * scale + 1.0).contiguous(memory_format=layout)
    mean, rstd = group_moments(x, 3, 1e-12)
    groups = x.double().view(2, 3, -1) if layout == LAYOUTS[0] else x.double().contiguous().view(2, 3, -1)
    torch.testing.assert_close(mean.double(), groups.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), groups.var(-1, unbiased=False).rsqrt(), rtol=3e-3 * 1e-3 / scale, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(1, 1), (2, 2), (4, 2), (8, 2), (3, 3), (5, 3), (9, 3)]), st.sampled_from([1, 2, 4]))
def test_spatial_norm_equals_its_definition(layout, times, factor):
    """Against the plain form: interpolate the latent to the feature size, then convolve it; written in two parts."""
    T, t = times
    norm = SpatialNormSiLU(8, 5, num_groups=2)
    x, z = torch.randn(1, 8, T, 3 * factor, 4 * factor), torch.randn(1, 5, t, 3, 4)
    x, z = (a.contiguous(memory_format=layout) for a in (x, z))
    out, half = torch.empty_like(x), T // 2
    with torch.inference_mode():
        fitted = norm.fit(x, z)
        H = x.shape[3]
        fitted.write(range(half), range(H), out[:, :, :half])
        fitted.write(range(half, T), range(H), out[:, :, half:])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 11), max_size=6), st.integers(1, 4), st.integers(1, 3))
def test_rows_in_bands_and_frames_in_slices_are_the_same(dtype, latent, threads, edges, frames, w):
    """Also where vectors do not fill rows, and threads share them unevenly."""
    norm = (SpatialNormSiLU(10, 5, num_groups=2) if latent else GroupNormSiLU(2, 10)).to(dtype)
    x, z = (
        torch.randn(2, c, t, h, w_).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        for c, t, h, w_ in ((10, 4, 24, 4 * w), (5, 2, 6, w))
    )
    whole, out = torch.empty_like(x), torch.full_like(x, float("nan"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), mock.patch.object(norms, "SLAB_BYTES", 8 * x[0, :, 0, 0].nbytes):
            fitted = norm.fit(x, z)
            assert fitted.row_step == 8
            fitted.write(range(4), range(24), whole)
            edges = [0, *sorted({8 * edge for edge in edges if edge < 3}), 24]
            for t in range(0, 4, frames):
                for start, stop in pairwise(edges):
                    times = range(t, min(t + frames, 4))
                    fitted.write(times, range(start, stop), out[:, :, t : times.stop, start:stop])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, whole)

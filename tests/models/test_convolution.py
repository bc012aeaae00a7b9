"""One convolution: parts equal the whole, pairs of frames agree to rounding, small float32 ones are not slow."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longvid import AllocationTracker
from longvid.models.convolution import (
    accumulate,
    convolution,
    faithful,
    filters_of_pairs,
    fuses_residuals,
    packed,
    paired,
    pooling_filters,
    row_bands,
    subpixel,
    subpixel_filters,
)

CUDNN = torch.backends.cudnn
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@given(st.integers(1, 200), st.integers(0, 3), st.integers(1, 50), st.integers(1, 3000))
def test_bands_give_every_row_once_and_read_what_they_need(height, halo, row, limit):
    bands = row_bands(height, halo=halo, row=row, limit=limit)
    assert [r for _, rows in bands for r in rows] == list(range(height))
    for read, rows in bands:
        assert read == range(max(0, rows.start - halo), min(height, rows.stop + halo))
        assert len(read) * row <= limit or len(rows) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 500, 2000, 10**9])
def test_parts_equal_the_whole_bit_for_bit(limit, dtype, layout):
    x = torch.randn(1, 6, 5, 13, 9).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(4, 6, 3, 3, 3).to(dtype), torch.randn(4).to(dtype)
    with torch.inference_mode():
        got = convolution(x, weight, bias, padding=(0, 1, 1), limit=limit)
        whole = convolution(x, weight, bias, padding=(0, 1, 1))
        flat = convolution(x[:, :, 0], weight[:, :, 0], bias, padding=(1, 1), limit=limit)
        flat_whole = F.conv2d(x[:, :, 0], weight[:, :, 0], bias, padding=1)
    assert torch.equal(got, whole)
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(flat, flat_whole, rtol=1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    assert (whole.double() - expected).norm() / expected.norm() < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_no_part_is_larger_than_the_limit(monkeypatch):
    from longvid.models import convolution as module

    sizes, real = [], module._call
    monkeypatch.setattr(module, "_call", lambda x, *args: sizes.append(x.numel()) or real(x, *args))
    x = torch.randn(1, 4, 6, 20, 10)
    with torch.inference_mode():
        convolution(x, torch.randn(8, 4, 3, 3, 3), None, padding=(0, 1, 1), limit=1500)
    assert len(sizes) > 4
    assert 2 * max(sizes) <= 1500  # twice as many channels come out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_pair_of_frames_equals_its_definition(dtype, bias):
    x = torch.randn(2, 16, 4, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(12, 16, 3, 3, 3, dtype=dtype) / 20
    offset = torch.randn(12, dtype=dtype) if bias else None
    out = torch.empty(2, 12, 2, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        paired(x, filters_of_pairs(weight), offset, out, padding=(1, 1))
    expected = F.conv3d(x.double(), weight.double(), None if offset is None else offset.double(), padding=(0, 1, 1))
    error = (out.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("limit", [2**31 - 1, 1, 1500])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (3, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_filters_give_averages_of_pairs(dtype, kernel, limit):
    """In one call or in parts, and each of them the same bits."""
    _, kh, kw = kernel
    padding = (0, kh // 2, kw // 2)
    torch.manual_seed(0)
    weight, bias = torch.randn(16, 8, *kernel).to(dtype), torch.randn(16).to(dtype)
    x = torch.randn(1, 8, 10, 7, 5).to(dtype, memory_format=torch.channels_last_3d)
    plain = F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)
    expected = (plain[:, :, 0::2] + plain[:, :, 1::2]) / 2
    filters = pooling_filters(weight)
    assert filters.dtype == dtype
    with torch.inference_mode():
        found = convolution(x, filters, bias, padding=padding, time_stride=2, limit=limit)
        assert torch.equal(found, convolution(x, filters, bias, padding=padding, time_stride=2))
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 5e-7, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 6), (1, 1), (1, 5)])
def test_subpixels_are_the_convolution_of_a_doubled_frame(size, dtype, layout, bias):
    x = torch.randn(2, 16, *size).to(dtype, memory_format=layout)
    weight, offset = torch.randn(12, 16, 3, 3, dtype=dtype) / 12, torch.randn(12, dtype=dtype) if bias else None
    out = torch.full((2, 12, 2 * size[0], 2 * size[1]), torch.nan, dtype=dtype)
    with torch.inference_mode():
        for row, column, phase in subpixel(x, subpixel_filters(weight), offset):
            out[..., row::2, column::2] = phase
    doubled = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    expected = F.conv2d(doubled, weight.double(), None if offset is None else offset.double(), padding=1)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_is_added_onto_what_is_there(dtype, fused):
    if fused and not fuses_residuals(dtype):
        pytest.skip("this build of PyTorch cannot")
    x = torch.randn(1, 16, 4, 7, 6, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
    weight, bias = torch.randn(12, 16, 3, 3, 3, dtype=dtype) / 20, torch.randn(12, dtype=dtype)
    out = torch.randn(1, 12, 2, 7, 6, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
    before = out.clone()
    with torch.inference_mode():
        paired(x, filters_of_pairs(weight), bias, out, padding=(1, 1), onto=True, fused=fused)
    expected = before.double() + F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    assert (out.double() - expected).norm() / expected.norm() < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.skipif(not fuses_residuals(torch.float32), reason="this build of PyTorch cannot")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_is_added_in_place_and_in_bands_of_rows_alike(dtype, flat, batch):
    x = torch.randn(batch, 8, 6, 5, 7, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
    weight, bias = torch.randn(8, 8, 3, 3, 3, dtype=dtype) / 10, torch.randn(8, dtype=dtype)
    start, padding = torch.randn(batch, 8, 4, 5, 7, dtype=dtype).contiguous(memory_format=LAYOUTS[1]), (0, 1, 1)
    if flat:
        x, weight, start, padding = x[:, :, 0], weight[:, :, 0], start[:, :, 0], (1, 1)
    whole, bands = start.clone(), start.clone()
    tall = F.pad(x, (0, 0, 1, 1)).contiguous(memory_format=torch.channels_last if flat else LAYOUTS[1])
    with torch.inference_mode():
        accumulate(whole, x, weight, bias, padding=padding)
        for row, stop in ((0, 2), (2, 5)):
            out, ins = bands[..., row:stop, :], tall[..., row : stop + 2, :]
            accumulate(out, ins, weight, bias, padding=(*padding[:-2], 0, 1))
    expected = start.double() + (F.conv2d if flat else F.conv3d)(
        x.double(), weight.double(), bias.double(), padding=padding
    )
    assert torch.equal(whole, bands)
    error = (whole.double() - expected).norm() / expected.norm()
    assert error < (2e-3 * (1 + batch) / 2 if dtype == torch.bfloat16 else 1e-6)


PACKS = packed(torch.zeros(64, 64, 3, 3, 3), (0, 1, 1), (1, 64, 3, 4, 4)).is_mkldnn


@pytest.mark.skipif(not PACKS, reason="this build of PyTorch cannot pack kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("channels", "out_channels"), [(64, 64), (128, 64), (64, 192), (512, 256)])
def test_packed_kernels_give_the_same_bits(dtype, flat, channels, out_channels):
    """Also for inputs of another size than they were packed for, and when the result is added to another."""
    x = torch.randn(1, channels, 5, 18, 20).to(dtype).contiguous(memory_format=LAYOUTS[1])
    weight, bias = (torch.randn(out_channels, channels, 3, 3, 3) / 40).to(dtype), torch.randn(out_channels).to(dtype)
    padding = (0, 0, 1)
    if flat:
        x, weight, padding = x[:, :, 0], weight[:, :, 0], (0, 1)
    with torch.inference_mode():
        tracker = AllocationTracker()
        with tracker:
            kernel = packed(weight, padding, tuple(x.shape))
        assert kernel.is_mkldnn
        assert tracker.live_bytes == weight.nbytes == packed(weight.to("meta"), padding, tuple(x.shape)).nbytes
        for rows in (18, 7, 3):
            part = x[..., :rows, :]
            y = convolution(part, kernel, bias, padding=padding)
            assert torch.equal(y, convolution(part, weight, bias, padding=padding))
            if fuses_residuals(dtype):
                sums = [y.clone(memory_format=torch.preserve_format) for _ in range(2)]
                for out, w in zip(sums, (kernel, weight), strict=True):
                    accumulate(out, part, w, bias, padding=padding)
                assert torch.equal(*sums)
                assert not torch.equal(sums[0], y)
        del kernel
        assert tracker.live_bytes == 0


def test_kernels_that_would_be_filled_up_are_left_as_they_are():
    for shape in ((64, 3, 3, 3, 3), (3, 64, 3, 3, 3), (96, 64, 3, 3, 3)):
        weight = torch.zeros(shape)
        assert packed(weight, (0, 1, 1), (1, shape[1], 3, 4, 4)) is weight
    double = torch.zeros(64, 64, 3, 3, 3, dtype=torch.float64)
    assert packed(double, (0, 1, 1), (1, 64, 3, 4, 4)) is double


@pytest.mark.skipif(not fuses_residuals(torch.float32), reason="this build of PyTorch cannot")
@pytest.mark.parametrize(("pairs", "fused"), [(False, True), (True, False), (True, True)])
def test_without_memory_nothing_is_added_twice(pairs, fused):
    """Every step that takes memory fails once before it begins, as a kernel that finds no room for its workspace."""
    x = torch.randn(1, 16, 4, 7, 6).contiguous(memory_format=LAYOUTS[1])
    weight, start = torch.randn(16, 16, 3, 3, 3), torch.randn(1, 16, 2, 7, 6).contiguous(memory_format=LAYOUTS[1])

    class Full(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if attempts[-1] == 1 and ("convolution" in str(func) or func.overloadpacket == torch.ops.aten.add):
                raise torch.OutOfMemoryError("no room")
            return func(*args, **(kwargs or {}))

    def again(step):
        attempts.append(1)
        with pytest.raises(torch.OutOfMemoryError):
            step()
        attempts[-1] = 2
        return step()

    def run(attempt, mode):
        out = start.clone()
        with torch.inference_mode(), mode:
            if pairs:
                how = {"padding": (1, 1), "fused": fused, "attempt": attempt}
                paired(x, filters_of_pairs(weight), None, out, onto=True, **how)
            else:
                accumulate(out, x, weight, None, padding=(0, 1, 1), attempt=attempt)
        return out

    attempts = [0]
    assert torch.equal(run(again, Full()), run(lambda step: step(), nullcontext()))
    assert len(attempts) - 1 == (6 if pairs else 1)  # two sums of frames and four products; one sum with a product


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_float32_convolutions_go_to_onednn(monkeypatch, layout):
    """PyTorch itself would not: the first four sizes of this input multiply to less than 20,480."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    calls, real = [], torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *args: calls.append(1) or real(*args))
    x = torch.randn(1, 16, 4, 12, 12).contiguous(memory_format=layout)
    with torch.inference_mode():
        y = convolution(x[:, :, 1:], torch.randn(16, 16, 3, 3, 3), None, padding=(0, 1, 1))
    assert calls == [1]
    assert y.is_contiguous(memory_format=layout)


def test_on_cuda_float32_is_in_full_and_kernels_are_chosen_by_rule(monkeypatch):
    """The settings can be made, and taken back, without a device."""

    def settings():
        return CUDNN.benchmark, CUDNN.deterministic, CUDNN.conv.fp32_precision

    usual = settings()
    monkeypatch.setattr(CUDNN, "benchmark", True)
    before = settings()
    with faithful(torch.device("cpu")):
        assert settings() == before
    with pytest.raises(KeyError), faithful(torch.device("cuda")):
        assert settings() == (False, True, "ieee")
        raise KeyError
    assert settings() == before != usual
    first, second = faithful(torch.device("cuda")), faithful(torch.device("cuda"))  # of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == (False, True, "ieee")
    second.__exit__(None, None, None)
    assert settings() == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_float32_is_as_near_to_the_truth_as_on_a_cpu():
    x, weight = torch.randn(1, 64, 4, 32, 32), torch.randn(64, 64, 3, 3, 3)
    truth = torch.nn.functional.conv3d(x.double(), weight.double())
    for layout in LAYOUTS:
        with faithful(torch.device("cuda")):
            found = convolution(x.cuda().contiguous(memory_format=layout), weight.cuda(), None, padding=(0, 0, 0))
        assert (found.cpu().double() - truth).norm() <= 1e-6 * truth.norm()

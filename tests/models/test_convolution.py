"""One convolution: parts equal the whole, Winograd agrees with its definition, small float32 ones are not slow."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longvid import AllocationTracker
from longvid.models.kernels import convolution as module
from longvid.models.kernels.convolution import accumulate, convolution, faithful, fuses_residuals, packed
from longvid.models.kernels.cpu import has_bfloat16, has_matrix_unit
from longvid.models.kernels.cuts import tiles_with_halo
from longvid.models.kernels.winograd import two_frames, winograd_filters

CUDNN = torch.backends.cudnn
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@given(st.integers(1, 200), st.integers(0, 3), st.integers(1, 50), st.integers(1, 3000))
def test_bands_give_every_row_once_and_read_what_they_need(height, halo, row, limit):
    bands = tiles_with_halo(height, halo=halo, row=row, limit=limit)
    assert [r for _, rows in bands for r in rows] == list(range(height))
    for read, rows in bands:
        assert read == range(max(0, rows.start - halo), min(height, rows.stop + halo))
        assert len(read) * row <= limit or len(rows) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 500, 2000, 10**9])
def test_parts_equal_the_whole_bit_for_bit(limit, dtype, layout):
    # Kernels may add in another order when the number of rows changes; for small integers every order is exact.
    x = torch.randint(-1, 2, (1, 6, 5, 13, 9)).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randint(-1, 2, shape).to(dtype) for shape in ((4, 6, 3, 3, 3), (4,)))
    with torch.inference_mode():
        got = convolution(x, weight, bias, padding=(0, 1, 1), limit=limit)
        whole = convolution(x, weight, bias, padding=(0, 1, 1))
        flat = convolution(x[:, :, 0], weight[:, :, 0], bias, padding=(1, 1), limit=limit)
        flat_whole = F.conv2d(x[:, :, 0], weight[:, :, 0], bias, padding=1)
    assert torch.equal(got, whole)
    if dtype == torch.float32 or has_bfloat16():  # PyTorch's own kernel forgets the layout
        assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(flat, flat_whole, rtol=1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    assert (whole.double() - expected).norm() / expected.norm() < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_no_part_is_larger_than_the_limit(monkeypatch):
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
        two_frames(x, winograd_filters(weight), offset, out, padding=(1, 1))
    expected = F.conv3d(x.double(), weight.double(), None if offset is None else offset.double(), padding=(0, 1, 1))
    error = (out.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_frames_in_new_memory_have_the_bits_of_those_in_given_memory(dtype, fused):
    if fused and not fuses_residuals(dtype):
        pytest.skip("this build of PyTorch cannot")
    x = torch.randn(1, 16, 4, 7, 6, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
    weight, bias = torch.randn(12, 16, 3, 3, 3, dtype=dtype) / 20, torch.randn(12, dtype=dtype)
    out = torch.empty(1, 12, 2, 7, 6, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
    for filters in (winograd_filters(weight), winograd_filters(weight.float())):
        with torch.inference_mode():
            given = two_frames(x, filters, bias, out, padding=(1, 1), fused=fused)
            new = two_frames(x, filters, bias, None, padding=(1, 1), fused=fused)
        assert all(map(torch.equal, given, new))
        assert all(map(torch.equal, given, out.unbind(2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_widened_weights_round_bfloat16_once(layout):
    x = torch.randn(1, 16, 6, 9, 8).bfloat16().contiguous(memory_format=layout)
    weight, bias = torch.randn(16, 16, 3, 3, 3).bfloat16() / 20, torch.randn(16).bfloat16()
    with torch.inference_mode():
        found = convolution(x, weight.float(), bias, padding=(0, 1, 1))
        exact = convolution(x.float(), weight.float(), bias.float(), padding=(0, 1, 1))
        plain = convolution(x, weight, bias, padding=(0, 1, 1))
    assert torch.equal(found, exact.bfloat16())
    assert found.is_contiguous(memory_format=layout)
    assert (found.float() - exact).norm() <= (plain.float() - exact).norm()


@pytest.mark.parametrize(("limit", "narrow"), [("AVX2", True), ("avx2_vnni_2", True), ("ALL", False), ("", False)])
def test_a_limit_of_the_library_s_instructions_counts(monkeypatch, limit, narrow):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_bfloat16() == (not narrow and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bfloat16() == has_matrix_unit() == (not narrow)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert (has_bfloat16(), has_matrix_unit()) == (True, False)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if fuses_residuals(dtype)])
def test_a_convolution_is_added_in_place_and_in_row_tiles_alike(dtype, flat, batch):
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
    torch.testing.assert_close(bands, whole, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    error = (whole.double() - expected).norm() / expected.norm()
    assert error < (2e-3 * (1 + batch) / 2 if dtype == torch.bfloat16 else 1e-6)


PACKED_DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if packed(torch.zeros(64, 64, 3, 3, 3, dtype=dtype), (0, 1, 1), (1, 64, 3, 4, 4)).is_mkldnn
]
"that the library packs kernels of on this machine"


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
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
                for y, frame in zip(
                    out.unbind(2), two_frames(x, winograd_filters(weight), None, None, **how), strict=True
                ):
                    y.add_(frame)
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

"""The Triton kernels against plain PyTorch: under Triton's interpreter in a process of its own, and on a GPU if any.

Every ``check_*`` function takes a device and asserts. Without a GPU they run when this file is executed with
``TRITON_INTERPRET=1``, which must be set before Triton is imported and would disturb the other tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longvid.models.kernels import triton_norms
from longvid.models.kernels.triton_norms import apply_silu, available, channel_moments, is_channels_last

NARROW = [torch.bfloat16, torch.float16]
TINY_SHARE = 1e-3
"Of all elements, those that may be one unit in the last place off, because exp differs in its last bits"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def videos(*shape, device, dtype=torch.float32, mean=0.0, std=1.0, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std + mean
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)


def dyadic(*shape, device, seed):
    """Float32 numbers with the 8 significant bits of bfloat16: a product with x is exact, so fma or not is the same."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().float().to(device)


def by_modules(x, scale, shift, maps=None, latent_frames=None, *, rounded=True):
    """Norm, * y, + b, SiLU one after the other on a CPU, the maps enlarged by torch; each step rounded if asked."""
    x, scale, shift = x.cpu(), scale.cpu()[..., None, None, None], shift.cpu()[..., None, None, None]
    dtype = x.dtype if rounded else torch.float64
    out = torch.addcmul(shift.double(), x.double(), scale.double()).float().to(dtype)
    if maps is not None:
        y, b = (
            torch.stack([F.interpolate(m[:, :, t].float(), x.shape[3:], mode="nearest") for t in latent_frames], 2)
            for m in (m.cpu() for m in maps)
        )
        out = out * y.to(dtype)
        out = out + b.to(dtype)
    return F.silu(out).to(x.dtype)


def ulps(a, b):
    """How many representable numbers lie between the elements of two 16-bit tensors."""

    def place(x):
        bits = x.cpu().contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


def assert_same_rounding(got, expected):
    apart = ulps(got, expected)
    assert apart.max() <= 1, f"{apart.max()} units in the last place"
    differ = int((apart > 0).sum())
    assert differ <= 3 + TINY_SHARE * apart.numel(), f"{differ} of {apart.numel()} elements differ"


def assert_moments(x, rtol=1e-5):
    mean, variance = channel_moments(x)
    assert mean.dtype == variance.dtype == torch.float32
    assert mean.shape == variance.shape == x.shape[:2]
    wide = x.cpu().double().flatten(2)
    torch.testing.assert_close(mean.cpu().double(), wide.mean(2), rtol=rtol, atol=1e-6 * float(wide.abs().mean()))
    torch.testing.assert_close(variance.cpu().double(), wide.var(2, correction=0), rtol=rtol, atol=1e-12)


# -- moments


def check_moments_of_odd_sizes(device):
    for dtype in (torch.float32, *NARROW):
        for shape in [(1, 24, 3, 5, 7), (2, 128, 2, 9, 5), (2, 8, 1, 1, 1), (1, 1, 5, 3, 1), (3, 70, 5, 3, 11)]:
            assert_moments(videos(*shape, device=device, dtype=dtype, mean=0.5))


def check_moments_joined_from_parts_of_several_tiles(device):
    x = videos(2, 24, 5, 13, 11, device=device, mean=2.0)
    for programs in (1, 6, 14, 4096):
        with mock.patch.object(triton_norms, "_MOMENTS_PROGRAMS", programs):
            assert_moments(x)


def check_moments_of_a_slice_in_time(device):
    x = videos(2, 24, 6, 5, 7, device=device)
    for piece in (x[:, :, 1:4], x[:, :, 5:], x[:1, :, 2:4]):
        assert is_channels_last(piece)
        assert_moments(piece)


def check_moments_with_a_large_mean(device):
    x = videos(2, 24, 5, 17, 13, device=device, mean=1000.0, std=0.05)
    assert_moments(x, rtol=1e-3)
    with mock.patch.object(triton_norms, "_MOMENTS_PROGRAMS", 4):
        assert_moments(x, rtol=1e-3)
    flat = x.cpu().flatten(2)
    naive = flat.square().mean(2) - flat.mean(2).square()
    exact = flat.double().var(2, correction=0)
    assert ((naive - exact).abs() / exact).max() > 1, "the input is no challenge: naive sums manage it"


def check_moments_when_means_drift(device):
    """The parts differ far more in their means than within: what joining them has to get right."""
    x = videos(1, 16, 8, 16, 16, device=device)
    x += torch.arange(8.0, device=device)[:, None, None] * 10
    with mock.patch.object(triton_norms, "_MOMENTS_PROGRAMS", 8):
        assert_moments(x)


def check_moments_are_the_same_bits_every_time(device):
    size = (24, 20) if device == "cpu" else (240, 360)
    x = videos(1, 64, 3, *size, device=device, dtype=torch.bfloat16)
    first = channel_moments(x)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(channel_moments(x), first, strict=True))


def check_moments_keep_nan_in_its_channel(device):
    x = videos(2, 24, 3, 5, 7, device=device)
    x[1, 5, 2, 3, 1] = torch.nan
    for moment in channel_moments(x):
        assert moment.isnan().nonzero().tolist() == [[1, 5]]


# -- apply

CASES = [
    # B, C, frames of the window, first frame, (H, W), (h, w), the latent frame of each frame of the chunk
    (1, 24, 5, 2, (6, 10), (3, 5), [0, 0, 1]),
    (2, 128, 7, 2, (9, 6), (3, 2), [0, 1, 1, 2, 2]),  # the first frame of a video stays alone
    (2, 8, 3, 2, (4, 4), (2, 1), [0]),
    (1, 130, 4, 0, (7, 5), (7, 5), [0, 0, 1, 1]),  # maps as large as the frame; C one above a block
    (3, 3, 5, 1, (7, 8), (3, 4), [1, 0, 2]),  # not a whole factor, and frames in any order
]


def chunk(case, device, dtype, *, exact):
    B, C, frames, first, (H, W), (h, w), latent_frames = case
    T = len(latent_frames)
    x = videos(B, C, T, H, W, device=device, dtype=dtype, seed=1)
    vector = (
        dyadic
        if exact
        else lambda *shape, device, seed: videos(*shape, 1, 1, 1, device=device, seed=seed)[..., 0, 0, 0]
    )
    scale, shift = vector(B, C, device=device, seed=2), vector(B, C, device=device, seed=3)
    t = max(latent_frames) + 1
    y, b = (videos(B, C, t, h, w, device=device, dtype=dtype, mean=m, seed=s) for m, s in ((1.0, 4), (0.0, 5)))
    window = torch.full((B, C, frames, H, W), torch.nan, device=device, dtype=dtype)
    window = window.contiguous(memory_format=torch.channels_last_3d)
    return x, scale, shift, (y, b), window, slice(first, first + T)


def applied(x, scale, shift, maps, latent_frames, window, place):
    """What apply_silu writes into part of a window that holds NaN elsewhere and must keep it."""
    apply_silu(x, window[:, :, place], scale, shift, maps, latent_frames if maps else None)
    rest = torch.ones(window.shape[2], dtype=torch.bool)
    rest[place] = False
    assert window[:, :, rest].isnan().all(), "wrote outside of its part of the window"
    assert not window[:, :, place].isnan().any(), "left some of its part unwritten"
    return window[:, :, place].cpu()


def check_apply_in_float32(device):
    for case in CASES:
        x, scale, shift, maps, window, place = chunk(case, device, torch.float32, exact=False)
        for m in (None, maps):
            got = applied(x, scale, shift, m, case[-1], window.clone(), place)
            torch.testing.assert_close(got, by_modules(x, scale, shift, m, case[-1]), rtol=1e-6, atol=1e-6)


def check_apply_rounds_where_modules_round(device):
    for dtype in NARROW:
        for case in CASES:
            x, scale, shift, maps, window, place = chunk(case, device, dtype, exact=True)
            for m in (None, maps):
                got = applied(x, scale, shift, m, case[-1], window.clone(), place)
                assert_same_rounding(got, by_modules(x, scale, shift, m, case[-1]))


def check_apply_with_any_scale(device):
    """The norm itself is one fused multiply-add: rounded once, which is what the reference does in float64."""
    for dtype in NARROW:
        for case in CASES:
            x, scale, shift, _, window, place = chunk(case, device, dtype, exact=False)
            got = applied(x, scale, shift, None, case[-1], window, place)
            assert_same_rounding(got, by_modules(x, scale, shift))


def check_apply_reads_maps_of_any_layout(device):
    case = CASES[1]
    x, scale, shift, (y, b), window, place = chunk(case, device, torch.bfloat16, exact=True)
    expected = applied(x, scale, shift, (y, b), case[-1], window.clone(), place)
    longer = torch.cat([y, y], dim=2)
    for maps in [
        (y.contiguous(), b.contiguous()),
        (y.contiguous(), b),
        (longer[:, :, 3:], b),
        (y.transpose(3, 4).contiguous().transpose(3, 4), b.contiguous()),
    ]:
        assert torch.equal(applied(x, scale, shift, maps, case[-1], window.clone(), place), expected)


def check_apply_in_place_and_from_a_slice(device):
    x = videos(2, 24, 6, 5, 7, device=device)
    scale, shift = dyadic(2, 24, device=device, seed=2), dyadic(2, 24, device=device, seed=3)
    before, expected = x.clone(), by_modules(x[:, :, 2:5], scale, shift)
    apply_silu(x[:, :, 2:5], x[:, :, 2:5], scale, shift)
    torch.testing.assert_close(x[:, :, 2:5].cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x[:, :, :2], before[:, :, :2])
    assert torch.equal(x[:, :, 5:], before[:, :, 5:])


def check_apply_to_extreme_values(device):
    values = torch.tensor([-torch.inf, -3e38, -200.0, -90.0, -0.0, 0.0, 90.0, 3e38, torch.inf, torch.nan])
    x = values.to(device).view(1, 1, 1, 2, 5).contiguous(memory_format=torch.channels_last_3d)
    ones, zeros = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    out = torch.empty_like(x)
    apply_silu(x, out, ones, zeros)
    torch.testing.assert_close(out.cpu(), F.silu(x.cpu()), rtol=1e-6, atol=1e-30, equal_nan=True)


def check_the_reference_can_tell_wrong_kernels(device):
    """Negative controls: other frames, other pixels, or rounding in one place only do not pass as equal."""
    case = CASES[1]
    for dtype in NARROW:
        x, scale, shift, maps, window, place = chunk(case, device, dtype, exact=True)
        got = applied(x, scale, shift, maps, case[-1], window, place)
        moved = tuple(m.roll(1, dims=4) for m in maps)
        for wrong in [
            by_modules(x, scale, shift, maps, [0, 0, 1, 1, 2]),
            by_modules(x, scale, shift, moved, case[-1]),
            by_modules(x, scale, shift, maps, case[-1], rounded=False),
            by_modules(x, scale, shift),
        ]:
            with pytest.raises(AssertionError, match="units in the last place"):
                assert_same_rounding(got, wrong)
    x = videos(2, 24, 3, 5, 7, device=device)
    with mock.patch.object(triton_norms, "channel_moments"), pytest.raises(AssertionError):
        mean, variance = channel_moments(x)
        with mock.patch(f"{__name__}.channel_moments", return_value=(mean, variance * (1 + 1e-4))):
            assert_moments(x)


def check_far_offsets(device, frame=(3, 5), frames=4):
    """Each end of a long tensor comes out as it does alone. On a GPU its offsets are beyond 32 bits."""
    C = 128
    x = torch.zeros((1, frames, *frame, C), device=device, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    last = videos(1, C, 1, *frame, device=device, dtype=torch.bfloat16)
    x[:, :, -1:] = last
    scale, shift = dyadic(1, C, device=device, seed=2), dyadic(1, C, device=device, seed=3)
    maps = tuple(videos(1, C, 2, 1, 1, device=device, dtype=torch.bfloat16, seed=s) for s in (4, 5))
    alone = torch.empty_like(last)
    apply_silu(last, alone, scale, shift, maps, [1])
    mean, variance = channel_moments(x)
    mean_1, variance_1 = channel_moments(last)
    torch.testing.assert_close(mean, mean_1 / frames, rtol=1e-4, atol=1e-7)
    second_moment = (variance_1 + mean_1.square()) / frames
    torch.testing.assert_close(variance, second_moment - mean.square(), rtol=1e-4, atol=1e-7)
    apply_silu(x, x, scale, shift, maps, [0] * (frames - 1) + [1])
    assert torch.equal(x[:, :, -1:], alone)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


# -- where they run


def mend(interpreter):
    """Make up for two flaws of Triton's interpreter.

    It converts float32 to bfloat16 by cutting bits off (to 3.9 at least), where a GPU rounds to nearest. And before
    3.9 NumPy 2.4 does not let it use a tensor of one element as an integer.
    """
    import triton.language as tl

    real_convert, real_patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return real_convert(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def patch(tensor, *scope):
        real_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch


def main():
    """Run all checks under the interpreter; print as JSON what each failed with, or None."""
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    mend(interpreter)
    results = {}
    for name, check in CHECKS.items():
        try:
            check("cpu")
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    x = videos(1, 8, 1, 2, 2, device="cpu")
    results["available"] = [available(x), available(x.contiguous()), available(x.double())]
    sys.stdout.write(json.dumps(results))


def run(arguments, **environment):
    command = [sys.executable, *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(run(["-W", "ignore::RuntimeWarning", __file__], TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_under_the_interpreter(name, interpreted):
    assert interpreted[name] is None, interpreted[name]


@needs_triton
def test_available_under_the_interpreter_in_the_right_layout_only(interpreted):
    assert interpreted["available"] == [True, False, False]


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    assert available(videos(1, 8, 1, 2, 2, device="cuda"))
    CHECKS[name]("cuda")


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits_on_a_gpu():
    frame, frames = (1080, 1920), 10  # 2.65e9 elements, 5.3 GB
    if torch.cuda.mem_get_info()[0] < 10e9:
        pytest.skip("needs 10 GB of free device memory")
    check_far_offsets("cuda", frame, frames)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longvid.models.kernels import triton_norms

def compile_for(target, kernel, types, constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # What Triton finds out about the arguments of a launch where the channels are a multiple of 16.
    wide = [n for n in names if n not in constants and n.endswith(("_ptr", "_channels", "_batch", "_frame", "_row",
                                                                   "_column", "batch_stride"))]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in wide}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(triton_norms._OPTIONS)).asm["ptx"]

moments, apply = triton_norms._kernels()
for target in (80, 90):
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {n: f"*{dtype}" for n in ("x_ptr", "out_ptr", "y_ptr", "b_ptr")}
        pointers |= {n: "*fp32" for n in ("means_ptr", "squares_ptr", "scale_ptr", "shift_ptr")}
        pointers |= {"frames_ptr": "*i32", "batch_stride": "i64", "x_batch": "i64", "out_batch": "i64"}
        ptx = [compile_for(target, moments, pointers, {"BLOCK_R": 32, "BLOCK_C": 64})]
        for maps in ({}, {"y_channel": 1, "b_channel": 1}):
            constants = {"HAS_MAPS": bool(maps), "BLOCK_R": 16, "BLOCK_C": 128} | maps
            ptx.append(compile_for(target, apply, pointers, constants))
        assert all("ld.global.v4" in text for text in ptx), "a thread does not load 16 bytes at once"
        assert all("fma.rn.f32" in text for text in ptx)
        compile_for(target, moments, pointers, {"BLOCK_R": 2048, "BLOCK_C": 1, "num_channels": 1})
        compile_for(target, apply, pointers, {"BLOCK_R": 2048, "BLOCK_C": 1, "num_channels": 1, "HAS_MAPS": True})
print("compiled")
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA devices")
    assert run(["-W", "error::UserWarning", "-c", COMPILE], TRITON_CACHE_DIR=str(tmp_path)).strip() == "compiled"


# -- without Triton


def test_triton_is_not_imported_before_it_is_used():
    code = "import sys, longvid.models.kernels.triton_norms as n, torch; n.available(torch.zeros(1, 1, 1, 1, 1)); "
    assert run(["-c", code + "print('triton' in sys.modules)"]).strip() == "False"


def test_not_available_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(videos(1, 8, 1, 2, 2, device="cpu"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: x, True),
        (lambda x: x[:, :, 1:3], True),
        (lambda x: x[:, :, 1:2], True),
        (lambda x: x[:, :, ::2], False),
        (lambda x: x[:, :, :, 1:3], False),
        (lambda x: x[:, :4], False),
        (lambda x: x.contiguous(), False),
        (lambda x: x[:, :, 0], False),
        (lambda x: x[..., :1, :1].contiguous(), False),
        (lambda x: x[:, :, :1, :1, :1].contiguous(), True),  # one pixel: both orders are the same
    ],
)
def test_layouts_told_apart(make, expected):
    x = make(videos(2, 8, 4, 5, 6, device="cpu"))
    assert is_channels_last(x) is expected
    if not expected:
        with pytest.raises(ValueError, match="channels_last_3d"):
            channel_moments(x)


def test_bad_operands_are_refused():
    x, vector = videos(2, 8, 3, 4, 4, device="cpu"), torch.ones(2, 8)
    out = torch.empty_like(x)
    with pytest.raises(ValueError, match="channels_last_3d"):
        channel_moments(x.double())
    with pytest.raises(ValueError, match="channels_last_3d"):
        apply_silu(x, out.contiguous(), vector, vector)
    with pytest.raises(ValueError, match="out is"):
        apply_silu(x, out[:, :, :2], vector, vector)


@pytest.mark.parametrize(
    ("failure", "says"), [(RuntimeError("no C compiler"), "no C compiler"), (None, "mean 7.0 and variance 1.0")]
)
def test_an_installation_that_does_not_work_is_told_once(monkeypatch, failure, says):
    def moments(x):
        if failure:
            raise failure
        return torch.tensor([[7.0]]), torch.tensor([[1.0]])

    real = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, device: real(*args))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_norms, "channel_moments", moments)
    triton_norms._runs_on.cache_clear()
    device = torch.device("cuda", 7)
    with pytest.warns(UserWarning, match=says):
        assert not triton_norms._runs_on(device)
    assert not triton_norms._runs_on(device)
    triton_norms._runs_on.cache_clear()


if __name__ == "__main__":
    main()

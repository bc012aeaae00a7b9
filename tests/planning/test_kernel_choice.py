"""Which numerics are chosen, that they are seen where they should be, and that they are recorded."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.clock import Clock

from longvid import ModelError, StoreError, VideoSession, load_model, open_store
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.kernels.convolution import fuses_residuals
from longvid.models.numerics import Numerics, parse_layout, parse_paired_frames
from longvid.planning import kernel_choice
from longvid.planning.dry_run import DryRuns
from longvid.planning.kernel_choice import choose_numerics, preferred_band_bytes
from longvid.planning.workload import Workload

CPU = torch.device("cpu")
FUSES = fuses_residuals(torch.float32)
LAST = Numerics(layout="channels_last")
WIDE = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return CogVideoXVAE(CogVideoXConfig(**WIDE)).eval()


@pytest.fixture(autouse=True)
def with_bfloat16_kernels(monkeypatch):
    """Decisions are those of a CPU with bfloat16 kernels and a matrix unit, unless a test says otherwise."""
    monkeypatch.setattr(kernel_choice, "has_bfloat16", lambda: True)
    monkeypatch.setattr(kernel_choice, "has_matrix_unit", lambda: True)
    forget_measurements()
    yield
    forget_measurements()


def forget_measurements():
    kernel_choice._seconds_of_layouts.cache_clear()
    kernel_choice._seconds_of_winograd.cache_clear()


def chosen(model, monkeypatch=None, seconds=(1.0, 1.0), dtype=torch.float32, direction="encode", **asked):
    """What is chosen when the benchmark measures these seconds: of the plain form first."""
    if monkeypatch is not None:
        monkeypatch.setattr(kernel_choice, "_benchmark", lambda makers, device: list(seconds))
        monkeypatch.setattr(kernel_choice, "_SMALL_BYTES", 1)
    forget_measurements()
    size = asked.pop("size", (64, 96))
    workload = Workload(
        direction=direction, height=size[0], width=size[1], dtype=dtype, schedule=model.geometry.schedule
    )
    return choose_numerics(DryRuns.of(model), workload, device=CPU, **asked)


def test_small_frames_on_a_cpu_stay_contiguous_and_nothing_is_measured(wide, monkeypatch):
    monkeypatch.setattr(kernel_choice, "_benchmark", lambda makers, device: pytest.fail("measured"))
    assert chosen(wide) == Numerics()
    assert chosen(load_model("tiny"), size=(720, 1280)) == Numerics()  # no kernel that the choice is about


@pytest.mark.parametrize(
    ("seconds", "dtype", "expected"),
    [
        ((1.0, 1.2), torch.float32, replace(LAST, paired_frames=True, fused_residuals=FUSES)),
        ((1.0, 1.3), torch.float32, Numerics()),
        ((1.4, 1.0), torch.float32, replace(LAST, paired_frames=True, fused_residuals=FUSES)),
        ((1.4, 1.0), torch.bfloat16, LAST),
    ],
)
def test_what_is_measured_decides_by_a_wide_margin(wide, monkeypatch, seconds, dtype, expected):
    assert chosen(wide, monkeypatch, seconds, dtype) == expected


def test_what_is_asked_for_is_taken_and_not_measured(wide, monkeypatch):
    monkeypatch.setattr(kernel_choice, "_benchmark", lambda makers, device: pytest.fail("measured"))
    for layout in ("contiguous", "channels_last"):
        for winograd in (False, True):
            found = chosen(wide, layout=layout, paired_frames=winograd)
            base = replace(LAST, fused_residuals=FUSES) if layout == "channels_last" else Numerics()
            assert found == replace(base, paired_frames=winograd)


def test_a_bfloat16_encoder_rounds_residuals_as_others_do(wide):
    asked = {"layout": "channels_last", "paired_frames": False, "dtype": torch.bfloat16}
    assert not chosen(wide, direction="encode", **asked).fused_residuals
    assert chosen(wide, direction="decode", **asked).fused_residuals == fuses_residuals(torch.bfloat16)


@pytest.mark.parametrize("matrix_unit", [True, False])
def test_winograd_is_taken_unless_it_is_slow_but_in_bfloat16_only_if_it_is_fast(wide, monkeypatch, matrix_unit):
    """There it rounds once more: a decoder hides that, and an encoder takes it without a matrix unit only."""
    monkeypatch.setattr(kernel_choice, "has_matrix_unit", lambda: matrix_unit)
    for seconds, single, half in (((1.0, 1.3), False, False), ((1.0, 1.0), True, False), ((1.2, 1.0), True, True)):
        for direction in ("encode", "decode"):
            asked = {"layout": "channels_last", "direction": direction}
            assert chosen(wide, monkeypatch, seconds, **asked).paired_frames == single
            found = chosen(wide, monkeypatch, seconds, dtype=torch.bfloat16, **asked).paired_frames
            assert found == (half and (direction == "decode" or not matrix_unit))
    fast = {"seconds": (2.0, 1.0), "dtype": torch.bfloat16, "layout": "channels_last"}
    assert not chosen(wide, monkeypatch, **fast, paired_frames=False).paired_frames  # "off" is for diffusers' rounding


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_without_bfloat16_kernels_products_are_in_float32(wide, monkeypatch, direction):
    monkeypatch.setattr(kernel_choice, "has_bfloat16", lambda: False)
    monkeypatch.setattr(kernel_choice, "has_matrix_unit", lambda: False)
    for layout in (None, "contiguous", "channels_last"):
        found = chosen(wide, monkeypatch, (1.2, 1.0), torch.bfloat16, direction, layout=layout)
        assert found.float32_products
        assert not found.fused_residuals
        assert found.paired_frames == (layout != "contiguous")
        assert not chosen(wide, monkeypatch, (1.2, 1.0), torch.float32, direction, layout=layout).float32_products


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_every_form_can_be_measured(wide, monkeypatch, has_bfloat16):
    monkeypatch.setattr(kernel_choice, "_SMALL_BYTES", 1)
    monkeypatch.setattr(kernel_choice, "has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(kernel_choice, "has_matrix_unit", lambda: False)
    seen, real = [], kernel_choice._benchmark
    monkeypatch.setattr(kernel_choice, "_benchmark", lambda *args: seen.append(real(*args)) or [1.0, 1.0])
    chosen(wide, dtype=torch.float32 if has_bfloat16 else torch.bfloat16)
    assert len(seen) == 2
    assert all(len(row) == 2 and min(row) > 0 for row in seen)


def test_a_benchmark_counts_what_one_thread_computes(monkeypatch):
    """Not the time in which another program has the core, and not on as many threads as there happen to be."""
    threads, computed = [], Clock(lambda: 0.0)
    monkeypatch.setattr(time, "thread_time", computed)
    monkeypatch.setattr(time, "perf_counter", passed := Clock(lambda: 0.0))

    def form(seconds, pause):
        def run():
            threads.append(torch.get_num_threads())
            computed.jump(seconds)
            passed.jump(seconds + pause)

        return lambda: run

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        interrupted, slower = kernel_choice._benchmark([form(1, 20), form(2, 0)], CPU)
        assert 2 * interrupted == slower
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_device_has_no_kernel_for_takes_forever():
    def none():
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    there, absent = (lambda: lambda: None), (lambda: none)
    first, second = kernel_choice._benchmark([there, absent], torch.device("cuda"))
    assert first < second == math.inf
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        kernel_choice._benchmark([there, absent], CPU)


@pytest.mark.parametrize("parse", [parse_layout, parse_paired_frames])
def test_what_does_not_exist_is_refused(parse):
    with pytest.raises(ModelError, match="is not known; choose auto"):
        parse("sideways")
    assert parse("auto") is None


def test_a_cpu_prefers_row_tiles_and_a_device_whole_frames():
    assert preferred_band_bytes(CPU) == 24 * 2**20
    assert preferred_band_bytes(torch.device("cuda")) is None


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("winograd", [False, True])
def test_a_session_computes_as_asked_and_records_it(wide, frames, tmp_path, layout, winograd):
    asked = {"layout": layout, "paired_frames": winograd}
    with VideoSession(wide, **asked) as session:
        session.encode(frames, tmp_path / "a.zarr", representation="moments", store_dtype="float32")
    with VideoSession(wide, **asked, slice_frames=2) as session:
        session.encode(frames, tmp_path / "b.zarr", representation="moments", store_dtype="float32")
    with VideoSession(wide) as session:
        session.encode(frames, tmp_path / "c.zarr", representation="moments", store_dtype="float32")
    stores = [open_store(tmp_path / f"{name}.zarr") for name in "abc"]
    a, b, c = (store.moments[:] for store in stores)
    # Slices change the number of frames in a call of a kernel, so kernels may add in another order.
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
    assert np.linalg.norm(a - c) <= 1e-5 * np.linalg.norm(c)
    assert np.array_equal(a, c) == (layout == "contiguous")  # Winograd needs channels last
    expected = replace(LAST, fused_residuals=FUSES) if layout == "channels_last" else Numerics()
    found = Numerics.from_dict(stores[0].attrs["longvid"]["numerics"])
    assert found == replace(expected, paired_frames=winograd)


def test_numerics_of_earlier_versions_are_read_and_forms_that_are_gone_keep_another_fingerprint():
    before = {"layout": "channels_last", "paired_frames": True, "fused_residuals": False}
    plain = {**before, "subpixel_upsampling": False, "compiled": False}
    assert Numerics.from_dict(plain).to_dict() == plain
    for gone in ("subpixel_upsampling", "compiled", "fused_pooling"):
        recorded = {**plain, gone: True}
        assert Numerics.from_dict(recorded) == Numerics.from_dict(plain)
        assert Numerics.from_dict(recorded).to_dict() != recorded


def test_a_store_begun_with_a_form_that_is_gone_is_not_continued(wide, frames, tmp_path, monkeypatch):
    """It is refused by its fingerprint, and not finished in another form."""
    video = np.concatenate([frames] * 2)
    real = Numerics.to_dict
    with monkeypatch.context() as before:
        before.setattr(Numerics, "to_dict", lambda self: real(self) | {"fused_pooling": True})
        with VideoSession(wide, callbacks=[lambda event: session.stop()]) as session:
            assert not session.encode(video, tmp_path / "a.zarr").complete
    with VideoSession(wide) as session, pytest.raises(StoreError, match="fused_pooling"):
        session.encode(video, tmp_path / "a.zarr")


def test_what_is_overwritten_in_another_dtype_hands_down_no_numerics(wide, frames, tmp_path, monkeypatch):
    """A float32 run adds residuals in its convolutions; a bfloat16 encoder that takes its place must not."""
    monkeypatch.setattr(kernel_choice, "has_bfloat16", lambda: False)  # this form is fast on every machine
    asked = {"layout": "channels_last", "paired_frames": "off"}
    for dtype, fused in (("float32", FUSES), ("bfloat16", False)):
        with VideoSession(wide, **asked, dtype=dtype) as session:
            session.encode(frames, tmp_path / "a.zarr", overwrite=True)
        assert open_store(tmp_path / "a.zarr").attrs["longvid"]["numerics"]["fused_residuals"] == fused


def test_a_video_comes_back_alike_in_every_form(wide, frames, tmp_path):
    frames = frames[:17]
    with VideoSession(wide) as session:
        session.encode(frames, tmp_path / "a.zarr")
    found = {}
    for asked in ({}, {"layout": "channels_last"}, {"layout": "channels_last", "paired_frames": "on"}):
        for slices in (None, 3):
            pieces = []
            with VideoSession(wide, **asked, slice_frames=slices) as session:
                session.decode(tmp_path / "a.zarr", pieces.append)
            got = np.concatenate(pieces)
            assert got.shape == frames.shape
            key = str(asked)
            # Not bit for bit: kernels may add in another order for another number of frames.
            assert np.abs(found.setdefault(key, got).astype(int) - got).max() <= 1
    first, *others = found.values()
    for other in others:
        assert np.abs(first.astype(int) - other).max() <= 1

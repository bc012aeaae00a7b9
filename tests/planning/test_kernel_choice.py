"""Which numerics are chosen, that they are seen where they should be, and that they are recorded."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.clock import Clock

import longvid.planning.kernel_choice
import longvid.runtime.admission
from longvid import ModelError, VideoSession, load_model, open_store
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.convolution import fuses_residuals
from longvid.models.numerics import Numerics, parse_layout, parse_paired_frames
from longvid.planning.kernel_choice import choose_numerics, preferred_band_bytes
from longvid.store.reader import open_frames

CPU = torch.device("cpu")
FUSES = fuses_residuals(torch.float32)
LAST = Numerics(layout="channels_last", fused_pooling=True)
"that every encoder has where nothing is slow"
WIDE = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return CogVideoXVAE(CogVideoXConfig(**WIDE)).eval()


def chosen(model, monkeypatch=None, seconds=(1.0, 1.0), dtype=torch.float32, size=(64, 96), **asked):
    if monkeypatch is not None:
        monkeypatch.setattr(longvid.planning.kernel_choice, "_race", lambda makers, device: list(seconds))
        monkeypatch.setattr(longvid.planning.kernel_choice, "_SMALL_BYTES", 1)
    return choose_numerics(model, device=CPU, dtype=dtype, height=size[0], width=size[1], **asked)


def test_small_frames_on_a_cpu_stay_contiguous_and_nothing_is_measured(wide, monkeypatch):
    monkeypatch.setattr(longvid.planning.kernel_choice, "_race", lambda makers, device: pytest.fail("measured"))
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


def test_what_is_asked_for_is_taken(wide, monkeypatch):
    """What can be asked for is not measured."""
    races = []
    monkeypatch.setattr(
        longvid.planning.kernel_choice, "_race", lambda makers, device: races.append(makers) or [1.0, 1.0]
    )
    for layout in ("contiguous", "channels_last"):
        for paired in (False, True):
            found = chosen(wide, layout=layout, paired_frames=paired)
            base = replace(LAST, fused_residuals=FUSES) if layout == "channels_last" else Numerics()
            assert found == replace(base, paired_frames=paired)
    assert len(races) == 2  # of averages, of which no one is asked


def test_a_bfloat16_encoder_rounds_as_others_do(wide, monkeypatch):
    """A residual within the convolution would take it beyond 0.02 of diffusers, and nearer to float32."""
    asked = {"layout": "channels_last", "paired_frames": False, "dtype": torch.bfloat16}
    assert not chosen(wide, direction="encode", **asked).fused_residuals
    assert chosen(wide, direction="decode", **asked).fused_residuals == fuses_residuals(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subpixels_and_averages_are_taken_unless_they_are_slow(wide, monkeypatch, dtype):
    for layout in ("channels_last", "contiguous"):
        for direction in ("encode", "decode"):
            for paired in (None, False):
                asked = {"layout": layout, "direction": direction, "dtype": dtype, "paired_frames": paired}
                found = chosen(wide, monkeypatch, (1.0, 1.2), **asked)
                assert found.subpixel_upsampling == (layout == "channels_last" and direction == "decode")
                assert found.fused_pooling == (layout == "channels_last" and direction == "encode")
                found = chosen(wide, monkeypatch, (1.0, 1.3), **asked)
                assert not found.subpixel_upsampling
                assert not found.fused_pooling


def test_frames_go_in_pairs_unless_that_is_slow_but_in_bfloat16_only_if_it_is_fast(wide, monkeypatch):
    """There, pairs cost accuracy: of a decoder, and an encoder does not take them at all."""
    for seconds, single, half in (((1.0, 1.3), False, False), ((1.0, 1.0), True, False), ((1.2, 1.0), True, True)):
        for direction in ("encode", "decode"):
            asked = {"layout": "channels_last", "direction": direction}
            assert chosen(wide, monkeypatch, seconds, **asked).paired_frames == single
            found = chosen(wide, monkeypatch, seconds, dtype=torch.bfloat16, **asked).paired_frames
            assert found == (half and direction == "decode")


def test_the_real_race_runs_in_both_forms(wide, monkeypatch):
    monkeypatch.setattr(longvid.planning.kernel_choice, "_SMALL_BYTES", 1)
    seen, real = [], longvid.planning.kernel_choice._race
    monkeypatch.setattr(
        longvid.planning.kernel_choice, "_race", lambda makers, device: seen.append(real(makers, device)) or seen[-1]
    )
    chosen(wide, layout=None)
    chosen(wide, layout="channels_last")
    chosen(wide, layout="channels_last", direction="decode", paired_frames=False)
    assert len(seen) >= 3
    assert all(len(row) == 2 and min(row) > 0 for row in seen)


def test_a_race_counts_what_one_thread_computes(monkeypatch):
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
        interrupted, slower = longvid.planning.kernel_choice._race([form(1, 20), form(2, 0)], CPU)
        assert 2 * interrupted == slower
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_device_has_no_kernel_for_takes_forever():
    def none():
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    there, absent = (lambda: lambda: None), (lambda: none)
    first, second = longvid.planning.kernel_choice._race([there, absent], torch.device("cuda"))
    assert first < second == math.inf
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        longvid.planning.kernel_choice._race([there, absent], CPU)


@pytest.mark.parametrize("parse", [parse_layout, parse_paired_frames])
def test_what_does_not_exist_is_refused(parse):
    with pytest.raises(ModelError, match="is not known; choose auto"):
        parse("sideways")
    assert parse("auto") is None


def test_a_cpu_prefers_bands_of_rows_and_a_device_whole_frames():
    assert preferred_band_bytes(CPU) == 24 * 2**20
    assert preferred_band_bytes(torch.device("cuda")) is None


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("paired", [False, True])
def test_a_session_computes_as_asked_and_records_it(wide, frames, tmp_path, layout, paired):
    asked = {"layout": layout, "paired_frames": paired}
    with VideoSession(wide, **asked) as session:
        session.encode(frames, tmp_path / "a.zarr", representation="moments", store_dtype="float32")
    with VideoSession(wide, **asked, slice_frames=2) as session:
        session.encode(frames, tmp_path / "b.zarr", representation="moments", store_dtype="float32")
    with VideoSession(wide) as session:
        session.encode(frames, tmp_path / "c.zarr", representation="moments", store_dtype="float32")
    stores = [open_store(tmp_path / f"{name}.zarr") for name in "abc"]
    a, b, c = (store.moments[:] for store in stores)
    assert np.array_equal(a, b)  # slices never change a bit
    assert np.linalg.norm(a - c) <= 1e-5 * np.linalg.norm(c)
    assert np.array_equal(a, c) == (layout == "contiguous")  # pairs need channels last
    expected = replace(LAST, fused_residuals=FUSES) if layout == "channels_last" else Numerics()
    found = Numerics.from_dict(stores[0].attrs["longvid"]["numerics"])
    assert found == replace(expected, paired_frames=paired)


def test_what_is_overwritten_in_another_dtype_hands_down_no_numerics(wide, frames, tmp_path):
    """A float32 run adds residuals in its convolutions; a bfloat16 encoder that takes its place must not."""
    asked = {"layout": "channels_last", "paired_frames": "off"}
    for dtype, fused in (("float32", FUSES), ("bfloat16", False)):
        with VideoSession(wide, **asked, dtype=dtype) as session:
            session.encode(frames, tmp_path / "a.zarr", overwrite=True)
        assert open_store(tmp_path / "a.zarr").attrs["longvid"]["numerics"]["fused_residuals"] == fused


def test_an_encode_that_was_begun_without_averages_goes_on_without(packable, frames, tmp_path, monkeypatch):
    """As every store of before they were known: nothing is recorded of them there."""
    real = longvid.runtime.admission.choose_numerics
    video = np.concatenate([frames] * 2)

    def encode(name, stop_after=None):
        def stop(event):
            seen.append(event)
            if len(seen) == stop_after:
                session.stop()

        seen = []
        asked = {"device": "cpu", "layout": "channels_last", "paired_frames": "off"}
        with VideoSession(packable, **asked, callbacks=[stop]) as session:
            report = session.encode(video, tmp_path / name, representation="moments", store_dtype="float32")
        assert report.complete == (stop_after is None)
        return report

    encode("averages.zarr")
    with monkeypatch.context() as before:
        before.setattr(
            longvid.runtime.admission, "choose_numerics", lambda *a, **k: replace(real(*a, **k), fused_pooling=False)
        )
        encode("before.zarr")
        encode("continued.zarr", stop_after=2)
    assert encode("continued.zarr").resumed_from_frame
    found = {name: open_store(tmp_path / f"{name}.zarr") for name in ("averages", "before", "continued")}
    recorded = {name: store.attrs["longvid"]["numerics"].get("fused_pooling") for name, store in found.items()}
    assert recorded == {"averages": True, "before": None, "continued": None}
    values = {name: store.moments[:] for name, store in found.items()}
    assert np.array_equal(values["continued"], values["before"])
    assert not np.array_equal(values["averages"], values["before"])
    assert np.linalg.norm(values["averages"] - values["before"]) <= 1e-5 * np.linalg.norm(values["before"])


def test_a_decode_upsamples_as_its_store_records_and_goes_on_alike(packable, frames, tmp_path, monkeypatch):
    """Whatever the race says on the day on which it is continued."""
    wins, loses = (lambda makers, device: [1.4, 1.0]), (lambda makers, device: [1.0, 1.4])
    asked = {"device": "cpu", "layout": "channels_last", "paired_frames": "off"}
    with VideoSession(packable, **asked) as session:
        session.encode(np.concatenate([frames] * 2), tmp_path / "latents.zarr")

    def decode(name, race, stop_after=None):
        monkeypatch.setattr(longvid.planning.kernel_choice, "_race", race)
        seen = []

        def stop(event):
            seen.append(event)
            if len(seen) == stop_after:
                session.stop()

        with VideoSession(packable, **asked, callbacks=[stop]) as session:
            report = session.decode(tmp_path / "latents.zarr", tmp_path / name)
        assert report.complete == (stop_after is None)
        assert report.peak_device_bytes <= report.projected_bytes
        facts = json.loads((tmp_path / name / "zarr.json").read_text())["attributes"]["longvid"]
        assert facts["numerics"]["subpixel_upsampling"] == (name != "plain.zarr")
        return report

    for name, race in (("subpixels.zarr", wins), ("plain.zarr", loses)):
        report = decode(name, race)
        assert report.peak_device_bytes == report.projected_bytes
    decode("continued.zarr", wins, stop_after=2)
    assert decode("continued.zarr", loses).resumed_from_frame
    found = {name: open_frames(tmp_path / f"{name}.zarr")[:] for name in ("subpixels", "plain", "continued")}
    assert np.array_equal(found["continued"], found["subpixels"])
    assert np.abs(found["plain"].astype(int) - found["subpixels"]).max() <= 1


def test_a_video_comes_back_alike_in_every_form(wide, frames, tmp_path):
    with VideoSession(wide) as session:
        session.encode(frames, tmp_path / "a.zarr")
    found = {}
    for asked in ({}, {"layout": "channels_last"}, {"layout": "channels_last", "paired_frames": "on"}):
        for slices in (None, 1, 3):
            pieces = []
            with VideoSession(wide, **asked, slice_frames=slices) as session:
                session.decode(tmp_path / "a.zarr", pieces.append)
            got = np.concatenate(pieces)
            assert got.shape == frames.shape
            key = str(asked)
            assert np.array_equal(found.setdefault(key, got), got)
    first, *others = found.values()
    for other in others:
        assert np.abs(first.astype(int) - other).max() <= 1

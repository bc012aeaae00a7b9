"""Life of a session: what it refuses, and that misuse never disturbs what runs."""

import copy
import dataclasses
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.plans import fixed_plan

from longvid import (
    CacheError,
    MemoryBudgetError,
    ModelError,
    NonFiniteError,
    OptionError,
    ScheduleError,
    SessionStateError,
    SourceError,
    StoreError,
    VideoSession,
    load_model,
    open_store,
)


def encode(session, frames, **options):
    with session.encoder(**options) as enc:
        return torch.cat([enc.push(frames), enc.finish()], dim=2)


def test_three_states(vae, frames, tmp_path):
    session = VideoSession(vae)
    for use in (
        lambda: session.encode(frames, tmp_path / "a.zarr"),
        lambda: session.decode(tmp_path / "a.zarr", tmp_path / "a.mp4"),
        session.encoder,
        session.decoder,
        lambda: session.plan(height=8, width=8),
    ):
        with pytest.raises(SessionStateError, match="is not open; use it in a with statement"):
            use()
    with session:
        with pytest.raises(SessionStateError, match="cannot be entered"):
            session.__enter__()
        encode(session, frames)
    with pytest.raises(SessionStateError, match="is closed and cannot be opened again"):
        session.encoder()
    with pytest.raises(SessionStateError, match="cannot be entered"):
        session.__enter__()
    session.close()
    session.close()
    assert list(tmp_path.iterdir()) == []


def test_one_session_many_videos(vae, frames):
    with VideoSession(vae) as session:
        first = encode(session, frames)
        encode(session, frames[:5])
        assert torch.equal(encode(session, frames), first)


def test_re_entrance_from_a_callback_is_refused(vae, frames, tmp_path):
    errors = []

    def again(event):
        for use in (lambda: session.encode(frames, tmp_path / "b.zarr"), session.encoder, session.decoder):
            with pytest.raises(SessionStateError, match="busy with encode") as caught:
                use()
            errors.append(caught.value)

    with VideoSession(vae, callbacks=[again]) as session:
        report = session.encode(frames, tmp_path / "a.zarr")
    assert report.complete
    assert len(errors) == 3 * 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_a_second_thread_is_refused(vae, frames):
    caught = []

    def use():
        for call in (lambda: session.encoder(), lambda: enc.push(frames)):
            try:
                call()
            except SessionStateError as exc:
                caught.append(str(exc))

    with VideoSession(vae) as session, session.encoder() as enc:
        expected = enc.push(frames[:9])
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        rest = torch.cat([expected, enc.push(frames[9:]), enc.finish()], dim=2)
        assert torch.equal(rest, encode(session, frames))
    assert len(caught) == 2
    assert all("belongs to the thread that opened it" in text for text in caught)


def _in_child(session, enc, frames, queue):
    for call in (lambda: session.encoder(), lambda: enc.push(frames)):
        try:
            call()
            queue.put("no error")
        except SessionStateError as exc:
            queue.put(str(exc))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused(vae, frames):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with VideoSession(vae) as session, session.encoder() as enc:
        enc.push(frames)
        child = context.Process(target=_in_child, args=(session, enc, frames, queue))
        child.start()
        said = [queue.get(timeout=120) for _ in range(2)]
        child.join(120)
        assert child.exitcode == 0
        enc.finish()
    assert all("and this is its fork" in text and "'spawn'" in text for text in said)


def test_push_scopes_have_a_life_too(vae, frames):
    with VideoSession(vae) as session:
        enc = session.encoder()
        with pytest.raises(SessionStateError, match="not open"):
            enc.push(frames)
        with enc:
            enc.push(frames)
            enc.finish()
            for call in (enc.finish, lambda: enc.push(frames)):
                with pytest.raises(SessionStateError, match="is finished"):
                    call()
        with pytest.raises(SessionStateError, match="cannot be entered twice"):
            enc.__enter__()
        left_open = session.encoder().__enter__()
        left_open.push(frames)
        assert left_open.cache_bytes > 0
    assert left_open.cache_bytes == 0
    with pytest.raises(SessionStateError):
        left_open.push(frames)


def test_videos_interleave_in_one_session_and_across_sessions(vae, frames):
    a, b = frames, frames[::-1].copy()
    with VideoSession(vae) as one, VideoSession(vae) as two:
        alone = {"a": encode(one, a), "b": encode(two, b)}
        with one.encoder() as enc_a, one.encoder() as enc_b, two.encoder() as enc_c:
            parts = {"a": [], "b": [], "c": []}
            for i in range(0, len(a), 5):
                parts["a"].append(enc_a.push(a[i : i + 5]))
                parts["b"].append(enc_b.push(b[i : i + 5]))
                parts["c"].append(enc_c.push(a[i : i + 5]))
            for key, enc in (("a", enc_a), ("b", enc_b), ("c", enc_c)):
                parts[key].append(enc.finish())
    got = {key: torch.cat(value, dim=2) for key, value in parts.items()}
    assert torch.equal(got["a"], alone["a"])
    assert torch.equal(got["b"], alone["b"])
    assert torch.equal(got["c"], alone["a"])


def test_the_model_passed_in_is_never_changed(frames):
    model = load_model("cogvideox-nano", random_weights=0)
    before = {k: (v.data_ptr(), v.dtype, v._version) for k, v in model.state_dict().items()}
    with VideoSession(model, dtype="bfloat16") as session:
        assert encode(session, frames).dtype == torch.bfloat16
    assert {k: (v.data_ptr(), v.dtype, v._version) for k, v in model.state_dict().items()} == before


def test_representations(vae, frames):
    with VideoSession(vae) as session:
        mode = encode(session, frames)
        moments = encode(session, frames, representation="moments")
        sample = encode(session, frames, representation="sample", seed=1)
        assert torch.equal(encode(session, frames, representation="sample", seed=1), sample)
        assert not torch.equal(encode(session, frames, representation="sample", seed=2), sample)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(mean, mode)
    # the noise is standard normal once mean and deviation are taken out
    noise = (sample - mean) / torch.exp(0.5 * logvar.clamp(-30, 20))
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_wrong_frames_are_refused_with_what_was_given(vae, frames):
    with VideoSession(vae) as session:
        for wrong in (
            frames[0],
            frames.astype(np.float32),
            frames[..., :1],
            frames.transpose(0, 3, 1, 2),
            frames[:, :0],
        ):
            with session.encoder() as enc, pytest.raises(SourceError, match="uint8 with axes"):
                enc.push(wrong)
        with session.encoder() as enc:
            enc.push(frames)
            with pytest.raises(SourceError, match="one video has one size"):
                enc.push(frames[:, :16])
        with session.encoder() as enc, pytest.raises(SourceError, match="no frames"):
            enc.finish()


def test_frames_may_be_torch_strided_or_read_only(vae, frames):
    with VideoSession(vae) as session:
        expected = encode(session, frames)
        frozen = frames.copy()
        frozen.flags.writeable = False
        wide = np.repeat(frames, 2, axis=2)[:, :, ::2]
        for same in (torch.from_numpy(frames), frozen, wide, frames[::-1][::-1]):
            assert torch.equal(encode(session, same), expected)


def test_wrong_latents_are_refused(vae):
    z = torch.randn(1, 16, 5, 2, 3)
    with VideoSession(vae) as session:
        for wrong in (z[0], z[:, :4], z.repeat(2, 1, 1, 1, 1), z.numpy()):
            with session.decoder() as dec, pytest.raises(ScheduleError, match="torch tensor"):
                dec.push(wrong)
        with session.decoder() as dec, pytest.raises(ScheduleError, match=r"1 \+ k x 2"):
            dec.push(z[:, :, :4])
            dec.finish()
        with session.decoder(num_frames=9) as dec, pytest.raises(ScheduleError, match="9 were asked for"):
            dec.push(z)
            dec.finish()
        with session.decoder(num_frames=30) as dec, pytest.raises(ScheduleError, match="hold at most 17 frames"):
            dec.push(z)
            dec.finish()
        with pytest.raises(ScheduleError, match="at least one frame"):
            session.decoder(num_frames=0)


def test_non_finite_output_stops_a_decode(vae):
    broken = copy.deepcopy(vae)
    broken.decoder.conv_out.conv.bias.fill_(float("nan"))
    with VideoSession(broken) as session, session.decoder() as dec, pytest.raises(ModelError, match="not finite"):
        dec.push(torch.randn(1, 16, 3, 2, 2))


@pytest.mark.parametrize("bad", [(0,), (2,), (1, 3)])
def test_the_first_frame_that_is_not_finite_is_named(vae, monkeypatch, bad):
    frames = torch.zeros(1, 3, 9, 16, 16)
    for t in bad:
        frames[0, 1, t, 5, 7] = float("inf")
    broken = copy.deepcopy(vae)
    monkeypatch.setattr(broken, "decode", lambda z, cache: frames[:, :, : z.shape[2] * 4 - 3].to(z.device))
    message = f"frame {bad[0]} of the decoded chunk is not finite"
    session = VideoSession(broken, layout="contiguous")  # no layer runs that could be measured
    with session, session.decoder() as dec, pytest.raises(ModelError, match=message):
        dec.push(torch.randn(1, 16, 3, 2, 2))


def test_non_finite_latents_never_reach_a_store(vae, frames, tmp_path):
    broken = copy.deepcopy(vae)
    broken.encoder.conv_out.conv.bias.fill_(float("inf"))
    with VideoSession(broken) as session:
        with pytest.raises(NonFiniteError, match="chunk 0 was encoded to values that are not finite"):
            session.encode(frames, tmp_path / "a.zarr")
        with session.encoder() as enc, pytest.raises(NonFiniteError):
            enc.push(frames)
    assert list(tmp_path.iterdir()) == []


def test_budget_is_checked_before_any_output(vae, frames, tmp_path):
    need = fixed_plan(vae, height=24, width=40)
    store = tmp_path / "a.zarr"
    with VideoSession(vae, memory=need.encode.projected_bytes) as session:
        report = session.encode(frames, store)
    assert report.peak_device_bytes == need.encode.projected_bytes
    for offload, least in (("none", "projected_bytes"), ("auto", "minimum_bytes")):
        fixed = {"offload": offload, "slice_frames": 8 if offload == "none" else None}
        with VideoSession(vae, memory=getattr(need.encode, least) - 1, **fixed) as session:
            with pytest.raises(MemoryBudgetError):
                session.encode(frames, tmp_path / "b.zarr")
            with session.encoder() as enc, pytest.raises(MemoryBudgetError):
                enc.push(frames)
        with (
            VideoSession(vae, memory=getattr(need.decode, least) - 1, **fixed) as session,
            pytest.raises(MemoryBudgetError),
        ):
            session.decode(store, tmp_path / "a.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize("numerics", [{}, {"layout": "channels_last"}], ids=["contiguous", "channels_last"])
def test_a_run_that_is_continued_needs_no_more_than_was_planned(vae, frames, tmp_path, numerics, monkeypatch):
    """It starts in the middle, with none of the memory that the layers of the first run had kept."""
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 2)
    long = np.concatenate([frames] * 3)
    for stop_after in (1, 2, 3):
        path, seen = tmp_path / f"{stop_after}.zarr", []

        def stop(event, seen=seen, stop_after=stop_after):
            seen.append(event)
            if len(seen) == stop_after:
                session.stop()

        with VideoSession(vae, **numerics, callbacks=[stop]) as session:
            assert not session.encode(long, path).complete
        with VideoSession(vae, **numerics) as session:
            assert session.plan(height=24, width=40).encode.execution.keeps_buffers
            report = session.encode(long, path)
        assert report.complete
        assert report.resumed_from_frame
        assert 0 < report.peak_device_bytes <= report.projected_bytes


def test_the_measured_peak_is_the_planned_one_whichever_thread_is_slow(vae, frames, tmp_path):
    """Results that wait for a slow writer are host memory and do not count."""
    long = np.concatenate([frames] * 3)
    plan, held = fixed_plan(vae, height=24, width=40, keep_buffers=True), []

    def slow(part):
        time.sleep(0.02)
        held.append(part)

    with VideoSession(vae) as session:
        assert session.encode(long, tmp_path / "a.zarr").peak_device_bytes == plan.encode.projected_bytes
        assert session.decode(tmp_path / "a.zarr", slow).peak_device_bytes == plan.decode.projected_bytes
    assert sum(map(len, held)) == len(long)


def test_kept_kernels_are_in_the_measured_peak_as_in_the_planned_one(packable, frames, tmp_path):
    with VideoSession(packable, device="cpu", layout="channels_last") as session:
        plan = session.plan(height=24, width=40)
        assert plan.encode.execution.keeps_kernels
        peak = session.encode(np.concatenate([frames] * 3), tmp_path / "a.zarr").peak_device_bytes
        assert peak == plan.encode.projected_bytes
    with VideoSession(packable, device="cpu", layout="channels_last", memory=peak - 1) as session:
        plan = session.plan(height=24, width=40)
        assert plan.encode.execution.keeps_buffers
        assert not plan.encode.execution.keeps_kernels
        report = session.encode(np.concatenate([frames] * 3), tmp_path / "b.zarr")
        assert report.peak_device_bytes == plan.encode.projected_bytes < peak


def test_several_open_videos_share_the_budget(vae, frames):
    need = fixed_plan(vae, height=24, width=40).encode.projected_bytes
    with VideoSession(vae, memory=need) as session, session.encoder() as first, session.encoder() as second:
        first.push(frames)
        with pytest.raises(MemoryBudgetError, match="contexts of other open videos"):
            second.push(frames)
        first.close()


def test_the_device_that_auto_finds_is_tried_like_any_other(vae, monkeypatch):
    """What a driver names may be unusable; and a name without a number is not what tensors say of themselves."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    with pytest.raises(ModelError, match="device 'xpu' cannot be used here"):
        VideoSession(vae).__enter__()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_device_that_auto_finds_is_continued(vae, frames, tmp_path):
    whole, parts, long = tmp_path / "whole.zarr", tmp_path / "parts.zarr", np.concatenate([frames] * 3)

    def stop(event):
        session.stop()

    with VideoSession(vae) as session:
        session.encode(long, whole)
    with VideoSession(vae, callbacks=[stop]) as session:
        assert not session.encode(long, parts).complete
    with VideoSession(vae) as session:
        assert session.encode(long, parts).resumed_from_frame
    assert np.array_equal(open_store(whole).latents[:], open_store(parts).latents[:])


def test_options_are_checked_by_the_constructor(vae, frames, tmp_path):
    for options, error, said in (
        ({"offload": "some"}, OptionError, "choose auto, none, all"),
        ({"dtype": "int8"}, ModelError, "int8"),
    ):
        with pytest.raises(error, match=said):
            VideoSession(vae, **options)
    with pytest.raises(ModelError, match="'nonsense' cannot be used here"), VideoSession(vae, device="nonsense"):
        pass
    with pytest.raises(ModelError, match="without weights"), VideoSession(load_model("cogvideox-nano")):
        pass
    with VideoSession(vae) as session, pytest.raises(ModelError, match="choose mode, moments or sample"):
        session.encode(frames, tmp_path / "a.zarr", representation="median")


def test_a_user_s_callback_error_passes_through_and_the_session_goes_on(vae, frames, tmp_path):
    class MineError(Exception):
        pass

    def fail(event):
        if armed and event.index == 1:
            raise MineError("mine")

    armed = True
    with VideoSession(vae, callbacks=[fail]) as session:
        with pytest.raises(MineError, match="mine"):
            session.encode(frames, tmp_path / "a.zarr")
        assert list(tmp_path.iterdir()) == []
        armed = False
        assert session.encode(frames, tmp_path / "a.zarr").complete


def test_decode_checks_the_store(vae, frames, tmp_path):
    with VideoSession(vae) as session:
        session.encode(frames, tmp_path / "a.zarr")
        store = open_store(tmp_path / "a.zarr")
        for window, said in (({"start": 26}, "0 to 25"), ({"start": -1}, "0 to 25"), ({"frames": 0}, "0 to 25")):
            with pytest.raises(ScheduleError, match=said):
                session.decode(store, tmp_path / "a.mp4", **window)
        got = []
        report = session.decode(store, got.append, start=3, frames=10)
        assert (sum(map(len, got)), report.frames) == (10, 10)
        whole = []
        session.decode(store, whole.append)
        np.testing.assert_array_equal(np.concatenate(got), np.concatenate(whole)[3:13])
    with (
        VideoSession(load_model("cogvideox-nano", random_weights=5)) as other,
        pytest.warns(UserWarning, match="other weights"),
    ):
        store.vae["weights_sha256"] = "0" * 64
        other.decode(store, lambda frames: None)


def test_a_cache_of_another_session_cannot_be_mixed_up(vae):
    """Contexts are keyed by module, so even a copy of the model is another model."""
    from longvid import ConvCache

    other = copy.deepcopy(vae)
    with ConvCache(other.encoder) as cache, pytest.raises(CacheError, match="not a layer of the module"):
        vae.encode(torch.zeros(1, 3, 9, 16, 16), cache)


def test_output_onto_input_is_refused(vae, frames, tmp_path):
    with VideoSession(vae) as session:
        session.encode(frames, tmp_path / "a.zarr")
        session.decode(tmp_path / "a.zarr", tmp_path / "frames.zarr")
        array = zarr.open_array(tmp_path / "frames.zarr" / "frames", mode="r")
        for source in (tmp_path / "frames.zarr", array):
            with pytest.raises(StoreError, match="one is the other"):
                session.encode(source, tmp_path / "frames.zarr", overwrite=True)
        for out in ("a.zarr", "a.zarr/b.zarr", "a.zarr/b.mp4"):
            with pytest.raises(StoreError):
                session.decode(tmp_path / "a.zarr", tmp_path / out, overwrite=True)
        assert open_store(tmp_path / "a.zarr").num_frames == len(frames)
        with pytest.raises(ModelError, match="negative"):
            session.encoder(representation="sample", seed=-1)


def test_videos_that_have_not_started_count_as_planned(vae, frames):
    """Contexts come into being with the first chunk; the budget holds all the same."""
    need = fixed_plan(vae, height=24, width=40)
    first = frames[:1]  # not a whole chunk: nothing runs yet
    with VideoSession(vae, memory=need.encode.projected_bytes + need.encode.cache_bytes, offload="none") as session:
        with session.encoder() as a, session.encoder() as b, session.encoder() as c:
            a.push(first)
            b.push(first)
            assert a.cache_bytes == b.cache_bytes == 0
            with pytest.raises(MemoryBudgetError, match="contexts of other open videos"):
                c.push(first)
            a.close()
            b.close()
        with session.encoder() as d:  # the others have ended
            d.push(first)
            d.close()


def test_a_small_video_beside_a_large_one_is_checked_for_both(vae, frames):
    large, small = fixed_plan(vae, height=24, width=40).encode, fixed_plan(vae, height=8, width=8).encode
    for spare, fits in ((small.cache_bytes, True), (small.cache_bytes - 1, False)):
        with (
            VideoSession(vae, memory=large.projected_bytes + spare, offload="none") as session,
            session.encoder() as a,
            session.encoder() as b,
        ):
            a.push(frames[:1])
            if fits:
                b.push(frames[:1, :8, :8])
            else:
                with pytest.raises(MemoryBudgetError, match="beside a larger video"):
                    b.push(frames[:1, :8, :8])
            a.close()
            b.close()


def test_chunks_get_shorter_for_a_second_video():
    small = fixed_plan("tiny", height=16, width=16).decode
    short = fixed_plan("tiny", height=64, width=64, chunk_frames=4).decode
    memory = short.projected_bytes + small.cache_bytes
    with VideoSession("tiny", device="cpu", memory=memory) as session, session.decoder() as a, session.decoder() as b:
        a.push(torch.zeros(1, 16, 1, 2, 2))
        b.push(torch.zeros(1, 16, 1, 8, 8))
        assert a.admission.schedule.chunk_frames == 16
        assert b.admission.schedule.chunk_frames == 4
        a.close()
        b.close()


def test_samples_do_not_depend_on_the_cut(frames):
    got = []
    for n in (4, 16):
        with (
            VideoSession("tiny", device="cpu", chunk_frames=n) as session,
            session.encoder(representation="sample", seed=5) as encoder,
        ):
            got.append(torch.cat([encoder.push(frames), encoder.finish()], dim=2))
    assert torch.allclose(got[0], got[1], atol=1e-4)
    with VideoSession("tiny", device="cpu") as session, session.encoder(representation="sample", seed=6) as encoder:
        other = torch.cat([encoder.push(frames), encoder.finish()], dim=2)
    assert not torch.allclose(other, got[0], atol=1e-3)


def test_a_store_of_another_spatial_compression_is_refused(vae, frames, tmp_path):
    with VideoSession(vae) as session:
        session.encode(frames, tmp_path / "a.zarr")
    other = copy.deepcopy(vae)
    other.geometry = dataclasses.replace(vae.geometry, pixels_per_latent=4)
    with VideoSession(other) as session, pytest.raises(StoreError, match="latents of 5x3 for frames of 40x24"):
        session.decode(tmp_path / "a.zarr", tmp_path / "a.mp4")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_forgotten_finish_is_an_error_that_says_what_to_do(vae, frames, kind):
    some = frames if kind == "encoder" else torch.zeros(1, 16, 2, 2, 2)
    with VideoSession(vae) as session:
        with pytest.raises(SessionStateError, match=rf"the {kind} was left without finish\(\)"):  # noqa: SIM117
            with getattr(session, kind)() as scope:
                scope.push(some)
        assert scope.closed
        with getattr(session, kind)() as scope:  # dropped on purpose
            scope.push(some)
            scope.close()
        with getattr(session, kind)():  # nothing was pushed
            pass
        with pytest.raises(KeyError):  # the error of the block is the one that matters # noqa: SIM117
            with getattr(session, kind)() as scope:
                scope.push(some)
                raise KeyError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_that_are_not_finite_are_named_before_they_are_decoded(vae, frames, tmp_path, dtype):
    z = torch.zeros(1, 16, 5, 2, 3)
    z[0, 4, 3, 1, 2] = float("nan")
    with VideoSession(vae, dtype=dtype) as session:
        with (
            session.decoder() as dec,
            pytest.raises(NonFiniteError, match="latent frame 3, in chunk 1,") as caught,
        ):
            dec.push(z)
        assert caught.value.chunk == 1
        assert "float32" not in str(caught.value)
        session.encode(frames, tmp_path / "a.zarr")
        store = open_store(tmp_path / "a.zarr")
        read = type(store).read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(store), "read", lambda self, *window: read(self, *window) * float("inf"))
            with pytest.raises(NonFiniteError, match="latent frame 0, in chunk 0"):
                session.decode(store, lambda _: None)


def test_places_that_cannot_be_written_are_named(vae, frames, tmp_path):
    with VideoSession(vae) as session:
        for out, said in (
            ("s3://a/b.zarr", "s3://a/b.zarr is an address"),
            (Path("s3://a/b.zarr"), "a Path drops one of its slashes"),
            (zarr.storage.MemoryStore(), "a MemoryStore was given as the place to write to"),
            (None, "a NoneType was given"),
        ):
            with pytest.raises(StoreError, match=said):
                session.encode(frames, out)
        session.encode(frames, tmp_path / "a.zarr")
        with pytest.raises(StoreError, match="is an address"):
            session.decode(tmp_path / "a.zarr", "s3://a/b.mp4")
        with session.encoder() as enc, pytest.raises(SourceError, match="is a list; expected a numpy array"):
            enc.push([[1], [1, 2]])
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_the_store_of_another_model_is_told_in_words(vae, frames, tmp_path):
    with VideoSession("tiny", device="cpu") as session:
        session.encode(frames, tmp_path / "a.zarr")
    other = copy.deepcopy(vae)
    other.geometry = dataclasses.replace(vae.geometry, latent_channels=4)
    for model, error, said in (
        (vae, ScheduleError, "chunks of 9, 8, 8, ..."),
        (other, StoreError, "4 channels"),
    ):
        with VideoSession(model) as session, pytest.raises(error) as caught:
            session.decode(tmp_path / "a.zarr", tmp_path / "a.mp4")
        for words in (str(tmp_path / "a.zarr"), "was encoded with the model tiny", "--model tiny", said):
            assert words in str(caught.value)
        assert "{" not in str(caught.value)


def test_odd_calls_get_our_errors(vae, frames, tmp_path):
    with pytest.raises(ValueError, match="'lots' is not a size"):
        VideoSession(vae, memory="lots")
    with VideoSession(vae) as session:
        for options, error, said in (
            ({"store_dtype": "bfloat16"}, StoreError, "choose float16 or float32"),
            ({"frame_rate": float("nan")}, SourceError, "frame_rate=nan"),
            ({"frame_rate": float("inf")}, SourceError, "frame_rate=inf"),
        ):
            with pytest.raises(error, match=said):
                session.encode(frames, tmp_path / "a.zarr", **options)
        with session.encoder() as encoder:
            encoder.push(frames[:0])
            with pytest.raises(SourceError, match="no frames"):
                encoder.finish()
        with session.decoder(size=(100, 100)) as decoder, pytest.raises(ScheduleError, match="crop to 100x100"):
            decoder.push(torch.zeros(1, 16, 1, 2, 2))
        with session.decoder() as decoder, pytest.raises(ScheduleError, match="latents are"):
            decoder.push(torch.zeros(1, 16, 1, 0, 2))
    assert list(tmp_path.iterdir()) == []


class Observer:
    def __init__(self, fails_in=()):
        self.heard, self.fails_in = [], fails_in

    def _hear(self, what):
        self.heard.append(what)
        if what in self.fails_in:
            raise ValueError(what)

    def run_started(self, start):
        self._hear("started")

    def __call__(self, event):
        self._hear("chunk")

    def run_finished(self, report):
        self._hear("failed" if report is None else "finished")


def test_every_observer_hears_the_end_even_if_one_fails(vae, frames, tmp_path):
    first, second = Observer(["finished"]), Observer()
    with VideoSession(vae, callbacks=[first, second]) as session:
        with pytest.raises(ValueError, match="finished"):
            session.encode(frames[:9], tmp_path / "a.zarr")
        assert first.heard == second.heard == ["started", "chunk", "finished"]
        assert open_store(tmp_path / "a.zarr").complete
    first, second = Observer(), Observer(["started"])
    with VideoSession(vae, callbacks=[first, second]) as session, pytest.raises(ValueError, match="started"):
        session.encode(frames, tmp_path / "b.zarr")
    assert (first.heard, second.heard) == (["started", "failed"], ["started"])
    first, second = Observer(["chunk"]), Observer()
    with VideoSession(vae, callbacks=[first, second]) as session, pytest.raises(ValueError, match="chunk"):
        session.encode(frames, tmp_path / "c.zarr")
    assert (first.heard, second.heard) == (["started", "chunk", "failed"], ["started", "failed"])


def test_a_failing_end_does_not_hide_why_the_run_failed(vae, frames, tmp_path):
    with (
        VideoSession(vae, callbacks=[Observer(["chunk", "failed"])]) as session,
        pytest.warns(UserWarning, match="a callback failed after the run did: failed"),
        pytest.raises(ValueError, match="chunk"),
    ):
        session.encode(frames, tmp_path / "c.zarr")


def test_a_session_may_use_its_own_host_memory_again(vae, frames, tmp_path, monkeypatch):
    """What the first video's contexts took is kept for the second one, and is not counted against it."""
    import longvid.runtime.admission
    from longvid.memory.host_buffer import HostBuffer

    plan = fixed_plan(vae, height=24, width=40, offload="all").encode
    needed = HostBuffer.room_for(plan.host_sizes) + plan.projected_bytes - plan.weights_bytes
    with VideoSession(vae, device="cpu", offload="all") as session:
        monkeypatch.setattr(
            longvid.runtime.admission,
            "host_available_bytes",
            lambda: needed - session._control.engine.copy_engine.spare_bytes,
        )
        for name in ("a.zarr", "b.zarr"):
            session.encode(frames, tmp_path / name)

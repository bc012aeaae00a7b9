"""Offloading as a whole: whatever leaves the device, wherever it goes, the bits are the same and the plan is exact."""

import threading

import numpy as np
import pytest
import torch
from support.plans import fixed_plan

from longvid import MemoryBudgetError, VideoSession, load_model, open_store
from longvid.memory.offload import OffloadPolicy, Placement
from longvid.planning.cost_model import choose_placement

HEIGHT, WIDTH = 24, 40


def policies(part):
    """None, eight thresholds, all."""
    sizes = np.linspace(0, part.cache_bytes, 10, dtype=int)[1:-1]
    return ["none", *(int(size) for size in sizes), "all"]


@pytest.fixture(scope="module")
def plan(vae):
    return fixed_plan(vae, height=HEIGHT, width=WIDTH)


def encoded(vae, frames, path, **options):
    with VideoSession(vae, **options) as session:
        report = session.encode(frames, path, representation="moments", store_dtype="float32")
    return np.asarray(open_store(path).moments[:]), report


def decoded(vae, store, **options):
    pieces = []
    with VideoSession(vae, **options) as session:
        report = session.decode(store, pieces.append)
    return np.concatenate(pieces), report


@pytest.fixture(scope="module")
def reference(vae, tmp_path_factory):
    frames = np.random.default_rng(3).integers(0, 256, (34, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("reference") / "a.zarr"
    moments, _ = encoded(vae, frames, path, offload="none")
    return frames, path, moments, decoded(vae, path, offload="none")[0]


@pytest.mark.parametrize("index", range(10))
def test_no_threshold_changes_a_bit_and_every_plan_is_exact(vae, plan, reference, tmp_path, index):
    frames, store, moments, pixels = reference
    policy = policies(plan.encode)[index]
    got, report = encoded(vae, frames, tmp_path / "a.zarr", offload=policy)
    assert np.array_equal(got, moments)
    expected = fixed_plan(
        vae, height=HEIGHT, width=WIDTH, offload=policy, directions=["encode"], keep_buffers=True
    ).encode
    assert report.peak_device_bytes == report.projected_bytes == expected.projected_bytes
    assert report.offloaded_bytes == expected.offloaded_cache_bytes
    assert report.cache_bytes == plan.encode.cache_bytes

    policy = policies(plan.decode)[index]
    got, report = decoded(vae, store, offload=policy)
    assert np.array_equal(got, pixels)
    expected = fixed_plan(
        vae, height=HEIGHT, width=WIDTH, offload=policy, directions=["decode"], keep_buffers=True
    ).decode
    assert report.peak_device_bytes == report.projected_bytes == expected.projected_bytes
    assert report.offloaded_bytes == expected.offloaded_cache_bytes


@pytest.mark.parametrize("name", ["wan2.1-nano", "wan2.2-nano"])
def test_no_threshold_changes_a_bit_of_wan_and_every_plan_is_exact(name, tmp_path):
    model = load_model(name, random_weights=1)
    frames = np.random.default_rng(3).integers(0, 256, (18, 32, 48, 3), dtype=np.uint8)
    moments, _ = encoded(model, frames, tmp_path / "a.zarr", offload="none")
    pixels, _ = decoded(model, tmp_path / "a.zarr", offload="none")
    half = fixed_plan(model, height=32, width=48).encode.cache_bytes // 2
    for policy in (half, "all"):
        got, report = encoded(model, frames, tmp_path / f"{policy}.zarr", offload=policy)
        assert np.array_equal(got, moments)
        assert report.offloaded_bytes > 0
        assert report.peak_device_bytes == report.projected_bytes
        got, report = decoded(model, tmp_path / "a.zarr", offload=policy)
        assert np.array_equal(got, pixels)
        assert report.offloaded_bytes > 0
        assert report.peak_device_bytes == report.projected_bytes


def test_a_file_instead_of_host_memory(vae, plan, reference, tmp_path):
    frames, store, moments, pixels = reference
    folder = tmp_path / "contexts"
    folder.mkdir()
    seen = []
    options = {"offload": "all", "offload_dir": folder, "callbacks": [lambda _: seen.append(list(folder.iterdir()))]}
    got, report = encoded(vae, frames, tmp_path / "a.zarr", **options)
    assert np.array_equal(got, moments)
    assert report.offloaded_bytes == plan.encode.cache_bytes
    assert np.array_equal(decoded(vae, store, **options)[0], pixels)
    assert seen
    assert not any(seen)  # the file has no name, so nothing is left behind by a kill


def test_offloading_saves_memory(plan):
    for direction in ("encode", "decode"):
        part = plan.direction(direction)
        everything = choose_placement(part.cost_model, OffloadPolicy("all"), lambda _: True, part.rates)
        assert part.minimum_bytes - part.weights_bytes <= part.cost_model.peak(everything).total_bytes
        assert part.cost_model.peak(everything).total_bytes < part.cost_model.peak(Placement()).total_bytes


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_twenty_budgets(vae, plan, reference, tmp_path, direction):
    """From the least to the unlimited peak every budget holds, bit for bit; a byte less than the least is refused."""
    frames, store, moments, pixels = reference
    part = plan.direction(direction)
    shortest = fixed_plan(vae, height=plan.height, width=plan.width, slice_frames=1).direction(direction)
    assert part.minimum_bytes < shortest.nothing_offloaded_bytes < part.nothing_offloaded_bytes
    for index, budget in enumerate(np.linspace(part.minimum_bytes, part.nothing_offloaded_bytes, 20, dtype=int)):
        if direction == "encode":
            got, report = encoded(vae, frames[:25], tmp_path / f"{index}.zarr", memory=int(budget))
            assert np.array_equal(got, moments[: len(got)])
        else:
            got, report = decoded(vae, store, memory=int(budget))
            assert np.array_equal(got, pixels)
        assert report.peak_device_bytes == report.projected_bytes <= budget
        assert (report.offloaded_bytes == 0) == (budget >= shortest.nothing_offloaded_bytes)
    with (
        VideoSession(vae, memory=part.minimum_bytes - 1) as session,
        pytest.raises(MemoryBudgetError, match="what would fit") as caught,
    ):
        if direction == "encode":
            session.encode(_NeverRead(frames), tmp_path / "refused.zarr")
        else:
            session.decode(store, tmp_path / "refused.zarr")
    assert not (tmp_path / "refused.zarr").exists()
    assert caught.value.projected_bytes == part.minimum_bytes


class _NeverRead:
    """An array-like source that says what it is and fails when frames are read."""

    def __init__(self, frames):
        self.shape, self.dtype, self.ndim = frames.shape, frames.dtype, frames.ndim

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, _):
        raise AssertionError("a frame was read")


def test_an_ample_budget_moves_nothing(vae, reference, tmp_path):
    frames, _, moments, _ = reference
    before, lanes = own_threads(), []

    def look(_):
        lanes.extend(t.name for t in threading.enumerate() if t.name.startswith("longvid-to-"))

    look.wants_spans = True
    events = []
    for memory in (None, "1GiB"):
        got, report = encoded(
            vae, frames, tmp_path / f"{memory}.zarr", memory=memory, callbacks=[look, _collector(events)]
        )
        assert np.array_equal(got, moments)
        assert report.offloaded_bytes == 0
    assert not lanes  # not even started
    assert {span.lane for event in events for span in event.spans} == {"compute"}
    assert own_threads() == before


def own_threads():
    """Names of all threads but those of zarr's event loop, which takes more when it wants to and keeps them."""
    return {t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")}


def _collector(events):
    def collect(event):
        events.append(event)

    collect.wants_spans = True
    return collect


def test_spans_tell_what_moved(vae, plan, reference, tmp_path):
    frames, _, _, _ = reference
    events = []
    encoded(vae, frames, tmp_path / "a.zarr", offload="all", callbacks=[_collector(events)])
    layers = {layer.name: layer.bytes for layer in plan.encode.layers}
    for event in events[1:-1]:
        assert event.offloaded_bytes > 0
    spans = [span for event in events for span in event.spans]
    for lane, chunks in (("compute", len(events)), ("to_host", len(events)), ("to_device", len(events) - 1)):
        of_lane = [span for span in spans if span.lane == lane]
        counts = {name: sum(span.layer == name for span in of_lane) for name in layers}
        # What is under way when the last event is sent is missing from it: at most a chunk's worth.
        assert all(chunks - 1 <= count <= chunks + 1 for count in counts.values()), (lane, counts)
        assert all(0 <= span.start_seconds <= span.stop_seconds for span in of_lane)
        assert all(span.num_bytes == layers[span.layer] for span in of_lane)


def test_videos_that_interleave_are_each_as_if_alone(vae, reference):
    frames, _, moments, _ = reference
    with (
        VideoSession(vae, offload="all") as session,
        session.encoder(representation="moments") as a,
        session.encoder(representation="moments") as b,
    ):
        parts = [(a.push(frames[i : i + 5]), b.push(frames[::-1][i : i + 5])) for i in range(0, len(frames), 5)]
        got = (
            torch.cat([*(p for p, _ in parts), a.finish()], dim=2),
            torch.cat([*(q for _, q in parts), b.finish()], 2),
        )
    assert np.array_equal(got[0][0].movedim(1, 0).numpy(), moments)
    assert not np.array_equal(got[1][0].movedim(1, 0).numpy(), moments)


def test_a_second_video_makes_room_by_offloading(vae, plan, frames):
    """Two videos whose contexts do not fit together: with auto the second one sends its own to the host."""
    memory = plan.encode.minimum_bytes + plan.encode.cache_bytes
    assert memory < plan.encode.projected_bytes + plan.encode.cache_bytes
    with (
        VideoSession(vae, memory=memory) as session,
        session.encoder() as a,
        session.encoder() as b,
    ):
        a.push(frames)
        b.push(frames)
        assert not a.admission.part.placement.offloaded
        assert b.admission.part.placement.offloaded
        assert a.admission.part.projected_bytes + b.admission.part.idle_bytes <= memory
        assert b.admission.part.projected_bytes + a.admission.part.idle_bytes <= memory
        a.close()
        b.close()


def test_a_chunk_invariant_model_shortens_its_chunks_before_it_offloads():
    need = fixed_plan("tiny", height=64, width=96, offload="none")
    four = fixed_plan("tiny", height=64, width=96, chunk_frames=4, offload="none")
    fits = fixed_plan("tiny", height=64, width=96, memory=four.projected_bytes)
    assert fits.schedule.chunk_frames == 4
    assert not fits.encode.placement.offloaded
    assert not fits.decode.placement.offloaded
    least = max(four.encode.minimum_bytes, four.decode.minimum_bytes)
    assert least < four.projected_bytes < need.projected_bytes
    tight = fixed_plan("tiny", height=64, width=96, memory=least)
    assert tight.projected_bytes <= least
    assert tight.encode.placement.offloaded | tight.decode.placement.offloaded


def test_host_memory_is_a_limit_too(vae, frames, tmp_path, monkeypatch):
    import longvid.runtime.admission

    monkeypatch.setattr(longvid.runtime.admission, "host_available_bytes", lambda: 100_000)
    with (
        VideoSession(vae, offload="all") as session,
        pytest.raises(MemoryBudgetError, match=r"97\.66 KiB left") as caught,
    ):
        session.encode(frames, tmp_path / "a.zarr")
    assert set(caught.value.parts) == {"offloaded contexts", "tensors"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [("auto", "auto", None), ("none", "none", None), ("all", "all", None), ("1KiB", "size", 1024), ("0", "all", None)],
)
def test_policies_are_read(text, kind, size):
    policy = OffloadPolicy.parse(text)
    assert (policy.kind, policy.resident_bytes) == (kind, size)
    assert OffloadPolicy.parse(policy) is policy
    assert str(policy) == (text if size is None and text != "0" else "all" if text == "0" else "beyond 1.00 KiB")


def test_an_unknown_policy_says_what_there_is():
    with pytest.raises(ValueError, match="'some' is not known; choose auto, none, all, or the size"):
        OffloadPolicy.parse("some")


def test_what_is_staged_is_a_window_in_bytes():
    contexts = [("a", 1), ("b", 5), ("c", 1), ("d", 1), ("e", 9)]
    everything = frozenset("abcde")

    def staged(position, offloaded, prefetch_bytes):
        return list(Placement(offloaded=offloaded, prefetch_bytes=prefetch_bytes).staged(position, contexts))

    assert staged(1, everything, 0) == [1]
    assert staged(1, everything, 2) == [1, 2, 3]
    assert staged(1, frozenset("cde"), 2) == [2, 3]
    assert staged(3, everything, 9) == [3, 4]
    assert staged(3, everything, 8) == [3]  # a context that does not fit is not skipped
    assert staged(3, everything, 100) == [3, 4, 0, 1, 2]


@pytest.mark.cuda
def test_on_a_device_too_no_policy_changes_a_bit(vae, frames, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    part = fixed_plan(vae, height=HEIGHT, width=WIDTH).encode
    results = []
    for index, policy in enumerate(["none", part.cache_bytes // 2, "all"]):
        got, report = encoded(vae, frames, tmp_path / f"{index}.zarr", device="cuda", offload=policy)
        results.append(got)
        assert report.peak_device_bytes <= report.projected_bytes + 512 * 2**20
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_frames_in_page_locked_memory_are_the_same_frames(vae, frames, tmp_path):
    staged, _ = encoded(vae, frames, tmp_path / "a.zarr", device="cuda")
    with VideoSession(vae, device="cuda") as session, session.encoder(representation="moments") as encoder:
        pushed = torch.cat([encoder.push(frames), encoder.finish()], dim=2)
    np.testing.assert_array_equal(staged, pushed[0].movedim(1, 0).numpy())

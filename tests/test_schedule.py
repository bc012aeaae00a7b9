"""The schedule is the only producer of lengths, so its arithmetic is proven on every length."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import ScheduleError
from longvid.schedule import ChunkSchedule

plans = st.builds(
    lambda per_latent, k, whole: ChunkSchedule(
        chunk_frames=per_latent * k, frames_per_latent=per_latent, whole_chunks=whole
    ),
    st.integers(1, 8),
    st.integers(1, 6),
    st.booleans(),
)


def test_the_cogvideox_plan():
    plan = ChunkSchedule()
    assert [c.padded_frames for c in plan.chunks(30)] == [9, 8, 8, 8]
    assert [c.num_frames for c in plan.chunks(30)] == [9, 8, 8, 5]
    assert [c.num_latents for c in plan.chunks(30)] == [3, 2, 2, 2]
    assert [plan.num_latents(n) for n in (1, 2, 9, 10, 17)] == [1, 3, 3, 5, 5]
    assert [plan.frame_range(i) for i in range(3)] == [(0, 1), (1, 5), (5, 9)]


def test_a_plan_that_pads_to_latents_only():
    plan = ChunkSchedule(chunk_frames=16, whole_chunks=False)
    assert [c.padded_frames for c in plan.chunks(30)] == [17, 16]
    assert [c.padded_frames for c in plan.chunks(22)] == [17, 8]
    assert [c.num_latents for c in plan.chunks(22)] == [5, 2]
    assert [plan.num_latents(n) for n in (1, 2, 5, 6, 17, 18)] == [1, 2, 2, 3, 5, 6]


@given(st.integers(1, 2000), st.integers(1, 16), st.integers(1, 16))
def test_latents_that_do_not_depend_on_the_cut(num_frames, k, m):
    a, b = (ChunkSchedule(chunk_frames=4 * n, whole_chunks=False) for n in (k, m))
    assert a.num_latents(num_frames) == b.num_latents(num_frames)
    assert a.same_latents(b)
    assert a.same_latents(ChunkSchedule(chunk_frames=4 * k)) is False
    assert ChunkSchedule(chunk_frames=4 * k).same_latents(ChunkSchedule(chunk_frames=4 * m)) is (k == m)


@given(plans, st.integers(1, 2000))
def test_a_tail_is_known_by_its_latents(plan, num_frames):
    last = list(plan.chunks(num_frames))[-1]
    by_latents = plan.tail_of_latents(last.index, last.num_latents)
    assert by_latents.num_frames == last.padded_frames
    assert (by_latents.latent_start, by_latents.latent_stop) == (last.latent_start, last.latent_stop)


def test_one_frame_is_a_chunk_of_its_own():
    (only,) = ChunkSchedule().chunks(1)
    assert (only.padded_frames, only.num_latents) == (1, 1)


@given(plans, st.integers(1, 2000))
def test_chunks_tile_the_video_and_its_latents(plan, num_frames):
    chunks = list(plan.chunks(num_frames))
    assert [c.index for c in chunks] == list(range(plan.num_chunks(num_frames)))
    assert chunks[0].frame_start == chunks[0].latent_start == 0
    for left, right in itertools.pairwise(chunks):
        assert (right.frame_start, right.latent_start) == (left.frame_stop, left.latent_stop)
    assert chunks[-1].frame_stop == num_frames
    assert chunks[-1].latent_stop == plan.num_latents(num_frames)
    for c in chunks:
        assert 1 <= c.num_frames <= c.padded_frames
        # what a causal VAE makes of a chunk: its first frame alone if it has the video's first frame
        first = 1 if c.index == 0 else 0
        assert c.num_latents == first + (c.padded_frames - first) // plan.frames_per_latent


@given(plans, st.integers(1, 2000))
def test_the_plan_does_not_need_the_length_in_advance(plan, num_frames):
    known = list(plan.chunks(num_frames))
    online, index, left = [], 0, num_frames
    while left > plan.capacity(index):
        online.append(plan.full(index))
        left -= plan.capacity(index)
        index += 1
    online.append(plan.tail(index, left))
    assert online == known


@given(plans, st.integers(1, 2000))
def test_lengths_go_there_and_back(plan, num_frames):
    latents = plan.num_latents(num_frames)
    assert num_frames <= plan.max_frames(latents) < num_frames + plan.chunk_frames
    plan.check_length(num_frames, latents)
    assert plan.frame_range(latents - 1)[1] == plan.max_frames(latents)


@given(plans, st.integers(1, 500), st.integers(1, 500))
def test_wrong_lengths_are_refused(plan, num_frames, num_latents):
    if num_latents != plan.num_latents(num_frames):
        with pytest.raises(ScheduleError):
            plan.check_length(num_frames, num_latents)


@given(plans)
def test_the_record_reads_back(plan):
    assert ChunkSchedule.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("record", [{}, {"chunk_frames": 8}, {**ChunkSchedule().to_dict(), "tail": "drop"}, {"a": 1}])
def test_foreign_records_are_refused(record):
    with pytest.raises(ScheduleError):
        ChunkSchedule.from_dict(record)


@pytest.mark.parametrize("args", [(0, 4), (8, 0), (6, 4), (-8, 4)])
def test_impossible_plans_are_refused(args):
    with pytest.raises(ScheduleError):
        ChunkSchedule(chunk_frames=args[0], frames_per_latent=args[1])


def test_bad_lengths_are_refused():
    plan = ChunkSchedule()
    for bad in (0, -1):
        with pytest.raises(ScheduleError, match="at least one frame"):
            plan.num_latents(bad)
    with pytest.raises(ScheduleError, match=r"1 \+ k x 2"):
        plan.max_frames(4)
    with pytest.raises(ScheduleError, match="holds 1 to 8"):
        plan.tail(1, 9)

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


# ------------------------------------------------------------------------------------------------- the reference plan


def diffusers_batches(total, size):
    """Where diffusers cuts frames, or latents: ``AutoencoderKLCogVideoX._encode`` and ``_decode``."""
    num_batches, remaining = max(total // size, 1), total % size
    starts = [size * i + (0 if i == 0 else remaining) for i in range(num_batches)]
    stops = [min(total, size * (i + 1) + remaining) for i in range(num_batches)]
    return list(zip(starts, stops, strict=True))


@given(st.integers(1, 2000), st.integers(0, 3))
def test_the_reference_plan_is_that_of_diffusers(num_frames, power):
    per_latent = 2**power
    own = ChunkSchedule(chunk_frames=2 * per_latent, frames_per_latent=per_latent)
    plan = own.reference(num_frames)
    chunks = list(plan.chunks(num_frames))
    assert [(c.frame_start, c.frame_stop) for c in chunks] == diffusers_batches(num_frames, 2 * per_latent)
    assert all(c.padded_frames == c.num_frames for c in chunks)
    num_latents = -(-num_frames // per_latent)
    assert plan.num_latents(num_frames) == chunks[-1].latent_stop == num_latents
    assert plan.max_frames(num_latents) == num_frames
    assert [plan.frame_range(i) for i in range(num_latents)][-1][1] == num_frames
    for frame in {0, num_frames // 3, num_frames // 2, num_frames - 1}:
        start, stop = plan.frame_range(plan.latent_of_frame(frame))
        assert start <= frame < stop
        chunk = chunks[plan.index_of_frame(frame)]
        assert chunk.frame_start <= frame < chunk.frame_stop
        assert chunk.latent_start <= plan.latent_of_frame(frame) < chunk.latent_stop
    decode, decoded = own.reference_decode(num_latents)
    pieces = list(decode.chunks(decoded))
    assert [(c.latent_start, c.latent_stop) for c in pieces] == diffusers_batches(num_latents, 2)
    assert -per_latent < decoded - num_frames < per_latent
    assert ChunkSchedule.from_dict(plan.to_dict()) == plan
    assert own.same_latents(plan)


@given(st.integers(1, 500))
def test_where_the_cut_is_free_the_reference_plan_is_the_plan_itself(num_frames):
    plan = ChunkSchedule(whole_chunks=False)
    assert plan.reference(num_frames) is plan


def test_the_reference_plan_has_no_tail():
    plan = ChunkSchedule().reference(21)
    assert [c.num_frames for c in plan.chunks(21)] == [13, 8]
    with pytest.raises(ScheduleError, match="chunk 1 of the reference plan has 8 frames, and the video ended after 7"):
        list(plan.chunks(20))
    with pytest.raises(ScheduleError, match="4 \\+ k x 2"):
        plan.max_frames(5)
    with pytest.raises(ScheduleError, match="first chunk of 16 frames"):
        ChunkSchedule(first_frames=16)


def test_the_plans_are_told_apart_in_a_record():
    plan = ChunkSchedule()
    assert plan.reference(17).first_frames == 9
    assert plan.reference(17).to_dict() != plan.to_dict()
    assert plan.words == "online: chunks of 9, 8, 8, ... frames, the last one padded to a whole chunk"
    assert plan.reference(29).words == "reference: chunks of 13, 8, 8, ... frames, nothing padded, as diffusers"

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.runtime.reblock import Reblocker, pad_frames


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 9))
def test_blocks_do_not_depend_on_the_slices(lengths, first):
    total = sum(lengths)
    data = np.arange(total * 3).reshape(total, 3)
    reblock, blocks, at = Reblocker(lambda i: first if i == 0 else 4), [], 0
    for n in lengths:
        blocks += [(i, b[0].copy(), b[1].copy()) for i, b in reblock.push(data[at : at + n], data[at : at + n, 0])]
        at += n
    rest = reblock.rest()
    assert all(len(b) == (first if i == 0 else 4) for i, b, _ in blocks)
    assert [i for i, _, _ in blocks] == list(range(len(blocks)))
    pieces = [b for _, b, _ in blocks] + [b for _, (b, _) in rest]
    joined = np.concatenate(pieces) if pieces else data[:0]
    np.testing.assert_array_equal(joined, data)
    assert [i for i, (b, _) in rest if len(b)] == [len(blocks)][: len(rest)]


def test_a_caller_may_reuse_its_buffer():
    reblock, buffer = Reblocker(lambda i: 4), np.zeros((3, 1))
    assert list(reblock.push(buffer)) == []
    buffer[:] = 1
    ((_, (block,)),) = reblock.push(buffer[:1])
    np.testing.assert_array_equal(block[:, 0], [0, 0, 0, 1])


def test_changes_are_refused():
    reblock = Reblocker(lambda i: 4)
    list(reblock.push(np.zeros((1, 2))))
    with pytest.raises(ValueError, match="came after"):
        list(reblock.push(np.zeros((1, 3))))
    with pytest.raises(ValueError, match="different lengths"):
        list(reblock.push(np.zeros((1, 2)), np.zeros((2, 2))))


def test_padding_repeats_the_last_of_each_axis():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    padded = pad_frames(frames, 4, 8, 8)
    np.testing.assert_array_equal(padded[:2, :3, :4], frames)
    np.testing.assert_array_equal(padded[3], padded[1])
    np.testing.assert_array_equal(padded[:, 7], padded[:, 2])
    np.testing.assert_array_equal(padded[:, :, 7], padded[:, :, 3])
    assert pad_frames(frames, 2, 3, 4) is frames


@given(
    st.permutations([1, 2, 3]),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.tuples(*[st.integers(0, 3)] * 3),
    st.integers(0, 2**32 - 1),
)
def test_the_order_in_memory_is_that_of_the_slices_and_changes_nothing(order, lengths, more, seed):
    data = np.random.default_rng(seed).integers(0, 256, (sum(lengths), 4, 5, 3), dtype=np.uint8)
    axes = [0, *order]
    ordered = np.ascontiguousarray(data.transpose(axes)).transpose(np.argsort(axes))
    reblock, at, blocks = Reblocker(lambda i: 3), 0, []
    for n in lengths:
        blocks += [block for _, (block,) in reblock.push(ordered[at : at + n])]
        at += n
    blocks += [block for _, (block,) in reblock.rest()]
    np.testing.assert_array_equal(np.concatenate(blocks), data)
    for block in blocks:
        assert block.transpose(axes).flags.c_contiguous
        T, H, W, _ = block.shape
        padded = pad_frames(block, T + more[0], H + more[1], W + more[2])
        expected = np.pad(block, ((0, more[0]), (0, more[1]), (0, more[2]), (0, 0)), mode="edge")
        np.testing.assert_array_equal(padded, expected)
        assert padded.transpose(axes).flags.c_contiguous

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.media import COUNT, barcodes, collect, indices, write_media

from longvid.errors import SourceError
from longvid.media.arrays import ArrayFrames, IterableFrames
from longvid.media.sources import open_source


def as_numpy(frames):
    return frames


def as_torch(frames):
    return torch.from_numpy(frames)


def as_zarr(frames):
    return zarr.array(frames, chunks=(5, *frames.shape[1:]))


def as_generator(frames):
    return (frames[i : i + 7] for i in range(0, len(frames), 7))


def as_single_frames(frames):
    return list(frames)


def as_tensors(frames):
    return (torch.from_numpy(frames[i : i + 7]) for i in range(0, len(frames), 7))


KINDS = [as_numpy, as_torch, as_zarr, as_generator, as_single_frames, as_tensors]


def refused(source, kind, match=None, **options):
    with pytest.raises(SourceError, match=match) as caught:
        collect(open_source(source, **options))
    assert caught.value.kind == kind, caught.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "frames"), [(0, None), (3, None), (0, 1), (6, 9), (8, 100), (23, 1)])
def test_the_window_is_exact(kind, start, frames):
    source = open_source(kind(barcodes()), start=start, frames=frames)
    expected = list(range(COUNT))[start : None if frames is None else start + frames]
    images, pts = collect(source)
    assert indices(images) == expected
    assert pts.tolist() == expected
    assert images.dtype == np.uint8
    assert pts.dtype == np.int64
    assert source.info.num_frames in (len(expected), None)


@pytest.mark.parametrize("kind", KINDS)
def test_timing_is_assumed_unless_given(kind):
    with open_source(kind(barcodes(3))) as source:
        assert (source.info.frame_rate, source.info.time_base) == (24, Fraction(1, 24))
        assert source.info.timing_assumed
    with open_source(kind(barcodes(3)), frame_rate=Fraction(30000, 1001)) as source:
        assert source.info.time_base == Fraction(1001, 30000)
        assert not source.info.timing_assumed


def test_kind_says_what_it_is():
    assert open_source(barcodes(2)).info.kind == "array"
    assert open_source(iter([barcodes(2)])).info.kind == "iterable"


def test_blocks_of_a_zarr_array_begin_where_its_chunks_do():
    with ArrayFrames(as_zarr(barcodes()), start=3) as source:
        begins = [int(block.pts_T[0]) for block in source.blocks()]
    assert begins == [3, 15]


def test_blocks_of_other_arrays_are_bounded():
    with ArrayFrames(barcodes(40, 8, 8)) as source:
        assert max(len(block.pts_T) for block in source.blocks()) == 16


def test_nothing_is_taken_beyond_the_frames_asked_for():
    taken = []

    def pieces():
        for begin in range(0, COUNT, 4):
            taken.append(begin)
            yield barcodes()[begin : begin + 4]

    frames, _ = collect(IterableFrames(pieces(), frames=6))
    assert indices(frames) == list(range(6))
    assert taken == [0, 4]


def test_a_generator_may_reuse_its_buffer():
    def pieces():
        buffer = np.empty_like(barcodes(1))
        for frame in barcodes(6):
            buffer[0] = frame
            yield buffer

    assert indices(collect(IterableFrames(pieces()))[0]) == list(range(6))


def test_empty_pieces_are_passed_over():
    pieces = [barcodes(0 + 1)[:0], barcodes(2), barcodes(1)[:0], barcodes(3)]
    assert indices(collect(open_source(pieces))[0]) == [0, 1, 0, 1, 2]


def test_an_error_of_the_generator_comes_out_unchanged():
    def pieces():
        yield barcodes(2)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        collect(open_source(pieces()))


def test_closing_ends_the_generator():
    ended = []

    def pieces():
        try:
            yield barcodes(2)
            yield barcodes(2)
        finally:
            ended.append(True)

    source = open_source(pieces())
    source.close()
    source.close()
    assert ended == [True]


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 .* \(x \* 255\)"),
        (torch.zeros(2, 8, 8, 3), r"float32 .* \(x \* 255\)"),
        (np.zeros((2, 8, 8, 3), np.uint16), "uint16"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\).*channels"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"\(T, H, W, 3\)"),
        (np.zeros((8, 8, 3), np.uint8), r"\(T, H, W, 3\)"),
        (np.zeros((1, 2, 8, 8, 3), np.uint8), r"\(T, H, W, 3\)"),
        (np.zeros((2, 0, 8, 3), np.uint8), "pixel"),
    ],
)
def test_a_wrong_layout_is_refused(array, match):
    refused(array, "layout", match)


@pytest.mark.parametrize("piece", [np.zeros((8, 8), np.uint8), np.zeros((2, 8, 8, 3)), "frame", 3])
def test_a_wrong_piece_is_refused(piece):
    refused([piece], "layout", "piece 0")


def test_a_wrong_piece_is_named():
    refused([barcodes(2), barcodes(2).astype(float)], "layout", "piece 1")


def test_pieces_of_another_size_are_refused():
    refused([barcodes(2), barcodes(2, 64, 64)], "geometry-changed", "piece 1")


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_not_resized(kind):
    refused(kind(barcodes(2)), "layout", "beforehand", size=(8, 8))
    assert len(collect(open_source(kind(barcodes(2)), size=(48, 96)))[0]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_start_beyond_the_end(kind):
    refused(kind(barcodes(4)), "range", "4 frames", start=4)


@pytest.mark.parametrize("source", [barcodes(1)[:0], [], iter(()), [barcodes(1)[:0]]])
def test_no_frames(source):
    refused(source, "no-frames")


@pytest.mark.parametrize("options", [{"start": -1}, {"frames": 0}, {"frame_rate": Fraction(0)}])
def test_impossible_windows(options):
    refused(barcodes(4), "range", **options)
    refused([barcodes(4)], "range", **options)


@pytest.mark.parametrize("source", [None, 3, b"bytes", {"a": 1}, object()])
def test_anything_else_is_refused_with_a_list_of_what_is_accepted(source):
    refused(source, "layout", "numpy array")


def test_zarr_objects_that_are_not_arrays_are_refused_with_the_way_to_the_array():
    store = zarr.storage.MemoryStore()
    for source in (zarr.open_group(store), store):
        refused(source, "layout", rf'zarr {type(source).__name__} was given.*zarr.open_group\(store\)\["frames"\]')


@pytest.mark.parametrize("source", ["s3://bucket/a.mp4", Path("s3://bucket/a.mp4"), "https://example.org/a.mp4"])
def test_an_address_is_refused_as_it_was_given(source):
    refused(source, "refused", f"{source} is an address.*download it")


def test_blocks_may_be_called_once():
    for source in (open_source(barcodes(2)), open_source([barcodes(2)])):
        list(source.blocks())
        with pytest.raises(SourceError, match="already read"):
            source.blocks()


def test_reading_on_after_close_is_refused():
    for source in (open_source(barcodes(40)), open_source([barcodes(4), barcodes(4)])):
        blocks = source.blocks()
        next(blocks)
        source.close()
        with pytest.raises(SourceError, match="closed"):
            next(blocks)


def test_a_path_is_a_video_file(tmp_path):
    path = write_media(tmp_path / "clip.mp4")
    for name in (path, str(path)):
        frames, _ = collect(open_source(name, start=2, frames=3))
        assert indices(frames) == [2, 3, 4]
    refused(path, "layout", "time stamps", frame_rate=Fraction(24))
    refused(tmp_path, "not-video")
    refused(tmp_path / "none.mp4", "missing")


def test_the_path_of_a_zarr_that_longvid_did_not_write_is_refused_and_its_array_is_a_source(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("frames", data=barcodes(), chunks=(5, 48, 96, 3))
    refused(tmp_path / "a.zarr", "layout", "did not write.*zarr.open_array")
    refused(tmp_path / "a.zarr" / "frames", "layout", "did not write.*zarr.open_array")
    frames, pts = collect(open_source(zarr.open_array(tmp_path / "a.zarr" / "frames"), start=4))
    assert indices(frames) == pts.tolist() == list(range(4, COUNT))


def test_chunks_that_cannot_be_held_are_refused(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(6000, 1080, 1920, 3), chunks=(3000, 64, 64, 3), dtype="u1")
    with pytest.raises(SourceError, match=r"chunks of 3000 frames of 1920x1080, 17\.4 GiB each"):
        ArrayFrames(array)


@pytest.mark.parametrize("kind", [as_numpy, as_torch, as_zarr])
def test_an_array_is_known_by_every_frame_of_its_window(kind):
    def fingerprint(frames):
        return open_source(kind(frames), start=2, frames=COUNT - 4).fingerprint()

    frames = barcodes()
    known = fingerprint(frames)
    assert known == fingerprint(frames)
    for changed, same in ((1, True), (2, False), (COUNT // 2, False), (COUNT - 3, False), (COUNT - 2, True)):
        other = frames.copy()
        other[changed, -1, -1, -1] ^= 1
        assert (fingerprint(other) == known) is same, changed

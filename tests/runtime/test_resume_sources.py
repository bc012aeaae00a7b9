"""A run that is stopped and continued, from files whose time stamps come twice: the store of an undisturbed run, or an
error. And so it is where the saved seek points are damaged, of another file, or wrong."""

from __future__ import annotations

import errno
import hashlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.bad_media import H264, clip
from support.media import barcodes, join, write_media
from support.seeking import MAKERS, moving, spy

from longvid import Durability, VideoSession, load_model
from longvid.errors import StoreError
from longvid.media.decoding.seek_index import SeekIndex, SeekPoint
from longvid.store.format import PRIVATE

pytestmark = [
    pytest.mark.filterwarnings("ignore:the time stamps of .* do not continue"),
    pytest.mark.filterwarnings("ignore:.* does not store when its frames are shown"),
    pytest.mark.filterwarnings("ignore:.* packets of .* are left out, since the edit list"),
]

EAGER = Durability(mode="rename", publish_seconds=0)
CHUNK = 4
WARMUP = 6
"chunks of one latent, for tiny"
SOURCES = ["joined.webm", "joined.mkv", "joined.mp4", "joined.ts", "equal_stamps.mkv", "equal_stamps_intra.mkv",
           "equal_stamps_ffv1.mkv", "open_gop.ts", "packed.avi", "whole.gif"]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(autouse=True)
def _units_of_one_chunk(monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)


def encode(model, source, store, stop_after=None, **options):
    """The report, and the chunks that ran."""
    chunks = []

    def watch(event):
        chunks.append(event.index)
        if event.index == stop_after:
            session.stop()

    with VideoSession(model, device="cpu", chunk_frames=CHUNK, callbacks=[watch]) as session:
        return session.encode(source, store, durability=EAGER, **options), chunks


def contents(store):
    """The values of every array, and the digest of every data file."""
    arrays = {name: array[:] for name, array in zarr.open_group(store, mode="r").arrays()}
    files = {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in store.glob("*/c.*")}  # fmt: skip
    assert any(name.startswith("latents/") for name in files)
    return arrays, files


def assert_same(store, whole):
    (arrays, files), (expected, digests) = contents(store), whole
    assert arrays.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
    assert files == digests


@pytest.fixture(scope="module", params=SOURCES)
def source(request, model, tmp_path_factory):
    """A file, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("source")
    path = MAKERS[request.param](folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
        report, chunks = encode(model, path, folder / "whole.zarr")
    assert report.complete
    assert len(chunks) >= 20
    return path, contents(folder / "whole.zarr"), len(chunks)


def stopped_and_continued(model, source, stop_after, store):
    path, whole, num_chunks = source
    first, _ = encode(model, path, store, stop_after)
    assert not first.complete
    assert first.frames == 1 + CHUNK * (stop_after + 1)
    report, chunks = encode(model, path, store)
    assert report.complete
    assert report.resumed_from_frame == first.frames
    start = stop_after - WARMUP if stop_after > WARMUP else 0  # the last chunk that is stored is compared
    assert chunks == list(range(start, num_chunks))
    assert_same(store, whole)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.55, 0.8])
def test_stopped_and_continued_the_store_is_that_of_an_undisturbed_run(model, source, share, tmp_path):
    stopped_and_continued(model, source, int(share * source[2]), tmp_path / "a.zarr")


@pytest.mark.slow
def test_stopped_after_any_chunk_the_store_is_that_of_an_undisturbed_run(model, source, tmp_path):
    for stop_after in range(source[2] - 1):
        stopped_and_continued(model, source, stop_after, tmp_path / f"{stop_after}.zarr")


def test_a_recording_whose_clock_begins_again_is_concealed_alike(model, tmp_path):
    """Joined transport streams have a gap where they meet, which only another policy than stop accepts."""
    parts = [write_media(tmp_path / f"{n}.ts", moving(), options=H264) for n in range(2)]
    path = join(tmp_path / "a.ts", *parts)
    encode(model, path, tmp_path / "whole.zarr", on_error="conceal")
    encode(model, path, tmp_path / "a.zarr", 26, on_error="conceal")
    report, chunks = encode(model, path, tmp_path / "a.zarr", on_error="conceal")
    assert report.complete
    assert chunks[0] == 20
    assert_same(tmp_path / "a.zarr", contents(tmp_path / "whole.zarr"))


# ------------------------------------------------------------------------------------------- the file of seek points

SEEK = f"{PRIVATE}/seek"
RECORD = struct.calcsize("<qqqqq8s")


@pytest.fixture(scope="module")
def still(model, tmp_path_factory):
    """Two recordings of one still in a row: time stamps and pixels agree at every frame of both.

    Beside it an unfinished store, and what an undisturbed run makes of it.
    """
    folder = tmp_path_factory.mktemp("still")
    parts = [write_media(folder / f"{n}.mkv", np.repeat(barcodes(1), 80, axis=0), options=H264) for n in range(2)]
    path = join(folder / "a.mkv", *parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 1)
        encode(model, path, folder / "whole.zarr")
        encode(model, path, folder / "a.zarr", 30)
    return path, folder / "a.zarr", contents(folder / "whole.zarr")


def shifted(frames):
    def change(content, source):
        out = b""
        for at in range(0, len(content), RECORD):
            frame, *point, check = struct.unpack("<qqqqq8s", content[at : at + RECORD])
            out += struct.pack("<qqqqq8s", frame + frames, *point, check)
        return out

    return change


DAMAGES = {
    "none": lambda content, _: content,
    "missing": lambda content, _: None,
    "empty": lambda content, _: b"",
    "cut": lambda content, _: content[: len(content) // 2 + 5],
    "zeros": lambda content, _: bytes(len(content)),
    "random": lambda content, _: np.random.default_rng(0).bytes(len(content)),
    "one bit": lambda content, _: bytes([content[0] ^ 1]) + content[1:],
    "a bit of the last": lambda content, _: content[:-16] + bytes([content[-16] ^ 1]) + content[-15:],
    "a recording earlier": shifted(-80),
    "a recording later": shifted(80),
    "a frame later": shifted(1),
    "twice": lambda content, _: content + content,
}


class NoSpace(type(Path())):
    """A path at which nothing can be opened for writing."""

    def open(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_seek_points_never_change_the_store(model, still, tmp_path, damage):
    path, unfinished, whole = still
    store = tmp_path / "a.zarr"
    shutil.copytree(unfinished, store)
    content = DAMAGES[damage]((store / SEEK).read_bytes(), path)
    (store / SEEK).unlink()
    if content is not None:
        (store / SEEK).write_bytes(content)
    report, chunks = encode(model, path, store)
    assert report.complete
    assert chunks[0] == 24
    assert_same(store, whole)
    assert len((store / SEEK).read_bytes()) % RECORD == 0


def test_the_saved_points_are_used(model, still, tmp_path, monkeypatch):
    path, unfinished, whole = still
    for name, kept in (("with", True), ("without", False)):
        store = tmp_path / f"{name}.zarr"
        shutil.copytree(unfinished, store)
        if not kept:
            (store / SEEK).unlink()
        decoded = spy(monkeypatch)
        encode(model, path, store)
        assert (decoded.seeks[-1:] in ([True],)) == kept
        assert (len(decoded) < 100) == kept
        assert_same(store, whole)


def test_points_of_another_file_are_not_used(model, still, tmp_path):
    """Two raw recordings have their key frames at the same bytes and times; only the first frame differs in number."""
    path, unfinished, whole = still
    other = join(tmp_path / "b.mkv", *(write_media(tmp_path / f"{n}.mkv", np.repeat(barcodes(2)[1:], 80, axis=0),
                                                   options=H264) for n in range(2)))  # fmt: skip
    encode(model, other, tmp_path / "b.zarr", 30)
    store = tmp_path / "a.zarr"
    shutil.copytree(unfinished, store)
    shutil.copy(tmp_path / "b.zarr" / SEEK, store / SEEK)
    encode(model, path, store)
    assert_same(store, whole)


def test_a_wrong_number_with_a_right_digest_is_told_by_the_times(model, still, tmp_path):
    """The pixels of two equal recordings do not tell them apart; their times, which rise over both, do."""
    path, unfinished, _ = still
    store = tmp_path / "a.zarr"
    shutil.copytree(unfinished, store)
    moved = shifted(80)((store / SEEK).read_bytes(), path)
    records = [moved[at : at + RECORD - 8] + bytes(8) for at in range(0, len(moved), RECORD)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeekIndex, "_check", lambda self, record: bytes(8))
        (store / SEEK).write_bytes(b"".join(one for one in records if struct.unpack_from("<q", one)[0] < 160))
        with pytest.raises(StoreError, match="other frames or time stamps"):
            encode(model, path, store)


def test_a_disk_that_takes_no_seek_points_does_not_end_the_run(model, still, tmp_path, monkeypatch):
    path, unfinished, whole = still
    store = tmp_path / "a.zarr"
    shutil.copytree(unfinished, store)
    (store / SEEK).unlink()

    monkeypatch.setattr("longvid.store.writer.StoreWriter.seek_index", NoSpace(store / SEEK))
    report, _ = encode(model, path, store)
    assert report.complete
    assert not (store / SEEK).exists()
    assert_same(store, whole)


def test_saved_points_come_back_and_no_others(tmp_path):
    index, path = SeekIndex(), tmp_path / "seek"
    index.load(path, {"sha256": "a"})
    for frame in range(0, 100, 20):
        index.add(SeekPoint(frame, frame * 3, frame * 1000))
        index.save(path)
    again, other = SeekIndex(), SeekIndex()
    again.load(path, {"sha256": "a"})
    other.load(path, {"sha256": "b"})
    assert again.points == index.points
    assert other.points == []
    other.add(SeekPoint(7, 8, 9))
    other.save(path)
    last = SeekIndex()
    last.load(path, {"sha256": "b"})
    assert last.points == [SeekPoint(7, 8, 9)]


@pytest.mark.parametrize("start", [40, 63])
def test_a_window_from_the_middle_has_the_bits_of_one_that_is_read_from_the_start(model, tmp_path, start, monkeypatch):
    path = clip(tmp_path, "a.mp4", moving(120))
    decoded = spy(monkeypatch)
    encode(model, path, tmp_path / "a.zarr", start=start, frames=30)
    assert decoded.seeks == [True]
    monkeypatch.setattr("longvid.media.file_reader._WORTH_A_SEEK", 1000)
    encode(model, path, tmp_path / "b.zarr", start=start, frames=30)
    assert_same(tmp_path / "a.zarr", contents(tmp_path / "b.zarr"))

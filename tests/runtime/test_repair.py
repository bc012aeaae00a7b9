"""Repair does as little as the damage allows, from what is at hand, and the result is what was published."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.media import barcodes, write_media

import longvid as lv
from longvid import Durability, StoreError, VideoSession, load_model
from longvid.runtime.repair import repair
from longvid.store.format import PRIVATE, with_checksum
from longvid.store.lock import WriterLock
from longvid.store.verify import verify

HEIGHT, WIDTH, NUM_FRAMES, UNIT = 16, 24, 75, 3
SETTINGS = {"device": "cpu", "dtype": "float32", "layout": "contiguous", "paired_frames": "off", "chunk_frames": 8}
BARE = Durability(mode="rename", publish_seconds=0)
CHUNK = 8


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(5).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def session():
    with VideoSession(load_model("tiny"), **SETTINGS) as session:
        yield session


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: UNIT)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 5 * HEIGHT * WIDTH * 3)


def contents(store):
    return {str(p.relative_to(store)): p.read_bytes() for p in Path(store).rglob("*") if p.is_file()}


def damage(store, name):
    content = bytearray((store / name).read_bytes())
    content[len(content) // 2] ^= 4
    (store / name).write_bytes(content)


def made(session, video, folder, kind, **options):
    """A store of latents, or of the frames that they are decoded to, and what it was made from."""
    latents, store = folder / "latents.zarr", folder / f"{kind}.zarr"
    if kind == "latents":
        session.encode(video, store, durability=BARE, **options)
        return video, store
    session.encode(video, latents, durability=BARE)
    session.decode(latents, store, durability=BARE, **options)
    return latents, store


@pytest.mark.parametrize("kind", ["latents", "frames"])
def test_no_more_than_the_warmup_and_the_chunks_of_the_damage_is_computed(session, video, tmp_path, kind):
    video = np.concatenate([video] * 2)
    source, store = made(session, video, tmp_path, kind)
    warmup = lv.warmup(load_model("tiny"), "encode" if kind == "latents" else "decode", chunk_frames=CHUNK).chunks
    whole, computed = contents(store), []
    for unit in range(verify(store).num_units):
        damage(store, f"{kind}/c.{unit}.0.0.0")
        ((start, stop),) = verify(store).frame_ranges
        report = repair(session, store, source=source)
        assert report.ok
        assert contents(store) == whole
        chunks = (stop - 2) // CHUNK - max(0, start - 1) // CHUNK + 1
        assert report.frames_computed <= (warmup + chunks) * CHUNK + 1
        computed.append(report.frames_computed)
    assert max(computed) < len(video) / 2
    assert len(computed) > 6


@pytest.mark.parametrize("kind", ["latents", "frames"])
def test_damage_that_lies_far_apart_is_computed_apart(session, video, tmp_path, kind):
    video = np.concatenate([video] * 4)
    source, store = made(session, video, tmp_path, kind)
    whole, last = contents(store), verify(store).num_units - 1
    for unit in (0, 2, last // 2, last):
        (store / kind / f"c.{unit}.0.0.0").unlink()
    report = repair(session, store, source=source)
    assert report.ok
    assert contents(store) == whole
    assert report.frames_computed < len(video) / 2


@pytest.mark.parametrize("kind", ["latents", "frames"])
def test_a_part_is_repaired_too(session, video, tmp_path, kind):
    source, _ = made(session, np.concatenate([video] * 4), tmp_path, kind, part=(2, 3))
    part = tmp_path / f"{kind}.zarr.part-2-of-3"
    whole, last = contents(part), verify(part).num_units - 1
    for unit in (0, last // 2, last):
        damage(part, f"{kind}/c.{unit}.0.0.0")
    (part / "frame_pts" / "c.0").unlink()
    report = repair(session, part, source=source)
    assert report.ok
    assert contents(part) == whole


@pytest.mark.parametrize("representation", ["mode", "sample", "moments"])
def test_several_units_at_once_of_every_representation(session, video, tmp_path, representation):
    store = tmp_path / "a.zarr"
    session.encode(video, store, durability=BARE, representation=representation, seed=3, store_dtype="float32")
    whole = contents(store)
    chunks = sorted(name for name in whole if name.startswith(("latents/c.", "moments/c.")))
    for name in chunks[1::3]:
        (store / name).unlink()
    report = repair(session, store, source=video)
    assert report.ok
    assert set(chunks[1::3]) <= set(report.restored)
    assert contents(store) == whole


def test_nothing_is_computed_for_metadata_digests_and_coordinates(session, video, tmp_path, monkeypatch):
    latents, frames = tmp_path / "latents.zarr", tmp_path / "frames.zarr"
    session.encode(video, latents, durability=BARE)
    session.decode(latents, frames, durability=BARE)
    monkeypatch.setattr("longvid.runtime.repair.encode_video", None)
    monkeypatch.setattr("longvid.runtime.repair.decode_video", None)
    for store in (latents, frames):
        whole = contents(store)
        small = [name for name in whole if not name.startswith(("latents/c.", "frames/c."))]
        for name in small:
            (store / name).unlink()
            report = repair(session, store, source=video if store == latents else None)
            assert (report.ok, report.frames_computed, contents(store) == whole) == (True, 0, True), name
        assert len(small) > 9


def test_the_source_is_found_where_the_store_says(session, tmp_path):
    media = write_media(tmp_path / "a.mp4", barcodes(24))
    session.encode(media, tmp_path / "a.zarr", durability=BARE, start=3, frames=19)
    session.decode(tmp_path / "a.zarr", tmp_path / "f.zarr", durability=BARE, start=2, frames=15)
    for name, chunk in {"a.zarr": "latents/c.1.0.0.0", "f.zarr": "frames/c.1.0.0.0"}.items():
        whole = contents(tmp_path / name)
        damage(tmp_path / name, chunk)
        assert repair(session, tmp_path / name).ok
        assert contents(tmp_path / name) == whole
    damage(tmp_path / "a.zarr", "latents/c.1.0.0.0")
    media.write_bytes(media.read_bytes()[:-1] + b"x")
    before = contents(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=r"source\.") as caught:
        repair(session, tmp_path / "a.zarr")
    assert caught.value.kind == "mismatch"
    assert contents(tmp_path / "a.zarr") == before


@pytest.mark.parametrize("kind", ["latents", "frames"])
def test_another_source_or_other_weights_change_nothing(session, video, tmp_path, kind):
    latents, other, store = tmp_path / "latents.zarr", tmp_path / "other.zarr", tmp_path / f"{kind}.zarr"
    session.encode(video, latents, durability=BARE)
    session.encode(video[::-1].copy(), other, durability=BARE)
    if kind == "frames":
        session.decode(latents, store, durability=BARE)
    damage(store, f"{kind}/c.1.0.0.0")
    before = contents(store)
    right, wrong = (video, video[:-1]) if kind == "latents" else (latents, other)
    changed = load_model("tiny")
    next(changed.decoder.parameters()).data.view(-1)[0] += 1e-3
    with VideoSession(changed, **SETTINGS) as another:
        for using, source, name in ((session, wrong, r"source\.|latents\."), (another, right, r"model\.weights")):
            with pytest.raises(StoreError, match=name) as caught:
                repair(using, store, source=source)
            assert caught.value.kind == "mismatch"
            assert contents(store) == before
    if kind == "latents":
        with pytest.raises(StoreError, match="pass it with source="):
            repair(session, store)
    assert repair(session, store, source=right).ok


def test_an_iterable_that_gives_other_frames_after_the_first_changes_nothing(session, video, tmp_path):
    """Its fingerprint cannot speak of what it has not given yet; the digests do."""
    store, other = tmp_path / "a.zarr", video.copy()
    other[5] ^= 1
    session.encode(iter(np.split(video, 5)), store, durability=BARE)
    whole = contents(store)
    damage(store, "latents/c.1.0.0.0")
    before = contents(store)
    with pytest.raises(StoreError, match="differ from those that were committed"):
        repair(session, store, source=iter(np.split(other, 5)))
    assert contents(store) == before
    assert repair(session, store, source=iter(np.split(video, 5))).ok
    assert contents(store) == whole


def test_a_whole_store_and_one_that_is_being_written_are_left_alone(session, video, tmp_path):
    store = tmp_path / "a.zarr"
    session.encode(video, store, durability=BARE)
    whole = contents(store)
    report = repair(session, store)
    assert (report.ok, report.restored, report.frames_computed) == (True, (), 0)
    assert contents(store) == whole
    damage(store, "latents/c.0.0.0.0")
    lock = WriterLock.acquire(store / PRIVATE / "lock")
    try:
        with pytest.raises(StoreError) as caught:
            repair(session, store, source=video)
        assert caught.value.kind == "locked"
    finally:
        lock.release()
    report = repair(session, store, source=video)
    assert report.to_dict()["restored"] == ["latents/c.0.0.0.0"]
    assert report.explain().startswith(f"restored 1 pieces, {report.frames_computed} frames were computed again\n")
    assert contents(store) == whole


def test_an_older_root_is_replaced_by_its_copy_and_a_disputed_one_is_not(session, video, tmp_path):
    def keep(event):
        if event.index == 6:
            older.append((tmp_path / "a.zarr" / "zarr.json").read_bytes())

    older = []
    with VideoSession(load_model("tiny"), **SETTINGS, callbacks=[keep]) as keeping:
        keeping.encode(video, tmp_path / "a.zarr", durability=BARE)
    store, whole = tmp_path / "a.zarr", contents(tmp_path / "a.zarr")
    (store / "zarr.json").write_bytes(older[0])
    report = repair(session, store)
    assert (report.ok, report.restored, report.frames_computed) == (True, ("zarr.json",), 0)
    assert contents(store) == whole
    root = json.loads(whole["zarr.json"])
    root["attributes"]["longvid"]["created_by"] = "somebody"
    (store / "zarr.json").write_bytes(with_checksum(root))
    before = contents(store)
    with pytest.raises(StoreError, match="contradict each other") as caught:
        repair(session, store, source=video)
    assert caught.value.kind == "corrupt"
    assert contents(store) == before

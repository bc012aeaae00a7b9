"""Parts: a video that several runs computed and that was joined is the store of one run, file by file."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import longvid as lv
from longvid import Durability, ModelError, StoreError, VideoSession, open_store
from longvid.cli.commands import main
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.kernels.cpu import compute_threads
from longvid.runtime import encode as encode_module
from longvid.runtime.admission import AdmissionControl
from longvid.store.verify import verify

CHUNKS = 100
COUNTS = [2, 3, 5, 7]


def data_files(store):
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in store.rglob("c.*")}


def part_of(store, number, of):
    return store.with_name(f"{store.name}.part-{number}-of-{of}")


class Video:
    """A model, 100 chunks of frames that do not fill the last one, and the stores of one run in each direction."""

    def __init__(self, model, frames, folder, **settings):
        self.model, self.frames, self.latents, self.decoded = model, frames, folder / "a.zarr", folder / "f.zarr"
        self.settings = settings
        with VideoSession(model, device="cpu", **settings) as session:
            session.encode(frames, self.latents)
            session.decode(self.latents, self.decoded)

    def run(self, direction, store, part, **settings):
        source = self.frames if direction == "encode" else self.latents
        with VideoSession(self.model, device="cpu", **self.settings, **settings) as session:
            return getattr(session, direction)(source, store, part=part)

    def whole(self, direction):
        return self.latents if direction == "encode" else self.decoded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (16 * CHUNKS - 3, 16, 24, 3), dtype=np.uint8)
    return Video("tiny", frames, tmp_path_factory.mktemp("tiny"))


def deep_video(num_chunks, folder):
    """CogVideoX with all its layers, which are narrow."""
    torch.manual_seed(1)
    model = CogVideoXVAE(CogVideoXConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2)).eval()
    frames = np.random.default_rng(2).integers(0, 256, (8 * num_chunks - 3, 8, 8, 3), dtype=np.uint8)
    return Video(model, frames, folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return deep_video(CHUNKS, tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """Long enough for the warm-up of a decode, 38 chunks, to begin in the middle of the second of two parts."""
    return deep_video(88, tmp_path_factory.mktemp("shorter"))


@pytest.fixture(scope="module", params=["wan2.1-nano", "wan2.2-nano"])
def wan(request, tmp_path_factory):
    """Chunks of 32 frames, of which the warm-up of an encode takes 3 and that of a decode 4, and 12 of them."""
    frames = np.random.default_rng(2).integers(0, 256, (32 * 12 - 3, 16, 16, 3), dtype=np.uint8)
    model = lv.load_model(request.param, random_weights=1)
    return Video(model, frames, tmp_path_factory.mktemp("wan"), chunk_frames=32)


def joins(video, direction, count, folder):
    folder.mkdir(exist_ok=True)
    store = folder / "joined.zarr"
    for number in range(count, 0, -1):
        assert video.run(direction, store, (number, count)).complete
        assert verify(part_of(store, number, count)).ok
    lv.join(store)
    assert verify(store).ok
    assert data_files(store) == data_files(video.whole(direction))
    with VideoSession(
        video.model, device="cpu", **video.settings
    ) as session:  # the run that makes it as a whole has nothing left to do
        source = video.frames if direction == "encode" else video.latents
        assert getattr(session, direction)(source, store).resumed_from_frame == len(video.frames)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("count", COUNTS)
def test_tiny_in_parts_is_the_store_of_one_run(tiny, tmp_path, direction, count):
    joins(tiny, direction, count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("count", COUNTS)
def test_a_deep_model_in_parts_is_the_store_of_one_run(deep, tmp_path, direction, count):
    joins(deep, direction, count, tmp_path)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_wan_in_two_parts_is_the_store_of_one_run(wan, tmp_path, direction):
    joins(wan, direction, 2, tmp_path)


def test_both_directions_of_a_deep_model_in_two_parts(shorter, tmp_path):
    for direction in ("encode", "decode"):
        joins(shorter, direction, 2, tmp_path / direction)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(
    ("model", "count"), [("tiny", 3), *(pytest.param("deep", count, marks=pytest.mark.slow) for count in COUNTS)]
)
def test_negative_control_half_a_warmup_is_noticed(request, tmp_path, model, direction, count, monkeypatch):
    video = request.getfixturevalue(model)
    real = AdmissionControl.warmup

    def half(self, direction, schedule):
        found = real(self, direction, schedule)
        return replace(found, chunks=found.chunks // 2)

    monkeypatch.setattr(AdmissionControl, "warmup", half)
    store = tmp_path / "joined.zarr"
    for number in range(1, count + 1):
        video.run(direction, store, (number, count))
    with pytest.raises(StoreError, match="differ in the chunk that both have") as caught:
        lv.join(store)
    assert caught.value.kind == "mismatch"
    assert not store.exists()


def test_a_window_of_a_store_in_parts(tiny, tmp_path):
    with VideoSession("tiny", device="cpu") as session:
        window = {"start": 37, "frames": 500}
        session.decode(tiny.latents, tmp_path / "whole.zarr", **window)
        for number in (1, 2, 3):
            session.decode(tiny.latents, tmp_path / "f.zarr", part=(number, 3), **window)
        lv.join(tmp_path / "f.zarr")
        assert data_files(tmp_path / "f.zarr") == data_files(tmp_path / "whole.zarr")
        report = session.decode(tiny.latents, tmp_path / "f.zarr", **window)
    assert report.resumed_from_frame == 500


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_part_that_was_stopped_is_resumed(tiny, tmp_path, direction, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 3)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 5 * 16 * 24 * 3)
    source = tiny.frames[:800] if direction == "encode" else tmp_path / "latents.zarr"
    store, whole = tmp_path / "joined.zarr", tmp_path / "whole.zarr"
    with VideoSession("tiny", device="cpu") as session:
        session.encode(tiny.frames[:800], tmp_path / "latents.zarr")
        getattr(session, direction)(source, whole)
        getattr(session, direction)(source, store, part=(1, 2))

    def stop(event):
        if event.index == 35:
            stopping.stop()

    eager = Durability(publish_seconds=0)
    with VideoSession("tiny", device="cpu", callbacks=[stop]) as stopping:
        run = getattr(stopping, direction)
        assert not run(source, store, part=(2, 2), durability=eager).complete
    with pytest.raises(StoreError, match="is not finished") as caught:
        lv.join(store)
    assert caught.value.kind == "incomplete"
    with VideoSession("tiny", device="cpu") as session:
        report = getattr(session, direction)(source, store, part=(2, 2))
    assert report.resumed_from_frame > 50
    assert report.complete
    lv.join(store)
    assert data_files(store) == data_files(whole)


def test_parts_of_another_number_of_threads_are_refused(tiny, tmp_path):
    store = tmp_path / "a.zarr"
    for number in (1, 2):
        with compute_threads(number), VideoSession("tiny", device="cpu") as session:
            session.encode(tiny.frames[:200], store, part=(number, 2))
    with pytest.raises(StoreError, match=r"part-2-of-2 is of another run than .*compute\.threads is"):
        lv.join(store)


def test_parts_that_are_missing_or_foreign_are_named(tiny, tmp_path):
    store = tmp_path / "a.zarr"
    with pytest.raises(StoreError, match="parts that are there: none") as caught:
        lv.join(store)
    assert caught.value.kind == "missing"
    tiny.run("encode", store, (2, 4))
    with pytest.raises(
        StoreError, match=r"a\.zarr\.part-1-of-4, a\.zarr\.part-3-of-4, a\.zarr\.part-4-of-4; make them"
    ):
        lv.join(store)
    with VideoSession("tiny", device="cpu") as session:
        session.encode(tiny.frames, store, part=(1, 2))
        with pytest.raises(StoreError, match="1 of 2, 1 of 4"):
            lv.join(store)
        session.encode(tiny.frames[::-1], store, part=(2, 2))
    for path in tmp_path.glob("*.part-2-of-4"):
        path.rename(tmp_path / "elsewhere")
    with pytest.raises(
        StoreError, match=r"part-2-of-2 is of another run than a\.zarr\.part-1-of-2: source\.content is"
    ):
        lv.join(store)
    assert not store.exists()


def test_a_store_that_is_there_is_not_replaced_unless_asked(tiny, tmp_path):
    store = tmp_path / "a.zarr"
    for number in (1, 2):
        tiny.run("encode", store, (number, 2))
    lv.join(store)
    with pytest.raises(StoreError, match="is a complete store of this run") as caught:
        lv.join(store)
    assert caught.value.kind == "exists"
    with VideoSession("tiny", device="cpu") as session:
        session.encode(tiny.frames[:9], store, overwrite=True)
    with pytest.raises(StoreError, match=r"made by another run.*--overwrite"):
        lv.join(store)
    lv.join(store, overwrite=True)
    assert data_files(store) == data_files(tiny.latents)


def test_a_part_cannot_be_decoded_and_says_what_to_do(tiny, tmp_path):
    tiny.run("encode", tmp_path / "a.zarr", (2, 2))
    part = part_of(tmp_path / "a.zarr", 2, 2)
    assert open_store(part).num_frames < len(tiny.frames)
    with (
        VideoSession("tiny", device="cpu") as session,
        pytest.raises(StoreError, match=r"is part 2 of 2 .* join the parts"),
    ):
        session.decode(part, lambda _: None)


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, CHUNKS + 1)])
def test_parts_that_there_cannot_be_are_refused(tiny, tmp_path, part):
    with pytest.raises(lv.ScheduleError, match=f"part {part[0]}/{part[1]} was asked for"):
        tiny.run("encode", tmp_path / "a.zarr", part)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_parts_says_why(tiny, tmp_path, monkeypatch):
    with VideoSession("tiny", device="cpu") as session:
        with pytest.raises(lv.SourceError, match="length of the list_iterator is not known"):
            session.encode(iter([tiny.frames]), tmp_path / "a.zarr", part=(1, 2))
        with pytest.raises(StoreError, match="nothing joins video files"):
            session.decode(tiny.latents, tmp_path / "a.mp4", part=(1, 2))

        def never(self, direction, schedule):
            raise ModelError("it never forgets")

        monkeypatch.setattr(AdmissionControl, "warmup", never)
        for direction, source in (("encode", tiny.frames), ("decode", tiny.latents)):
            with pytest.raises(ModelError, match="never forgets"):
                getattr(session, direction)(source, tmp_path / "a.zarr", part=(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_frames_that_were_quarantined_within_the_warmup_of_a_part_are_noticed(tiny, tmp_path, monkeypatch):
    """The warm-up cannot know that a chunk before it was replaced. The chunk that both parts have tells."""
    store, replaced = tmp_path / "a.zarr", frozenset({CHUNKS // 2 - 1})
    tiny.run("encode", store, (2, 2))
    real = encode_module.frame_chunks
    with monkeypatch.context() as patch:
        given = {"replaced": replaced}
        patch.setattr(encode_module, "frame_chunks", lambda *args, **options: real(*args, **(options | given)))
        tiny.run("encode", store, (1, 2))
    with pytest.raises(StoreError, match="quarantine"):
        lv.join(store)


def test_the_command_line(tiny, tmp_path, capsys):
    source, store = tiny.decoded, tmp_path / "a.zarr"
    for number in (1, 2, 3):
        assert main(["encode", str(source), str(store), "--part", f"{number}/3", "--quiet"]) == 0
    assert main(["info", str(part_of(store, 2, 3)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["frames"] > 500
    assert (facts["part"]["number"], facts["part"]["of"]) == (2, 3)
    assert main(["join", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"frames": len(tiny.frames), "complete": True}
    assert main(["join", str(store)]) == 4
    with pytest.raises(SystemExit, match="2"):
        main(["encode", str(source), str(store), "--part", "4/3"])
    assert "'4/3' is not a part" in capsys.readouterr().err

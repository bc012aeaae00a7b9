"""The chunk plan of diffusers: its latents at every length, and all that works with the online plan works with it."""

import logging

import numpy as np
import pytest
import torch
from support.bad_media import damaged
from support.media import write_media
from support.stores import xr_open

import longvid as lv
from longvid import Durability, ScheduleError, SourceError, VideoSession, open_store
from longvid.cli.commands import main
from longvid.runtime.repair import repair
from longvid.store.reader import open_frames
from longvid.store.verify import verify

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)

SETTINGS = {"device": "cpu", "dtype": "float32", "layout": "contiguous", "paired_frames": "off"}
BARE = Durability(mode="rename", publish_seconds=0)
PLAN = {"chunk_plan": "reference", "store_dtype": "float32", "durability": BARE}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(3)
    config = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.AutoencoderKLCogVideoX(**config).eval()


@pytest.fixture(scope="module")
def session(theirs):
    with VideoSession(theirs, **SETTINGS) as session:
        yield session


def video(num_frames):
    return np.random.default_rng(num_frames).integers(0, 256, (num_frames, 16, 24, 3), dtype=np.uint8)


def frames_of(session, store, **options):
    found = []
    session.decode(store, found.append, **options)
    return np.concatenate(found)


def contents(store):
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("c.*")}


@pytest.mark.parametrize("num_frames", [1, 2, 5, 7, 8, 9, 10, 12, 13, 15, 16, 21, 26, 31])
@pytest.mark.filterwarnings("ignore:frames 0 to")
def test_latents_and_frames_are_those_of_diffusers(theirs, session, tmp_path, num_frames):
    frames = video(num_frames)
    session.encode(frames, tmp_path / "a.zarr", **PLAN)
    store = open_store(tmp_path / "a.zarr")
    x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mode()
        expected = (theirs.decode(z).sample + 1) * 127.5
    assert (store.num_latents, store.num_frames) == (z.shape[2], num_frames) == (-(-num_frames // 4), num_frames)
    assert store.latents_valid.all()
    assert np.abs(store.read(0, store.num_latents) - z[0].movedim(0, 1).numpy()).max() <= 1e-5
    assert verify(store.path).ok
    expected = expected[0].movedim(0, -1).round().clamp(0, 255).numpy()[-num_frames:]
    got = frames_of(session, store)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1


def test_the_online_plan_gives_other_latents(session, tmp_path):
    """Negative control: 13 frames are 5 latents there, the last of which stands for no frame."""
    session.encode(video(13), tmp_path / "a.zarr", store_dtype="float32")
    session.encode(video(13), tmp_path / "b.zarr", **PLAN)
    online, reference = (open_store(tmp_path / name) for name in ("a.zarr", "b.zarr"))
    assert (online.num_latents, online.latents_valid.tolist()) == (5, [True] * 4 + [False])
    assert np.abs(online.read(0, 4) - reference.read(0, 4)).max() > 1e-3


def test_frames_that_diffusers_does_not_give_back_are_left_out_with_a_warning(session, tmp_path):
    session.encode(video(12), tmp_path / "a.zarr", **PLAN)
    store = open_store(tmp_path / "a.zarr")
    with pytest.warns(UserWarning, match="frames 0 to 2 are left out: .* all but the first 3"):
        session.decode(store, tmp_path / "f.zarr")
    assert np.array_equal(xr_open(tmp_path / "f.zarr")["frame_pts"], store.frame_pts[3:])
    assert np.array_equal(open_frames(tmp_path / "f.zarr")[:], frames_of(session, store, start=3))
    with pytest.raises(ScheduleError, match="frames 0 to 1 do not come out"):
        frames_of(session, store, frames=2)


@pytest.mark.parametrize("num_frames", [45, 44])
def test_a_decode_from_the_middle(session, tmp_path, num_frames):
    session.encode(video(num_frames), tmp_path / "a.zarr", **PLAN)
    missing = 3 if num_frames == 44 else 0
    whole = frames_of(session, tmp_path / "a.zarr", start=missing)
    assert len(whole) == num_frames - missing
    for start in (missing, 5, 12, 13, 21, num_frames - 1):
        some = frames_of(session, tmp_path / "a.zarr", start=start, frames=9)
        assert np.array_equal(some, whole[start - missing :][:9])


class StopAfter:
    def __init__(self, chunk):
        self.chunk, self.session = chunk, None

    def __call__(self, event):
        if event.index == self.chunk:
            self.session.stop()


@pytest.mark.parametrize("num_frames", [29, 26])
def test_a_run_stopped_after_any_chunk_is_continued(theirs, session, tmp_path, num_frames):
    frames = video(num_frames)
    session.encode(frames, tmp_path / "whole.zarr", **PLAN)
    session.decode(tmp_path / "whole.zarr", tmp_path / "whole-f.zarr", start=1, durability=BARE)
    for chunk in range(3):
        stop = StopAfter(chunk)
        with VideoSession(theirs, **SETTINGS, callbacks=[stop]) as stopped:
            stop.session = stopped
            latents, decoded = tmp_path / f"{chunk}.zarr", tmp_path / f"{chunk}-f.zarr"
            assert not stopped.encode(frames, latents, **PLAN).complete or chunk == 2
            assert not stopped.decode(tmp_path / "whole.zarr", decoded, start=1, durability=BARE).complete or chunk == 2
        session.encode(frames, latents, **PLAN)
        session.decode(tmp_path / "whole.zarr", decoded, start=1, durability=BARE)
        assert contents(latents) == contents(tmp_path / "whole.zarr")
        assert contents(decoded) == contents(tmp_path / "whole-f.zarr")


def test_parts_and_repair(session, tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 3)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 5 * 16 * 24 * 3)
    frames, whole = video(45), tmp_path / "whole.zarr"
    session.encode(frames, whole, **PLAN)
    session.decode(whole, tmp_path / "whole-f.zarr", durability=BARE)
    for number in (1, 2):
        session.encode(frames, tmp_path / "a.zarr", **PLAN, part=(number, 2))
        session.decode(whole, tmp_path / "f.zarr", part=(number, 2), durability=BARE)
    for name, complete in (("a.zarr", whole), ("f.zarr", tmp_path / "whole-f.zarr")):
        joined = lv.join(tmp_path / name)
        assert contents(joined) == contents(complete)
        assert verify(joined).ok
        for data in ("latents", "frames"):
            for file in sorted((joined / data).glob("c.*")):
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 4
                file.write_bytes(content)
                assert repair(session, joined, source=frames if name == "a.zarr" else whole).ok
                assert contents(joined) == contents(complete)
        (joined / "frame_pts" / "c.0").unlink()
        assert repair(session, joined, source=frames if name == "a.zarr" else whole).ok


def test_replaced_frames_are_still_replaced_when_a_run_is_continued(theirs, tmp_path):
    """The chunks that hold no good frame are found again from the marks, whatever the first chunk is."""
    from longvid.runtime.encode import _replaced_before
    from longvid.schedule import ChunkSchedule

    plan = ChunkSchedule().reference(13 + 16)
    valid = np.ones(29, np.bool_)
    valid[13:21] = False
    origin = plan.full(0)
    assert _replaced_before(plan, origin, valid) == {1}
    assert _replaced_before(plan, origin, valid[:20]) == frozenset()
    assert _replaced_before(plan, origin, valid[:5]) == frozenset()
    assert _replaced_before(plan, plan.full(1), valid[13:]) == {1}
    assert _replaced_before(ChunkSchedule(), ChunkSchedule().full(0), valid[4:]) == {1}


def test_a_source_without_a_length_is_refused(session, tmp_path):
    with pytest.raises(SourceError, match=r"the length of .* the reference plan needs it"):
        session.encode(iter([video(13)]), tmp_path / "a.zarr", **PLAN)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("number", [14, 3])
@pytest.mark.filterwarnings("ignore:frame .* is damaged")
def test_a_file_shorter_than_its_header_says(session, tmp_path, number):
    path = damaged("mkv", number)(tmp_path)
    options = {**PLAN, "on_error": "keep", "size": (16, 32)}
    with pytest.raises(ScheduleError, match=r"frames, and its header or packets tell of .*--frames"):
        session.encode(path, tmp_path / "a.zarr", **options)
    session.encode(path, tmp_path / "b.zarr", **{**options, "chunk_plan": "online"})
    length = open_store(tmp_path / "b.zarr").num_frames
    session.encode(path, tmp_path / "c.zarr", **options, frames=length)
    assert open_store(tmp_path / "c.zarr").num_frames == length


def test_another_plan_is_another_run(session, tmp_path):
    session.encode(video(13), tmp_path / "a.zarr", **PLAN)
    with pytest.raises(lv.StoreError, match="chunk_plan"):
        session.encode(video(13), tmp_path / "a.zarr", store_dtype="float32")
    with pytest.raises(ScheduleError, match="chunk_plan 'remainder' is not known"):
        session.encode(video(13), tmp_path / "b.zarr", chunk_plan="remainder")


def test_a_model_whose_cut_is_free_has_one_plan(tmp_path):
    with VideoSession("tiny", device="cpu") as session:
        session.encode(video(14), tmp_path / "a.zarr")
        session.encode(video(14), tmp_path / "b.zarr", chunk_plan="reference")
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def test_a_model_that_is_not_of_diffusers_is_refused(tmp_path):
    from dataclasses import replace

    model = lv.load_model("cogvideox-nano", random_weights=0)
    model.geometry = replace(model.geometry, has_reference_plan=False)
    with VideoSession(model, device="cpu") as session, pytest.raises(ScheduleError, match="this model has none"):
        session.encode(video(14), tmp_path / "a.zarr", chunk_plan="reference")


def test_the_command_line(tmp_path, capsys):
    write_media(tmp_path / "a.mkv", video(13))
    arguments = ["--model", "cogvideox-nano", "--random-weights", "0", "--device", "cpu", "--chunk-plan", "reference"]
    assert main(["encode", str(tmp_path / "a.mkv"), str(tmp_path / "a.zarr"), *arguments, "--quiet"]) == 0
    assert main(["info", str(tmp_path / "a.zarr")]) == 0
    assert (
        "plan      reference: chunks of 13, 8, 8, ... frames, nothing padded, as diffusers" in capsys.readouterr().out
    )
    assert main(["plan", "--model", "cogvideox-nano", "--size", "24x16"]) == 0
    assert "chunks of 9, 8, 8, ... frames" in capsys.readouterr().out


def test_the_plan_counts_the_first_chunk_to_the_byte(session, tmp_path):
    """A first chunk of 15 frames takes more than one of 9, and the plan says so."""
    peaks = {}
    for num_frames in (17, 23):
        report = session.encode(video(num_frames), tmp_path / f"{num_frames}.zarr", **PLAN)
        assert report.peak_device_bytes == report.projected_bytes
        peaks[num_frames] = report.projected_bytes
    assert peaks[23] > peaks[17]

"""Every resume is a proof: what is stored is reproduced before anything is added, or nothing is written."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from longvid import Durability, ModelError, StoreError, VideoSession, load_model, open_store
from longvid.models.kernels.cpu import compute_threads
from longvid.runtime import encode as encode_module
from longvid.runtime.admission import AdmissionControl
from longvid.runtime.run import EncodeRun
from longvid.store.verify import verify

CHUNKS, UNIT, WARMUP, STOP_AFTER = 130, 5, 6, 60
"tiny runs in chunks of one latent, its commit units have five, and its warm-up has six chunks"
ROWS = STOP_AFTER // UNIT * UNIT
"that are committed when a run is stopped after chunk 60, with two latents in chunk 0"
FRAMES = 1 + 4 * (ROWS - 1)
SETTINGS = {"device": "cpu", "chunk_frames": 4}


@pytest.fixture(autouse=True)
def _units(monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: UNIT)


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(6).integers(0, 256, (4 * CHUNKS, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def undisturbed(video, tmp_path_factory):
    """The latents of one run."""
    path = tmp_path_factory.mktemp("undisturbed") / "a.zarr"
    with VideoSession("tiny", **SETTINGS) as session:
        session.encode(video, path)
    return latents(path)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "a.zarr"


def stopped(source, store, **settings):
    def stop(event):
        if event.index == STOP_AFTER:
            session.stop()

    with VideoSession("tiny", callbacks=[stop], **SETTINGS, **settings) as session:
        assert not session.encode(source, store, durability=Durability(publish_seconds=0)).complete
    assert open_store(store).num_latents == ROWS


def resumed(source, store, *, resume="exact"):
    """The report of a run that is continued, and the chunks that ran."""
    events = []
    with VideoSession("tiny", callbacks=[events.append], **SETTINGS) as session:
        return session.encode(source, store, resume=resume), [event.index for event in events]


def latents(store):
    return zarr.open_group(store, mode="r")["latents"][:]


def digests(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def other_values(patch):
    """The encoder computes other values, as a processor would that adds in another order."""
    real = EncodeRun.moments
    patch.setattr(EncodeRun, "moments", lambda self, frames: real(self, frames) * (1 + 1e-3))


def test_a_run_computes_its_warmup_its_proof_and_what_is_missing(video, undisturbed, store):
    stopped(video, store)
    report, chunks = resumed(video, store)
    assert (report.complete, report.resumed_from_frame) == (True, FRAMES)
    missing = ROWS - 1
    assert chunks == list(range(missing - 1 - WARMUP, CHUNKS))
    assert report.frames_computed == 4 * len(chunks) - 1  # the last chunk is short
    assert np.array_equal(latents(store), undisturbed)
    assert open_store(store).attrs["longvid"]["warmup_chunks"] == WARMUP


def test_no_file_of_contexts_is_on_the_disk(video, store):
    names = set()

    def look(event):
        names.update(p.relative_to(store) for p in store.rglob("*") if p.is_file())
        if event.index == STOP_AFTER:
            session.stop()

    for _ in range(2):
        with VideoSession("tiny", callbacks=[look], **SETTINGS) as session:
            session.encode(video, store)
    private = {path.name for path in names if path.parts[:2] == ("digest", ".longvid")}
    assert "root.json" in private
    assert private <= {"lock", "root.json", ".root.json.partial"}


def test_a_run_that_computes_other_values_writes_nothing(video, undisturbed, store, monkeypatch):
    stopped(video, store)
    before = digests(store)
    with monkeypatch.context() as patch:
        other_values(patch)
        with pytest.raises(
            StoreError, match=r"differ from those that are stored: .*nothing that is recorded"
        ) as caught:
            resumed(video, store)
    assert caught.value.kind == "mismatch"
    assert digests(store) == before
    assert resumed(video, store)[0].complete
    assert np.array_equal(latents(store), undisturbed)


def test_close_accepts_other_values_and_records_the_seam(video, undisturbed, store, monkeypatch):
    stopped(video, store)
    with monkeypatch.context() as patch:
        other_values(patch)
        assert resumed(video, store, resume="close")[0].complete
    found = verify(store)
    assert found.ok
    assert [(seam.frame, seam.before, seam.after) for seam in found.seams] == [(FRAMES, {}, {})]
    assert f"other values from frame {FRAMES} on" in found.explain()
    assert np.array_equal(latents(store)[:ROWS], undisturbed[:ROWS])
    assert not np.array_equal(latents(store)[ROWS:], undisturbed[ROWS:])


def test_close_without_a_difference_records_none(video, undisturbed, store):
    stopped(video, store)
    assert resumed(video, store, resume="close")[0].complete
    assert verify(store).seams == ()
    assert np.array_equal(latents(store), undisturbed)


def test_other_libraries_are_refused_by_name_and_close_records_them(video, store, monkeypatch):
    stopped(video, store)
    before = digests(store)
    monkeypatch.setattr("longvid.runtime.engine.torch.__version__", "9.9.0")
    with pytest.raises(StoreError, match=r"compute\.torch is .* and 9\.9\.0 in this run.*--resume close"):
        resumed(video, store)
    assert digests(store) == before
    assert resumed(video, store, resume="close")[0].complete
    (seam,) = verify(store).seams
    assert (seam.frame, seam.after) == (FRAMES, {"compute.torch": "9.9.0"})
    assert resumed(video, store)[0].complete  # the store is now that of the run which finished it


def test_another_source_is_refused_by_close_too(video, store):
    stopped(video, store)
    with pytest.raises(StoreError, match=r"source\.content is"):
        resumed(video[::-1], store, resume="close")


def test_other_time_stamps_are_refused_by_close_too_which_is_not_advised(video, store, monkeypatch):
    stopped(video, store)
    real, before = encode_module.frame_chunks, digests(store)

    def shifted(*args, **options):
        for piece in real(*args, **options):
            yield replace(piece, pts=piece.pts + 1)

    monkeypatch.setattr(encode_module, "frame_chunks", shifted)
    for resume in ("exact", "close"):
        with pytest.raises(StoreError, match=r"frame_pts .* other frames or time stamps .* give the source") as caught:
            resumed(video, store, resume=resume)
        assert "--resume close" not in str(caught.value)
    assert digests(store) == before


def test_never_refuses_an_unfinished_store(video, store):
    stopped(video, store)
    with pytest.raises(StoreError, match="exists: an incomplete store"):
        resumed(video, store, resume="never")
    with pytest.raises(StoreError, match="resume 'maybe' is not known; choose exact, close, never"):
        resumed(video, store, resume="maybe")


def test_threads_and_tiles_are_taken_up(video, store):
    with compute_threads(1):
        stopped(video, store, slice_frames=1)
    tiling = open_store(store).metadata.tiling
    assert tiling["slice_frames"] == 1
    with compute_threads(2):
        assert resumed(video, store)[0].complete
    metadata = open_store(store).metadata
    assert (metadata.tiling, metadata.compute["threads"]) == (tiling, 1)


def test_a_source_that_is_shorter_now_is_noticed(video, store):
    stopped(iter([video]), store)
    with pytest.raises(StoreError, match="the source ended after") as caught:
        resumed(iter([video[:200]]), store)
    assert caught.value.kind == "mismatch"


@pytest.mark.parametrize("frame", [FRAMES - 1, FRAMES - 9])
def test_other_frames_than_those_that_were_stored_are_noticed(video, store, frame):
    """An iterable has no content to take a digest of in advance. The last chunks tell."""
    stopped(iter([video]), store)
    other = video.copy()
    other[frame] ^= 255
    with pytest.raises(StoreError, match="differ from those that are stored"):
        resumed(iter([other]), store)


def test_negative_control_half_a_warmup_is_refused(video, store, monkeypatch):
    real = AdmissionControl.warmup

    def half(self, direction, schedule):
        found = real(self, direction, schedule)
        return replace(found, chunks=found.chunks // 2)

    stopped(video, store)
    monkeypatch.setattr(AdmissionControl, "warmup", half)
    with pytest.raises(StoreError, match="differ from those that are stored"):
        resumed(video, store)


def test_a_model_that_never_forgets_is_resumed_from_frame_0_and_compared(
    video, undisturbed, store, tmp_path, monkeypatch
):
    def never(self, direction, schedule):
        raise ModelError("it never forgets")

    stopped(video, store)
    stopped(video, tmp_path / "b.zarr")
    monkeypatch.setattr(AdmissionControl, "warmup", never)
    report, chunks = resumed(video, store)
    assert (report.complete, chunks) == (True, list(range(CHUNKS)))
    assert np.array_equal(latents(store), undisturbed)
    other_values(monkeypatch)
    with pytest.raises(StoreError, match="latents 0 to 1 were computed again"):
        resumed(video, tmp_path / "b.zarr")


def test_chunks_that_were_quarantined_are_replaced_in_a_warmup_too(video, store, tmp_path, monkeypatch):
    """Two in a row, of which one is the first chunk of the warm-up: the frame that they repeat lies before it."""
    first = ROWS - 2 - WARMUP
    replaced = frozenset({first - 1, first, first + 3})
    expected = video.copy()
    for chunk in sorted(replaced):
        expected[1 + 4 * chunk : 5 + 4 * chunk] = expected[4 * chunk]
    with VideoSession("tiny", **SETTINGS) as session:
        session.encode(expected, tmp_path / "expected.zarr")
    real = encode_module.frame_chunks
    with monkeypatch.context() as patch:
        patch.setattr(
            encode_module, "frame_chunks", lambda *a, **options: real(*a, **{**options, "replaced": replaced})
        )
        stopped(video, store)
    marks = open_store(store).frame_valid
    assert np.flatnonzero(~marks).tolist() == [f for c in sorted(replaced) for f in range(1 + 4 * c, 5 + 4 * c)]
    report, chunks = resumed(video, store)
    assert (report.complete, chunks[0]) == (True, first)
    assert np.array_equal(latents(store), latents(tmp_path / "expected.zarr"))


def test_values_that_are_not_finite_are_quarantined_behind_a_warmup(video, store):
    """The chunk is missing from the store: the run starts again in the middle, and replaces it there."""
    model, calls = load_model("tiny"), []

    def spoil(module, args, output):
        calls.append(0)
        return torch.full_like(output, torch.nan) if len(calls) == 1 + STOP_AFTER else None

    model.encoder.register_forward_hook(spoil)
    with VideoSession(model, **SETTINGS) as session, pytest.warns(UserWarning, match=f"chunk {STOP_AFTER} was encoded"):
        options = {"on_non_finite": "quarantine", "durability": Durability(publish_seconds=0)}
        assert session.encode(video, store, **options).resumed_from_frame == FRAMES
    marks = open_store(store).frame_valid
    assert np.flatnonzero(~marks).tolist() == list(range(1 + 4 * STOP_AFTER, 5 + 4 * STOP_AFTER))

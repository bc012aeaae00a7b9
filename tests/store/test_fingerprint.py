"""What decides the bits of a result: any change of it is named, and nothing is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.media import barcodes, write_media

from longvid import Durability, StoreError, VideoSession, load_model
from longvid.store.target import changes, in_words

VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text("xyz", max_size=3) | st.just([1, 2])
NAMES = st.sampled_from("abcd")
RECORDS = st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES)))
NUM_FRAMES = 60


def differences(have, want):
    return in_words(changes(have, want))


def leaves(record, prefix=""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@given(RECORDS)
def test_a_record_is_as_json_gives_it_back(record):
    assert differences(record, json.loads(json.dumps(record))) == []


@given(RECORDS, RECORDS)
def test_every_field_that_differs_is_named_once_and_no_other(a, b):
    old, new = dict(leaves(a)), dict(leaves(b))
    absent = object()
    expected = {n for n in {*old, *new} if old.get(n, absent) != new.get(n, absent)}
    told = differences(a, b)
    names = [line.split(" is ")[0] for line in told]
    assert len(names) == len(expected)
    assert set(names) == expected
    assert [name.count(".") for name in names] == sorted(name.count(".") for name in names)
    assert [line.split(" is ")[0] for line in differences(b, a)] == names
    for line, name in zip(told, names, strict=True):
        assert line.endswith("missing in this run") == (name not in new)
        assert (" is missing in the store and " in line) == (name not in old)


def test_long_values_are_cut_short():
    (line,) = differences({"sha256": "a" * 64}, {"sha256": "b" * 64})
    assert line == f"sha256 is {'a' * 12}... in the store and {'b' * 12}... in this run"


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    """A run that is stopped leaves units behind."""
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 4)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def attempt(direction, source, path, *, model=None, stop_after=None, dtype="float32", chunk_frames=None, **options):
    def stop(event):
        if event.index == stop_after:
            session.stop()

    settings = {"device": "cpu", "layout": "contiguous", "paired_frames": "off", "callbacks": [stop]}
    with VideoSession(model or load_model("tiny"), dtype=dtype, chunk_frames=chunk_frames, **settings) as session:
        return getattr(session, direction)(
            source, path, durability=Durability(mode="rename", publish_seconds=0), **options
        )


def other_weights(part):
    """One number of one tensor is the next one that there is."""
    model = load_model("tiny")
    values = list(getattr(model, part).parameters())[-1].data.view(-1)
    values[0] = torch.nextafter(values[0], torch.tensor(9.0))
    return model


def refused(folder, field, *arguments, **options):
    before = contents(folder)
    with pytest.raises(StoreError, match=field.replace(".", r"\.") + " is ") as caught:
        attempt(*arguments, **options)
    assert caught.value.kind == "mismatch"
    assert ("--model" in str(caught.value)) == field.startswith("model.")
    assert contents(folder) == before


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media") / "a.mp4", barcodes(NUM_FRAMES))


ENCODE = {
    "model.weights": {"model": "encoder"},
    "compute.dtype": {"dtype": "bfloat16"},
    "chunk_plan.chunk_frames": {"chunk_frames": 8},
    "store_dtype": {"store_dtype": "float32"},
    "representation": {"representation": "sample"},
    "source.start": {"start": 2},
    "source.size": {"size": (16, 32)},
}


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_encode_is_refused_and_writes_nothing(media, tmp_path, finished):
    path = tmp_path / "a.zarr"
    report = attempt("encode", media, path, stop_after=None if finished else 1)
    assert report.complete == finished
    for field, change in ENCODE.items():
        model = other_weights(change["model"]) if "model" in change else None
        refused(tmp_path, field, "encode", media, path, **{**change, "model": model})
    assert attempt("encode", media, path).complete


def test_a_seed_counts_for_samples_only(media, tmp_path):
    attempt("encode", media, tmp_path / "a.zarr", stop_after=1, representation="sample", seed=3)
    refused(tmp_path, "seed", "encode", media, tmp_path / "a.zarr", representation="sample", seed=4)
    attempt("encode", media, tmp_path / "b.zarr", stop_after=1, seed=3)
    assert attempt("encode", media, tmp_path / "b.zarr", seed=4).resumed_from_frame > 0


def test_a_file_is_known_by_its_content_and_not_by_its_name(media, tmp_path):
    store, source = tmp_path / "a.zarr", tmp_path / "b.mp4"
    attempt("encode", media, store, stop_after=1)
    content = bytearray(media.read_bytes())
    source.write_bytes(content)
    content[-1] ^= 1  # of the index at the end, which no frame is in
    (tmp_path / "c.mp4").write_bytes(content)
    refused(tmp_path, "source.sha256", "encode", tmp_path / "c.mp4", store)
    assert attempt("encode", source, store).resumed_from_frame > 0


DECODE = {
    "model.weights": {"model": "decoder"},
    "compute.dtype": {"dtype": "bfloat16"},
    "window": {"start": 1},
    "chunk_plan.chunk_frames": {"chunk_frames": 8},
}


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_decode_is_refused_and_writes_nothing(tmp_path, finished):
    video = np.random.default_rng(5).integers(0, 256, (NUM_FRAMES, 16, 24, 3), dtype=np.uint8)
    latents, other, path = tmp_path / "latents.zarr", tmp_path / "other.zarr", tmp_path / "a.zarr"
    attempt("encode", video, latents)
    attempt("encode", video[::-1].copy(), other)
    attempt("decode", latents, path, stop_after=None if finished else 1)
    for field, change in DECODE.items():
        model = other_weights(change["model"]) if "model" in change else None
        refused(tmp_path, field, "decode", latents, path, **{**change, "model": model})
    refused(tmp_path, "window", "decode", latents, path, frames=NUM_FRAMES - 1)
    refused(tmp_path, "latents.digests", "decode", other, path)
    assert attempt("decode", latents, path).complete

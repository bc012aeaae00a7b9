"""Latents of other programs as a store: what goes in comes out, decodes as diffusers does, and passes for no encode."""

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support.stores import files, write, xr_open

import longvid as lv
from longvid import NonFiniteError, OptionError, ScheduleError, SourceError, StoreError
from longvid.runtime.exchange.latent_files import read_latents
from longvid.runtime.repair import repair
from longvid.store.format import PRIVATE, with_checksum
from longvid.store.latent_writer import LatentWriter
from longvid.store.verify import verify

logging.getLogger("diffusers").setLevel(logging.ERROR)
RESULTS = {"device": "cpu", "dtype": "float32", "layout": "contiguous", "paired_frames": "off"}


@pytest.fixture(scope="module")
def wan():
    return lv.load_model("wan2.1-nano", random_weights=0)


@pytest.fixture
def z():
    return torch.randn(1, 16, 3, 4, 6)


def rows(z_1cthw):
    return z_1cthw[0].movedim(0, 1).float().numpy()


# ------------------------------------------------------------------------------------------------- what goes in


@pytest.mark.parametrize("layout", ["1cthw", "cthw", "tchw", "1tchw"])
def test_every_layout_gives_the_same_store(wan, tmp_path, z, layout):
    given = z.movedim(1, 2) if "tc" in layout else z
    given = given if layout.startswith("1") else given[0]
    store = lv.import_latents(given, tmp_path / "a.zarr", model=wan)
    assert np.array_equal(store.read(0, 3), rows(z))
    assert (store.num_frames, store.num_latents, store.height, store.width) == (9, 3, 32, 48)
    assert (store.representation, store.complete, str(store.latents.dtype)) == ("imported", True, "float32")
    assert store.latents_valid.all()
    assert verify(store.path).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(wan, tmp_path, z, dtype):
    store = lv.import_latents(z.to(dtype), tmp_path / "a.zarr", model=wan)
    assert np.array_equal(store.read(0, 3), rows(z.to(dtype)))
    assert store.source["details"]["dtype"] == str(dtype).removeprefix("torch.")


def test_numpy_of_any_order(wan, tmp_path, z):
    array = np.asfortranarray(rows(z).astype(">f8"))
    assert np.array_equal(lv.import_latents(array, tmp_path / "a.zarr", model=wan).read(0, 3), rows(z))


def test_normalized_latents_are_stored_raw(wan, tmp_path, z):
    store = lv.import_latents(z, tmp_path / "a.zarr", model=wan, normalized=True)
    assert np.array_equal(store.read(0, 3), rows(lv.denormalize(z, wan)))
    assert np.allclose(store.read(1, 3, normalized=True), rows(z)[1:], atol=1e-6)
    with pytest.raises(lv.ModelError, match="nothing says how"):
        write(tmp_path / "own.zarr", 9)
        lv.open_store(tmp_path / "own.zarr").read(0, 1, normalized=True)


def test_the_store_says_how_its_latents_are_scaled(wan, tmp_path, z):
    lv.import_latents(z, tmp_path / "a.zarr", model=wan)
    facts = xr_open(tmp_path / "a.zarr").attrs["vae"]
    assert facts == json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["vae"]
    assert facts["latents_mean"] == list(wan.config.latents_mean)
    assert facts["latents_std"] == list(wan.config.latents_std)
    assert np.array_equal(lv.normalize(z, facts), lv.normalize(z, wan))


def test_length_size_and_rate(wan, tmp_path, z):
    options = {"model": wan, "num_frames": 7, "fps": 29.97, "size": (30, 41)}
    store = lv.import_latents(z, tmp_path / "a.zarr", **options)
    assert (store.num_frames, store.height, store.width, float(store.frame_rate)) == (7, 30, 41, pytest.approx(29.97))
    with lv.VideoSession(wan, **RESULTS) as session:
        session.decode(store, tmp_path / "b.zarr")
    assert len(np.asarray(lv.open_store(tmp_path / "a.zarr").frame_pts)) == 7


def test_the_weights_of_the_model_are_not_needed(tmp_path, z):
    store = lv.import_latents(z, tmp_path / "a.zarr", model="wan2.1")
    assert store.vae["name_or_path"] == "wan2.1"


BAD = {
    "batch": (torch.zeros(2, 16, 3, 4, 6), {}, SourceError, r"those of 2 videos; import one at a time, such as z\[0\]"),
    "channels": (torch.zeros(1, 12, 3, 4, 6), {}, SourceError, "16 latent channels"),
    "moments": (torch.zeros(1, 32, 3, 4, 6), {}, SourceError, "these look like moments"),
    "ambiguous": (torch.zeros(1, 16, 16, 4, 6), {}, SourceError, "channel_axis=1 or channel_axis=2"),
    "axes": (torch.zeros(16, 4, 6), {}, SourceError, "have 3 axes"),
    "empty": (torch.zeros(1, 16, 0, 4, 6), {}, SourceError, "hold nothing"),
    "integers": (torch.zeros(1, 16, 3, 4, 6, dtype=torch.int32), {}, SourceError, "dtype torch.int32"),
    "no data": (torch.zeros(1, 16, 3, 4, 6, device="meta"), {}, SourceError, "floating numbers are expected"),
    "text": (np.array(["a"] * 2), {}, SourceError, "1 axes"),
    "too many frames": (torch.zeros(1, 16, 3, 4, 6), {"num_frames": 10}, ScheduleError, "at most 9 frames"),
    "too few frames": (torch.zeros(1, 16, 3, 4, 6), {"num_frames": 5}, ScheduleError, "make 2 latent frames"),
    "no frames": (torch.zeros(1, 16, 3, 4, 6), {"num_frames": 0}, ScheduleError, "at least one frame"),
    "size": (torch.zeros(1, 16, 3, 4, 6), {"size": (24, 48)}, OptionError, "frames of up to 48x32"),
    "rate": (torch.zeros(1, 16, 3, 4, 6), {"fps": 0}, OptionError, "fps=0"),
    "stored": (torch.full((1, 16, 3, 4, 6), 1e6), {"store_dtype": "float16"}, StoreError, "float16 holds up to"),
    "dtype": (torch.zeros(1, 16, 3, 4, 6), {"store_dtype": "int8"}, OptionError, "float16 or float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_leaves_nothing(wan, tmp_path, case):
    z, options, error, said = BAD[case]
    with pytest.raises(error, match=said):
        lv.import_latents(z, tmp_path / "a.zarr", model=wan, **options)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_named_by_their_frame(wan, tmp_path):
    z = torch.zeros(1, 16, 7, 4, 6)
    z[0, 3, 4, 1, 1], z[0, 3, 6, 1, 1] = torch.inf, torch.nan
    with pytest.raises(NonFiniteError, match=r"latent frame 4 .*and so do 1 more") as raised:
        lv.import_latents(z, tmp_path / "a.zarr", model=wan)
    assert raised.value.chunk == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- decoding


def pixels(video_1cthw):
    return ((video_1cthw[0].movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def decoded(session, store):
    frames = []
    session.decode(store, frames.append)
    return np.concatenate(frames)


def diffusers_model(family):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    if family == "wan":
        return diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval()
    config = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.AutoencoderKLCogVideoX(**config).eval()


@pytest.mark.parametrize(
    ("family", "num_latents"), [("wan", 1), ("wan", 4), *(("cogvideox", count) for count in (1, 2, 3, 4, 5, 6))]
)
def test_frames_are_those_of_diffusers(tmp_path, family, num_latents):
    theirs = diffusers_model(family)
    z = torch.randn(1, 16, num_latents, 4, 6)
    with torch.no_grad():
        expected = pixels(theirs.decode(lv.denormalize(z, theirs)).sample)
    with lv.VideoSession(theirs, **RESULTS) as session:
        store = lv.import_latents(z, tmp_path / "a.zarr", model=session.model, normalized=True)
        got = decoded(session, store)
    even = family == "cogvideox" and num_latents % 2 == 0
    assert got.shape == expected.shape == (4 * num_latents - (0 if even else 3), 32, 48, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert (got != expected).mean() < 0.01
    assert got.std() > 5


def test_an_even_number_has_no_plan_if_the_model_is_not_of_diffusers(tmp_path):
    model = lv.load_model("cogvideox-nano")
    model.geometry = replace(model.geometry, has_reference_plan=False)
    with pytest.raises(ScheduleError, match="4 latent frames do not fit the plan, which gives 1 \\+ k x 2"):
        lv.import_latents(torch.zeros(1, 4, 16, 2, 2), tmp_path / "a.zarr", model=model)
    assert list(tmp_path.iterdir()) == []


def test_an_even_number_of_cogvideox_may_stand_for_fewer_frames(tmp_path):
    model, z = lv.load_model("cogvideox-nano", random_weights=0), torch.randn(1, 4, 16, 2, 2)
    whole, store = (
        lv.import_latents(z, tmp_path / f"{n}.zarr", model=model, num_frames=n, channel_axis=2) for n in (None, 13)
    )
    assert (whole.num_frames, store.num_frames) == (16, 13)
    assert store.latents_valid.all()
    with lv.VideoSession(model, **RESULTS) as session:
        assert np.array_equal(decoded(session, store), decoded(session, whole)[3:])
    with pytest.raises(ScheduleError, match="4 latent frames are those of 13 to 16 frames, 17 were asked for"):
        lv.import_latents(z, tmp_path / "b.zarr", model=model, num_frames=17, channel_axis=2)


# ------------------------------------------------------------------------------------------------- its place


def test_the_same_latents_once_more_change_nothing(wan, tmp_path, z):
    lv.import_latents(z, tmp_path / "a.zarr", model=wan)
    before = files(tmp_path)
    assert lv.import_latents(z, tmp_path / "a.zarr", model=wan).num_frames == 9
    assert files(tmp_path) == before
    with pytest.raises(StoreError, match=r"imported\.sha256 is .* in the store") as raised:
        lv.import_latents(z + 1, tmp_path / "a.zarr", model=wan)
    assert raised.value.kind == "mismatch"
    assert files(tmp_path) == before
    store = lv.import_latents(z + 1, tmp_path / "a.zarr", model=wan, overwrite=True)
    assert np.array_equal(store.read(0, 3), rows(z + 1))


def test_nothing_foreign_is_overwritten(wan, tmp_path, z):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    with pytest.raises(StoreError, match="not a longvid store"):
        lv.import_latents(z, tmp_path / "thesis", model=wan, overwrite=True)
    with pytest.raises(StoreError, match="is not a folder"):
        lv.import_latents(z, tmp_path / "thesis" / "a.tex", model=wan, overwrite=True)
    assert list(files(tmp_path)) == [Path("thesis/a.tex")]


@pytest.mark.parametrize("finished", [True, False])
def test_no_encode_continues_it_and_it_continues_no_encode(wan, tmp_path, z, finished):
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    with lv.VideoSession(wan, **RESULTS) as session:
        lv.import_latents(z, tmp_path / "imported.zarr", model=wan)
        session.encode(frames, tmp_path / "encoded.zarr", store_dtype="float32")
        if not finished:
            for path in tmp_path.iterdir():
                unfinish(path)
        before = files(tmp_path)
        for resume in ("exact", "close"):
            with pytest.raises(StoreError, match="made by another run"):
                session.encode(frames, tmp_path / "imported.zarr", store_dtype="float32", resume=resume)
        with pytest.raises(StoreError, match="made by another run"):
            lv.import_latents(z, tmp_path / "encoded.zarr", model=wan)
    assert files(tmp_path) == before


def unfinish(path):
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["longvid"]["status"] = "writing"
    for name in ("zarr.json", f"{PRIVATE}/root.json"):
        (path / name).write_bytes(with_checksum(root))


def test_an_import_that_was_interrupted_is_finished(wan, tmp_path, z, monkeypatch):
    whole = lv.import_latents(z, tmp_path / "whole.zarr", model=wan)
    monkeypatch.setattr("longvid.store.latent_writer._latents_per_chunk", lambda *_: 1)
    eager = lv.Durability(mode="rename", publish_seconds=0)
    path = tmp_path / "a.zarr"

    def write_two_latents(self, chunk, latents, *rest):
        if chunk.index == 1:
            raise KeyboardInterrupt
        original(self, chunk, latents, *rest)

    long = torch.cat([z, z + 1], dim=2)
    original = LatentWriter.write
    with monkeypatch.context() as patch:
        patch.setattr("longvid.store.latent_writer.LatentWriter.write", write_two_latents)
        with pytest.raises(KeyboardInterrupt):
            lv.import_latents(long, path, model=wan, durability=eager)
    assert not lv.open_store(path).complete
    store = lv.import_latents(long, path, model=wan, durability=eager)
    assert store.complete
    assert np.array_equal(store.read(0, 6), rows(long))
    assert np.array_equal(whole.read(0, 3), rows(z))


# ------------------------------------------------------------------------------------------------- repair


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["zarr.json", "latents/zarr.json", "t/c.0", "frame_pts/c.0", "digest/c.0.0.0"])
def test_everything_but_the_data_is_restored(wan, tmp_path, z, name):
    store = lv.import_latents(z, tmp_path / "a.zarr", model=wan, num_frames=8)
    before = files(store.path)
    damage(store.path / name)
    assert not verify(store.path).ok
    assert repair(None, store.path).ok
    assert files(store.path) == before


def test_damaged_data_is_not_computed_from_anything(wan, tmp_path, z):
    store = lv.import_latents(z, tmp_path / "a.zarr", model=wan)
    damage(store.path / "latents" / "c.0.0.0.0")
    before = files(store.path)
    with lv.VideoSession(wan, **RESULTS) as session:
        for source in (None, np.zeros((9, 32, 48, 3), np.uint8)):
            with pytest.raises(StoreError, match=r"imported from an array of latents.*cannot be computed again"):
                repair(session, store.path, source=source)
    assert files(store.path) == before
    lv.import_latents(z, store.path, model=wan, overwrite=True)
    assert verify(store.path).ok


# ------------------------------------------------------------------------------------------------- files


def saved(folder, kind, z):
    path = folder / f"latents.{kind}"
    if kind == "npy":
        np.save(path, z.numpy())
    elif kind == "safetensors":
        safetensors.torch.save_file({"anything": z}, path)
    else:
        torch.save(z, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "npy", "pt", "pth"])
def test_every_kind_of_file(wan, tmp_path, z, kind):
    path = saved(tmp_path, kind, z)
    store = lv.import_latents(path, tmp_path / "a.zarr", model=wan)
    assert np.array_equal(store.read(0, 3), rows(z))
    assert store.source["name"] == str(path)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_one_of_several_tensors(tmp_path, z, kind):
    path = tmp_path / f"a.{kind}"
    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    save({"latents": z, "prompt": torch.zeros(3)}, path)
    assert torch.equal(read_latents(path), z)
    save({"first": z, "second": z + 1}, path)
    assert torch.equal(read_latents(path, "second"), z + 1)
    with pytest.raises(SourceError, match=r"2 tensors \(first, second\).*--tensor"):
        read_latents(path)
    with pytest.raises(SourceError, match=r"no tensor 'third'"):
        read_latents(path, "third")


def test_bfloat16_in_a_file(wan, tmp_path, z):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"latents_3x4x6_bfloat16": z.bfloat16(), "mask": torch.zeros(2)}, path)
    assert np.array_equal(lv.import_latents(path, tmp_path / "a.zarr", model=wan).read(0, 3), rows(z.bfloat16()))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    torch.save({"latents": Evil()}, "zip.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("objects.npy", "zip.pt", "raw.pt"):
        with pytest.raises(SourceError, match="run code") as raised:
            read_latents(Path(name))
        assert raised.value.kind == "refused"
    assert not Path("evil").exists()


@pytest.mark.parametrize("kind", ["safetensors", "npy", "pt"])
def test_damaged_files_give_one_clear_line(tmp_path, z, kind):
    path = saved(tmp_path, kind, z)
    content = path.read_bytes()
    for bad in (b"", content[:40], content[: len(content) // 2], b"\xff" * 200):
        path.write_bytes(bad)
        with pytest.raises(SourceError) as raised:
            read_latents(path)
        assert "\n" not in str(raised.value)
        assert raised.value.kind in ("damaged", "refused")


def test_files_that_are_none(tmp_path):
    for name, said in {
        "none.pt": "there is no file",
        "a.txt": "not a file of latents",
        "list.pt": "holds a int",
    }.items():
        if name != "none.pt":
            torch.save(3, tmp_path / name)
        with pytest.raises(SourceError, match=said):
            read_latents(tmp_path / name)

"""Damage of every kind, in every file of a store: found by verify, never given out as data, undone by repair."""

import json
import shutil

import numpy as np
import pytest
import zarr
from support.fault_runs import CHUNK_FRAMES, SESSION, WARMUP, write_video

from longvid import Durability, StoreError, VideoSession, load_model, open_store
from longvid.runtime.repair import repair
from longvid.store.format import PRIVATE
from longvid.store.verify import verify

HEIGHT, WIDTH, NUM_FRAMES = 32, 48, 57
CHUNKS_OF_A_UNIT = {"encode": 2, "decode": 2}
"as many as its 4 latents or 16 frames would fill; the first chunk is longer, so they lie in three"


def video(seed=5):
    return np.random.default_rng(seed).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def session():
    return VideoSession("tiny", device="cpu", dtype="float32", layout="contiguous", paired_frames="off")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Whole stores by name, and folders with others like them from which pieces are taken."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, session() as s:
        patch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 4 * 16 * (HEIGHT // 8) * (WIDTH // 8) * 2)
        patch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 8 * HEIGHT * WIDTH * 3)
        s.encode(video(), folder / "latents.zarr")
        s.encode(video(6), folder / "other latents.zarr")
        s.encode(video(), folder / "moments.zarr", representation="moments", store_dtype="float32")
        s.decode(folder / "latents.zarr", folder / "frames.zarr")
    assert verify(folder / "latents.zarr").num_units >= 4
    return folder


def chunk_files(store):
    return sorted(p for p in store.rglob("c.*") if p.is_file())


def all_files(store):
    return sorted(p for p in store.rglob("*") if p.is_file())


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def mutations(store, other, rng, flips):
    """Pairs of a class of damage and what does it; ``store`` is whole when it is called."""
    for file in all_files(store):
        size = file.stat().st_size
        for bit in sorted(rng.choice(size * 8, min(flips, size * 8), replace=False)):
            yield "flip", lambda f=file, b=int(bit): f.write_bytes(flipped(f.read_bytes(), b))
        for length in {0, 1, size // 2, size - 1}:
            yield "truncate", lambda f=file, n=length: f.write_bytes(f.read_bytes()[:n])
        yield "append", lambda f=file: f.write_bytes(f.read_bytes() + b"\0" * 7)
        yield "zeros", lambda f=file: f.write_bytes(bytes(f.stat().st_size))
        yield "missing", lambda f=file: f.unlink()
    for folder in sorted(p for p in store.iterdir() if p.is_dir()):
        if folder.name != "digest":
            yield "missing folder", lambda f=folder: shutil.rmtree(f)
    chunks = chunk_files(store)
    for a in chunks:
        for b in chunks:
            if a < b and a.read_bytes() != b.read_bytes() and (a.parent == b.parent or rng.random() < 0.1):
                yield "swap", lambda a=a, b=b: swap(a, b)
        twin = other / a.relative_to(store)
        if twin.is_file() and twin.read_bytes() != a.read_bytes():
            yield "of another run", lambda a=a, twin=twin: shutil.copyfile(twin, a)
    for name, array in zarr.open_group(store, mode="r").arrays():
        for row in range(0, array.shape[0], max(1, array.shape[0] // 6)):
            yield "forged value", lambda n=name, r=row: forge(store, n, r)
        yield "forged shape", lambda n=name: reshape(store / n / "zarr.json")
        yield "left over", lambda n=name, f=chunks[0]: shutil.copyfile(f, store / n / ("c.99" + ".0" * 3))
    for change in ({"num_frames": NUM_FRAMES - 1}, {"status": "writing"}, {"digests": "0" * 32}, {"epoch": "x"}):
        yield "forged attribute", lambda c=change: forge_root(store, c)


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def forge(store, name, row):
    """Through zarr, so that every checksum of a codec is right."""
    array = zarr.open_array(store, path=name, mode="r+")
    value = np.asarray(array[row])
    array[row] = ~value if value.dtype == bool else value + np.ones((), value.dtype)


def reshape(file):
    document = json.loads(file.read_bytes())
    document["shape"][0] += 3
    file.write_text(json.dumps(document, indent=2))


def forge_root(store, change):
    root = json.loads((store / "zarr.json").read_bytes())
    root["attributes"]["longvid"] |= change
    (store / "zarr.json").write_text(json.dumps(root, indent=2))


def read_or_refuse(store, truth):
    """Whether reading gives other data than was published."""
    try:
        opened = open_store(store)
        return not np.array_equal(opened.read(0, opened.num_latents), truth[: opened.num_latents])
    except StoreError:
        return False


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["latents", "moments", "frames"])
def test_everything_is_found_and_nothing_of_it_is_data(stores, tmp_path, ledger, all_faults, name):
    whole, store, rng = stores / f"{name}.zarr", tmp_path / "a.zarr", np.random.default_rng(1)
    shutil.copytree(whole, store)
    truth = None if name == "frames" else open_store(whole).read(0, open_store(whole).num_latents)
    done = list(mutations(store, stores / "other latents.zarr", rng, 12 if all_faults else 3))
    if not all_faults:
        done = [done[i] for i in sorted(rng.choice(len(done), min(len(done), 30), replace=False))]
    missed = []
    for number, (kind, damage) in enumerate(done):
        damage()
        try:
            found = verify(store)
            detected = not found.ok
        except StoreError:  # told as clearly
            detected = True
        wrong = truth is not None and read_or_refuse(store, truth)
        ledger.add(f"corruption: {kind}", survived=detected, silently_wrong=wrong)
        if wrong or not detected:
            missed.append((number, kind, wrong))
        shutil.rmtree(store)
        shutil.copytree(whole, store)
    assert not missed
    assert len(done) >= (330 if all_faults else 30)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["latents", "moments", "frames"])
def test_repair_restores_every_file(stores, tmp_path, ledger, all_faults, name):
    whole, store, rng = stores / f"{name}.zarr", tmp_path / "a.zarr", np.random.default_rng(2)
    shutil.copytree(whole, store)
    done = list(mutations(store, stores / "other latents.zarr", rng, 1))
    by_kind = {}
    for kind, damage in (done[i] for i in rng.permutation(len(done))):
        by_kind.setdefault(kind, []).append(damage)
    before = {p.relative_to(whole): p.read_bytes() for p in all_files(whole)}
    source = stores / "latents.zarr" if name == "frames" else video()
    with session() as s:
        for kind, damages in by_kind.items():
            for damage in damages[: 6 if all_faults else 1]:
                damage()
                told = repair(s, store, source=source)
                after = {p.relative_to(store): p.read_bytes() for p in all_files(store)}
                restored = told.ok and after == before
                ledger.add(f"repair: {kind}", survived=restored)
                assert restored, (kind, told.explain(), [n for n in before if after.get(n) != before[n]])


def test_plain_zarr_gives_damage_out_as_data(tmp_path, ledger):
    """The negative control: the same flips in a store as zarr makes it by default."""
    noise = np.random.default_rng(3).standard_normal((16, 16, 4, 6)).astype(np.float16)
    array = zarr.create_array(tmp_path / "a.zarr", shape=noise.shape, chunks=(4, 16, 4, 6), dtype="float16")
    array[:] = noise
    silent = 0
    for file in [p for p in all_files(tmp_path / "a.zarr") if p.name != "zarr.json"]:
        content = file.read_bytes()
        for bit in range(0, len(content) * 8, 997):
            file.write_bytes(flipped(content, bit))
            try:
                wrong = not np.array_equal(zarr.open_array(tmp_path / "a.zarr")[:], noise, equal_nan=True)
                noticed = False
            except Exception:
                wrong, noticed = False, True
            silent += wrong
            ledger.add("corruption: flip", survived=noticed, silently_wrong=wrong, who="plain zarr")
        file.write_bytes(content)
    assert silent > 0


def damage_unit(store, unit):
    file = sorted((store / zarr.open_group(store).attrs["longvid"]["kind"]).glob("c.*"), key=unit_of)[unit]
    file.write_bytes(flipped(file.read_bytes(), 1001))


def unit_of(file):
    return int(file.name.split(".")[1])


@pytest.mark.timeout(3600)
def test_repair_computes_what_it_must_and_no_more(tmp_path, monkeypatch, ledger, all_faults):
    """Of a unit in the middle the warm-up, its own chunks and at most two more, and the bytes are as they were."""
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 4 * 16 * (HEIGHT // 8) * (WIDTH // 8) * 2)
    monkeypatch.setattr("longvid.store.frame_writer.TARGET_CHUNK_BYTES", 8 * HEIGHT * WIDTH * 3)
    source, latents, frames = np.tile(video(), (4, 1, 1, 1)), tmp_path / "latents.zarr", tmp_path / "frames.zarr"
    with VideoSession("tiny", **SESSION) as s:
        s.encode(source, latents)
        s.decode(latents, frames)
        for store, job, whole in (latents, "encode", source), (frames, "decode", latents):
            before = {path: path.read_bytes() for path in all_files(store)}
            num_units = verify(store).num_units
            most = (WARMUP[job] + CHUNKS_OF_A_UNIT[job] + 2) * CHUNK_FRAMES
            middle = range(num_units // 2, num_units // 2 + 2)
            for units in [
                *((unit,) for unit in (range(num_units) if all_faults else middle)),
                (2, 3),
                (2, num_units - 2),
            ]:
                for unit in units:
                    damage_unit(store, unit)
                told = repair(s, store, source=whole)
                restored = told.ok and {path: path.read_bytes() for path in all_files(store)} == before
                ledger.add(f"repair: {job} from the middle", survived=restored)
                assert restored, units
                assert 0 < told.frames_computed <= len(units) * most, (job, units)
        (latents / "t" / "c.0").unlink()
        told = repair(s, latents)  # needs neither source nor model
        assert (told.ok, told.frames_computed) == (True, 0)


def test_damaged_seek_points_change_nothing(tmp_path, monkeypatch, ledger, all_faults):
    """They tell a resumed run where to read on. A damaged one is not used; the file itself tells the same."""
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 4 * 16 * (HEIGHT // 8) * (WIDTH // 8) * 2)
    source, begun, rng = write_video(tmp_path, 120), tmp_path / "begun.zarr", np.random.default_rng(4)
    eager, found = Durability(publish_seconds=0), []

    def stop(event):
        if event.index == 12:
            raise KeyboardInterrupt

    with VideoSession("tiny", callbacks=[stop], **SESSION) as s, pytest.raises(KeyboardInterrupt):
        s.encode(source, begun, durability=eager)
    with VideoSession("tiny", **SESSION) as s:
        s.encode(source, tmp_path / "whole.zarr", durability=eager)
        whole, content = tmp_path / "whole.zarr", (begun / PRIVATE / "seek").read_bytes()
        first_bytes = range(0, len(content), len(content) // 5)
        bits = [8 * byte + bit for byte in first_bytes for bit in (0, 2)]
        bits += rng.integers(0, 8 * len(content), 40 if all_faults else 3).tolist()
        damaged = [content, *(flipped(content, bit) for bit in bits)]
        damaged += [content[:-5], content[7:], bytes(len(content)), content + content, b""]
        for seek in damaged if all_faults else damaged[:1] + damaged[-15::2]:
            shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
            shutil.copytree(begun, tmp_path / "a.zarr")
            (tmp_path / "a.zarr" / PRIVATE / "seek").write_bytes(seek)
            report = s.encode(source, tmp_path / "a.zarr", durability=eager)
            found.append((report.resumed_from_frame, report.frames_computed))
            same = all(
                (tmp_path / "a.zarr" / name / file.name).read_bytes() == file.read_bytes()
                for name in ("latents", "frame_pts", "digest")
                for file in (whole / name).glob("c.*")
            )
            ledger.add("corruption: seek points", survived=same, silently_wrong=not same)
            assert same
    assert set(found) == {found[0]}
    assert 0 < found[0][1] <= 120 - 41  # from a frame on that is worth a seek


def test_damage_beyond_repair_is_said_and_a_wrong_source_changes_nothing(stores, tmp_path):
    store = tmp_path / "a.zarr"
    shutil.copytree(stores / "latents.zarr", store)
    damage_unit(store, -1)
    before = {p: p.read_bytes() for p in all_files(store)}
    other = load_model("tiny")
    with session() as s, pytest.raises(StoreError) as caught:
        repair(s, store, source=video(6))
    assert caught.value.kind == "mismatch"
    other.encoder.requires_grad_(False)
    next(other.encoder.parameters()).mul_(1.5)
    settings = {"device": "cpu", "dtype": "float32", "layout": "contiguous", "paired_frames": "off"}
    with VideoSession(other, **settings) as s, pytest.raises(StoreError, match=r"model\.weights") as caught:
        repair(s, store, source=video())
    assert caught.value.kind == "mismatch"
    assert {p: p.read_bytes() for p in all_files(store)} == before
    (store / "digest" / "c.0.0.0").unlink()
    with session() as s, pytest.raises(StoreError, match="nothing tells what is right"):
        repair(s, store, source=video())
    (store / "zarr.json").write_text("{")
    (store / PRIVATE / "root.json").write_text("{")
    with pytest.raises(StoreError, match="both damaged"):
        verify(store)


def test_a_damaged_name_in_the_root_is_said_to_be_damage(stores, tmp_path):
    """A run that finds it names the way out, and repair is one."""
    store = tmp_path / "a.zarr"
    shutil.copytree(stores / "latents.zarr", store)
    whole = (store / "zarr.json").read_bytes()
    (store / "zarr.json").write_bytes(whole.replace(b"zarr_format", b"zarr_formAt"))
    with session() as s:
        with pytest.raises(StoreError, match="longvid repair") as caught:
            s.encode(video(), store)
        assert caught.value.kind == "corrupt"
        assert repair(s, store, source=video()).ok
    assert (store / "zarr.json").read_bytes() == whole

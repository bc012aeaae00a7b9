"""Metadata, chunk files and folders of untrusted stores: what longvid could have written opens, the rest is refused."""

import copy
import json
import math
import os
import random
import socket
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from numcodecs import Blosc
from support.stores import PLAN, frame_store, latents_of, writer

from longvid import StoreError, open_store
from longvid.store.format import PRIVATE, array_document, serialized, with_checksum
from longvid.store.metadata import StoreMetadata
from longvid.store.reader import open_reader
from longvid.store.validation import MAX_DOCUMENT_BYTES, MAX_ROWS, check_arrays, check_chunk, check_tree, read_document

MIB = 2**20
EXAMPLES, WHOLE_STORES = 400, 40
"of fuzzed metadata; for the first of them a whole store is opened as well"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A store that longvid wrote: its path."""
    path = tmp_path_factory.mktemp("validation") / "a.zarr"
    with writer(path, representation="moments") as store:
        for chunk in PLAN.chunks(30):
            z = latents_of(chunk)
            store.write(chunk, z, np.arange(chunk.frame_start, chunk.frame_stop), np.concatenate([z, z], axis=1))
    return path


@pytest.fixture
def document(ours):
    return read_document(ours / "zarr.json")


def members(document):
    return document["consolidated_metadata"]["metadata"]


def refused(said, call, *args, **options):
    with pytest.raises(StoreError, match=said) as caught:
        call(*args, **options)
    assert caught.value.kind == "refused"


def error_of(call):
    try:
        call()
    except StoreError as exc:
        return exc
    return None


# ------------------------------------------------------------------------------------------------- what passes


def test_a_store_of_ours_passes_whole(ours, document, tmp_path):
    check_tree(ours)
    assert len(check_arrays(document, "latents", where="a")) == 8
    metadata = StoreMetadata.parse(document, where="a")
    for name, array in metadata.arrays.items():
        assert read_document(ours / name / "zarr.json") == array.document
        assert sorted(array.chunk_files) == sorted(path.name for path in (ours / name).glob("c.*"))
        for file in array.chunk_files:
            check_chunk(ours / name / file, array.chunk_bytes)
    with frame_store(tmp_path / "f.zarr") as store:
        store.write(np.zeros((3, 90, 120, 3), np.uint8), np.arange(3))
    assert StoreMetadata.parse(read_document(tmp_path / "f.zarr" / "zarr.json"), where="f").num_frames == 3


@pytest.mark.parametrize(("level", "shuffle"), [(3, "bitshuffle"), (5, "shuffle"), (1, "noshuffle")])
def test_compression_of_another_version_passes(document, level, shuffle):
    for member in members(document).values():
        member["codecs"][1]["configuration"] |= {"clevel": level, "shuffle": shuffle}
    check_arrays(document, "latents", where="a")


def test_eight_k_frames_and_a_week_of_them_pass():
    week = 7 * 24 * 3600 * 50
    arrays = {
        "frames": array_document("frames", "frames", (week, 4320, 7680, 3), "uint8", 1),
        "t": array_document("frames", "t", (week,), "float64", 4096),
        "frame_pts": array_document("frames", "frame_pts", (week,), "int64", 4096),
        "frame_valid": array_document("frames", "frame_valid", (week,), "bool", 4096),
        "digest": array_document("frames", "digest", (week, 2, 16), "uint8", 1024),
    }
    consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
    root = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": consolidated}
    assert check_arrays(root, "frames", where="a") == arrays


# ------------------------------------------------------------------------------------------------- what does not


def put(*path):
    """A mutation: ``put("a", 0, "b", value)`` sets ``document["a"][0]["b"]``."""
    *way, last, value = path

    def apply(document):
        for step in way:
            document = document[step]
        document[last] = value

    return apply


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": 2, "blocksize": 0},
}
CRC = {"name": "crc32c"}
REFUSED = {
    "format 2": (put("zarr_format", 2), "zarr_format.* is 2; allowed: 3"),
    "format true": (put("zarr_format", True), "zarr_format.* is True"),
    "format 3.0": (put("zarr_format", 3.0), r"zarr_format.* is 3\.0"),
    "a group": (put("node_type", "group"), "node_type.* is 'group'"),
    "other axes": (put("shape", [1] * 5), r"shape is \[1, 1, 1, 1, 1\]; allowed: 4 whole numbers"),
    "negative": (put("shape", [-1, 16, 2, 3]), r"\[-1, 16, 2, 3\]"),
    "too long": (put("shape", [MAX_ROWS + 1, 16, 2, 3]), "33554433 rows; allowed: at most 33,554,432"),
    "a float": (put("shape", [1.0, 16, 2, 3]), "whole numbers"),
    "a huge number": (put("shape", [10**4000, 16, 2, 3]), "shape is"),
    "no shape": (put("shape", None), "shape is None"),
    "empty frames": (put("shape", [8, 0, 2, 3]), "decodes to 0 bytes"),
    "petabyte": (put("shape", [8, 2**30, 2**20, 3]), "a chunk decodes to"),
    "chunks of 0": (put("chunk_grid", "configuration", "chunk_shape", [0, 16, 2, 3]), "decodes to"),
    "large chunks": (put("chunk_grid", "configuration", "chunk_shape", [2**20, 16, 2, 3]), "decodes to 201326592"),
    "split chunks": (put("chunk_grid", "configuration", "chunk_shape", [64, 8, 2, 3]), "chunk_grid"),
    "rectilinear": (put("chunk_grid", "name", "rectilinear"), "rectilinear"),
    "no grid": (put("chunk_grid", []), "chunk shape is None"),
    "object": (put("data_type", "object"), "dtype is 'object'; allowed: float16, float32"),
    "structured": (put("data_type", {"name": "structured", "configuration": {}}), "dtype is"),
    "fill": (put("fill_value", 0), "fill_value.* is 0; allowed: 'NaN'"),
    "key encoding": (put("chunk_key_encoding", "name", "fanout"), "fanout"),
    "separator": (put("chunk_key_encoding", "configuration", {"separator": "../"}), r"\.\./"),
    "transformer": (put("storage_transformers", [{"name": "x"}]), "storage_transformers"),
    "extra field": (put("load", {"name": "x"}), "'load' is .* allowed: 'nothing'"),
    "attributes": (put("attributes", []), "attributes"),
    "dimension names": (put("dimension_names", ["t"]), "dimension_names"),
    "no codecs": (put("codecs", []), "codecs"),
    "pickle": (put("codecs", [LITTLE, {"name": "numcodecs.pickle"}, CRC]), "numcodecs.pickle"),
    "module path": (put("codecs", 1, "name", "os.system"), "os.system"),
    "control characters": (put("codecs", 1, "name", "\x1b[2J\n" + "x" * 999), r"\\x1b\[2J"),
    "blosc without checksum": (put("codecs", [LITTLE, BLOSC]), "codecs"),
    "lz4": (put("codecs", 1, "configuration", "cname", "lz4"), "lz4"),
    "level": (put("codecs", 1, "configuration", "clevel", 11), "codecs"),
    "level true": (put("codecs", 1, "configuration", "clevel", True), "codecs"),
    "shuffle": (put("codecs", 1, "configuration", "shuffle", ["x"]), "codecs"),
    "setting": (put("codecs", 1, "configuration", "path", "/"), "codecs"),
    "shards": (put("codecs", [{"name": "sharding_indexed", "configuration": {"codecs": [LITTLE]}}]), "codecs"),
}


@pytest.mark.parametrize(("mutate", "said"), REFUSED.values(), ids=REFUSED)
def test_what_longvid_never_writes_is_refused(mutate, said, document):
    check_arrays(document, "latents", where="a")
    mutate(members(document)["latents"])
    refused(f"^a: array 'latents' is refused: .*{said}", check_arrays, document, "latents", where="a")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b", "a\u202eb", "zarr.json", "x" * 999]
)
def test_arrays_of_other_names_are_refused(name, document):
    members(document)[name] = members(document)["t"]
    refused("it has an array", check_arrays, document, "latents", where="a")


def test_groups_are_what_longvid_writes(document):
    for mutate in (
        put("zarr_format", 2), put("node_type", "array"), put("extra", {}), put("consolidated_metadata", []),
        put("consolidated_metadata", "kind", "elsewhere"), put("consolidated_metadata", "metadata", []),
        put("consolidated_metadata", "url", "http://x"), lambda d: members(d).pop("digest"),
    ):  # fmt: skip
        changed = copy.deepcopy(document)
        mutate(changed)
        refused("a is refused", check_arrays, changed, "latents", where="a")
    refused("it has an array 'latents'", check_arrays, document, "frames", where="a")


FACTS = {
    "frames as text": put("num_frames", "30"),
    "too many frames": put("num_frames", 31),
    "no digests": put("digests", None),
    "another plan": put("chunk_plan", "tail", "cut"),
    "no plan": put("chunk_plan", []),
    "no fingerprint": put("fingerprint", 3),
    "window": put("fingerprint", {"window": [1, "2"]}),
    "run": put("run", {"size": 3}),
    "rate": put("run", {"frame_rate": "fast"}),
    "numerics": put("numerics", 3),
}


@pytest.mark.parametrize("mutate", FACTS.values(), ids=FACTS)
def test_facts_of_another_type_are_damage_and_name_the_field(mutate, document):
    mutate(document["attributes"]["longvid"])
    with pytest.raises(StoreError, match="a: the root metadata are damaged: ") as caught:
        StoreMetadata.parse(document, where="a")
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize(("name", "length"), [("t", 3), ("frame_pts", 3), ("digest", 4), ("moments", 1)])
def test_lengths_that_do_not_follow_from_each_other_are_damage(name, length, document):
    members(document)[name]["shape"][0] = length
    with pytest.raises(StoreError, match=f"{name} has the shape") as caught:
        StoreMetadata.parse(document, where="a")
    assert caught.value.kind == "corrupt"


# ------------------------------------------------------------------------------------------------- fuzzing

VALUES = (
    *(None, True, False, -2, -1, 0, 1, 2, 3, 7, 16, 70, 2**31, 2**40, 2**63, 10**400),
    *(1e308, -0.0, 0.5, -1.5, float("nan"), float("inf"), "", "a", "\u00e9\n", "NaN", "Infinity", ".."),
    *(
        "zstd",
        "gzip",
        "float64",
        "int8",
        "default",
        "v2",
        "inline",
        [0],
        [1, 2, 3],
        [9, 9, 9, 9, 9],
        {},
        [],
        LITTLE,
        CRC,
        BLOSC,
    ),
)


def places(node, path=()):
    yield path
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


def at(node, path):
    for step in path:
        node = node[step]
    return node


def mutated(document, rng):
    """A copy in which one to three places were set, nudged, deleted or copied from elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = [path for path in places(document) if path]
        numbers = [path for path in found if type(at(document, path)) is int]
        action = rng.choice(["set", "set", "nudge", "nudge", "delete", "copy"])
        *way, last = rng.choice(numbers if action == "nudge" and numbers else found)
        parent = at(document, way)
        match action:
            case "nudge" if numbers:
                parent[last] = max(0, parent[last] * rng.randint(1, 20) + rng.randint(-1, 1))
            case "delete":
                del parent[last]
            case "copy":
                parent[last] = copy.deepcopy(at(document, rng.choice(found)))
            case _:
                parent[last] = copy.deepcopy(rng.choice(VALUES))
    return document


def test_fuzzed_metadata_with_a_right_checksum_open_in_bounds_or_are_a_store_error(ours):
    """An attacker computes the checksum too, so that what refuses is the validation."""
    seed, outcomes = read_document(ours / "zarr.json"), {"read": 0, "refused": 0}
    original = (ours / "zarr.json").read_bytes()

    for number in range(EXAMPLES):
        root = mutated(seed, random.Random(number))
        try:
            content = with_checksum(root)
        except (KeyError, TypeError):
            content = serialized(root)
        whole = number < WHOLE_STORES
        (ours / "zarr.json").write_bytes(content)
        tracemalloc.start()
        error = error_of(
            (lambda: open_store(ours).latents[:])
            if whole
            else (lambda text=content: StoreMetadata.parse(json.loads(text), where="a"))
        )
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
        tracemalloc.stop()
        outcomes["read" if error is None else "refused"] += 1
        assert error is None or (len(str(error)) < 1500 and str(error).isprintable())

    (ours / "zarr.json").write_bytes(original)
    assert min(outcomes.values()) > 50, outcomes


def test_fuzzed_bytes_are_a_document_or_a_store_error(ours, tmp_path):
    content = (ours / "zarr.json").read_bytes()
    path, rng, damaged = tmp_path / "zarr.json", np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(changed)))
            changed[start : start + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 5)))
        path.write_bytes(changed[: int(rng.integers(len(changed)))] if rng.random() < 0.2 else changed)
        error = error_of(lambda: StoreMetadata.parse(read_document(path), where="a"))
        if error is not None:
            assert error.kind in ("corrupt", "refused", "foreign", "format")
            damaged += 1
    assert damaged > 100


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"", "corrupt", "not JSON"),
        (b"\xff\xfe{}", "corrupt", "not JSON"),
        (b"[]", "corrupt", "holds a list"),
        (b'{"a": ' + b"[" * 100_000, "corrupt", "not JSON"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "refused", "64 levels"),
        (b'{"a": ' + b"1" * 5000 + b"}", "corrupt", "not JSON"),
        (b" " * (MAX_DOCUMENT_BYTES + 1), "refused", "16,777,216 bytes"),
    ],
    ids=["empty", "utf-16", "list", "very deep", "deep", "long number", "large"],
)
def test_damaged_documents(content, kind, said, tmp_path):
    (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError, match=said) as caught:
        read_document(tmp_path / "zarr.json")
    assert caught.value.kind == kind


def test_a_document_is_a_regular_file(ours, tmp_path):
    with pytest.raises(StoreError, match="there is no") as caught:
        read_document(tmp_path / "zarr.json")
    assert caught.value.kind == "missing"
    refused("cannot be a path", read_document, tmp_path / "a\0b")
    refused("a folder|not a regular file", read_document, tmp_path)
    (tmp_path / "zarr.json").symlink_to(ours / "zarr.json")
    refused("symbolic link", read_document, tmp_path / "zarr.json")
    os.mkfifo(tmp_path / "fifo")
    refused("not a regular file", read_document, tmp_path / "fifo")


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "loop", "fifo", "socket"])
def test_what_is_neither_file_nor_folder_is_refused_and_left_alone(kind, tmp_path, monkeypatch):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "latents" / "c").mkdir(parents=True)
    outside.mkdir()
    (outside / "thesis.txt").write_text("x")
    bad = root / "latents" / "c" / "0"
    match kind:
        case "fifo":
            os.mkfifo(bad)
        case "socket":
            monkeypatch.chdir(bad.parent)  # names of sockets are short
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("0")
        case "loop":
            bad.symlink_to(bad)
        case _:
            targets = {"file": outside / "thesis.txt", "folder": outside, "dangling": outside / "nothing"}
            bad.symlink_to(targets[kind])
    refused("'latents/c/0' in it is", check_tree, root)
    assert os.path.lexists(bad)
    assert (outside / "thesis.txt").read_text() == "x"


def test_a_store_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    for name, said in (("none", "there is no store"), ("\0", "there is no store"), ("file", "is a file and not")):
        with pytest.raises(StoreError, match=said) as caught:
            check_tree(tmp_path / name)
        assert caught.value.kind == "missing"


# ------------------------------------------------------------------------------------------------- chunks and bombs


def packed(data):
    return Blosc("zstd").encode(data) + b"1234"


def test_a_chunk_that_decodes_to_another_size_is_refused(tmp_path):
    path = tmp_path / "c.0"
    check_chunk(path, 4096)  # a missing chunk reads as fill values, which no digest agrees with
    noise = np.random.default_rng(0).bytes(4096)
    for data in (bytes(4096), noise):
        path.write_bytes(packed(data))
        check_chunk(path, 4096)
    for size in (1, 4095, 4097, MIB):
        path.write_bytes(packed(bytes(size)))
        refused(f"decodes to {size:,} bytes; allowed: 4,096", check_chunk, path, 4096)
    path.write_bytes(packed(noise) + bytes(8192))
    refused("it has [0-9,]+ bytes", check_chunk, path, 4096)
    for damaged in (b"", b"\x28\xb5\x2f", b"short"):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged") as caught:
            check_chunk(path, 4096)
        assert caught.value.kind == "corrupt"
    path.unlink()
    path.symlink_to(tmp_path / "x")
    refused("symbolic link", check_chunk, path, 4096)


BOMB = """
import resource, sys
from pathlib import Path
from longvid import StoreError, open_store
from longvid.store.reader import open_reader
print("torch" in sys.modules)
path = Path(sys.argv[1])
open_store(path.with_name("small.zarr")).latents[:]  # its threads have to be there before the limit
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
store = open_store(path)
try:
    store.latents[:]
except StoreError as exc:
    print(exc.kind)
try:
    store._reader.arrays["latents"][:]
except BaseException as exc:
    print(type(exc).__name__)
"""


def test_a_bomb_is_refused_where_zarr_runs_out_of_memory(tmp_path):
    for name in ("small", "bomb"):
        with writer(tmp_path / f"{name}.zarr") as store:
            for chunk in PLAN.chunks(9):
                store.write(chunk, latents_of(chunk), np.arange(chunk.frame_start, chunk.frame_stop))
    import google_crc32c

    bomb = Blosc("zstd").encode(np.zeros(256 * MIB, np.uint8))
    checksum = google_crc32c.value(bomb).to_bytes(4, "little")
    (tmp_path / "bomb.zarr" / "latents" / "c.0.0.0.0").write_bytes(bomb + checksum)
    run = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path / "bomb.zarr")], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.splitlines() == ["False", "corrupt", "MemoryError"], run.stderr


def test_a_petabyte_is_refused_before_anything_is_allocated(ours, tmp_path):
    (tmp_path / PRIVATE).mkdir(parents=True)
    root = json.loads((ours / "zarr.json").read_bytes())
    members(root)["latents"]["shape"] = [2**25, 2**10, 2**10, 2**5]
    (tmp_path / "zarr.json").write_bytes(with_checksum(root))
    refused("array 'latents' is refused: a chunk decodes to", open_store, tmp_path)
    refused("array 'latents' is refused: a chunk decodes to", open_reader, tmp_path, strict=False)
    assert math.prod(members(root)["latents"]["shape"]) == 2**50


def test_validation_needs_neither_zarr_nor_torch():
    code = "import sys, longvid.store.validation; print(sorted({'torch', 'zarr'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

"""Metadata, chunk files and names of a stranger's store: what passes opens in zarr, what does not is refused."""

import copy
import gzip
import json
import os
import socket
import subprocess
import sys
import tracemalloc
import warnings
from fractions import Fraction

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, Zstd
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from longvid.errors import StoreError
from longvid.frames import ColorInfo, SourceInfo
from longvid.schedule import ChunkSchedule
from longvid.store.latent_writer import LatentWriter
from longvid.store.validation import (
    StoreLimits,
    check_array,
    check_chunk,
    check_group,
    check_inside,
    check_size,
    check_tree,
    read_document,
)

MIB = 2**20
EXAMPLES = 160
"of fuzzed metadata; 20,000 have been tried"
SMALL = StoreLimits(max_chunk_bytes=MIB, max_slab_bytes=2 * MIB, max_whole_bytes=2 * MIB, max_chunks_at_once=64)
"limits up to which a test can read everything"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A store that longvid wrote: its path."""
    path = tmp_path_factory.mktemp("gate") / "a.zarr"
    source = SourceInfo(
        kind="video", name="a.mp4", height=15, width=23, num_frames=None, time_base=Fraction(1, 24),
        frame_rate=Fraction(24), color=ColorInfo(matrix="bt709", range="limited"), details={},
    )  # fmt: skip
    plan = ChunkSchedule()
    vae = {"class_name": "X"}
    with LatentWriter(
        path, schedule=plan, source=source, latent_shape_CYX=(16, 2, 3), representation="moments", vae=vae
    ) as store:
        for chunk in plan.chunks(30):
            latents = np.zeros((chunk.num_latents, 16, 2, 3), np.float32)
            moments = np.zeros((chunk.num_latents, 32, 2, 3), np.float32)
            store.write(chunk, latents, np.arange(chunk.frame_start, chunk.frame_stop), moments)
    return path


@pytest.fixture(scope="module")
def foreign():
    """Arrays as other writers make them, consolidated in a group: its document."""
    store = MemoryStore()
    group = zarr.create_group(store, attributes={"title": "x"})
    common = {"shape": (8, 6, 4), "dtype": "float32"}
    group.create_array("plain", **common, chunks=(2, 6, 4), compressors=None)
    group.create_array("zipped", **common, chunks=(2, 6, 4), compressors=[GzipCodec(level=3)])
    group.create_array("zstd", **common, chunks=(3, 4, 4), compressors=[ZstdCodec(level=3, checksum=True)])
    group.create_array("big_endian", **common, chunks=(2, 6, 4), serializer=BytesCodec(endian="big"))
    group.create_array("turned", **common, chunks=(2, 6, 4), filters=[TransposeCodec(order=(2, 0, 1))])
    blosc = [BloscCodec(cname="lz4", typesize=4), Crc32cCodec()]
    group.create_array("sharded", **common, chunks=(1, 3, 2), shards=(2, 6, 4), compressors=blosc)
    group.create_array("point", shape=(), dtype="int64")
    group.create_array("flag", shape=(3,), dtype="bool", chunk_key_encoding={"name": "v2", "separator": "/"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)
    return json.loads(bytes(store._store_dict["zarr.json"].to_bytes()))


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


def test_a_store_of_ours_passes_whole(ours, document):
    check_tree(ours)
    check_group(document, where="a")
    assert len(members(document)) == 8
    num_chunks = 0
    for name, member in members(document).items():
        check_array(name, read_document(ours / name / "zarr.json"), where="a")
        for path in (ours / name).glob("c.*"):
            check_chunk(path, member, where=name)
            num_chunks += 1
    assert num_chunks >= 8


def test_arrays_of_other_writers_pass(foreign):
    check_group(foreign, where="a")
    assert len(members(foreign)) == 8


def test_a_group_without_consolidated_metadata_passes():
    check_group({"zarr_format": 3, "node_type": "group", "attributes": {}}, where="a")


def test_eight_k_frames_and_a_week_of_them_pass(document):
    frames = copy.deepcopy(members(document)["latents"])
    frames |= {"data_type": "uint8", "fill_value": 0, "shape": [24 * 3600, 4320, 7680, 3]}
    frames["chunk_grid"]["configuration"]["chunk_shape"] = [1, 4320, 7680, 3]
    check_array("frames", frames, where="a")
    stamps = copy.deepcopy(members(document)["frame_pts"])
    stamps["shape"] = [7 * 24 * 3600 * 50]
    check_array("frame_pts", stamps, where="a", whole=True)


# ------------------------------------------------------------------------------------------------- what does not


def put(*path):
    """A mutation: ``put("a", 0, "b", value)`` sets ``document["a"][0]["b"]``."""
    *way, last, value = path

    def apply(document):
        for step in way:
            document = document[step]
        document[last] = value

    return apply


def codecs(*names):
    return put("codecs", [{"name": n, "configuration": {}} if isinstance(n, str) else n for n in names])


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": 2, "blocksize": 0},
}
CRC = {"name": "crc32c"}


def shards(inner, **configuration):
    settings = {"chunk_shape": [1, 16, 2, 3], "codecs": inner, "index_codecs": [LITTLE, CRC], **configuration}
    return put("codecs", [{"name": "sharding_indexed", "configuration": settings}])


REFUSED = {
    "format 2": (put("zarr_format", 2), "zarr_format is 2; allowed: 3"),
    "format true": (put("zarr_format", True), "zarr_format is True"),
    "a group": (put("node_type", "group"), "node_type is 'group'"),
    "six axes": (put("shape", [1] * 6), "6 axes; allowed: at most 5"),
    "negative": (put("shape", [-1, 16, 2, 3]), r"\[-1, 16, 2, 3\]"),
    "too long": (put("shape", [2**40 + 1, 16, 2, 3]), "lengths from 0 to"),
    "a float": (put("shape", [1.0, 16, 2, 3]), "whole numbers"),
    "a huge number": (put("shape", [10**4000, 16, 2, 3]), "a number of 13288 bits"),
    "no shape": (put("shape", None), "shape is None"),
    "petabyte": (put("shape", [2**40, 512, 2, 3]), "declares 6144.00 TiB.*at most 64.00 TiB"),
    "chunks of 0": (put("chunk_grid", "configuration", "chunk_shape", [0, 16, 2, 3]), "lengths from 1"),
    "large chunks": (put("chunk_grid", "configuration", "chunk_shape", [2**20, 16, 2, 3]), "decodes to 192.00 MiB"),
    "other axes": (put("chunk_grid", "configuration", "chunk_shape", [1, 16, 2]), "3 axes; allowed: the array's 4"),
    "rectilinear": (put("chunk_grid", "name", "rectilinear"), "'regular'"),
    "wide rows": (put("shape", [8, 2**20, 2**10, 3]), "a row of chunks has"),
    "object": (put("data_type", "object"), "dtype is 'object'"),
    "string": (put("data_type", "string"), "dtype is 'string'"),
    "structured": (put("data_type", {"name": "structured", "configuration": {}}), "dtype is"),
    "raw bytes": (put("data_type", "r16"), "dtype is 'r16'"),
    "fill of text": (put("fill_value", "0x1"), "a value of float16"),
    "fill too large": (put("fill_value", 1e300), "a value of float16"),
    "fill of true": (put("fill_value", True), "a value of float16"),
    "key encoding": (put("chunk_key_encoding", "name", "fanout"), "'default' or 'v2'"),
    "separator": (put("chunk_key_encoding", "configuration", {"separator": "../"}), r"separator is '\.\./'"),
    "transformer": (put("storage_transformers", [{"name": "x"}]), "storage transformers; allowed: none"),
    "extra field": (put("load", {"name": "x"}), "field 'load'"),
    "attributes": (put("attributes", []), "attributes are"),
    "dimension names": (put("dimension_names", ["t"]), "a list of 4 names"),
    "no codecs": (put("codecs", []), "a list of 1 to 8"),
    "no bytes": (codecs(CRC), "transposes, then bytes or shards"),
    "text for a codec": (put("codecs", ["bytes"]), "codec 'bytes'"),
    "pickle": (codecs(LITTLE, "numcodecs.pickle"), "codec 'numcodecs.pickle'; allowed: transpose, bytes"),
    "numcodecs": (codecs(LITTLE, "numcodecs.lz4"), "codec 'numcodecs.lz4'"),
    "vlen": (codecs("vlen-utf8"), "codec 'vlen-utf8'"),
    "module path": (codecs("os.system"), "codec 'os.system'"),
    "control characters": (codecs("\x1b[2J\n" + "x" * 999), r"codec '\\x1b\[2J\\nx+'"),
    "blosc alone": (codecs(LITTLE, BLOSC), "blosc followed by crc32c"),
    "blosc after crc": (codecs(LITTLE, CRC, BLOSC), "blosc followed by crc32c"),
    "two compressors": (codecs(LITTLE, "gzip", "gzip"), "one compressor"),
    "wrong order": (codecs(CRC, LITTLE), "transposes, then bytes"),
    "level": (codecs(LITTLE, {"name": "gzip", "configuration": {"level": 10}}), "level 10"),
    "setting": (codecs(LITTLE, {"name": "gzip", "configuration": {"path": "/"}}), "configured as {'path'}"),
    "transpose": (codecs({"name": "transpose", "configuration": {"order": [0, 1, 1, 3]}}, LITTLE), "all 4 axes"),
    "blosc in shards": (shards([LITTLE, BLOSC]), "blosc followed by crc32c"),
    "pickle in shards": (shards([LITTLE, {"name": "numcodecs.pickle"}]), "codec 'numcodecs.pickle'"),
    "index": (shards([LITTLE], index_codecs=[LITTLE, BLOSC, CRC]), "index are"),
    "torn shards": (shards([LITTLE], chunk_shape=[1, 5, 2, 3]), "whole chunks in a shard"),
    "wrapped shards": (
        lambda d: (shards([LITTLE])(d), d["codecs"].append({"name": "gzip", "configuration": {"level": 1}})),
        "wrapped in gzip",
    ),
}


@pytest.mark.parametrize(("mutate", "said"), REFUSED.values(), ids=REFUSED)
def test_what_no_array_should_say_is_refused(mutate, said, document):
    array = members(document)["latents"]
    array["chunk_grid"]["configuration"]["chunk_shape"] = [1, 16, 2, 3]
    check_array("latents", array, where="a")
    mutate(array)
    refused(said, check_array, "latents", array, where="a")
    refused(f"^a: array 'latents' is refused: .*{said}", check_group, document, where="a")


def test_shards_of_shards_end(document):
    array = members(document)["latents"]
    array["chunk_grid"]["configuration"]["chunk_shape"] = [1, 16, 2, 3]
    shards([LITTLE])(array)
    for depth in range(1, 4):
        if depth > 2:
            refused("2 levels", check_array, "latents", array, where="a")
        else:
            check_array("latents", array, where="a")
        shards(array["codecs"])(array)


def test_too_many_parts_are_refused(document):
    stamps = members(document)["frame_pts"]
    stamps["shape"] = [2**26]
    refused("is read whole and has 512.00 MiB", check_group, document, where="a")
    stamps["shape"] = [2**20]
    stamps["chunk_grid"]["configuration"]["chunk_shape"] = [16]
    refused("65,536 chunks; allowed: at most 16,384", check_group, document, where="a")
    stamps["chunk_grid"]["configuration"]["chunk_shape"] = [2**20]
    inner = {"chunk_shape": [16], "codecs": [LITTLE]}
    stamps["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
    refused("65,536 chunks; allowed: at most 16,384", check_group, document, where="a")


def test_groups_are_limited(document):
    member = members(document)["t"]
    document["consolidated_metadata"]["metadata"] = {f"a{i}": member for i in range(64)}
    check_group(document, where="a")
    members(document)["a64"] = member
    refused("65 arrays; allowed: at most 64", check_group, document, where="a")
    for key, value in (("kind", "elsewhere"), ("metadata", []), ("url", "http://x")):
        other = copy.deepcopy(document)
        other["consolidated_metadata"][key] = value
        refused("consolidated metadata", check_group, other, where="a")
    refused("16,777,217 bytes", check_size, 16 * MIB + 1, where="a")
    check_size(16 * MIB, where="a")


# ------------------------------------------------------------------------------------------------- fuzzing

WORDS = (
    "NaN Infinity 0x7e00 0 .. bytes zstd blosc gzip crc32c transpose float64 int8 uint64 bool complex64 string v2 "
    "default / . big start group inline"
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**40, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 0.5]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(WORDS.split()),
    st.lists(st.integers(0, 9), max_size=5),
    st.sampled_from([{}, [], {"must_understand": False}, {"name": "zstd", "configuration": {}}, LITTLE, CRC, BLOSC]),
)


def places(node, path=()):
    yield path
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


def at(node, path):
    for step in path:
        node = node[step]
    return node


def mutated(document, draw):
    """A copy in which one to three places were set, nudged, deleted, copied from elsewhere, or given more."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        found = [path for path in places(document) if path and "attributes" not in path[:-1]]
        numbers = [path for path in found if type(at(document, path)) is int]
        if not found:
            break
        action = draw(st.sampled_from(["set", "set", "nudge", "nudge", "delete", "add", "copy"]))
        *way, last = draw(st.sampled_from(numbers if action == "nudge" and numbers else found))
        parent = at(document, way)
        match action:
            case "nudge" if numbers:
                parent[last] = max(0, parent[last] * draw(st.integers(1, 20)) + draw(st.integers(-1, 1)))
            case "set":
                parent[last] = draw(VALUES)
            case "delete":
                del parent[last]
            case "copy":
                parent[last] = copy.deepcopy(at(document, draw(st.sampled_from(found))))
            case _ if isinstance(parent, dict):
                parent[draw(st.text(max_size=3))] = draw(VALUES)
            case _:
                parent.append(draw(VALUES))
    return document


def read_everything(content):
    """Open a group from the bytes of its metadata and read as readers do; the most that was allocated, in bytes."""
    store = MemoryStore({"zarr.json": zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(content)})
    tracemalloc.start()
    try:
        for name, array in zarr.open_group(store, mode="r", zarr_format=3).arrays():
            if name in ("latents", "moments", "frames") and array.ndim:
                array[: array.chunks[0]]
            else:
                array[...]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_fuzzed_metadata_are_refused_or_open_in_bounds(ours, foreign):
    seeds = [read_document(ours / "zarr.json"), foreign]
    outcomes = {"passed": 0, "refused": 0}

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def fuzz(data):
        document = mutated(data.draw(st.sampled_from(seeds)), data.draw)
        error = error_of(lambda: check_group(document, where="a", limits=SMALL))
        if error is not None:
            assert error.kind == "refused"
            assert len(str(error)) < 1000
            assert str(error).isprintable()
            outcomes["refused"] += 1
            return
        assert read_everything(json.dumps(document).encode()) < 16 * MIB
        outcomes["passed"] += 1

    fuzz()
    assert min(outcomes.values()) > EXAMPLES // 8, outcomes


def test_fuzzed_bytes_are_a_document_or_a_store_error(ours, tmp_path):
    content = (ours / "zarr.json").read_bytes()
    path, rng, damaged = tmp_path / "zarr.json", np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(changed)))
            changed[start : start + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 5)))
        path.write_bytes(changed[: int(rng.integers(len(changed)))] if rng.random() < 0.2 else changed)
        error = error_of(lambda: check_group(read_document(path), where="a"))
        if error is not None:
            assert error.kind in ("corrupt", "refused")
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
        (b" " * (16 * MIB + 1), "refused", "16,777,217 bytes"),
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
    refused("is a folder|not a regular file", read_document, tmp_path)
    (tmp_path / "zarr.json").symlink_to(ours / "zarr.json")
    refused("symbolic link", read_document, tmp_path / "zarr.json")
    os.mkfifo(tmp_path / "fifo")
    refused("not a regular file", read_document, tmp_path / "fifo")  # opening it would wait for a writer


NAMES = [
    *("", ".", "..", "../x", "a/../b", "/etc/passwd", "a/b", "a//b", "a\\b", "..\\x", "C:x", "C:\\x"),
    *("a\0b", "a\nb", "a\x1bb", "a\x7f", "a\u202eb", "a\u2028", "\ud800", "x" * 256, "é" * 128),
    *("zarr.json", ".longvid", "__x", "a ", "a.", " a", "a|", "a*"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_could_leave_the_store_are_refused(name, document):
    member = members(document)["t"]
    refused("name", check_array, name, member, where="a")
    members(document)[name] = member
    refused("name", check_group, document, where="a")


@pytest.mark.parametrize("name", ["latents", "a b", "größe", "x" * 255, "a..b", "-a"])
def test_plain_names_pass(name, document):
    check_array(name, members(document)["t"], where="a")


def test_a_path_stays_inside(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "a" / "dangling").symlink_to(outside / "nothing")
    (tmp_path / "way").symlink_to(root)
    assert check_inside(root, "a/b/c") == root / "a" / "b" / "c"
    assert check_inside(root, ".longvid") == root / ".longvid"
    assert check_inside(tmp_path / "way", "a") == tmp_path / "way" / "a"
    for name in ("link", "link/x", "a/dangling"):
        refused("symbolic link", check_inside, root, name)
    allowed = {"a/b", "zarr.json", ".longvid", "__x"}
    for name in set(NAMES) - allowed:
        refused("name", check_inside, root, name)


def test_a_store_of_many_files_is_looked_through_folder_by_folder(tmp_path, monkeypatch):
    """One call for each folder and none for each file: 20,000 files take milliseconds."""
    for i in range(20):
        (tmp_path / f"a{i}").mkdir()
        for j in range(100):
            os.close(os.open(tmp_path / f"a{i}" / str(j), os.O_CREAT | os.O_WRONLY))
    calls = []
    for name in ("scandir", "stat", "lstat", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, real=real, name=name, **kw: (calls.append(name), real(*args, **kw))[1]
        )
    check_tree(tmp_path)
    monkeypatch.undo()
    assert len(calls) <= 2 * 21
    (tmp_path / "a7" / "99").unlink()
    (tmp_path / "a7" / "99").symlink_to("98")
    refused(r"'a7/99' in it is a symbolic link", check_tree, tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "loop", "fifo", "socket"])
def test_what_is_neither_file_nor_folder_is_refused_and_left_alone(kind, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "latents" / "c").mkdir(parents=True)
    outside.mkdir()
    (outside / "thesis.txt").write_text("x")
    bad = root / "latents" / "c" / "0"
    match kind:
        case "fifo":
            os.mkfifo(bad)
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            os.chdir(bad.parent)
            server.bind("0")
            server.close()
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
    for name in ("none", "file"):
        with pytest.raises(StoreError, match="no folder") as caught:
            check_tree(tmp_path / name)
        assert caught.value.kind == "missing"


# ------------------------------------------------------------------------------------------------- chunks and bombs


def array_of(codec, chunk=4096):
    store = MemoryStore()
    array = zarr.create_array(store, shape=(chunk,), chunks=(chunk,), dtype="uint8", compressors=codec)
    return json.loads(json.dumps(array.metadata.to_dict()))


COMPRESS = {
    "gzip": (GzipCodec(level=1), lambda data: gzip.compress(data, 1)),
    "zstd": (ZstdCodec(), lambda data: Zstd(1).encode(data)),
    "blosc": ([BloscCodec(typesize=1), Crc32cCodec()], lambda data: Blosc("zstd").encode(data) + b"1234"),
}


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_chunk_that_decodes_to_another_size_is_refused(codec, tmp_path):
    settings, compress = COMPRESS[codec]
    document, path = array_of(settings), tmp_path / "c.0"
    check_chunk(path, document, where="a")  # fill values
    noise = np.random.default_rng(0).bytes(4096)
    for data in (bytes(4096), noise):
        path.write_bytes(compress(data))
        check_chunk(path, document, where="a")
    for size in (1, 4095, 4097, MIB):
        path.write_bytes(compress(bytes(size)))
        refused(
            f"the chunk c.0 decodes to (more than )?{size:,}" if size < 4096 else "decodes to",
            check_chunk,
            path,
            document,
            where="a",
        )
    path.write_bytes(compress(noise) + bytes(8192))
    refused("the chunk c.0 has", check_chunk, path, document, where="a")
    for damaged in (b"", b"\x28\xb5\x2f", b"not compressed"):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged") as caught:
            check_chunk(path, document, where="a")
        assert caught.value.kind == "corrupt"


def test_members_of_gzip_add_up_and_a_torn_one_is_damaged(tmp_path):
    document, path = array_of(GzipCodec(level=1)), tmp_path / "c.0"
    half = gzip.compress(bytes(2048))
    path.write_bytes(half + half)
    check_chunk(path, document, where="a")
    path.write_bytes(half + half + half)
    refused("decodes to more than", check_chunk, path, document, where="a")
    path.write_bytes(gzip.compress(np.random.default_rng(0).bytes(4096))[:-100])
    with pytest.raises(StoreError, match="is not gzip"):
        check_chunk(path, document, where="a")


def test_zstd_sizes_of_every_width_are_read(tmp_path):
    for chunk in (1, 255, 256, 65_791, 65_792, 200_000):
        document, path = array_of(ZstdCodec(), chunk), tmp_path / "c.0"
        path.write_bytes(Zstd(1).encode(bytes(chunk)))
        check_chunk(path, document, where="a")
        path.write_bytes(Zstd(1).encode(bytes(chunk + 1)))
        refused(f"decodes to {chunk + 1:,} bytes", check_chunk, path, document, where="a")


def test_uncompressed_chunks_and_links(tmp_path):
    document, path = array_of(None), tmp_path / "c.0"
    path.write_bytes(bytes(4096))
    check_chunk(path, document, where="a")
    (tmp_path / "c.1").symlink_to(path)
    refused("symbolic link", check_chunk, tmp_path / "c.1", document, where="a")


BOMBS = """
import json, resource, sys
from pathlib import Path
import numpy, zarr
from longvid.errors import StoreError
from longvid.store.validation import check_array, check_chunk, read_document
print("torch" in sys.modules)
folder = Path(sys.argv[1])
zarr.open_array(folder / "small", mode="r")[:]  # its threads have to be there before the limit
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
for path in sorted(p for p in folder.iterdir() if p.name != "small"):
    try:
        document = read_document(path / "zarr.json")
        check_array(path.name, document, where="bomb")
        check_chunk(path / "c" / "0", document, where="bomb")
        gate = "passed"
    except StoreError as exc:
        gate = exc.kind
    try:
        zarr.open_array(path, mode="r")[:]
        plain = "read"
    except BaseException as exc:
        plain = type(exc).__name__
    print(path.name, gate, plain)
"""


def test_bombs_are_refused_where_zarr_runs_out_of_memory(tmp_path):
    zeros = np.zeros(256 * MIB, np.uint8)

    def make(name, chunk, content=None, codec=None, shape=None):
        document = array_of(codec, chunk)
        document["shape"] = [shape or chunk]
        (tmp_path / name / "c").mkdir(parents=True)
        (tmp_path / name / "zarr.json").write_text(json.dumps(document))
        if content is not None:
            (tmp_path / name / "c" / "0").write_bytes(content)
        return sum(p.stat().st_size for p in (tmp_path / name).rglob("*") if p.is_file())

    zstd = Zstd(1).encode(zeros)
    assert make("honest", 256 * MIB, zstd, ZstdCodec()) < 40_000
    assert make("liar", 4096, zstd, ZstdCodec()) > 0
    assert make("zipped", 8 * MIB, gzip.compress(zeros, 1), GzipCodec()) > 0
    assert make("petabyte", MIB, shape=2**50) < 1000
    make("small", 4096, bytes(4096))
    run = subprocess.run([sys.executable, "-c", BOMBS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == [
        "False",
        "honest refused MemoryError",
        "liar refused MemoryError",
        "petabyte refused MemoryError",
        "zipped refused MemoryError",
    ], run.stderr


def test_the_gate_needs_neither_zarr_nor_torch():
    code = "import sys, longvid.store.validation; print(sorted({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

"""What a zarr store of a stranger may say: looked at before zarr sees it. Imports neither zarr nor torch.

A metadata document of a few hundred bytes can claim a petabyte, name a codec that runs code, or point out of its own
folder; a chunk file can decode to far more than its array declares, or be a link to another place. Each check here
either passes or raises :class:`~longvid.errors.StoreError`: kind ``"refused"`` for what no store should have, kind
``"corrupt"`` for what is no metadata at all. A document that passes opens in zarr, and what zarr then allocates is
within :class:`StoreLimits`.

A reader calls, in this order, :func:`check_tree` once, :func:`read_document` and :func:`check_group` or
:func:`check_array` for the metadata, and :func:`check_chunk` before it reads a chunk file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from longvid.errors import StoreError
from longvid.units import format_bytes

__all__ = [
    "StoreLimits",
    "check_array",
    "check_chunk",
    "check_group",
    "check_inside",
    "check_size",
    "check_tree",
    "read_document",
]

MIB = 2**20
_SLICED = frozenset({"latents", "moments", "frames"})
"members that readers take in slices; they read any other whole"
_ITEM_BYTES = {
    "bool": 1,
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": 2,
    "float32": 4,
    "float64": 8,
}
"dtypes that are allowed"
_LARGEST = {"float16": 65504.0, "float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}
_SPECIAL_FLOATS = ("NaN", "Infinity", "-Infinity")
_COMPRESSORS = ("blosc", "zstd", "gzip")
_CODECS = ("transpose", "bytes", "sharding_indexed", *_COMPRESSORS, "crc32c")
_SETTINGS: dict[str, dict[str, Any]] = {
    "bytes": {"endian": ("little", "big")},
    "blosc": {
        "cname": ("lz4", "lz4hc", "blosclz", "snappy", "zlib", "zstd"),
        "clevel": range(10),
        "shuffle": ("noshuffle", "shuffle", "bitshuffle"),
        "typesize": range(1, 256),
        "blocksize": range(2**31),
    },
    "zstd": {"level": range(-131072, 23), "checksum": (False, True)},
    "gzip": {"level": range(10)},
    "crc32c": {},
}
"what codecs may be told"
_GROUP_KEYS = frozenset({"zarr_format", "node_type", "attributes", "consolidated_metadata"})
_ARRAY_KEYS = frozenset(
    {
        *("zarr_format", "node_type", "attributes", "shape", "data_type", "chunk_grid", "chunk_key_encoding"),
        *("fill_value", "codecs", "dimension_names", "storage_transformers"),
    }
)
_MAX_CODECS = 8
_MAX_SHARD_DEPTH = 2
_MAX_DOCUMENT_DEPTH = 64
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """How much a store may declare. The defaults hold 8K frames and weeks of video."""

    max_document_bytes: int = 16 * MIB
    "of one ``zarr.json``"
    max_members: int = 64
    "arrays of a group"
    max_axes: int = 5
    max_length: int = 2**40
    "of one axis"
    max_chunk_bytes: int = 128 * MIB
    "of one chunk or shard, decoded; an 8K frame of 8-bit RGB has 95 MiB"
    max_slab_bytes: int = 1024 * MIB
    "of the chunks at one place of the first axis, decoded: what reading one row can take"
    max_array_bytes: int = 64 * 2**40
    "of one array, decoded"
    max_whole_bytes: int = 256 * MIB
    "of an array that is read whole, such as time stamps"
    max_chunks_at_once: int = 2**14
    "chunks of a slab, or of an array that is read whole, those in shards counted"


# ------------------------------------------------------------------------------------------------- documents


def check_size(num_bytes: int, *, where: str, limits: StoreLimits = StoreLimits()) -> None:
    """Refuse a metadata document by its size.

    Raises:
        StoreError: kind ``"refused"``.
    """
    if num_bytes > limits.max_document_bytes:
        _refuse(where, f"its metadata has {num_bytes:,} bytes", f"at most {limits.max_document_bytes:,}")


def read_document(path: Path, *, limits: StoreLimits = StoreLimits()) -> dict[str, Any]:
    """Read a metadata file: a regular file, not reached through a link in its place, that holds a JSON object.

    Raises:
        StoreError: kind ``"missing"``, ``"refused"``, ``"corrupt"`` or, if the system cannot read it, ``"other"``.
    """
    where = str(path)
    content = _read_regular(path, limits.max_document_bytes + 1)
    check_size(len(content), where=where, limits=limits)
    try:
        document = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise StoreError(f"{where} is damaged: it is not JSON ({exc})", kind="corrupt") from exc
    if not isinstance(document, dict):
        raise StoreError(f"{where} is damaged: it holds a {type(document).__name__}, not an object", kind="corrupt")
    if _is_deeper(document, _MAX_DOCUMENT_DEPTH):
        _refuse(where, "its metadata is nested deeper", f"{_MAX_DOCUMENT_DEPTH} levels")
    return document


def _read_regular(path: Path, max_bytes: int) -> bytes:
    # Without O_NONBLOCK, to open a FIFO would wait for somebody to write into it.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                _refuse(str(path), "it is not a regular file", "files and folders")
            return file.read(max_bytes)
    except StoreError:
        raise
    except FileNotFoundError as exc:
        raise StoreError(f"there is no {path}", kind="missing") from exc
    except ValueError as exc:  # a zero byte in the name
        raise StoreError(f"{str(path)!r} cannot be a path: {exc}", kind="refused") from exc
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR):
            kind = "a folder" if exc.errno == errno.EISDIR else "a symbolic link"
            raise StoreError(f"{path} is {kind}; a store has a file there", kind="refused") from exc
        raise StoreError(f"{path} cannot be read: {exc.strerror}", kind="other") from exc


def _is_deeper(document: Any, levels: int) -> bool:
    layer = [document]
    for _ in range(levels):
        layer = [
            value
            for node in layer
            for value in (node.values() if isinstance(node, dict) else node)
            if isinstance(value, (dict, list))
        ]
        if not layer:
            return False
    return True


# ------------------------------------------------------------------------------------------------- metadata


def check_group(document: Mapping[str, Any], *, where: str, limits: StoreLimits = StoreLimits()) -> None:
    """Look at a root group's metadata, and at those of its arrays if they are consolidated in it.

    Args:
        document: what ``zarr.json`` holds.
        where: the store, for messages.
        limits: how much it may declare.

    Raises:
        StoreError: kind ``"refused"``; the message names the array, what it has and what is allowed.
    """
    _check_node(document, "group", _GROUP_KEYS, where)
    consolidated = document.get("consolidated_metadata")
    if consolidated is None:
        return
    if not isinstance(consolidated, dict) or set(consolidated) - {"kind", "must_understand", "metadata"}:
        _refuse(where, f"its consolidated metadata are {_shown(consolidated)}", "kind, must_understand and metadata")
    if consolidated.get("kind") != "inline":
        _refuse(where, f"its consolidated metadata are of kind {_shown(consolidated.get('kind'))}", "'inline'")
    members = consolidated.get("metadata")
    if not isinstance(members, dict):
        _refuse(where, f"its consolidated metadata hold {_shown(members)}", "an object of arrays by name")
    if len(members) > limits.max_members:
        _refuse(where, f"it has {len(members):,} arrays", f"at most {limits.max_members}")
    for name, member in members.items():
        check_array(name, member, where=where, limits=limits, whole=name not in _SLICED)


def check_array(
    name: str,
    document: Any,
    *,
    where: str,
    limits: StoreLimits = StoreLimits(),
    whole: bool = False,
) -> None:
    """Look at the metadata of one array.

    Args:
        name: of the array in its group.
        document: what its ``zarr.json`` holds.
        where: the store, for messages.
        limits: how much it may declare.
        whole: whether it is going to be read in one piece.

    Raises:
        StoreError: kind ``"refused"``; the message names the array, what it has and what is allowed.
    """
    _check_name(name, where)
    where = f"{where}: array {name!r}"
    _check_node(document, "array", _ARRAY_KEYS, where)
    shape = _lengths(document.get("shape"), where, "its shape", limits, least=0)
    dtype = document.get("data_type")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _refuse(where, f"its dtype is {_shown(dtype)}", ", ".join(_ITEM_BYTES))
    _check_fill(document.get("fill_value"), dtype, where)
    chunk = _chunk_shape(document.get("chunk_grid"), len(shape), where, limits)
    _check_key_encoding(document.get("chunk_key_encoding"), where)
    names = document.get("dimension_names")
    if names is not None and not (
        isinstance(names, list) and len(names) == len(shape) and all(n is None or isinstance(n, str) for n in names)
    ):
        _refuse(where, f"its dimension names are {_shown(names)}", f"a list of {len(shape)} names")
    if document.get("storage_transformers") not in (None, []):
        _refuse(where, "it has storage transformers", "none")
    parts = _check_codecs(document.get("codecs"), chunk, where, limits)
    _check_amounts(shape, chunk, parts, _ITEM_BYTES[dtype], whole, where, limits)


def _check_node(document: Any, node_type: str, keys: frozenset[str], where: str) -> None:
    if not isinstance(document, Mapping):
        _refuse(where, f"its metadata are {_shown(document)}", "a JSON object")
    version = document.get("zarr_format")
    if type(version) is not int or version != 3:
        _refuse(where, f"its zarr_format is {_shown(version)}", "3")
    if document.get("node_type") != node_type:
        _refuse(where, f"its node_type is {_shown(document.get('node_type'))}", repr(node_type))
    attributes = document.get("attributes")
    if attributes is not None and not isinstance(attributes, dict):
        _refuse(where, f"its attributes are {_shown(attributes)}", "a JSON object")
    for key, value in document.items():
        optional = node_type == "array" and isinstance(value, dict) and value.get("must_understand") is False
        if key not in keys and not optional:
            _refuse(where, f"its metadata have the field {_shown(key)}", ", ".join(sorted(keys)))


def _check_amounts(
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    parts: int,
    item: int,
    whole: bool,
    where: str,
    limits: StoreLimits,
) -> None:
    """What is declared in all, and what a reader has to hold at once; ``parts`` are the chunks of a shard."""
    total, decoded = math.prod(shape) * item, math.prod(chunk) * item
    counts = [-(-length // step) for length, step in zip(shape, chunk, strict=True)]
    if total > limits.max_array_bytes:
        _refuse(
            where,
            f"it declares {format_bytes(total)}, {_times(shape)}",
            f"at most {format_bytes(limits.max_array_bytes)}",
        )
    if decoded > limits.max_chunk_bytes:
        _refuse(
            where,
            f"a chunk decodes to {format_bytes(decoded)}, {_times(chunk)}",
            f"{format_bytes(limits.max_chunk_bytes)}",
        )
    if whole:
        what, at_once, most = "it is read whole and", total, limits.max_whole_bytes
        num_chunks = math.prod(counts) * parts
    else:
        extent = [count * step for count, step in zip(counts, chunk, strict=True)]
        what, at_once, most = "a row of chunks", math.prod((*chunk[:1], *extent[1:])) * item, limits.max_slab_bytes
        num_chunks = math.prod(counts[1:]) * parts
    if at_once > most:
        _refuse(where, f"{what} has {format_bytes(at_once)}", f"at most {format_bytes(most)}")
    if num_chunks > limits.max_chunks_at_once:
        _refuse(where, f"{what} has {num_chunks:,} chunks", f"at most {limits.max_chunks_at_once:,}")


def _lengths(value: Any, where: str, what: str, limits: StoreLimits, *, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        _refuse(where, f"{what} is {_shown(value)}", "a list of whole numbers")
    if len(value) > limits.max_axes:
        _refuse(where, f"{what} has {len(value)} axes", f"at most {limits.max_axes}")
    if not all(least <= n <= limits.max_length for n in value):
        _refuse(where, f"{what} is {_shown(value)}", f"lengths from {least} to {limits.max_length:,}")
    return tuple(value)


def _chunk_shape(grid: Any, num_axes: int, where: str, limits: StoreLimits) -> tuple[int, ...]:
    if not isinstance(grid, dict) or grid.get("name") != "regular":
        _refuse(where, f"its chunk grid is {_shown(grid)}", "'regular'")
    shape = _configuration(grid, "chunk grid", {"chunk_shape"}, where).get("chunk_shape")
    chunk = _lengths(shape, where, "its chunk shape", limits, least=1)
    if len(chunk) != num_axes:
        _refuse(where, f"its chunks have {len(chunk)} axes", f"the array's {num_axes}")
    return chunk


def _check_key_encoding(encoding: Any, where: str) -> None:
    if not isinstance(encoding, dict) or encoding.get("name") not in ("default", "v2"):
        _refuse(where, f"its chunk key encoding is {_shown(encoding)}", "'default' or 'v2'")
    configuration = _configuration(encoding, "chunk key encoding", {"separator"}, where)
    if configuration.get("separator", "/") not in (".", "/"):
        _refuse(where, f"its chunk key separator is {_shown(configuration['separator'])}", "'.' or '/'")


def _configuration(named: Mapping[str, Any], what: str, keys: Iterable[str], where: str) -> dict[str, Any]:
    """The configuration of something with a name; empty if it has none."""
    if set(named) - {"name", "configuration"}:
        _refuse(where, f"its {what} has the fields {_shown(sorted(named))}", "name and configuration")
    configuration = named.get("configuration", {})
    if not isinstance(configuration, dict) or set(configuration) - set(keys):
        _refuse(where, f"its {what} is configured as {_shown(configuration)}", ", ".join(sorted(keys)) or "nothing")
    return configuration


def _check_fill(fill: Any, dtype: str, where: str) -> None:
    if dtype == "bool":
        good = isinstance(fill, bool)
    elif dtype in _LARGEST:
        finite = type(fill) in (int, float) and not (isinstance(fill, float) and not math.isfinite(fill))
        good = fill in _SPECIAL_FLOATS if isinstance(fill, str) else finite and abs(fill) <= _LARGEST[dtype]
    else:
        bits = 8 * _ITEM_BYTES[dtype]
        low, high = (0, 2**bits) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        good = type(fill) is int and low <= fill < high
    if not good:
        _refuse(where, f"its fill value is {_shown(fill)}", f"a value of {dtype}")


# ------------------------------------------------------------------------------------------------- codecs


def _check_codecs(codecs: Any, chunk: tuple[int, ...], where: str, limits: StoreLimits, shards: int = 0) -> int:
    """A chain of codecs: transposes, then one that makes bytes, then at most one compressor, and checksums.

    Returns:
        How many chunks there are in a chunk: those of a shard, otherwise 1.
    """
    if not isinstance(codecs, list) or not 1 <= len(codecs) <= _MAX_CODECS:
        _refuse(where, f"its codecs are {_shown(codecs)}", f"a list of 1 to {_MAX_CODECS}")
    names, parts = [], 1
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(codec, dict) or name not in _CODECS:
            _refuse(where, f"it needs the codec {_shown(name)}", ", ".join(_CODECS))
        names.append(str(name))
        if name == "sharding_indexed":
            parts = _check_sharding(codec, chunk, where, limits, shards + 1)
        else:
            _check_settings(codec, len(chunk), where)
    order = [0 if n == "transpose" else 1 if n in ("bytes", "sharding_indexed") else 2 for n in names]
    if order != sorted(order) or order.count(1) != 1:
        _refuse(where, f"its codecs are {', '.join(names)}", "transposes, then bytes or shards, then compression")
    if "sharding_indexed" in names and len(names) > 1:
        _refuse(where, f"its shards are wrapped in {', '.join(n for n in names if 'shard' not in n)}", "bare shards")
    if sum(n in _COMPRESSORS for n in names) > 1:
        _refuse(where, f"its codecs are {', '.join(names)}", "one compressor")
    if "blosc" in names and names[-1] != "crc32c":
        # blosc reads past the end of a chunk that was cut short; a checksum is compared before it sees a byte
        _refuse(where, "it has blosc without a checksum", "blosc followed by crc32c")
    return parts


def _check_sharding(
    codec: Mapping[str, Any], shard: tuple[int, ...], where: str, limits: StoreLimits, depth: int
) -> int:
    if depth > _MAX_SHARD_DEPTH:
        _refuse(where, "it has shards within shards within shards", f"{_MAX_SHARD_DEPTH} levels")
    keys = {"chunk_shape", "codecs", "index_codecs", "index_location"}
    configuration = _configuration(codec, "codec sharding_indexed", keys, where)
    inner = _lengths(configuration.get("chunk_shape"), where, "the chunk shape in its shards", limits, least=1)
    if len(inner) != len(shard) or any(s % c for s, c in zip(shard, inner, strict=True)):
        _refuse(where, f"its shards are {_times(shard)} with chunks of {_times(inner)}", "whole chunks in a shard")
    count = math.prod(s // c for s, c in zip(shard, inner, strict=True))
    if configuration.get("index_location", "end") not in ("start", "end"):
        _refuse(where, f"its shard index is at {_shown(configuration['index_location'])}", "'start' or 'end'")
    index = configuration.get("index_codecs", [])
    if not isinstance(index, list):
        _refuse(where, f"the codecs of its shard index are {_shown(index)}", "bytes, crc32c")
    names = [c.get("name") if isinstance(c, dict) else c for c in index]
    if "index_codecs" in configuration and names not in (["bytes"], ["bytes", "crc32c"]):
        _refuse(where, f"the codecs of its shard index are {_shown(names)}", "bytes, crc32c")
    for inner_codec in index:
        _check_settings(inner_codec, len(shard), where)
    if "codecs" in configuration:
        count *= _check_codecs(configuration["codecs"], inner, where, limits, depth)
    return count


def _check_settings(codec: Mapping[str, Any], num_axes: int, where: str) -> None:
    """The configuration of a codec that is not sharding."""
    name = codec["name"]
    allowed = {"order": range(num_axes)} if name == "transpose" else _SETTINGS[name]
    if "configuration" not in codec and name not in ("bytes", "crc32c"):
        _refuse(where, f"its codec {name} has no configuration", ", ".join(allowed))
    configuration = _configuration(codec, f"codec {name}", allowed, where)
    if name == "transpose":
        order = configuration.get("order")
        if not isinstance(order, list) or any(type(n) is not int for n in order) or sorted(order) != [*range(num_axes)]:
            _refuse(where, f"its codec transpose has the order {_shown(order)}", f"one of all {num_axes} axes")
        return
    for key, value in configuration.items():
        if type(value) is not type(allowed[key][0]) or value not in allowed[key]:
            _refuse(where, f"its codec {name} has {key} {_shown(value)}", _shown(allowed[key]))


def check_chunk(path: Path, document: Mapping[str, Any], *, where: str) -> None:
    """Refuse a chunk file that is not a regular file, or that decodes to another size than its array declares.

    Decoders take the size from the file and allocate it, whatever the metadata say. Looks at the first bytes only,
    except for gzip, which says nothing there and is decoded into a buffer of 64 KiB. What is inside of shards is not
    looked at. A file that is not there is no error: its chunk is fill values.

    Args:
        path: the chunk's file.
        document: metadata of the array, which have passed :func:`check_array`.
        where: the array, for messages.

    Raises:
        StoreError: kind ``"refused"``, or ``"corrupt"`` if the file does not start as its codec says.
    """
    chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
    expected = math.prod(chunk) * _ITEM_BYTES[document["data_type"]]
    names = [codec["name"] for codec in document["codecs"]]
    if "sharding_indexed" in names:
        return
    compressor = next((name for name in names if name in _COMPRESSORS), None)
    most_stored = expected + expected // 8 + 4096  # a compressor adds less to what it cannot compress
    try:
        content = _read_regular(path, most_stored + 1 if compressor == "gzip" else 32)
    except StoreError as exc:
        if exc.kind == "missing":
            return
        raise
    stored = os.stat(path, follow_symlinks=False).st_size
    if stored > most_stored:
        _refuse(where, f"the chunk {path.name} has {stored:,} bytes", f"at most {most_stored:,}")
    if compressor is None:
        return
    size = {"blosc": _blosc_size, "zstd": _zstd_size, "gzip": _gzip_size}[compressor](content, expected)
    if size is None:
        raise StoreError(f"{where}: the chunk {path.name} is damaged: it is not {compressor}", kind="corrupt")
    if size != expected:
        more = "more than " if compressor == "gzip" and size > expected else ""
        _refuse(where, f"the chunk {path.name} decodes to {more}{size:,} bytes", f"{expected:,}")


def _blosc_size(content: bytes, expected: int) -> int | None:
    return int.from_bytes(content[4:8], "little") if len(content) >= 16 else None


def _zstd_size(content: bytes, expected: int) -> int | None:
    """Content size of the first frame (RFC 8878, section 3.1.1.1), 0 if it does not say."""
    if len(content) < 9 or content[:4] != b"\x28\xb5\x2f\xfd":
        return None
    single, size_flag, dictionary_flag = content[4] >> 5 & 1, content[4] >> 6, content[4] & 3
    start = 5 + (1 - single) + (0, 1, 2, 4)[dictionary_flag]
    length = (single, 2, 4, 8)[size_flag]
    return int.from_bytes(content[start : start + length], "little") + (256 if length == 2 else 0)


def _gzip_size(content: bytes, expected: int) -> int | None:
    """Bytes that come out, counted until they are more than expected."""
    size, rest = 0, content
    while rest[:2] == b"\x1f\x8b":
        decoder = zlib.decompressobj(wbits=31)
        try:
            while not decoder.eof and size <= expected:
                piece = decoder.decompress(rest, 65536)
                rest = decoder.unconsumed_tail
                size += len(piece)
                if not piece and not rest:
                    return None
        except zlib.error:
            return None
        if size > expected:
            break
        rest = decoder.unused_data
    return size if content[:2] == b"\x1f\x8b" else None


# ------------------------------------------------------------------------------------------------- paths


def check_inside(root: Path, name: str) -> Path:
    """The path of ``name`` in ``root``, if it is there and nowhere else.

    Args:
        root: a folder that the caller trusts; may itself be a link.
        name: a name, or several with ``/`` between them. It need not exist.

    Raises:
        StoreError: kind ``"refused"``: an absolute name, a step upward, an empty or unprintable part, or a part that
            is a symbolic link.
    """
    if not isinstance(name, str) or not name:
        _refuse(str(root), f"the name {_shown(name)}", "a name of something in it")
    path = root
    for part in name.split("/"):
        _check_part(part, name, str(root))
        path = path / part
        if path.is_symlink():
            _refuse(str(root), f"{path.name!r} in it is a symbolic link", "files and folders")
    return path


def check_tree(root: Path) -> None:
    """Refuse a store that holds anything but files and folders: links lead out of it, a FIFO never ends.

    Raises:
        StoreError: kind ``"refused"``; ``"missing"`` if there is no such folder.
    """
    waiting = [os.fspath(root)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        kind = "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"
                        inside = os.path.relpath(entry.path, root)
                        _refuse(str(root), f"{inside!r} in it is {kind}", "files and folders")
        except (FileNotFoundError, NotADirectoryError) as exc:
            if folder == os.fspath(root):
                raise StoreError(f"there is no folder {root}", kind="missing") from exc
            # a run that writes the store has taken it away
        except StoreError:
            raise
        except OSError as exc:
            raise StoreError(f"{folder} cannot be read: {exc.strerror}", kind="other") from exc


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str):
        _refuse(where, f"an array has the name {_shown(name)}", "text")
    _check_part(name, name, where)
    if name.startswith((".", "__")) or name == "zarr.json":
        _refuse(where, f"an array has the name {_shown(name)}", "names that zarr and longvid do not use themselves")


def _check_part(part: str, name: str, where: str) -> None:
    if (
        part in ("", ".", "..")
        or any(c in '/\\:*?"<>|' for c in part)
        or part[-1] in " ."
        or part[0] == " "
        or not part.isprintable()
        or len(part.encode()) > _MAX_NAME_BYTES
    ):
        _refuse(where, f"the name {_shown(name)}", "plain names that stay inside of the folder")


# ------------------------------------------------------------------------------------------------- messages


def _refuse(where: str, what: str, allowed: str) -> NoReturn:
    raise StoreError(f"{where} is refused: {what}; allowed: {allowed}", kind="refused")


def _shown(value: Any, *, inner: bool = False) -> str:
    """As text that is short, on one line and harmless to print, however large the value is."""
    if isinstance(value, (dict, list, tuple)):
        brackets = "{}" if isinstance(value, dict) else "[]"
        shown = ["..."] if inner and value else [_shown(v, inner=True) for v in list(value)[:6]]
        text = brackets[0] + ", ".join(shown + (["..."] if len(value) > 6 and not inner else [])) + brackets[1]
    elif isinstance(value, str):
        text = ascii(value[:60])
    elif isinstance(value, int) and abs(value) >= 10**30:
        text = f"a number of {value.bit_length()} bits"
    else:
        text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _times(shape: Iterable[int]) -> str:
    return " x ".join(str(n) for n in shape) or "one value"

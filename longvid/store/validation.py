"""Owns the checks of untrusted stores: metadata, chunk files and folders are validated before zarr parses them.

A metadata document of a few hundred bytes can claim a petabyte or name a codec that runs code, and a chunk file can
decode to far more than its array declares or be a link to another place. This format has one document for each array,
so a document is compared with the one that longvid would write, and its lengths with limits. A check either passes or
raises :class:`~longvid.errors.StoreError`: kind ``"refused"`` for what this format does not have, ``"corrupt"`` for
what is not metadata at all. A zarr array that longvid did not write is read only if the caller opened it.

A reader calls :func:`check_tree` once, :func:`read_document` and :func:`check_arrays` for the metadata, and
:func:`check_chunk` before it reads a chunk file. This module imports neither zarr nor torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from longvid.errors import StoreError
from longvid.files import read_regular
from longvid.store.format import (
    AXES,
    CHUNK_ROWS,
    COORDINATE_NAMES,
    DATA_NAMES,
    DTYPES,
    StoreKind,
    array_document,
    default_compression,
)

__all__ = ["MAX_CHUNK_BYTES", "MAX_DOCUMENT_BYTES", "MAX_ROWS", "check_arrays", "check_chunk", "check_tree",
           "read_document"]  # fmt: skip

MAX_DOCUMENT_BYTES = 16 * 2**20
"largest ``zarr.json``"
MAX_ROWS = 2**25
"longest array: a week of video at 50 frames per second has 30 million, and its time stamps take 256 MiB"
MAX_CHUNK_BYTES = 128 * 2**20
"largest decoded chunk: an 8K frame of 8-bit RGB has 95 MiB"
_MAX_DEPTH = 64
_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")
_GROUP_KEYS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}


def read_document(path: Path) -> dict[str, Any]:
    """Read a metadata file: a regular file, not reached through a link, that holds a JSON object."""
    content = read_regular(path, MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        _refuse(str(path), "it is too large for metadata", f"at most {MAX_DOCUMENT_BYTES:,} bytes")
    try:
        document = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise StoreError(f"{path} is damaged: it is not JSON ({exc})", kind="corrupt") from exc
    if not isinstance(document, dict):
        raise StoreError(f"{path} is damaged: it holds a {type(document).__name__}, not an object", kind="corrupt")
    layer: list[Any] = [document]
    for _ in range(_MAX_DEPTH):
        children = [child for node in layer for child in (node.values() if isinstance(node, dict) else node)]
        layer = [child for child in children if isinstance(child, (dict, list))]
    if layer:
        _refuse(str(path), "its metadata are nested deeper", f"{_MAX_DEPTH} levels")
    return document


def check_arrays(root: Mapping[str, Any], kind: StoreKind, *, where: str) -> dict[str, dict[str, Any]]:
    """The metadata of each array by name, if all are as longvid would write them; empty before the first commit.

    Raises:
        StoreError: kind ``"refused"``; the message names the array, what was found and what is allowed.
    """
    if (root.get("zarr_format"), root.get("node_type")) != (3, "group") or set(root) - _GROUP_KEYS:
        _refuse(where, f"its root metadata have the fields {_shown(sorted(root))}", "a group of zarr format 3")
    consolidated = root.get("consolidated_metadata")
    if consolidated is None:
        return {}
    arrays = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(arrays, dict) or {**consolidated, "metadata": 0} != {
        "kind": "inline", "must_understand": False, "metadata": 0,
    }:  # fmt: skip
        _refuse(where, f"its consolidated metadata are {_shown(consolidated)}", "inline metadata of arrays")
    allowed = (*DATA_NAMES[kind], *COORDINATE_NAMES[kind], "digest")
    optional = DATA_NAMES[kind][1:]
    for name in arrays:
        if name not in allowed:
            _refuse(where, f"it has an array {_shown(name)}", ", ".join(allowed))
    for name in allowed:
        if name in arrays:
            _check_array(kind, name, arrays[name], f"{where}: array {name!r}")
        elif name not in optional:
            _refuse(where, f"it has no array {name!r}", ", ".join(allowed))
    return arrays


def _check_array(kind: StoreKind, name: str, document: Any, where: str) -> None:
    if not isinstance(document, dict):
        _refuse(where, f"its metadata are {_shown(document)}", "a JSON object")
    shape = _lengths(document.get("shape"), len(AXES[name]), "its shape", where)
    if shape[0] > MAX_ROWS:
        _refuse(where, f"it has {_shown(shape[0])} rows", f"at most {MAX_ROWS:,}")
    dtype = document.get("data_type")
    if dtype not in DTYPES[name]:
        _refuse(where, f"its dtype is {_shown(dtype)}", ", ".join(DTYPES[name]))
    grid = _at(document, "chunk_grid", "configuration", "chunk_shape")
    rows = _lengths(grid, len(shape), "its chunk shape", where)[0]
    rows = CHUNK_ROWS.get(name, rows)
    decoded = math.prod(shape[1:]) * max(rows, 1) * np.dtype(dtype).itemsize
    if decoded > MAX_CHUNK_BYTES or rows < 1 or 0 in shape[1:]:
        _refuse(where, f"a chunk decodes to {_shown(decoded)} bytes", f"1 to {MAX_CHUNK_BYTES:,} bytes")
    attributes = document.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    expected = array_document(kind, name, shape, dtype, rows, attributes, _compression(document, dtype))
    for key in {*expected, *document}:
        have, want = document.get(key, "missing"), expected.get(key)
        # As text, since 3, 3.0 and true are equal to Python and not to zarr.
        if json.dumps(have, sort_keys=True) != json.dumps(want, sort_keys=True):
            _refuse(where, f"its {_shown(key)} is {_shown(have)}", _shown(expected.get(key, "nothing")))


def _lengths(value: Any, count: int, what: str, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**40 for n in value) or len(value) != count:
        _refuse(where, f"{what} is {_shown(value)}", f"{count} whole numbers from 0")
    return value


def _at(document: Any, *keys: str) -> Any:
    """The value at the end of a path of keys; None if the path ends before."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _compression(document: dict[str, Any], dtype: str) -> tuple[int, str]:
    """Level and shuffle, which may be those of another version of longvid; the default for anything else."""
    codecs = document.get("codecs")
    codec = codecs[1] if isinstance(codecs, list) and len(codecs) > 1 else None
    level, shuffle = (_at(codec, "configuration", key) for key in ("clevel", "shuffle"))
    known = type(level) is int and level in range(10) and shuffle in _SHUFFLES
    return (level, shuffle) if known else default_compression(dtype)


def check_chunk(path: Path, decoded_bytes: int) -> None:
    """Refuse a chunk file that is not a regular file, or that decodes to another size than its array declares.

    The decoder takes the size from the file and allocates it, whatever the metadata say. Only the first bytes are
    read. A missing file passes: its chunk reads as fill values, which no digest agrees with.
    """
    try:
        header = read_regular(path, 16)
    except StoreError as exc:
        if exc.kind == "missing":
            return
        raise
    if len(header) < 16:
        raise StoreError(f"the chunk {path.name} is damaged: it has {len(header)} bytes", kind="corrupt")
    stored, most = path.stat().st_size, decoded_bytes + decoded_bytes // 8 + 4096
    size = int.from_bytes(header[4:8], "little")
    if stored > most:  # a compressor adds less to what it cannot compress
        _refuse(str(path), f"it has {stored:,} bytes", f"at most {most:,}")
    if size != decoded_bytes:
        _refuse(str(path), f"it decodes to {size:,} bytes", f"{decoded_bytes:,}")


def check_tree(root: Path) -> None:
    """Refuse a store that holds anything but files and folders: links lead out of it, a FIFO never ends."""
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
                        _refuse(
                            str(root), f"{os.path.relpath(entry.path, root)!r} in it is {kind}", "files and folders"
                        )
        except (FileNotFoundError, NotADirectoryError, ValueError) as exc:  # ValueError: a zero byte in the name
            if folder == os.fspath(root):
                missing = f"{root} is a file and not a store" if root.is_file() else f"there is no store {root}"
                raise StoreError(missing, kind="missing") from exc
            # a run that writes the store has removed it
        except StoreError:
            raise
        except OSError as exc:
            raise StoreError(f"{folder} cannot be read: {exc.strerror}", kind="other") from exc


def _refuse(where: str, found: str, allowed: str) -> NoReturn:
    raise StoreError(f"{where} is refused: {found}; allowed: {allowed}", kind="refused")


def _shown(value: Any) -> str:
    """A value as text that is short, on one line and harmless to print, however large the value is."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value[:6] if isinstance(value, list) else value)
    return text if len(text) <= 300 else f"{text[:297]}..."

"""Owns the format of a store: names, documents of arrays, digests, the metadata checksum. It reads and writes no file.

A store is one zarr v3 group per video with sibling arrays that share a time dimension. The data come in **commit
units**: one chunk of the main array with the coordinates that belong to it. The array ``digest`` holds a digest of
every unit. The root metadata holds one digest of all digests and a **metadata checksum** of itself. So every part of a
store that is damaged, missing, outdated or swapped is noticed.
"""

# Keys on disk keep the spelling of their first version, so that stores stay readable: the metadata checksum is
# `longvid.seal`, and the digest of all digests is `longvid.digests`.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["ARRAY_NAMES", "AXES", "CHUNK_ROWS", "COORDINATE_NAMES", "DATA_NAMES", "DIGEST_BYTES", "DTYPES",
           "FORMAT_VERSION", "MISSING", "OWN_NAMES", "PARTIAL_ROOT", "PRIVATE", "StoreKind", "array_document",
           "checksum_is_right", "chunk_file", "default_compression", "digest_chain", "is_system_file", "serialized",
           "unit_digest", "with_checksum"]  # fmt: skip

StoreKind: TypeAlias = Literal["latents", "frames"]
FORMAT_VERSION = 2
MISSING = -(2**63)
"fill value of integer arrays, so that a missing chunk cannot pass for data"
PRIVATE = "digest/.longvid"
"""folder in a store for the lock, the seek points and the copy of the root metadata. It lies in the folder of an array,
because readers that list the members of the group would report it anywhere else"""
PARTIAL_ROOT = ".zarr.json.partial"
"name of the root metadata while it is being written"
DIGEST_BYTES = 16
DATA_NAMES: dict[str, tuple[str, ...]] = {"latents": ("latents", "moments"), "frames": ("frames",)}
"arrays of each kind of store that hold data, the main array first; moments are optional"
_TIMES = ("t", "frame_start", "frame_stop")
COORDINATE_NAMES = {"latents": (*_TIMES, "frame_pts", "frame_valid"), "frames": ("t", "frame_pts", "frame_valid")}
"coordinates of each kind of store, in the order in which they are digested"
AXES: dict[str, tuple[str, ...]] = {
    "latents": ("t", "c", "y", "x"),
    "moments": ("t", "c2", "y", "x"),
    "frames": ("t", "y", "x", "rgb"),
    **dict.fromkeys(_TIMES, ("t",)),
    **dict.fromkeys(("frame_pts", "frame_valid"), ("frame",)),
    "digest": ("unit", "part", "byte"),
}
"dimension names of every array; in a store of frames the dimension `frame` is `t`"
CHUNK_ROWS = {**dict.fromkeys((*_TIMES, "frame_pts", "frame_valid"), 4096), "digest": 1024}
"rows of a chunk of every array that holds no data"
DTYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("latents", "moments"), ("float16", "float32")),
    **dict.fromkeys(("frames", "digest"), ("uint8",)),
    "t": ("float64",),
    **dict.fromkeys(("frame_start", "frame_stop", "frame_pts"), ("int64",)),
    "frame_valid": ("bool",),
}
"dtypes that an array of this name can have"
ARRAY_NAMES = frozenset(AXES)
OWN_NAMES = frozenset({"zarr.json", PARTIAL_ROOT, *ARRAY_NAMES})
"every name that longvid writes in the folder of a store"
_SYSTEM_FILES = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", "@eaDir", ".nfs*")


def is_system_file(name: str) -> bool:
    """Whether operating systems and network drives put files of this name into every folder."""
    return any(fnmatchcase(name, pattern) for pattern in _SYSTEM_FILES)


def unit_digest(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Digest the values of arrays in little-endian order: uint8 of length 16."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)
    return np.frombuffer(digest.digest(), np.uint8)


def digest_chain(digests: npt.NDArray[np.uint8]) -> str:
    """Digest the digests of all units, as hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=DIGEST_BYTES).hexdigest()


def with_checksum(root: dict[str, Any]) -> bytes:
    """Root metadata as it is written, with the checksum of itself in ``longvid.seal``."""
    root["attributes"]["longvid"]["seal"] = ""
    root["attributes"]["longvid"]["seal"] = hashlib.sha256(serialized(root)).hexdigest()
    return serialized(root)


def serialized(document: Mapping[str, Any]) -> bytes:
    """Metadata of the root or of an array, byte for byte as they are written."""
    return json.dumps(document, indent=2).encode()


def checksum_is_right(content: bytes) -> bool:
    """Whether root metadata are, byte for byte, what was written with its checksum."""
    try:
        return with_checksum(json.loads(content)) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def chunk_file(unit: int, ndim: int) -> str:
    """Name of the file of a chunk that spans all axes but the first."""
    return "c." + ".".join([str(unit), *["0"] * (ndim - 1)])


def default_compression(dtype: str) -> tuple[int, str]:
    """Level and shuffle of zstd. Bitshuffle groups the exponents of numbers; bytes such as pixels have none."""
    return 1, "noshuffle" if np.dtype(dtype).itemsize == 1 else "bitshuffle"


def array_document(
    kind: StoreKind,
    name: str,
    shape: Sequence[int],
    dtype: str,
    chunk_rows: int,
    attributes: Mapping[str, Any] | None = None,
    compression: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """The zarr metadata of an array, as this format has them: little-endian, zstd in blosc, crc32c over both.

    ``chunk_rows`` is the length of a chunk of data; other arrays have :data:`CHUNK_ROWS`. All chunks of an array lie in
    one folder (separator ``.``), so that a new chunk needs one folder on the disk instead of four. The checksum is
    required, since blosc reads past the end of a chunk that was cut short.
    """
    item = np.dtype(dtype)
    level, shuffle = compression or default_compression(dtype)
    fill: Any = {"f": "NaN", "i": MISSING, "b": False}.get(item.kind, 0)
    axes = ("t",) if kind == "frames" and AXES[name] == ("frame",) else AXES[name]
    blosc = {"typesize": item.itemsize, "cname": "zstd", "clevel": level, "shuffle": shuffle, "blocksize": 0}
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [CHUNK_ROWS.get(name, chunk_rows), *shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}} if item.itemsize > 1 else {"name": "bytes"},
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ],
        "attributes": dict(attributes or {}),
        "dimension_names": list(axes),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }

"""Owns reading: what a store holds, compared with its metadata checksum and digests before it is given out.

Metadata, digests and coordinates are compared when a store is opened, data are compared unit by unit as they are read.
No torch here. Axes: t time, c channels, y x latent rows and columns; T H W of frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from longvid.errors import StoreError
from longvid.files import local_path, read_regular
from longvid.latents import normalize
from longvid.schedule import ChunkSchedule
from longvid.store.format import (
    DIGEST_BYTES,
    PRIVATE,
    StoreKind,
    checksum_is_right,
    chunk_file,
    digest_chain,
    serialized,
    unit_digest,
)
from longvid.store.metadata import StoreMetadata, store_kind
from longvid.store.staging import open_array
from longvid.store.validation import MAX_DOCUMENT_BYTES, check_chunk, check_tree, read_document

__all__ = ["CheckedArray", "FrameStore", "LatentStore", "StoreReader", "bytes_of", "may_stand_beside", "open_frames",
           "open_reader", "open_store", "require_complete"]  # fmt: skip

_DAMAGE = (OSError, ValueError, RuntimeError)
"what zarr and its codecs raise for a damaged chunk"


@dataclass(frozen=True)
class StoreReader:
    """The committed content of a store, as its root metadata describe it. Made by :func:`open_reader`."""

    path: Path
    metadata: StoreMetadata
    content: bytes = field(repr=False)
    "the root metadata, or their copy, with a checksum that is right"
    disputed: bool = False
    "whether the copy has a right checksum too, contradicts the root, and fits the store as well"
    _last: dict[tuple[str, int], npt.NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def arrays(self) -> dict[str, zarr.Array[Any]]:
        """Every array by name, by the root's metadata. Reading from these compares nothing with digests."""
        files = LocalStore(self.path, read_only=True)
        return {name: open_array(files, name, array.document) for name, array in self.metadata.arrays.items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def stored(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of an array as they are on the disk, not compared with digests; StoreError if they cannot be decoded."""
        array = self.metadata.arrays[name]
        length, ndim = array.chunks[0], len(array.shape)
        try:
            for number in range(start // length, -(-stop // length)):
                check_chunk(self.path / name / chunk_file(number, ndim), array.chunk_bytes)
            return np.asarray(self.arrays[name][start:stop])
        except _DAMAGE as exc:
            if isinstance(exc, StoreError) and exc.kind == "other":
                raise
            raise self._damaged(f"{name} {start} to {stop - 1} are damaged ({exc})") from exc

    def readable(self, name: str, start: int, stop: int) -> npt.NDArray[Any] | None:
        """As :meth:`stored`; None for rows that are damaged."""
        try:
            return self.stored(name, start, stop)
        except StoreError as exc:
            if exc.kind != "corrupt":
                raise
            return None

    @cached_property
    def digests(self) -> npt.NDArray[np.uint8] | None:
        """The digests of all units; None if they are not those that were committed."""
        if not self.metadata.arrays:
            return np.zeros((0, 1, DIGEST_BYTES), np.uint8)
        digests = self.readable("digest", 0, self.metadata.num_units)
        return digests if digests is not None and digest_chain(digests) == self.metadata.digests else None

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any] | None]:
        """Coordinates, whole arrays by name; None for one that cannot be read as a whole."""
        arrays = self.metadata.arrays
        return {name: self.readable(name, 0, arrays[name].shape[0]) for name in self.metadata.coordinate_names}

    def coordinate(self, name: str, unit: int) -> npt.NDArray[Any] | None:
        """The rows of a coordinate in a unit; None if they cannot be read."""
        start, stop = self.metadata.coordinate_rows(name, unit)
        column = self.columns[name]
        return self.readable(name, start, stop) if column is None else column[start:stop]

    def checked_columns(self) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint8]]:
        """All coordinates, and the digests of all units, each compared with what was committed."""
        columns = {name: column for name, column in self.columns.items() if column is not None}
        lost = sorted(self.columns.keys() - columns)
        if self.digests is None or lost:
            raise self._damaged(f"{', '.join(lost) or 'the array digest'} is damaged")
        wrong = self.metadata.unit_with_other(columns, self.digests)
        if wrong is not None:
            first = self.metadata.frames(wrong)[0]
            raise self._damaged(f"the coordinates of frames from {first} are damaged or missing")
        return columns, self.digests

    def take(self, name: str, rows: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """The data of rows by their numbers, in a new array, each unit compared with its digest."""
        array = self.metadata.arrays[name]
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        units = rows // array.chunks[0]
        for unit in np.unique(units).tolist():
            here = np.flatnonzero(units == unit)
            result[here] = self._unit(name, unit)[rows[here] - unit * array.chunks[0]]
        return result

    def _unit(self, name: str, unit: int) -> npt.NDArray[Any]:
        """One unit. The last one is kept, since the chunks of a model are shorter."""
        if (name, unit) not in self._last:
            start, stop = self.metadata.rows(unit)
            rows = self.stored(name, start, stop)
            part = self.metadata.data_names.index(name)
            if self.digests is None or not np.array_equal(unit_digest([rows]), self.digests[unit, part]):
                what = f"{name} {start} to {stop - 1} are damaged, missing or not those that were committed"
                raise self._damaged(what)
            self._last.clear()
            self._last[name, unit] = rows
        return self._last[name, unit]

    def _damaged(self, what: str) -> StoreError:
        advice = "`longvid verify` lists all damage, `longvid repair` restores it"
        return StoreError(f"{self.path}: {what}; {advice}", kind="corrupt")


def open_reader(path: str | os.PathLike[str], *, strict: bool = True) -> StoreReader:
    """Open the committed content of a store; StoreError if there is none of longvid, or if its metadata are damaged.

    With ``strict`` the root metadata have to be whole, and something has to be committed. Without it, the copy stands
    in for damaged root metadata, as verify and repair need it.
    """
    where = local_path(path)
    check_tree(where)
    return _open_strictly(where) if strict else _open_with_copy(where)


def _open_strictly(where: Path) -> StoreReader:
    try:
        root = read_document(where / "zarr.json")
    except StoreError as exc:
        if exc.kind != "missing":
            raise
        raise StoreError(f"{where} is not a zarr store; pass the folder that longvid wrote", kind="foreign") from exc
    store_kind(root, where=str(where))
    content = serialized(root)  # and not the bytes: another tool may write the same metadata in another form
    if not checksum_is_right(content):
        raise StoreError(
            f"{where}: the root metadata are damaged or were changed after the commit; `longvid repair` restores them",
            kind="corrupt",
        )
    if not root.get("consolidated_metadata"):
        raise StoreError(f"{where} is incomplete: nothing was committed yet", kind="incomplete")
    reader = StoreReader(where, StoreMetadata.parse(root, where=str(where)), content)
    reader.checked_columns()
    return reader


def _open_with_copy(where: Path) -> StoreReader:
    content, copy = (bytes_of(where / name) for name in ("zarr.json", f"{PRIVATE}/root.json"))
    whole = [document for document in (content, copy) if document is not None and checksum_is_right(document)]
    if not whole:
        if copy is None and not is_ours(content):
            raise StoreError(f"{where} is not a store of longvid, or of a version without checksums", kind="foreign")
        raise StoreError(
            f"{where}: the root metadata and its copy are both damaged; encode the video again", kind="corrupt"
        )
    parsed = [StoreMetadata.parse(json.loads(document), where=str(where)) for document in whole]
    opened = [StoreReader(where, metadata, document) for metadata, document in zip(parsed, whole, strict=True)]
    if len(opened) == 1 or may_stand_beside(opened[1].metadata, opened[0].metadata):
        return opened[0]
    fitting = [one for one in opened if one.digests is not None]
    if len(fitting) == 1:
        return fitting[0]
    if may_stand_beside(opened[0].metadata, opened[1].metadata):  # an older root was put back
        return opened[1]
    return replace(opened[0], disputed=len(fitting) == 2)


def bytes_of(path: Path) -> bytes | None:
    """The content of a metadata file; None if it is missing or damaged, StoreError if it may not be read."""
    try:
        return read_regular(path, MAX_DOCUMENT_BYTES)
    except StoreError as exc:
        if exc.kind == "other":
            raise
        return None


def is_ours(content: bytes | None) -> bool:
    """Whether these are root metadata of longvid, whole or not."""
    try:
        return isinstance(json.loads(content or b"")["attributes"]["longvid"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def may_stand_beside(copy: StoreMetadata, root: StoreMetadata) -> bool:
    """Whether a run leaves such a copy beside such a root: equal, or older if it was killed between the two."""
    if copy.root == root.root or (not root.fingerprint and not root.arrays):  # the store is being replaced
        return True
    if copy.fingerprint != root.fingerprint or copy.complete:
        return False
    before, now = (copy.num_frames, copy.complete), (root.num_frames, root.complete)
    return before < now or (before == now and copy.epoch != root.epoch)


# ------------------------------------------------------------------------------------------------- public objects


class CheckedArray:
    """A stored array that compares every chunk with its digest when it is read. It slices like a numpy array.

    ``zarr.open_array`` gives the same data without the comparison.
    """

    def __init__(self, reader: StoreReader, name: str) -> None:
        self._reader, self._name = reader, name
        array = reader.metadata.arrays[name]
        self.shape, self.chunks, self.dtype, self.attrs = array.shape, array.chunks, array.dtype, array.attributes
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """The selected values in a new array. Only the chunks that are needed are read.

        Raises:
            StoreError: kind ``"corrupt"`` if a stored chunk is damaged, missing or not the one that was committed.
        """
        first, *rest = _expanded(key, self.ndim)
        if first is None:
            return self[tuple(rest)][None]
        rows = np.arange(len(self))[first]
        data = self._reader.take(self._name, rows.ravel())
        if isinstance(first, slice):
            return data[(slice(None), *rest)]
        selected: npt.NDArray[Any] = data[(np.arange(rows.size).reshape(rows.shape)[()], *rest)]
        return selected

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a stored array can only be copied into memory")
        return np.asarray(self[:], dtype)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} {self.shape} {self.dtype} in {self._reader.path}>"


def _expanded(key: Any, ndim: int) -> tuple[Any, ...]:
    """An index of numpy with at least one entry and without an ellipsis."""
    parts = list(key) if isinstance(key, tuple) else [key]
    dots = [number for number, part in enumerate(parts) if part is Ellipsis]
    if dots:
        missing = ndim - sum(part is not None for part in parts) + 1
        parts[dots[0] : dots[0] + 1] = [slice(None)] * missing
    return tuple(parts) or (slice(None),)


class FrameStore(CheckedArray):
    """Frames of a store as an array (T, H, W, 3) of uint8. Made by :func:`open_frames`."""

    def __init__(self, reader: StoreReader) -> None:
        super().__init__(reader, "frames")
        self.digests = reader.metadata.digests
        self.frame_rate = reader.metadata.frame_rate
        self.sample_aspect_ratio = reader.metadata.sample_aspect_ratio


def open_frames(path: str | os.PathLike[str]) -> FrameStore:
    """Open a complete store of frames for reading; StoreError if there is none."""
    reader = _open_kind(path, "frames")
    require_complete(reader)
    return FrameStore(reader)


class LatentStore:
    """The latents of one video with their coordinates, as committed when the store was opened.

    Made by :func:`open_store`.

    Attributes:
        path: the folder of the store.
        frame_pts: time stamps of the committed frames, in units of ``time_base``.
        frame_valid: which frames are the source's own; the others repeat a good frame in place of a damaged one.
        schedule: how the video was cut into chunks.
        attrs: all attributes of the group.
        arrays: all arrays by name; the data arrays compare what they read with digests.
        latents: (t, c, y, x), float16 or float32, not scaled.
        moments: (t, 2 c, y, x), the mean, then the log variance; None if they are not stored.
        num_frames: committed frames of the video.
        num_latents: committed latent frames.
        latents_valid: which latent frames stand for at least one frame of the video; the others are of the padded tail.
        complete: whether the whole video is in the store.
        representation: ``mode``, ``sample``, ``moments``, or ``imported`` if another program made the latents.
        vae: facts of the model that made the latents.
        source: facts of the video.
        height, width: size of the video's frames in pixels.
        time_base: seconds per unit of the time stamps.
        frame_rate: mean frames per second, or None.
    """

    def __init__(self, reader: StoreReader) -> None:
        metadata = reader.metadata
        columns, digests = reader.checked_columns()
        self._reader = reader
        self.path, self.metadata = reader.path, metadata
        self.frame_pts: npt.NDArray[np.int64] = columns["frame_pts"]
        self.frame_valid: npt.NDArray[np.bool_] = columns["frame_valid"]
        self.schedule = cast("ChunkSchedule", metadata.schedule)
        self.attrs, self.vae, self.source = metadata.attributes, metadata.vae, metadata.source
        self.latents = CheckedArray(reader, "latents")
        self.moments = CheckedArray(reader, "moments") if "moments" in metadata.arrays else None
        self.arrays: Mapping[str, CheckedArray | npt.NDArray[Any]] = {
            **{name: CheckedArray(reader, name) for name in metadata.data_names},
            **columns,
            "digest": digests,
        }
        self.num_frames, self.num_latents = metadata.num_frames, self.latents.shape[0]
        self.latents_valid: npt.NDArray[np.bool_] = columns["frame_start"] < columns["frame_stop"]
        self.complete, self.representation = metadata.complete, metadata.representation
        self.height, self.width = metadata.height, metadata.width
        self.time_base: Fraction = metadata.time_base
        self.frame_rate: Fraction | None = metadata.frame_rate

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return self._reader.stored_bytes

    def read(self, start: int, stop: int, *, normalized: bool = False) -> npt.NDArray[np.float32]:
        """Latent frames ``start`` to ``stop``, as a slice takes them, in a new array of float32 (t, c, y, x).

        They are raw, as the VAE computed them, or with ``normalized`` those that the pipelines of the model's family
        give to their transformer: see :func:`longvid.normalize`.

        Raises:
            StoreError: kind ``"corrupt"`` if a stored chunk is damaged, missing or not the one that was committed.
            ModelError: normalized latents were asked for, and the store does not record how they are scaled.
        """
        latents = self.latents[start:stop].astype(np.float32, copy=False)
        return normalize(latents, self, channel_axis=1) if normalized else latents

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        return (
            f"<LatentStore {self.path}: {state}, {self.num_frames} frames of {self.width}x{self.height}, "
            f"latents {self.latents.shape} {self.latents.dtype}>"
        )


def open_store(path: str | os.PathLike[str]) -> LatentStore:
    """Open a store of latents for reading, as it is committed at this moment.

    Raises:
        StoreError: see :func:`open_reader`; kind ``"format"`` for a store of frames.
    """
    return LatentStore(_open_kind(path, "latents"))


def _open_kind(path: str | os.PathLike[str], kind: StoreKind) -> StoreReader:
    reader = open_reader(path)
    if reader.metadata.kind != kind:
        raise StoreError(f"{reader.path} holds {reader.metadata.kind}, not {kind}", kind="format")
    return reader


def require_complete(store: StoreReader | LatentStore) -> None:
    """Raise StoreError of kind ``"incomplete"`` unless the run that wrote a store has come to the end of its video."""
    if not store.metadata.complete:
        raise StoreError(
            f"{store.path} is incomplete: {store.metadata.num_frames} frames were committed before the run that wrote "
            "it ended; run the same command again to resume",
            kind="incomplete",
        )

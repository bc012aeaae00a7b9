"""Owns staged zarr writes: nothing is visible before it is committed.

zarr grows an array by writing the longer shape first and the data after it. A reader in between, or after a kill, sees
rows that do not exist. So a :class:`StagedStore` writes no metadata before :meth:`StagedStore.commit` and keeps chunks
that are rewritten as an array grows in memory until then. Chunks that are written once go to the disk at once.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, StorePath

from longvid.files import sync_path, write_durably
from longvid.store.format import serialized

__all__ = ["StagedStore", "delete", "is_partial", "open_array", "partial_files", "sweep"]

_PARTIAL = re.compile(r"(\..+|.*\.[0-9a-f]{32})\.partial")
"name of a file while it is being written: ours, and those of zarr's LocalStore"

_CHUNK_FILE = re.compile(r"c\.(\d+)(\.0)*")


def is_partial(name: str) -> bool:
    """Whether a file of this name, in a folder of ours, is one that was never finished."""
    return _PARTIAL.fullmatch(name) is not None


class StagedStore(LocalStore):
    """A local zarr store whose growing chunks, and their lengths, become visible with :meth:`commit`.

    ``rewritten`` tells, for the name of an array, whether its chunks are written again as the array grows.
    """

    def __init__(self, root: Path, *, sync: bool, rewritten: Callable[[str], bool]) -> None:
        super().__init__(root)
        self._sync = sync
        self._rewritten = rewritten
        self._staged: dict[str, bytes] = {}
        self._written: list[str] = []
        "keys of the chunks that were written to the disk since the last commit"

    async def set(self, key: str, value: Buffer) -> None:
        """Set one chunk: of a growing array in memory, otherwise on the disk."""
        if self._rewritten(key.rpartition("/")[0]):
            self._staged[key] = value.to_bytes()
            return
        await super().set(key, value)
        self._written.append(key)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The staged value, otherwise the value on the disk."""
        staged = self._staged.get(key)
        if staged is None or byte_range is not None or prototype is None:
            return await super().get(key, prototype, byte_range)
        return prototype.buffer.from_bytes(staged)

    def commit(self, root_document: bytes, documents: Mapping[str, Mapping[str, Any]], *, settled: bool) -> None:
        """Make everything that was written durable, then visible by one replacement of the root metadata.

        The order is: new chunks; chunks that replace older ones, whose rows they repeat; the root; the metadata of
        single arrays, which have to be on the disk only when ``settled``. If it is interrupted anywhere, readers see
        the last commit.
        """
        folders = {(self.root / key).parent for key in (*self._written, *self._staged)}
        self._settle(*(self.root / key for key in self._written))
        for key, content in self._staged.items():
            (self.root / key).parent.mkdir(exist_ok=True)
            write_durably(self.root / key, content, sync=self._sync)
        self._settle(*folders, *([self.root] if folders else []))  # the root has the folders of new arrays
        write_durably(self.root / "zarr.json", root_document, sync=self._sync)
        self._settle(self.root)
        for name, document in documents.items():
            (self.root / name).mkdir(exist_ok=True)
            write_durably(self.root / name / "zarr.json", serialized(document), sync=self._sync and settled)
        if settled:
            self._settle(*(self.root / name for name in documents))
        self._staged.clear()
        self._written.clear()

    def _settle(self, *paths: Path) -> None:
        if self._sync:
            for path in paths:
                sync_path(path)


def partial_files(path: Path) -> list[Path]:
    """The files in a store that were never finished."""
    found = path.rglob("*.partial")
    return [file for file in found if is_partial(file.name) and file.is_file() and not file.is_symlink()]


def sweep(path: Path, names: Iterable[str], first_chunk: int) -> None:
    """Remove what a run did not finish: files half written, and chunks of these arrays from ``first_chunk`` on."""
    for partial in partial_files(path):
        partial.unlink()
    for name in names:
        for file in (path / name).glob("c.*"):
            number = _CHUNK_FILE.fullmatch(file.name)
            if number is not None and int(number[1]) >= first_chunk:
                file.unlink()


def delete(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_array(files: LocalStore, name: str, document: dict[str, Any]) -> zarr.Array[Any]:
    """The array of these metadata, without a look at its ``zarr.json``. Chunks of fill values are written as well."""
    place = StorePath(files, name)
    return zarr.Array(zarr.AsyncArray(cast("Any", document), place, config={"write_empty_chunks": True}))

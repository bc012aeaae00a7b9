"""Files that are whole or not there, and a zarr store that shows nothing before it is published.

zarr grows an array by writing the longer shape first and the data after it. Whoever reads in between, or after a kill,
sees rows that do not exist. So all metadata of a :class:`StagedStore`, and all chunks that are rewritten as an array
grows, stay in memory until :meth:`StagedStore.publish`, while chunks that are written once go to the disk at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

__all__ = ["StagedStore", "is_partial", "sync_file", "sync_folder", "write_durably"]

_PARTIAL_SUFFIX = ".partial"
_PARTIAL = re.compile(r"(\..+|.*\.[0-9a-f]{32})\.partial")
"what a file is called while it is written: ours, and those of zarr's LocalStore"


def is_partial(name: str) -> bool:
    """Whether a file of this name, in a folder of ours, is one that was never finished."""
    return _PARTIAL.fullmatch(name) is not None


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: bytes | Callable[[BinaryIO], None], *, sync: bool) -> None:
    """Write a file so that, at any moment and after any end, its name stands for the old content or for the new.

    Args:
        path: where; its folder exists.
        content: all of it, or what writes it to an open file.
        sync: whether the new content is on the disk before it takes the name. The folder is not synced here.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class StagedStore(LocalStore):
    """A local zarr store whose metadata, and whose growing chunks, appear when :meth:`publish` says so.

    Args:
        root: the folder.
        sync: whether to wait for the disk.
        rewritten: whether the chunks of the array of this name are written again as the array grows.
    """

    def __init__(self, root: Path, *, sync: bool, rewritten: Callable[[str], bool]) -> None:
        super().__init__(root)
        self._sync = sync
        self._rewritten = rewritten
        self._staged: dict[str, bytes] = {}
        self._written: list[str] = []
        "keys of the chunks that went to the disk since the last step"

    def document(self, name: str) -> bytes:
        """The metadata of the array ``name`` as it will be published."""
        return self._staged[f"{name}/zarr.json"]

    def stage(self, key: str, content: bytes) -> None:
        """Put metadata in place of what is on the disk, until the next step."""
        self._staged[key] = content

    async def set(self, key: str, value: Buffer) -> None:
        """Take one value: metadata and growing chunks into memory, others to the disk."""
        if self._is_staged(key):
            self._staged[key] = value.to_bytes()
            return
        await super().set(key, value)
        self._written.append(key)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """As :meth:`set`, unless there is one."""
        if not await self.exists(key):
            await self.set(key, value)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """What is staged, else what is on the disk."""
        staged = self._staged.get(key)
        if staged is None or byte_range is not None or prototype is None:
            return await super().get(key, prototype, byte_range)
        return prototype.buffer.from_bytes(staged)

    async def exists(self, key: str) -> bool:
        """Whether it is staged or on the disk."""
        return key in self._staged or await super().exists(key)

    def _is_staged(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        return name == "zarr.json" or self._rewritten(folder)

    def publish(self, root_document: bytes, *, settled: bool) -> None:
        """Make everything written so far durable, then visible: by one replacement of the root metadata.

        Args:
            root_document: the new ``zarr.json`` of the group.
            settled: whether the metadata of single arrays, which follows the group's, has to be on the disk too.

        The order is: chunks that are new; chunks that replace older ones, whose rows they repeat; the root; the
        metadata of single arrays. Cut short anywhere, readers see what was published last.
        """
        chunks = {key: content for key, content in self._staged.items() if not key.endswith("zarr.json")}
        if self._sync:
            for key in self._written:
                sync_file(self.root / key)
        for key, content in chunks.items():
            (self.root / key).parent.mkdir(exist_ok=True)
            write_durably(self.root / key, content, sync=self._sync)
        if self._sync:
            for folder in {(self.root / key).parent for key in (*self._written, *chunks)}:
                sync_folder(folder)
            if chunks or self._written:
                sync_folder(self.root)  # the folders of new arrays
        write_durably(self.root / "zarr.json", root_document, sync=self._sync)
        if self._sync:
            sync_folder(self.root)
        for key, content in self._staged.items():
            if key.endswith("/zarr.json"):
                (self.root / key).parent.mkdir(exist_ok=True)
                write_durably(self.root / key, content, sync=self._sync and settled)
                if self._sync and settled:
                    sync_folder((self.root / key).parent)
        for key in chunks:
            del self._staged[key]
        self._written.clear()

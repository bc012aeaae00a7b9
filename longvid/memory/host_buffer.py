"""HostBuffer: the memory off the device that the contexts of one video live in: host memory, or an unnamed file."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from longvid.errors import MemoryBudgetError, StoreError
from longvid.units import format_bytes

__all__ = ["HostBuffer", "HostSlot", "Pin"]

Pin: TypeAlias = Callable[[Tensor], Callable[[], None] | None]
"page-locks a buffer and returns what undoes it, or None if it cannot"

_ALIGNMENT = mmap.PAGESIZE
"slots begin at multiples of this: files are dropped from memory page by page"
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class HostBuffer:
    """Host memory for the contexts of one video, or an unnamed file in ``directory``; slots are rounded up to pages.

    It is taken once and given back as a whole.

    Raises:
        MemoryBudgetError: the machine, or the disk, does not have that much.
        StoreError: no file can be made in ``directory``.
    """

    def __init__(self, num_bytes: int, directory: Path | None = None, pin: Pin | None = None) -> None:
        self.num_bytes = max(num_bytes, _ALIGNMENT)
        self._used = 0
        self._file_backed = directory is not None
        self._map = _map_memory(self.num_bytes) if directory is None else _map_file(self.num_bytes, directory)
        with torch.inference_mode(False):
            self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        unpin = pin(self._buffer) if directory is None and pin is not None else None
        self.pinned = unpin is not None
        if unpin is not None:  # before the memory is unmapped, which happens after this object is gone
            weakref.finalize(self, unpin)

    @staticmethod
    def room_for(sizes: Sequence[int]) -> int:
        """Bytes of a buffer that holds tensors of these sizes."""
        return sum(_aligned(size) for size in sizes)

    def take(self, like: Tensor) -> HostSlot:
        """Room for a dense tensor of ``like``'s shape, dtype and layout."""
        size = like.numel() * like.element_size()
        start, self._used = self._used, self._used + _aligned(size)
        if self._used > self.num_bytes:
            raise ValueError(f"the buffer of {self.num_bytes} bytes is full; {self._used} are needed")
        with torch.inference_mode(False):
            tensor = self._buffer[start : start + size].view(like.dtype).as_strided(like.shape, like.stride())
        return HostSlot(tensor, partial(self._settle, start, size))

    @property
    def free_bytes(self) -> int:
        """What is not taken, in whole pages."""
        return self.num_bytes - self._used

    def clear(self) -> None:
        """Forget all slots, so that the memory serves another video."""
        self._used = 0

    def _settle(self, start: int, size: int) -> None:
        if self._file_backed:
            self._map.madvise(mmap.MADV_DONTNEED, start, size)


@dataclass(frozen=True, slots=True)
class HostSlot:
    """The place of one context in a buffer, which lives as long as its slots."""

    tensor: Tensor
    settle: Callable[[], None]
    "to be called after a copy: the OS writes a file's pages out and forgets them, so they do not count as resident"


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _map_memory(num_bytes: int) -> mmap.mmap:
    """Memory that is really there: what would only be found missing in the middle of a run is found missing now."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    try:
        return mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as exc:
        raise MemoryBudgetError(
            f"{format_bytes(num_bytes)} of host memory for offloaded contexts could not be allocated ({exc.strerror}); "
            "offload less, or to a folder with offload_dir (--offload-dir)",
            projected_bytes=num_bytes,
        ) from exc


def _map_file(num_bytes: int, directory: Path) -> mmap.mmap:
    """An unnamed file that is gone with its last user, whatever ends the process. Its blocks are taken now: later a
    full disk would be a SIGBUS in the middle of a copy."""
    try:
        with tempfile.TemporaryFile(dir=directory, prefix="longvid-contexts-") as file:
            _allocate(file, num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as exc:
        if exc.errno in _FULL:
            stat = os.statvfs(directory)
            raise MemoryBudgetError(
                f"{format_bytes(num_bytes)} for offloaded contexts do not fit in {directory} ({exc.strerror}; "
                f"{format_bytes(stat.f_bavail * stat.f_frsize)} are free); name another folder, or offload less",
                projected_bytes=num_bytes,
                allowed_bytes=stat.f_bavail * stat.f_frsize,
            ) from exc
        raise StoreError(
            f"contexts cannot be kept in {directory} ({exc.strerror}); name another folder with offload_dir "
            "(--offload-dir)",
            kind="missing" if isinstance(exc, FileNotFoundError) else "other",
        ) from exc


def _allocate(file: BinaryIO, num_bytes: int) -> None:
    """Take the file's blocks on the disk, by writing them where the system cannot do it otherwise."""
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except (AttributeError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        block = bytes(2**20)
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        file.flush()

"""Snapshots: the state between two chunks, on disk, so that a run that ended early resumes with the same bits.

A snapshot is a safetensors file with the context of every layer, the rows that wait to become a unit of the store, and
where the source stands. Every tensor goes to the file on its own, so that a snapshot takes no memory to speak of beside
the largest context. The file is written whole or not at all, and holds a digest of all it says: one that is damaged, or
of another run, is passed over for an older one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longvid.errors import ModelError
from longvid.frames import SourcePosition
from longvid.memory.buffer_pool import layout_of
from longvid.runtime.prefetch import Writer
from longvid.runtime.run import Run
from longvid.store.staging import disk_errors, sync_path, write_durably
from longvid.store.writer import StoreWriter

__all__ = ["Checkpoints", "Snapshot", "fingerprint_digest", "newest_snapshot", "snapshots_in", "write_snapshot"]

_SUFFIX = ".safetensors"
_NAME = re.compile(r"(\d{9})\.safetensors")
_CONTEXT, _ROWS = "context.", "rows."
_KEPT = 2
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DIGEST = hashlib.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a run has to know to go on, beside its contexts, which stay in the file until they are asked for."""

    chunk: int
    "the next chunk; all before it are done"
    units: int
    "units of the store that were full; the rows after them are in ``rows``"
    position: SourcePosition | None
    "where the source stands; None for a run that reads latents"
    rows: dict[str, npt.NDArray[Any]]
    "rows of the store that wait to become a unit"
    path: Path
    layouts: dict[str, str]
    "memory layout of each context by the path of its layer, in the order in which the layers run"

    def contexts(self) -> Iterator[tuple[str, Tensor]]:
        """Path and context (B, C, k - 1, H, W) of every layer, on the host, one after another."""
        with safe_open(self.path, framework="pt") as file:
            for layer, layout in self.layouts.items():
                context = file.get_tensor(_CONTEXT + layer)
                yield layer, context.contiguous(memory_format=_layout(layout)) if context.ndim == 5 else context


def write_snapshot(
    folder: Path,
    *,
    chunk: int,
    units: int,
    position: SourcePosition | None,
    rows: Mapping[str, npt.NDArray[Any]],
    contexts: Iterable[tuple[str, Tensor]],
    fingerprint: str,
    sync: bool,
    keep_all: bool = False,
) -> Path:
    """Write the state before ``chunk``, as :class:`Snapshot` describes it, and remove all but the last two of a run.

    Raises:
        ValueError: a context is not finite, so that resuming from it would spoil the rest of the video.
        OSError: the file cannot be written. Older snapshots are untouched.
    """
    folder.mkdir(exist_ok=True)
    listed = list(contexts)
    tensors = {_CONTEXT + layer: context for layer, context in listed}
    tensors |= {_ROWS + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in sorted(rows.items())}
    facts = {
        "chunk": chunk,
        "units": units,
        "position": None if position is None else asdict(position),
        "layouts": {layer: _layout_name(context) for layer, context in listed},
        "fingerprint": fingerprint,
    }
    path = folder / f"{chunk:09d}{_SUFFIX}"
    write_durably(path, lambda file: _write(file, tensors, facts), sync=sync)
    if sync:
        sync_path(folder)
        sync_path(folder.parent)
    if not keep_all:
        for old in snapshots_in(folder)[:-_KEPT]:
            if old != path:
                old.unlink(missing_ok=True)
    return path


def newest_snapshot(folder: Path, *, fingerprint: str, units: int, chunk: int | None = None) -> Snapshot | None:
    """The newest snapshot of this run that is whole and stands at ``units``, and at ``chunk``, at the latest."""
    for path in reversed(snapshots_in(folder)):
        snapshot = _read(path, fingerprint)
        if snapshot is not None and snapshot.units <= units and (chunk is None or snapshot.chunk <= chunk):
            return snapshot
    return None


def snapshots_in(folder: Path) -> list[Path]:
    """The files of snapshots in a folder, oldest first; not looked into."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _read(path: Path, fingerprint: str) -> Snapshot | None:
    with suppress(OSError, ValueError, KeyError, TypeError, SafetensorError):
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["longvid"])
            if facts["fingerprint"] != fingerprint:
                return None
            told = facts.pop("digest")
            digest = _DIGEST(_canonical(facts))
            contexts = [_CONTEXT + layer for layer in facts["layouts"]]
            rows = {}
            names = list(file.keys())
            for name in (*contexts, *sorted(name for name in names if name.startswith(_ROWS))):
                tensor = file.get_tensor(name)
                digest.update(_described(name, tensor))
                digest.update(_values(name, tensor).data)
                if name.startswith(_ROWS):
                    rows[name.removeprefix(_ROWS)] = tensor.numpy()
            if len(names) != len(contexts) + len(rows) or digest.hexdigest() != told:
                return None
        position = None if facts["position"] is None else SourcePosition(**facts["position"])
        return Snapshot(
            chunk=int(facts["chunk"]),
            units=int(facts["units"]),
            position=position,
            rows=rows,
            path=path,
            layouts=dict(facts["layouts"]),
        )
    return None


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """A safetensors file. The library's own writer wants every tensor in host memory, twice."""
    file.write(_header(tensors, facts, "0" * _DIGEST().digest_size * 2))
    digest = _DIGEST(_canonical(facts))
    for name, tensor in tensors.items():
        values = _values(name, tensor)
        digest.update(_described(name, tensor))
        digest.update(values.data)
        file.write(values.data)
    file.seek(0)
    file.write(_header(tensors, facts, digest.hexdigest()))


def _header(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], digest: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"longvid": json.dumps({**facts, "digest": digest})}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _canonical(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


def _described(name: str, tensor: Tensor) -> bytes:
    return f"{name}:{_DTYPES[tensor.dtype]}:{tuple(tensor.shape)};".encode()


def _values(name: str, tensor: Tensor) -> npt.NDArray[np.uint8]:
    host = tensor.detach().to("cpu").contiguous()
    if host.is_floating_point() and not bool(torch.isfinite(host).all()):
        raise ValueError(f"{name.removeprefix(_CONTEXT)} holds values that are not finite")
    # The stride of a tensor with one element can be anything.
    return host.as_strided((host.numel(),), (1,)).view(torch.uint8).numpy()


def _layout_name(context: Tensor) -> str:
    return "channels_last" if context.ndim == 5 and layout_of(context) == torch.channels_last_3d else "contiguous"


def _layout(name: str) -> torch.memory_format:
    return torch.channels_last_3d if name == "channels_last" else torch.contiguous_format


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """One name for a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """Snapshots of one run that writes to one store.

    Args:
        target: the store, entered.
        run: whose contexts are saved, entered.
        fingerprint: of the run.
    """

    def __init__(self, target: StoreWriter, run: Run, fingerprint: Mapping[str, Any]) -> None:
        self.target = target
        self._run = run
        self._fingerprint = fingerprint_digest(fingerprint)
        self._cost_seconds: float | None = None
        self._next = self._due_at()
        self._at_chunk = -1
        self.seconds = 0.0
        "time spent on snapshots"

    def _due_at(self) -> float:
        return time.monotonic() + self.target.durability.snapshot_interval(self._cost_seconds)

    def restore(self, *, latest: int | None = None) -> Snapshot | None:
        """Go on from the newest snapshot that can be used; None if there is none and the run starts at the beginning.

        What is published beyond the snapshot will be computed again and has to come out the same.

        Args:
            latest: the latest chunk to resume from; any by default.
        """
        folder, units = self.target.snapshots_folder, self.target.first_wanted
        snapshot = newest_snapshot(folder, fingerprint=self._fingerprint, units=units, chunk=latest)
        if snapshot is None:
            return None
        self._run.cache.restore(snapshot.chunk, snapshot.contexts(), self._run.engine.device)
        num_frames = 0 if snapshot.position is None else snapshot.position.num_frames
        self.target.go_on(num_frames, snapshot.units, snapshot.rows)
        self._at_chunk = snapshot.chunk
        return snapshot

    @property
    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        return time.monotonic() >= self._next

    def take(self, chunk: int, position: SourcePosition | None, writer: Writer[Any]) -> None:
        """Save the state before ``chunk``. Called between two chunks.

        Raises:
            StoreError: the snapshot cannot be written.
            ModelError: a context is not finite.
        """
        if chunk == self._at_chunk or self.target.durability.snapshot_seconds == float("inf"):
            return
        writer.settle()
        started = time.monotonic()
        target = self.target
        with disk_errors(target.path):
            if target.num_units > target.committed_units:
                target.commit()
            try:
                write_snapshot(
                    target.snapshots_folder,
                    chunk=chunk,
                    units=target.num_units,
                    position=position,
                    rows=target.pending(),
                    contexts=self._run.cache.contexts(),
                    fingerprint=self._fingerprint,
                    sync=target.durability.syncs,
                    keep_all=target.durability.keep_snapshots,
                )
            except ValueError as exc:
                raise ModelError(f"after chunk {chunk - 1} the context of {exc}; try another dtype") from exc
        self._cost_seconds = time.monotonic() - started
        self.seconds += self._cost_seconds
        self._at_chunk = chunk
        self._next = self._due_at()

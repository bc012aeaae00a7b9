"""Checkpoints of one run: when a snapshot is taken, what goes into it, and going on from one.

A snapshot is consistent because of the order in which it comes about, between two chunks: the writer has consumed
everything, what it took is published, and only then the contexts and the rows that still wait are written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from longvid.errors import ModelError
from longvid.frames import SourcePosition
from longvid.runtime.engine import Run
from longvid.runtime.prefetch import Writer
from longvid.runtime.snapshot import Snapshot, newest_snapshot, write_snapshot
from longvid.store.staging import disk_errors
from longvid.store.writer import StoreWriter

__all__ = ["Checkpoints", "fingerprint_digest"]


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
        self._target = target
        self._run = run
        self._fingerprint = fingerprint_digest(fingerprint)
        self._cost_seconds: float | None = None
        self._next = self._due_at()
        self._at_chunk = -1
        self.seconds = 0.0
        "time spent on snapshots"

    def _due_at(self) -> float:
        return time.monotonic() + self._target.durability.snapshot_interval(self._cost_seconds)

    def restore(self, *, units: int, latest: int | None = None) -> Snapshot | None:
        """Go on from the newest snapshot that can be used; None if there is none and the run starts at the beginning.

        What is published beyond the snapshot will be computed again and has to come out the same.

        Args:
            units: of the store that are not needed from this run.
            latest: the latest chunk to go on with; any by default.
        """
        snapshot = newest_snapshot(
            self._target.snapshots_folder,
            fingerprint=self._fingerprint,
            units=units,
            chunk=latest,
        )
        if snapshot is None:
            return None
        self._run.restore(snapshot.chunk, snapshot.contexts())
        num_frames = 0 if snapshot.position is None else snapshot.position.num_frames
        self._target.go_on(snapshot.chunk, num_frames, snapshot.units, snapshot.rows)
        self._at_chunk = snapshot.chunk
        return snapshot

    @property
    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        return time.monotonic() >= self._next

    def take(self, chunk: int, position: SourcePosition | None, writer: Writer[Any]) -> None:
        """Save the state before ``chunk``. Called between two chunks.

        Raises:
            StoreError: the disk says no.
            ModelError: a context is not finite.
        """
        if chunk == self._at_chunk or self._target.durability.snapshot_seconds == float("inf"):
            return
        writer.settle()
        started = time.monotonic()
        target = self._target
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

"""Repair: bring a store back, bit for bit, to what was published, with as little work as the damage allows.

Metadata comes back from its copy, digests from the data, coordinates from each other or from the source. Data that is
damaged is computed again: from the newest snapshot before it, else from the beginning. What is computed is compared
with the digests of what was published before it takes a place, so a repair restores, or says why it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from longvid.errors import StoreError
from longvid.events import RunReport
from longvid.media.sources import open_source
from longvid.runtime.decode import DecodeOptions, decode_video
from longvid.runtime.encode import READING, EncodeOptions, encode_video, frame_chunks
from longvid.runtime.session import VideoSession
from longvid.schedule import ChunkSchedule
from longvid.store.durability import Durability
from longvid.store.format import PRIVATE, digest_chain, serialized
from longvid.store.latent_writer import seconds_of_latents
from longvid.store.lock import WriterLock
from longvid.store.reader import StoreReader, open_reader, open_store
from longvid.store.staging import StagedStore, disk_errors, open_array, write_durably
from longvid.store.verify import Verification, recomputed_digests, verify

__all__ = ["RepairReport", "repair"]

Columns: TypeAlias = dict[str, npt.NDArray[Any]]
"whole arrays by name"
Stamps: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"time stamps of all frames, and which are the source's own"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What :func:`repair` did."""

    before: Verification
    after: Verification
    restored: tuple[str, ...]
    "files and arrays that were written again"
    frames_computed: int
    "frames that went through the model"

    @property
    def ok(self) -> bool:
        """Whether the store is now as it was published."""
        return self.after.ok

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "ok": self.ok,
            "restored": list(self.restored),
            "frames_computed": self.frames_computed,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def explain(self) -> str:
        """For people."""
        if self.before.ok:
            return self.before.explain()
        done = f"restored {len(self.restored)} pieces, {self.frames_computed} frames were computed again"
        return f"{done}\n{self.after.explain()}"


def repair(session: VideoSession, path: str | Path, *, source: Any = None) -> RepairReport:
    """Restore what is damaged in a store, to the same bits.

    Args:
        session: with the model that made the store, in the dtype and on a device like those of that run.
        path: the store.
        source: what it was made from, if that is not where the store says: a video, or the store of latents.

    Raises:
        StoreError: kind ``"mismatch"`` if source or model are not those of the store, ``"corrupt"`` if the root
            metadata and its copy are both damaged.
        SourceError: the source is needed and cannot be read.
    """
    where = Path(path)
    before = verify(where)
    if before.ok:
        return RepairReport(before=before, after=before, restored=(), frames_computed=0)
    restored: list[str] = []
    with disk_errors(where):
        (where / PRIVATE).mkdir(exist_ok=True)
        lock = WriterLock.acquire(where / PRIVATE / "lock")
        try:
            opened = open_reader(where, strict=False)
            if opened.disputed:
                raise StoreError(
                    f"{where}: the root metadata and its copy are both whole and contradict each other, so that "
                    "nothing tells which is right; put the right one in both places, or encode the video again",
                    kind="corrupt",
                )
            restored += _metadata(opened, before)
            restored += _digests(opened, before)
            restored += _coordinates(opened, before, source)
        finally:
            lock.release()
    units = frozenset(d.unit for d in before.damages if d.kind == "data" and d.unit is not None)
    report = _data(session, opened, units, source) if units else None
    restored += sorted(d.name for d in before.damages if d.kind == "data")
    frames = 0 if report is None else report.frames - report.resumed_from_frame
    return RepairReport(before=before, after=verify(where), restored=tuple(restored), frames_computed=frames)


def _metadata(opened: StoreReader, found: Verification) -> Iterable[str]:
    """The root or its copy, the arrays' own metadata, and what nothing needs."""
    complete = opened.metadata.complete
    for damage in found.damages:
        path = opened.path / damage.name
        if damage.kind == "root" or damage.name == f"{PRIVATE}/root.json":
            write_durably(path, opened.content, sync=True)
        elif damage.kind == "metadata":
            path.parent.mkdir(exist_ok=True)
            write_durably(path, serialized(opened.metadata.arrays[damage.name.rpartition("/")[0]].document), sync=True)
        elif damage.kind == "stale" and complete:
            path.unlink(missing_ok=True)
        else:
            continue
        yield damage.name


def _digests(opened: StoreReader, found: Verification) -> Iterable[str]:
    if not any(damage.kind == "digests" for damage in found.damages):
        return
    digests = recomputed_digests(opened)
    if digest_chain(digests) != opened.metadata.digests:
        raise StoreError(
            f"{opened.path}: the digests are damaged and so is something they stand for, so that nothing tells what is "
            "right; encode the video again",
            kind="corrupt",
        )
    _rewrite(opened, {"digest": digests})
    yield "digest"


def _coordinates(opened: StoreReader, found: Verification, source: Any) -> Iterable[str]:
    """All coordinates, if any is damaged: they are small, and follow from time stamps and marks of the frames."""
    if not any(damage.kind == "coordinates" for damage in found.damages):
        return
    digests = opened.stored("digest", 0, opened.metadata.num_units)

    def agree(columns: Columns) -> bool:
        """Whether these are the coordinates that were published."""
        return all(
            opened.metadata.coordinates_agree(columns, digests, unit) for unit in range(opened.metadata.num_units)
        )

    columns = next((made for made in _candidates(opened, source) if agree(made)), None)
    if columns is None:
        raise StoreError(
            f"{opened.path}: the time stamps of its frames cannot be restored: the source gives other ones than those "
            "that were published",
            kind="mismatch",
        )
    _rewrite(opened, columns)
    yield from sorted(columns)


def _candidates(opened: StoreReader, source: Any) -> Iterator[Columns]:
    """What the coordinates may have been: by the time stamps that are there, then by those of the source."""
    schedule = opened.metadata.schedule
    if schedule is None:
        yield _frame_coordinates(opened, source)
        return
    pts, valid = opened.columns["frame_pts"], opened.columns["frame_valid"]
    if pts is not None and valid is not None:
        yield _latent_coordinates(opened, schedule, (pts, valid))
    num_frames = opened.metadata.num_frames
    yield _latent_coordinates(opened, schedule, _stamps_of_source(opened, schedule, num_frames, source))


def _latent_coordinates(opened: StoreReader, schedule: ChunkSchedule, stamps: Stamps) -> Columns:
    num_latents, num_frames = opened.metadata.main.shape[0], opened.metadata.num_frames
    pts, valid = stamps
    padded = np.array([schedule.frame_range(i) for i in range(num_latents)], np.int64)
    ranges = np.minimum(padded, num_frames)
    return {
        "t": seconds_of_latents(padded[:, 0], pts, 0, opened.metadata.time_base, opened.metadata.frame_rate),
        "frame_start": ranges[:, 0],
        "frame_stop": ranges[:, 1],
        "frame_pts": pts,
        "frame_valid": valid,
    }


def _stamps_of_source(opened: StoreReader, schedule: ChunkSchedule, num_frames: int, source: Any) -> Stamps:
    """Read the source again, without the model."""
    pts, valid, count = [], [], 0
    with open_source(_source_of(opened, source), **_reading(opened)) as video:
        for piece in frame_chunks(video, schedule, (video.info.height, video.info.width)):
            pts.append(piece.pts)
            valid.append(piece.valid)
            count += len(piece.pts)
            if count >= num_frames:
                break
    return np.concatenate(pts)[:num_frames], np.concatenate(valid)[:num_frames]


def _frame_coordinates(opened: StoreReader, source: Any) -> Columns:
    latents = open_store(_source_of(opened, source))
    first, last = opened.metadata.window or (0, None)
    num_frames = opened.metadata.num_frames
    pts = latents.frame_pts[first:last][:num_frames]
    base = latents.time_base
    return {
        "t": pts * base.numerator / base.denominator,
        "frame_pts": pts,
        "frame_valid": latents.frame_valid[first:last][:num_frames],
    }


def _rewrite(opened: StoreReader, columns: Columns) -> None:
    """Write whole arrays again; the metadata stays as it is."""
    store = StagedStore(opened.path, sync=True, rewritten=lambda _: True)
    for name, array in opened.metadata.arrays.items():
        store.stage(f"{name}/zarr.json", serialized(array.document))
    for name, values in columns.items():
        for file in (opened.path / name).glob("c.*"):
            file.unlink()  # zarr may look into a chunk before it replaces it
        open_array(store, name, opened.metadata.arrays[name].document)[:] = values
    store.commit(opened.content, settled=True)


def _data(session: VideoSession, opened: StoreReader, units: frozenset[int], source: Any) -> RunReport:
    where, path, metadata = _source_of(opened, source), opened.path, opened.metadata
    durability = Durability(snapshot_seconds=float("inf"))
    if metadata.kind == "frames":
        first, last = metadata.window or (0, metadata.num_frames)
        decoding = DecodeOptions(start=first, frames=last - first, durability=durability, mend=units)
        with session.running("repair") as job:
            return decode_video(job, session.decodable(where, path), path, decoding)
    encoding = EncodeOptions(
        representation=cast("Any", metadata.representation),
        store_dtype=cast("Any", str(metadata.main.dtype)),
        seed=metadata.seed,
        durability=durability,
        mend=units,
        **_reading(opened),
    )
    with session.running("repair") as job:
        return encode_video(job, where, path, encoding)


def _source_of(opened: StoreReader, source: Any) -> Any:
    if source is not None:
        return source
    metadata = opened.metadata
    recorded = metadata.latents if metadata.kind == "frames" else metadata.reading.source
    if recorded is None:
        raise StoreError(
            f"{opened.path} does not say where its source is; pass it with source= (--source)", kind="missing"
        )
    return recorded


def _reading(opened: StoreReader) -> dict[str, Any]:
    """Arguments with which the source was read."""
    return {name: getattr(opened.metadata.reading, name) for name in READING}

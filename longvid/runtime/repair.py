"""Repair: bring a store back, bit for bit, to what was published, with as little work as the damage allows.

Metadata comes back from its copy, digests from the data, coordinates from each other or from the source. Data that is
damaged is computed again, behind a warm-up (:mod:`longvid.runtime.span`), unless it was imported: then another program
made it, and all but the data can be restored. What is computed is compared with the
digests of what was published before it takes a place, so a repair restores, or says why it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from longvid.errors import ModelError, SourceError, StoreError
from longvid.events import Direction
from longvid.files import disk_errors, is_latent_file, write_durably
from longvid.frames import Marks, Times
from longvid.media.pipes import is_pipe
from longvid.media.sources import open_source
from longvid.runtime.admission import Job
from longvid.runtime.decode import DecodeOptions, decode_video
from longvid.runtime.encode import EncodeOptions, encode_video, frame_chunks
from longvid.runtime.session import VideoSession
from longvid.schedule import ChunkSchedule
from longvid.store.format import PRIVATE, digest_chain, serialized
from longvid.store.latent_writer import latent_coordinates
from longvid.store.lock import WriterLock
from longvid.store.metadata import StoreMetadata
from longvid.store.reader import StoreReader, open_reader, open_store
from longvid.store.staging import StagedStore, open_array
from longvid.store.verify import Verification, recomputed_digests, verify

__all__ = ["RepairReport", "repair"]

Columns: TypeAlias = dict[str, npt.NDArray[Any]]
"whole arrays by name"


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


def repair(session: VideoSession | None, path: str | Path, *, source: Any = None) -> RepairReport:
    """Restore what is damaged in a store, to the same bits.

    Args:
        session: with the model that made the store, in the dtype and on a device like those of that run; None for a
            store of imported latents, which no model can compute.
        path: the store.
        source: what it was made from, if that is not where the store says: a video, or the store of latents.

    Raises:
        StoreError: kind ``"mismatch"`` if source or model are not those of the store, ``"corrupt"`` if the root
            metadata and its copy are both damaged, or if imported latents are, which nothing here can compute.
        SourceError: the source is needed and cannot be read.
    """
    where = Path(path)
    before = verify(where)
    if before.ok:
        return RepairReport(before=before, after=before, restored=(), frames_computed=0)
    restored: list[str] = []
    with disk_errors(where), ExitStack() as stack:
        (where / PRIVATE).mkdir(exist_ok=True)
        stack.callback(WriterLock.acquire(where / PRIVATE / "lock").release)
        opened = open_reader(where, strict=False)
        if opened.disputed:
            raise StoreError(
                f"{where}: the root metadata and its copy are both whole and contradict each other, so that nothing "
                "tells which is right; put the right one in both places, or encode the video again",
                kind="corrupt",
            )
        restored += _metadata(opened, before)
        kinds = {damage.kind for damage in before.damages}
        if "digests" in kinds:
            restored += _digests(opened)
        if "coordinates" in kinds:
            restored += _coordinates(opened, source)
    units = frozenset(d.unit for d in before.damages if d.kind == "data" and d.unit is not None)
    frames = _data(session, opened, units, source) if units else 0
    restored += sorted(d.name for d in before.damages if d.kind == "data")
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


def _digests(opened: StoreReader) -> list[str]:
    digests = recomputed_digests(opened)
    if digest_chain(digests) != opened.metadata.digests:
        raise StoreError(
            f"{opened.path}: the digests are damaged and so is something they stand for, so that nothing tells what is "
            "right; encode the video again",
            kind="corrupt",
        )
    _rewrite(opened, {"digest": digests})
    return ["digest"]


def _coordinates(opened: StoreReader, source: Any) -> list[str]:
    """All of them, since they are small."""
    digests = opened.stored("digest", 0, opened.metadata.num_units)
    for pts, valid in _stamps(opened, source):
        columns = _columns(opened.metadata, pts, valid)
        if opened.metadata.unit_with_other(columns, digests) is None:
            _rewrite(opened, columns)
            return sorted(columns)
    raise StoreError(
        f"{opened.path}: the time stamps of its frames cannot be restored: the source gives other ones than those that "
        "were published",
        kind="mismatch",
    )


def _stamps(opened: StoreReader, source: Any) -> Iterator[tuple[Times, Marks]]:
    """What time stamps and marks may have been: those that are there, then those of the source, without the model."""
    there = opened.columns["frame_pts"], opened.columns["frame_valid"]
    if there[0] is not None and there[1] is not None:
        yield there[0], there[1]
    metadata = opened.metadata
    if metadata.imported:  # they have no source, and are counted
        yield np.arange(metadata.num_frames), np.ones(metadata.num_frames, np.bool_)
        return
    where = _source_of(opened, source)
    if metadata.schedule is None:
        latents, (first, last) = open_store(where), metadata.window or (0, metadata.num_frames)
        yield latents.frame_pts[first:last], latents.frame_valid[first:last]
        return
    with open_source(where, **asdict(metadata.reading)) as video:
        first = 0 if metadata.part is None else metadata.schedule.index_of_frame(metadata.part.frame)
        pieces = frame_chunks(video, metadata.schedule, (video.info.height, video.info.width), first=first)
        read = [
            (piece.pts, piece.valid) for piece in islice(pieces, metadata.schedule.num_chunks(metadata.num_frames + 1))
        ]
    pts, valid = (np.concatenate(stamps)[: metadata.num_frames] for stamps in zip(*read, strict=True))
    yield pts, valid


def _columns(metadata: StoreMetadata, pts: Times, valid: Marks) -> Columns:
    """All coordinates: they follow from time stamps and marks of the frames."""
    base, part, stamps = metadata.time_base, metadata.part, {"frame_pts": pts, "frame_valid": valid}
    if metadata.schedule is None:
        return {"t": pts * base.numerator / base.denominator, **stamps}
    row, frame = (0, 0) if part is None else (part.row, part.frame)
    rows, stop = range(row, row + metadata.main.shape[0]), frame + metadata.num_frames
    return latent_coordinates(metadata.schedule, rows, stop, pts, frame, base, metadata.frame_rate) | stamps


def _rewrite(opened: StoreReader, columns: Columns) -> None:
    """Write whole arrays again; the metadata stays as it is."""
    store = StagedStore(opened.path, sync=True, rewritten=lambda _: True)
    documents = {name: array.document for name, array in opened.metadata.arrays.items()}
    for name, values in columns.items():
        for file in (opened.path / name).glob("c.*"):
            file.unlink()  # zarr may look into a chunk before it replaces it
        open_array(store, name, documents[name])[:] = values
    store.commit(opened.content, documents, settled=True)


def _data(session: VideoSession | None, opened: StoreReader, units: frozenset[int], source: Any) -> int:
    """Compute units again; returns how many frames went through the model."""
    path, metadata = opened.path, opened.metadata
    if metadata.imported:
        raise StoreError(
            f"{path}: {len(units)} of its units are damaged, and its latents were imported from "
            f"{metadata.source.get('name')}: another program made them, and they cannot be computed again. Import them "
            "once more (lv.import_latents with overwrite=True)",
            kind="corrupt",
        )
    if session is None:
        raise ModelError(f"{path} has damaged data, which only a session with the model that made it can compute again")
    where, num_frames = _source_of(opened, source), 0
    with session.running("repair") as job:
        for cluster in _clusters(units, metadata, job):
            if metadata.kind == "frames":
                first, last = metadata.window or (0, metadata.num_frames)
                decoding = DecodeOptions(start=first, frames=last - first, mend=cluster, part=metadata.part)
                report = decode_video(job, where, path, decoding)
            else:
                encoding = EncodeOptions(
                    reading=metadata.reading,
                    representation=cast("Any", metadata.representation),
                    store_dtype=cast("Any", str(metadata.main.dtype)),
                    seed=metadata.seed,
                    mend=cluster,
                    part=metadata.part,
                    chunk_plan="reference" if metadata.schedule and metadata.schedule.is_reference else "online",
                )
                report = encode_video(job, where, path, encoding)
            num_frames += report.frames_computed
    return num_frames


def _clusters(units: frozenset[int], metadata: StoreMetadata, job: Job) -> list[frozenset[int]]:
    """Units whose gaps are shorter than a warm-up together, since one run computes them with less work."""
    direction: Direction = "encode" if metadata.kind == "latents" else "decode"
    schedule = metadata.schedule or ChunkSchedule.from_dict(metadata.fingerprint["chunk_plan"])
    try:
        gap = job.control.warmup(direction, schedule).chunks
    except ModelError:  # every run begins at frame 0
        return [units]
    gap *= schedule.chunk_latents if direction == "encode" else schedule.chunk_frames
    clusters: list[list[int]] = []
    for unit in sorted(units):
        if not clusters or (unit - clusters[-1][-1] - 1) * metadata.main.chunks[0] > gap:
            clusters.append([])
        clusters[-1].append(unit)
    return [frozenset(cluster) for cluster in clusters]


def _source_of(opened: StoreReader, source: Any) -> Any:
    origin = opened.metadata.origin if source is None else source
    if opened.metadata.kind == "frames" and isinstance(origin, (str, Path)) and is_latent_file(origin):
        raise StoreError(
            f"{opened.path} was decoded from {origin}, a file of latents; make a store of it, as it was decoded "
            "(lv.import_latents), and pass that with source= (--source)",
            kind="missing",
        )
    if is_pipe(origin):
        raise SourceError(
            f"{origin} can be read once only, and a repair reads its source where the damage is; give a file",
            kind="layout",
        )
    if origin is None:
        raise StoreError(
            f"{opened.path} does not say where its source is; pass it with source= (--source)", kind="missing"
        )
    return origin

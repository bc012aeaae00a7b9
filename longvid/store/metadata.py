"""Owns the typed metadata of a store: :class:`StoreMetadata`, parsed once from the root document.

Whatever is not as this version of the format writes it raises :class:`~longvid.errors.StoreError` here, so that the
code that uses the values needs no checks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt

from longvid.errors import ScheduleError, StoreError
from longvid.frames import Deinterlace, Fit, OnError, Pixels
from longvid.schedule import ChunkSchedule
from longvid.store.format import (
    COORDINATE_NAMES,
    DATA_NAMES,
    DIGEST_BYTES,
    FORMAT_VERSION,
    StoreKind,
    chunk_file,
    unit_digest,
)
from longvid.store.validation import check_arrays

__all__ = ["ArrayMetadata", "Part", "ReadOptions", "RunFacts", "Seam", "StoreMetadata", "ratio", "store_kind"]

T = TypeVar("T")


class ArrayMetadata:
    """The ``zarr.json`` of one array at the last commit, which passed :func:`.check_arrays`."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.shape: tuple[int, ...] = tuple(document["shape"])
        self.chunks: tuple[int, ...] = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        self.dtype: np.dtype[Any] = np.dtype(document["data_type"])
        self.attributes: dict[str, Any] = document["attributes"]
        self.chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize

    @property
    def chunk_files(self) -> list[str]:
        """Names of the files of the committed chunks."""
        return [chunk_file(number, len(self.shape)) for number in range(-(-self.shape[0] // self.chunks[0]))]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How the run read its source; a repair reads it again in the same way."""

    start: int = 0
    frames: int | None = None
    size: tuple[int, int] | None = None
    frame_rate: Fraction | None = None
    on_error: OnError = "stop"
    fit: Fit | None = None
    pixels: Pixels = "kept"
    fps: Fraction | None = None
    deinterlace: Deinterlace = "auto"
    background: str = "black"

    @property
    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "frame_rate": ratio(self.frame_rate), "fps": ratio(self.fps)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a store records of the run that makes it."""

    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    "everything that decides the bits of the result"
    vae: Mapping[str, Any] = field(default_factory=dict)
    "facts of the model"
    extra: Mapping[str, Any] = field(default_factory=dict)
    "further facts for the attribute ``longvid``"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a video a store holds, and where it begins. It shares its first chunk with the part before."""

    number: int
    "from 1 on"
    of: int
    row: int
    "row of the main array of the whole video that is row 0 here"
    frame: int
    "frame of the whole video that is frame 0 here"
    overlap: int
    "rows at the beginning that the part before has too"

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """Where the values of a store begin to be those of another machine or of other libraries."""

    frame: int
    before: dict[str, Any]
    "what differs, by the names of the fields, in the run before the frame"
    after: dict[str, Any]

    def __str__(self) -> str:
        fields = [f"{name} {old} -> {self.after.get(name)}" for name, old in self.before.items()]
        return f"other values from frame {self.frame} on ({', '.join(fields) or 'nothing that is recorded differs'})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMetadata:
    """Everything that the root metadata of a store say. Made by :meth:`parse`."""

    root: dict[str, Any]
    "the whole document"
    kind: StoreKind
    complete: bool
    "whether the whole video is in the store"
    num_frames: int
    "committed frames of the video, without padding"
    arrays: Mapping[str, ArrayMetadata]
    "empty before the first commit"
    digests: str
    "one digest of everything that is committed"
    epoch: str
    "identifies the writer that committed last"
    fingerprint: dict[str, Any]
    numerics: dict[str, Any] | None
    tiling: dict[str, int | str | None] | None
    "slices and row tiles of the run that committed last; on some processors they decide the last bits"
    height: int
    width: int
    time_base: Fraction
    "seconds per unit of the time stamps"
    frame_rate: Fraction | None
    "mean frames per second"
    sample_aspect_ratio: Fraction
    "width of a pixel by its height"
    schedule: ChunkSchedule | None
    "how a store of latents was cut into chunks; None for frames"
    representation: str
    "``mode``, ``sample``, ``moments``, or ``imported`` for latents that another program made; empty for frames"
    seed: int
    reading: ReadOptions
    origin: str | None
    "the video that was encoded, or the store that frames were decoded from"
    window: tuple[int, int] | None
    "range of the video's frames that a store of frames holds"
    part: Part | None
    "which part of a video the store holds; None for all of it"
    seams: tuple[Seam, ...]
    "where a run was continued that computed other values; see :data:`longvid.store.durability.Resume`"

    @classmethod
    def parse(cls, root: Mapping[str, Any], *, where: str) -> StoreMetadata:
        """Parse the ``zarr.json`` of a store of ours; messages call the store ``where``.

        Raises:
            StoreError: kind ``"foreign"`` if longvid did not write it, ``"format"`` for another version of the format,
                ``"refused"`` for arrays that the format does not have, ``"corrupt"`` for anything else.
        """
        kind, facts = store_kind(root, where=where)
        documents = check_arrays(root, kind, where=where)
        arrays = {name: ArrayMetadata(document) for name, document in documents.items()}
        try:
            metadata = cls(**_facts(root, facts, kind, arrays))
            if arrays:
                metadata._check_lengths()
            return metadata
        except (_WrongValueError, ScheduleError, ZeroDivisionError) as exc:
            raise StoreError(f"{where}: the root metadata are damaged: {exc}", kind="corrupt") from exc

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes of the group."""
        return cast("dict[str, Any]", self.root["attributes"])

    @property
    def vae(self) -> dict[str, Any]:
        """Facts of the model; of a store of frames, those of the model that made the latents."""
        record = self.attributes if self.kind == "latents" else self.attributes["longvid"]
        return cast("dict[str, Any]", record.get("vae") or {})

    @property
    def source(self) -> dict[str, Any]:
        """Facts of the video."""
        return cast("dict[str, Any]", self.attributes.get("source") or {})

    @property
    def imported(self) -> bool:
        """Whether the latents came from another program, so that no run can compute them again."""
        return self.representation == "imported"

    @property
    def compute(self) -> dict[str, Any]:
        """The part of the fingerprint that describes the computation."""
        return dict(self.fingerprint.get("compute") or {})

    @property
    def data_names(self) -> tuple[str, ...]:
        """Arrays that hold data, the main array first."""
        return tuple(name for name in DATA_NAMES[self.kind] if name in self.arrays)

    @property
    def coordinate_names(self) -> tuple[str, ...]:
        """Arrays that hold coordinates, in the order in which they are digested."""
        return COORDINATE_NAMES[self.kind] if self.arrays else ()

    @property
    def main(self) -> ArrayMetadata:
        """The first data array."""
        return self.arrays[self.data_names[0]]

    @property
    def num_units(self) -> int:
        """Committed units."""
        return self.arrays["digest"].shape[0] if self.arrays else 0

    def rows(self, unit: int) -> tuple[int, int]:
        """Half-open range of rows of the main array in a unit."""
        length = self.main.chunks[0]
        return unit * length, min((unit + 1) * length, self.main.shape[0])

    def frames(self, unit: int) -> tuple[int, int]:
        """Half-open range of frames in a unit."""
        start, stop = self.rows(unit)
        return self.padded_frames(start)[0], min(self.padded_frames(stop - 1)[1], self.num_frames)

    def padded_frames(self, row: int) -> tuple[int, int]:
        """Half-open range of frames that a row of the main array stands for, padding included."""
        if self.schedule is None:
            return row, row + 1
        before, frame = (0, 0) if self.part is None else (self.part.row, self.part.frame)
        first, last = self.schedule.frame_range(before + row)
        return first - frame, last - frame

    def coordinate_rows(self, name: str, unit: int) -> tuple[int, int]:
        """Half-open range of rows of a coordinate in a unit."""
        return self.frames(unit) if name in ("frame_pts", "frame_valid") else self.rows(unit)

    def unit_with_other(self, columns: Mapping[str, npt.NDArray[Any]], digests: npt.NDArray[np.uint8]) -> int | None:
        """The first unit whose digest is not that of these coordinates, whole arrays by name; None if all agree."""
        for unit in range(self.num_units):
            parts = (columns[name][slice(*self.coordinate_rows(name, unit))] for name in self.coordinate_names)
            if not np.array_equal(unit_digest(parts), digests[unit, -1]):
                return unit
        return None

    def _check_lengths(self) -> None:
        """The arrays of a store have lengths that follow from each other."""
        rows, chunk, *tail = self.main.shape[0], self.main.chunks[0], *self.main.shape[1:]
        expected = dict.fromkeys(("t", "frame_start", "frame_stop"), (rows,))
        expected |= dict.fromkeys(("frame_pts", "frame_valid"), (self.num_frames,))
        expected["digest"] = (-(-rows // chunk), len(self.data_names) + 1, DIGEST_BYTES)  # type: ignore[assignment]
        if "moments" in self.arrays:
            expected["moments"] = (rows, 2 * tail[0], *tail[1:])  # type: ignore[assignment]
        for name, array in self.arrays.items():
            if array.shape != expected.get(name, array.shape):
                raise _WrongValueError(f"{name} has the shape {array.shape}, {expected[name]} follows from the others")
            if name in self.data_names and array.chunks[0] != chunk:
                raise _WrongValueError(f"{name} has chunks of {array.chunks[0]} rows, the main array of {chunk}")
        most = self.padded_frames(rows - 1)[1] if rows else 0
        if not 0 < self.num_frames <= most or (self.schedule is None and self.num_frames != rows):
            raise _WrongValueError(f"it claims {self.num_frames} frames in {rows} rows")


def store_kind(root: Mapping[str, Any], *, where: str) -> tuple[StoreKind, dict[str, Any]]:
    """What a store of ours holds, and its attribute ``longvid``; StoreError for what this version does not read."""
    attributes = root.get("attributes")
    facts = attributes.get("longvid") if isinstance(attributes, dict) else None
    if not isinstance(facts, dict):
        raise StoreError(f"{where} is a zarr store that longvid did not write", kind="foreign")
    version, kind = facts.get("format_version"), facts.get("kind")
    if version != FORMAT_VERSION or kind not in ("latents", "frames"):
        raise StoreError(
            f"{where} holds {ascii(kind)[:40]} in format {ascii(version)[:40]}; this version of longvid reads latents "
            f"and frames in format {FORMAT_VERSION}",
            kind="format",
        )
    return cast("StoreKind", kind), facts


class _WrongValueError(Exception):
    """A value is not of the type that this version writes."""


def _get(record: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = record.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _WrongValueError(f"{key} is {ascii(value)[:60]}, a {kind.__name__} is expected")
    return value


def _optional(record: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    return None if record.get(key) is None else _get(record, key, kind)


def ratio(value: Fraction | None) -> str | None:
    """A fraction as metadata have it."""
    return None if value is None else f"{value.numerator}/{value.denominator}"


def _fraction(record: Mapping[str, Any], key: str) -> Fraction | None:
    text = _optional(record, key, str)
    try:
        return None if text is None else Fraction(text)
    except ValueError as exc:
        raise _WrongValueError(f"{key} is {ascii(text)[:60]}, a fraction such as '30000/1001' is expected") from exc


def _facts(
    root: Mapping[str, Any], facts: dict[str, Any], kind: StoreKind, arrays: Mapping[str, ArrayMetadata]
) -> dict[str, Any]:
    """The fields of :class:`StoreMetadata`. A store without arrays may lack what describes them."""
    fingerprint = _get(facts, "fingerprint", dict, {})
    source, run = _get(root["attributes"], "source", dict, None if arrays else {}), _get(facts, "run", dict, {})
    size: tuple[int, ...] = (0, 0)
    time_base, schedule = Fraction(1) if not arrays else None, None
    if arrays and kind == "latents":
        size, time_base = (_get(source, "height", int), _get(source, "width", int)), _fraction(source, "time_base")
        _get(root["attributes"], "vae", dict)
    elif arrays:
        size = arrays["frames"].shape[1:3]
        time_base = _fraction(arrays["frame_pts"].attributes, "time_base")
    if kind == "latents":
        schedule = ChunkSchedule.from_dict(_get(facts, "chunk_plan", dict))
    if time_base is None or (arrays and (min(size) <= 0 or time_base <= 0)):
        raise _WrongValueError(f"the size {size} or the time base {time_base} is not positive")
    pixel_aspect = _fraction(source, "sample_aspect_ratio") or Fraction(1)
    if pixel_aspect < 0:
        raise _WrongValueError(f"sample_aspect_ratio is {pixel_aspect}, a ratio above 0 is expected")
    return {
        "root": dict(root),
        "kind": kind,
        "complete": facts.get("status") == "complete",
        "num_frames": _get(facts, "num_frames", int),
        "arrays": arrays,
        "digests": _get(facts, "digests", str, None if arrays else ""),
        "epoch": _get(facts, "epoch", str, ""),
        "fingerprint": fingerprint,
        "numerics": _optional(facts, "numerics", dict),
        "tiling": _tiling(_optional(facts, "tiling", dict)),
        "height": size[0],
        "width": size[1],
        "time_base": time_base,
        "frame_rate": _fraction(source if kind == "latents" else facts, "frame_rate"),
        "sample_aspect_ratio": pixel_aspect,
        "schedule": schedule,
        "representation": _get(facts, "representation", str, None if kind == "latents" else ""),
        "seed": _get(facts, "seed", int, 0),
        "reading": _reading(run),
        "origin": _optional(facts, "latents", str) if kind == "frames" else _optional(run, "source", str),
        "window": _pair(fingerprint, "window"),
        "part": _part(_optional(facts, "part", dict)),
        "seams": tuple(_seam(record) for record in _get(facts, "seams", list, [])),
    }


def _reading(run: Mapping[str, Any]) -> ReadOptions:
    fit = _optional(run, "fit", str)
    return ReadOptions(
        start=_get(run, "start", int, 0),
        frames=_optional(run, "frames", int),
        size=_pair(run, "size"),
        frame_rate=_fraction(run, "frame_rate"),
        on_error=_word(run, "on_error", OnError, "stop"),
        fit=None if fit is None else _word(run, "fit", Fit, fit),
        pixels=_word(run, "pixels", Pixels, "kept"),
        fps=_fraction(run, "fps"),
        deinterlace=_word(run, "deinterlace", Deinterlace, "auto"),
        background=_get(run, "background", str, "black"),
    )


def _word(record: Mapping[str, Any], key: str, words: Any, default: str) -> Any:
    """One of the words of a Literal."""
    value = _get(record, key, str, default)
    if value not in get_args(words):
        raise _WrongValueError(f"{key} is {ascii(value)[:60]}, one of {', '.join(get_args(words))} is expected")
    return value


def _tiling(record: dict[str, Any] | None) -> dict[str, int | str | None] | None:
    if record is None:
        return None
    found = {name: _optional(record, name, int) for name in ("slice_frames", "slice_elements", "tile_elements")}
    if not all(value is None or value > 0 for value in found.values()):
        raise _WrongValueError(f"tiling is {found}, numbers above 0 are expected")
    pieces = _optional(record, "pieces", str)
    if pieces not in (None, "resnets", "stages"):
        raise _WrongValueError(f"pieces are {pieces!r}, 'resnets' or 'stages' are expected")
    return {**found, **({} if pieces is None else {"pieces": pieces})}


def _part(record: dict[str, Any] | None) -> Part | None:
    if record is None:
        return None
    values = {field.name: _get(record, field.name, int) for field in fields(Part)}
    if not 1 <= values["number"] <= values["of"] or min(values["row"], values["frame"], values["overlap"]) < 0:
        raise _WrongValueError(f"{values} is no part of a video")
    return Part(**values)


def _seam(record: Any) -> Seam:
    if not isinstance(record, dict):
        raise _WrongValueError(f"a seam is {ascii(record)[:60]}, a record is expected")
    before, after = (_get(record, side, dict) for side in ("before", "after"))
    return Seam(frame=_get(record, "frame", int), before=before, after=after)


def _pair(record: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    value = _optional(record, key, list)
    if value is not None and [type(n) for n in value] != [int, int]:
        raise _WrongValueError(f"{key} is {ascii(value)[:60]}, two whole numbers are expected")
    return None if value is None else (value[0], value[1])

"""Recordings of runs as lines of JSON: the callback that writes them, and the function that reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from longvid.errors import SessionStateError, StoreError
from longvid.events import ChunkEvent, LayerContext, RunObserver, RunReport, RunStart, Span
from longvid.files import check_file_target

__all__ = ["Recorded", "Recorder", "read_recording"]

Recorded: TypeAlias = RunStart | ChunkEvent | RunReport | None
"one line of a recording; None for the end of a run that failed"
_FIRST_BYTES = b'{"event":"start"'


class Recorder(RunObserver):
    """Callback that writes one line for the start of a run, one for each chunk, and one for its end.

    Every line is an object with ``event``, which is ``"start"``, ``"chunk"`` or ``"finish"``, and the fields of
    :class:`RunStart`, :class:`ChunkEvent` or :class:`RunReport`. The ``"finish"`` of a run that failed has
    ``"failed": true`` and nothing else. Each line is flushed, so that a run that is killed leaves whole lines.

    Args:
        path: the file. Nothing is written before the first run starts. A recording whose last run was not completed
            is continued: the next run is appended to it.
        overwrite: whether an existing file may be replaced.
        wants_spans: whether chunks carry what each layer did and when: some 40 kB per chunk with a large model.

    Raises:
        StoreError: ``path`` cannot be written, or holds anything else and ``overwrite`` is not set.

    One recorder can serve several runs, one after the other. Use it as a context manager, which closes its file.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, wants_spans: bool = True) -> None:
        self._kept_bytes = None if overwrite else _unfinished_bytes(Path(path))
        check_file_target(path, overwrite=overwrite or self._kept_bytes is not None, what="recording")
        self.wants_spans = wants_spans
        self._path = Path(path)
        self._file: TextIO | None = None
        self._closed = False

    def run_started(self, start: RunStart) -> None:
        """Record what a run is about to do."""
        self._write("start", asdict(start))

    def __call__(self, event: ChunkEvent) -> None:
        """Record a chunk."""
        self._write("chunk", asdict(event))

    def run_finished(self, report: RunReport | None) -> None:
        """Record how a run ended."""
        self._write("finish", {"failed": True} if report is None else asdict(report))

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if self._closed:
            raise SessionStateError(f"the recorder of {self._path} is closed; make a new one with another name")
        line = json.dumps({"event": event, **fields}, separators=(",", ":")) + "\n"
        try:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8", newline="\n")
                self._file.truncate(self._kept_bytes or 0)
            self._file.write(line)
            self._file.flush()
        except OSError as exc:
            raise StoreError(f"{self._path} cannot be written: {exc.strerror}; make room on the disk") from exc

    def close(self) -> None:
        """Close the file. May be called again."""
        self._closed = True
        if self._file is not None:
            with suppress(OSError):  # every line was flushed, and a full disk was reported then
                self._file.close()
            self._file = None


def read_recording(path: str | os.PathLike[str]) -> Iterator[Recorded]:
    """Yield what a :class:`Recorder` wrote, one line at a time: a recording may be larger than memory.

    A last line that is incomplete, since the run was killed, is left out.

    Raises:
        StoreError: the file is missing (at once, before the first line is asked for), or a line is damaged or is not
            of a recording.
    """
    where = Path(path)
    if not where.is_file():
        raise StoreError(f"there is no recording {where}; check the name", kind="missing")
    return _lines(where)


def _unfinished_bytes(path: Path) -> int | None:
    """Bytes of the whole lines of a recording whose last run was not completed; None for any other file, or none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if not file.read(len(_FIRST_BYTES)).startswith(_FIRST_BYTES):
            return None
        file.seek(0)
        num_bytes, last = 0, b""
        for line in file:
            if line.endswith(b"\n"):
                num_bytes, last = num_bytes + len(line), line
    completed = last.startswith(b'{"event":"finish"') and b'"complete":true' in last
    return None if completed else num_bytes


def _lines(path: Path) -> Iterator[Recorded]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = _parse(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                if not line.endswith("\n"):
                    return
                raise StoreError(
                    f"{path}: line {number} is damaged ({exc}); the lines before it can be read", kind="corrupt"
                ) from exc
            yield item


def _parse(fields: dict[str, Any]) -> Recorded:
    event = fields.pop("event")
    if event == "start":
        return RunStart(**{**fields, "layers": tuple(LayerContext(**layer) for layer in fields["layers"])})
    if event == "chunk":
        return ChunkEvent(**{**fields, "spans": tuple(Span(**span) for span in fields["spans"])})
    if event == "finish":
        return None if fields.get("failed") else RunReport(**fields)
    raise ValueError(f"no such event: {event!r}")

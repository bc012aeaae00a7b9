"""A callback that records runs as lines of JSON, and the way back from such a recording to the events."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from longvid.errors import SessionStateError, StoreError
from longvid.events import Callback, ChunkEvent, LayerContext, RunReport, RunStart, Span
from longvid.files import check_file_target

__all__ = ["Recorded", "Recorder", "read_recording", "replay"]

Recorded: TypeAlias = RunStart | ChunkEvent | RunReport | None
"one line of a recording; None for a run that failed"


class Recorder:
    """Writes one line for the start of a run, one for each chunk, and one for its end.

    Every line is an object with ``event``, which is ``"start"``, ``"chunk"`` or ``"finish"``, and the fields of
    :class:`RunStart`, :class:`ChunkEvent` or :class:`RunReport`. The ``"finish"`` of a run that failed has
    ``"failed": true`` and nothing else. Each line is flushed, so that a run that is killed leaves whole lines.

    Args:
        path: the file. Nothing is written before the first run starts.
        overwrite: whether a recording that is there may be replaced. Another file never is.
        wants_spans: whether chunks carry what each layer did and when: some 40 kB per chunk with a large model.

    Raises:
        StoreError: ``path`` cannot be written.

    One recorder may serve several runs, one after the other. Use it as a context manager, which closes its file.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, wants_spans: bool = True) -> None:
        check_file_target(path, overwrite=overwrite, what="recording", is_ours=_is_recording)
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
                self._file = self._path.open("w", encoding="utf-8", newline="\n")
            self._file.write(line)
            self._file.flush()
        except OSError as exc:
            raise StoreError(f"{self._path} cannot be written: {exc.strerror}") from exc

    def close(self) -> None:
        """Close the file. May be called again."""
        self._closed = True
        if self._file is not None:
            with suppress(OSError):  # every line was flushed; what a full disk refused was told then
                self._file.close()
            self._file = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_recording(path: str | os.PathLike[str]) -> Iterator[Recorded]:
    """What a :class:`Recorder` was told, in order, one line at a time: a recording may be larger than memory.

    A last line that was torn by a killed run is left out.

    Raises:
        StoreError: the file is missing or is not a recording (both at once, before the first line is asked for), or
            a line is damaged.
    """
    where = Path(path)
    if not where.is_file():
        raise StoreError(f"there is no recording {where}", kind="missing")
    if not _is_recording(where):
        raise StoreError(f"{where} is not a longvid recording", kind="foreign")
    return _lines(where)


def replay(path: str | os.PathLike[str], callback: Callback) -> None:
    """Tell a callback what was recorded, as if the runs took place now.

    A run whose end is missing, since it was killed, ends as one that failed.

    Raises:
        StoreError: as :func:`read_recording`.
    """
    started = getattr(callback, "run_started", lambda _: None)
    finished = getattr(callback, "run_finished", lambda _: None)
    running = False
    for item in read_recording(path):
        if isinstance(item, ChunkEvent):
            callback(item)
        elif isinstance(item, RunStart):
            if running:
                finished(None)
            started(item)
            running = True
        else:
            finished(item)
            running = False
    if running:
        finished(None)


def _is_recording(path: Path) -> bool:
    """By its first line, which may be torn: the first run can be killed as early as that."""
    with path.open("rb") as file:
        return file.read(16).startswith(b'{"event":"start"')


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

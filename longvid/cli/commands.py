"""The commands: each reads its arguments, calls the library and prints. Heavy modules are imported inside them.

Exit codes: 0 done, 1 failed check, 2 wrong usage, 3 bad source, 4 store problem, 5 memory budget, 6 model problem;
129, 130 and 143 mean stopped by SIGHUP, SIGINT and SIGTERM, and the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvid.cli.importing import check_import_options, imported
from longvid.cli.parser import Command, make_parser
from longvid.cli.signals import Ended, StopRequest, handle_signals
from longvid.environment import map_large_allocations
from longvid.errors import (
    LongvidError,
    MemoryBudgetError,
    ModelError,
    OptionError,
    ScheduleError,
    SourceError,
    StoreError,
)
from longvid.events import ChunkEvent, RunObserver, RunReport, RunStart
from longvid.files import is_latent_file
from longvid.units import format_bytes

if TYPE_CHECKING:
    from longvid.models.base import CausalVAE
    from longvid.runtime.session import VideoSession

__all__ = ["main"]

_EXIT_CODES = {OptionError: 2, ScheduleError: 2, SourceError: 3, StoreError: 4, MemoryBudgetError: 5, ModelError: 6}
_LOADED = ("random_weights", "revision", "allow_pickle_weights")
_PLANNED = ("device", "memory", "offload", "reserved", "chunk_frames", "slice_frames", "layout", "paired_frames")
"""options of plans and sessions alike"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser(_COMMANDS).parse_args(argv)
    command: Command = args.run
    args.stop = StopRequest()
    with handle_signals(args.stop, restore=argv is not None), _one_line_warnings():
        try:
            code = command(args)
            sys.stdout.flush()  # here, where a reader that has gone can still be handled
            return code
        except LongvidError as exc:
            return _failed(
                args, f"{exc}", next((code for kind, code in _EXIT_CODES.items() if isinstance(exc, kind)), 1)
            )
        except KeyboardInterrupt as exc:
            return _failed(args, _left_behind(args), exc.exit_code if isinstance(exc, Ended) else 130)
        except BrokenPipeError:  # the reader of the output, such as head, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as if SIGPIPE had ended it


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    if args.debug:
        traceback.print_exc()
    print(f"longvid: {message}", file=sys.stderr)
    return code


def _left_behind(args: argparse.Namespace) -> str:
    from longvid.media.pipes import is_pipe

    out = getattr(args, "store" if args.command == "encode" else "out", None)
    left = "nothing was written"
    out = None if out is None else _part_path(args, out)
    if out is not None and Path(out).is_dir():
        left = f"{out} holds what was finished; run the same command again to resume"
        if args.command == "encode" and is_pipe(args.source):
            left = f"{out} holds what was finished; {args.source} cannot be read again, so that nothing continues it"
    elif args.command == "decode":
        left = "an unfinished video file cannot be resumed and was removed; decode to .zarr to be able to resume"
    return f"interrupted; {left}"


# ------------------------------------------------------------------------------------------------- commands


def _encode(args: argparse.Namespace) -> int:
    from longvid.media.limits import Limits
    from longvid.media.pipes import STANDARD_INPUT
    from longvid.store.target import check_target

    if args.store == STANDARD_INPUT:
        raise OptionError("a store is a folder and cannot be written to standard output; name it, such as out.zarr")
    out = _part_path(args, args.store)
    found = check_target(out)  # before a model is loaded
    limits = Limits(**{f.name: value for f in fields(Limits) if (value := getattr(args, f.name, None)) is not None})
    names = ("representation", "chunk_plan", "seed", "start", "frames", "size", "store_dtype", "on_error")
    reading = ("fps", "fit", "pixels", "deinterlace", "background", "on_non_finite", "follow", "follow_seconds")
    options = {**_options(args, (*names, *reading)), "frame_rate": args.assume_fps}
    with _session(args, output_complete=found.complete) as session:
        report = session.encode(args.source, args.store, limits=limits, **options, **_safety(args))
    return _show(args, report, out)


def _decode(args: argparse.Namespace) -> int:
    from longvid.store.reader import open_store
    from longvid.store.target import check_target

    check_import_options(args)
    output = _options(args, ("codec", "crf", "pix_fmt", "audio"))
    store, out = None if is_latent_file(args.store) else open_store(args.store), _part_path(args, args.out)
    is_complete = Path(args.out).suffix == ".zarr" and check_target(out).complete
    if store is not None:
        _take_recorded_model(args, store.vae)
    with _session(args, output_complete=is_complete) as session, ExitStack() as stack:
        latents = store if store is not None else stack.enter_context(imported(args, session.model))
        report = session.decode(latents, args.out, start=args.start, frames=args.frames, **output, **_safety(args))
    return _show(args, report, out)


def _info(args: argparse.Namespace) -> int:
    from longvid.cli.info import describe_store

    facts, text = describe_store(args.store)
    print(json.dumps(facts) if args.json else text)
    return 0


def _join(args: argparse.Namespace) -> int:
    from longvid.store.parts import join
    from longvid.store.reader import open_reader

    store = open_reader(join(args.store, overwrite=args.overwrite)).metadata
    if args.json:
        print(json.dumps({"frames": store.num_frames, "complete": store.complete}))
    elif not args.quiet:
        print(f"{args.store}: {store.num_frames} frames, joined of all parts, which can be removed now")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from longvid.store.verify import verify

    found = verify(args.store)
    print(json.dumps(found.to_dict()) if args.json else found.explain())
    return 0 if found.ok else 1


def _repair(args: argparse.Namespace) -> int:
    from longvid.runtime.repair import repair
    from longvid.store.reader import open_reader

    metadata = open_reader(args.store, strict=False).metadata
    made_by = metadata.compute
    if not metadata.imported:
        _take_recorded_model(args, metadata.vae)
    numerics = made_by.get("numerics", {})
    vars(args).update(offload="auto", reserved=None, profile=None, slice_frames=None, report=None, record=None)
    args.dtype = args.dtype or made_by.get("dtype")
    args.layout = numerics.get("layout", "auto")
    args.paired_frames = numerics.get("paired_frames", "auto")
    args.chunk_frames = metadata.fingerprint.get("chunk_plan", {}).get("chunk_frames")
    with nullcontext() if metadata.imported else _session(args) as session:
        done = repair(session, args.store, source=args.source)
    print(json.dumps(done.to_dict()) if args.json else done.explain())
    return 0 if done.ok else 1


def _plan(args: argparse.Namespace) -> int:
    from longvid.models.loading import load_architecture
    from longvid.planning.planner import make_plan

    height, width = args.size
    model = load_architecture(args.model, allow_pickle_weights=args.allow_pickle_weights)
    plan = make_plan(model, height=height, width=width, dtype=_dtype(args), **_options(args, _PLANNED))
    print(json.dumps(plan.to_dict()) if args.json else plan.explain())
    return 0


def _check(args: argparse.Namespace) -> int:
    from longvid.planning.check import check_model

    found = check_model(args.model, size=args.size, random_weights=args.random_weights, revision=args.revision)
    print(json.dumps(found.to_dict()) if args.json else found)
    return 0 if found.conforms else 1


def _tune(args: argparse.Namespace) -> int:
    from longvid.files import check_file_target
    from longvid.reporting.tuning_plot import draw
    from longvid.runtime.tune import Sweep, tune

    picture = _picture_path(args)
    for path, what in ((args.save, "profile"), (picture, "plot")):
        if path is not None:
            check_file_target(path, overwrite=args.overwrite, what=what)
    map_large_allocations()
    from longvid.models.loading import load_model
    from longvid.planning.options import ComputeOptions

    height, width = args.size
    tuning = tune(
        load_model(args.model, **_options(args, _LOADED)),
        height=height,
        width=width,
        device=args.device,
        options=ComputeOptions(dtype=_dtype(args), allowed_bytes=args.memory),
        sweep=Sweep(
            directions=("encode", "decode") if args.direction == "both" else (args.direction,),
            thresholds=args.thresholds,
            rounds=args.rounds,
            offload_dir=None if args.offload_dir is None else Path(args.offload_dir),
        ),
        say=(lambda _: None) if args.quiet else (lambda text: print(text, file=sys.stderr)),
    )
    print(json.dumps(tuning.to_dict()) if args.json else tuning.explain())
    if args.save is not None:
        tuning.profile.write(args.save, overwrite=args.overwrite)
    if picture is not None:
        draw(tuning, picture)
    if args.save is not None and not args.quiet:
        print(f"longvid: saved {args.save}; use it with --profile {args.save}", file=sys.stderr)
    return 0


def _picture_path(args: argparse.Namespace) -> str | None:
    """Where to draw the plot: as asked, else beside the profile if matplotlib is installed."""
    can_draw = find_spec("matplotlib") is not None
    if args.plot is None:
        return str(Path(args.save).with_suffix(".png")) if args.save is not None and can_draw else None
    if not can_draw:
        raise LongvidError('a plot is drawn by matplotlib, which is not installed: pip install "longvid[plot]"')
    return str(args.plot)


_COMMANDS: dict[str, Command] = {
    "encode": _encode,
    "decode": _decode,
    "join": _join,
    "verify": _verify,
    "repair": _repair,
    "info": _info,
    "plan": _plan,
    "check": _check,
    "tune": _tune,
}


# ------------------------------------------------------------------------------------------------- parts of commands


@contextmanager
def _session(args: argparse.Namespace, *, output_complete: bool = False) -> Iterator[VideoSession]:
    map_large_allocations()
    from longvid.runtime.session import VideoSession

    with ExitStack() as stack:
        nothing_to_do = output_complete and not (args.overwrite or args.resume == "never")
        callbacks = [stack.enter_context(callback) for callback in _callbacks(args, nothing_to_do)]
        session = VideoSession(
            _load_model(args),
            dtype=_dtype(args),
            callbacks=callbacks,
            **_options(args, (*_PLANNED, "offload_dir", "profile")),
        )
        stack.enter_context(session)
        args.stop.session = session
        stack.callback(setattr, args.stop, "session", None)
        yield session


def _callbacks(args: argparse.Namespace, nothing_to_do: bool) -> Iterator[Any]:
    """Yield the progress bar, report and recording that were asked for. With nothing to do, old files stay."""
    from longvid.reporting.page import ReportPage
    from longvid.reporting.progress import ProgressBar
    from longvid.reporting.recorder import Recorder

    if not args.quiet:
        yield _Announcement(args)
        yield ProgressBar()
    if args.report is not None and not nothing_to_do:
        yield ReportPage(args.report, overwrite=args.overwrite)
    if args.record is not None and not nothing_to_do:
        yield Recorder(args.record, overwrite=args.overwrite)


def _options(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _load_model(args: argparse.Namespace) -> CausalVAE:
    from longvid.models.loading import load_model

    try:
        return load_model(args.model, **_options(args, _LOADED))
    except ModelError as exc:
        if args.model_from is None:
            raise
        raise ModelError(
            f"{args.model_from} records the model {args.model}, which cannot be loaded: {exc}. Name its folder or hub "
            "id with --model"
        ) from exc


class _Announcement(RunObserver):
    """Says which model computes, once source and target have been accepted."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def __call__(self, event: ChunkEvent) -> None:
        """Chunks are the progress bar's."""

    def run_started(self, start: RunStart) -> None:
        """Print one line."""
        args = self._args
        if args.random_weights is not None:
            weights = f"the weights are random (seed {args.random_weights})"
            print(f"longvid: {weights}; results mean nothing", file=sys.stderr)
        elif start.direction == "encode":
            note = ", the built-in model for previews; choose another with --model" if args.model == "tiny" else ""
            print(f"longvid: encoding with {args.model}{note}", file=sys.stderr)


def _dtype(args: argparse.Namespace) -> Any:
    from longvid.planning.options import default_dtype, parse_dtype, planned_device

    return parse_dtype(args.dtype) or default_dtype(args.model, planned_device(args.device)[0])


def _part_path(args: argparse.Namespace, store: str) -> str:
    """Where a run writes that computes a store, or a part of it."""
    from longvid.store.parts import part_path

    return store if args.part is None else str(part_path(Path(store), *args.part))


def _take_recorded_model(args: argparse.Namespace, vae: Mapping[str, Any]) -> None:
    if args.model is not None:
        return
    name = vae.get("name_or_path")
    if not name:
        raise ModelError(f"{args.store} does not record where its model is; name it with --model")
    args.model, args.model_from, args.random_weights = str(name), args.store, vae.get("random_weights")
    args.revision = None if args.random_weights is not None else vae.get("revision")


def _safety(args: argparse.Namespace) -> dict[str, Any]:
    from longvid.store.durability import Durability

    return {
        "overwrite": args.overwrite,
        "resume": args.resume,
        "part": args.part,
        "durability": Durability(mode=args.durability, lock=not args.no_lock),
    }


def _show(args: argparse.Namespace, report: RunReport, out: str) -> int:
    """Print what a run did and return the exit code; a run that was stopped ends as its signal asks."""
    if args.json:
        print(json.dumps(report.to_dict()))
    elif not args.quiet and report.complete and report.resumed_from_frame == report.frames:
        print(f"{out}: complete already, {report.frames} frames; nothing to do")
    elif not args.quiet:
        resumed = f" (the first {report.resumed_from_frame} by an earlier run)" if report.resumed_from_frame else ""
        print(
            f"{out}: {report.frames} frames{resumed}, {report.latent_frames} latent frames, in {report.seconds:.1f} s "
            f"({report.frames_per_second:.1f} frames/s); peak memory: device {format_bytes(report.peak_device_bytes)} "
            f"(contexts {format_bytes(report.cache_bytes)}), process {format_bytes(report.peak_rss_bytes)}"
        )
    if report.complete:
        return 0
    raise Ended(args.stop.signum or signal.SIGINT)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"longvid: warning: {message}", file=sys.stderr)
        yield

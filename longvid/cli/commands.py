"""The command line. Calls the library and prints; everything heavy is imported inside the commands.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad source, 4 store problem, 5 memory budget, 6 model problem, 129, 130
and 143 stopped by SIGHUP, SIGINT and SIGTERM, to be continued by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvid.cli.parser import LIMITS, Command, make_parser
from longvid.environment import map_large_allocations
from longvid.errors import LongvidError, MemoryBudgetError, ModelError, ScheduleError, SourceError, StoreError
from longvid.events import Callback, RunReport
from longvid.units import format_bytes

if TYPE_CHECKING:
    from longvid.runtime.session import VideoSession

__all__ = ["main"]

_EXIT_CODES: tuple[tuple[type[LongvidError], int], ...] = (
    (ScheduleError, 2),
    (SourceError, 3),
    (StoreError, 4),
    (MemoryBudgetError, 5),
    (ModelError, 6),
)


class _Ended(KeyboardInterrupt):
    """A signal asked the process to end; unwinds like Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser(_COMMANDS).parse_args(argv)
    command: Command = args.run
    args.stop = _StopRequest()
    with _signals(args.stop, restore=argv is not None), _one_line_warnings():
        try:
            code = command(args)
            sys.stdout.flush()  # here, where it can still be told that nobody reads any more
            return code
        except LongvidError as exc:
            return _failed(args, exc, next((code for kind, code in _EXIT_CODES if isinstance(exc, kind)), 1))
        except KeyboardInterrupt as exc:
            return _interrupted(args, exc)
        except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as if SIGPIPE had ended it


def _failed(args: argparse.Namespace, exc: BaseException, code: int) -> int:
    if args.debug:
        traceback.print_exc()
    print(f"longvid: {exc}", file=sys.stderr)
    return code


def _interrupted(args: argparse.Namespace, exc: KeyboardInterrupt) -> int:
    if args.debug:
        traceback.print_exc()
    out = getattr(args, "store" if args.command == "encode" else "out", None)
    left = "nothing was written"
    if out is not None and Path(out).is_dir():
        left = f"{out} holds what was published; the same command goes on from there"
    elif args.command == "decode":
        left = "a video file cannot be continued, so it was removed; decode to .zarr to be able to go on"
    print(f"longvid: interrupted; {left}", file=sys.stderr)
    return exc.exit_code if isinstance(exc, _Ended) else 130


class _StopRequest:
    """What signals do: the first one asks a run to stop where it can go on later, the next ends it at once."""

    def __init__(self) -> None:
        self.session: VideoSession | None = None
        self.signum: int | None = None

    def __call__(self, signum: int, _frame: object) -> None:
        """As a signal handler."""
        if self.session is None or self.signum is not None:
            raise _Ended(signum)
        self.signum = signum
        self.session.stop()


# ------------------------------------------------------------------------------------------------- commands


def _encode(args: argparse.Namespace) -> int:
    from longvid.media.limits import Limits
    from longvid.store.reader import check_target

    check_target(args.store)  # before a model is loaded
    given = {name: value for name in LIMITS if (value := getattr(args, name)) is not None}
    with _session(args, args.model, args.random_weights, args.revision) as (session, shown):
        report = session.encode(
            args.source,
            args.store,
            representation=args.representation,
            start=args.start,
            frames=args.frames,
            size=args.size,
            store_dtype=args.store_dtype,
            seed=args.seed,
            on_error=args.on_error,
            on_non_finite=args.on_non_finite,
            limits=Limits(**given),
            **_safety(args),
        )
    return shown(report, args.store)


def _decode(args: argparse.Namespace) -> int:
    from longvid.store.reader import open_store

    store = open_store(args.store)
    model, seed, revision = args.model, args.random_weights, args.revision
    if model is None:
        model, seed, revision = _recorded_model(store.path, store.vae)
    with _session(args, model, seed, revision) as (session, shown):
        report = session.decode(store, args.out, start=args.start, frames=args.frames, **_safety(args))
    return shown(report, args.out)


def _info(args: argparse.Namespace) -> int:
    from longvid.models.numerics import Numerics
    from longvid.store.reader import open_store

    store = open_store(args.store)
    facts = {
        "frames": store.num_frames,
        "latent_shape": list(store.latents.shape),
        "latent_dtype": str(store.latents.dtype),
        "complete": store.complete,
        "representation": store.representation,
        "model": store.vae,
        "chunk_plan": store.schedule.to_dict(),
        "numerics": store.attrs["longvid"].get("numerics"),
        "source": store.source,
        "stored_bytes": store.stored_bytes,
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    state = "complete" if store.complete else "incomplete"
    shape = "x".join(str(n) for n in store.latents.shape)
    plan = store.schedule
    print(f"{args.store}: {state}, {store.num_frames} frames of {store.width}x{store.height}")
    print(f"latents   {shape} (t c y x) {store.latents.dtype}, {store.representation}, raw (not scaled)")
    print(f"stored    {format_bytes(store.stored_bytes)}")
    print(f"chunks    {1 + plan.chunk_frames}, {plan.chunk_frames}, {plan.chunk_frames}, ... frames")
    computed = store.attrs["longvid"].get("numerics") or {}
    if computed:
        print(f"computed  {Numerics.from_dict(computed).words}")
    print(f"model     {_model_name(store.vae)}, scaling_factor {store.vae.get('scaling_factor')}")
    print(f"source    {store.source.get('name')}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from longvid.store.verify import verify

    found = verify(args.store)
    print(json.dumps(found.to_dict()) if args.json else found.explain())
    return 0 if found.ok else 1


def _repair(args: argparse.Namespace) -> int:
    from longvid.runtime.repair import repair
    from longvid.store.verify import open_sealed

    opened = open_sealed(args.store)
    made_by = opened.facts.get("fingerprint", {}).get("compute", {})
    model, seed, revision = args.model, args.random_weights, args.revision
    if model is None:
        model, seed, revision = _recorded_model(args.store, opened.facts.get("vae") or opened.attributes.get("vae"))
    numerics = made_by.get("numerics", {})
    args.dtype = args.dtype or made_by.get("dtype")
    args.layout = numerics.get("layout", "auto")
    args.paired_frames = numerics.get("paired_frames", "auto")
    args.compile = bool(numerics.get("compiled", False))
    args.chunk_frames = opened.facts.get("fingerprint", {}).get("chunk_plan", {}).get("chunk_frames")
    with _session(args, model, seed, revision) as (session, _):
        done = repair(session, args.store, source=args.source)
    print(json.dumps(done.to_dict()) if args.json else done.explain())
    return 0 if done.ok else 1


def _plan(args: argparse.Namespace) -> int:
    from longvid.memory.tracker import default_reserved_bytes
    from longvid.models.base import resolve_device
    from longvid.models.numerics import Numerics, parse_layout, parse_paired_frames
    from longvid.planning.kernel_choice import fresh_memory_is_slow, preferred_band_bytes
    from longvid.planning.planner import make_plan

    height, width = args.size
    device = resolve_device(args.device)
    plan = make_plan(
        args.model,
        height=height,
        width=width,
        dtype=args.dtype,
        memory=args.memory,
        offload=args.offload,
        chunk_frames=args.chunk_frames,
        numerics=Numerics(
            layout=parse_layout(args.layout) or "channels_last",
            paired_frames=bool(parse_paired_frames(args.paired_frames)),
            compiled=args.compile,
        ),
        slice_frames=args.slice_frames,
        reserved=default_reserved_bytes(device) if args.reserved is None else args.reserved,
        band_bytes=preferred_band_bytes(device),
        keep_workspace=fresh_memory_is_slow(device),
    )
    print(json.dumps(plan.to_dict()) if args.json else plan.explain())
    return 0


def _tune(args: argparse.Namespace) -> int:
    from longvid.files import check_file_target
    from longvid.planning.profile import check_profile_target
    from longvid.runtime.tune import draw, is_plot, tune

    if args.save is not None:
        check_profile_target(args.save, overwrite=args.overwrite)
    picture = _picture_path(args)
    if picture is not None:
        check_file_target(picture, overwrite=args.overwrite, what="plot", is_ours=is_plot)
    map_large_allocations()
    from longvid.models.loading import load_model
    from longvid.planning.planner import parse_dtype

    height, width = args.size
    tuning = tune(
        load_model(args.model, random_weights=args.random_weights, revision=args.revision),
        height=height,
        width=width,
        device=args.device,
        dtype=parse_dtype(args.dtype or _default_dtype(args.device)),
        memory=args.memory,
        offload_dir=None if args.offload_dir is None else Path(args.offload_dir),
        directions=("encode", "decode") if args.direction == "both" else (args.direction,),
        thresholds=args.thresholds,
        rounds=args.rounds,
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
    """Where to draw: where asked, or beside the profile if there is something to draw with."""
    can_draw = find_spec("matplotlib") is not None
    if args.plot is None:
        return str(Path(args.save).with_suffix(".png")) if args.save is not None and can_draw else None
    if not can_draw:
        raise LongvidError('a plot is drawn by matplotlib, which is missing: pip install "longvid[plot]"')
    return str(args.plot)


_COMMANDS: dict[str, Command] = {
    "encode": _encode,
    "decode": _decode,
    "verify": _verify,
    "repair": _repair,
    "info": _info,
    "plan": _plan,
    "tune": _tune,
}


# ------------------------------------------------------------------------------------------------- their parts


@contextmanager
def _session(
    args: argparse.Namespace, model: str, seed: int | None, revision: str | None
) -> Iterator[tuple[VideoSession, Callable[[RunReport, str], int]]]:
    """An open session with a progress bar, and what prints its report and tells the exit code."""
    map_large_allocations()
    from longvid.models.loading import load_model
    from longvid.reporting.progress import ProgressBar
    from longvid.runtime.session import VideoSession

    with ExitStack() as stack:
        callbacks: list[Callback] = [] if args.quiet else [stack.enter_context(ProgressBar())]
        if args.report is not None:
            from longvid.reporting.page import ReportPage

            callbacks.append(stack.enter_context(ReportPage(args.report, overwrite=args.overwrite)))
        if args.record is not None:
            from longvid.reporting.recorder import Recorder

            callbacks.append(stack.enter_context(Recorder(args.record, overwrite=args.overwrite)))
        vae = load_model(model, random_weights=seed, revision=revision)
        if seed is not None and not args.quiet:
            print(f"longvid: the weights are random (seed {seed}); latents and frames mean nothing", file=sys.stderr)
        session = stack.enter_context(
            VideoSession(
                vae,
                device=args.device,
                dtype=args.dtype or _default_dtype(args.device),
                memory=args.memory,
                offload=args.offload,
                offload_dir=args.offload_dir,
                reserved=args.reserved,
                profile=args.profile,
                chunk_frames=args.chunk_frames,
                slice_frames=args.slice_frames,
                layout=args.layout,
                paired_frames=args.paired_frames,
                compile=args.compile,
                callbacks=callbacks,
            )
        )
        args.stop.session = session
        stack.callback(setattr, args.stop, "session", None)
        yield session, lambda report, out: _show(args, report, out)


def _default_dtype(device: str) -> str:
    """bfloat16 on an accelerator, float32 on a CPU."""
    import torch

    on_cpu = device.startswith("cpu") or (device == "auto" and not torch.accelerator.is_available())
    return "float32" if on_cpu else "bfloat16"


def _recorded_model(path: str | Path, vae: Mapping[str, Any] | None) -> tuple[str, int | None, str | None]:
    """The model that a store says it was made with."""
    name = (vae or {}).get("name_or_path")
    if vae is None or not name:
        raise ModelError(f"{path} does not say where its model is; name it with --model")
    seed = vae.get("random_weights")
    return str(name), seed, None if seed is not None else vae.get("revision")


def _model_name(vae: dict[str, Any]) -> str:
    name = str(vae.get("name_or_path") or vae.get("class_name"))
    seed = vae.get("random_weights")
    return name if seed is None else f"{name} with random weights (seed {seed})"


def _safety(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a run that say what it may replace, continue and lose."""
    from longvid.store.durability import Durability

    return {
        "overwrite": args.overwrite,
        "resume": not args.no_resume,
        "durability": Durability(
            mode=args.durability, snapshot_seconds=args.snapshot_seconds, keep_snapshots=args.keep_snapshots
        ),
    }


def _show(args: argparse.Namespace, report: RunReport, out: str) -> int:
    """Print what a run did; the exit code."""
    if args.json:
        print(json.dumps(report.to_dict()))
    elif not args.quiet:
        _print_report(report, out)
    if report.complete:
        return 0
    raise _Ended(args.stop.signum or signal.SIGINT)


def _print_report(report: RunReport, out: str) -> None:
    if report.complete and report.resumed_from_frame == report.frames:
        print(f"{out}: complete already, {report.frames} frames; nothing was done")
    else:
        resumed = f" (the first {report.resumed_from_frame} by an earlier run)" if report.resumed_from_frame else ""
        print(
            f"{out}: {report.frames} frames{resumed}, {report.latent_frames} latent frames, in {report.seconds:.1f} s "
            f"({report.frames_per_second:.1f} frames/s); peak memory: device {format_bytes(report.peak_device_bytes)} "
            f"(contexts {format_bytes(report.cache_bytes)}), process {format_bytes(report.peak_rss_bytes)}"
        )


@contextmanager
def _signals(handler: Callable[[int, Any], None], *, restore: bool) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP stop a run where it can be continued, and unwind the program anywhere else.

    Unless what was there before is to be restored, they mean nothing any more afterwards: the program has said how it
    ended and is on its way out.
    """
    # A signal that is ignored stays ignored: that is what nohup asks for.
    wanted = [
        s
        for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))
        if s and signal.getsignal(s) is not signal.SIG_IGN
    ]
    try:
        before = {s: signal.signal(s, handler) for s in wanted}
    except ValueError:  # not the main thread: somebody embeds the command line
        before = {}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old if restore else signal.SIG_IGN)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"longvid: warning: {message}", file=sys.stderr)
        yield

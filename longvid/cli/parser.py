"""The arguments of the command line: what can be said, and what is refused before anything is done."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from longvid import __version__
from longvid.memory.offload import OffloadPolicy
from longvid.units import parse_bytes, parse_reserve, parse_size

__all__ = ["LIMITS", "Command", "make_parser"]

Command: TypeAlias = Callable[[argparse.Namespace], int]
"""What a command does with its arguments; it returns the exit code."""

LIMITS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_pixels": (int, "refuse a source with larger frames (default: those of 8192x4320)"),
    "max_frames": (int, "refuse a source with more frames"),
    "max_seconds": (float, "refuse a source that is longer"),
    "max_bytes": (parse_bytes, "refuse a file that is larger, such as 4GiB"),
}
"""Options of encode that bound what a source may be: how each is read, and its help."""

T = TypeVar("T")


def _checked(read: Callable[[str], T]) -> Callable[[str], T]:
    """Turn a ValueError of a reader into argparse's usage error, with the reader's own words."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return convert


def _offload(text: str) -> str:
    OffloadPolicy.parse(text)
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float("inf") if text == "off" else float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{text!r} is not a time; give seconds from 0 up, or off")
    return seconds


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise ValueError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return _checked(read)


def _picture(text: str) -> str:
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{text!r} is not a picture; choose a name that ends in .png, .svg or .pdf")
    return text


def _profile_name(text: str) -> str:
    if Path(text).suffix != ".toml":
        raise ValueError(f"{text!r} is not a profile; choose a name that ends in .toml")
    return text


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        run: what each does, by its name; found again as ``run`` of the arguments.
    """
    parser = argparse.ArgumentParser(
        prog="longvid",
        description="Encode long video to zarr latents through a causal video VAE, and back, in bounded memory.",
        epilog="longvid COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"longvid {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    encode = _command(commands, run, "encode", "encode a video file into a zarr store of latents")
    encode.add_argument("source", metavar="SRC", help="a video file")
    encode.add_argument("store", metavar="STORE", help="the zarr store to write, such as out.zarr")
    _model_options(encode, default="tiny")
    _compute_options(encode)
    encode.add_argument("--size", type=_checked(parse_size), metavar="WxH", help="resize frames, such as 720x480")
    _range_options(encode, "encode")
    encode.add_argument(
        "--representation",
        choices=("mode", "moments", "sample"),
        default="mode",
        help="what is stored: the posterior's mean, mean and log variance, or a sample (default: %(default)s)",
    )
    encode.add_argument(
        "--seed", type=_at_least(0), default=0, help="of --representation sample (default: %(default)s)"
    )
    encode.add_argument(
        "--on-error",
        choices=("stop", "keep", "conceal"),
        default="stop",
        help="where the file is damaged: fail, end before the damage, or repeat the last good frame and mark it "
        "(default: %(default)s)",
    )
    encode.add_argument(
        "--on-non-finite",
        choices=("stop", "quarantine"),
        default="stop",
        help="where the model computes values that are not finite: fail, or encode the chunk with the last good frame "
        "in place of its own and mark it (default: %(default)s)",
    )
    for name, (kind, what) in LIMITS.items():
        encode.add_argument(f"--{name.replace('_', '-')}", type=_checked(kind), metavar="N", help=what)
    encode.add_argument("--store-dtype", choices=("float16", "float32"), default="float16", help="default: %(default)s")
    _output_options(encode)

    decode = _command(commands, run, "decode", "decode a store of latents into a video file or a zarr of frames")
    decode.add_argument("store", metavar="STORE", help="a store that encode wrote")
    decode.add_argument("out", metavar="OUT", help="the file to write: .mp4, .mov, .mkv or .zarr")
    _model_options(decode, default=None)
    _compute_options(decode)
    _range_options(decode, "write")
    _output_options(decode)

    verify = _command(commands, run, "verify", "read all of a store and tell which frames are not as published")
    verify.add_argument("store", metavar="STORE")
    verify.add_argument("--json", action="store_true", help="print one JSON object")

    repair = _command(commands, run, "repair", "restore what verify found, computing again what is needed")
    repair.add_argument("store", metavar="STORE")
    repair.add_argument("--source", metavar="SRC", help="what it was made from (default: where the store says)")
    _model_options(repair, default=None)
    _device_options(repair)
    repair.add_argument("--memory", type=_checked(parse_bytes), metavar="SIZE", help="as for encode")
    repair.add_argument("--json", action="store_true", help="print one JSON object")
    repair.add_argument("--quiet", action="store_true", help="no progress")
    repair.set_defaults(offload="auto", reserved=None, profile=None, slice_frames=None, report=None, record=None)

    info = _command(commands, run, "info", "say what a store holds")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    plan = _command(commands, run, "plan", "show chunks and memory of a model and a frame size; needs no weights")
    plan.add_argument("--model", default="tiny", metavar="MODEL", help="as for encode (default: %(default)s)")
    plan.add_argument("--size", type=_checked(parse_size), required=True, metavar="WxH", help="such as 720x480")
    plan.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="compute dtype (default: %(default)s; encode and decode take float32 on a CPU)",
    )
    plan.add_argument("--device", default="auto", help="for which --memory is planned (default: %(default)s)")
    _budget_options(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    tune = _command(commands, run, "tune", "measure peak memory against time for a row of offload thresholds")
    _model_options(tune, default="tiny")
    tune.add_argument("--size", type=_checked(parse_size), required=True, metavar="WxH", help="such as 720x480")
    _device_options(tune)
    tune.add_argument(
        "--memory", type=_checked(parse_bytes), metavar="SIZE", help="leave out thresholds that need more than this"
    )
    tune.add_argument("--direction", choices=("both", "encode", "decode"), default="both", help="default: %(default)s")
    tune.add_argument(
        "--thresholds", type=_at_least(2), default=6, metavar="N", help="from none to all (default: %(default)s)"
    )
    tune.add_argument("--rounds", type=_at_least(1), default=3, metavar="N", help="of each (default: %(default)s)")
    tune.add_argument(
        "--save",
        type=_checked(_profile_name),
        metavar="FILE",
        help="write the profile for --profile, such as profile.toml",
    )
    tune.add_argument(
        "--plot", type=_checked(_picture), metavar="FILE", help="draw the sweep (default: beside --save, as .png)"
    )
    tune.add_argument("--overwrite", action="store_true", help="replace an existing profile and plot")
    tune.add_argument("--json", action="store_true", help="print the sweep as one JSON object")
    tune.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _command(commands: Any, run: Mapping[str, Command], name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    parser.set_defaults(run=run[name])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--model",
        default=default,
        metavar="MODEL",
        help="tiny (built in, for previews), a folder or hub id in diffusers format, or the name of an architecture "
        + (f"(default: {default})" if default else "(default: the model recorded in the store)"),
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--random-weights",
        type=_at_least(0),
        metavar="SEED",
        help="random weights for a named architecture, to try the engine",
    )


def _compute_options(parser: argparse.ArgumentParser) -> None:
    _device_options(parser)
    _budget_options(parser)
    parser.add_argument("--profile", metavar="FILE", help="thresholds that longvid tune saved for this setting")


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="compute dtype (default: bfloat16 on an accelerator, float32 on a CPU)",
    )
    parser.add_argument(
        "--offload-dir", metavar="DIR", help="send contexts to an unnamed file in this folder instead of host memory"
    )


def _budget_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", type=_checked(parse_bytes), metavar="SIZE", help="budget of device memory, such as 8GiB"
    )
    parser.add_argument(
        "--offload",
        type=_checked(_offload),
        default="auto",
        metavar="POLICY",
        help="which contexts leave the device between chunks: auto (as much as --memory needs), none, all, or the size "
        "of those that may stay, such as 512MiB; results are the same (default: %(default)s)",
    )
    parser.add_argument(
        "--reserved",
        type=_checked(parse_reserve),
        metavar="SIZE",
        help="part of --memory for workspaces, which no plan sees (default: 512MiB on an accelerator, else nothing)",
    )
    parser.add_argument(
        "--chunk-frames",
        type=_at_least(1),
        metavar="N",
        help="frames of a chunk after the first, for models whose result does not depend on it, such as tiny "
        "(default: the model's own, or shorter if --memory asks for it)",
    )
    parser.add_argument(
        "--slice-frames",
        type=_at_least(1),
        metavar="N",
        help="frames at a time in the layers with the largest frames; results are the same (default: whole chunks, or "
        "fewer if --memory asks for it)",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "contiguous", "channels_last"),
        default="auto",
        help="memory layout of activations; results agree to rounding (default: %(default)s, what is faster here)",
    )
    parser.add_argument(
        "--paired-frames",
        choices=("auto", "on", "off"),
        default="auto",
        help="convolve frames in pairs, with a third fewer multiplications; to rounding, which in bfloat16 doubles "
        "(default: %(default)s, on a CPU in float32 and in a bfloat16 decoder)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="let torch.compile make one kernel of norm and activation where that wins, on a CPU; needs a C++ compiler",
    )


def _range_options(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("--start", type=_at_least(0), default=0, metavar="N", help="frames to skip (default: 0)")
    parser.add_argument("--frames", type=_at_least(1), metavar="N", help=f"frames to {verb} at most")


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing output of longvid, unless it is an unfinished one of this very command",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="refuse an unfinished store, or with --overwrite start it again"
    )
    parser.add_argument(
        "--durability",
        choices=("fsync", "rename"),
        default="fsync",
        help="survive power loss, or only the death of the process (default: %(default)s)",
    )
    parser.add_argument(
        "--snapshot-seconds",
        type=_checked(_seconds),
        metavar="S",
        help="time between two snapshots to go on from, or off (default: from what a snapshot costs)",
    )
    parser.add_argument(
        "--keep-snapshots", action="store_true", help="keep all of them, so that a repair has less to compute"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--report", metavar="FILE", help="write a page about memory, transfers and speed, such as run.html"
    )
    parser.add_argument("--record", metavar="FILE", help="write every event as a line of JSON, such as run.jsonl")
    parser.add_argument("--quiet", action="store_true", help="no progress, no report")

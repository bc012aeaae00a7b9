"""The arguments of the command line: options, their help, and the checks that need nothing but their text."""

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
"""Runs a command with its arguments and returns the exit code."""

LIMITS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_pixels": (int, "refuse a source with larger frames (default: those of 8192x4320)"),
    "max_frames": (int, "refuse a source with more frames"),
    "max_seconds": (float, "refuse a source that is longer"),
    "max_bytes": (parse_bytes, "refuse a file that is larger, such as 4GiB"),
}
"""Options of encode that bound what a source may be: the reader of each, and its help."""

_DTYPES = ("bfloat16", "float16", "float32")
_DEFAULT = "(default: %(default)s)"
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


def _file_name(what: str, *suffixes: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if Path(text).suffix not in suffixes:
            raise ValueError(f"{text!r} is not a {what}; choose a name that ends in {' or '.join(suffixes)}")
        return text

    return _checked(read)


_SIZE = _checked(parse_size)
_BYTES = _checked(parse_bytes)


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Make the parser of all commands.

    Args:
        run: the function of each command, by its name; it becomes ``run`` of the arguments.
    """
    parser = argparse.ArgumentParser(
        prog="longvid",
        description="Encode long videos to latents in zarr stores with a causal video VAE, and decode them again, "
        "within a memory budget.",
        epilog="longvid COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"longvid {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add_options) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        command.set_defaults(run=run[name])
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_options(command)
    return parser


# ------------------------------------------------------------------------------------------------- commands


def _encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="video file to read")
    parser.add_argument("store", metavar="STORE", help="zarr store to write, such as out.zarr")
    _model_options(parser, default="tiny")
    _compute_options(parser)
    parser.add_argument("--size", type=_SIZE, metavar="WxH", help="resize frames, such as 720x480")
    _range_options(parser, "encode")
    parser.add_argument(
        "--representation",
        choices=("mode", "moments", "sample"),
        default="mode",
        help=f"what to store of the posterior: its mean, mean and log variance, or a sample {_DEFAULT}",
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help=f"seed of --representation sample {_DEFAULT}")
    parser.add_argument(
        "--on-error",
        choices=("stop", "keep", "conceal"),
        default="stop",
        help="where the file is damaged: stop with an error, keep what comes before and end there, or conceal the "
        f"damage with the last good frame and mark it {_DEFAULT}",
    )
    parser.add_argument(
        "--on-non-finite",
        choices=("stop", "quarantine"),
        default="stop",
        help="where the model gives NaN or infinity: stop with an error, or encode the last good frame in place of "
        f"that chunk and mark it {_DEFAULT}",
    )
    for name, (read, what) in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_checked(read), metavar="N", help=what)
    parser.add_argument(
        "--store-dtype", choices=("float16", "float32"), default="float16", help=f"dtype of stored latents {_DEFAULT}"
    )
    _output_options(parser)


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="store of latents to read")
    parser.add_argument("out", metavar="OUT", help="output to write: .mp4, .mov, .mkv, or .zarr for a store of frames")
    _model_options(parser, default=None)
    _compute_options(parser)
    _range_options(parser, "decode")
    _output_options(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="store to check")
    _json_option(parser)


def _repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="store to repair")
    parser.add_argument("--source", metavar="SRC", help="source that it was made from (default: the recorded one)")
    _model_options(parser, default=None)
    _device_options(parser)
    _memory_option(parser)
    _json_option(parser)
    _quiet_option(parser)
    parser.set_defaults(offload="auto", reserved=None, profile=None, slice_frames=None, report=None, record=None)


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="store of latents or of frames")
    _json_option(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", metavar="MODEL", help=f"model, as for encode {_DEFAULT}")
    parser.add_argument("--size", type=_SIZE, required=True, metavar="WxH", help="frame size, such as 720x480")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="bfloat16",
        help=f"compute dtype {_DEFAULT[:-1]}; encode and decode use float32 on a CPU)",
    )
    parser.add_argument("--device", default="auto", help=f"device to plan for {_DEFAULT}")
    _budget_options(parser)
    _json_option(parser)


def _tune(parser: argparse.ArgumentParser) -> None:
    _model_options(parser, default="tiny")
    parser.add_argument("--size", type=_SIZE, required=True, metavar="WxH", help="frame size, such as 720x480")
    _device_options(parser)
    _memory_option(parser)
    parser.add_argument(
        "--direction", choices=("both", "encode", "decode"), default="both", help=f"what to measure {_DEFAULT}"
    )
    parser.add_argument(
        "--thresholds",
        type=_at_least(2),
        default=6,
        metavar="N",
        help=f"number of thresholds, from offloading nothing to everything {_DEFAULT}",
    )
    parser.add_argument(
        "--rounds", type=_at_least(1), default=3, metavar="N", help=f"measurements of each threshold {_DEFAULT}"
    )
    parser.add_argument(
        "--save",
        type=_file_name("profile", ".toml"),
        metavar="FILE",
        help="write the best thresholds for --profile, such as profile.toml",
    )
    parser.add_argument(
        "--plot",
        type=_file_name("picture", ".png", ".svg", ".pdf"),
        metavar="FILE",
        help="plot the measurements (default: beside the file of --save, as .png)",
    )
    _overwrite_option(parser, "replace an existing profile and plot")
    _json_option(parser)
    _quiet_option(parser)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "encode": ("encode a video file to a zarr store of latents", _encode),
    "decode": ("decode a store of latents to a video file or a zarr store of frames", _decode),
    "verify": ("check every byte of a store and list the damaged frames", _verify),
    "repair": ("compute the damaged parts of a store again", _repair),
    "info": ("show what a store holds", _info),
    "plan": ("show how much memory a model needs for a frame size; needs no weights", _plan),
    "tune": ("measure peak memory and time for several offload thresholds", _tune),
}


# ------------------------------------------------------------------------------------------------- shared options


def _model_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--model",
        default=default,
        metavar="MODEL",
        help="tiny (built in, for previews), a folder or hub id in diffusers format, or the name of an architecture "
        + (_DEFAULT if default else "(default: the model recorded in the store)"),
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--random-weights", type=_at_least(0), metavar="SEED", help="random weights for a named architecture, for tests"
    )
    parser.set_defaults(model_from=None)


def _compute_options(parser: argparse.ArgumentParser) -> None:
    _device_options(parser)
    _budget_options(parser)
    parser.add_argument("--profile", metavar="FILE", help="use the thresholds that longvid tune saved in this file")


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help=f"auto, cpu, cuda, cuda:1, ... {_DEFAULT}")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="compute dtype (default: bfloat16 on an accelerator, float32 on a CPU)"
    )
    parser.add_argument(
        "--offload-dir", metavar="DIR", help="offload contexts to an unnamed file in this folder, not to host memory"
    )


def _budget_options(parser: argparse.ArgumentParser) -> None:
    _memory_option(parser)
    parser.add_argument(
        "--offload",
        type=_checked(_offload),
        default="auto",
        metavar="POLICY",
        help="contexts that leave the device between chunks: auto (as many as --memory requires), none, all, or the "
        f"size of those that stay, such as 512MiB; results do not change {_DEFAULT}",
    )
    parser.add_argument(
        "--reserved",
        type=_checked(parse_reserve),
        metavar="SIZE",
        help="part of --memory kept free for memory that a plan cannot count (default: 512MiB on an accelerator, else "
        "nothing)",
    )
    parser.add_argument(
        "--chunk-frames",
        type=_at_least(1),
        metavar="N",
        help="frames of each chunk after the first, for models such as tiny whose result does not depend on it "
        "(default: the model's own, or fewer if --memory requires it)",
    )
    parser.add_argument(
        "--slice-frames",
        type=_at_least(1),
        metavar="N",
        help="frames computed at a time in the layers with the largest frames; the last bits of results may "
        "differ on some processors (default: whole chunks, or fewer if --memory requires it)",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "contiguous", "channels_last"),
        default="auto",
        help=f"memory layout of activations; the last bits of results may differ {_DEFAULT}",
    )
    parser.add_argument(
        "--paired-frames",
        choices=("auto", "on", "off"),
        default="auto",
        help="Winograd convolutions for two frames at once, with a third fewer multiplications; results may differ in "
        "the last bits, and in bfloat16 rounding errors double (default: %(default)s: on a CPU where it is faster, but "
        "for a bfloat16 encoder only on a CPU without a matrix unit)",
    )


def _range_options(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("--start", type=_at_least(0), default=0, metavar="N", help=f"first frame to {verb} {_DEFAULT}")
    parser.add_argument("--frames", type=_at_least(1), metavar="N", help=f"number of frames to {verb} (default: all)")


def _output_options(parser: argparse.ArgumentParser) -> None:
    _overwrite_option(
        parser, "replace existing output, except an unfinished store of this very command, which is resumed"
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="do not resume an unfinished store: refuse it, or replace it with --overwrite",
    )
    parser.add_argument(
        "--no-lock",
        action="store_true",
        help="write without a lock, on a file system that has none; make sure that one run writes at a time",
    )
    parser.add_argument(
        "--durability",
        choices=("fsync", "rename"),
        default="fsync",
        help=f"what a finished part survives: fsync a power loss, rename only the end of the process {_DEFAULT}",
    )
    parser.add_argument(
        "--snapshot-seconds",
        type=_checked(_seconds),
        metavar="S",
        help="time between snapshots to resume from, or off (default: chosen by their cost)",
    )
    parser.add_argument("--keep-snapshots", action="store_true", help="keep all snapshots, which makes repair faster")
    _json_option(parser)
    parser.add_argument(
        "--report", metavar="FILE", help="write a page on memory, transfers and speed, such as run.html"
    )
    parser.add_argument("--record", metavar="FILE", help="write every event as a line of JSON, such as run.jsonl")
    _quiet_option(parser)


def _memory_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=_BYTES, metavar="SIZE", help="budget of device memory, such as 8GiB")


def _overwrite_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=what)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _quiet_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print no progress and no summary")

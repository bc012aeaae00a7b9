"""The arguments of the command line: options, their help, and the checks that need nothing but their text."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

from longvid import __version__
from longvid.memory.offload import OffloadPolicy
from longvid.units import parse_bytes, parse_reserve, parse_size

__all__ = ["Command", "make_parser"]

Command: TypeAlias = Callable[[argparse.Namespace], int]
"""Runs a command with its arguments and returns the exit code."""
_Option: TypeAlias = tuple[str, dict[str, Any]]
"""An argument and what argparse is to know of it."""


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Make the parser of all commands; the function of each, by its name, becomes ``run`` of its arguments."""
    parser = argparse.ArgumentParser(
        prog="longvid",
        description="Encode long videos to latents in zarr stores with a causal video VAE, and decode them again, "
        "within a memory budget.",
        epilog="longvid COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"longvid {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, options) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        command.set_defaults(run=run[name], model_from=None)
        for option, settings in (_flag("--debug", "show the traceback of an error"), *options):
            command.add_argument(option, **settings)
    return parser


# ------------------------------------------------------------------------------------------------- kinds of options


def _option(name: str, text: str, *, read: Callable[[str], Any] | None = None, **settings: Any) -> _Option:
    """An option with a value; its help ends with its default. A ValueError of ``read`` becomes a usage error."""

    def convert(value: str) -> Any:
        try:
            return read(value) if read is not None else value
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    if settings.get("default") is not None:
        text += " (default: %(default)s)"
    return name, {"help": text, "type": convert, **settings}


def _flag(name: str, text: str) -> _Option:
    return name, {"action": "store_true", "help": text}


def _choice(name: str, text: str, *choices: str) -> _Option:
    """An option with a few values, the first of which is its default."""
    return _option(name, text, choices=choices, default=choices[0])


def _count(name: str, text: str, least: int, default: int | None = None) -> _Option:
    def read(value: str) -> int:
        if not value.lstrip("+-").isdecimal() or int(value) < least:
            raise ValueError(f"{value!r} is not a whole number from {least} up")
        return int(value)

    return _option(name, text, read=read, default=default, metavar="N")


def _file_name(name: str, text: str, what: str, *suffixes: str) -> _Option:
    def read(value: str) -> str:
        if Path(value).suffix not in suffixes:
            raise ValueError(f"{value!r} is not a {what}; choose a name that ends in {' or '.join(suffixes)}")
        return value

    return _option(name, text, read=read, metavar="FILE")


def _read_offload(text: str) -> str:
    OffloadPolicy.parse(text)
    return text


def _read_part(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ValueError(f"{text!r} is not a part; give its number and how many there are, such as 3/8")
    return int(number), int(of)


def _read_rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise ValueError(f"{text!r} is not a number of frames per second, such as 16 or 30000/1001")
    return rate


def _read_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{text!r} is not a number of seconds above 0")
    return seconds


# ------------------------------------------------------------------------------------------------- shared options

_DTYPES = ("bfloat16", "float16", "float32")
_JSON = _flag("--json", "print one JSON object")
_QUIET = _flag("--quiet", "print no progress and no summary")
_MEMORY = _option("--memory", "budget of device memory, such as 8GiB", read=parse_bytes, metavar="SIZE")
_PICKLES = _flag(
    "--allow-pickle-weights",
    "accept weights in a pickled file such as .pth; it is read without running code from it",
)
_FRAME_SIZE = _option("--size", "frame size, such as 720x480", read=parse_size, required=True, metavar="WxH")


def _model_options(default: str | None) -> tuple[_Option, ...]:
    text = (
        "tiny (built in, for previews), a folder or hub id in diffusers format, a file of weights, or the name of an "
        "architecture"
    )
    if default is None:
        text += " (default: the model recorded in the store)"
    return (
        _option("--model", text, default=default, metavar="MODEL"),
        _option("--revision", "branch, tag or commit of a hub id", metavar="REV"),
        _count("--random-weights", "random weights for a named architecture, for tests: their seed", 0),
        _PICKLES,
    )


_DTYPE = _option("--dtype", "compute dtype (default: bfloat16 on an accelerator, float32 on a CPU)", choices=_DTYPES)
_DEVICE_OPTIONS = (
    _option("--device", "auto, cpu, cuda, cuda:1, ...", default="auto"),
    _DTYPE,
    _option("--offload-dir", "offload contexts to an unnamed file in this folder, not to host memory", metavar="DIR"),
)
_BUDGET_OPTIONS = (
    _MEMORY,
    _option(
        "--offload",
        "contexts that leave the device between chunks: auto (as many as --memory requires), none, all, or the size of "
        "those that stay, such as 512MiB; results do not change",
        read=_read_offload,
        default="auto",
        metavar="POLICY",
    ),
    _option(
        "--reserved",
        "part of --memory kept free for memory that a plan cannot count (default: 512MiB on an accelerator, else "
        "nothing)",
        read=parse_reserve,
        metavar="SIZE",
    ),
    _count(
        "--chunk-frames",
        "frames of each chunk after the first, for models such as tiny whose result does not depend on it (default: "
        "the model's own, or fewer if --memory requires it)",
        1,
    ),
    _count(
        "--slice-frames",
        "frames computed at a time in the layers with the largest frames; the last bits of results may differ on some "
        "processors (default: whole chunks, or fewer if --memory requires it)",
        1,
    ),
    _choice(
        "--layout",
        "memory layout of activations; the last bits of results may differ",
        *("auto", "contiguous", "channels_last"),
    ),
    _choice(
        "--paired-frames",
        "Winograd convolutions for two frames at once, with a third fewer multiplications; results may differ in the "
        "last bits, and in bfloat16 rounding errors double; auto is on where it is faster on a CPU, but for a bfloat16 "
        "encoder only on a CPU without a matrix unit",
        *("auto", "on", "off"),
    ),
)
_RUN_OPTIONS = (
    *_DEVICE_OPTIONS,
    *_BUDGET_OPTIONS,
    _option("--profile", "use the thresholds that longvid tune saved in this file", metavar="FILE"),
    _count("--start", "first frame of the video", 0, default=0),
    _count("--frames", "number of frames (default: all)", 1),
    _flag("--overwrite", "replace existing output, except an unfinished store of this very command, which is resumed"),
    _choice(
        "--resume",
        "an unfinished store is continued if the run reproduces the end of what is stored, bit for bit (exact); also "
        "if it does not, and where the values change is recorded (close); or not at all (never)",
        *("exact", "close", "never"),
    ),
    _option(
        "--part",
        "compute part K of N only, to STORE.part-K-of-N; longvid join makes one store of all parts",
        read=_read_part,
        metavar="K/N",
    ),
    _flag("--no-lock", "write without a lock, on a file system that has none; make sure that one run writes at a time"),
    _choice(
        "--durability",
        "what a finished part survives: fsync a power loss, rename only the end of the process",
        *("fsync", "rename"),
    ),
    _JSON,
    _option("--report", "write a page on memory, transfers and speed, such as run.html", metavar="FILE"),
    _option("--record", "write every event as a line of JSON, such as run.jsonl", metavar="FILE"),
    _QUIET,
)

# ------------------------------------------------------------------------------------------------- commands

_ENCODE = (
    _option(
        "source",
        "what to read: a video file, a folder of pictures (PNG, JPEG, TIFF, WebP; in the order of their names), "
        "numbered pictures such as 'in/%%05d.png', a single picture, a FIFO, or - for standard input",
        metavar="SRC",
    ),
    _option("store", "zarr store to write, such as out.zarr", metavar="STORE"),
    *_model_options("tiny"),
    _option("--size", "resize frames, such as 720x480", read=parse_size, metavar="WxH"),
    _choice(
        "--representation",
        "what to store of the posterior: its mean, mean and log variance, or a sample",
        *("mode", "moments", "sample"),
    ),
    _count("--seed", "seed of --representation sample", 0, default=0),
    _choice(
        "--chunk-plan",
        "for models with norms over time, such as CogVideoX: pad the last chunk, or make the first one longer by the "
        "remainder, as diffusers does, for its very latents at any length",
        *("online", "reference"),
    ),
    _choice(
        "--on-error",
        "where the file is damaged: stop with an error, keep what comes before and end there, or conceal the damage "
        "with the last good frame and mark it",
        *("stop", "keep", "conceal"),
    ),
    _choice(
        "--on-non-finite",
        "where the model gives NaN or infinity: stop with an error, or encode the last good frame in place of that "
        "chunk and mark it",
        *("stop", "quarantine"),
    ),
    _option(
        "--fps",
        "resample to so many frames per second by time stamps; of pictures: their rate",
        read=_read_rate,
        metavar="N",
    ),
    _option(
        "--assume-fps",
        "frames per second of a source without time stamps (default: 24 of pictures)",
        read=_read_rate,
        metavar="N",
    ),
    _option(
        "--fit",
        "how frames of another shape come to --size (default: crop if the aspect differs by more than 2 %%)",
        choices=("stretch", "crop", "pad"),
    ),
    _choice("--pixels", "resample frames whose pixels are not square to their display shape", "kept", "square"),
    _choice("--deinterlace", "make frames that consist of two fields whole, or leave them", "auto", "off"),
    _option(
        "--background",
        "colour that transparent pixels are composited on, a name or #rrggbb (default: black)",
        default="black",
        metavar="COLOUR",
    ),
    _flag("--follow", "read a file as another program writes it, and end when it has not grown for --follow-seconds"),
    _option("--follow-seconds", "for --follow", read=_read_seconds, default=10.0, metavar="N"),
    _option("--max-pixels", "refuse a source with larger frames (default: those of 8192x4320)", read=int, metavar="N"),
    _option("--max-frames", "refuse a source with more frames", read=int, metavar="N"),
    _option("--max-seconds", "refuse a source that is longer", read=float, metavar="N"),
    _option("--max-bytes", "refuse a file that is larger, such as 4GiB", read=parse_bytes, metavar="N"),
    _choice("--store-dtype", "dtype of stored latents", "float16", "float32"),
    *_RUN_OPTIONS,
)
_DECODE = (
    _option(
        "store",
        "store of latents to read; or latents of another program: a .safetensors, .npy, .pt or .pth file, with --model",
        metavar="STORE",
    ),
    _option(
        "out",
        "output to write: .mp4, .mov, .mkv or .webm; .zarr for a store of frames; pictures such as out/%%05d.png, or a "
        "folder of them such as out/",
        metavar="OUT",
    ),
    _option(
        "--codec",
        "codec of a video file; ffv1 is lossless (default: h264, and vp9 in .webm)",
        choices=("h264", "h265", "av1", "ffv1", "prores", "vp9"),
    ),
    _count(
        "--crf", "quality of a video file, from 0 (best) up (default: 18 of h264, 20 of h265, 28 of av1 and vp9)", 0
    ),
    _option("--pix-fmt", "pixel format of a video file, such as yuv420p10 (default: by codec)", metavar="FORMAT"),
    _option(
        "--audio",
        "sound of a video file: copy (of the source, if it is there and still the same file), none, or a file of sound",
        default="copy",
        metavar="SOUND",
    ),
    *_model_options(None),
    _flag("--normalized", "of a file: its latents are those of a diffusion model, such as output_type='latent' gives"),
    _count("--num-frames", "of a file: frames of its video (default: all that the latents hold)", 1),
    _option("--fps", "of a file: frames per second of its video (default: 24)", read=_read_rate, metavar="N"),
    _count("--channel-axis", "of a file: the axis of the channels, if the shape does not tell", 0),
    _option("--tensor", "of a file: name of the tensor, if there are several", metavar="NAME"),
    *_RUN_OPTIONS,
)
_JOIN = (
    _option("store", "store to make of STORE.part-1-of-N and all other parts, which stay", metavar="STORE"),
    _flag("--overwrite", "replace a longvid store that is there"),
    _JSON,
    _QUIET,
)
_VERIFY = (_option("store", "store to check", metavar="STORE"), _JSON)
_REPAIR = (
    _option("store", "store to repair", metavar="STORE"),
    _option("--source", "source that it was made from (default: the recorded one)", metavar="SRC"),
    *_model_options(None),
    *_DEVICE_OPTIONS,
    *(_MEMORY, _JSON, _QUIET),
)
_INFO = (_option("store", "store of latents or of frames", metavar="STORE"), _JSON)
_PLAN = (
    _option("--model", "model, as for encode", default="tiny", metavar="MODEL"),
    _PICKLES,
    _FRAME_SIZE,
    _option("--device", "device to plan for: auto, cpu, cuda, ...; it need not exist here", default="auto"),
    _DTYPE,
    *_BUDGET_OPTIONS,
    _JSON,
)
_CHECK = (
    _option("model", "tiny, a folder or hub id in diffusers format, or the name of an architecture", metavar="MODEL"),
    *_model_options("tiny")[1:],
    _option("--size", "frame size for which contexts are counted (default: 832x480)", read=parse_size, metavar="WxH"),
    _JSON,
)
_TUNE = (
    *_model_options("tiny"),
    _FRAME_SIZE,
    *_DEVICE_OPTIONS,
    _MEMORY,
    _choice("--direction", "what to measure", "both", "encode", "decode"),
    _count("--thresholds", "number of thresholds, from offloading nothing to everything", 2, default=6),
    _count("--rounds", "measurements of each threshold", 1, default=3),
    _file_name("--save", "write the best thresholds for --profile, such as profile.toml", "profile", ".toml"),
    _file_name(
        "--plot",
        "plot the measurements (default: beside the file of --save, as .png)",
        "picture",
        *(".png", ".svg", ".pdf"),
    ),
    _flag("--overwrite", "replace an existing profile and plot"),
    *(_JSON, _QUIET),
)

_COMMANDS: dict[str, tuple[str, tuple[_Option, ...]]] = {
    "encode": ("encode a video file to a zarr store of latents", _ENCODE),
    "decode": ("decode a store of latents to a video file or a zarr store of frames", _DECODE),
    "join": ("make one store of the parts that --part made", _JOIN),
    "verify": ("check every byte of a store and list the damaged frames", _VERIFY),
    "repair": ("compute the damaged parts of a store again", _REPAIR),
    "info": ("show what a store holds", _INFO),
    "plan": ("show how much memory a model needs for a frame size; needs no weights", _PLAN),
    "check": ("run a model on tiny frames and report what it keeps to: causality, cuts, lengths, dtypes", _CHECK),
    "tune": ("measure peak memory and time for several offload thresholds", _TUNE),
}

"""What a causal video VAE has to keep to, each as a function that runs the model and says what it found.

The functions return a :class:`Finding`. :func:`longvid.check_model` is made of them, and the tests of every family in
this package run them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from longvid.errors import LongvidError, ModelError
from longvid.events import Direction
from longvid.models.base import CausalVAE, NativeVAE
from longvid.models.kernels.narrow import NarrowArithmetic
from longvid.planning.dry_run import DryRuns
from longvid.planning.subject import Subject, Watch, relative_difference, state_of
from longvid.planning.warmup import warmup
from longvid.planning.workload import Execution, Workload
from longvid.units import format_bytes

__all__ = [
    "Finding", "causality", "contexts", "cuts", "interleaving", "lengths", "narrow_dtype", "parity", "state",
    "warmup_length",
]  # fmt: skip

Verdict: TypeAlias = Literal["ok", "note", "wrong", "skipped"]

_ROUNDING = 1e-4
"relative difference in float32 that the order of sums explains; a norm that sees other frames changes much more"
_HEADROOM = 4
"factor between the largest value and the largest number of a dtype below which a note is made"
_FAR = 0.25
"relative difference to float32 that rounding does not explain"
_LATENTS = 5
"length of the videos that are cut"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    "its name"
    direction: Direction | None = None
    "None for both"
    verdict: Verdict
    "``wrong`` for what breaks results, ``note`` for what a user has to know to get them, ``skipped`` if it did not run"
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    "the numbers behind the text, ready for JSON"


def causality(subject: Subject, direction: Direction) -> Finding:
    """Whether a changed frame, or latent, moves anything before it, within one chunk. Bit for bit."""
    geometry = subject.geometry
    count = 3 if geometry.chunk_invariant else 1 + geometry.schedule.chunk_latents
    x = subject.video(direction, count)
    before = subject.run(direction, x, [count])
    unit = "latent" if direction == "encode" else "frame"
    early, moved = 0, False
    for latent in range(1, count):
        first = geometry.schedule.frame_range(latent)[0]
        at, own = (first, latent) if direction == "encode" else (latent, first)
        other = x.clone()
        other[:, :, at] = 0.5 - other[:, :, at]
        changed = torch.ne(subject.run(direction, other, [count]), before).transpose(1, 2).flatten(2).any(dim=2)[0]
        moved |= bool(changed.any())
        early = max(early, own - int(changed.nonzero()[0]) if changed.any() else 0)
    figures = {"units": unit, "early": early, "depends": moved}

    def found(verdict: Verdict, text: str) -> Finding:
        return Finding(check="causal", direction=direction, verdict=verdict, text=text, figures=figures)

    if not moved:
        return found("wrong", f"no {unit} depends on the input")
    if not early:
        return found("ok", f"what comes later moves no {unit} before it, in a chunk of {count} latents")
    text = f"what comes later moves the {_plural(early, unit)} before it, within a chunk"
    if geometry.chunk_invariant:
        return found("wrong", f"{text}, and the model claims chunk_invariant")
    return found("note", f"{text}, as norms over the frames of a chunk do; the chunk plan fixes the result")


def cuts(subject: Subject, direction: Direction) -> Finding:
    """How far the results of several cuts of one video into chunks differ."""
    geometry = subject.geometry
    n = geometry.schedule.chunk_latents
    total = _LATENTS if geometry.chunk_invariant else 1 + 2 * n
    plans = {
        "one chunk": [total],
        "one latent at a time": [1] * total,
        "mixed": [2, 1, total - 3] if total > 3 else [2, 1],
    }
    if not geometry.chunk_invariant:
        plans = {"the model's own": [1 + n, n], **plans}
    x = subject.video(direction, total)
    results: dict[str, Tensor | str] = {}
    for name, cut in plans.items():
        try:
            results[name] = subject.run(direction, x, cut)
        except Exception as exc:  # of a model that we do not know
            results[name] = brief(exc)
    reference, *others = results
    expected = results[reference]
    if isinstance(expected, str):
        raise ModelError(expected)
    differences: dict[str, float | str] = {}
    for name in others:
        got = results[name]
        try:
            differences[name] = got if isinstance(got, str) else relative_difference(got, expected)
        except ModelError as exc:
            differences[name] = str(exc)
    verdict, text = _judge_cuts(differences, reference, claimed=geometry.chunk_invariant)
    figures = {"reference": reference, "differences": differences, "chunk_invariant": geometry.chunk_invariant}
    return Finding(check="cuts", direction=direction, verdict=verdict, text=text, figures=figures)


def _judge_cuts(differences: Mapping[str, float | str], reference: str, *, claimed: bool) -> tuple[Verdict, str]:
    failed = {name: why for name, why in differences.items() if isinstance(why, str)}
    off = {name: value for name, value in differences.items() if not isinstance(value, str) and not value <= _ROUNDING}
    largest = max((value for value in differences.values() if not isinstance(value, str)), default=0.0)
    if not failed and not off:
        text = "any cut gives the same result" + (f", but for {largest:.1e}" if largest else ", bit for bit")
        return "ok", text + ("" if claimed else "; the model could declare chunk_invariant")
    if claimed:
        name = next(iter(failed or off))
        what = failed[name] if failed else f"a relative difference of {off[name]:.1e}"
        return "wrong", f"the model claims chunk_invariant, but {name} against {reference} gives {what}"
    said = [f"{value:.1e} for {name}" for name, value in off.items()] + [f"{name} does not run" for name in failed]
    return "note", f"the result depends on the cut ({', '.join(said)}), so the chunk plan is part of it and is fixed"


def lengths(subject: Subject) -> Finding:
    """Whether videos of 1 to more than two chunks come back with as many frames as went in."""
    geometry = subject.geometry
    f = geometry.frames_per_latent
    own = geometry.chunk_frames
    schedule = geometry.schedule_for(min(own, max(f, 2)) if geometry.chunk_invariant else None)
    most = 2 * schedule.chunk_frames + 3
    x = subject.video("encode", schedule.num_latents(most) + schedule.chunk_latents, side=1)
    wrong: dict[int, str] = {}
    for num_frames in range(1, most + 1):
        got = 0
        with subject.context("encode") as encoding, subject.context("decode") as decoding:
            for chunk in schedule.chunks(num_frames):
                start = chunk.frame_start
                moments = subject.step("encode", x[:, :, start : start + chunk.padded_frames], encoding)
                shape = (1, 2 * geometry.latent_channels, chunk.num_latents, 1, 1)
                if tuple(moments.shape) != shape:
                    wrong[num_frames] = f"moments of shape {tuple(moments.shape)} instead of {shape}"
                    break
                pixels = subject.step("decode", moments.chunk(2, dim=1)[0], decoding)
                p = geometry.pixels_per_latent
                if tuple(pixels.shape) != (1, 3, chunk.padded_frames, p, p):
                    wrong[num_frames] = f"{pixels.shape[2]} frames back, of size {pixels.shape[4]}x{pixels.shape[3]}"
                    break
                got += min(pixels.shape[2], chunk.num_frames)
        if num_frames not in wrong and got != num_frames:
            wrong[num_frames] = f"{got} frames back"
    figures = {"most": most, "wrong": wrong}
    if not wrong:
        text = f"1 to {most} frames in give as many frames out, in chunks of {schedule.chunk_frames}"
        return Finding(check="lengths", verdict="ok", text=text, figures=figures)
    length, why = next(iter(wrong.items()))
    text = f"{len(wrong)} of {most} lengths do not come back: {_plural(length, 'frame')} in, {why}"
    return Finding(check="lengths", verdict="wrong", text=text, figures=figures)


def warmup_length(subject: Subject, direction: Direction) -> Finding:
    """How much of the past the model needs, see :func:`longvid.warmup`."""
    geometry = subject.geometry
    frames = geometry.frames_per_latent if geometry.chunk_invariant else None
    try:
        found = warmup(subject.model, direction, chunk_frames=frames)
    except ModelError as exc:
        if "never forgets" not in str(exc):
            raise
        text = (
            "it never forgets its first frames; parts are not possible, and what is resumed, repaired or decoded from "
            "the middle is computed from frame 0"
        )
        return Finding(
            check="warm-up", direction=direction, verdict="note", text=text, figures={"chunks": None, "latents": None}
        )
    latents = found.chunks * geometry.schedule_for(frames).chunk_latents
    text = f"a start in the middle is exact after {_plural(latents, 'latent')}"
    figures = {"chunks": found.chunks, "latents": latents}
    return Finding(check="warm-up", direction=direction, verdict="ok", text=text, figures=figures)


def contexts(model: CausalVAE, direction: Direction, size: tuple[int, int]) -> Finding:
    """The contexts of one video of frames of ``size`` (height, width), in a dtype of 16 bits, from a dry run.

    The model needs no weights.
    """
    geometry = model.geometry
    height, width = geometry.padded_size(*size)
    schedule = geometry.schedule_for(geometry.frames_per_latent if geometry.chunk_invariant else None)
    workload = Workload(direction=direction, height=height, width=width, dtype=torch.bfloat16, schedule=schedule)
    layers = {step.layer: step.context_bytes for step in DryRuns.of(model).cost_model(workload, Execution()).steps}
    total, what = sum(layers.values()), f"at {width}x{height} in 16 bits"
    text = f"no layer keeps a context {what}: every chunk is computed for itself"
    if layers:
        path = max(layers, key=lambda layer: layers[layer])
        largest = f"the largest is {path} with {format_bytes(layers[path])}"
        text = f"{_plural(len(layers), 'context')}, {format_bytes(total)} {what}; {largest}"
    figures = {"height": height, "width": width, "bytes": total, "layers": layers}
    return Finding(check="contexts", direction=direction, verdict="ok", text=text, figures=figures)


def narrow_dtype(subject: Subject, direction: Direction, dtype: torch.dtype, *, own: bool = False) -> Finding:
    """What a dtype of 16 bits does to black, white and noisy pixels, and to latents of standard deviation 3.

    Args:
        subject: the model in float32.
        direction: which half.
        dtype: float16 or bfloat16.
        own: whether it is the dtype of the model's weights, so that an overflow is an error and not a note.
    """
    low = subject.fresh(dtype)
    x = low.video(direction, 3, std=3.0)
    if direction == "encode":
        x = torch.where(x.abs() > 0.5, x.sign(), x)
    arithmetic = NarrowArithmetic(dtype)
    watch = _Layers(arithmetic)
    got = low.run(direction, x, [2, 1], offloader=watch, mode=arithmetic)
    expected = subject.run(direction, x.float(), [2, 1])
    distance = relative_difference(got, expected)
    limit = torch.finfo(dtype).max
    figures = {"largest": arithmetic.largest, "limit": limit, "difference": distance, "overflow": arithmetic.overflow}

    def found(verdict: Verdict, text: str) -> Finding:
        name = str(dtype).removeprefix("torch.")
        return Finding(check=name, direction=direction, verdict=verdict, text=text, figures=figures)

    if arithmetic.overflow is not None:
        operation, layer = arithmetic.overflow
        where = f" in or behind layer {layer}" if layer else ""
        return found("wrong" if own else "note", f"it overflows: {operation}{where} is not finite; use another dtype")
    text = f"relative difference to float32 {distance:.1e}; the largest value is {arithmetic.largest:.3g}"
    if not distance <= _FAR:
        return found("wrong" if own else "note", f"{text}; more than rounding explains, so use another dtype")
    if arithmetic.largest * _HEADROOM > limit:
        return found("note", f"{text}, close to the largest number, {limit:.3g}; other videos may overflow")
    return found("ok", text)


class _Layers(Watch):
    """Tells the arithmetic which layer computes."""

    def __init__(self, arithmetic: NarrowArithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic

    def open(self, path: str) -> Tensor | None:
        self.arithmetic.layer = path
        return super().open(path)


class _StopError(Exception):
    """The exception in the middle of a video."""


def state(subject: Subject, direction: Direction) -> Finding:
    """What is left on the modules after a video, and after an exception in the middle of one."""
    fresh = subject.fresh()
    cut = _own_cut(fresh)
    x = fresh.video(direction, sum(cut))
    clean, watch = state_of(fresh.module), Watch()
    alone = fresh.run(direction, x, cut, offloader=watch)
    left = _changed(clean, state_of(fresh.module))
    after_error: list[str] = []
    again_equal: bool | None = None
    if watch.opened:
        before = state_of(fresh.module)
        middle = watch.opened // len(cut) + 1 + watch.opened // len(cut) // 2
        try:
            fresh.run(direction, x, cut, offloader=Watch(min(middle, watch.opened), _StopError))
        except _StopError:
            after_error = _changed(before, state_of(fresh.module))
    try:
        again_equal = torch.equal(fresh.run(direction, x, cut), alone)
    except Exception as exc:  # of a model that we do not know
        left.append(f"the next video fails: {brief(exc)}")
    figures = {"left": left, "left_after_exception": after_error, "next_video_equal": again_equal}

    def found(verdict: Verdict, text: str) -> Finding:
        return Finding(check="state", direction=direction, verdict=verdict, text=text, figures=figures)

    if left:
        return found("wrong", f"a video leaves state on the modules: {_some(left)}")
    if after_error:
        return found("wrong", f"an exception in a video leaves state on the modules: {_some(after_error)}")
    if not again_equal:
        return found("wrong", "the same video gives another result the next time")
    return found("ok", "nothing is left on the modules, neither by a video nor by an exception in one")


def interleaving(subject: Subject, direction: Direction) -> Finding:
    """Whether two videos that take turns, chunk by chunk, give what each of them gives alone. Bit for bit."""
    fresh = subject.fresh()
    cut = _own_cut(fresh)
    videos = [fresh.video(direction, sum(cut), seed=seed) for seed in (1, 2)]
    alone = [fresh.run(direction, x, cut) for x in videos]
    turns: list[list[Tensor]] = [[], []]
    with fresh.context(direction) as first, fresh.context(direction) as second:
        for pieces in zip(*(fresh.pieces(direction, x, cut) for x in videos), strict=True):
            for outputs, context, piece in zip(turns, (first, second), pieces, strict=True):
                outputs.append(fresh.step(direction, piece, context))
    equal = [torch.equal(torch.cat(got, dim=2), whole) for got, whole in zip(turns, alone, strict=True)]
    ok = all(equal)
    text = "two videos that take turns " + ("are those of each alone" if ok else "disturb each other")
    return Finding(
        check="two videos", direction=direction, verdict="ok" if ok else "wrong", text=text, figures={"equal": equal}
    )


def parity(subject: Subject, direction: Direction) -> Finding:
    """The relative difference to the class in diffusers with the same weights, in the chunks of that class."""

    def found(verdict: Verdict, text: str, **figures: Any) -> Finding:
        return Finding(check="diffusers", direction=direction, verdict=verdict, text=text, figures=figures)

    model = subject.model
    name = str(model.describe().get("class_name"))
    if not isinstance(model, NativeVAE) or not name.startswith("AutoencoderKL"):
        return found("skipped", f"{name} is not a class of diffusers")
    if find_spec("diffusers") is None:
        return found("skipped", "diffusers is not installed")
    theirs = _reference(model, name)
    if theirs is None:
        return found("skipped", f"the diffusers that is installed has no {name}")
    cut = [1, 1, 1] if subject.geometry.chunk_invariant else _own_cut(subject)
    x = subject.video(direction, sum(cut))
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.parameters if direction == "encode" else theirs.decode(x).sample
    difference = relative_difference(subject.run(direction, x, cut), expected)
    text = f"relative difference to {name} in float32: {difference:.1e}"
    return found("ok" if difference <= _ROUNDING else "wrong", text, difference=difference)


def _reference(model: NativeVAE, name: str) -> Any:
    """The diffusers class with this model's weights, which are not copied; None if there is none."""
    import diffusers

    reference = getattr(diffusers, name, None)
    if reference is None:
        return None
    known = inspect.signature(reference.__init__).parameters
    config = {key: value for key, value in json.loads(json.dumps(model.describe()["config"])).items() if key in known}
    if config.get("latents_mean", ()) is None:  # none of our own is theirs by default, and does not change results
        config = {key: value for key, value in config.items() if key not in ("latents_mean", "latents_std")}
    with torch.device("meta"):
        theirs: Any = reference(**config)
    names = model.checkpoint_names()
    theirs.load_state_dict({names[key]: tensor for key, tensor in model.state_dict().items()}, assign=True)
    if hasattr(theirs, "num_sample_frames_batch_size"):
        theirs.num_sample_frames_batch_size = model.geometry.chunk_frames
    return theirs.eval()


def _own_cut(subject: Subject) -> list[int]:
    """Two chunks of latents, the shortest that have both kinds of latents where the cut is free."""
    if subject.geometry.chunk_invariant:
        return [2, 1]
    n = subject.geometry.schedule.chunk_latents
    return [1 + n, n]


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    new = [f"{path} (new)" for path in after if path not in before]
    gone = [f"{path} (gone)" for path in before if path not in after]
    return new + gone + [path for path in after if path in before and after[path] != before[path]]


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _plural(count: int, unit: str) -> str:
    return f"{count} {unit}" + ("" if count == 1 else "s")


def brief(exc: BaseException) -> str:
    text = str(exc).strip().splitlines()
    name = "" if isinstance(exc, LongvidError) else f"{type(exc).__name__}: "
    return name + (text[0] if text else type(exc).__name__)

"""``python -m longvid.train FOLDER... --out DIR``: train ``tiny`` on videos and images of your own.

A run is a number of steps, not of minutes, and every random choice depends on seed and step only. A run can be stopped
at any time; the same command resumes from the last checkpoint. The result is a folder for ``load_model``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from longvid.errors import LongvidError, ModelError
from longvid.models.kernels.cpu import has_bfloat16
from longvid.models.tiny import BLOCK, FRAMES, TinyConfig, TinyVAE
from longvid.train.fit import LinearCoder, fit
from longvid.train.footage import VIDEOS, Footage, HoldOut, find_files, read_middle

EVALUATED = (176, 320)
"height and width at which held-out clips are evaluated"
EVALUATED_FRAMES = 49


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or resume training, and write the model folder."""
    args = _parser().parse_args(argv)
    try:
        return _train(args)
    except LongvidError as exc:
        print(f"longvid.train: {exc}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m longvid.train", description=__doc__)
    parser.add_argument("footage", nargs="+", type=Path, help="videos, images, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and checkpoints")
    parser.add_argument("--cache", type=Path, help="folder for decoded frames, gigabytes (default: OUT/cache)")
    parser.add_argument(
        "--hold-out",
        type=HoldOut.parse,
        action="append",
        default=[],
        metavar="PATTERN[@FROM-TO]",
        help="footage to evaluate on and not to train on: a file name pattern, with seconds if wanted; may be repeated",
    )
    parser.add_argument("--steps", type=int, default=4500, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="clips per step (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=49, help="frames of a clip, 1 + 4 n (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="height and width of a clip (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    parser.add_argument("--fit-clips", type=int, default=400, help="clips for the closed form (default: %(default)s)")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="compute threads (default: all cores)")
    return parser


def _train(args: argparse.Namespace) -> int:
    if args.frames % FRAMES != 1 or args.frames < 5 or args.size % 8 or args.size < 8:
        raise ModelError(
            f"clips of {args.frames} frames of {args.size}x{args.size} cannot be trained on; they have 1 + {FRAMES} n "
            "frames, at least 5, and a size that is a multiple of 8"
        )
    if min(args.steps, args.batch, args.every, args.fit_clips) < 1 or args.seed < 0:
        raise ModelError("steps, batch, every and fit-clips are at least 1, and seed at least 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    if not (args.out / "checkpoint.pt").exists() and any((args.out / name).exists() for name in names):
        raise ModelError(f"{args.out} holds a model that was not trained here; choose another folder for --out")
    cache = args.cache or args.out / "cache"
    files = find_files(args.footage, leave_out=(args.out, cache))
    footage = Footage.prepare(tqdm(files, desc="decode", unit="file"), cache, args.hold_out)
    if not footage.motion:
        raise ModelError("there is no video to train on besides those that are held out; images alone do not move")
    run = _Run(footage, files, args)
    held = _held_out_clips(files, args.hold_out)
    if not run.resume():
        run.coder = fit(run.model, footage, seed=args.seed, num_clips=args.fit_clips)
    run.loop(held)
    _export(run, held)
    return 0


class _Run:
    """Model, optimiser, step number, log; and their checkpoint."""

    coder: LinearCoder

    def __init__(self, footage: Footage, files: Sequence[Path], args: argparse.Namespace) -> None:
        self.footage, self.args = footage, args
        self._checkpoint: Path = args.out / "checkpoint.pt"
        torch.manual_seed(args.seed)
        self.model = TinyVAE(TinyConfig())
        self.trained = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        for parameter in self.trained:
            if parameter.dim() == 5:  # the layout in which convolutions train fastest
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        # Everything that the result depends on; a checkpoint with other settings is not resumed.
        self.settings = {
            **{k: getattr(args, k) for k in ("steps", "batch", "frames", "size", "rate", "seed", "fit_clips")},
            "footage": [f"{path.name} ({path.stat().st_size} bytes)" for path in files],
            "hold_out": sorted(map(str, args.hold_out)),
            "config": asdict(self.model.config),
        }

    def save(self) -> None:
        """Write the checkpoint, all or nothing."""
        state = {
            **{name: getattr(self, name) for name in ("settings", "step", "seconds", "log")},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "coder": asdict(self.coder),
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._checkpoint)

    def resume(self) -> bool:
        """Load the checkpoint of a run with these settings, if there is one; return whether there was one."""
        if not self._checkpoint.exists():
            return False
        state = torch.load(self._checkpoint, weights_only=True)
        if state["settings"] != self.settings:
            before = state["settings"]
            changed = [f"{k} {before.get(k)!r}, now {v!r}" for k, v in self.settings.items() if before.get(k) != v]
            raise ModelError(
                f"{self._checkpoint} belongs to a run with other settings ({'; '.join(changed)}); give the settings of "
                "that run, or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.coder = LinearCoder(**state["coder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        return True

    def loop(self, held: dict[str, Tensor]) -> None:
        """Train up to the last step. The next batch is drawn while the current one is computed."""
        args = self.args
        started = time.perf_counter() - self.seconds
        with (
            ThreadPoolExecutor(1) as pool,
            tqdm(total=args.steps, initial=self.step, desc="train", unit="step", smoothing=0.05) as bar,
        ):
            upcoming = pool.submit(self._batch, self.step)
            gains: list[float] = []
            while self.step < args.steps:
                clips = upcoming.result()
                upcoming = pool.submit(self._batch, self.step + 1)
                loss, gain = self._update(clips)
                if not math.isfinite(loss):
                    raise ModelError(f"the loss is {loss} at step {self.step}; try a lower --rate")
                gains.append(gain)
                self.step += 1
                bar.update()
                if self.step % args.every == 0 or self.step == args.steps:
                    self.seconds = time.perf_counter() - started
                    figures = {name: g["gain"] for name, g in evaluate(self.model, self.coder, held).items()}
                    held_out = f", held out {np.mean(list(figures.values())):.2f} dB" if figures else ""
                    gain = float(np.mean(gains))
                    self.log.append({"step": self.step, "loss": loss, "train_gain": gain, "held_out": figures})
                    bar.set_postfix_str(f"gain over linear: {gain:.2f} dB{held_out}")
                    gains.clear()
                    self.save()

    def _batch(self, step: int) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] of a step."""
        args = self.args
        clips = [
            self.footage.clip(np.random.default_rng([args.seed, 2, step, i]), num_frames=args.frames, size=args.size)
            for i in range(args.batch)
        ]
        return torch.from_numpy(np.stack(clips)).div_(127.5).sub_(1).permute(0, 4, 1, 2, 3)

    def _update(self, x_BCTHW: Tensor) -> tuple[float, float]:
        """One step; returns the loss and the gain over the linear coder in dB."""
        rate = self.args.rate * min(1, (self.step + 1) / 100)
        rate *= 0.5 + 0.5 * math.cos(math.pi * self.step / self.args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate + 1e-6
        noise = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        config = self.model.config
        with torch.no_grad():
            coefficients = self.model.transform(x_BCTHW, first=True).contiguous(memory_format=torch.channels_last_3d)
            # What the transform drops cannot be learned, but it belongs to the error.
            dropped = self._energy(x_BCTHW) - coefficients.square().sum((1, 3, 4))
            linear = (coefficients[:, config.latent_channels :].square().sum((1, 3, 4)) + dropped)[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            z = self.model.encoder(coefficients, None, True)
            z = z + config.posterior_std * torch.randn(z.shape, generator=noise)
            decoded = self.model.decoder(z, None, True)
        error = (decoded.float() - coefficients).square().sum((1, 3, 4)) + dropped
        numbers = BLOCK * coefficients.shape[3] * coefficients.shape[4]
        # The logarithm makes a decibel worth the same on every clip; the constant (43 dB) ends the race on easy ones.
        rest, first = (error[:, 1:].mean(1) / numbers + 2e-4).log(), (error[:, 0] / numbers + 2e-4).log()
        loss = (rest + 0.1 * first).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        gain = 10 * torch.log10(linear.mean(1).clamp(min=1e-6) / error[:, 1:].mean(1).clamp(min=1e-6)).mean()
        return float(loss.detach()), float(gain.detach())

    def _energy(self, x_BCTHW: Tensor) -> Tensor:
        """Squared distance of each block group (B, t) from the transform's mean, all 768 numbers of a block counted."""
        padded = torch.cat([x_BCTHW[:, :, :1]] * (FRAMES - 1) + [x_BCTHW], dim=2)
        B, C, T, H, W = padded.shape
        blocks = padded.reshape(B, C, T // FRAMES, FRAMES, H // 8, 8, W // 8, 8).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return (blocks.flatten(4) - self.model.transform.mean).square().sum((2, 3, 4))


def _held_out_clips(files: Sequence[Path], hold_out: Sequence[HoldOut]) -> dict[str, Tensor]:
    """Pixels (1, 3, T, H, W) of the middle of each held-out piece, by the name of its file and its seconds."""
    clips: dict[str, Tensor] = {}
    for path in (path for path in files if path.suffix.lower() in VIDEOS):
        for held in (h for h in hold_out if h.matches(path)):
            frames = torch.from_numpy(read_middle(path, held, size=EVALUATED, frames=EVALUATED_FRAMES))
            clips[str(replace(held, pattern=path.name))] = frames.float().div_(127.5).sub_(1).permute(3, 0, 1, 2)[None]
    return clips


@torch.no_grad()
def evaluate(model: TinyVAE, coder: LinearCoder, clips: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """RGB PSNR in dB of model and linear coder on each clip, over all frames, rounded to 8 bits."""
    figures = {}
    for name, x in clips.items():
        decoded = model.transform.inverse(
            model.decoder(model.encoder(model.transform(x, True), None, True), None, True), True
        )
        ours, linear = psnr(decoded, x), psnr(coder.reconstruct(x, model.config.latent_channels), x)
        figures[name] = {"psnr": ours, "linear": linear, "gain": ours - linear}
    return figures


def psnr(decoded: Tensor, x: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], after rounding to 8 bits."""
    ours, theirs = (t.clamp(-1, 1).add(1).mul(127.5).round() for t in (decoded, x))
    return float(10 * torch.log10(255**2 / (ours - theirs).square().mean().clamp(min=1e-9)))


def _export(run: _Run, held: dict[str, Tensor]) -> None:
    """Write the model folder in float16, then evaluate what was written."""
    out = Path(run.args.out)
    channels = run.model.config.latent_channels
    half = {
        name: t.detach().to(torch.float16, memory_format=torch.contiguous_format)
        for name, t in run.model.state_dict().items()
    }
    safetensors.torch.save_file(half, out / "diffusion_pytorch_model.safetensors")
    run.coder.save(out / "linear.safetensors", channels)
    config = {"_class_name": TinyVAE.class_name, **asdict(run.model.config)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    run.model.load_state_dict({name: t.float() for name, t in half.items()})
    figures = evaluate(run.model, LinearCoder.load(out / "linear.safetensors"), held)
    record = {
        "settings": run.settings,
        "minutes": round(run.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "figures": figures,
        "curve": run.log,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, f in figures.items():
        print(f"{name:40} {f['psnr']:6.2f} dB, linear {f['linear']:6.2f} dB, gain {f['gain']:+.2f} dB")
    if figures:
        print(f"{'mean gain':40} {np.mean([f['gain'] for f in figures.values()]):+.2f} dB")
    print(f"model folder: {out}")


if __name__ == "__main__":
    sys.exit(main())

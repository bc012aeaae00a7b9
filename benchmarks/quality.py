"""What does the model lose? PSNR and SSIM of encode and decode, beside the linear coder of the same latent size.

    python benchmarks/quality.py VIDEO... [--size 320x176 ...] [--model tiny] [--out FILE.json] [--sheet FILE.png]

VIDEO is a file or a folder. Frames go through the real path: push mode, chunk by chunk, contexts in the cache, uint8
out. The linear coder (principal components of 4 x 8 x 8 blocks, 16 numbers each, one basis for the first frame) was
fitted on the footage that the model was trained on and lies beside its weights. What the record of the training names
as footage is judged on what was held out of it; a file that was trained on is marked and left out of the means.

A seam is judged on the same frames coded twice: in short chunks, where they touch a chunk border, and in long ones,
where they do not; the ratio of their squared errors is 1 if borders cost nothing. `border/inside` compares them with
other frames of the same place in a latent, so it also carries what changes in the video.

Source: PSNR over all pixels of a clip; SSIM of luma, Wang et al. 2004, as implemented in scikit-image.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import new_parser, write_results
from skimage.metrics import structural_similarity

import longvid as lv
from longvid.media.picture import side_by_side, write_png
from longvid.media.video_file import VideoFile
from longvid.models.loading import BUILT_IN
from longvid.train.fit import LinearCoder
from longvid.train.footage import IMAGES, HoldOut, find_files, read_middle
from longvid.units import parse_size

Frames = npt.NDArray[np.uint8]
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SHORT, LONG = 16, 32


def roundtrip(model: lv.CausalVAE, frames: Frames, chunk_frames: int | None, device: str) -> Frames:
    """Encode and decode in push mode."""
    with lv.VideoSession(model, device=device, chunk_frames=chunk_frames) as session:
        with session.encoder() as encoder:
            z = torch.cat([encoder.push(frames), encoder.finish()], dim=2)
        with session.decoder(num_frames=len(frames)) as decoder:
            return np.concatenate([decoder.push(z), decoder.finish()])


def linear_roundtrip(coder: LinearCoder, frames: Frames) -> Frames:
    """The linear coder on the same frames, 17 at a time; 1 + 4 n frames."""
    first_size = len(coder.first_basis)
    parts = []
    for start in range(0, max(1, len(frames) - 1), 16):
        x = torch.from_numpy(frames[start : start + 17]).float().div_(127.5).sub_(1).permute(3, 0, 1, 2)[None]
        y = coder.reconstruct(x, first_size)[0].permute(1, 2, 3, 0)
        levels = y.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).numpy()
        parts.append(levels[start > 0 :])  # only a video's first frame is coded alone
    return np.concatenate(parts)


def mse_by_frame(a: Frames, b: Frames) -> npt.NDArray[np.float64]:
    """Mean squared error of every frame, in 8-bit levels."""
    return np.array([np.square(x.astype(np.float32) - y).mean(dtype=np.float64) for x, y in zip(a, b, strict=True)])


def decibels(mse: float) -> float:
    """PSNR in dB of a mean squared error in 8-bit levels."""
    return round(10 * math.log10(255**2 / max(mse, 1e-9)), 3)


def luma(frames: Frames) -> npt.NDArray[np.float32]:
    """Luma (T, H, W) by BT.601."""
    return np.stack([frame @ LUMA for frame in frames])


def judge(source: Frames, decoded: Frames) -> dict[str, float]:
    """PSNR and SSIM of a decoded clip."""
    errors = mse_by_frame(source, decoded)
    a, b = luma(source), luma(decoded)
    sampled = range(0, len(a), 4)
    return {
        "psnr_rgb": decibels(errors.mean()),
        "psnr_luma": decibels(float(np.square(a - b).mean(dtype=np.float64))),
        "ssim": round(float(np.mean([structural_similarity(a[t], b[t], data_range=255) for t in sampled])), 4),
        "psnr_first_frame": decibels(errors[0]),
        "psnr_rest": decibels(errors[1:].mean()),
    }


def judge_seams(source: Frames, short: Frames, long: Frames) -> dict[str, float]:
    """Errors of frames at chunk borders against the same frames away from them, and against their like."""
    frames = np.arange(1, len(source))
    place = (frames - 1) % SHORT
    at_border = ((place == 0) & (frames > 1)) | ((place == SHORT - 1) & (frames < len(source) - 1))
    between_latents = np.isin((frames - 1) % 4, (0, 3)) & ~at_border & (frames > 1)
    only_short = at_border & ~np.isin((frames - 1) % LONG, (0, LONG - 1))
    a, b = mse_by_frame(source, short), mse_by_frame(source, long)
    return {
        "seam": round(float(a[frames[only_short]].mean() / b[frames[only_short]].mean()), 6),
        "border/inside": round(float(a[frames[at_border]].mean() / a[frames[between_latents]].mean()), 3),
    }


def held_out(path: Path, training: dict[str, Any]) -> HoldOut | None:
    """What of a file was not trained on: all of a foreign file, None of one that was trained on whole."""
    if not any(name.startswith(f"{path.name} (") for name in training.get("footage", [])):
        return HoldOut("*")
    return next((h for h in map(HoldOut.parse, training["hold_out"]) if h.matches(path)), None)


def measure(
    model: lv.CausalVAE, coder: LinearCoder, path: Path, size: tuple[int, int], args: argparse.Namespace
) -> tuple[dict[str, Any], list[Frames]]:
    """Figures of one clip at one size, and a row of the sheet."""
    held = held_out(path, args.training)
    source = read_middle(path, held or HoldOut("*"), size=size, frames=args.frames)
    decoded = roundtrip(model, source, SHORT, args.device)
    linear = linear_roundtrip(coder, source)
    ours, theirs = judge(source, decoded), judge(source, linear)
    record: dict[str, Any] = {"clip": path.name, "size": f"{size[1]}x{size[0]}", "frames": len(source)}
    record["trained_on"] = held is None
    record["model"] = ours
    record["linear"] = theirs
    record["gain"] = {key: round(ours[key] - theirs[key], 4) for key in ours}
    if len(source) > LONG + 1:
        record.update(judge_seams(source, decoded, roundtrip(model, source, LONG, args.device)))
    t = len(source) // 2
    error = np.abs(source[t].astype(np.int16) - decoded[t]) * 4
    return record, [source[t], decoded[t], linear[t], np.minimum(error, 255).astype(np.uint8)]


def main() -> int:
    """Measure, print a table, write the results and the sheet."""
    parser = new_parser(__doc__)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="files or folders")
    parser.add_argument("--size", nargs="+", type=parse_size, default=[(176, 320)], metavar="WxH")
    parser.add_argument("--frames", type=int, default=97, help="frames from the middle of each (default: %(default)s)")
    parser.add_argument("--model", default="tiny", help="tiny or a folder that longvid.train wrote")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="PNG: source, model, linear coder, error x 4 at the first size")
    args = parser.parse_args()
    model = lv.load_model(args.model)
    folder = BUILT_IN.get(args.model, Path(args.model))
    coder = LinearCoder.load(folder / "linear.safetensors")
    args.training = json.loads((folder / "training.json").read_text())["settings"]
    records, rows = [], []
    print(f"{'clip':40}{'size':>10}{'RGB dB':>9}{'linear':>9}{'gain':>7}{'luma':>7}{'SSIM':>8}{'linear':>8}{'seam':>8}")
    for path in find_files(args.videos):
        if path.suffix.lower() in IMAGES:
            continue
        for size in args.size:
            with VideoFile(path) as video:
                enlarged = size[1] > video.info.width and size != args.size[0]
            if enlarged:
                continue  # enlarging tells nothing about a model
            record, row = measure(model, coder, path, size, args)
            records.append(record)
            if size == args.size[0]:
                rows.append(row)
            ours, theirs = record["model"], record["linear"]
            name = path.name[:37] + " *" * record["trained_on"]
            print(
                f"{name:40}{record['size']:>10}{ours['psnr_rgb']:>9.2f}{theirs['psnr_rgb']:>9.2f}"
                f"{record['gain']['psnr_rgb']:>+7.2f}{record['gain']['psnr_luma']:>+7.2f}{ours['ssim']:>8.4f}"
                f"{theirs['ssim']:>8.4f}{record.get('seam', float('nan')):>8.4f}",
                flush=True,
            )
    means: dict[str, dict[str, float]] = {}
    for size in args.size:
        name = f"{size[1]}x{size[0]}"
        gains = [r["gain"]["psnr_rgb"] for r in records if r["size"] == name and not r["trained_on"]]
        if gains:
            means[name] = {"mean_gain": round(float(np.mean(gains)), 3), "least_gain": min(gains)}
    print(json.dumps(means) + ("; * was trained on" if any(r["trained_on"] for r in records) else ""))
    if args.sheet is not None and rows:
        write_png(args.sheet, side_by_side(rows))
    write_results(args.out, means=means, clips=records)
    return 0


if __name__ == "__main__":
    sys.exit(main())

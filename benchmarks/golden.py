"""Bits before and after a change: two checkouts encode and decode the same videos, and their digests are compared.

    git worktree add ../before 5952bd2
    python benchmarks/golden.py --before ../before [--out benchmarks/results/golden.json]

Both checkouts run the demo clip through ``tiny``, and noise through CogVideoX with seeded weights at two small widths,
in float32 and bfloat16, in both memory layouts, each in a process of its own. Kernel forms that one of the two
checkouts lacks are turned off in both, so that every digest has to agree. A second table compares what each checkout
computes by its own default forms; there, the relative distance says how far the results are apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ONE_SIDED = ("subpixel_upsampling", "fused_pooling", "compiled", "float32_products")
"""fields of ``Numerics`` that only one of the checkouts may have"""
WIDTHS: dict[str, dict[str, Any]] = {
    "nano": {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1},
    "narrow": {"block_out_channels": (64, 128), "layers_per_block": 1, "temporal_compression_ratio": 2},
}


def turn_off_one_sided_forms() -> None:
    """Make every later import of ``choose_numerics`` give forms that both checkouts have."""
    name = "longvid.planning.kernel_choice" if find_spec("longvid.planning") else "longvid.probe"
    module: Any = import_module(name)
    real = module.choose_numerics

    def common(*args: Any, **kwargs: Any) -> Any:
        numerics = real(*args, **kwargs)
        known = {field.name for field in fields(numerics)}
        return replace(numerics, **dict.fromkeys(known & set(ONE_SIDED), False))

    module.choose_numerics = common


def compute(folder: Path, *, common_forms: bool) -> None:
    """Run inside one checkout: save the latents and frames of every case as ``CASE.npy``."""
    if common_forms:
        turn_off_one_sided_forms()
    import torch

    import longvid as lv
    from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE

    torch.set_num_threads(1)
    models: dict[str, Any] = {"tiny": lv.load_model("tiny")}
    for name, config in WIDTHS.items():
        torch.manual_seed(7)
        models[name] = CogVideoXVAE(CogVideoXConfig(**config)).eval().requires_grad_(False)
    clip = Path(lv.__file__).parent / "demo" / "clip.mp4"
    noise = np.random.default_rng(3).integers(0, 256, (26, 48, 64, 3), dtype=np.uint8)
    for name, model in models.items():
        for dtype in ("float32", "bfloat16"):
            if name != "nano" and dtype == "bfloat16":
                continue  # without bfloat16 kernels in the library, wider models take hours
            for layout in ("contiguous", "channels_last"):
                case = f"{name} {dtype} {layout}"
                store = folder / f"{case}.zarr"
                frames: list[Any] = []
                options: Any = {"dtype": dtype, "layout": layout, "paired_frames": "off"}
                with lv.VideoSession(model, device="cpu", **options) as session:
                    session.encode(clip if name == "tiny" else noise, store, store_dtype="float32")
                    session.decode(store, frames.append)
                latents = lv.open_store(store)
                num = latents.latents.shape[0]
                np.save(folder / f"{case} latents.npy", np.asarray(latents.read(0, num)))
                np.save(folder / f"{case} frames.npy", np.concatenate(frames))


def run(checkout: Path, folder: Path, *, common_forms: bool) -> dict[str, np.ndarray[Any, Any]]:
    """All results of one checkout."""
    folder.mkdir()
    code = f"import golden, pathlib; golden.compute(pathlib.Path({str(folder)!r}), common_forms={common_forms})"
    path = os.pathsep.join([str(checkout.resolve()), str(Path(__file__).parent.resolve())])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env={**os.environ, "PYTHONPATH": path})
    return {file.stem: np.load(file) for file in sorted(folder.glob("*.npy"))}


def compare(before: Path, after: Path, *, common_forms: bool) -> list[dict[str, Any]]:
    """One row per case."""
    with tempfile.TemporaryDirectory() as scratch:
        results = [
            run(checkout, Path(scratch) / name, common_forms=common_forms)
            for name, checkout in (("before", before), ("after", after))
        ]
    rows = []
    for case, old in results[0].items():
        new = results[1][case]
        digests = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (old, new)]
        a, b = old.astype(np.float64), new.astype(np.float64)
        distance = float(np.linalg.norm(a - b) / np.linalg.norm(a))
        rows.append({"case": case, "before": digests[0], "after": digests[1], "distance": distance})
    return rows


def main() -> int:
    """Compare, print both tables, write the results; 1 if a digest differs under common forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1], help="checkout to judge; this one")
    parser.add_argument("--skip-defaults", action="store_true", help="compare under common forms only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"command": "python " + shlex.join(sys.argv)}
    for title, common_forms in (("common forms", True), ("default forms", False)):
        if args.skip_defaults and not common_forms:
            continue
        rows = record[title] = compare(args.before, args.after, common_forms=common_forms)
        print(f"\n{title:44}{'before':>18}{'after':>18}{'distance':>12}")
        for row in rows:
            same = "" if row["before"] == row["after"] else "  differs"
            print(f"{row['case']:44}{row['before']:>18}{row['after']:>18}{row['distance']:>12.1e}{same}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row["before"] != row["after"] for row in record["common forms"]))


if __name__ == "__main__":
    raise SystemExit(main())

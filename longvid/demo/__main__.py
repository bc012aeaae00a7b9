"""``python -m longvid.demo``: encode the embedded clip to zarr, decode it again, and say what happened."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longvid.progress import ProgressBar
from longvid.units import format_bytes

CLIP = Path(__file__).with_name("clip.mp4")


def main() -> int:
    """Run the demo in a folder."""
    parser = argparse.ArgumentParser(prog="python -m longvid.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args()

    import longvid as lv

    args.out.mkdir(parents=True, exist_ok=True)
    store_path, back = args.out / "clip.zarr", args.out / "back.mp4"
    print("longvid demo: no trained model ships with this version. The weights are random, so the")
    print("decoded picture is noise; everything else (video, schedule, cache, zarr, memory) is real.\n")
    model = lv.load_model("cogvideox-nano", random_weights=0)
    with ProgressBar() as bar, lv.VideoSession(model, device="cpu", callbacks=[bar]) as session:
        encoded = session.encode(CLIP, store_path, overwrite=True)
        decoded = session.decode(store_path, back, overwrite=True)
    store = lv.open_store(store_path)
    plan = lv.make_plan(model, height=store.height, width=store.width)
    pixels = store.num_frames * store.height * store.width * 3
    print(
        f"\nsource   {CLIP.name}: {store.num_frames} frames of {store.width}x{store.height}, {format_bytes(pixels)} raw"
    )
    print(
        f"latents  {store_path}: {tuple(store.latents.shape)} {store.latents.dtype}, {format_bytes(store.stored_bytes)}"
    )
    print(f"back     {back}: {decoded.frames} frames, {format_bytes(back.stat().st_size)}")
    for report, part in ((encoded, plan.encode), (decoded, plan.decode)):
        print(
            f"{report.direction}   {report.frames_per_second:.1f} frames/s; peak tensor memory "
            f"{format_bytes(report.peak_device_bytes)} (planned {format_bytes(part.projected_bytes)}), "
            f"of which contexts {format_bytes(report.cache_bytes)}"
        )
    print(f"process  peak resident memory {format_bytes(decoded.peak_rss_bytes)}")
    print(f"\nOpen the latents: python -c \"import xarray; print(xarray.open_zarr('{store_path}'))\"")
    return 0 if encoded.frames == decoded.frames == store.num_frames else 1


if __name__ == "__main__":
    sys.exit(main())

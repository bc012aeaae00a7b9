"""``python -m longvid.demo``: encode the embedded clip to zarr, decode it again, and say what happened."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longvid.reporting.progress import ProgressBar
from longvid.units import format_bytes

if TYPE_CHECKING:
    from longvid.frames import Frames

CLIP = Path(__file__).with_name("clip.mp4")


def main() -> int:
    """Run the demo in a folder."""
    parser = argparse.ArgumentParser(prog="python -m longvid.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args()

    import numpy as np

    import longvid as lv
    from longvid.media.picture import side_by_side, write_png
    from longvid.media.video_file import VideoFile

    args.out.mkdir(parents=True, exist_ok=True)
    store_path, back, picture = args.out / "clip.zarr", args.out / "back.mp4", args.out / "side-by-side.png"
    print("longvid demo: the built-in model tiny, for previews; docs/models.md tells how to use real weights.\n")
    pieces: list[Frames] = []
    with ProgressBar() as bar, lv.VideoSession("tiny", device="cpu", callbacks=[bar]) as session:
        encoded = session.encode(CLIP, store_path, overwrite=True)
        decoded = session.decode(store_path, back, overwrite=True)
        session.decode(store_path, pieces.append)  # what the model gives, before it is compressed as mp4
    with VideoFile(CLIP) as video:
        source = np.concatenate([block.frames_THWC for block in video.blocks()])
    result = np.concatenate(pieces)
    psnr = 10 * math.log10(255**2 / np.square(source.astype(np.float32) - result).mean())
    shown = [0, len(source) // 2, len(source) - 1]
    write_png(picture, side_by_side([[source[t], result[t]] for t in shown]))

    store = lv.open_store(store_path)
    raw, latents = source.nbytes, store.latents
    print(f"\nsource   {CLIP}")
    print(f"         {store.num_frames} frames of {store.width}x{store.height}, {format_bytes(raw)} as pixels")
    print(f"latents  {store_path}")
    print(f"         {tuple(latents.shape)} {latents.dtype}, {format_bytes(store.stored_bytes)}")
    print(f"back     {back}")
    print(f"         {decoded.frames} frames, {psnr:.2f} dB PSNR before mp4 compression")
    print(f"look     {picture}")
    print("         left the source, right what came back; first, middle and last frame")
    for report in (encoded, decoded):
        print(
            f"{report.direction}   {report.frames_per_second:.0f} frames/s; peak tensor memory "
            f"{format_bytes(report.peak_device_bytes)} (planned {format_bytes(report.projected_bytes)}), "
            f"of which contexts {format_bytes(report.cache_bytes)}"
        )
    print(f"process  peak resident memory {format_bytes(decoded.peak_rss_bytes)}")
    print(f"\nOpen the latents: python -c \"import xarray; print(xarray.open_zarr('{store_path}'))\"")
    return 0 if encoded.frames == decoded.frames == len(result) == len(source) else 1


if __name__ == "__main__":
    sys.exit(main())

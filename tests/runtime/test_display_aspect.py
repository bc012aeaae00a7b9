"""A video whose pixels are not square keeps its shape through a store of latents, a file and a store of frames."""

from fractions import Fraction

from support.ffmpeg import ffmpeg, generated

import longvid as lv
from longvid.media.sources import open_source


def test_sample_aspect_ratio_comes_back(tmp_path):
    ffmpeg(*generated(0.4), "-vf", "setsar=64/45", "-c:v", "libx264", tmp_path / "wide.mp4")
    with lv.VideoSession(lv.load_model("tiny"), device="cpu") as session:
        session.encode(tmp_path / "wide.mp4", tmp_path / "latents.zarr")
        session.decode(tmp_path / "latents.zarr", tmp_path / "out.mp4")
        session.decode(tmp_path / "latents.zarr", tmp_path / "frames.zarr")
    assert lv.open_store(tmp_path / "latents.zarr").source["sample_aspect_ratio"] == "64/45"
    for name in ("out.mp4", "frames.zarr"):
        with open_source(tmp_path / name) as source:
            assert source.info.sample_aspect_ratio == Fraction(64, 45)

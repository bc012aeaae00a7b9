"""Numbered pictures as output; ffmpeg reads what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.ffmpeg import ffmpeg
from support.media import barcodes, indices, smooth_colors

from longvid.errors import StoreError
from longvid.media.output.picture_writer import PictureWriter, is_pictures, picture_path


def write(path, frames, **options):
    options = {"num_frames": len(frames), **options}
    with PictureWriter(path, size=frames.shape[1:3], **options) as out:
        out.write(frames[:2], np.arange(len(frames[:2])))
        out.write(frames[2:], np.arange(len(frames[2:])))


def picture(path, height, width):
    raw = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-sws_flags", "accurate_rnd+full_chroma_int", "-")
    return np.frombuffer(raw, np.uint8).reshape(height, width, 3)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".webp", ".jpg", ".jpeg", ".PNG"])
@pytest.mark.parametrize("size", [(64, 96), (63, 97)])
def test_every_picture_is_a_frame(tmp_path, suffix, size):
    frames = np.stack([np.roll(smooth_colors(*size), shift * 7, axis=1) for shift in range(4)])
    write(tmp_path / f"frame-%05d{suffix}", frames, first=3)
    assert names(tmp_path) == [f"frame-{number:05d}{suffix}" for number in range(3, 7)]
    for number, frame in enumerate(frames, 3):
        found = picture(tmp_path / f"frame-{number:05d}{suffix}", *size).astype(int)
        difference = np.abs(found - frame)
        assert difference.mean() < 1.5 if suffix in (".jpg", ".jpeg") else not difference.any()


def test_numbers_beyond_the_digits_go_on(tmp_path):
    write(tmp_path / "%d.png", barcodes(3, 64, 96), first=9)
    assert names(tmp_path) == ["10.png", "11.png", "9.png"]
    write(tmp_path / "a%01d.png", barcodes(2, 64, 96), first=9)
    assert {"a9.png", "a10.png"} < set(names(tmp_path))


def test_a_path_that_ends_in_a_slash_is_a_folder_of_pictures(tmp_path):
    assert picture_path("out/") == "out/frame-%06d.png"
    assert picture_path("out.zarr/") == "out.zarr/"
    assert picture_path(Path("out/")) == Path("out")
    assert [is_pictures(Path(name)) for name in ("a.PNG", "a.mp4", "a")] == [True, False, False]
    write(Path(picture_path(f"{tmp_path}/new/")), barcodes(2, 64, 96))
    assert names(tmp_path / "new") == ["frame-000000.png", "frame-000001.png"]


def test_one_frame_needs_no_number(tmp_path):
    write(tmp_path / "one.png", barcodes(1, 64, 96))
    assert indices(picture(tmp_path / "one.png", 64, 96)[None]) == [0]
    with pytest.raises(StoreError, match=r"give two-%05d.png, or --frames 1"):
        write(tmp_path / "two.png", barcodes(2, 64, 96))


def test_nothing_that_is_there_is_replaced_unless_asked(tmp_path):
    (tmp_path / "f-00001.png").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"f-00001.png exists") as caught:
        write(tmp_path / "f-%05d.png", barcodes(3, 64, 96))
    assert caught.value.kind == "exists"
    assert (tmp_path / "f-00001.png").read_bytes() == b"mine"
    write(tmp_path / "f-%05d.png", barcodes(3, 64, 96), overwrite=True)
    assert indices(picture(tmp_path / "f-00001.png", 64, 96)[None]) == [1]
    assert names(tmp_path) == [*(f"f-0000{number}.png" for number in range(3)), "notes.txt"]


def test_pictures_of_an_earlier_run_do_not_mix_with_new_ones(tmp_path):
    write(tmp_path / "f-%05d.png", barcodes(4, 64, 96))
    with pytest.raises(StoreError, match=r"f-0000[23].png would stay"):
        write(tmp_path / "f-%05d.png", barcodes(2, 64, 96), overwrite=True)
    write(tmp_path / "f-%05d.png", barcodes(4, 64, 96)[2:], first=4)  # the parts of a video side by side
    assert len(names(tmp_path)) == 6


def test_a_link_is_not_replaced(tmp_path):
    (tmp_path / "f-00000.png").symlink_to("nowhere")
    with pytest.raises(StoreError, match="is not a file") as caught:
        write(tmp_path / "f-%05d.png", barcodes(1, 64, 96), overwrite=True)
    assert caught.value.kind == "foreign"


def test_an_exception_leaves_what_was_there(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        with (
            pytest.raises(KeyError),
            PictureWriter(folder / "%05d.png", size=(64, 96), num_frames=2) as out,
        ):
            out.write(barcodes(1, 64, 96), np.arange(1))
            raise KeyError
    assert names(tmp_path) == []


def test_a_picture_that_appears_during_the_run_stays(tmp_path):
    with (
        pytest.raises(StoreError, match="exists"),
        PictureWriter(tmp_path / "%05d.png", size=(64, 96), num_frames=1) as out,
    ):
        out.write(barcodes(1, 64, 96), np.arange(1))
        (tmp_path / "00000.png").write_bytes(b"mine")
    assert (tmp_path / "00000.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["00000.png"]


@pytest.mark.parametrize(
    ("name", "size", "kind", "words"),
    [
        ("a-%d-%d.png", (4, 4), "format", "only one"),
        ("100%-%d.png", (4, 4), "format", "only one"),
        ("%d.webp", (4, 20000), "format", "16383x16383.*choose .png"),
        ("no/where/%d.png", (4, 4), "missing", "no/where|/no"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_run(tmp_path, name, size, kind, words):
    with pytest.raises(StoreError, match=words) as caught:
        PictureWriter(tmp_path / name, size=size, num_frames=2)
    assert caught.value.kind == kind
    assert names(tmp_path) == []

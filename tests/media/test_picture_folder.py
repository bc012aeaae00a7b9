"""Pictures in files of their own as a source; ffmpeg is the referee of what they show."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
import zarr
from support.ffmpeg import ffmpeg, generated, pictures
from support.media import barcodes, collect, indices, smooth_colors

from longvid import SourceError, StoreError, VideoSession, open_store
from longvid.cli.commands import main
from longvid.media.limits import Limits
from longvid.media.picture import write_png
from longvid.media.pictures.naming import list_pictures, natural_key
from longvid.media.sources import open_source
from longvid.runtime.repair import repair

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no time stamps")

SIZE = (64, 96)
KINDS = {
    "rgb.png": ("rgb24", []),
    "gray.png": ("gray", []),
    "gray16.png": ("gray16be", []),
    "rgb48.png": ("rgb48be", []),
    "palette.png": ("pal8", ["-filter_complex", "[0]split[a][b];[a]palettegen[p];[b][p]paletteuse"]),
    "bits.png": ("monob", []),
    "a.jpg": ("yuvj420p", ["-q:v", "2"]),
    "b.JPEG": ("yuvj444p", ["-q:v", "2"]),
    "gray.jpg": ("gray", ["-q:v", "2"]),
    "a.tif": ("rgb24", ["-compression_algo", "lzw"]),
    "b.tiff": ("rgb48le", ["-compression_algo", "deflate"]),
    "gray16.tif": ("gray16le", []),
    "a.webp": ("yuv420p", ["-quality", "90"]),
    "b.webp": ("bgra", ["-lossless", "1"]),
}


def folder_of(path, count=6, size=SIZE, name="f{}.png", first=0):
    path.mkdir(exist_ok=True)
    for number, frame in enumerate(barcodes(count, *size), first):
        write_png(path / name.format(number), frame)
    return path


def save(path, image, **options):
    Image.fromarray(image).save(path, **options)
    return path


def encode(source, store, *callbacks, **options):
    with VideoSession(device="cpu", callbacks=callbacks) as session:
        return session.encode(source, store, durability="rename", **options)


def same(a, b):
    first, second = ({n: x[:] for n, x in zarr.open_group(path, mode="r").arrays()} for path in (a, b))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ------------------------------------------------------------------------------------------------- names


def test_names_are_in_natural_order(tmp_path):
    names = ["a10.png", "a2.png", "A1.png", "a02.png", "b.png", "2.png", "10.png", "c9x10.png", "c9x9.png"]
    ordered = ["2.png", "10.png", "A1.png", "a02.png", "a2.png", "a10.png", "b.png", "c9x9.png", "c9x10.png"]
    assert sorted(names, key=natural_key) == ordered
    frames, times = collect(open_source(folder_of(tmp_path / "d", 12)))
    assert indices(frames) == times.tolist() == list(range(12))


def test_other_files_do_not_count(tmp_path):
    folder = folder_of(tmp_path / "d", 3)
    for name in (".DS_Store", "Thumbs.db", "._f0.png", ".hidden.png", "f0.txt", "f1.png.part", "notes"):
        (folder / name).write_bytes(b"other")
    (folder / "sub.png").mkdir()
    (folder / "@eaDir").mkdir()
    frames, _ = collect(open_source(folder))
    assert indices(frames) == [0, 1, 2]


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"is a folder without pictures.*\.png.*name a folder"):
        open_source(tmp_path)


def test_several_kinds_are_all_read_and_said(tmp_path):
    folder = folder_of(tmp_path / "d", 3)
    save(folder / "f3.tif", barcodes(4, *SIZE)[3])
    with pytest.warns(UserWarning, match=r"3 \.png, 1 \.tif.*%05d"):
        video = open_source(folder, fps=24)
    assert indices(collect(video)[0]) == [0, 1, 2, 3]
    assert indices(collect(open_source(folder / "f%d.png"))[0]) == [0, 1, 2]  # what the warning says


@pytest.mark.parametrize(("pattern", "name", "first"), [("%05d.png", "{:05d}.png", 7), ("a-%d.png", "a-{}.png", 8)])
def test_a_pattern_is_read_by_numbers(tmp_path, pattern, name, first):
    folder = folder_of(tmp_path / "d", 4, name=name, first=first)
    for other in ("000009.png", "b-9.png", "a-09.png", "a-9.png.png", "9.jpg"):
        (folder / other).write_bytes(b"other")
    frames, _ = collect(open_source(folder / pattern))
    assert indices(frames) == [0, 1, 2, 3]


def test_numbers_beyond_the_digits_go_on(tmp_path):
    assert indices(collect(open_source(folder_of(tmp_path / "d", 3, name="{:02d}.png", first=98) / "%02d.png"))[0]) == [
        0,
        1,
        2,
    ]


def test_a_gap_is_an_error_and_the_folder_has_none(tmp_path):
    folder = folder_of(tmp_path / "d", 6, name="{:03d}.png")
    (folder / "003.png").unlink()
    with pytest.raises(
        SourceError, match=r"d/003.png is missing: of the numbers 0 to 5 .* 1 of 6 are missing"
    ) as caught:
        open_source(folder / "%03d.png")
    assert caught.value.kind == "missing"
    assert f"name the folder, {folder}," in str(caught.value)
    assert indices(collect(open_source(folder))[0]) == [0, 1, 2, 4, 5]


def test_a_pattern_without_a_picture_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"no picture .*%05d.png"):
        open_source(folder_of(tmp_path / "d") / "%05d.png")
    with pytest.raises(SourceError, match="there is no file"):
        open_source(tmp_path / "none" / "%05d.png")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    for name in ("a%d.png", "a1.png", "a2.png"):
        write_png(tmp_path / name, barcodes(1, *SIZE)[0])
    assert open_source(tmp_path / "a%d.png").info.num_frames == 1


def test_links_in_a_folder_are_followed(tmp_path):
    cache = folder_of(tmp_path / "cache", 3, name="{}")
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").symlink_to(cache / str(number))
    assert indices(collect(open_source(folder))[0]) == [0, 1, 2]
    (cache / "1").unlink()
    with pytest.raises(SourceError, match=r"frame 1 of .*1\.png cannot be read.*symbolic link"):
        collect(open_source(folder))


# ------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_those_of_the_referee(tmp_path, name):
    pix_fmt, options = KINDS[name]
    source = save(tmp_path / "source.bmp", smooth_colors(*SIZE))
    ffmpeg("-i", source, *options, "-pix_fmt", pix_fmt, "-frames:v", 1, tmp_path / name)
    frames, _ = collect(video := open_source(tmp_path / name))
    assert video.info.kind == "pictures"
    expected = pictures(tmp_path / name, *SIZE, "-sws_flags", "accurate_rnd+full_chroma_int+bicubic")
    assert np.abs(frames.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("name", ["a.png", "b.png", "c.tif", "d.webp"])
def test_transparent_pixels_are_composited(tmp_path, name):
    image = np.dstack([smooth_colors(*SIZE), np.broadcast_to(np.arange(96, dtype=np.uint8) * 2, SIZE)])
    options = {"lossless": True} if name == "d.webp" else {}
    save(tmp_path / name, image[..., [0, 3]] if name == "b.png" else image, **options)
    video = open_source(tmp_path / name, background="#ff0080")
    with pytest.warns(UserWarning, match=r"transparent pixels, which are composited on #ff0080"):
        frames, _ = collect(video)
    alpha = image[..., 3:] / 255.0
    colors = image[..., :1].repeat(3, -1) if name == "b.png" else image[..., :3]
    assert np.abs(frames[0] - (colors * alpha + np.array([255, 0, 128]) * (1 - alpha))).mean() < 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_pictures_lie_as_exif_says(tmp_path, suffix, number):
    exif = Image.Exif()
    exif[0x112] = number
    options = {"tif": {"tiffinfo": exif}, "webp": {"exif": exif, "lossless": True}}.get(suffix, {"exif": exif})
    path = save(tmp_path / f"a.{suffix}", smooth_colors(*SIZE), **options)
    height, width = SIZE if number < 5 else SIZE[::-1]
    frames, _ = collect(open_source(path))
    assert frames.shape[1:3] == (height, width)
    flags = ("-sws_flags", "accurate_rnd+full_chroma_int+bicubic")
    assert np.abs(frames.astype(int) - pictures(path, height, width, *flags)).mean() < 1


@pytest.mark.filterwarnings("ignore:.*B-frames")
def test_a_video_of_pictures_with_exif_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = save(tmp_path / "a.jpg", smooth_colors(*SIZE), exif=exif)
    ffmpeg("-i", path, "-c", "copy", tmp_path / "a.mov")
    assert collect(open_source(tmp_path / "a.mov"))[0].shape[1:3] == SIZE[::-1]


def test_the_picture_of_a_phone_has_a_second_one_behind_it(tmp_path):
    one, two = (save(tmp_path / f"{i}.jpg", smooth_colors(64 >> i, 96 >> i)).read_bytes() for i in range(2))
    marked = one[:2] + b"\xff\xe2" + struct.pack(">H", 12) + b"MPF\0" + b"\0" * 6 + one[2:]
    (tmp_path / "phone.jpg").write_bytes(marked + two)
    frames, _ = collect(open_source(tmp_path / "phone.jpg"))
    assert np.array_equal(frames, collect(open_source(tmp_path / "0.jpg"))[0])


def test_sizes_that_differ(tmp_path):
    folder = folder_of(tmp_path / "d", 2)
    folder_of(folder, 1, (48, 96), "f2.png")
    with pytest.raises(SourceError, match=r"f2\.png is shown with 96x48 pixels.*96x64.*--size") as caught:
        collect(open_source(folder))
    assert caught.value.kind == "geometry-changed"
    with pytest.warns(UserWarning, match="are cropped in the middle") as said:
        frames, _ = collect(open_source(folder, size=SIZE))
    assert len([one for one in said if "cropped" in str(one.message)]) == 1
    assert frames.shape == (3, *SIZE, 3)
    padded, _ = collect(open_source(folder, size=SIZE, fit="pad"))
    assert not padded[2, :8].any()
    assert padded[2, 8:-8].mean() > 10


# ------------------------------------------------------------------------------------------------- time


def test_the_rate_is_the_one_that_is_given(tmp_path):
    folder = folder_of(tmp_path / "d")
    for options in ({"fps": 30}, {"frame_rate": 30}, {"fps": 30, "frame_rate": Fraction(30)}):
        video = open_source(folder, **options)
        assert (video.info.frame_rate, video.info.time_base, video.info.timing_assumed) == (30, Fraction(1, 30), False)
        frames, times = collect(video)
        assert indices(frames) == times.tolist() == list(range(6))
    with pytest.warns(UserWarning, match=r"24 frames per second are assumed, --fps"):
        video = open_source(folder)
    assert video.info.timing_assumed
    assert video.info.frame_rate == 24
    with pytest.raises(SourceError, match=r"--fps 30 and --assume-fps 25 .* give one of them"):
        open_source(folder, fps=30, frame_rate=25)
    with pytest.raises(SourceError, match="above 0"):
        open_source(folder, frame_rate=0)
    first = open_source(folder, fps=30).fingerprint()
    assert first != open_source(folder, fps=25).fingerprint()


def test_windows(tmp_path):
    folder = folder_of(tmp_path / "d")
    video = open_source(folder, start=2, frames=3)
    assert video.count_frames() == 3
    frames, times = collect(video)
    assert indices(frames) == times.tolist() == [2, 3, 4]
    with pytest.raises(SourceError, match=r"start=6 is beyond the end .* 6 frames"):
        open_source(folder, start=6)
    with pytest.raises(SourceError, match="max_frames is 3"):
        open_source(folder, limits=Limits(max_frames=3))


# ------------------------------------------------------------------------------------------------- damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def broken(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x41
    path.write_bytes(content)


DAMAGE = {
    "cut": (cut, "is cut short"),
    "broken": (broken, "is damaged|cannot be decoded"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_bytes(b"hello"), "is no picture"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_follows_on_error(tmp_path, damage):
    change, why = DAMAGE[damage]
    folder = folder_of(tmp_path / "d")
    change(folder / "f3.png")
    with pytest.raises(SourceError, match=rf"frame 3 of .*f3\.png ({why}).*--on-error keep") as caught:
        collect(open_source(folder))
    assert caught.value.kind in ("damaged", "truncated")
    with pytest.warns(UserWarning, match=r"f3\.png .* the video ends there, after 3 frames"):
        assert indices(collect(video := open_source(folder, on_error="keep"))[0]) == [0, 1, 2]
    assert video.damage == 3
    video = open_source(folder, on_error="conceal")
    blocks = list(video.blocks())
    assert indices(np.concatenate([block.frames_THWC for block in blocks])) == [0, 1, 2, 2, 4, 5]
    assert [bool(block.valid_T[0]) for block in blocks] == [True, True, True, False, True, True]


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
def test_cut_pictures_of_every_kind_are_noticed(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    whole = save(tmp_path / f"whole.{suffix}", image).read_bytes()
    path = tmp_path / f"a.{suffix}"
    for length in [*range(20, len(whole) - 2, max(1, len(whole) // 40)), len(whole) - 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match="a\\." + suffix) as caught:
            collect(open_source(path))
        assert caught.value.kind in ("damaged", "truncated", "not-video")


def test_jpeg_with_damaged_samples_is_no_guess(tmp_path):
    path = save(tmp_path / "a.jpg", smooth_colors(*SIZE), quality=95)
    content = bytearray(path.read_bytes())
    content[-400:-200] = b"\x12\x34" * 100
    path.write_bytes(content)
    with pytest.raises(SourceError, match="cannot be decoded"):
        collect(open_source(path))


def test_damage_at_the_beginning(tmp_path):
    folder = folder_of(tmp_path / "d")
    cut(folder / "f0.png")
    with pytest.raises(SourceError, match=r"frame 0 .*cut short"):
        open_source(folder, on_error="keep")
    frames, _ = collect(open_source(folder, on_error="conceal"))
    assert indices(frames) == [1, 1, 2, 3, 4, 5]
    assert indices(collect(open_source(folder, start=1))[0]) == [1, 2, 3, 4, 5]
    for number in range(1, 6):
        cut(folder / f"f{number}.png")
    with pytest.raises(SourceError, match="no picture without damage"):
        open_source(folder, on_error="conceal")


def test_large_pictures_are_refused(tmp_path):
    path = save(tmp_path / "a.png", smooth_colors(*SIZE))
    with pytest.raises(SourceError, match="max_pixels") as caught:
        open_source(path, limits=Limits(max_pixels=1000))
    assert caught.value.kind == "limit"
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    with pytest.raises(SourceError, match="max_pixels") as caught:
        open_source(path)
    assert caught.value.kind == "limit"
    save(path, smooth_colors(*SIZE))
    with pytest.raises(SourceError, match="max_bytes"):
        open_source(path, limits=Limits(max_bytes=100))


# ---------------------------------------------------------------------------------------- single files, animations


def test_a_single_picture_is_a_video_of_one_frame(tmp_path):
    path = save(tmp_path / "a.png", barcodes(6, *SIZE)[5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, times = collect(video := open_source(path))
    assert video.info.num_frames == 1
    assert indices(frames) == [5]
    assert times.tolist() == [0]


def test_apng_is_an_animation(tmp_path):
    path = tmp_path / "a.png"
    images = [Image.fromarray(frame) for frame in barcodes(5, *SIZE)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 50, 200, 100, 300])
    frames, times = collect(video := open_source(path))
    assert indices(frames) == [0, 1, 2, 3, 4]
    assert [float(time * video.info.time_base) for time in times] == pytest.approx([0, 0.1, 0.15, 0.35, 0.45])
    folder = folder_of(tmp_path / "d", 2)
    path.rename(folder / "f2.png")
    with pytest.raises(SourceError, match=r"f2\.png is animated; name that file alone"):
        collect(open_source(folder))


def test_the_pages_of_a_tiff_file_are_not_lost_silently(tmp_path):
    images = [Image.fromarray(frame) for frame in barcodes(3, *SIZE)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    with pytest.raises(SourceError, match="has 3 pages; write each page to a file of its own"):
        open_source(tmp_path / "a.tif")


# ------------------------------------------------------------------------------------------------- changes, stores


def test_the_fingerprint_is_that_of_contents_in_their_order(tmp_path):
    first = open_source(folder_of(tmp_path / "a")).fingerprint()
    assert first == open_source(folder_of(tmp_path / "b", name="other-{:03d}.png")).fingerprint()
    (tmp_path / "a" / "f3.png").rename(tmp_path / "a" / "f9.png")
    other = open_source(tmp_path / "a").fingerprint()
    assert {name for name in other if other[name] != first[name]} == {"content"}


@pytest.mark.parametrize("change", ["written", "removed", "removed behind", "added before"])
def test_changes_are_noticed(tmp_path, change):
    folder = folder_of(tmp_path / "d")
    with open_source(folder, on_error="conceal") as video, pytest.raises(SourceError) as caught:
        video.fingerprint()
        for number, _ in enumerate(video.blocks()):
            if number != 2:
                continue
            if change == "written":
                cut(folder / "f4.png")
            elif change == "added before":
                write_png(folder / "a.png", barcodes(1, *SIZE)[0])
            else:
                (folder / ("f4.png" if change == "removed" else "f0.png")).unlink()
    assert caught.value.kind == "changed"


def test_a_folder_that_grows_is_noticed_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 6000)
    folder = folder_of(tmp_path / "d", 200)
    done = []

    def add(event):
        if not done:
            done.append(folder_of(folder, 220))

    with pytest.raises(SourceError, match=r"has grown from 200 to 220 pictures.*same command again") as caught:
        encode(folder, tmp_path / "a.zarr", add)
    assert caught.value.kind == "changed"
    assert not open_store(tmp_path / "a.zarr").complete
    assert encode(folder, tmp_path / "a.zarr").frames == 220
    encode(folder, tmp_path / "whole.zarr")
    same(tmp_path / "a.zarr", tmp_path / "whole.zarr")
    folder_of(folder, 230)
    report = encode(folder, tmp_path / "a.zarr")
    assert report.complete
    assert report.frames == 230
    assert encode(folder, tmp_path / "a.zarr").resumed_from_frame == 230
    with pytest.raises(SourceError, match=r"leave --follow out"):
        encode(folder, tmp_path / "b.zarr", follow=True)


@pytest.mark.parametrize("on_error", ["stop", "conceal"])
@pytest.mark.parametrize("stop", range(1, 5))
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, stop, on_error):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 6000)
    folder = folder_of(tmp_path / "d", 90, name="{}.png")
    if on_error == "conceal":
        for number in (7, 8, 24, 25, 57, 64, 65, 66, 89):
            cut(folder / f"{number}.png")
    options = {"on_error": on_error, "fps": 25}
    encode(folder, tmp_path / "whole.zarr", **options)
    session = VideoSession(device="cpu", callbacks=[lambda event: event.index == stop and session.stop()])
    with session:
        assert not session.encode(folder, tmp_path / "a.zarr", durability="rename", **options).complete
    read = set()
    monkeypatch.setattr("longvid.media.pictures.picture_folder.decode", _noting(read))
    report = encode(folder, tmp_path / "a.zarr", **options)
    assert report.complete
    same(tmp_path / "a.zarr", tmp_path / "whole.zarr")
    assert read - {0} == set(range(min(read - {0}), 90))
    assert min(read - {0}) == {1: 1, 2: 1, 3: 17, 4: 33}[stop]  # the chunks that its contexts come from


def _noting(read):
    from longvid.media.pictures.picture import decode

    def noted(path, data, limits):
        read.add(int(os.path.basename(path).partition(".")[0]))
        return decode(path, data, limits)

    return noted


def test_reading_from_a_number_decodes_nothing_before_it(tmp_path, monkeypatch):
    folder, read = folder_of(tmp_path / "d", 9, name="{}.png"), set()
    monkeypatch.setattr("longvid.media.pictures.picture_folder.decode", _noting(read))
    video = open_source(folder, start=2)
    assert indices(np.concatenate([block.frames_THWC for block in video.blocks(first=4)])) == [6, 7, 8]
    assert read == {2, 6, 7, 8}


def test_the_store_knows_its_pictures(tmp_path, capsys):
    folder = folder_of(tmp_path / "d", 12)
    encode(folder, tmp_path / "a.zarr", fps=30)
    store = open_store(tmp_path / "a.zarr")
    assert store.source["kind"] == "pictures"
    assert store.source["details"]["pictures"] == {".png": 12}
    assert store.frame_rate == 30
    assert store.metadata.origin == str(folder)
    assert main(["info", str(tmp_path / "a.zarr")]) == 0
    assert f"source    {folder}, 12 .png\n" in capsys.readouterr().out
    whole = {path: path.read_bytes() for path in (tmp_path / "a.zarr" / "latents").rglob("c*") if path.is_file()}
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    with VideoSession(device="cpu") as session:
        repair(session, tmp_path / "a.zarr")
    assert {path: path.read_bytes() for path in whole} == whole
    with pytest.raises(StoreError):
        encode(folder, tmp_path / "a.zarr", fps=25)


def test_pictures_from_a_pattern_come_from_ffmpeg(tmp_path):
    ffmpeg(*generated(1, rate=10), tmp_path / "f-%04d.jpg")
    assert len(list_pictures(str(tmp_path / "f-%04d.jpg"))) == 10
    frames, _ = collect(open_source(tmp_path / "f-%04d.jpg"))
    expected = pictures(tmp_path / "f-%04d.jpg", *SIZE, "-sws_flags", "accurate_rnd+full_chroma_int+bicubic")
    assert np.abs(frames.astype(int) - expected).mean() < 1

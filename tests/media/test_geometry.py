"""The shape of what comes out beside the ffmpeg program: turned, mirrored, cropped, with pixels that are not square."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from support.ffmpeg import ffmpeg, generated, pictures
from support.footage import with_aperture
from support.media import collect

from longvid.errors import SourceError
from longvid.media.output.video_writer import VideoWriter
from longvid.media.video_file import VideoFile

X264 = ["-c:v", "libx264", "-qp", "8", "-pix_fmt", "yuv444p"]
EXACT = "flags=bicubic+accurate_rnd+full_chroma_int"
DISPLAYS = {
    "0": [], "90": ["-display_rotation", "90"],
    "180": ["-display_rotation", "180"], "270": ["-display_rotation", "270"],
    "hflip": ["-display_hflip"], "vflip": ["-display_vflip"], "90h": ["-display_rotation", "90", "-display_hflip"],
    "270h": ["-display_rotation", "270", "-display_hflip"],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("geometry") / "plain.mp4"
    ffmpeg(*generated(0.2), *X264, path)
    return path


def far(got, want):
    assert got.shape == want.shape
    return np.abs(got.astype(int) - want).mean()


@pytest.mark.parametrize("name", DISPLAYS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_display_matrix_of_a_container(plain, tmp_path, name, suffix):
    path = tmp_path / f"turned{suffix}"
    ffmpeg(*DISPLAYS[name], "-i", plain, "-c", "copy", path)
    video = VideoFile(path)
    want = pictures(path, video.info.height, video.info.width, "-vf", f"scale={EXACT}")
    assert (video.info.height, video.info.width) == ((96, 64) if "90" in name or "270" in name else (64, 96))
    assert video.info.details["mirrored"] == ("h" in name or "v" in name)
    assert far(collect(video)[0], want) < 1


@pytest.mark.parametrize("degrees", [89.5, 60, 30])
def test_a_turn_between_quarter_turns_is_rounded_and_said(plain, tmp_path, degrees):
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VideoFile(path) as video:
            rotation = video.info.details["rotation"]
    assert rotation == (90 if degrees > 45 else 0)
    assert sum("between quarter turns" in str(one.message) for one in caught) == (degrees != 89.5)


@pytest.mark.parametrize(
    "how", ["rotate=90", "flip=horizontal", "rotate=90:flip=horizontal", "rotate=180:flip=vertical"]
)
def test_an_orientation_in_the_stream_holds_until_the_next(tmp_path, how):
    path = tmp_path / "sei.ts"
    bsf = f"h264_metadata=display_orientation=insert:{how}"
    ffmpeg(*generated(0.8), *X264, "-g", "10", "-bsf:v", bsf, path)
    video = VideoFile(path)
    height, width = video.info.height, video.info.width
    frames, _ = collect(video)
    assert len(frames) == 20
    first = pictures(path, height, width, "-frames:v", "1", "-vf", f"scale={EXACT}")
    assert far(frames[:1], first) < 1
    # ffmpeg turns only the frame that the message comes with; all frames are upright in the source
    moved = frames[1:].astype(int) - frames[:-1]
    assert np.abs(moved).mean() < 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("aperture", "size"),
    [((80, 48), (48, 80)), ((90, 60, -3, 2), (60, 90)), ((97, 64), (64, 96)), ((80, 48, 30), (64, 96))],
)
def test_clean_aperture_is_cropped(plain, tmp_path, aperture, size, suffix):
    path = tmp_path / "clap.mp4"
    path.write_bytes(with_aperture(plain.read_bytes(), *aperture))
    if suffix == ".mkv":
        path, made = tmp_path / "clap.mkv", path
        ffmpeg("-i", made, "-c", "copy", path)
    frames, _ = collect(VideoFile(path))
    assert far(frames, pictures(path, *size, "-vf", f"scale={EXACT}")) < 1


def test_clean_aperture_is_cropped_before_it_is_scaled_and_turned(plain, tmp_path):
    made, path = tmp_path / "clap.mp4", tmp_path / "turned.mp4"
    made.write_bytes(with_aperture(plain.read_bytes()))
    ffmpeg("-display_rotation", "90", "-i", made, "-c", "copy", path)
    path.write_bytes(with_aperture(path.read_bytes())) if b"clap" not in path.read_bytes() else None
    frames, _ = collect(VideoFile(path, size=(40, 24)))
    assert far(frames, pictures(path, 40, 24, "-vf", f"scale=24:40:{EXACT.replace('bicubic', 'area')}")) < 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "wide.mp4"
    ffmpeg(*generated(0.2, size="96x72"), "-vf", "setsar=64/45", *X264, path)
    return path


def test_sample_aspect_ratio_is_kept_and_turned(wide, tmp_path):
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", wide, "-c", "copy", turned)
    for path, ratio in ((wide, Fraction(64, 45)), (turned, Fraction(45, 64))):
        with VideoFile(path) as video:
            assert video.info.sample_aspect_ratio == ratio


def test_square_pixels(wide):
    video = VideoFile(wide, pixels="square")
    assert (video.info.height, video.info.width, video.info.sample_aspect_ratio) == (72, 137, 1)
    assert far(collect(video)[0], pictures(wide, 72, 137, "-vf", f"scale=137:72:{EXACT}")) < 1.5


@pytest.mark.parametrize(
    ("fit", "size", "filters", "aspect"),
    [
        (None, (36, 68), "scale=68:36", 1),  # 137:72 within 2 %
        (None, (48, 48), "scale=91:48,crop=48:48:21:0", 1),
        ("stretch", (48, 48), "scale=48:48", Fraction(96 * 64, 72 * 45)),
        ("crop", (40, 96), "scale=96:51,crop=96:40:0:5", 1),
        ("pad", (48, 48), "scale=48:25,pad=48:48:0:11:red", 1),
    ],
)
def test_a_size_fits_the_display_shape(wide, fit, size, filters, aspect):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        video = VideoFile(wide, size=size, fit=fit, background="red")
    assert [str(w.message) for w in said if "cropped" in str(w.message)] == [str(w.message) for w in said]
    assert len(said) == (fit is None and size == (48, 48))
    assert video.info.sample_aspect_ratio == aspect
    assert video.info.details["fit"] == (fit or ("stretch" if size == (36, 68) else "crop"))
    assert video.fingerprint()["fit"] == video.info.details["fit"]
    frames, _ = collect(video)
    shrinks = size[0] <= 72 and size != (40, 96)
    flags = EXACT.replace("bicubic", "area") if shrinks else EXACT
    want = pictures(
        wide, *size, "-vf", filters.replace(",", f":{flags},", 1) if "," in filters else f"{filters}:{flags}"
    )
    assert far(frames, want) < 1.5


def test_the_writer_keeps_the_display_aspect(wide, tmp_path):
    video = VideoFile(wide)
    info = video.info
    frames, pts = collect(video)
    for suffix in (".mp4", ".mkv"):
        path = tmp_path / f"out{suffix}"
        with VideoWriter(
            path,
            size=(info.height, info.width),
            time_base=info.time_base,
            frame_rate=info.frame_rate,
            sample_aspect_ratio=info.sample_aspect_ratio,
        ) as writer:
            writer.write(frames, pts)
        with VideoFile(path) as again:
            assert abs(again.info.sample_aspect_ratio / info.sample_aspect_ratio - 1) < 0.005


def test_a_size_that_changes_is_fitted_or_refused(tmp_path):
    for name, size in (("a", "96x64"), ("b", "48x32")):
        ffmpeg(*generated(0.4, size=size), "-c:v", "libvpx", "-threads", 1, "-b:v", "2M", tmp_path / f"{name}.webm")
    (tmp_path / "list.txt").write_text("file a.webm\nfile b.webm\n")
    path = tmp_path / "resized.webm"
    ffmpeg("-f", "concat", "-i", "list.txt", "-c", "copy", path, folder=tmp_path)
    frames, _ = collect(VideoFile(path, size=(64, 96)))
    assert frames.shape == (20, 64, 96, 3)
    own, _ = collect(VideoFile(tmp_path / "b.webm", size=(64, 96)))
    assert np.array_equal(frames[10:], own)
    with pytest.raises(SourceError, match="--size"):
        collect(VideoFile(path))


@pytest.mark.filterwarnings("ignore:.*has no time stamps")
def test_each_frame_is_converted_by_its_own_matrix_and_range(tmp_path):
    parts = []
    for matrix, tag, span in (("bt601", "smpte170m", "tv"), ("bt709", "bt709", "tv"), ("bt709", "bt709", "pc")):
        part = tmp_path / f"{matrix}{span}.h264"
        scale = f"scale=out_color_matrix={matrix}:out_range={span}"
        ffmpeg(*generated(0.2, name="smptebars"), "-vf", scale, "-colorspace", tag, "-color_range", span, *X264, part)
        parts.append(part)
    path = tmp_path / "all.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, _ = collect(VideoFile(path))
    want = np.concatenate([pictures(part, 64, 96, "-vf", f"scale={EXACT}") for part in parts])
    assert np.abs(frames.astype(int) - want).reshape(15, -1).mean(1).max() < 1

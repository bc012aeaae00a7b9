from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from hypothesis import given
from hypothesis import strategies as st
from support.media import smooth_colors

from longvid.media.images.convert import Converter, Wanted

SOURCES = [
    *("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv440p", "yuv411p", "yuv410p", "yuva420p", "nv12", "nv21"),
    *("yuyv422", "uyvy422", "yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le", "yuv444p16le", "p010le"),
    *("gray", "gray10le", "ya8", "rgb24", "bgr0", "gbrp", "rgb48le", "rgb565le", "rgb8"),
]
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def frame_of(pixel_format, height, width, seed=0):
    colors = smooth_colors(height, width)
    noise = np.random.default_rng(seed).integers(-30, 30, colors.shape)
    image = np.clip(colors.astype(int) + noise, 0, 255).astype(np.uint8)
    frame = VideoFrame.from_ndarray(image, format="rgb24")
    return frame.reformat(format=pixel_format)


def converter_of(frame, size=None):
    context = av.CodecContext.create("rawvideo", "r")
    stream = SimpleNamespace(codec_context=context, sample_aspect_ratio=None, metadata={})
    return Converter(frame, stream, Wanted(size=size, fit="stretch"), "a.mkv")


@pytest.mark.parametrize("pixel_format", SOURCES)
@given(
    coded=st.tuples(st.integers(16, 70), st.integers(16, 90)),
    size=st.none() | st.tuples(st.integers(8, 80), st.integers(8, 99)),
    declared=st.sampled_from([ColorRange.MPEG, ColorRange.JPEG]),
)
def test_planes_hold_what_swscale_gives_as_packed_rgb(pixel_format, coded, size, declared):
    frame = frame_of(pixel_format, *coded)
    frame.color_range = declared
    converter = converter_of(frame, size)
    height, width = size or coded
    shrinks = size is not None and height <= coded[0] and width <= coded[1]
    expected = VideoReformatter().reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=converter.color.matrix,
        src_color_range=ColorRange.JPEG if converter.color.info.range == "full" else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=(Interpolation.AREA if shrinks and size != coded else Interpolation.BICUBIC) | EXACT,
    )
    got = converter.convert(frame, 0)
    assert got.shape == (height, width, 3)
    packed = expected.to_ndarray().astype(int)
    if converter.color.expand_gray:  # swscale takes every gray for full range
        packed = np.clip(np.round((packed - 16) * 255 / 219), 0, 255).astype(int)
    # swscale takes shortcuts in its packed form, where it resizes, that round otherwise
    most = 0 if size in (None, coded) and pixel_format != "yuv410p" else 2 if converter.color.expand_gray else 1
    np.testing.assert_allclose(got.astype(int), packed, rtol=0, atol=most)

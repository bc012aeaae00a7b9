"""A catalogue of bad and odd media files, made with PyAV alone, and what exactly comes out of each.

An outcome is written as the frames that come out, by the index in their bands: ``0-9`` for ten whole ones, ``9x6``
for six places that repeat frame 9 and are marked; then ``~`` if a warning says that the video ends there, or
``!damaged@10`` for the error and the frame that it names.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from longvid.errors import SourceError
from longvid.media.picture import write_png
from longvid.media.sources import open_source
from support.media import COUNT, barcodes, indices, join, write_audio, write_media

Make = Callable[[Path], Path]
ALL = f"0-{COUNT - 1}"
GOP = "keyint=8:min-keyint=8:scenecut=0:rc-lookahead=0:qp=20:threads=1:chromaloc=1"
H264 = {"preset": "ultrafast", "x264-params": GOP}
B_FRAMES = {"preset": "medium", "x264-params": f"{GOP}:bframes=3:b-adapt=0:keyint=12:min-keyint=12:b-pyramid=none"}
EIGHT_K = (4600, 8176)


@dataclass(frozen=True)
class Case:
    """A file, and its outcome under each policy; ``keep`` and ``conceal`` are like ``stop`` unless given."""

    make: Make
    stop: str
    keep: str = ""
    conceal: str = ""

    def expected(self, on_error: str) -> str:
        return getattr(self, on_error) or self.stop


def outcome(path: Path, on_error: str, **options: Any) -> str:
    """What comes out of a file, as it is written in the catalogue."""
    shown: list[int] = []
    valid: list[bool] = []
    end = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with open_source(path, on_error=on_error, **options) as video:
                for block in video.blocks():
                    shown += indices(block.frames_THWC)
                    valid += block.valid_T.tolist()
        except SourceError as exc:
            words = str(exc).split()
            number = next((words[i + 1] for i, word in enumerate(words) if word == "frame" and i + 2 < len(words)), "")
            end = f"!{exc.kind}" + (f"@{number}" if number.isdigit() else "")
    ended = [one for one in caught if "ends there" in str(one.message)]
    assert len(ended) <= 1, "one warning is enough"
    return " ".join([*_runs(shown, valid), *["~" for _ in ended], *([end] if end else [])])


def _runs(shown: list[int], valid: list[bool]) -> Iterator[str]:
    at = 0
    while at < len(shown):
        stop = at + 1
        step = 1 if valid[at] else 0
        while stop < len(shown) and valid[stop] == valid[at] and shown[stop] == shown[stop - 1] + step:
            stop += 1
        if valid[at]:
            yield f"{shown[at]}-{shown[stop - 1]}" if stop > at + 1 else f"{shown[at]}"
        else:
            yield f"{shown[at]}x{stop - at}"
        at = stop


# ------------------------------------------------------------------------------------------------- how files are made


def noisy(count: int = COUNT, height: int = 48, width: int = 96) -> np.ndarray:
    """Frames with enough in them that damage meets data, and not only padding."""
    noise = np.random.default_rng(0).integers(-12, 13, (count, height, width, 1))
    return np.clip(barcodes(count, height, width) + noise, 0, 255).astype(np.uint8)


def clip(folder: Path, name: str, frames: np.ndarray | None = None, **options: Any) -> Path:
    if options.get("codec", "libx264") == "libx264":
        options = {"options": H264, **options}
    return write_media(folder / name, noisy() if frames is None else frames, **options)


def whole(suffix: str, **options: Any) -> Make:
    return lambda folder: clip(folder, f"whole.{suffix}", **options)


def cut(share: float, suffix: str, **options: Any) -> Make:
    return patched(whole(suffix, **options), _begin(share))


def text(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def packets(path: Path) -> list[tuple[int, int]]:
    """Place and size of every video packet in the order of decoding."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def patched(make: Make, patch: Callable[[bytearray, Path], bytes | bytearray | None]) -> Make:
    def patched_file(folder: Path) -> Path:
        path = make(folder)
        data = bytearray(path.read_bytes())
        path.write_bytes(patch(data, path) or data)
        return path

    return patched_file


def damaged(suffix: str, *numbers: int, **options: Any) -> Make:
    """Flip bytes in the middle of these packets, numbered as they are decoded."""

    def flip(data: bytearray, path: Path) -> None:
        places = packets(path)
        for number in numbers:
            place, size = places[number]
            for at in range(place + size // 2, place + size // 2 + 20):
                data[at] ^= 0xFF

    return patched(whole(suffix, **options), flip)


def emptied(suffix: str, first: int, stop: int, *, skip: int = 0, **options: Any) -> Make:
    """Fill packets with zeros, but for ``skip`` bytes at the beginning."""

    def zero(data: bytearray, path: Path) -> None:
        for place, size in packets(path)[first:stop]:
            data[place + skip : place + size] = bytes(size - skip)

    return patched(whole(suffix, **options), zero)


def transport(change: Callable[[list[bytes], Path], list[bytes]], **options: Any) -> Make:
    """A transport stream whose packets of 188 bytes were tampered with."""

    def tamper(data: bytearray, path: Path) -> bytes:
        return b"".join(change([bytes(data[at : at + 188]) for at in range(0, len(data), 188)], path))

    return patched(whole("ts", **options), tamper)


def _from_packet(number: int) -> Callable[[list[bytes], Path], list[bytes]]:
    # the tables that say what the stream is stay in front
    return lambda pieces, path: pieces[:3] + pieces[packets(path)[number][0] // 188 :]


def _drop(pieces: list[bytes], path: Path) -> list[bytes]:
    at = packets(path)[10][0] // 188
    return pieces[: at + 2] + pieces[at + 4 :]


def _noise_within(number: int) -> Callable[[list[bytes], Path], list[bytes]]:
    def change(pieces: list[bytes], path: Path) -> list[bytes]:
        at = packets(path)[number][0] // 188 + 2
        piece = pieces[at]
        pieces[at] = piece[:60] + bytes(byte ^ 0xFF for byte in piece[60:120]) + piece[120:]
        return pieces

    return change


def joined(suffix: str, *sizes: tuple[int, int], count: int = 8, **options: Any) -> Make:
    def make(folder: Path) -> Path:
        parts = [clip(folder, f"part{i}.{suffix}", noisy(count, *size), **options) for i, size in enumerate(sizes)]
        return join(folder / f"joined.{suffix}", *parts)

    return make


def from_key(suffix: str, number: int, **options: Any) -> Make:
    """The stream alone from the middle of a group of pictures on."""

    def head(data: bytearray, path: Path) -> bytes:
        start = data.index(b"\x00\x00\x01\x65")
        return bytes(data[:start] + data[packets(path)[number][0] :])

    return patched(whole(suffix, **options), head)


def box(kind: bytes, offset: int, value: bytes) -> Callable[[bytearray, Path], None]:
    """Write into the first box of this kind, counted from behind its name."""

    def write(data: bytearray, path: Path) -> None:
        at = data.index(kind) + 4 + offset
        data[at : at + len(value)] = value

    return write


def appended(content: bytes) -> Callable[[bytearray, Path], bytes]:
    return lambda data, path: bytes(data) + content


def _begin(share: float) -> Callable[[bytearray, Path], bytearray]:
    return lambda data, path: data[: int(len(data) * share)]


def _without_index(data: bytearray, path: Path) -> bytes:
    at = data.index(b"idx1")
    data = data[:at]
    data[4:8] = struct.pack("<I", len(data) - 8)
    return bytes(data)


def _open_ended(data: bytearray, path: Path) -> None:
    at = data.index(bytes.fromhex("18538067")) + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7


def _cluster_zeroed(data: bytearray, path: Path) -> None:
    place = packets(path)[10][0]
    data[place - 10 : place + 40] = bytes(50)


def two_streams(folder: Path) -> Path:
    path = folder / "two.mp4"
    with av.open(str(path), "w") as output:
        streams = [output.add_stream("libx264", rate=24) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt, stream.options = 48, 96, "yuv420p", H264
        streams[0].disposition, streams[1].disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for index in range(8):
            for stream, image in zip(streams, (barcodes(100)[99 - index], barcodes(8)[index]), strict=True):
                frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = index, Fraction(1, 24)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    return path


def picture(name: str) -> Make:
    def make(folder: Path) -> Path:
        write_png(folder / name, barcodes(1)[0])
        return folder / name

    return make


def cover(folder: Path) -> Path:
    def attach(stream: Any) -> None:
        stream.disposition = av.stream.Disposition.attached_pic

    return write_media(folder / "a.mp4", barcodes(1), setup=attach, **JPEG)


def bomb(name: str, codec: str) -> Make:
    """A frame of 8K that compresses to nothing."""
    return lambda folder: write_media(folder / name, np.zeros((1, *EIGHT_K, 3), np.uint8), codec=codec)


def gif(folder: Path) -> Path:
    return write_media(folder / "a.gif", barcodes(), codec="gif", pix_fmt="rgb8", rate=10)


def y4m(folder: Path) -> Path:
    return write_media(folder / "a.y4m", barcodes(), codec="wrapped_avframe")


def pixel_formats(folder: Path) -> Path:
    parts = [clip(folder, f"{name}.h264", noisy(6), pix_fmt=name) for name in ("yuv420p", "yuv444p")]
    return join(folder / "both.h264", *parts)


def no_frames(folder: Path) -> Path:
    none = barcodes(2)[:0].reshape(0, 48, 96, 3)
    return write_media(folder / "zero.mp4", none, **FRAGMENTS)


def interlaced(stream: Any) -> None:
    stream.codec_context.flags |= 1 << 18


def made(name: str, frames: np.ndarray, **options: Any) -> Make:
    return lambda folder: clip(folder, name, frames, **options)


JPEG: dict[str, Any] = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True}
MPEG4: dict[str, Any] = {"codec": "mpeg4", "options": {"g": "8", "bf": "0", "qmin": "2", "qmax": "2"}}
MPEG2: dict[str, Any] = {
    "codec": "mpeg2video", "rate": 25, "options": {"g": "8", "bf": "2", "qmin": "2", "qmax": "2"},
}  # fmt: skip
LOSSLESS: dict[str, Any] = {"codec": "ffv1"}
FRAGMENTS: dict[str, Any] = {"movflags": "frag_keyframe+empty_moov"}
VP9: dict[str, Any] = {
    "codec": "libvpx-vp9", "options": {"g": "8", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"},
}  # fmt: skip
FAST: dict[str, Any] = {"movflags": "+faststart"}
B: dict[str, Any] = {"options": B_FRAMES}
OPEN_GOP: dict[str, Any] = {"options": {**B_FRAMES, "x264-params": B_FRAMES["x264-params"] + ":open-gop=1"}}
REFRESH: dict[str, Any] = {"options": {"x264-params": "intra-refresh=1:keyint=8:qp=20:chromaloc=1"}}
SMALL, LARGE = (48, 96), (64, 128)
TINY = np.full((3, 2, 2, 3), 20, np.uint8)
HUGE = b"\x7f\xff\xff\xff"

CASES: dict[str, Case] = {
    # whole and odd
    "whole.mp4": Case(whole("mp4"), ALL),
    "whole.mkv": Case(whole("mkv"), ALL),
    "whole.ts": Case(whole("ts"), ALL),
    "whole.mov": Case(whole("mov"), ALL),
    "whole.flv": Case(whole("flv"), ALL),
    "whole.h264": Case(whole("h264"), ALL),
    "whole.avi": Case(whole("avi", **MPEG4), ALL),
    "whole.mpg": Case(whole("mpg", **MPEG2), ALL),
    "whole.webm": Case(whole("webm", **VP9), ALL),
    "whole.gif": Case(gif, ALL),
    "whole.y4m": Case(y4m, ALL),
    "intra.avi": Case(whole("avi", **JPEG), ALL),
    "lossless.mkv": Case(whole("mkv", **LOSSLESS), ALL),
    "b_frames.mp4": Case(whole("mp4", **B), ALL),
    "b_frames.ts": Case(whole("ts", **B), ALL),
    "open_gop.mp4": Case(whole("mp4", **OPEN_GOP), ALL),
    "fragments.mp4": Case(whole("mp4", **FRAGMENTS), ALL),
    "one_frame.mp4": Case(made("a.mp4", noisy(1)), "0"),
    "two_frames.mp4": Case(made("a.mp4", noisy(2)), "0-1"),
    "variable_rate.mp4": Case(made("a.mp4", noisy(7), pts=[0, 1, 5, 6, 50, 51, 52]), "0-6"),
    "huge_gap.mp4": Case(made("a.mp4", noisy(4), pts=[0, 1, 36000, 36001]), "0-3"),
    "tiny.mkv": Case(made("a.mkv", TINY, codec="ffv1", pix_fmt="bgr0"), "0 0 0"),
    "odd_size.mkv": Case(made("a.mkv", noisy(8, 63, 95), **LOSSLESS), "0-7"),
    "yuv444.mp4": Case(whole("mp4", pix_fmt="yuv444p"), ALL),
    "ten_bit.mp4": Case(whole("mp4", pix_fmt="yuv420p10le"), ALL),
    "gray.mkv": Case(whole("mkv", codec="ffv1", pix_fmt="gray", full_range=True), ALL),
    "alpha.mkv": Case(whole("mkv", codec="ffv1", pix_fmt="yuva420p"), ALL),
    "full_range.mp4": Case(whole("mp4", full_range=True, tags={"color_range": 2}), ALL),
    "interlaced.mp4": Case(whole("mp4", setup=interlaced), ALL),
    "two_streams.mp4": Case(two_streams, "0-7"),
    "live.mkv": Case(patched(whole("mkv"), _open_ended), ALL),
    "long_claim.mp4": Case(patched(whole("mp4"), box(b"mvhd", 16, HUGE)), ALL),
    "foreign_words.mp4": Case(patched(whole("mp4"), box(b"ftyp", 8, b"\xff\xfe")), ALL),
    "junk_behind.mp4": Case(patched(whole("mp4"), appended(b"junk" * 1000)), ALL),
    "no_index.avi": Case(patched(whole("avi", **MPEG4), _without_index), ALL),
    "start_offset.ts": Case(made("a.ts", noisy(), pts=list(range(1000, 1000 + COUNT))), ALL),
    "joined.h264": Case(joined("h264", SMALL, SMALL), "0-7 0-7"),
    "pixel_format_change.h264": Case(pixel_formats, "0-5 0-5"),
    "intra_refresh.mp4": Case(whole("mp4", **REFRESH), ALL),
    # no video, or none that may be opened
    "empty.mp4": Case(text("a.mp4", b""), "!not-video"),
    "garbage.mp4": Case(text("a.mp4", np.random.default_rng(1).bytes(20000)), "!not-video"),
    "zeros.mp4": Case(text("a.mp4", bytes(20000)), "!not-video"),
    "text.mp4": Case(text("a.mp4", "These are words.\n" * 300), "!not-video"),
    "zip.mp4": Case(text("a.mp4", b"PK\x03\x04" + bytes(3000)), "!not-video"),
    "audio.mp4": Case(lambda folder: write_audio(folder / "a.mp4"), "!no-video-stream"),
    "cover.mp4": Case(cover, "!no-video-stream"),
    "no_frames.mp4": Case(no_frames, "!no-frames"),
    "picture.png": Case(picture("a.png"), "0"),  # a video of one frame
    "picture.mp4": Case(picture("a.mp4"), "0"),
    "playlist.m3u8": Case(text("a.m3u8", "#EXTM3U\n#EXTINF:1,\nok.ts\n#EXT-X-ENDLIST\n"), "!refused"),
    "playlist.mp4": Case(text("a.mp4", "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/ok.ts\n"), "!refused"),
    "list.mp4": Case(text("a.mp4", "ffconcat version 1.0\nfile ok.mp4\n"), "!refused"),
    "session.sdp": Case(text("a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n"), "!refused"),
    "manifest.mpd": Case(text("a.mpd", '<?xml version="1.0"?>\n<MPD type="static"></MPD>\n'), "!refused"),
    "bomb.mp4": Case(bomb("a.mp4", "mpeg4"), "!limit"),
    "bomb.avi": Case(bomb("a.avi", "mpeg4"), "!limit"),
    "bomb.ts": Case(bomb("a.ts", "mpeg2video"), "!limit"),
    "bomb.h264": Case(bomb("a.h264", "libx264"), "!limit"),
    "bomb.y4m": Case(text("a.y4m", b"YUV4MPEG2 W9000 H9000 F24:1 C420\nFRAME\n" + bytes(1000)), "!limit"),
    "vast.y4m": Case(text("a.y4m", b"YUV4MPEG2 W60000 H60000 F24:1 C420\nFRAME\n" + bytes(1000)), "!not-video"),
    # cut short
    "type_alone.mp4": Case(text("a.mp4", b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2"), "!truncated"),
    "header_alone.mkv": Case(text("a.mkv", bytes.fromhex("1a45dfa3a3") + bytes(10)), "!truncated"),
    "no_index.mp4": Case(cut(0.5, "mp4"), "!truncated"),
    "cut_faststart.mp4": Case(cut(0.7, "mp4", **FAST), "!truncated", keep="0-15 ~", conceal="0-15 15x1 ~"),
    "cut_fragments.mp4": Case(cut(0.7, "mp4", **FRAGMENTS), "!truncated", keep="0-15 ~", conceal="0-15 15x1 ~"),
    "cut.mkv": Case(cut(0.7, "mkv"), "!truncated", keep="0-15 ~", conceal="0-15 ~"),
    "cut_early.mkv": Case(cut(0.05, "mkv"), "!truncated"),
    "cut_live.mkv": Case(
        patched(patched(whole("mkv"), _open_ended), _begin(0.7)), "!truncated", keep="0-15 ~", conceal="0-15 ~"
    ),
    "cut.avi": Case(cut(0.7, "avi", **MPEG4), "!truncated", keep="0-15 ~", conceal="0-15 15x1 ~"),
    "cut.ts": Case(cut(0.7, "ts"), "0-15 !damaged@16", keep="0-15 ~", conceal="0-15 15x1"),
    "cut.h264": Case(cut(0.7, "h264"), "0-15 !truncated@16", keep="0-15 ~", conceal="0-15 15x1"),
    "cut.flv": Case(cut(0.7, "flv"), "0-15 !damaged@16", keep="0-15 ~", conceal="0-15 15x1"),
    "cut.mpg": Case(cut(0.7, "mpg", **MPEG2), "0-15 !damaged@16", keep="0-15 ~", conceal="0-15 15x2"),
    "cut_b_frames.ts": Case(cut(0.7, "ts", **B), "0-14 !damaged@15", keep="0-14 ~", conceal="0-14 14x2"),
    "cut.gif": Case(patched(gif, _begin(0.7)), "!truncated", keep="0-16 ~", conceal="0-16 ~"),
    "cut.y4m": Case(patched(y4m, _begin(0.7)), "0-15 !truncated@16", keep="0-15 ~", conceal="0-15 ~"),
    "cut.webm": Case(cut(0.7, "webm", **VP9), "!truncated", keep="0-15 ~", conceal="0-15 ~"),
    "huge_sample.mp4": Case(
        patched(whole("mp4"), box(b"stsz", 12 + 4 * 10, HUGE)), "!truncated", keep="0-9 ~", conceal="0-9 ~"
    ),
    "offset.mp4": Case(patched(whole("mp4"), box(b"stco", 8, HUGE)), "!truncated"),
    # damaged
    # the counters of transport packets begin again where whole recordings were joined: nothing is lost there
    "joined.ts": Case(joined("ts", SMALL, SMALL), "0-7 0-7"),
    "size_change.ts": Case(joined("ts", SMALL, LARGE), "0-7 !geometry-changed@8", keep="0-7 ~", conceal="0-7 7x8"),
    "size_change.h264": Case(joined("h264", SMALL, LARGE), "0-7 !geometry-changed@8", keep="0-7 ~", conceal="0-7 7x8"),
    "size_change_and_back.h264": Case(
        joined("h264", SMALL, LARGE, SMALL), "0-7 !geometry-changed@8", keep="0-7 ~", conceal="0-7 7x8 0-7"
    ),
    "one_p.mp4": Case(damaged("mp4", 10), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.mkv": Case(damaged("mkv", 10), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.mov": Case(damaged("mov", 10), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.flv": Case(damaged("flv", 10), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.h264": Case(damaged("h264", 10), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.ts": Case(transport(_noise_within(10)), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.avi": Case(damaged("avi", 10, **MPEG4), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "one_p.mpg": Case(damaged("mpg", 10, **MPEG2), "0-7 !damaged@8", keep="0-7 ~", conceal="0-7 7x1 9-23"),
    "lost_packets.ts": Case(transport(_drop), "0-8 !damaged@9", keep="0-8 ~", conceal="0-8 8x7 16-23"),
    # recordings that begin in the middle begin with the first frame that can be decoded
    "mid_gop.ts": Case(transport(_from_packet(3)), "8-23"),
    "mid_gop.h264": Case(from_key("h264", 3), "8-23"),
    "key.mp4": Case(damaged("mp4", 8), "0-7 !damaged@8", keep="0-7 ~", conceal="0-7 7x8 16-23"),
    "first.mp4": Case(damaged("mp4", 0), "!damaged@0", conceal="8x8 8-23"),
    "last.mp4": Case(damaged("mp4", COUNT - 1), "0-22 !damaged@23", keep="0-22 ~", conceal="0-22 22x1"),
    "two_gops.mp4": Case(damaged("mp4", 3, 18), "0-2 !damaged@3", keep="0-2 ~", conceal="0-2 2x5 8-17 17x6"),
    "every.mp4": Case(damaged("mp4", *range(COUNT)), "!damaged@0", conceal="!damaged"),
    "b_reference.mp4": Case(damaged("mp4", 5, **B), "0-4 !damaged@5", keep="0-4 ~", conceal="0-4 4x7 12-23"),
    "zeroed.mp4": Case(emptied("mp4", 10, 12), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"),
    "zeroed_b.mp4": Case(emptied("mp4", 5, 6, **B), "0-4 !damaged@5", keep="0-4 ~", conceal="0-4 4x7 12-23"),
    "zeroed_key.mp4": Case(emptied("mp4", 8, 9), "0-7 !damaged@8", keep="0-7 ~", conceal="0-7 7x8 16-23"),
    "zeroed_first.mp4": Case(emptied("mp4", 0, 1), "!damaged@0", conceal="8x8 8-23"),
    "zeroed_end.mp4": Case(emptied("mp4", 20, 24), "0-19 !damaged@20", keep="0-19 ~", conceal="0-19 19x4"),
    "zeroed_all.mp4": Case(emptied("mp4", 0, 24), "!damaged@0"),
    "zeroed_jpeg.avi": Case(
        emptied("avi", 12, 24, skip=8, **JPEG), "0-11 !damaged@12", keep="0-11 ~", conceal="0-11 11x12"
    ),
    "zeroed.avi": Case(
        emptied("avi", 10, 11, skip=8, **MPEG4), "0-9 !damaged@10", keep="0-9 ~", conceal="0-9 9x6 16-23"
    ),
    "broken_cluster.mkv": Case(
        patched(whole("mkv"), _cluster_zeroed), "0-8 !damaged@9", keep="0-8 ~", conceal="0-8 8x1 16-23"
    ),
    "sizes.mp4": Case(
        patched(whole("mp4"), box(b"stsz", 12 + 4 * 10, b"\x00\x00\x00\x05")),
        "0-9 !damaged@10",
        keep="0-9 ~",
        conceal="0-9 9x14",
    ),
}

UNNOTICED: dict[str, Make] = {
    "one_p.webm": damaged("webm", 10, **VP9),
    "zeroed.webm": emptied("webm", 10, 11, **VP9),
    "one_p_lossless.mkv": damaged("mkv", 10, **LOSSLESS),
    "b_picture.mp4": damaged("mp4", 3, **B),
    "b_reference.ts": transport(_noise_within(5), **B),
}
"""Damage that neither container nor decoder notices: entropy coding reads on whatever the bits are, a demuxer looks for
the next cluster, and there is no checksum anywhere. Only a digest of the file tells."""

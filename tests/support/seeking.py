"""Files whose frames are hard to address, and reads of them from any frame on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from longvid.media.decoding.decoder import Decoder
from longvid.media.decoding.seek_index import SeekIndex
from longvid.media.file_reader import FileReader
from longvid.media.sources import open_source
from support.bad_media import FRAGMENTS, GOP, H264, JPEG, clip
from support.fields import write_fields
from support.media import barcodes, join, write_media

COUNT = 80
OPEN = {"preset": "medium", "x264-params": f"{GOP}:bframes=3:b-adapt=0:keyint=12:min-keyint=12:open-gop=1"}
PYRAMID = {"preset": "medium", "x264-params": f"{GOP}:bframes=5:b-adapt=0:keyint=12:min-keyint=12:b-pyramid=normal"}
HEVC = {"preset": "ultrafast", "x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=none"}
ALT_REF = {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10", "arnr-maxframes": "7", "b": "100k"}
FAST = {"rate": 2000, "time_base": Fraction(1, 2000)}
REALTIME = {"g": "10", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0", "lag-in-frames": "0"}
JOINABLE = {"movflags": f"{FRAGMENTS['movflags']}+default_base_moof"}


def moving(count: int = COUNT, height: int = 48, width: int = 96) -> np.ndarray:
    """Frames that carry their number, with little noise in them, so that their packets differ."""
    noise = np.random.default_rng(0).integers(-6, 7, (count, height, width, 1))
    return np.clip(barcodes(count, height, width) + noise, 0, 255).astype(np.uint8)


def stills(part: int, count: int = COUNT) -> np.ndarray:
    """Frames that begin with half of the same still, whichever part they are of."""
    frames = moving(count)
    frames[: count // 2] = frames[0]
    return frames if not part else np.concatenate([frames[: count // 2], frames[: count // 2 - 1 : -1]])


def joined(suffix: str, count: int = COUNT, **options: Any) -> Callable[[Path], Path]:
    """Two recordings in one file, as ``cat`` makes it."""

    def make(folder: Path) -> Path:
        parts = [write_media(folder / f"part{n}.{suffix}", stills(n, count), **options) for n in range(2)]
        path = join(folder / f"joined.{suffix}", *parts)
        if suffix == "ts":
            path.write_bytes(continued(path.read_bytes()))
        return path

    return make


def continued(data: bytes) -> bytes:
    """A transport stream whose packets are counted through: its clock begins again and no packet is missing."""
    counters: dict[int, int] = {}
    out = bytearray(data)
    for at in range(0, len(out), 188):
        pid = (out[at + 1] & 0x1F) << 8 | out[at + 2]
        if out[at + 3] & 0x10:  # with a payload
            counters[pid] = (counters.get(pid, -1) + 1) % 16
        out[at + 3] = out[at + 3] & 0xF0 | counters.get(pid, 0)
    return bytes(out)


def made(name: str, frames: np.ndarray | None = None, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: clip(folder, name, moving() if frames is None else frames, **options)


def packed(folder: Path) -> Path:
    """MPEG-4 in AVI with packed B frames, as DivX wrote it: a P and a B frame share a packet, an empty one follows."""
    plain = write_media(
        folder / "plain.avi", moving(81), codec="mpeg4", options={"g": "12", "bf": "1", "flags": "+bitexact"}
    )
    with av.open(str(plain)) as source, av.open(str(folder / "packed.avi"), "w") as output:
        stream = source.streams.video[0]
        target = output.add_stream_from_template(stream)
        packets = [bytes(packet) for packet in source.demux(stream) if packet.size]
        coding = [data[data.index(b"\x00\x00\x01\xb6") + 4] >> 6 for data in packets]  # 0 for I, 1 for P, 2 for B
        out: list[tuple[bytes, bool]] = []
        at = 0
        while at < len(packets):
            mark = b"\x00\x00\x01\xb2DivX503b1393p\x00" if at == 0 else b""
            if at + 1 < len(packets) and coding[at] != 2 and coding[at + 1] == 2:
                out.append((mark + packets[at] + packets[at + 1], coding[at] == 0))
                out.append((b"\x00\x00\x01\xb6\x51\xff\xff", False))  # a picture that is not coded
                at += 2
            else:
                out.append((mark + packets[at], coding[at] == 0))
                at += 1
        for number, (data, key) in enumerate(out):
            packet = av.Packet(data)
            packet.stream, packet.time_base = target, Fraction(1, 24)
            packet.dts = packet.pts = number
            packet.is_keyframe = key
            output.mux(packet)
    return folder / "packed.avi"


MAKERS: dict[str, Callable[[Path], Path]] = {
    "open_gop.mp4": made("a.mp4", options=OPEN),
    "pyramid.mkv": made("a.mkv", options=PYRAMID),
    "open_gop.ts": made("a.ts", options=OPEN),
    "fragments.mp4": made("a.mp4", **FRAGMENTS),
    "hevc.mp4": made("a.mp4", moving(COUNT, 64), codec="libx265", options=HEVC),
    "vp9.webm": made("a.webm", codec="libvpx-vp9", options={**ALT_REF, "cpu-used": "5"}),
    "vp8.webm": made("a.webm", codec="libvpx", options={**ALT_REF, "cpu-used": "5"}),
    "av1.mp4": made("a.mp4", moving(COUNT, 64), codec="libsvtav1", options={"g": "24", "preset": "12"}),
    "mjpeg.avi": made("a.avi", **JPEG),
    "ffv1.mkv": made("a.mkv", codec="ffv1", options={"g": "1"}),
    "variable_rate.mp4": made("a.mp4", options=OPEN, pts=[n * n // 3 + 2 * n for n in range(COUNT)]),
    "open_gop.mpg": made("a.mpg", codec="mpeg2video", rate=25, options={"g": "9", "bf": "2"}),
    "packed.avi": packed,
    "fields.ts": lambda folder: write_fields(folder / "a.ts"),
    "fields.mp4": lambda folder: write_fields(folder / "a.mp4"),
    "mpeg4.avi": made("a.avi", codec="mpeg4", options={"g": "9", "bf": "2"}),
    "joined.webm": joined("webm", codec="libvpx", rate=25, options=REALTIME),
    "joined.mkv": joined("mkv", options=H264),
    "joined.mp4": joined("mp4", options=H264, **JOINABLE),
    "joined.ts": joined("ts", options=H264),
    "joined.avi": joined("avi", codec="mpeg4", options={"g": "9", "bf": "0"}),
    "equal_stamps.mkv": made("a.mkv", options={**H264, "bf": "0"}, **FAST),
    "equal_stamps_intra.mkv": made("a.mkv", options={"g": "1"}, **FAST),
    "equal_stamps_ffv1.mkv": made("a.mkv", codec="ffv1", options={"g": "1"}, **FAST),
    "no_stamps.h264": made("a.h264"),
    "whole.gif": made("a.gif", codec="gif", pix_fmt="rgb8", rate=10),
}  # fmt: skip


class Spy(list[int]):
    """The packets that were decoded since ``clear``, and what came of every seek."""

    def __init__(self) -> None:
        super().__init__()
        self.seeks: list[bool] = []

    def clear(self) -> None:
        super().clear()
        self.seeks.clear()


def spy(monkeypatch: Any) -> Spy:
    seen = Spy()
    register, sought = Decoder._register, FileReader._sought

    def registered(self: Any, packet: Any) -> None:
        seen.append(packet.size)
        register(self, packet)

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        found = sought(self, *args, **options)
        seen.seeks.append(found is not None)
        return found

    monkeypatch.setattr(Decoder, "_register", registered)
    monkeypatch.setattr(FileReader, "_sought", watched)
    return seen


def read(
    path: Path, *, first: int = 0, index: SeekIndex | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray, SeekIndex]:
    """Frames and time stamps from a frame on, and the seek points that are known then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_source(path, **options) as video:
            if index is not None:
                video.index.points, video.index.stamps = [*index.points], index.stamps
            blocks = list(video.blocks(first=first))
            height, width = video.info.height, video.info.width
    frames = [block.frames_THWC for block in blocks] or [np.zeros((0, height, width, 3), np.uint8)]
    return (
        np.concatenate(frames),
        np.concatenate([*(block.pts_T for block in blocks), np.zeros(0, np.int64)]),
        video.index,
    )

"""H.264 that is coded in fields, as television sends it: each frame is two pictures, each with a time stamp.

Macroblocks are plain samples (I_PCM), so no encoder is needed. Frame ``k`` has luma ``40 + 2 k``.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av

HEIGHT, WIDTH = 32, 32
_MOST_FRAME_NUMBER = 256


def _ue(value: int) -> str:
    bits = format(value + 1, "b")
    return "0" * (len(bits) - 1) + bits


def _unit(kind: int, bits: str) -> bytes:
    """A NAL unit of a payload of bits, with its start code and what keeps start codes out of it."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    out, zeros = bytearray(), 0
    for byte in (int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)):
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = 0 if byte else zeros + 1
    return b"\0\0\0\1" + bytes([(0x60 if kind != 9 else 0) | kind]) + bytes(out)


def _headers() -> bytes:
    profile = "".join(format(value, "08b") for value in (77, 0, 30))
    size = _ue(WIDTH // 16 - 1) + _ue(HEIGHT // 32 - 1)
    # 8 bits of frame number, output in the order of coding, 1 reference frame; fields, no MBAFF, no cropping, no VUI
    sequence = profile + _ue(0) + _ue(4) + _ue(2) + _ue(1) + "0" + size + "0" + "0" + "1" + "0" + "0"
    picture = _ue(0) * 2 + "00" + _ue(0) * 3 + "000" + _ue(0) * 3 + "000"
    return _unit(7, sequence) + _unit(8, picture)


def _picture(number: int, luma: int, *, field: int | None, key: bool) -> bytes:
    """A slice of a field, or of a whole frame."""
    bits = _ue(0) + _ue(7) + _ue(0) + format(number % _MOST_FRAME_NUMBER, "08b")
    bits += "0" if field is None else f"1{field}"
    bits += (_ue(0) + "00" if key else "0") + _ue(0)
    for _ in range(WIDTH // 16 * (HEIGHT // (16 if field is None else 32))):
        bits += _ue(25)
        bits += "0" * (-len(bits) % 8)
        bits += format(luma, "08b") * 256 + format(128, "08b") * 128
    return _unit(5 if key else 1, bits)


def write_fields(path: Path, count: int = 80, whole: range = range(0)) -> Path:
    """Write ``count`` frames, those in ``whole`` as one picture each, the others as two; every tenth is a key frame."""
    delimiter = _unit(9, "000")[:-1] + b"\x10"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)  # for its headers only
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, 50)
        for index in range(count):
            key = index % 10 == 0
            for field in (None,) if index in whole else (0, 1):
                first = not field
                data = delimiter + (_headers() if key and first else b"")
                data += _picture(index % 10, 40 + 2 * index, field=field, key=key and first)
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, Fraction(1, 50)
                packet.pts = packet.dts = 2 * index + (field or 0)
                packet.is_keyframe = key and first
                output.mux(packet)
    return path

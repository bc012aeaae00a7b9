"""Field-coded (PAFF) H.264, every frame two pictures, as television sends it. Macroblocks are plain samples (I_PCM):
frame k has luma 40 + 6k in the top field, 43 + 6k in the bottom one, and chroma 128."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av

__all__ = ["write_paff"]

WIDTH, HEIGHT = 96, 64


def _ue(value: int) -> str:
    code = format(value + 1, "b")
    return "0" * (len(code) - 1) + code


def _bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def _unit(kind: int, reference: int, bits: str) -> bytes:
    out, zeros = bytearray(), 0
    for byte in _bytes(bits + "1"):
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b"\0\0\0\1" + bytes([reference << 5 | kind]) + bytes(out)


def _parameters() -> bytes:
    size = _ue(WIDTH // 16 - 1) + _ue(HEIGHT // 32 - 1)
    timing = "0000" + "1" + format(1, "032b") + format(50, "032b") + "1" + "0000"
    sequence = (
        "01001101" + "0" * 8 + "00011110" + _ue(0) + _ue(4) + _ue(2) + _ue(1) + "0" + size + "0010" + "1" + timing
    )
    picture = _ue(0) + _ue(0) + "00" + _ue(0) * 3 + "000" + _ue(0) * 3 + "000"
    return _unit(7, 3, sequence) + _unit(8, 3, picture)


def _picture(number: int, luma: int, *, key: bool, bottom: bool | None) -> bytes:
    """One field, or a whole frame of progressive macroblocks if ``bottom`` is None."""
    bits = _ue(0) + _ue(7) + _ue(0) + format(number % 256, "08b")
    bits += "0" if bottom is None else f"1{bottom:d}"
    bits += (_ue(0) + "00") if key else "0"
    bits += _ue(0)
    for _ in range(WIDTH // 16 * (HEIGHT // (16 if bottom is None else 32))):
        bits += _ue(25)
        bits += "0" * (-len(bits) % 8)
        bits += format(luma, "08b") * 256 + format(128, "08b") * 128
    return _unit(5 if key else 1, 3, bits)


def write_paff(path: Path, count: int, *, whole: tuple[int, ...] = ()) -> Path:
    """A transport stream of ``count`` frames; those in ``whole`` are coded as one picture."""
    delimiter = b"\0\0\0\1\x09\x10"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = WIDTH, HEIGHT, "yuv420p", Fraction(1, 50)
        for k in range(count):
            key = k % 10 == 0
            head = delimiter + (_parameters() if key else b"")
            pieces = [(2 * k, head + _picture(k % 10, 40 + 6 * k, key=key, bottom=None if k in whole else False), key)]
            if k not in whole:
                pieces.append((2 * k + 1, delimiter + _picture(k % 10, 43 + 6 * k, key=False, bottom=True), False))
            for time, data, is_key in pieces:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.dts, packet.pts = stream, Fraction(1, 50), time, time
                packet.is_keyframe = is_key
                output.mux(packet)
    return path

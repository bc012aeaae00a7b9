"""Waits for the frame threads of an H.264 decoder.

A frame that comes out tells whether its picture was damaged. With frame threads it may come out while its thread is
still decoding, if nothing decoded later waits for it, and is then taken for whole. That is so at the end of a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from av.packet import Packet
from av.video.codeccontext import VideoCodecContext

__all__ = ["packets_without_picture"]

_DELIMITER = b"\x09\x10"
"the NAL unit in front of a picture"
_MOST_THREADS = 16
"that FFmpeg starts by itself"


def packets_without_picture(context: VideoCodecContext) -> Iterator[Packet[Any]]:
    """One for each thread: it takes the next one when it is done with the packet before. None for other decoders.

    The decoder has to skip what is no picture until all of them are decoded.
    """
    if context.name != "h264" or context.thread_type.name == "SLICE":
        return
    head = bytes(context.extradata or b"")
    if head[:1] == b"\1":
        prefix = len(_DELIMITER).to_bytes((head[4] & 3) + 1 if len(head) > 4 else 4, "big")
    else:
        prefix = b"\0\0\0\1"
    before, context.skip_frame = context.skip_frame, "NONREF"
    try:
        for _ in range(max(context.thread_count, _MOST_THREADS)):
            yield Packet(prefix + _DELIMITER)
    finally:
        context.skip_frame = before

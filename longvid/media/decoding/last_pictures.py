"""What it takes to know whether the last pictures of a stream are there as a whole.

H.264: a frame tells whether its picture was damaged. With frame threads it may come out while its thread is still
decoding, if nothing decoded later waits for it, and is then taken for whole. So all threads have to be done first.

H.265: the decoder does not say so. A picture is whole if what it shows does not depend on bytes behind it. As this
takes decoding its group of pictures twice, it is asked only where the last packet of a transport stream is full: that
of a whole picture has padding, but for one in 184.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext

from longvid.media.decoding.container import pick_stream
from longvid.media.decoding.transport import ends_full

__all__ = ["is_cut_off", "packets_without_picture"]

_BEHIND = b"\x5a\xa5\xc3\x9b" * 64
"bytes that end no picture, and are not those that the decoder itself puts behind a packet"
_MOST_PACKETS = 2000
"longest group of pictures that is looked at"
_SECONDS_BEFORE = 30
"where reading begins before the last picture"
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


def is_cut_off(
    packet: Packet[Any], descriptor: int | None, open_again: Callable[[], InputContainer], max_pixels: int
) -> bool:
    """Whether the last packet of a stream holds a part of its picture. False if it cannot be told.

    ``open_again`` opens the file, of which ``descriptor`` is a file descriptor.
    """
    position = packet.pos
    if descriptor is None or position is None or packet.pts is None or not ends_full(descriptor, position):
        return False
    shown = []
    for behind in (b"", _BEHIND):
        with open_again() as container:
            shown.append(_last_picture(container, packet.pts, behind, max_pixels))
    first, second = shown
    return first is not None and (second is None or not np.array_equal(first, second))


def _last_picture(container: InputContainer, pts: int, behind: bytes, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """The last picture of a stream, RGB (H, W, 3), decoded with these bytes behind its packet; None without one."""
    stream = pick_stream(container, "")
    stream.codec_context.options = {"max_pixels": str(max_pixels)}
    stream.thread_type = "SLICE"
    if stream.time_base and pts * stream.time_base > _SECONDS_BEFORE + (stream.start_time or 0) * stream.time_base:
        # a recording of hours is not read again for it; a seek in a transport stream is not exact
        container.seek(pts - round(_SECONDS_BEFORE / stream.time_base), stream=stream, backward=True)
    group: list[Packet[Any]] = []
    for packet in container.demux(stream):
        if packet.is_keyframe or len(group) > _MOST_PACKETS:
            group.clear()
        if packet.size:
            group.append(packet)
    if not group or not group[0].is_keyframe:
        return None
    last = Packet(bytes(group[-1]) + behind)
    last.pts, last.dts, last.time_base = group[-1].pts, group[-1].dts, group[-1].time_base
    shown = None
    for one in (*group[:-1], last, None):
        try:
            for frame in stream.codec_context.decode(one):
                shown = frame if frame.pts == pts else shown
        except (av.FFmpegError, OSError):
            continue
    return None if shown is None else shown.to_ndarray(format="rgb24").astype(np.uint8, copy=False)

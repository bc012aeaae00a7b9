"""Whether the time stamps of a file are those of decoding, and not those at which its pictures are shown."""

from __future__ import annotations

import re
from typing import Any

from av.packet import Packet

from longvid.media.decoding.lookahead import Lookahead

__all__ = ["in_decoding_order"]

_MOST_AHEAD = 32
"packets that are looked at"
_PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")
"the mark of MPEG-4 video with two pictures in one packet, to which FFmpeg gives stamps that do not rise"


def in_decoding_order(packets: Lookahead[Packet[Any]], has_samples: bool) -> bool:
    """Whether the first packets tell no times at which pictures are shown, in a stream whose pictures change places.

    Their stamps rise all the same, or two pictures share a packet and with it a stamp. ``has_samples`` says that the
    container is mp4, in which stamps that rise are right if they differ from those of decoding.
    """
    last: int | None = None
    for number in range(_MOST_AHEAD):
        ahead = packets.peek(number + 1)
        if len(ahead) <= number:
            break
        packet = ahead[number]
        if not packet.size:
            continue
        is_later = packet.pts is not None and (last is None or packet.pts > last)
        if not is_later or (has_samples and packet.pts != packet.dts):
            last = None
            break
        last = packet.pts
    return last is not None or any(_PACKED.search(bytes(packet)) for packet in packets.peek(1))

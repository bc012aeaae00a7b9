"""The sound of a media file: which stream players play, and what it is."""

from __future__ import annotations

from typing import Any

from av.audio.stream import AudioStream
from av.container import InputContainer

__all__ = ["describe_audio", "pick_audio"]


def pick_audio(container: InputContainer) -> AudioStream | None:
    """The audio stream that players play by default; None if there is none that FFmpeg decodes."""
    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    best = container.streams.best("audio")
    return best if isinstance(best, AudioStream) and best in streams else next(iter(streams), None)


def describe_audio(container: InputContainer) -> dict[str, Any] | None:
    """Codec, sample rate in Hz and channels of the sound, and how many streams there are; None for a silent file."""
    count, stream = len(container.streams.audio), pick_audio(container)
    if not count:
        return None
    context = None if stream is None else stream.codec_context
    return {
        "codec": None if context is None else context.codec.canonical_name,
        "sample_rate": None if context is None else context.sample_rate,
        "channels": None if context is None else context.channels,
        "streams": count,
    }

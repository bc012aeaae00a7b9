"""What the command line says of the footage that a store was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["sound_words"]


def sound_words(source: Mapping[str, Any]) -> str:
    """The sound of a source, such as ``, with sound (aac, 48000 Hz, 2 channels)``; empty if it has none."""
    audio = (source.get("details") or {}).get("audio")
    if not isinstance(audio, dict):
        return ""
    count, more = audio.get("streams") or 1, ""
    if count > 1:
        more = f", the default one of {count} streams" if audio.get("codec") else f", {count} streams"
    codec = audio.get("codec") or "a codec that FFmpeg does not decode"
    return f", with sound ({codec}, {audio.get('sample_rate')} Hz, {audio.get('channels')} channels{more})"

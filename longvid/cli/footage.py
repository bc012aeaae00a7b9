"""What the command line says of the footage that a store was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["source_words"]


def source_words(source: Mapping[str, Any]) -> str:
    """The name of a source, what pictures it has, and what sound."""
    return f"{source.get('name')}{_picture_words(source)}{_sound_words(source)}"


def _sound_words(source: Mapping[str, Any]) -> str:
    """The sound of a source, such as ``, with sound (aac, 48000 Hz, 2 channels)``; empty if it has none."""
    audio = (source.get("details") or {}).get("audio")
    if not isinstance(audio, dict):
        return ""
    count, more = audio.get("streams") or 1, ""
    if count > 1:
        more = f", the default one of {count} streams" if audio.get("codec") else f", {count} streams"
    codec = audio.get("codec") or "a codec that FFmpeg does not decode"
    return f", with sound ({codec}, {audio.get('sample_rate')} Hz, {audio.get('channels')} channels{more})"


def _picture_words(source: Mapping[str, Any]) -> str:
    """The pictures of a source, such as ``, 240 .png, frame rate assumed``; empty if it is of another kind."""
    suffixes = (source.get("details") or {}).get("pictures")
    if not isinstance(suffixes, dict):
        return ""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.items())
    return f", {kinds}" + (", frame rate assumed" if source.get("timing_assumed") else "")

"""What the command line says of the footage that a store was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from longvid.store.metadata import StoreMetadata

__all__ = ["footage_lines"]

_MOST_JOINTS = 10


def footage_lines(store: StoreMetadata) -> list[str]:
    """The source of a store, its sound, and what was decided about its picture and its times, a line for each."""
    source = store.source or {}
    details, recorded = source.get("details") or {}, store.attributes["longvid"]
    joints = recorded.get("joints") or []
    lines = [f"source    {source.get('name')}{_pictures(details)}{_sound(details)}"]
    lines += [f"picture   {words}" for words in _picture(source, details)]
    lines += [f"times     {words}" for words in _times(source, details, recorded)]
    lines += [
        f"joint     at frame {joint['frame']} of the source: stamp {joint['after']} follows {joint['before']}"
        for joint in joints[:_MOST_JOINTS]
    ]
    if len(joints) > _MOST_JOINTS:
        lines.append(f"joint     and {len(joints) - _MOST_JOINTS} more")
    damage = recorded.get("damage")
    if damage:
        lines.append(f"damage    at frame {damage['frame']} of the source, --on-error {damage['on_error']}")
    return lines


def _pictures(details: Mapping[str, Any]) -> str:
    """Such as ``, 240 .png``; empty for other sources."""
    suffixes = details.get("pictures")
    return "".join(f", {count} {suffix}" for suffix, count in suffixes.items()) if isinstance(suffixes, dict) else ""


def _sound(details: Mapping[str, Any]) -> str:
    """Such as ``, with sound (aac, 48000 Hz, 2 channels)``; empty if there is none."""
    audio = details.get("audio")
    if not isinstance(audio, dict):
        return ""
    count, more = audio.get("streams") or 1, ""
    if count > 1:
        more = f", the default one of {count} streams" if audio.get("codec") else f", {count} streams"
    codec = audio.get("codec") or "a codec that FFmpeg does not decode"
    channels = "1 channel" if audio.get("channels") == 1 else f"{audio.get('channels')} channels"
    return f", with sound ({codec}, {audio.get('sample_rate')} Hz, {channels}{more})"


def _picture(source: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    turned = [f"turned by {details['rotation']} degrees"] if details.get("rotation") else []
    turned += ["mirrored"] if details.get("mirrored") else []
    if turned:
        yield " and ".join(turned) + ", as players show it"
    if details.get("aperture"):
        top, left, height, width = details["aperture"]
        yield f"cropped to its clean aperture: {width}x{height} from column {left}, row {top}"
    coded = Fraction(details.get("coded_sample_aspect_ratio") or 1)
    if coded != 1:
        kept = Fraction(source.get("sample_aspect_ratio") or 1)
        now = "resampled to square pixels" if kept == 1 else f"kept as {kept}"
        yield f"pixels {float(coded):.4g} as wide as high ({coded}), {now}"
    if details.get("resized_from"):
        height, width = details["resized_from"]
        yield f"resized from {width}x{height}, --fit {details.get('fit') or 'stretch'}"
    if details.get("interlaced"):
        done = "made whole by the filter bwdif" if details.get("deinterlace") == "auto" else "left as they are"
        yield f"interlaced, fields {done}"
    if details.get("alpha"):
        yield f"transparent pixels composited on {details.get('background')}"


def _times(source: Mapping[str, Any], details: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[str]:
    rate = Fraction(source.get("frame_rate") or 0)
    if details.get("skipped_packets"):
        yield f"begins inside a group of pictures: {details['skipped_packets']} packets were skipped"
    if source.get("timing_assumed"):
        yield f"no time stamps, {float(rate):.6g} frames per second are assumed"
    if details.get("times_sorted"):
        yield "made from the order of the pictures, since the file does not store when they are shown"
    if details.get("resampled_from"):
        yield f"resampled from {float(Fraction(details['resampled_from'])):.6g} to {float(rate):.6g} frames per second"
    duration, base = recorded.get("last_frame_duration"), source.get("time_base")
    if duration and base:
        yield f"the last frame is shown for {float(duration * Fraction(base)):.4g} s"

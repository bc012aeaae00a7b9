"""The sound that goes along with decoded pictures: packets of a media file, copied or encoded again.

Times are seconds of the file's own clock, on which the first picture of the output lies at ``window.begin``. Sound is
read as pictures are written, so that no more than the encoders hold back is in memory.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Discard

from longvid.errors import SourceError
from longvid.media.audio import pick_audio
from longvid.media.decoding.container import reason
from longvid.media.decoding.media_file import MediaFile
from longvid.media.decoding.watchdog import Watchdog
from longvid.media.limits import Limits
from longvid.media.output.formats import Container

__all__ = ["Sound", "SoundFile", "Window"]

_Samples: TypeAlias = npt.NDArray[np.float32]
"(channels, samples)"

_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,mxf,nut,mp3,wav,flac,aac,w64,aiff,caf,ac3,eac3,dts,amr,au"
_WARM_UP = Fraction(1, 10)
"seconds of packets before the beginning, from which a decoder starts; the container cuts them off"
_WARMED_UP = ("aac", "mp3", "opus")
"codecs whose packets depend on the ones before"
_FAR = 30
"seconds from where on the beginning is found by a seek"
_JITTER = Fraction(1, 50)
"seconds by which a time stamp may be off before samples are dropped or silence is put in"
_SILENCE = 0.5
"seconds of silence in a piece"
_RATES = (32000, 44100, 48000)
"of lower rates a packet lasts longer than a picture"
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
"of so many channels, that both encoders take"
_BITS_PER_CHANNEL = 96_000
_PACKED = "flt"
"samples of all channels in turn: PyAV reads and writes beyond the planes of a frame with 8 of them"
_DAMAGE = (av.FFmpegError, OSError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of a file that is taken along, in seconds of its clock."""

    begin: Fraction
    end: Fraction
    frame: Fraction
    "how long a picture is shown: sound begins and ends with the pictures within this time"


class SoundFile(MediaFile):
    """A regular file that may hold sound alone."""

    def open(self) -> InputContainer:
        """Open the file with FFmpeg; SourceError if it holds no sound that can be read."""
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        seconds = self._limits.stall_seconds
        try:
            return av.open(
                f"file:{self._own_name()}", options=options, metadata_errors="replace", timeout=(seconds, seconds)
            )
        except (av.FFmpegError, OSError, UnicodeDecodeError) as exc:
            raise SourceError(
                f"{self._path} is not a file of sound that can be read ({reason(exc)}); convert it to wav or flac",
                kind="not-video",
            ) from exc


class Sound:
    """The default audio stream of a media file within a window; ``with`` it or close it.

    The packets are copied if the container takes their codec and they begin and end with the pictures within one frame;
    else they are decoded, cut to the sample and encoded again. What cannot be read is left out with a warning.
    ``from_start`` says that the window counts from the beginning of the file. The file is closed with the sound.

    Raises:
        SourceError: the file cannot be read, or has no sound that FFmpeg decodes.
    """

    def __init__(
        self, file: MediaFile, name: str, window: Window, *, from_start: bool = False, limits: Limits | None = None
    ) -> None:
        self._name, self._window, self._file = name, window, file
        self._from_start = from_start
        self._watchdog = Watchdog(name, (limits or Limits()).stall_seconds)
        self._container: InputContainer | None = None
        self._over = False
        self._ready: Packet[Any] | None = None
        self._reached: Fraction | None = None
        "where the last packet of the output ends"
        try:
            self._open(seek=True)
            first = self._peek()
            if first is None or self._span(first)[0] > self._window.begin:  # a seek may lead too far
                self._open(seek=False)
                first = self._peek()
            if first is None:
                raise SourceError(f"{name} has no sound from {float(window.begin):.2f} s on", kind="no-frames")
            self._first = first
        except BaseException:
            self.close()
            raise
        _warn_of_others(self._container, self._stream, name)

    def add_to(self, container: OutputContainer, form: Container) -> None:
        """Add the stream to a file that has no header yet."""
        if self._may_copy(self._first, form):
            out: Any = container.add_stream_from_template(self._stream)
            self._out: AudioStream = out
            self._output = self._copied(form)
        else:
            self._out = self._add_encoder(container, form)
            self._output = self._encoded()

    def until(self, seconds: Fraction) -> Iterator[Packet[Any]]:
        """The packets up to a time of the output, in which the first picture is at 0."""
        while not self._over:
            if self._ready is None:
                self._ready = self._next()
            if self._ready is None or (self._ready.pts or 0) * Fraction(self._ready.time_base) > seconds:
                return
            packet, self._ready = self._ready, None
            self._reached = (packet.pts or 0) * Fraction(packet.time_base)
            yield packet

    def rest(self) -> Iterator[Packet[Any]]:
        """All packets that are left."""
        return self.until(self._window.end - self._window.begin + 3600)

    def leave_out(self, why: str) -> None:
        """Write no more sound, and say so."""
        if not self._over:
            self._over = True
            what = "is left out" if self._reached is None else f"is left out from {float(self._reached):.2f} s on"
            warnings.warn(f"the sound of {self._name} {what}: {why}", stacklevel=5)

    def close(self) -> None:
        """Close the file."""
        self._over = True
        self._watchdog.close()
        if self._container is not None and not self._watchdog.stalled:
            self._container.close()
        self._file.close()

    # ------------------------------------------------------------------------------------------- reading

    def _open(self, *, seek: bool) -> None:
        """Open the file, or open it again, at the window or at its start."""
        if self._container is not None:
            self._container.close()
        self._container = container = self._watchdog.run(self._file.open)
        picked = pick_audio(container)
        if picked is None:
            raise SourceError(f"{self._name} has no sound that FFmpeg can decode", kind="no-frames")
        self._stream = stream = picked
        self._base = Fraction(stream.time_base or Fraction(1, 1000))
        if self._from_start:
            start, self._from_start = Fraction(container.start_time or 0, av.time_base), False
            self._window = replace(self._window, begin=self._window.begin + start, end=self._window.end + start)
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all  # of some formats they are not even read
        begin = self._window.begin
        if seek and begin > (stream.start_time or 0) * self._base + _FAR:
            self._watchdog.run(lambda: container.seek(round((begin - 2) / self._base), stream=stream))
        self._read = self._packets(container.demux(stream))
        "packets that reach into the window, and a few before them"

    def _packets(self, demuxed: Iterator[Packet[Any]]) -> Iterator[Packet[Any]]:
        """Packets of the stream from shortly before the window to its end, with time stamps that rise."""
        window = self._window
        last: int | None = None
        while True:
            packet: Packet[Any] | None = self._watchdog.run(lambda: next(demuxed, None))
            if packet is None:
                return
            if not packet.size:
                continue
            if packet.pts is None:
                packet.pts = packet.dts if packet.dts is not None else 0 if last is None else last + 1
            if last is not None and packet.pts <= last:
                continue
            last = packet.pts
            start, stop = self._span(packet)
            if start >= window.end:
                return
            if stop > window.begin - _WARM_UP:
                yield packet

    def _span(self, packet: Packet[Any]) -> tuple[Fraction, Fraction]:
        """When a packet begins and ends."""
        start = (packet.pts or 0) * self._base
        return start, start + self._length(packet)

    def _length(self, packet: Packet[Any]) -> Fraction:
        if packet.duration:
            return packet.duration * self._base
        context = self._stream.codec_context
        return Fraction(context.frame_size or 1024, context.sample_rate or 48000)

    def _peek(self) -> Packet[Any] | None:
        """The first packet that reaches into the window; it is read again later."""
        ahead: list[Packet[Any]] = []
        for packet in self._read:
            ahead.append(packet)
            if self._span(packet)[1] > self._window.begin:
                self._read = itertools.chain(ahead, self._read)
                return packet
        return None

    def _next(self) -> Packet[Any] | None:
        """The next packet of the output."""
        try:
            return next(self._output, None)
        except _DAMAGE as exc:
            self.leave_out(f"it cannot be read further ({reason(exc)})")
            return None

    # ------------------------------------------------------------------------------------------- copying

    def _may_copy(self, first: Packet[Any], form: Container) -> bool:
        if self._stream.codec_context.codec.canonical_name not in form.sound:
            return False
        length, window = self._length(first), self._window
        # packets are taken whole, by their middle where the container cuts off what lies before the picture
        if (length / 2 if form.cuts_sound else length) > window.frame:
            return False
        late = self._span(first)[1] - window.begin if self._span(first)[0] < window.begin else Fraction(0)
        return form.cuts_sound or late <= window.frame

    def _copied(self, form: Container) -> Iterator[Packet[Any]]:
        window, context = self._window, self._stream.codec_context
        base = self._base if self._base <= Fraction(1, 1000) else Fraction(1, 90000)  # AVI counts whole packets
        # Matroska knows how many samples of the first packet are to be dropped, if the source says so
        padding = Fraction(context.delay, context.sample_rate or 48000)
        padding += Fraction(1, 1000) if padding else 0  # stamps are rounded
        earliest = window.begin - padding
        for packet in self._read:
            start, stop = self._span(packet)
            if form.cuts_sound:
                is_early = stop <= window.begin and context.codec.canonical_name not in _WARMED_UP
            else:
                is_early = start < earliest
            if is_early or (start + stop) / 2 >= window.end:
                continue
            packet.pts = packet.dts = round((start - window.begin) / base)
            packet.duration = round((stop - start) / base)
            packet.time_base = base
            packet.stream = self._out
            yield packet

    # ------------------------------------------------------------------------------------------- encoding again

    def _add_encoder(self, container: OutputContainer, form: Container) -> AudioStream:
        context, name = self._stream.codec_context, form.sound_encoder
        self._rate = context.sample_rate if context.sample_rate in _RATES and name == "aac" else 48000
        self._layout = _LAYOUTS.get(context.channels, "stereo")
        if context.channels not in _LAYOUTS:
            warnings.warn(f"the {context.channels} channels of {self._name} are mixed to stereo", stacklevel=4)
        stream: Any = container.add_stream(name, rate=self._rate, layout=self._layout)
        stream.codec_context.format = "fltp" if name == "aac" else _PACKED
        stream.bit_rate = _BITS_PER_CHANNEL * stream.codec_context.channels
        stream.time_base = Fraction(1, self._rate)
        added: AudioStream = stream
        return added

    def _encoded(self) -> Iterator[Packet[Any]]:
        position = 0
        for samples in self._cut():
            packed = np.ascontiguousarray(samples.T.reshape(1, -1))
            frame = AudioFrame.from_ndarray(packed, _PACKED, self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, position, Fraction(1, self._rate)
            position += samples.shape[1]
            yield from self._out.encode(frame)
        yield from self._out.encode(None)

    def _cut(self) -> Iterator[_Samples]:
        """Samples without a gap from the beginning of the window to its end, or to that of the sound."""
        rate, window = self._rate, self._window
        total, written = round((window.end - window.begin) * rate), 0
        for seconds, samples in self._decoded():
            begin = round((seconds - window.begin) * rate)
            if begin > written + (_JITTER * rate if written else 0):
                for gap in _pieces(min(begin, total) - written, int(_SILENCE * rate)):
                    yield np.zeros((len(samples), gap), np.float32)
                written = min(begin, total)
            elif begin < written - (_JITTER * rate if written else 0):
                samples = samples[:, written - begin :]
            samples = samples[:, : total - written]
            written += samples.shape[1]
            if samples.shape[1]:
                yield samples
            if written >= total:
                return

    def _decoded(self) -> Iterator[tuple[Fraction, _Samples]]:
        """Decoded samples at the rate of the output, with their time; damaged packets are left out."""
        resampler, shape, damaged = None, None, 0
        for packet in self._read:
            try:
                frames: list[Any] = self._watchdog.run(packet.decode)
            except SourceError:
                raise
            except _DAMAGE:
                damaged += 1
                continue
            for frame in frames:
                seconds = Fraction(frame.pts or 0) * Fraction(frame.time_base or self._base)
                if resampler is None or shape != (frame.format.name, frame.layout.name, frame.sample_rate):
                    shape = (frame.format.name, frame.layout.name, frame.sample_rate)
                    resampler = AudioResampler(_PACKED, self._layout, self._rate)
                frame.pts = None
                for out in resampler.resample(frame):
                    yield seconds, out.to_ndarray().reshape(out.samples, -1).T.astype(np.float32, copy=False)
                    seconds += Fraction(out.samples, self._rate)
        if damaged:
            warnings.warn(f"the sound of {self._name} has {damaged} damaged packets, which are silent", stacklevel=5)


def _warn_of_others(container: InputContainer | None, stream: AudioStream, name: str) -> None:
    count = 0 if container is None else len(container.streams.audio)
    if count > 1:
        language = f" ({stream.language})" if stream.language else ""
        warnings.warn(
            f"{name} has {count} audio streams; only the one that players play by default, stream {stream.index}"
            f"{language}, is taken along",
            stacklevel=4,
        )


def _pieces(length: int, most: int) -> Iterator[int]:
    while length > 0:
        yield min(length, most)
        length -= most

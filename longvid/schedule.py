"""How a video is cut into chunks. Integer arithmetic; no torch, no arrays of pixels.

For a model whose norms run over time inside a chunk, the cut is part of the result. So there is one plan and
nothing but this file produces lengths:

* the first chunk has ``1 + chunk_frames`` frames, every later one ``chunk_frames``;
* the tail is padded to a whole chunk by repeating the last frame, and the true length is recorded;
* a video of exactly one frame is one chunk of one frame: the first frame stands alone in a causal VAE.

A model whose norms stay within a frame does not care about the cut. Its plan pads the tail to a whole latent only
(``whole_chunks=False``), so that the latents are the same for every chunk length.

This is the online plan. It never needs the total length in advance: see :meth:`ChunkSchedule.tail`.

The reference plan of a model with norms over time is that of diffusers: nothing is padded, and the remainder of the
video makes the first chunk longer, so that its length has to be known (:meth:`ChunkSchedule.reference`). diffusers cuts
latents in the same way, by their number, when it decodes (:meth:`ChunkSchedule.reference_decode`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from longvid.errors import ScheduleError

__all__ = ["Chunk", "ChunkSchedule"]

_REFERENCE = "remainder-in-first-chunk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A run of frames that goes through the model at once. All ranges are half-open."""

    index: int
    frame_start: int
    frame_stop: int
    "end of the true frames; padding is not counted"
    padded_frames: int
    "frames the model sees: the true ones, then repetitions of the last"
    latent_start: int
    latent_stop: int

    @property
    def num_frames(self) -> int:
        """True frames of this chunk."""
        return self.frame_stop - self.frame_start

    @property
    def num_latents(self) -> int:
        """Latent frames of this chunk."""
        return self.latent_stop - self.latent_start


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSchedule:
    """The plan ``1 + n, n, n, ...`` of a causal VAE that keeps its first frame alone, or the reference plan.

    Args:
        chunk_frames: frames of every chunk after the first.
        frames_per_latent: temporal compression; divides ``chunk_frames``.
        whole_chunks: whether the tail is padded to a whole chunk, or to a whole latent only.
        first_frames: frames of the first chunk in the reference plan, which pads nothing; None for the online plan.
    """

    chunk_frames: int = 8
    frames_per_latent: int = 4
    whole_chunks: bool = True
    first_frames: int | None = None

    def __post_init__(self) -> None:
        if self.frames_per_latent < 1 or self.chunk_frames < 1 or self.chunk_frames % self.frames_per_latent:
            raise ScheduleError(
                f"chunks of {self.chunk_frames} frames cannot be cut into latents of {self.frames_per_latent} frames; "
                "chunk_frames must be a positive multiple of frames_per_latent"
            )
        if self.first_frames is not None and not (self.whole_chunks and 1 <= self.first_frames < 2 * self.chunk_frames):
            raise ScheduleError(
                f"a first chunk of {self.first_frames} frames cannot stand before chunks of {self.chunk_frames}"
            )

    def reference(self, num_frames: int) -> ChunkSchedule:
        """The plan by which diffusers encodes a video of so many frames; this one where the cut is free."""
        _require_frames(num_frames)
        if not self.whole_chunks:
            return self
        remainder = num_frames % self.chunk_frames
        return replace(self, first_frames=min(num_frames, self.chunk_frames + remainder))

    def reference_decode(self, num_latents: int) -> tuple[ChunkSchedule, int]:
        """The plan by which diffusers decodes so many latents, and the number of frames that come out.

        An odd number of latents in the first chunk starts with one that is one frame; of an even number, each one is
        :attr:`frames_per_latent` frames.
        """
        first = min(num_latents, self.chunk_latents + num_latents % self.chunk_latents)
        alone, rest = first % 2, (num_latents - first) * self.frames_per_latent
        first_frames = alone + (first - alone) * self.frames_per_latent
        return replace(self, first_frames=first_frames), first_frames + rest

    @property
    def is_reference(self) -> bool:
        """Whether this is the reference plan."""
        return self.first_frames is not None

    @property
    def chunk_latents(self) -> int:
        """Latent frames of every chunk after the first."""
        return self.chunk_frames // self.frames_per_latent

    @property
    def _first(self) -> int:
        """Frames of the first chunk when it is full."""
        return 1 + self.chunk_frames if self.first_frames is None else self.first_frames

    @property
    def _first_latents(self) -> int:
        return -(-self._first // self.frames_per_latent)

    @property
    def _alone(self) -> int:
        """Frames that the first latent frame stands for: one in the online plan."""
        return (self._first - 1) % self.frames_per_latent + 1

    def capacity(self, index: int) -> int:
        """Frames that chunk ``index`` holds when it is full."""
        return self.chunk_frames if index else self._first

    def index_of_frame(self, frame: int) -> int:
        """The chunk that holds a frame."""
        return max(0, (frame - self._first) // self.chunk_frames + 1)

    def latent_of_frame(self, frame: int) -> int:
        """The latent frame that stands for a frame."""
        return max(0, -(-(frame + 1 - self._alone) // self.frames_per_latent))

    def full(self, index: int) -> Chunk:
        """Chunk ``index`` with no padding: what runs as soon as that many frames have arrived."""
        return self.tail(index, self.capacity(index))

    def tail(self, index: int, num_frames: int) -> Chunk:
        """The last chunk of a video, number ``index``, with ``num_frames`` true frames in it.

        Raises:
            ScheduleError: ``num_frames`` is not between 1 and the chunk's capacity, or the plan allows no tail.
        """
        capacity = self.capacity(index)
        if not 1 <= num_frames <= capacity:
            raise ScheduleError(f"chunk {index} holds 1 to {capacity} frames, {num_frames} were given as its tail")
        if self.is_reference and num_frames != capacity:
            raise ScheduleError(
                f"chunk {index} of the reference plan has {capacity} frames, and the video ended after {num_frames} of "
                "them: it is not as long as the plan was made for"
            )
        first = index == 0
        start = 0 if first else self._first + (index - 1) * self.chunk_frames
        latent_start = 0 if first else self._first_latents + (index - 1) * self.chunk_latents
        alone = self._alone if first else 0
        grouped = self._padded(num_frames - alone)
        return Chunk(
            index=index,
            frame_start=start,
            frame_stop=start + num_frames,
            padded_frames=alone + grouped,
            latent_start=latent_start,
            latent_stop=latent_start + first + grouped // self.frames_per_latent,
        )

    def tail_of_latents(self, index: int, num_latents: int) -> Chunk:
        """The last chunk, number ``index``, when all that is known is that ``num_latents`` of its latents exist."""
        missing = 0 if index else self.frames_per_latent - self._alone
        return self.tail(index, num_latents * self.frames_per_latent - missing)

    def _padded(self, num_frames: int) -> int:
        """``num_frames``, those after the video's first latent, rounded up to what the tail is padded to."""
        unit = self.chunk_frames if self.whole_chunks and not self.is_reference else self.frames_per_latent
        return -(-num_frames // unit) * unit

    def num_chunks(self, num_frames: int) -> int:
        """Chunks of a video of ``num_frames`` frames."""
        _require_frames(num_frames)
        return self.index_of_frame(num_frames - 1) + 1

    def num_latents(self, num_frames: int) -> int:
        """Latent frames of a video of ``num_frames`` frames, those of the padded tail included."""
        _require_frames(num_frames)
        return 1 + self._padded(max(0, num_frames - self._alone)) // self.frames_per_latent

    def chunks(self, num_frames: int, *, first: int = 0) -> Iterator[Chunk]:
        """The chunks of a video of known length, from number ``first`` on."""
        last = self.num_chunks(num_frames) - 1
        for index in range(first, last):
            yield self.full(index)
        yield self.tail(last, num_frames - self.full(last).frame_start)

    def part(self, number: int, of: int, first: int, stop: int) -> tuple[int, int, int]:
        """The part of the frames from ``first`` to ``stop`` that is number ``number``, from 1 on, of ``of`` parts.

        Parts have whole chunks, and all but the first one chunk more, so that it can be compared with its neighbour.

        Returns:
            the frame where it begins, that where the part before ends, and that where it ends itself.

        Raises:
            ScheduleError: there is no such part, or it would be empty.
        """
        begin = self.index_of_frame(first)
        num_chunks = self.index_of_frame(stop - 1) + 1 - begin
        if not 1 <= number <= of or of > num_chunks:
            raise ScheduleError(
                f"part {number}/{of} was asked for; the video has {num_chunks} chunks, so that parts from "
                f"1/{num_chunks} to {num_chunks}/{num_chunks} are possible"
            )
        own, behind = (begin + num_chunks * count // of for count in (number - 1, number))
        shared, start = (max(first, self.full(max(begin, chunk)).frame_start) for chunk in (own - 1, own))
        return shared, start, stop if number == of else self.full(behind).frame_start

    def same_latents(self, other: ChunkSchedule) -> bool:
        """Whether latents made by the other plan can be decoded by a model with this one: its norms see as much."""
        free = not (self.whole_chunks or other.whole_chunks)
        equal = replace(self, first_frames=None) == replace(other, first_frames=None)
        return equal or (free and self.frames_per_latent == other.frames_per_latent)

    def max_frames(self, num_latents: int) -> int:
        """Frames that ``num_latents`` latent frames decode to before the padding is cut off.

        Raises:
            ScheduleError: no video of this plan has that many latent frames.
        """
        unit, first = (self.chunk_latents, self._first_latents) if self.whole_chunks else (1, 1)
        least = first if self.is_reference else 1
        if num_latents < least or (num_latents - first) % unit:
            raise ScheduleError(
                f"{num_latents} latent frames do not fit the plan, which gives {least} + k x {unit} of them; "
                "pass the latents of a whole video, unpadded and uncut"
            )
        return self._alone + (num_latents - 1) * self.frames_per_latent

    def check_length(self, num_frames: int, num_latents: int) -> None:
        """Raise ScheduleError unless a video of ``num_frames`` frames has ``num_latents`` latent frames."""
        most = self.max_frames(num_latents)
        if self.num_latents(num_frames) != num_latents:
            raise ScheduleError(
                f"{num_latents} latent frames hold at most {most} frames, {num_frames} were asked for, which would "
                f"make {self.num_latents(num_frames)} latent frames"
            )

    def frame_range(self, latent: int) -> tuple[int, int]:
        """The half-open range of frames that latent frame ``latent`` stands for, padding included."""
        if latent == 0:
            return 0, self._alone
        stop = self._alone + latent * self.frames_per_latent
        return stop - self.frames_per_latent, stop

    @property
    def lengths(self) -> str:
        """The lengths of the chunks in words."""
        return f"chunks of {self._first}, {self.chunk_frames}, {self.chunk_frames}, ... frames"

    @property
    def words(self) -> str:
        """The plan by its name and lengths."""
        if self.is_reference:
            return f"reference: {self.lengths}, nothing padded, as diffusers"
        unit = "a whole chunk" if self.whole_chunks else "a whole latent"
        return f"online: {self.lengths}, the last one padded to {unit}"

    def __str__(self) -> str:
        return f"{self.lengths} with {self.frames_per_latent} frames per latent"

    def to_dict(self) -> dict[str, Any]:
        """The plan as it is recorded in a store."""
        return {
            "first_chunk_frames": self._first,
            "chunk_frames": self.chunk_frames,
            "frames_per_latent": self.frames_per_latent,
            "tail": self._tail,
        }

    @property
    def _tail(self) -> str:
        """What becomes of a remainder."""
        if self.is_reference:
            return _REFERENCE
        return "repeat-last-frame" if self.whole_chunks else "repeat-last-frame-to-latent"

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ChunkSchedule:
        """Read back what :meth:`to_dict` wrote.

        Raises:
            ScheduleError: the record is of another kind of plan.
        """
        try:
            plan = cls(
                chunk_frames=int(record["chunk_frames"]),
                frames_per_latent=int(record["frames_per_latent"]),
                whole_chunks=record["tail"] in ("repeat-last-frame", _REFERENCE),
                first_frames=int(record["first_chunk_frames"]) if record["tail"] == _REFERENCE else None,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise ScheduleError(f"not a chunk plan of longvid: {record!r}") from exc
        if plan.to_dict() != record:
            raise ScheduleError(f"a chunk plan of another kind: {record!r}; this version reads {plan.to_dict()!r}")
        return plan


def _require_frames(num_frames: int) -> None:
    if num_frames < 1:
        raise ScheduleError(f"a video has at least one frame, {num_frames} were given")

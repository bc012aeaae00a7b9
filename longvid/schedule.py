"""How a video is cut into chunks. Integer arithmetic; no torch, no arrays of pixels.

For a model whose norms run over time inside a chunk, the cut is part of the result. So there is one plan and
nothing but this file produces lengths:

* the first chunk has ``1 + chunk_frames`` frames, every later one ``chunk_frames``;
* the tail is padded to a whole chunk by repeating the last frame, and the true length is recorded;
* a video of exactly one frame is one chunk of one frame: the first frame stands alone in a causal VAE.

A model whose norms stay within a frame does not care about the cut. Its plan pads the tail to a whole latent only
(``whole_chunks=False``), so that the latents are the same for every chunk length.

The plan never needs the total length in advance: see :meth:`ChunkSchedule.tail`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longvid.errors import ScheduleError

__all__ = ["Chunk", "ChunkSchedule"]


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
    """The plan ``1 + n, n, n, ...`` of a causal VAE that keeps its first frame alone.

    Args:
        chunk_frames: frames of every chunk after the first.
        frames_per_latent: temporal compression; divides ``chunk_frames``.
        whole_chunks: whether the tail is padded to a whole chunk, or to a whole latent only.
    """

    chunk_frames: int = 8
    frames_per_latent: int = 4
    whole_chunks: bool = True

    def __post_init__(self) -> None:
        if self.frames_per_latent < 1 or self.chunk_frames < 1 or self.chunk_frames % self.frames_per_latent:
            raise ScheduleError(
                f"chunks of {self.chunk_frames} frames cannot be cut into latents of {self.frames_per_latent} frames; "
                "chunk_frames must be a positive multiple of frames_per_latent"
            )

    @property
    def chunk_latents(self) -> int:
        """Latent frames of every chunk after the first."""
        return self.chunk_frames // self.frames_per_latent

    def capacity(self, index: int) -> int:
        """Frames that chunk ``index`` holds when it is full."""
        return self.chunk_frames + (index == 0)

    def index_of_frame(self, frame: int) -> int:
        """The chunk that holds a frame."""
        return max(0, (frame - 1) // self.chunk_frames)

    def latent_of_frame(self, frame: int) -> int:
        """The latent frame that stands for a frame."""
        return -(-frame // self.frames_per_latent)

    def full(self, index: int) -> Chunk:
        """Chunk ``index`` with no padding: what runs as soon as that many frames have arrived."""
        return self.tail(index, self.capacity(index))

    def tail(self, index: int, num_frames: int) -> Chunk:
        """The last chunk of a video, number ``index``, with ``num_frames`` true frames in it.

        Raises:
            ScheduleError: ``num_frames`` is not between 1 and the chunk's capacity.
        """
        if not 1 <= num_frames <= self.capacity(index):
            raise ScheduleError(
                f"chunk {index} holds 1 to {self.capacity(index)} frames, {num_frames} were given as its tail"
            )
        first = index == 0
        start = 0 if first else 1 + index * self.chunk_frames
        latent_start = 0 if first else 1 + index * self.chunk_latents
        grouped = self._padded(num_frames - first)
        return Chunk(
            index=index,
            frame_start=start,
            frame_stop=start + num_frames,
            padded_frames=first + grouped,
            latent_start=latent_start,
            latent_stop=latent_start + first + grouped // self.frames_per_latent,
        )

    def tail_of_latents(self, index: int, num_latents: int) -> Chunk:
        """The last chunk, number ``index``, when all that is known is that ``num_latents`` of its latents exist."""
        return self.tail(index, num_latents * self.frames_per_latent - (self.frames_per_latent - 1) * (index == 0))

    def _padded(self, num_frames: int) -> int:
        """``num_frames``, those after the video's first, rounded up to what the tail is padded to."""
        unit = self.chunk_frames if self.whole_chunks else self.frames_per_latent
        return -(-num_frames // unit) * unit

    def num_chunks(self, num_frames: int) -> int:
        """Chunks of a video of ``num_frames`` frames."""
        _require_frames(num_frames)
        return max(1, -(-(num_frames - 1) // self.chunk_frames))

    def num_latents(self, num_frames: int) -> int:
        """Latent frames of a video of ``num_frames`` frames, those of the padded tail included."""
        _require_frames(num_frames)
        return 1 + self._padded(num_frames - 1) // self.frames_per_latent

    def chunks(self, num_frames: int, *, first: int = 0) -> Iterator[Chunk]:
        """The chunks of a video of known length, from number ``first`` on."""
        last = self.num_chunks(num_frames) - 1
        for index in range(first, last):
            yield self.full(index)
        yield self.tail(last, num_frames - (0 if last == 0 else 1 + last * self.chunk_frames))

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
        """Whether latents made by the other plan can be decoded by this one: equal, or the cut does not matter."""
        free = not (self.whole_chunks or other.whole_chunks)
        return self == other or (free and self.frames_per_latent == other.frames_per_latent)

    def max_frames(self, num_latents: int) -> int:
        """Frames that ``num_latents`` latent frames decode to before the padding is cut off.

        Raises:
            ScheduleError: no video of this plan has that many latent frames.
        """
        unit = self.chunk_latents if self.whole_chunks else 1
        if num_latents < 1 or (num_latents - 1) % unit:
            raise ScheduleError(
                f"{num_latents} latent frames do not fit the plan, which gives 1 + k x {unit} of them; "
                "pass the latents of a whole video, unpadded and uncut"
            )
        return 1 + (num_latents - 1) * self.frames_per_latent

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
            return 0, 1
        stop = 1 + latent * self.frames_per_latent
        return stop - self.frames_per_latent, stop

    def __str__(self) -> str:
        return f"chunks of {1 + self.chunk_frames}, {self.chunk_frames}, {self.chunk_frames}, ... frames with " + (
            f"{self.frames_per_latent} frames per latent"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as it is recorded in a store."""
        return {
            "first_chunk_frames": 1 + self.chunk_frames,
            "chunk_frames": self.chunk_frames,
            "frames_per_latent": self.frames_per_latent,
            "tail": "repeat-last-frame" if self.whole_chunks else "repeat-last-frame-to-latent",
        }

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
                whole_chunks=record["tail"] == "repeat-last-frame",
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise ScheduleError(f"not a chunk plan of longvid: {record!r}") from exc
        if plan.to_dict() != record:
            raise ScheduleError(f"a chunk plan of another kind: {record!r}; this version reads {plan.to_dict()!r}")
        return plan


def _require_frames(num_frames: int) -> None:
    if num_frames < 1:
        raise ScheduleError(f"a video has at least one frame, {num_frames} were given")

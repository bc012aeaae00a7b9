"""The CausalVAE protocol, which the engine asks of a model, and the geometry of its latents.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from longvid.errors import ScheduleError
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext
from longvid.schedule import ChunkSchedule

__all__ = ["CausalVAE", "LatentGeometry", "model_name"]

_LONGEST_CHUNK = 1024
"frames; host memory holds several chunks"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    """How pixels and latents relate."""

    latent_channels: int
    frames_per_latent: int
    "temporal compression; the first frame of a video is a latent of its own"
    pixels_per_latent: int
    "spatial compression; frame sizes must be multiples of it"
    chunk_frames: int
    "frames of a chunk after the first; for a chunk-invariant model this is a default only"
    chunk_invariant: bool = False
    "whether the result is independent of the cut into chunks, except in the last bits: no norm runs over time"

    @property
    def schedule(self) -> ChunkSchedule:
        """The model's own chunk plan."""
        return self.schedule_for(None)

    def schedule_for(self, chunk_frames: int | None) -> ChunkSchedule:
        """The plan with chunks of another length.

        Args:
            chunk_frames: frames of a chunk after the first; None for the model's own.

        Raises:
            ScheduleError: that length is not whole latents, or the result would depend on it.
        """
        if chunk_frames is not None and chunk_frames != self.chunk_frames and not self.chunk_invariant:
            raise ScheduleError(
                f"chunks of {chunk_frames} frames were asked for, but this model's norms run over a chunk, so its "
                f"result is defined by chunks of {self.chunk_frames}; leave chunk_frames out"
            )
        if chunk_frames is not None and chunk_frames > _LONGEST_CHUNK:
            raise ScheduleError(f"chunks of {chunk_frames} frames are longer than {_LONGEST_CHUNK}; nothing is gained")
        return ChunkSchedule(
            chunk_frames=self.chunk_frames if chunk_frames is None else chunk_frames,
            frames_per_latent=self.frames_per_latent,
            whole_chunks=not self.chunk_invariant,
        )

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The frame size after padding up to whole latents."""
        p = self.pixels_per_latent
        return -(-height // p) * p, -(-width // p) * p


@runtime_checkable
class CausalVAE(Protocol):
    """A causal video VAE: modules without state between calls.

    Bring your own by building an encoder and a decoder from :class:`longvid.CausalConv3d` (or layers like it), each
    of which takes the context of the forward pass in its call. Methods accept a bare :class:`longvid.ConvCache`, too:
    :meth:`longvid.ForwardContext.of` makes a context of it.
    """

    geometry: LatentGeometry

    @property
    def encoder(self) -> nn.Module:
        """The module that an encoding ConvCache is made for."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """The module that a decoding ConvCache is made for."""
        ...

    def encode(self, x_BCTHW: Tensor, context: ForwardContext | ConvCache) -> Tensor:
        """One chunk of pixels in [-1, 1] to moments (B, 2 x latent channels, t, h, w): mean, then log variance."""
        ...

    def decode(self, z_BCTHW: Tensor, context: ForwardContext | ConvCache) -> Tensor:
        """One chunk of raw (unscaled) latents to pixels (B, 3, T, H, W), about in [-1, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the record, ready for JSON: class, config, origin and digest of the weights, latent scaling."""
        ...


def model_name(model: CausalVAE) -> str:
    """What a model is called in plans, profiles and reports."""
    facts = model.describe()
    return str(facts.get("name_or_path") or facts.get("class_name") or type(model).__name__)

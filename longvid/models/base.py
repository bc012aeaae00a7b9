"""The CausalVAE protocol, which the engine asks of a model, and the geometry of its latents.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from longvid.errors import ScheduleError
from longvid.models.cache import ConvCache
from longvid.models.context import ForwardContext
from longvid.schedule import ChunkSchedule

__all__ = ["CausalVAE", "LatentGeometry", "NativeVAE", "model_name"]

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
    has_reference_plan: bool = False
    "whether its layers take the first chunk of diffusers' plan, whose first latent may stand for several frames"

    def reference_schedule(self, num_frames: int) -> ChunkSchedule:
        """The plan by which diffusers encodes a video of so many frames; the model's own where the cut is free.

        Raises:
            ScheduleError: diffusers has no plan for this model.
        """
        if not (self.chunk_invariant or self.has_reference_plan):
            raise ScheduleError(
                "the chunk plan of diffusers was asked for (reference), and this model has none; its own plan is the "
                "online one"
            )
        return self.schedule.reference(num_frames)

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


class NativeVAE(nn.Module, ABC):
    """What the models of this package have in common: a config, the origin of their weights, and the record of both.

    Args:
        config: the architecture, an instance of ``config_class``.
        origin: where the weights are from, for the record: ``name_or_path``, ``revision``, ``weights_sha256``,
            ``random_weights``; set by :func:`longvid.load_model`.
    """

    class_name: ClassVar[str]
    "the class that a ``config.json`` names"
    other_names: ClassVar[tuple[str, ...]] = ()
    "classes of the same modules"
    config_class: ClassVar[Any]
    weights_dtype: ClassVar[torch.dtype | None] = None
    "what weights are read as; None for as they are stored"
    runs_in_pieces: ClassVar[bool] = False
    "whether its layers follow ``Limits.pieces``: none of them looks across time but through its context"
    geometry: LatentGeometry
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: Any, origin: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.origin = dict(origin or {})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> Self:
        """Build the modules for a ``config.json``, with PyTorch's initial weights."""
        return cls(cls.config_class.from_dict(config), origin)

    @torch.inference_mode()
    def encode(self, x_BCTHW: Tensor, context: ForwardContext | ConvCache) -> Tensor:
        """One chunk of pixels in [-1, 1] to moments (B, 2 c, t, h, w): mean, then log variance.

        Raises:
            ScheduleError: the model cannot take a chunk of this shape.
            CacheError: the cache is of another module or another video.
        """
        context = ForwardContext.of(context)
        self._check_chunk(x_BCTHW, context)
        with context.chunk():
            return self._encode(x_BCTHW, context)

    @torch.inference_mode()
    def decode(self, z_BCTHW: Tensor, context: ForwardContext | ConvCache) -> Tensor:
        """One chunk of raw latents (B, c, t, h, w) to pixels (B, 3, T, H, W).

        Raises:
            CacheError: the cache is of another module or another video.
        """
        context = ForwardContext.of(context)
        with context.chunk():
            return self._decode(z_BCTHW, context)

    def _check_chunk(self, x_BCTHW: Tensor, context: ForwardContext) -> None:
        """Raise ScheduleError if the model cannot encode a chunk of this shape; the cache stays usable.

        If the cut is free, the first chunk of a video has 1 + f n frames, and the others f n, where f is the temporal
        compression; n may differ from chunk to chunk. Norms over time make the chunks of the schedule the only right
        ones, so the caller is trusted.
        """
        geometry, first = self.geometry, context.cache.num_chunks == 0
        T, H, W = x_BCTHW.shape[2:]
        f, p = geometry.frames_per_latent, geometry.pixels_per_latent
        if geometry.chunk_invariant and ((T - first) % f or T < 1):
            expected = f"1 + {f} n frames, the first chunk of a video" if first else f"{f} n frames"
            raise ScheduleError(f"a chunk of {T} frames does not fit: this one must have {expected}")
        if geometry.chunk_invariant and (H % p or W % p):
            raise ScheduleError(f"frames of {W}x{H} are not whole blocks of {p}x{p}; pad them first")

    @abstractmethod
    def _encode(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        """:meth:`encode` inside the chunk."""

    @abstractmethod
    def _decode(self, z_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        """:meth:`decode` inside the chunk."""

    def checkpoint_names(self) -> dict[str, str]:
        """The name that each weight has in a checkpoint in diffusers format, by its name here."""
        return {name: name for name in self.state_dict()}

    def describe(self) -> dict[str, Any]:
        """Class, config, origin of the weights and the facts that turn raw latents into the model's own scale."""
        return {
            "class_name": self.class_name,
            **self.origin,
            "config": asdict(self.config),
            **self.scaling,
            "temporal_compression_ratio": self.geometry.frames_per_latent,
            "spatial_compression_ratio": self.geometry.pixels_per_latent,
        }

    @property
    def scaling(self) -> dict[str, Any]:
        """How raw latents become those that other models work on; these need none."""
        return {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}


def model_name(model: CausalVAE) -> str:
    """What a model is called in plans, profiles and reports."""
    facts = model.describe()
    return str(facts.get("name_or_path") or facts.get("class_name") or type(model).__name__)

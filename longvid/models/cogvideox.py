"""The VAE of CogVideoX (2b, 5b, 1.5-5b), native.

Module names are those of diffusers' ``AutoencoderKLCogVideoX``, so its checkpoints load key by key. Results
have numerical parity with diffusers: same convolutions, same norms over the same chunks.

Source: CogVideoX, Yang et al. 2024, arXiv 2408.06072. Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.models.base import LatentGeometry, NativeVAE
from longvid.models.context import ForwardContext
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.layers.norms import GroupNormSiLU, SpatialNormSiLU
from longvid.models.layers.resampling import Downsample, Upsample
from longvid.models.layers.residual import ResnetBlock

__all__ = ["CogVideoXConfig", "CogVideoXVAE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CogVideoXConfig:
    """The keys of ``config.json`` that decide what is computed, and the latent scaling for the record."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    scaling_factor: float | None = 1.15258426
    "None where weights came without it"
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        ratio, halvings = self.temporal_compression_ratio, len(self.block_out_channels) - 1
        if ratio not in (1, 2, 4, 8) or ratio > 2**halvings:
            raise ModelError(
                f"temporal_compression_ratio {ratio} is not one of 1, 2, 4, 8 and at most {2**halvings}, which is what "
                f"{halvings + 1} blocks allow: time is halved between two of them"
            )
        if self.in_channels != 3 or self.out_channels != 3:
            raise ModelError(f"{self.in_channels} to {self.out_channels} pixel channels; longvid works on RGB, 3 to 3")
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if bad:
            raise ModelError(f"block widths {bad} do not divide into norm_num_groups = {self.norm_num_groups}")
        # diffusers sizes both 1x1 convolutions by the pixel channels, so they only fit latents as thin as pixels.
        if (self.use_quant_conv or self.use_post_quant_conv) and self.latent_channels != self.out_channels:
            raise ModelError(
                f"use_quant_conv and use_post_quant_conv work on {self.out_channels} channels in this family and "
                f"cannot follow {self.latent_channels} latent channels"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CogVideoXConfig:
        """Take what matters from a diffusers ``config.json``; ModelError if it is not one of this family."""
        for key, only in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
            if set(config.get(key, [only])) != {only}:
                raise ModelError(f"{key} {config[key]!r} is not supported; this family is made of {only}")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        if "temporal_compression_ratio" in values:
            values["temporal_compression_ratio"] = int(values["temporal_compression_ratio"])
        try:
            return cls(**values)
        except TypeError as exc:
            raise ModelError(f"the model's config cannot be used: {exc}") from exc

    @property
    def temporal_levels(self) -> int:
        """Resolution levels at which time is halved or doubled as well."""
        return int(math.log2(self.temporal_compression_ratio))


class _Stage(nn.Module):
    """Some blocks at one resolution and the change to the next one. A list with names, not a layer."""

    def __init__(self, config: CogVideoXConfig, widths: tuple[int, int], num_blocks: int, latents: int | None) -> None:
        super().__init__()
        before, width = widths
        groups = config.norm_num_groups
        norm: Callable[[int], nn.Module] = partial(GroupNormSiLU, groups, eps=config.norm_eps)
        if latents is not None:
            norm = partial(SpatialNormSiLU, latent_channels=latents, num_groups=groups)
        self.resnets = nn.ModuleList(ResnetBlock(width if i else before, width, norm) for i in range(num_blocks))


class _Half(nn.Module):
    """Encoder or decoder: a convolution, stages in the order in which they were made, a norm and a convolution."""

    steered = False
    "whether the input is a latent, which then steers every norm"
    conv_in: CausalConv3d
    norm_out: GroupNormSiLU | SpatialNormSiLU
    conv_out: CausalConv3d

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """One chunk. The loop is flat so that no caller up the stack keeps a block's input alive."""
        latent = x if self.steered else None
        x = self.conv_in(x, context)
        stages = (module for module in self.modules() if isinstance(module, _Stage))
        for layer in (layer for stage in stages for group in stage.children() for layer in group.children()):
            x = layer(x, context, latent)
        normed = context.attempt(partial(self.norm_out.fit, x, latent))
        del x
        return self.conv_out.stream(normed, context)


class Encoder(_Half):
    """Pixels (B, 3, T, H, W) to moments (B, 2 x latent channels, t, h, w)."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        widths, levels = config.block_out_channels, config.temporal_levels
        channels = widths[0]
        self.conv_in = CausalConv3d(config.in_channels, channels, 3)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            stage = _Stage(config, (channels, width), config.layers_per_block, None)
            if i < len(widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(width, time=i < levels)])
            self.down_blocks.append(stage)
            channels = width
        self.mid_block = _Stage(config, (channels, channels), 2, None)
        self.norm_out = GroupNormSiLU(config.norm_num_groups, channels, eps=1e-6)
        self.conv_out = CausalConv3d(channels, 2 * config.latent_channels, 3)


class Decoder(_Half):
    """Latents (B, c, t, h, w) to pixels (B, 3, T, H, W)."""

    steered = True

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        widths, levels, latents = config.block_out_channels[::-1], config.temporal_levels, config.latent_channels
        channels = widths[0]
        self.conv_in = CausalConv3d(latents, channels, 3)
        self.mid_block = _Stage(config, (channels, channels), 2, latents)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            stage = _Stage(config, (channels, width), config.layers_per_block + 1, latents)
            if i < len(widths) - 1:
                stage.upsamplers = nn.ModuleList([Upsample(width, time=i < levels)])
            self.up_blocks.append(stage)
            channels = width
        self.norm_out = SpatialNormSiLU(channels, latents, num_groups=config.norm_num_groups)
        self.conv_out = CausalConv3d(channels, config.out_channels, 3)


class CogVideoXVAE(NativeVAE):
    """Encoder and decoder of CogVideoX behind the :class:`~longvid.models.base.CausalVAE` protocol."""

    class_name = "AutoencoderKLCogVideoX"
    config_class = CogVideoXConfig

    def __init__(self, config: CogVideoXConfig, origin: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, origin)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.out_channels
        self.quant_conv = nn.Conv3d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv3d(channels, channels, 1) if config.use_post_quant_conv else None
        self.geometry = LatentGeometry(
            latent_channels=config.latent_channels,
            frames_per_latent=config.temporal_compression_ratio,
            pixels_per_latent=2 ** (len(config.block_out_channels) - 1),
            chunk_frames=2 * config.temporal_compression_ratio,
            has_reference_plan=True,
        )

    def _encode(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        moments: Tensor = self.encoder(x_BCTHW, context)
        return moments if self.quant_conv is None else context.attempt(partial(self.quant_conv, moments))

    def _decode(self, z_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        conv = self.post_quant_conv
        z = z_BCTHW if conv is None else context.attempt(partial(conv, z_BCTHW))
        pixels: Tensor = self.decoder(z, context)
        return pixels

    @property
    def scaling(self) -> dict[str, Any]:
        """The config's facts that turn raw latents into the model's own scale."""
        keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents")
        return {key: getattr(self.config, key) for key in keys}

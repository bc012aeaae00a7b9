"""``tiny``: the small causal VAE whose weights ship with the package.

Everything happens at the size of the latents. A fixed orthonormal transform turns every block of 4 frames x 8 x 8
pixels into coefficients and back (the principal components of training footage, as a codec's DCT is a fixed basis).
On the coefficients a linear path takes the 16 that matter most, and a residual network beside it spends the same 16
numbers better: it sees the neighbours in space and, through causal convolutions, the past.

::

    pixels -> transform -> coefficients --- linear -----------------+--> 16 channels
                                \\--- stem, blocks, head -----------/
    16 channels --- linear --------------------+--> coefficients -> inverse transform -> pixels
              \\--- stem, blocks, head --------/

The first frame of a video is a block of four equal frames with a linear path of its own. There are no norms, so the
result does not depend on how a video is cut into chunks, beyond rounding.

Axes: B batch, C channels, T time, H height, W width; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.models.base import LatentGeometry, NativeVAE
from longvid.models.context import ForwardContext
from longvid.models.kernels.convolution import Attempt, run_once
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.layers.window import Window

__all__ = ["BlockTransform", "TinyConfig", "TinyVAE"]

FRAMES = 4
"Frames of a block, and of a latent after the first."
PIXELS = 8
"Height and width of a block."
BLOCK = 3 * FRAMES * PIXELS * PIXELS
"Numbers in a block of RGB."


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The keys of ``config.json``."""

    latent_channels: int = 16
    coefficients: int = 192
    "how many of the 768 coefficients of a block are kept"
    encoder_width: int = 128
    encoder_blocks: int = 3
    decoder_width: int = 192
    decoder_blocks: int = 4
    posterior_std: float = 0.01
    "standard deviation of the posterior, the same everywhere; the latents' own is about 1"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TinyConfig:
        """Take the known keys; ModelError if a value has the wrong type or is out of range."""
        known = {f.name: f.type for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known}
        for key, value in values.items():
            wanted = (int, float) if key == "posterior_std" else (int,)
            if isinstance(value, bool) or not isinstance(value, wanted) or value <= 0:
                raise ModelError(f"the config gives {key} = {value!r}; expected a positive number")
        if not values.get("latent_channels", 16) <= values.get("coefficients", 192) <= BLOCK:
            raise ModelError(f"coefficients must lie between latent_channels and {BLOCK}")
        return cls(**values)


class BlockTransform(nn.Module):
    """An orthonormal basis of blocks of 4 frames x 8 x 8 pixels x RGB, fixed by training's closed-form part.

    Works group by group of four frames, so its temporaries are one group large.
    """

    def __init__(self, coefficients: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.eye(coefficients, BLOCK), requires_grad=False)
        "(K, 768), rows orthonormal; a block's numbers in the order channel, frame, row, column"
        self.mean = nn.Parameter(torch.zeros(BLOCK), requires_grad=False)

    def forward(self, x_BCTHW: Tensor, first: bool) -> Tensor:
        """Pixels (B, 3, T, H, W) to coefficients (B, K, t, H / 8, W / 8); T = 1 + 4 n if ``first``, else 4 n."""
        B, _, T, H, W = x_BCTHW.shape
        weight, bias = self.basis[:, :, None, None], -(self.basis @ self.mean)
        out = x_BCTHW.new_empty((B, len(weight), first + T // FRAMES, H // PIXELS, W // PIXELS))
        for t in range(out.shape[2]):
            if first and t == 0:
                group = x_BCTHW[:, :, :1].expand(-1, -1, FRAMES, -1, -1)
            else:
                start = first + FRAMES * (t - first)
                group = x_BCTHW[:, :, start : start + FRAMES]
            out[:, :, t].copy_(F.conv2d(F.pixel_unshuffle(group.flatten(1, 2), PIXELS), weight, bias))
        return out

    def inverse(self, c_BKthw: Tensor, first: bool) -> Tensor:
        """Coefficients (B, K, t, h, w) to pixels (B, 3, 4 t or 4 t - 3, 8 h, 8 w)."""
        B, _, t, h, w = c_BKthw.shape
        weight = self.basis.T[:, :, None, None]
        out = c_BKthw.new_empty((B, 3, FRAMES * t - (FRAMES - 1) * first, PIXELS * h, PIXELS * w))
        done = 0
        for i in range(t):
            group = F.pixel_shuffle(F.conv2d(c_BKthw[:, :, i], weight, self.mean), PIXELS)
            group = group.view(B, 3, FRAMES, PIXELS * h, PIXELS * w)
            if first and i == 0:
                group = group.mean(dim=2, keepdim=True)
            out[:, :, done : done + group.shape[2]].copy_(group)
            done += group.shape[2]
        return out


class Block(nn.Module):
    """SiLU, 3x3 convolution in space, SiLU, causal convolution over three latent frames, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = CausalConv3d(width, width, (1, 3, 3))
        self.temporal = CausalConv3d(width, width, (3, 1, 1))

    def forward(self, x_BCTHW: Tensor, context: ForwardContext | None) -> Tensor:
        """(B, C, t, h, w) to the same; without a cache, a whole video at once and differentiable."""
        if context is None:
            return x_BCTHW + self.temporal.whole(F.silu(self.spatial.whole(F.silu(x_BCTHW))))
        h = self.spatial(context.attempt(lambda: F.silu(x_BCTHW)), context)
        with Window(self.temporal, context, like=h) as window:
            F.silu(window.new.copy_(h), inplace=True)
            del h
            out = self.temporal.convolve(window, context)
        return out.add_(x_BCTHW)


class _Half(nn.Module):
    """Encoder or decoder: a linear path, and beside it a stem, blocks and a head."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int], *, width: int, num_blocks: int
    ) -> None:
        super().__init__()
        self.stem = CausalConv3d(in_channels, width, kernel)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = CausalConv3d(width, out_channels, 1)
        self.linear = CausalConv3d(in_channels, out_channels, kernel)

    def _both_paths(self, x_BCthw: Tensor, context: ForwardContext | None, attempt: Attempt) -> Tensor:
        h = attempt(lambda: self.stem.whole(x_BCthw))
        for block in self.blocks:
            h = block(h, context)
        return attempt(lambda: self.head.whole(F.silu(h)) + self.linear.whole(x_BCthw))


class Encoder(_Half):
    """Coefficients (B, K, t, h, w) to the mean of the posterior (B, c, t, h, w)."""

    def __init__(self, config: TinyConfig) -> None:
        channels = 2 * config.latent_channels  # two sets: the first frame's, and those of the groups of four
        width, num_blocks = config.encoder_width, config.encoder_blocks
        super().__init__(config.coefficients, channels, 1, width=width, num_blocks=num_blocks)

    def forward(self, c_BKthw: Tensor, context: ForwardContext | None, first: bool) -> Tensor:
        """One chunk, or without a cache a whole video; ``first`` if it starts with the video's first frame."""
        attempt = run_once if context is None else context.attempt
        alone, grouped = self._both_paths(c_BKthw, context, attempt).chunk(2, dim=1)
        return attempt(lambda: torch.cat([alone[:, :, :1], grouped[:, :, 1:]], dim=2)) if first else grouped


class Decoder(_Half):
    """Latents (B, c, t, h, w) to coefficients (B, K, t, h, w)."""

    def __init__(self, config: TinyConfig) -> None:
        channels, width, num_blocks = 2 * config.latent_channels, config.decoder_width, config.decoder_blocks
        super().__init__(channels, config.coefficients, (1, 3, 3), width=width, num_blocks=num_blocks)

    def forward(self, z_BCthw: Tensor, context: ForwardContext | None, first: bool) -> Tensor:
        """One chunk, or without a cache a whole video; ``first`` if it starts with the video's first latent."""
        attempt = run_once if context is None else context.attempt
        return self._both_paths(attempt(lambda: self._two_sets(z_BCthw, first)), context, attempt)

    def _two_sets(self, z_BCthw: Tensor, first: bool) -> Tensor:
        z = F.pad(z_BCthw, (0, 0, 0, 0, 0, 0, z_BCthw.shape[1], 0))  # the groups' set; the first frame's is empty
        if first:
            z = torch.cat([F.pad(z_BCthw[:, :, :1], (0, 0, 0, 0, 0, 0, 0, z_BCthw.shape[1])), z[:, :, 1:]], dim=2)
        return z


class TinyVAE(NativeVAE):
    """The built-in model behind the :class:`~longvid.models.base.CausalVAE` protocol.

    Source: the residual design around a linear block coder is ours; causal convolutions in time as in CogVideoX,
    Yang et al. 2024, arXiv 2408.06072.
    """

    class_name = "LongvidTinyVAE"
    config_class = TinyConfig
    weights_dtype = torch.float32  # stored in float16 to be small, which CPUs are slow in
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: TinyConfig, origin: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, origin)
        self.transform = BlockTransform(config.coefficients)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.geometry = LatentGeometry(
            latent_channels=config.latent_channels,
            frames_per_latent=FRAMES,
            pixels_per_latent=PIXELS,
            chunk_frames=16,
            chunk_invariant=True,
        )

    def _encode(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        first = context.at_start
        coefficients = context.attempt(lambda: self.transform(x_BCTHW, first))
        mean: Tensor = self.encoder(coefficients, context, first)
        log_variance = 2 * math.log(self.config.posterior_std)
        return context.attempt(lambda: torch.cat([mean, torch.full_like(mean, log_variance)], dim=1))

    def _decode(self, z_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        first = context.at_start
        coefficients = self.decoder(z_BCTHW, context, first)
        return context.attempt(lambda: self.transform.inverse(coefficients, first))

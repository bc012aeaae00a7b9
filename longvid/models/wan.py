"""The VAEs of Wan 2.1 (also Wan 2.2 A14B, Qwen-Image, ...) and of Wan 2.2 5B, native.

Modules are those of diffusers' ``AutoencoderKLWan``, and results have numerical parity with it: bit for bit in float64,
for the same chunks. Every norm is of one pixel, so any cut of a video gives the same result, down to one latent.

Three things are special about the start of a video: zeros stand in front of it, its first frame is a latent of its own
and is left out by every layer that halves or doubles time, and in Wan 2.2 it is paired with zeros in the shortcuts.

Source: Wan, 2025, arXiv 2503.20314. Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.memory.buffer_pool import TensorKind
from longvid.models.base import LatentGeometry, NativeVAE
from longvid.models.context import ForwardContext
from longvid.models.layers.attention import FrameAttention
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.layers.pixel_norm import PixelNormSiLU
from longvid.models.layers.resampling import CausalDownsample, CausalUpsample, Downsample, Upsample
from longvid.models.layers.residual import ResnetBlock
from longvid.models.layers.shortcuts import add_repeats, average_shortcut, require_shortcut
from longvid.models.pieces import Forward, Stage

__all__ = ["LATENT_STATISTICS", "WanConfig", "WanVAE"]

LATENT_STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    16: (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
         -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
         2.8251, 1.9160),
    ),
    48: (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
         -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055,
         -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083,
         -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
         0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
         0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
         0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}  # fmt: skip
"""mean and standard deviation of each latent channel by the number of channels, as published with Wan 2.1 and Wan 2.2:
what checkpoints have that carry none"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """The keys of ``config.json`` that decide what is computed, and the latent scaling for the record."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None

    def __post_init__(self) -> None:
        p = self.patch_size or 1
        if self.in_channels != 3 * p * p or self.out_channels != 3 * p * p:
            raise ModelError(
                f"in_channels {self.in_channels} and out_channels {self.out_channels} do not fit RGB in patches of "
                f"{p}x{p}, which have {3 * p * p} channels"
            )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ModelError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries; {len(self.dim_mult)} widths in "
                f"dim_mult have {len(self.dim_mult) - 1} changes of size between them"
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.z_dim:
                raise ModelError(f"{name} has {len(values)} values for {self.z_dim} latent channels")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanConfig:
        """Take what matters from a diffusers ``config.json``; ModelError if it is not one of this family."""
        if config.get("attn_scales"):
            raise ModelError(f"attn_scales {config['attn_scales']!r} is not supported; published models have none")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        if "input_channels" in config:  # of AutoencoderKLQwenImage, for both ends
            values["in_channels"] = values["out_channels"] = config["input_channels"]
        published = LATENT_STATISTICS.get(values.get("z_dim", 16), (None, None))
        for key, default, own in zip(("latents_mean", "latents_std"), LATENT_STATISTICS[16], published, strict=True):
            if values.get(key, default) == default:  # that of diffusers' class, whatever the number of channels is
                values[key] = own
        try:
            made = cls(**values)
        except TypeError as exc:
            raise ModelError(f"the model's config cannot be used: {exc}") from exc
        made._require_ratios(config)
        # one spelling, so that files and folders give the same record
        return replace(made, decoder_base_dim=None) if made.decoder_base_dim == made.base_dim else made

    def _require_ratios(self, config: Mapping[str, Any]) -> None:
        """Raise ModelError for a compression that the modules do not have. The defaults of the class say nothing."""
        ratios = {
            "scale_factor_temporal": (self.frames_per_latent, 4),
            "scale_factor_spatial": (self.pixels_per_latent, 8),
        }
        for key, (actual, default) in ratios.items():
            if config.get(key) not in (None, actual, default):
                raise ModelError(f"the config gives {key} = {config[key]!r}; these modules compress by {actual}")

    @property
    def frames_per_latent(self) -> int:
        """Temporal compression."""
        return 1 << sum(map(bool, self.temperal_downsample))

    @property
    def pixels_per_latent(self) -> int:
        """Spatial compression."""
        return (1 << len(self.temperal_downsample)) * (self.patch_size or 1)


_conv = partial(CausalConv3d, kernel_size=3, initial_context="zeros")
_resnet = partial(ResnetBlock, norm=PixelNormSiLU, initial_context="zeros")


class _Middle(nn.Module):
    """Two residual blocks around attention. A list with names, not a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(width)])

    def layers(self) -> Iterator[nn.Module]:
        """In the order in which they run."""
        yield from (self.resnets[0], self.attentions[0], self.resnets[1])


class _UpBlock(nn.Module):
    """Residual blocks at one resolution and the change to the next one. A list with names, not a layer."""

    def __init__(self, before: int, width: int, num_blocks: int, upsampler: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(width if i else before, width) for i in range(num_blocks))
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])

    def layers(self) -> Iterator[nn.Module]:
        """In the order in which they run."""
        yield from self.resnets
        yield from getattr(self, "upsamplers", ())


class ResidualDownBlock(nn.Module):
    """Residual blocks, the change to a smaller size, and around both a shortcut without weights."""

    def __init__(self, before: int, width: int, num_blocks: int, downsampler: nn.Module | None, *, time: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(width if i else before, width) for i in range(num_blocks))
        self.downsampler, self._width = downsampler, width
        self._time, self._space = 2 if time else 1, 1 if downsampler is None else 2
        require_shortcut(before, width, time=self._time, space=self._space)

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, before, T, H, W) to (B, width, t, h, w). The input is taken over."""
        shortcut = context.attempt(partial(self._shortcut, x_BCTHW, context))
        for layer in self.resnets:
            x_BCTHW = layer(x_BCTHW, context)
        if self.downsampler is not None:
            x_BCTHW = self.downsampler(x_BCTHW, context)
        return x_BCTHW.add_(shortcut)

    def _shortcut(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        B, _, T, H, W = x_BCTHW.shape
        shape = (B, self._width, -(-T // self._time), H // self._space, W // self._space)
        out = context.buffers.take(shape, TensorKind.of(x_BCTHW))
        return average_shortcut(x_BCTHW, out, time=self._time, space=self._space)


class ResidualUpBlock(nn.Module):
    """Residual blocks, the change to a larger size if there is one, and then around both a shortcut without weights."""

    def __init__(self, before: int, width: int, num_blocks: int, upsampler: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(width if i else before, width) for i in range(num_blocks))
        self.upsampler = upsampler
        self._time, self._space = 2 if isinstance(upsampler, CausalUpsample) else 1, 2
        if upsampler is not None:
            require_shortcut(width, before, time=self._time, space=self._space)

    def forward(self, x_BCTHW: Tensor, context: ForwardContext, latent: Tensor | None = None) -> Tensor:
        """(B, before, t, h, w) to (B, width, T, H, W). The input is taken over."""
        h = x_BCTHW
        if self.upsampler is not None and not hasattr(self.resnets[0], "conv_shortcut"):
            h = context.attempt(h.clone)  # the first block adds to its input in place
        if self.upsampler is None:
            del x_BCTHW
        for layer in self.resnets:
            h = layer(h, context)
        if self.upsampler is not None:
            h = self.upsampler(h, context)
            add_repeats(x_BCTHW, h, time=self._time, space=self._space, attempt=context.attempt)
        return h


class _Half(nn.Module, ABC):
    """Encoder or decoder: a convolution, layers in a row, a norm and a convolution."""

    conv_in: CausalConv3d
    norm_out: PixelNormSiLU
    conv_out: CausalConv3d

    @abstractmethod
    def _stages(self) -> Iterator[Stage]:
        """All layers, cut where the size of frames changes."""

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """One chunk. The loop is flat so that no caller up the stack keeps a layer's input alive."""
        stages = list(self._stages())
        calls = [call for stage in stages for call in stage.calls]
        for step in stages if context.limits.pieces == "stages" else calls:
            x = step(x, context)
        return x

    def _finish(self, x: Tensor, context: ForwardContext) -> Tensor:
        normed = self.norm_out.fit(x)
        del x
        return self.conv_out.stream(normed, context)

    def _stage(self, layers: list[nn.Module], widest: int, time: Fraction, *, first: bool, last: bool) -> Stage:
        front, end = [self.conv_in] * first, [self.norm_out, self.conv_out] * last
        calls: list[Forward] = [*front, *layers, *[self._finish] * last]
        return Stage(modules=[*front, *layers, *end], calls=calls, widest=widest, time=time)


class Encoder(_Half):
    """Pixels, or patches of them (B, C, T, H, W), to moments (B, 2 x latent channels, t, h, w)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.base_dim
        self.conv_in = _conv(config.in_channels, width)
        self.down_blocks = nn.ModuleList()
        for factor, time in zip(config.dim_mult, (*config.temperal_downsample, None), strict=True):
            before, width = width, config.base_dim * factor
            down: nn.Module | None = None
            if time is not None:
                down = CausalDownsample(width) if time else Downsample(width, time=False)
            if config.is_residual:
                block = ResidualDownBlock(before, width, config.num_res_blocks, down, time=bool(time))
                self.down_blocks.append(block)
            else:
                self.down_blocks.extend(_resnet(width if i else before, width) for i in range(config.num_res_blocks))
                self.down_blocks.extend(filter(None, [down]))
        self.mid_block = _Middle(width)
        self.norm_out = PixelNormSiLU(width)
        self.conv_out = _conv(width, 2 * config.z_dim)

    def _stages(self) -> Iterator[Stage]:
        layers: list[nn.Module] = []
        first = True
        for layer in self.down_blocks:
            layers.append(layer)
            down = layer.downsampler if isinstance(layer, ResidualDownBlock) else layer
            if isinstance(down, (Downsample, CausalDownsample)):
                width = (down.space if isinstance(down, CausalDownsample) else down).conv.in_channels
                time = Fraction(1, 2 if isinstance(down, CausalDownsample) else 1)
                yield self._stage(layers, width, time, first=first, last=False)
                layers, first = [], False
        layers += self.mid_block.layers()
        yield self._stage(layers, self.conv_out.conv.in_channels, Fraction(1), first=first, last=True)


class Decoder(_Half):
    """Latents (B, c, t, h, w) to pixels, or patches of them (B, C, T, H, W)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in reversed(config.dim_mult)]
        before = widths[0]
        self.conv_in = _conv(config.z_dim, before)
        self.mid_block = _Middle(before)
        self.up_blocks = nn.ModuleList()
        for width, time in zip(widths, (*reversed(config.temperal_downsample), None), strict=True):
            after = width if config.is_residual else width // 2
            up: nn.Module | None = None
            if time is not None:
                up = CausalUpsample(width, after) if time else Upsample(width, after, time=False, through_float32=True)
            block = ResidualUpBlock if config.is_residual else _UpBlock
            self.up_blocks.append(block(before, width, config.num_res_blocks + 1, up))
            before = after
        self.norm_out = PixelNormSiLU(width)
        self.conv_out = _conv(width, config.out_channels)

    def _stages(self) -> Iterator[Stage]:
        layers: list[nn.Module] = [*self.mid_block.layers()]
        widest, time, first = self.conv_in.conv.out_channels, Fraction(1), True
        for block in self.up_blocks:
            for layer in block.layers() if isinstance(block, _UpBlock) else [block]:
                up = layer.upsampler if isinstance(layer, ResidualUpBlock) else layer
                if isinstance(up, (Upsample, CausalUpsample)):  # what is enlarged never exists as a whole
                    yield self._stage(layers, widest, time, first=first, last=False)
                    layers, first = [], False
                    time = Fraction(2 if isinstance(up, CausalUpsample) else 1)
                    space = up.space if isinstance(up, CausalUpsample) else up
                    widest = 4 * int(time) * space.conv.out_channels
                layers.append(layer)
        yield self._stage(layers, widest, time, first=first, last=True)


class WanVAE(NativeVAE):
    """Encoder and decoder of Wan behind the :class:`~longvid.models.base.CausalVAE` protocol."""

    class_name = "AutoencoderKLWan"
    other_names = ("AutoencoderKLQwenImage",)
    config_class = WanConfig
    runs_in_pieces = True
    config: WanConfig

    def __init__(self, config: WanConfig, origin: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, origin)
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.geometry = LatentGeometry(
            latent_channels=config.z_dim,
            frames_per_latent=config.frames_per_latent,
            pixels_per_latent=config.pixels_per_latent,
            chunk_frames=2 * config.frames_per_latent,
            chunk_invariant=True,
        )

    def _encode(self, x_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        if self.config.patch_size is not None:
            x_BCTHW = context.attempt(partial(_patches, x_BCTHW, self.config.patch_size, context))
        moments: Tensor = self.quant_conv(self.encoder(x_BCTHW, context), context)
        return moments

    def _decode(self, z_BCTHW: Tensor, context: ForwardContext) -> Tensor:
        x: Tensor = self.decoder(self.post_quant_conv(z_BCTHW, context), context)
        if self.config.patch_size is not None:
            x = context.attempt(partial(_pixels, x, self.config.patch_size, context))
        return x.clamp_(-1.0, 1.0)

    def checkpoint_names(self) -> dict[str, str]:
        """The name that each weight has in a checkpoint in diffusers format, by its name here."""
        names = {name: name for name in self.state_dict()}
        for path, module in self.named_modules():
            theirs = path
            if isinstance(module, (Downsample, Upsample)):
                theirs = f"{path.removesuffix('.space')}.resample.1"
            elif not isinstance(module, CausalConv3d):
                continue
            for end in ("weight", "bias"):
                names[f"{path}.conv.{end}"] = f"{theirs}.{end}"
        return names

    @property
    def scaling(self) -> dict[str, Any]:
        """The facts that turn raw latents into those that diffusion models see: (z - mean) / std, by channel."""
        keys = ("latents_mean", "latents_std")
        return {**super().scaling, **{key: getattr(self.config, key) for key in keys}}


def _patches(x_BCTHW: Tensor, size: int, context: ForwardContext) -> Tensor:
    """Patches of pixels to channels, in the order pixel channel, column, row."""
    B, C, T, H, W = x_BCTHW.shape
    out = context.buffers.take((B, C * size * size, T, H // size, W // size), TensorKind.of(x_BCTHW))
    _in_patches(out, size).copy_(_of_pixels(x_BCTHW, size))
    return out


def _pixels(x_BCTHW: Tensor, size: int, context: ForwardContext) -> Tensor:
    """The opposite of :func:`_patches`."""
    B, C, T, H, W = x_BCTHW.shape
    out = context.buffers.take((B, C // size**2, T, H * size, W * size), TensorKind.of(x_BCTHW))
    _of_pixels(out, size).copy_(_in_patches(x_BCTHW, size))
    return out


def _in_patches(x_BCTHW: Tensor, size: int) -> Tensor:
    """(B, channels, column, row, T, h, w), a view."""
    B, C, T, H, W = x_BCTHW.shape
    return x_BCTHW.view(B, C // size**2, size, size, T, H, W)


def _of_pixels(x_BCTHW: Tensor, size: int) -> Tensor:
    """The same of pixels (B, C, T, H, W)."""
    B, C, T, H, W = x_BCTHW.shape
    return x_BCTHW.view(B, C, T, H // size, size, W // size, size).permute(0, 1, 6, 4, 2, 3, 5)

"""The layers that causal video VAEs are built from.

Two rules keep memory low. A layer that feeds a causal convolution takes ``out=`` and writes into that convolution's
window. Everything that works frame by frame (norms, resampling, 1x1 shortcuts) does so in a loop over frames, so its
temporaries are one frame large.

A third rule makes a device that runs out of memory survivable: what takes memory and is harmless to repeat is called
through :meth:`~longvid.cache.ConvCache.attempt`.

The layers are for inference: they write in place and are not differentiable. The exception is
:meth:`CausalConv3d.whole`, which small models that are trained here are built on.

Axes: B batch, C channels, T time, H height, W width; lower-case t h w are those of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.cache import ConvCache, Window

__all__ = [
    "CausalConv3d",
    "Downsample",
    "GroupNormSiLU",
    "NormAffine",
    "ResnetBlock",
    "SpatialNormSiLU",
    "Upsample",
    "group_moments",
    "time_pieces",
]


def time_pieces(num_frames: int, *, context_frames: int, in_frame: int, out_frame: int, limit: int) -> list[range]:
    """Cut the output frames of a causal convolution so that no tensor of a piece exceeds ``limit`` elements.

    The piece for output frames ``[a, b)`` reads the window's frames ``[a, b + context_frames)``, so no piece is
    ever shorter than the kernel, however large a frame is.

    Args:
        num_frames: output frames.
        context_frames: kernel size in time minus 1.
        in_frame: elements of one input frame, batch and channels included.
        out_frame: elements of one output frame, likewise.
        limit: most elements of a piece's input or output; a single output frame is never cut further.
    """
    longest = max(1, min(limit // in_frame - context_frames, limit // out_frame))
    num_pieces = -(-num_frames // longest)
    edges = [num_frames * i // num_pieces for i in range(num_pieces + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


class CausalConv3d(nn.Module):
    """A 3-D convolution whose output at frame t sees input frames up to t only.

    Height and width keep their size (zero padding). In time the k - 1 frames before the chunk come from the
    :class:`~longvid.cache.ConvCache`; in front of the first frame of a video stands that frame again
    (``initial_context="repeat"``) or zeros.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps in time, height and width; one number for all three. Odd in height and width.
        bias: whether the convolution adds a bias.
        initial_context: see above.

    Source: CogVideoX, Yang et al. 2024, arXiv 2408.06072, section 2.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        bias: bool = True,
        initial_context: Literal["repeat", "zeros"] = "repeat",
    ) -> None:
        super().__init__()
        kt, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        if kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"kernel size {kernel_size} is even in height or width; the size would not be kept")
        self.context_frames = kt - 1
        self.initial_context = initial_context
        self.conv = nn.Conv3d(in_channels, out_channels, (kt, kh, kw), padding=(0, kh // 2, kw // 2), bias=bias)

    def forward(self, x_BCTHW: Tensor, cache: ConvCache) -> Tensor:
        """Convolve T new frames into T output frames. Prefer writing into the window: see ConvCache."""
        if self.context_frames == 0:
            return cache.attempt(lambda: self._conv(x_BCTHW))
        with cache.window(self, like=x_BCTHW) as window:
            window.new.copy_(x_BCTHW)
            return self.convolve(window)

    def whole(self, x_BCTHW: Tensor) -> Tensor:
        """Convolve a whole video at once, without a cache. Differentiable; for training."""
        if self.context_frames:
            first = x_BCTHW[:, :, :1] if self.initial_context == "repeat" else torch.zeros_like(x_BCTHW[:, :, :1])
            x_BCTHW = torch.cat([first] * self.context_frames + [x_BCTHW], dim=2)
        return self._conv(x_BCTHW)

    def convolve(self, window: Window) -> Tensor:
        """Convolve a window whose new frames are written; in pieces over time where it is too large for one call."""
        x = window.input()
        B, C, frames, H, W = x.shape
        T, area, out_channels = frames - self.context_frames, B * H * W, self.conv.out_channels
        pieces = time_pieces(
            T,
            context_frames=self.context_frames,
            in_frame=C * area,
            out_frame=out_channels * area,
            limit=window.max_conv_elements,
        )
        if len(pieces) == 1:
            return window.attempt(lambda: self._conv(x))

        def in_pieces() -> Tensor:
            out = x.new_empty((B, out_channels, T, H, W))
            for piece in pieces:
                out[:, :, piece.start : piece.stop].copy_(
                    self._conv(x[:, :, piece.start : piece.stop + self.context_frames])
                )
            return out

        return window.attempt(in_pieces)

    def _conv(self, x: Tensor) -> Tensor:
        """The convolution, without padding in time.

        A kernel that is flat in time or in space runs as the 2-D convolution that it is: on a CPU PyTorch's 3-D one
        is up to ten times slower for small float32 inputs (channels x frames x height up to 20,480).
        """
        kt, kh, kw = self.conv.kernel_size
        weight, bias = self.conv.weight, self.conv.bias
        B, _, T, H, W = x.shape
        if kt == 1 and kh * kw > 1:
            frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, padding=(kh // 2, kw // 2))
            return frames.view(B, T, -1, H, W).transpose(1, 2)
        if kt > 1 and kh * kw == 1:
            return F.conv2d(x.flatten(3), weight[..., 0], bias).view(B, -1, T - kt + 1, H, W)
        out: Tensor = self.conv(x)
        return out


@dataclass(frozen=True, slots=True)
class NormAffine:
    """A norm reduced to what one pass over the frames applies: x * scale + shift, then * y + b if there are maps.

    Made before the next convolution's window is opened, so that the statistics and the window do not add up.
    """

    scale_BC: Tensor
    shift_BC: Tensor
    maps: tuple[Tensor, Tensor] | None = None
    "y and b at the latent's size, (B, C, t, h, w)"

    def write_silu(self, x_BCTHW: Tensor, out: Tensor) -> None:
        """Write silu(norm(x)) into ``out``, a tensor of x's shape and dtype, frame by frame.

        The norm is computed in float32. Below float32 every step is rounded where plain PyTorch modules round it,
        so the result is theirs bit for bit on a CPU.
        """
        B, C, T, H, W = x_BCTHW.shape
        scale, shift = self.scale_BC[:, :, None, None], self.shift_BC[:, :, None, None]
        narrow = out.dtype != torch.float32
        wide = torch.empty((B, C, H, W), dtype=torch.float32, device=x_BCTHW.device) if narrow else None
        for t in range(T):
            frame = out[:, :, t]
            if wide is None:
                torch.addcmul(shift, x_BCTHW[:, :, t], scale, out=frame)
            else:
                wide.copy_(x_BCTHW[:, :, t])
                frame.copy_(torch.addcmul(shift, wide, scale, out=wide))
            if self.maps is not None:
                _modulate(frame, *(m[:, :, _latent_frame(t, T, m.shape[2])] for m in self.maps))
            F.silu(frame, inplace=True)


def _norm_affine(norm: nn.GroupNorm, x: Tensor, maps: tuple[Tensor, Tensor] | None = None) -> NormAffine:
    """Statistics over the chunk, folded with the norm's own weight and bias, in float32."""
    mean, rstd = group_moments(x, norm.num_groups, norm.eps)
    repeats = x.shape[1] // norm.num_groups
    scale = rstd.repeat_interleave(repeats, dim=1).mul_(norm.weight.float())
    # addcmul, not a product and a sum: it rounds once, as the kernels of torch.group_norm do.
    shift = torch.addcmul(norm.bias.float(), mean.repeat_interleave(repeats, dim=1), scale, value=-1)
    return NormAffine(scale, shift, maps)


def group_moments(x_BCTHW: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each group over a chunk, (B, groups) each, in float32."""
    B, C, T, H, W = x_BCTHW.shape
    if x_BCTHW.dtype != torch.float32 and x_BCTHW.device.type not in ("cpu", "meta"):
        return _moments_by_frame(x_BCTHW, num_groups, eps)
    # float32 weights make the kernel return float32 moments; other devices' kernels do not take the mixture.
    weight = torch.ones(C, dtype=torch.float32, device=x_BCTHW.device)
    bias = torch.zeros_like(weight)
    if x_BCTHW.is_meta:  # its kernel would give moments of x's dtype: allocate what the real one does
        _normed = torch.empty_like(x_BCTHW)
        mean, rstd = weight.new_empty((B, num_groups)), weight.new_empty((B, num_groups))
    else:
        _normed, mean, rstd = torch.native_group_norm(x_BCTHW, weight, bias, B, C, T * H * W, num_groups, eps)
    return mean, rstd


def _moments_by_frame(x_BCTHW: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The same with one frame of memory: two passes within a frame, frames joined as Chan, Golub and LeVeque do."""
    B, C, T, H, W = x_BCTHW.shape
    frame = torch.empty((B, num_groups, C // num_groups * H * W), dtype=torch.float32, device=x_BCTHW.device)
    means, squares = [], []
    for t in range(T):
        frame.view(B, C, H, W).copy_(x_BCTHW[:, :, t])
        mean = frame.mean(dim=-1)
        means.append(mean)
        squares.append(torch.linalg.vector_norm(frame.sub_(mean[..., None]), dim=-1).square_())
    mean_T = torch.stack(means)
    mean = mean_T.mean(dim=0)
    variance = torch.stack(squares).sum(dim=0).div_(T * frame.shape[-1])
    variance += (mean_T - mean).square_().mean(dim=0)
    return mean, (variance + eps).rsqrt_()


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm over the frames of a chunk, then SiLU, written where the next convolution reads."""

    def fit(self, x_BCTHW: Tensor, latent: Tensor | None = None) -> NormAffine:
        """First pass: the statistics of x. Second pass: :meth:`NormAffine.write_silu`."""
        return _norm_affine(self, x_BCTHW)


class SpatialNormSiLU(nn.Module):
    """GroupNorm whose scale and offset are 1x1 convolutions of the latent, then SiLU.

    A 1x1 convolution commutes with nearest interpolation, so both maps are computed at the latent's size and only
    read at the feature map's: nothing is interpolated.

    Source: MoVQ, Zheng et al. 2022, arXiv 2209.09002, as used in CogVideoX.
    """

    def __init__(self, channels: int, latent_channels: int, *, num_groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, eps=eps)
        self.conv_y = CausalConv3d(latent_channels, channels, 1)
        self.conv_b = CausalConv3d(latent_channels, channels, 1)

    def fit(self, x_BCTHW: Tensor, latent: Tensor | None = None) -> NormAffine:
        """First pass: the statistics of x and the maps of the latent (B, c, t, h, w), which this norm needs."""
        if latent is None:
            raise ValueError("a spatial norm is steered by a latent; none was given")
        return _norm_affine(self.norm_layer, x_BCTHW, (self.conv_y.conv(latent), self.conv_b.conv(latent)))


def _latent_frame(t: int, num_frames: int, num_latents: int) -> int:
    """The latent frame that feature frame ``t`` belongs to: the first one alone when the chunk has it."""
    if num_frames > 1 and num_frames % 2 == 1:
        return 0 if t == 0 else 1 + (t - 1) * (num_latents - 1) // (num_frames - 1)
    return t * num_latents // num_frames


def _modulate(frame_BCHW: Tensor, scale_BChw: Tensor, offset_BChw: Tensor) -> None:
    """frame * scale + offset in place, both maps read as if enlarged to the frame by nearest neighbour."""
    B, C, H, W = frame_BCHW.shape
    h, w = scale_BChw.shape[-2:]
    rows = frame_BCHW.view(B, C, h, H // h, W)
    # Enlarged along the width only, so that the innermost loop of the kernels is a whole row.
    rows.mul_(scale_BChw.repeat_interleave(W // w, dim=-1)[:, :, :, None])
    rows.add_(offset_BChw.repeat_interleave(W // w, dim=-1)[:, :, :, None])


class ResnetBlock(nn.Module):
    """norm, SiLU, causal conv, twice, plus the input or its 1x1 projection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_groups: groups of the norms.
        eps: epsilon of plain norms.
        latent_channels: channels of the latent that steers the norms; None for plain ones.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, num_groups: int, eps: float, latent_channels: int | None = None
    ) -> None:
        super().__init__()

        def norm(channels: int) -> GroupNormSiLU | SpatialNormSiLU:
            if latent_channels is None:
                return GroupNormSiLU(num_groups, channels, eps=eps)
            return SpatialNormSiLU(channels, latent_channels, num_groups=num_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x_BCTHW: Tensor, cache: ConvCache, latent: Tensor | None = None) -> Tensor:
        """(B, in, T, H, W) to (B, out, T, H, W). Alive at the peak: the input, one window and one output."""
        affine = cache.attempt(partial(self.norm1.fit, x_BCTHW, latent))
        with cache.window(self.conv1, like=x_BCTHW) as window:
            cache.attempt(partial(affine.write_silu, x_BCTHW, window.new))
            h = self.conv1.convolve(window)
        affine = cache.attempt(partial(self.norm2.fit, h, latent))
        with cache.window(self.conv2, like=h) as window:
            cache.attempt(partial(affine.write_silu, h, window.new))
            del h
            h = self.conv2.convolve(window)
        if not hasattr(self, "conv_shortcut"):
            return h.add_(x_BCTHW)
        for t in range(h.shape[2]):
            h[:, :, t].add_(self._shortcut(x_BCTHW[:, :, t], cache))
        return h

    def _shortcut(self, frame_BCHW: Tensor, cache: ConvCache) -> Tensor:
        weight, bias = self.conv_shortcut.weight[:, :, 0], self.conv_shortcut.bias
        return cache.attempt(lambda: F.conv2d(frame_BCHW, weight, bias))


class Downsample(nn.Module):
    """Half the height and width by a strided convolution, and half the frames by averaging pairs if asked.

    A chunk with an odd number of frames starts with the video's first frame, which stays alone.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = time

    def forward(self, x_BCTHW: Tensor, cache: ConvCache, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, T / 2 or T, H / 2, W / 2)."""
        return cache.attempt(lambda: self._downsample(x_BCTHW))

    def _downsample(self, x_BCTHW: Tensor) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        if not self.time:
            sources = [(t, t) for t in range(T)]
        else:
            sources = [(0, 0)] * (T % 2) + [(t, t + 1) for t in range(T % 2, T, 2)]
        out = x_BCTHW.new_empty((B, C, len(sources), H // 2, W // 2))
        for t, (first, second) in enumerate(sources):
            frame = x_BCTHW[:, :, first]
            if second != first:
                frame = (frame + x_BCTHW[:, :, second]).mul_(0.5)
            out[:, :, t].copy_(self.conv(F.pad(frame, (0, 1, 0, 1))))
        return out


class Upsample(nn.Module):
    """Double the height and width, and the frames if asked, by nearest neighbour; then a 2-D convolution.

    The convolution of a doubled frame is computed once and written twice. The first frame of a video stays alone.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = time

    def forward(self, x_BCTHW: Tensor, cache: ConvCache, latent: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C, T, 2 T - 1 or 2 T, 2 H, 2 W)."""
        return cache.attempt(lambda: self._upsample(x_BCTHW))

    def _upsample(self, x_BCTHW: Tensor) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        copies = [1] * T if not self.time or T == 1 else [1] * (T % 2) + [2] * (T - T % 2)
        out = x_BCTHW.new_empty((B, C, sum(copies), 2 * H, 2 * W))
        done = 0
        for t, count in enumerate(copies):
            frame = self.conv(F.interpolate(x_BCTHW[:, :, t], scale_factor=2.0, mode="nearest"))
            out[:, :, done : done + count].copy_(frame[:, :, None].expand(-1, -1, count, -1, -1))
            done += count
        return out

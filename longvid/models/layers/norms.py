"""Norm and activation in two passes: statistics of a chunk, then silu(norm(x)) written where a convolution reads.

A norm of a chunk is fitted once and written block by block, into the window of the convolution behind it. Statistics
are of the whole chunk, whatever its blocks are, and values are computed in slabs that no block cuts: blocks never
change a bit.

Two layouts, two ways to the same numbers:

* contiguous on a CPU: moments from ``torch.native_group_norm``, rounding where plain modules round. Bit for bit what
  they give (decision 2).
* channels last: moments of every channel in one pass without an output, joined to groups. In float32 the maps of a
  spatial norm are folded into its scale and shift at the size of the latent; narrower dtypes round between norm, maps
  and activation, as plain modules do. Results may differ in the last bits.

Axes: B batch, C channels, T time, H height, W width; lower-case t h w are those of a latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.memory.buffer_pool import layout_of
from longvid.models.kernels import triton_norms

__all__ = ["Fitted", "GroupNormSiLU", "Producer", "SpatialNormSiLU", "group_moments"]

SLAB_BYTES = 2**20
"size of a slab, on a CPU: what stays in a core's cache from one operation on it to the next"
_NORM_CALLS = 4
"in how many parts moments are gathered where the kernel writes a copy that nobody needs"


class Producer:
    """Writes the input of a convolution, any part of it, into the convolution's window; this one has it already.

    Args:
        x_BCTHW: what it reads, which has the shape, dtype, device and layout of that input; held until :meth:`release`.
    """

    def __init__(self, x_BCTHW: Tensor) -> None:
        self.like = x_BCTHW
        self.row_step = 1
        "rows that are computed at once, counted from the first: row tiles begin there, so that they change no bit"

    def release(self) -> None:
        """Let go of what it reads; it cannot write any more."""
        del self.like

    def write(self, frames: range, rows: range, out_BCTHW: Tensor) -> None:
        """Write these rows of these frames of the input into ``out`` (B, C, frames, rows, W). Harmless to repeat.

        Rows begin at a multiple of ``row_step``, and end there or with the frame.
        """
        out_BCTHW.copy_(self.like[:, :, frames.start : frames.stop, rows.start : rows.stop])


class Fitted(Producer):
    """silu(norm(x)) of a chunk whose statistics are known and whose values are not computed yet.

    Args:
        x_BCTHW: what is normalised.
        scale_BC: float32, the norm's own weight in it.
        shift_BC: float32; the norm is x * scale + shift.
        maps: y and b at the latent's size, (B, C, t, h, w): the norm is then multiplied by y, and b added.
    """

    def __init__(
        self, x_BCTHW: Tensor, scale_BC: Tensor, shift_BC: Tensor, maps: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(x_BCTHW)
        self._scale, self._shift, self._maps = scale_BC, shift_BC, maps
        # A kernel processes most elements as vectors and those at the ends one by one, which may differ in the last
        # bits. So each call is for a slab of one frame, whatever slices and row tiles there are: what stays in a core's
        # cache from one operation to the next, and whole rows of the maps.
        _, C, _, H, W = x_BCTHW.shape
        repeat = 1 if maps is None else H // maps[0].shape[3]
        self.row_step = max(repeat, SLAB_BYTES // (C * W * x_BCTHW.element_size()) // repeat * repeat)
        self._triton = triton_norms.available(x_BCTHW)
        self._folded: tuple[Tensor, Tensor] | None = None
        last = layout_of(x_BCTHW) == torch.channels_last_3d and not self._triton
        if maps is not None and last and x_BCTHW.dtype == torch.float32:
            # (x s + t) y + b = x (s y) + (t y + b)
            y, b = (m.to(torch.float32, memory_format=torch.channels_last_3d) for m in maps)
            scale, shift = (vector[:, :, None, None, None] for vector in (scale_BC, shift_BC))
            self._folded = (y * scale, torch.addcmul(b, y, shift))

    def write(self, frames: range, rows: range, out_BCTHW: Tensor) -> None:
        """Write silu(norm(x)) of these frames and rows; see :meth:`Producer.write`."""
        x = self.like[:, :, frames.start : frames.stop, rows.start : rows.stop]
        if self._triton:
            self._write_triton(x, out_BCTHW, frames, rows)
        elif layout_of(self.like) == torch.channels_last_3d:
            self._write_slabs(x, out_BCTHW, frames, rows)
        else:
            self._write_frames(x, out_BCTHW, frames, rows)

    def _write_triton(self, x: Tensor, out: Tensor, frames: range, rows: range) -> None:
        maps = self._maps_of(rows)
        # Its kernel wants frames that lie one behind the other: row tiles go frame by frame.
        step = len(frames) if triton_norms.is_channels_last(x) and triton_norms.is_channels_last(out) else 1
        for i in range(0, len(frames), step):
            part = slice(i, i + step)
            latents = None if maps is None else [self._latent_frame(t) for t in frames[part]]
            triton_norms.apply_silu(x[:, :, part], out[:, :, part], self._scale, self._shift, maps, latents)

    def _write_slabs(self, x: Tensor, out: Tensor, frames: range, rows: range) -> None:
        """In channels last, slab by slab, one operation after the other on each."""
        # Mean and variance that change nothing, and two places for statistics that nobody asks for.
        zeros = torch.zeros_like(self._scale[0])
        constants = zeros, torch.ones_like(zeros), zeros.new_empty(0), zeros.new_empty(0)
        if x.is_meta:  # nothing more is allocated
            return
        step = self.row_step if x.is_cpu else len(rows)
        for i, t in enumerate(frames):
            for start in range(rows.start, rows.stop, step):
                slab = range(start, min(start + step, rows.stop))
                inner = slice(slab.start - rows.start, slab.stop - rows.start)
                self._write_slab(x[:, :, i, inner], out[:, :, i, inner], self._maps_of(slab, t), constants)

    def _write_frames(self, x: Tensor, out: Tensor, frames: range, rows: range) -> None:
        """Frame by frame, rounded where plain modules round."""
        scale, shift = self._scale[:, :, None, None], self._shift[:, :, None, None]
        B, C, _, H, W = x.shape
        wide = None if out.dtype == torch.float32 else torch.empty((B, C, H, W), dtype=torch.float32, device=x.device)
        for i, t in enumerate(frames[:1] if x.is_meta else frames):  # all of them allocate and free the same
            frame = out[:, :, i]
            if wide is None:
                torch.addcmul(shift, x[:, :, i], scale, out=frame)
            else:
                wide.copy_(x[:, :, i])
                frame.copy_(torch.addcmul(shift, wide, scale, out=wide))
            maps = self._maps_of(rows, t)
            if maps is not None:
                _modulate(frame, *maps)
            F.silu(frame, inplace=True)

    def _write_slab(
        self, x_BCHW: Tensor, out_BCHW: Tensor, maps: tuple[Tensor, Tensor] | None, constants: tuple[Tensor, ...]
    ) -> None:
        """Rows of one frame. Of a narrow dtype, batch norm with given statistics (0 and 1) is the kernel that computes
        x * scale + shift in float32 and rounds once.
        """
        for batch in range(len(x_BCHW)):
            one = slice(batch, batch + 1)
            slab, target = x_BCHW[one], out_BCHW[one]
            if x_BCHW.dtype != torch.float32:
                scale, shift, (mean, variance, *unused) = self._scale[batch], self._shift[batch], constants
                written = (target, *unused)
                torch.native_batch_norm(slab, scale, shift, mean, variance, False, 0.0, 0.0, out=written)
                slab = target
            elif maps is None:
                torch.addcmul(self._shift[one, :, None, None], slab, self._scale[one, :, None, None], out=target)
            if maps is not None:
                _multiply_add(slab, maps[0][one], maps[1][one], out=target)
            F.silu(target, inplace=True)

    def _maps_of(self, rows: range, t: int | None = None) -> tuple[Tensor, Tensor] | None:
        """What rows of feature frame ``t``, or of all frames, read of the maps; folded if they are."""
        maps = self._folded or self._maps
        if maps is None:
            return None
        repeat = self.like.shape[3] // maps[0].shape[3]
        y, b = (m[:, :, :, rows.start // repeat : rows.stop // repeat] for m in maps)
        return (y, b) if t is None else (y[:, :, self._latent_frame(t)], b[:, :, self._latent_frame(t)])

    def _latent_frame(self, t: int) -> int:
        """The latent frame that feature frame ``t`` belongs to: the first one alone when the chunk has it."""
        assert self._maps is not None
        num_frames, num_latents = self.like.shape[2], self._maps[0].shape[2]
        if num_frames > 1 and num_frames % 2 == 1:
            return 0 if t == 0 else 1 + (t - 1) * (num_latents - 1) // (num_frames - 1)
        return t * num_latents // num_frames


def _fit(norm: nn.GroupNorm, x: Tensor, maps: tuple[Tensor, Tensor] | None) -> Fitted:
    """Statistics over the chunk, folded with the norm's own weight and bias, in float32."""
    mean, rstd = group_moments(x, norm.num_groups, norm.eps)
    repeats = x.shape[1] // norm.num_groups
    scale = rstd.repeat_interleave(repeats, dim=1).mul_(norm.weight.float())
    # addcmul, not a product and a sum: it rounds once, as the kernels of torch.group_norm do.
    shift = torch.addcmul(norm.bias.float(), mean.repeat_interleave(repeats, dim=1), scale, value=-1)
    return Fitted(x, scale, shift, maps)


def group_moments(x_BCTHW: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each group over a chunk, (B, groups) each, in float32."""
    if triton_norms.available(x_BCTHW):
        return _groups_of_channels(*triton_norms.channel_moments(x_BCTHW), num_groups, eps)
    if x_BCTHW.device.type not in ("cpu", "meta"):
        return _moments_by_frame(x_BCTHW, num_groups, eps)
    if layout_of(x_BCTHW) == torch.channels_last_3d:
        return _groups_of_channels(*_channel_moments(x_BCTHW), num_groups, eps)
    return _native_moments(x_BCTHW, num_groups, eps)


def _native_moments(x_BCTHW: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """From PyTorch's own kernel, a few groups at a time, since it also writes the normed values, which are not used."""
    B, C, T, H, W = x_BCTHW.shape
    at_once = -(-num_groups // _NORM_CALLS)
    mean = torch.empty((B, num_groups), dtype=torch.float32, device=x_BCTHW.device)
    rstd = torch.empty_like(mean)
    for batch in range(B):
        parts = torch.split(x_BCTHW[batch : batch + 1], at_once * (C // num_groups), dim=1)
        for part, *moments in zip(parts, *(torch.split(m[batch], at_once) for m in (mean, rstd)), strict=True):
            width, num = part.shape[1], len(moments[0])
            # float32 weights make the kernel return float32 moments, unrounded.
            weight = torch.ones(width, dtype=torch.float32, device=part.device)
            bias = torch.zeros_like(weight)
            if part.is_meta:  # its kernel would give moments of x's dtype: allocate what the real one does
                normed = torch.empty_like(part), weight.new_empty((1, num)), weight.new_empty((1, num))
            else:
                normed = torch.native_group_norm(part, weight, bias, 1, width, T * H * W, num, eps)
            for target, found in zip(moments, normed[1:], strict=True):
                target.copy_(found[0])
            del normed, found
            if part.is_meta:  # the other parts allocate the same
                return mean, rstd
    return mean, rstd


def _channel_moments(x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over a chunk in channels last, (B, C) each, float64; one pass, no output.

    Frame by frame, which bounds the float32 sums; frames are joined in float64 as Chan, Golub and LeVeque do.
    """
    B, C, T = x_BCTHW.shape[:3]
    shape, device = (B, T, C), x_BCTHW.device
    means, variances = (torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2))
    # The running statistics are not wanted, but float32 ones make the kernel return float32 moments.
    running = torch.zeros(C, dtype=torch.float32, device=device), torch.ones(C, dtype=torch.float32, device=device)
    for batch in range(B):
        for t in range(1 if x_BCTHW.is_meta else T):  # all of them allocate and free the same
            frame = x_BCTHW[batch : batch + 1, :, t]
            if frame.is_meta:
                mean, variance = (torch.empty_like(running[0]) for _ in range(2))
            else:
                mean, variance = torch.batch_norm_update_stats(frame, *running, 0.0)
            means[batch, t], variances[batch, t] = mean, variance
    mean = means.mean(dim=1)
    return mean, variances.mean(dim=1) + (means - mean[:, None]).square_().mean(dim=1)


def _groups_of_channels(mean_BC: Tensor, variance_BC: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of groups of equally long channels, float32."""
    mean_BGc, variance_BGc = (m.double().view(len(m), num_groups, -1) for m in (mean_BC, variance_BC))
    mean = mean_BGc.mean(dim=2)
    variance = variance_BGc.mean(dim=2) + (mean_BGc - mean[..., None]).square_().mean(dim=2)
    return mean.float(), (variance + eps).rsqrt_().float()


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

    def fit(self, x_BCTHW: Tensor, latent: Tensor | None = None) -> Fitted:
        """First pass: the statistics of x. Second pass: :meth:`Fitted.write`."""
        return _fit(self, x_BCTHW, None)


class SpatialNormSiLU(nn.Module):
    """GroupNorm whose scale and offset are 1x1 convolutions of the latent, then SiLU.

    A 1x1 convolution commutes with nearest interpolation, so both maps are computed at the latent's size and only
    read at the feature map's: nothing is interpolated.

    Source: MoVQ, Zheng et al. 2022, arXiv 2209.09002, as used in CogVideoX.
    """

    def __init__(self, channels: int, latent_channels: int, *, num_groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, eps=eps)
        # Checkpoints name both ``.conv``.
        self.conv_y = nn.ModuleDict({"conv": nn.Conv3d(latent_channels, channels, 1)})
        self.conv_b = nn.ModuleDict({"conv": nn.Conv3d(latent_channels, channels, 1)})

    def fit(self, x_BCTHW: Tensor, latent: Tensor | None = None) -> Fitted:
        """First pass: the statistics of x and the maps of the latent (B, c, t, h, w), which this norm needs."""
        if latent is None:
            raise ValueError("a spatial norm is steered by a latent; none was given")
        return _fit(self.norm_layer, x_BCTHW, (self.conv_y["conv"](latent), self.conv_b["conv"](latent)))


def _multiply_add(x_BCHW: Tensor, y_BChw: Tensor, b_BChw: Tensor, *, out: Tensor) -> None:
    """out = x * y + b in channels last, both maps read as if enlarged to x by nearest neighbour."""
    _, C, H, W = x_BCHW.shape
    h, w = y_BChw.shape[2:]
    x, target = (a.permute(0, 2, 3, 1).view(h, H // h, w, W // w, C) for a in (x_BCHW, out))
    y, b = (m[0].permute(1, 2, 0)[:, None, :, None] for m in (y_BChw, b_BChw))
    torch.addcmul(b, x, y, out=target)


def _modulate(frame_BCHW: Tensor, scale_BChw: Tensor, offset_BChw: Tensor) -> None:
    """frame * scale + offset in place, both maps read as if enlarged to the frame by nearest neighbour."""
    B, C, H, W = frame_BCHW.shape
    h, w = scale_BChw.shape[-2:]
    rows = frame_BCHW.view(B, C, h, H // h, W)
    # Enlarged along the width only, so that the innermost loop of the kernels is a whole row.
    rows.mul_(scale_BChw.repeat_interleave(W // w, dim=-1)[:, :, :, None])
    rows.add_(offset_BChw.repeat_interleave(W // w, dim=-1)[:, :, :, None])

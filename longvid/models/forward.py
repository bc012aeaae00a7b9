"""Runs one chunk through the model, from host frames to latents and back, on a device and on ``meta`` alike.

Axes: B batch (1), C channels, T time, H height, W width; lower-case c t h w are those of a latent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longvid.errors import ModelError
from longvid.models.base import CausalVAE
from longvid.models.context import ForwardContext
from longvid.models.numerics import Numerics

__all__ = ["decode_chunk", "encode_chunk", "memory_format", "sample_posterior"]


def memory_format(numerics: Numerics) -> torch.memory_format:
    """Torch's name for the layout."""
    return torch.channels_last_3d if numerics.layout == "channels_last" else torch.contiguous_format


@torch.inference_mode()
def encode_chunk(
    model: CausalVAE, context: ForwardContext, frames_THWC: Tensor, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """uint8 frames (T, H, W, 3) on any device to moments (1, 2 c, t, h, w) on ``device``."""

    def pixels() -> Tensor:
        x = frames_THWC.to(device, copy=True, non_blocking=True).permute(3, 0, 1, 2)[None]
        return x.to(torch.float32, memory_format=memory_format(context.numerics)).div_(127.5).sub_(1.0).to(dtype)

    return model.encode(context.attempt(pixels), context)


@torch.inference_mode()
def decode_chunk(
    model: CausalVAE, context: ForwardContext, latents_TCHW: Tensor, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Raw latents (t, c, h, w) on any device to uint8 frames (T, H, W, 3) on ``device``.

    Raises ModelError if the latents or the model's output are not finite.
    """

    def latents() -> Tensor:
        z = latents_TCHW.to(device, copy=True, non_blocking=True).movedim(0, 1)[None].to(dtype)
        return z.contiguous(memory_format=memory_format(context.numerics))

    x = model.decode(context.attempt(latents), context)
    if context.cache.last_layer is not None:  # a chunk of a warm-up ends before its output
        return latents_TCHW
    try:
        return context.attempt(lambda: _to_frames(x))
    except ModelError:
        bad = [t for t, latent in enumerate(latents_TCHW) if not torch.isfinite(latent).all()]
        if bad:
            raise ModelError(
                f"latent {bad[0]} of the chunk is not finite, so its frames are not; check where the latents come from"
            ) from None
        raise


def _to_frames(x_BCTHW: Tensor) -> Tensor:
    _, C, T, H, W = x_BCTHW.shape
    frames = torch.empty((T, H, W, C), dtype=torch.uint8, device=x_BCTHW.device)
    finite_T = torch.empty(T, dtype=torch.bool, device=x_BCTHW.device)
    for t in range(T):
        frame = x_BCTHW[0, :, t].to(torch.float32, copy=True)
        if not frame.is_meta:
            torch.all(torch.isfinite(frame), out=finite_T[t])
        frames[t].copy_(frame.add_(1.0).mul_(127.5).round_().clamp_(0.0, 255.0).permute(1, 2, 0))
    if not x_BCTHW.is_meta:  # asked once: every answer from an accelerator is waited for
        bad = [t for t, finite in enumerate(finite_T.tolist()) if not finite]
        if bad:
            advice = "" if x_BCTHW.dtype == torch.float32 else "; try float32"
            raise ModelError(f"frame {bad[0]} of the decoded chunk is not finite in {x_BCTHW.dtype}{advice}")
    return frames


def sample_posterior(moments_BCTHW: Tensor, *, seed: int, first_latent: int) -> Tensor:
    """A sample of the posterior, (B, c, t, h, w) float32 on the host, from moments on the host.

    The noise of a latent frame depends on ``seed`` and its number in the video only (``first_latent`` is that of the
    first one here), so it is the same on every device, for every cut into chunks, and when a run is continued. The log
    variance is clamped to [-30, 20] as diffusers does.
    """
    mean, log_variance = moments_BCTHW.float().chunk(2, dim=1)
    # numpy mixes both numbers into the whole state; torch's CPU generator looks at 32 bits of its seed only.
    B, C, T, H, W = mean.shape
    frames = [
        np.random.default_rng([seed, first_latent + t]).standard_normal((B, C, H, W), dtype=np.float32)
        for t in range(T)
    ]
    noise = torch.from_numpy(np.stack(frames, axis=2))
    return torch.exp(log_variance.clamp(-30.0, 20.0).mul_(0.5)).mul_(noise).add_(mean)

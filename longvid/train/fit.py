"""The closed-form start of training: principal components.

The basis of the block transform and the linear paths of encoder and decoder are computed, not trained; training then
starts from the best linear coder. The linear coder itself is what the trained model is compared with.

Source: principal component analysis; Karhunen-Loeve transform coding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from longvid.models.tiny import BLOCK, FRAMES, PIXELS, Block, TinyVAE
from longvid.train.footage import Footage

__all__ = ["LinearCoder", "fit"]


@dataclass(frozen=True, slots=True)
class LinearCoder:
    """The best linear coder of the same latent size: principal components of blocks, one basis for the first frame."""

    mean: Tensor
    basis: Tensor
    "(768, 768), rows by falling variance"
    first_mean: Tensor
    first_basis: Tensor
    "(192, 192), of 8 x 8 x RGB blocks of single frames"

    def reconstruct(self, x_BCTHW: Tensor, channels: int) -> Tensor:
        """Pixels (B, 3, 1 + 4 n, H, W), encoded to ``channels`` numbers per block and decoded again."""
        first = _project(F.pixel_unshuffle(x_BCTHW[:, :, 0], PIXELS), self.first_mean, self.first_basis[:channels])
        out = [F.pixel_shuffle(first, PIXELS)[:, :, None]]
        for t in range(1, x_BCTHW.shape[2], FRAMES):
            blocks = F.pixel_unshuffle(x_BCTHW[:, :, t : t + FRAMES].flatten(1, 2), PIXELS)
            blocks = _project(blocks, self.mean, self.basis[:channels])
            out.append(F.pixel_shuffle(blocks, PIXELS).view(-1, 3, FRAMES, *x_BCTHW.shape[3:]))
        return torch.cat(out, dim=2)

    def save(self, path: Path, channels: int) -> None:
        """Write what :meth:`reconstruct` needs for ``channels``."""
        bases = {name: getattr(self, name)[:channels].contiguous() for name in ("basis", "first_basis")}
        safetensors.torch.save_file({"mean": self.mean, "first_mean": self.first_mean, **bases}, path)

    @classmethod
    def load(cls, path: Path) -> LinearCoder:
        """Read what :meth:`save` wrote."""
        return cls(**safetensors.torch.load_file(path))


def _project(blocks: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    coded = F.conv2d(blocks - mean[:, None, None], basis[:, :, None, None])
    return F.conv2d(coded, basis.T[:, :, None, None], mean)


def fit(model: TinyVAE, footage: Footage, *, seed: int, num_clips: int) -> LinearCoder:
    """Set the model's transform and linear paths from clips without augmentation; return the linear coder."""
    groups, frames = _Moments(BLOCK), _Moments(BLOCK // FRAMES)
    for i in range(num_clips):
        rng = np.random.default_rng([seed, 1, i])
        clip = footage.clip(rng, num_frames=4 * FRAMES + 1, size=128, augment=False)
        x = torch.from_numpy(clip).div_(127.5).sub_(1).permute(3, 0, 1, 2)[None]
        for t in range(1, x.shape[2], FRAMES):
            groups.add(F.pixel_unshuffle(x[:, :, t : t + FRAMES].flatten(1, 2), PIXELS))
        frames.add(F.pixel_unshuffle(x[:, :, 0], PIXELS))
    mean, basis, variance = groups.components()
    first_mean, first_basis, _ = frames.components()
    _set_linear_paths(model, mean, basis, variance, frames)
    return LinearCoder(mean, basis, first_mean, first_basis)


class _Moments:
    """Mean and covariance of blocks, summed in double precision."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sum = torch.zeros(size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, blocks_BNhw: Tensor) -> None:
        flat = blocks_BNhw[0].flatten(1)
        self.count += flat.shape[1]
        self.sum += flat.sum(dim=1)
        self.products += flat @ flat.T

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, eigenvectors as rows and eigenvalues of the covariance, falling."""
        mean = self.sum / self.count
        variance, vectors = torch.linalg.eigh(self.products / self.count - mean.outer(mean))
        return mean.float(), _by_falling_variance(vectors), variance.flip(0).clamp(min=1e-9).float()


def _by_falling_variance(vectors: Tensor) -> Tensor:
    """Eigenvectors as rows, the last first. Their sign is arbitrary: the largest element becomes positive."""
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return (rows * largest.sign()).float().contiguous()


@torch.no_grad()
def _set_linear_paths(model: TinyVAE, mean: Tensor, basis: Tensor, variance: Tensor, frames: _Moments) -> None:
    K, C = model.config.coefficients, model.config.latent_channels
    model.transform.basis.copy_(basis[:K])
    model.transform.mean.copy_(mean)
    std = variance[:C].sqrt()
    # The first frame is coded as a block of four equal frames: its covariance among the coefficients.
    lift = basis[:K].double() @ torch.eye(BLOCK // FRAMES, dtype=torch.float64).view(3, 1, PIXELS**2, -1).expand(
        -1, FRAMES, -1, -1
    ).reshape(BLOCK, -1)
    first_mean = frames.sum / frames.count
    covariance = lift @ (frames.products / frames.count - first_mean.outer(first_mean)) @ lift.T
    first_variance, vectors = torch.linalg.eigh(covariance)
    first = _by_falling_variance(vectors)[:C]
    first_std = first_variance.flip(0)[:C].clamp(min=1e-9).float().sqrt()

    encoder, decoder = model.encoder.linear.conv, model.decoder.linear.conv
    halves = (model.encoder, model.decoder)
    for parameter in (p for half in halves for conv in (half.linear, half.head) for p in conv.parameters()):
        parameter.zero_()
    encoder.weight[:C, :, 0, 0, 0] = first / first_std[:, None]
    encoder.weight[C:, :C, 0, 0, 0] = torch.diag(1 / std)
    decoder.weight[:, :C, 0, 1, 1] = (first * first_std[:, None]).T
    decoder.weight[:C, C:, 0, 1, 1] = torch.diag(std)
    for block in (m for half in halves for m in half.modules() if isinstance(m, Block)):
        weight, bias = block.temporal.conv.parameters()
        weight.mul_(0.1)
        bias.zero_()
    # The network sees the coefficients at comparable size: their spread falls a hundredfold over 192 of them.
    spread = variance[:K].sqrt()
    model.encoder.stem.conv.weight.mul_((3 / (spread * spread[0]).sqrt())[None, :, None, None, None])

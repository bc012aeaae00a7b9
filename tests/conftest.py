"""Shared fixtures: real architectures at small widths, with seeded random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE

pytest_plugins = ["support.fault_ledger"]

NANO = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vae() -> CogVideoXVAE:
    """The CogVideoX architecture at 1/16 of its width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return CogVideoXVAE(CogVideoXConfig(**NANO)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def packable() -> CogVideoXVAE:
    """The same with few layers, and channels in numbers that kernels are packed for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = CogVideoXConfig(block_out_channels=(64, 128), layers_per_block=1, temporal_compression_ratio=2)
        return CogVideoXVAE(config).eval().requires_grad_(False)


@pytest.fixture
def frames() -> np.ndarray:
    """26 noisy uint8 frames of 24x40 that all differ."""
    return np.random.default_rng(3).integers(0, 256, (26, 24, 40, 3), dtype=np.uint8)

"""Shared fixtures: real architectures at small widths, with seeded random weights."""

from __future__ import annotations

import time

import hypothesis
import numpy as np
import pytest
import torch
from support.clock import Clock

from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE

pytest_plugins = ["support.fault_ledger"]

# The same examples in every run, on every machine. `--hypothesis-profile explore` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("fixed")

NANO = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """What ``time.perf_counter`` says, under the test's control."""
    clock = Clock(time.perf_counter)
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


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

"""Dry runs are made once for an architecture, and again for one that differs in anything but its weights."""

import copy

import torch

from longvid import load_model
from longvid.planning.dry_run import DryRuns


def test_models_that_differ_in_their_weights_share_their_dry_runs():
    one, other = (load_model("cogvideox-2b") for _ in range(2))
    assert DryRuns.of(one) is DryRuns.of(other)


def test_anything_else_that_differs_makes_dry_runs_of_its_own(vae):
    runs = DryRuns.of(vae)
    assert DryRuns.of(copy.deepcopy(vae)) is runs
    stride, attribute, forward = (copy.deepcopy(vae) for _ in range(3))
    next(m for m in stride.modules() if isinstance(m, torch.nn.Conv2d)).stride = (1, 1)
    attribute.decoder.a_setting = [1, 2]

    class Other(type(forward.encoder)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    forward.encoder.__class__ = Other
    assert len({id(DryRuns.of(model)) for model in (vae, stride, attribute, forward)}) == 4


def test_they_hold_no_weights_and_are_forgotten_in_time(vae, monkeypatch):
    monkeypatch.setattr(DryRuns, "_known", {})
    first = DryRuns.of(vae)
    assert all(tensor.is_meta for tensor in first.model.parameters())
    for setting in range(20):
        other = copy.deepcopy(vae)
        other.encoder.a_setting = setting
        DryRuns.of(other)
    assert DryRuns.of(vae) is not first

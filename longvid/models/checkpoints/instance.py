"""Weights of a diffusers instance: all of them in memory, plain, and those that it computes with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from longvid.errors import ModelError
from longvid.models.base import NativeVAE
from longvid.models.checkpoints.messages import shown
from longvid.models.checkpoints.tensors import without_wrappers

__all__ = ["instance_weights", "unwrapped", "warn_of_settings"]


def unwrapped(instance: Any) -> Any:
    """The module that ``torch.compile`` was called with, or the instance itself."""
    while isinstance(instance, nn.Module) and isinstance(
        instance.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module
    ):
        instance = instance._orig_mod
    return instance


def instance_weights(instance: nn.Module) -> dict[str, Tensor]:
    """The instance's tensors by name, not copied.

    Raises:
        ModelError: some are elsewhere, quantized, sharded, or made of others at every use.
    """
    where = type(instance).__name__
    _require_plain_modules(instance, where)
    tensors = instance.state_dict()
    plain = without_wrappers(list(tensors), where)
    weights = {name: tensors[theirs] for name, theirs in plain.items()}
    adapters = [name for name in weights if "lora_" in name or ".base_layer." in name]
    if adapters:
        raise ModelError(
            f"this {where} has adapters ({shown(adapters[0])}); merge them into the weights and unload them first "
            "(fuse_lora, then unload_lora_weights)"
        )
    meta = [name for name, tensor in weights.items() if tensor.is_meta]
    if meta:
        raise ModelError(
            f"{len(meta)} of the {len(weights)} weights of this {where} are on the meta device, such as {meta[0]}: "
            "they were never loaded, or accelerate keeps them elsewhere; load it without device_map and offloading, "
            "or pass its folder"
        )
    for name, tensor in weights.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise ModelError(
                f"{name} of this {where} is a {type(tensor).__name__} of layout {tensor.layout}; quantized, sharded "
                "and sparse weights cannot be used"
            )
    return weights


def _require_plain_modules(instance: nn.Module, where: str) -> None:
    """Raise ModelError if a module does not compute with the tensors that it holds."""
    for path, module in instance.named_modules():
        name = path or where
        if parametrize.is_parametrized(module):
            raise ModelError(
                f"the weights of {name} are parametrized, so that they are made of others at every use; make them "
                "plain with torch.nn.utils.parametrize.remove_parametrizations first"
            )
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hooks:
            raise ModelError(
                f"{name} has hooks of diffusers ({', '.join(map(str, hooks))}), which keep its weights elsewhere or "
                "change what it computes; load it without them, or pass its folder"
            )


def warn_of_settings(instance: nn.Module, model: NativeVAE) -> None:
    """Warn of settings on the instance with which diffusers computes other values than longvid will.

    ``use_slicing`` is none: it takes the videos of a batch one by one, which changes no value.
    """
    where, geometry = type(instance).__name__, model.geometry
    lengths = {
        "num_sample_frames_batch_size": geometry.chunk_frames,
        "num_latent_frames_batch_size": geometry.chunk_frames // geometry.frames_per_latent,
    }
    for key, own in lengths.items():
        theirs = getattr(instance, key, None)
        if not geometry.chunk_invariant and isinstance(theirs, int) and theirs != own:
            warnings.warn(
                f"this {where} has {key} = {theirs}; longvid computes with {own}, which the published weights are "
                "meant for. The norms of this family run over a chunk, so results differ from those of the instance",
                UserWarning,
                stacklevel=4,
            )
    if getattr(instance, "use_tiling", False):
        warnings.warn(
            f"tiling is enabled on this {where}; longvid computes whole frames, without the seams and the blending of "
            'tiles, so results differ from those of the instance. To need less memory, set a budget: memory="4GiB"',
            UserWarning,
            stacklevel=4,
        )

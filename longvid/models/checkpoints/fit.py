"""Compares weights with the model that they are for, before a value is read and after, and puts them in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longvid.errors import ModelError
from longvid.models.base import NativeVAE
from longvid.models.checkpoints.messages import shown
from longvid.models.checkpoints.tensors import Checkpoint
from longvid.models.device import weights_digest

__all__ = ["assign", "fill", "require_dtype", "require_fit"]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def fill(model: NativeVAE, checkpoint: Checkpoint, names: Mapping[str, str], where: str) -> NativeVAE:
    """Read the weights of ``model``, once the names, shapes and dtypes in the headers have been compared with it.

    Args:
        model: without weights.
        checkpoint: the files.
        names: the name of each tensor in the files by its name in diffusers format.
        where: how to call the place in errors.
    """
    require_fit(model, {name: checkpoint.shapes[theirs] for name, theirs in names.items()}, where)
    require_dtype({name: checkpoint.dtypes[theirs] for name, theirs in names.items()}, where)
    weights = {name: checkpoint.read(theirs) for name, theirs in names.items()}
    if model.weights_dtype is not None:
        weights = {name: tensor.to(model.weights_dtype) for name, tensor in weights.items()}
    return assign(model, weights, where)


def require_fit(model: NativeVAE, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ModelError unless names and shapes are those of the model, which takes no memory yet."""
    names = model.checkpoint_names()
    expected = {names[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [
        f"{name} is {shapes[name]} instead of {shape}" if name in shapes else f"missing {name}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    problems += [f"unknown {shown(name)}" for name in shapes if name not in expected]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"the weights in {where} do not fit its config: {'; '.join(problems[:3])}{more}")


def require_dtype(dtypes: Mapping[str, Any], where: str) -> None:
    """Raise ModelError unless all weights have one dtype, and models run in it."""
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES and dtype not in _DTYPES.values():
            raise ModelError(
                f"{shown(name)} in {where} has dtype {dtype}; weights are {', '.join(_DTYPES)}, and quantized ones "
                "cannot be used"
            )
    kinds = sorted({str(dtype) for dtype in dtypes.values()})
    if len(kinds) > 1:
        raise ModelError(f"the weights in {where} have several dtypes ({', '.join(kinds)}); convert them to one")


def assign(model: NativeVAE, weights: Mapping[str, Tensor], where: str) -> NativeVAE:
    """Put the tensors of ``weights`` into the model without a copy, if all values are finite; record their digest."""
    for name, tensor in weights.items():
        # Three to twenty times as fast as isfinite and as exact: both ends are NaN if any value is.
        if tensor.dtype not in _DTYPES.values() or not tensor.numel():
            continue
        if not all(math.isfinite(end) for end in torch.stack(tensor.detach().aminmax()).tolist()):
            raise ModelError(f"{name} in {where} holds values that are not finite; these weights are damaged")
    model.load_state_dict({name: weights[theirs] for name, theirs in model.checkpoint_names().items()}, assign=True)
    model.requires_grad_(False)
    model.origin["weights_sha256"] = weights_digest(model)
    return model

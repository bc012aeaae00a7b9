"""Puts a module on a device: names of devices, moving weights, their size and their digest."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longvid.errors import ModelError

__all__ = ["placed", "resolve_device", "tensor_bytes", "weights_digest"]

_Module = TypeVar("_Module", bound=nn.Module)


def placed(module: _Module, device: torch.device, dtype: torch.dtype | None) -> _Module:
    """The module with its floating tensors on ``device`` in ``dtype`` (None: as they are).

    The module itself is not touched. If nothing has to change it is returned; otherwise the result shares with it
    every tensor that is already in place.
    """
    tensors = [*module.parameters(), *module.buffers()]

    def wanted(tensor: Tensor) -> torch.dtype:
        return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    if all(tensor.device == device and tensor.dtype == wanted(tensor) for tensor in tensors):
        return module
    # deepcopy takes what it finds in its memo, so the structure is copied and the tensors are not.
    memo: dict[int, Any] = {}
    for tensor in tensors:
        moved = tensor.detach().to(device=device, dtype=wanted(tensor))
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(module, memo)


def weights_digest(module: nn.Module) -> str:
    """sha256 over name, dtype, shape and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted((*module.named_parameters(), *module.named_buffers()), key=lambda item: item[0]):
        host = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name}:{host.dtype}:{tuple(host.shape)};".encode())
        digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each counted once."""
    seen = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in seen.values())


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; ``"auto"`` is the accelerator if there is one, else the CPU. ModelError if it fails."""
    if not isinstance(device, (str, torch.device)):
        raise ModelError(f'device {device!r} is not a device; pass a name such as "cuda:0", or "auto"')
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator()
        device = accelerator if accelerator is not None and torch.accelerator.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, ValueError) as exc:
        raise ModelError(f"device {str(device)!r} cannot be used here: {str(exc).splitlines()[0]}") from exc
    return torch.empty(0, device=where).device

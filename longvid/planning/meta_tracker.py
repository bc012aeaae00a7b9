"""Counts bytes and FLOPs of a dry run on ``meta`` tensors, and leaves out what changes neither."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from longvid.memory.tracker import AllocationTracker

__all__ = ["MetaTracker"]


class MetaTracker(AllocationTracker):  # type: ignore[no-untyped-call]
    """Counts the storages of meta tensors and, if ``counts_flops``, what PyTorch's FLOP counter counts.

    An operation that writes into a tensor allocates nothing and computes nothing on ``meta``, where PyTorch would spend
    its time on shapes. It is left out. PyTorch's counter is asked once whether an operation that consists of others has
    FLOPs at all; as a mode around the whole run it would take a third of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.counts_flops = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _written(func)
        if place is not None:
            index, name = place
            written = args[index] if index < len(args) else kwargs.get(name)
            if isinstance(written, torch.Tensor) and written.is_meta:
                return written
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.counts_flops:
            self.flops += _flops(func, args, kwargs, out)
        return out


@cache
def _written(func: Any) -> tuple[int, str] | None:
    """The argument that the operation writes its only result into, and that keeps its shape; None if there is none."""
    schema = func._schema
    if torch.Tag.inplace_view in func.tags or func._overloadpacket in flop_registry or len(schema.returns) != 1:
        return None
    alias = schema.returns[0].alias_info
    if alias is None or not alias.is_write:
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == alias.before_set:
            return index, argument.name
    return None


_without_flops: set[Any] = set()
"operations that consist of others, none of which has FLOPs"


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        return int(count(*args, **kwargs, out_val=out))
    if func in _without_flops or not _is_composite(func):
        return 0
    with FlopCounterMode(display=False) as counter:
        func(*args, **kwargs)
    found = int(counter.get_total_flops())
    if not found:
        _without_flops.add(func)
    return found


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))

"""Arithmetic of 16-bit dtypes as accelerators do it, on any CPU, with a note of the first overflow.

Products are summed in float32 and rounded once, so that a CPU without 16-bit kernels gives what an accelerator gives,
but for the last bits, and in no more time than float32 takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NarrowArithmetic"]

_PRODUCTS = {
    "aten::convolution", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::linear", "aten::matmul", "aten::mm",
    "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::scaled_dot_product_attention",
}  # fmt: skip
"in inference mode, some arrive as they are called, and others in parts"
_NOT_COMPUTED = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::resize_", "aten::full", "aten::full_like", "aten::new_full", "aten::fill", "aten::fill_",
    "aten::masked_fill", "aten::masked_fill_", "aten::scalar_tensor",
}  # fmt: skip
"operations whose results are not set yet, or infinite on purpose, as masks of attention are"


class NarrowArithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use it in a ``with`` statement around a computation in ``dtype``.

    Attributes:
        layer: what is computed now, for the record; set by the caller.
        largest: the largest magnitude of any finite result of an operation in ``dtype``.
        overflow: the first operation whose result in ``dtype`` was not finite, and its layer; None if there was none.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.layer = ""
        self.largest = 0.0
        self.overflow: tuple[str, str] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        is_product = name in _PRODUCTS and any(isinstance(x, Tensor) and x.dtype == self.dtype for x in args)
        result = self._product(func, args, kwargs) if is_product else func(*args, **kwargs)
        if name not in _NOT_COMPUTED and not _is_view(func):
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.dtype == self.dtype and tensor.numel():
                    self._note(name, tensor)
        return result

    def _product(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        out, compute = kwargs.pop("out", None), func
        if out is not None:
            compute = func.overloadpacket.default
        wide = compute(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})
        return wide.to(self.dtype) if out is None else out.copy_(wide)

    def _note(self, name: str, tensor: Tensor) -> None:
        low, high = torch.stack(tensor.aminmax()).tolist()
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            self.overflow = self.overflow or (name.removeprefix("aten::"), self.layer)
        else:
            self.largest = max(self.largest, -low, high)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_view(func: Callable[..., Any]) -> bool:
    returns = func._schema.returns  # type: ignore[attr-defined]
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)

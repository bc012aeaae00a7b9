"""ForwardContext: everything that a forward pass of one chunk takes beside its input."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from longvid.memory.buffer_pool import BufferPool
from longvid.memory.tracker import is_out_of_memory
from longvid.models.cache import ConvCache
from longvid.models.numerics import Numerics
from longvid.units import format_bytes

__all__ = ["ForwardContext", "Limits", "Pieces"]

T = TypeVar("T")
Pieces: TypeAlias = Literal["resnets", "stages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of a layer is computed at once. Offloading and these limits save memory at the cost of time."""

    conv_elements: int = 2**31 - 1
    """most elements of a convolution's window and output, as far as frames and rows can be cut; the default is what
    32-bit indexing in kernels can address"""
    slice_elements: int = 2**31 - 1
    """layers run in slices of so many frames that neither the new input nor the output of a slice has more elements
    than this, but of one frame at least"""
    pieces: Pieces | None = None
    """layers that look across time through contexts only run for a few frames of a chunk, and then again for the next
    ones: ``"resnets"`` one residual block after the other, ``"stages"`` all layers at one frame size together, so that
    only a few of its frames exist at a time. A piece has as many frames as ``slice_elements`` allows"""
    tile_elements: int | None = None
    """layers in channels last run in row tiles whose window and output have at most this many elements, but of about
    16 rows at least, and with packed weights; None for whole frames. Saves memory, and time if a tile fits a cache"""


@dataclass(slots=True)
class ForwardContext:
    """The contexts of one video, the memory that its layers share, and how they compute.

    Use it in a ``with`` statement, which opens the cache and frees everything at the end. :meth:`of` makes one from a
    bare cache.
    """

    cache: ConvCache
    buffers: BufferPool = field(default_factory=BufferPool)
    "memory that windows and outputs take turns with; empty between chunks unless it is kept"
    numerics: Numerics = field(default_factory=Numerics)
    "which of several forms the layers compute in, beside the layout, which is that of their input"
    limits: Limits = field(default_factory=Limits)
    keeps_kernels: bool = False
    """whether what layers make of their weights, such as Winograd filters, is kept for all chunks, so the weights must
    not change; otherwise it is made in each call"""
    _kernels: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, value: ConvCache | ForwardContext) -> ForwardContext:
        """The value itself, or the plainest context around a bare cache."""
        return cls(value) if isinstance(value, ConvCache) else value

    def __enter__(self) -> Self:
        self.cache.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free every context, buffer and prepared weight. May be called again."""
        self._kernels.clear()
        self.buffers.clear()
        self.cache.close()

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """The life of one chunk; see :meth:`ConvCache.chunk`."""
        try:
            with self.cache.chunk():
                yield
        except BaseException:
            self._kernels.clear()
            self.buffers.clear()
            raise
        finally:
            if not self.buffers.keeps:
                self.buffers.clear()

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the prepared weights that are kept, beside the weights that they were made of."""
        return sum(tensor.nbytes for tensors in self._kernels.values() for tensor in tensors)

    def prepared(self, layer: nn.Module, prepare: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``prepare`` makes of a layer's weights. It allocates all that it returns, and is harmless to repeat."""
        found = self._kernels.get(layer)
        if found is None:
            found = self.attempt(prepare)
            # Weights that were not changed need no keeping.
            if self.keeps_kernels and not any(isinstance(tensor, nn.Parameter) for tensor in found):
                self._kernels[layer] = found
        return found

    @property
    def at_start(self) -> bool:
        """Whether the frames that a layer computes now are the first ones of the video."""
        return self.cache.num_chunks == 0 and self.cache.piece == 0

    def weight(self, layer: nn.Conv2d | nn.Conv3d) -> Tensor:
        """A convolution's weight, in float32 where products are."""
        if not self.widens(layer.weight.dtype):
            return layer.weight
        (wide,) = self.prepared(layer, lambda: (layer.weight.detach().float(),))
        return wide

    def widens(self, dtype: torch.dtype) -> bool:
        """Whether convolutions of this dtype are computed in float32."""
        return self.numerics.float32_products and dtype == torch.bfloat16

    def attempt(self, forward: Callable[[], T]) -> T:
        """Call a function that takes device memory. If there is none left, free what can be freed and call it again.

        Prepared weights and idle buffers are given up, none is kept any more, and every context moves to the host. The
        result has the same bits. The function must be harmless to repeat after it has run out of memory: it computes
        something new from what is there, or takes all memory that it needs before it changes anything.

        Raises:
            RuntimeError: the device's own error, if the second call fails as well or nothing could be freed.
        """
        try:
            return forward()
        except RuntimeError as exc:
            if not is_out_of_memory(exc) or not self.cache.is_open:
                raise
            failure = exc.with_traceback(None)  # the frames would keep alive what the function had allocated
        idle_bytes = self.buffers.idle_bytes + self.kernel_bytes
        self._kernels.clear()
        self.keeps_kernels = False
        self.buffers.clear()
        if self.buffers.keeps:
            self.buffers = BufferPool()
        freed = self.cache.offloader.evict()
        if not freed and not idle_bytes:
            raise failure
        what, then = "all contexts were moved to the host", "stay there"
        if not freed:
            what, then = "memory that the layers keep was given up", "is not kept"
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"the device ran out of memory in chunk {self.cache.num_chunks}; {what}, which set "
                f"{format_bytes(freed or idle_bytes)} free, and {then} for the rest of this video, which will be "
                "slower",
                stacklevel=2,
            )
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return forward()

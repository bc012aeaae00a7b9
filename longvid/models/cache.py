"""ConvCache: the causal context of every layer for one video and one direction.

A causal convolution with k taps in time needs the last k - 1 input frames of the chunk before: its **context**. All
contexts of a video live here, keyed by the layer's module path, and never on a module. So two videos may interleave
on one model, and a video leaves nothing behind.

A layer reads from a **window**, one tensor ``[context | new frames]``::

    with cache.window(layer, like=x) as window:
        norm(x, out=window.new)                 # the producer writes straight into the window
        h = layer.convolve(window)              # reads window.input()
    # the window is gone; its last k - 1 frames are the context of the next chunk

There is one copy of every context and no copy of the input. A window may be smaller than a chunk, in frames or in rows,
and go over it block by block. What comes in is read once, row after row and in order, since the rows that two blocks
share stay in the window. A layer of its own then pads no rows, which are there::

    with cache.window(layer, like=x, blocks=blocks, halo=1) as window:
        for block in window.blocks():
            produce(block.frames, window.rows, out=window.new)
            y = F.conv3d(window.input(), ...)   # the output frames and rows of this block

Layers with one tap in time have no entry. Where a context is between chunks, on the device or on the host, is the
business of :class:`~longvid.memory.offloader.Offloader`.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from longvid.errors import CacheError
from longvid.memory.buffer_pool import BufferPool, TensorKind, dense_within
from longvid.memory.offloader import Offloader, empty_context
from longvid.memory.tracker import is_out_of_memory
from longvid.models.numerics import Numerics
from longvid.units import format_bytes

__all__ = ["Block", "CausalLayer", "ConvCache", "Window"]


T = TypeVar("T")
Signature: TypeAlias = dict[str, object]


class CausalLayer(Protocol):
    """What the cache needs to know of a layer: :class:`longvid.CausalConv3d` or anything of its shape."""

    context_frames: int
    "frames of context, k - 1; 0 for a layer that needs none"
    initial_context: Literal["repeat", "zeros"]
    "what stands in front of the first frame of a video: that frame again, or zeros"


@dataclass(frozen=True, slots=True)
class Block:
    """What of a layer's output is computed at once."""

    frames: range
    rows: range


class _State(Enum):
    UNOPENED = "not open yet; use it in a with statement"
    OPEN = "open"
    FAILED = "of mixed age, because an earlier chunk did not finish; start the video again with a new cache"
    CLOSED = "closed; a cache serves one video, make a new one"


@dataclass(slots=True)
class _Entry:
    path: str
    chunk: int = -1
    "the last chunk in which the layer ran"
    signature: Signature | None = None
    "facts of the layer's input that must not change within a video; None before the first chunk"


class ConvCache:
    """All contexts of one video and one direction.

    Args:
        module: the encoder or the decoder. Every submodule with ``context_frames > 0`` gets an entry.
        max_conv_elements: most elements of a convolution's window and output, as far as frames and rows can be cut; the
            default is what 32-bit indexing in kernels can address.
        slice_elements: layers run in slices of so many frames that neither the new input nor the output of a slice has
            more elements than this, but of one frame at least. Slices save memory and never change a result.
        band_elements: layers in channels last run in bands of so many rows that neither a window nor its output has
            more elements than this, but of about 16 rows at least, and with packed kernels; None for whole frames.
            That saves memory, and time where a band fits a cache, and never changes a result.
        numerics: which of several forms the layers compute in, beside the layout, which is that of their input.
        offloader: where the contexts live; on the device by default.
        keep_buffers: keep the memory of the layers between them and between chunks, see
            :class:`~longvid.memory.buffer_pool.BufferPool`.
        keep_kernels: keep what the layers make of their weights, see :meth:`kernels`.

    Use it in a ``with`` statement; leaving it frees every context. Each chunk runs inside :meth:`chunk`. If a chunk
    fails, all contexts are dropped at once and the cache refuses further use: they would be of mixed age.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        max_conv_elements: int = 2**31 - 1,
        slice_elements: int = 2**31 - 1,
        band_elements: int | None = None,
        numerics: Numerics = Numerics(),  # noqa: B008 - a frozen value
        offloader: Offloader | None = None,
        keep_buffers: bool = False,
        keep_kernels: bool = False,
    ) -> None:
        self.max_conv_elements = max_conv_elements
        self.slice_elements = slice_elements
        self.band_elements = band_elements
        self.numerics = numerics
        self.buffers = BufferPool(keep=keep_buffers)
        "memory that the layers of this video take turns with; empty between chunks unless it is kept"
        self._kernels: dict[nn.Module, tuple[Tensor, ...]] = {}
        "what layers made of their weights"
        self._keeps_kernels = keep_kernels
        self._offloader = offloader or Offloader()
        self._entries = {
            layer: _Entry(path) for path, layer in module.named_modules() if getattr(layer, "context_frames", 0) > 0
        }
        self._state = _State.UNOPENED
        self._chunk = -1
        self._in_chunk = False
        self._open_path: str | None = None
        self._told: set[str] = set()
        "what was given up for want of memory, and said"

    def __enter__(self) -> Self:
        if self._state is not _State.UNOPENED:
            raise CacheError(f"the cache cannot be entered: it is {self._state.value}")
        self._state = _State.OPEN
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free every context. May be called again."""
        self._drop(_State.CLOSED)

    def _drop(self, state: _State) -> None:
        self._state = state
        self._kernels.clear()
        self.buffers.clear()
        self._offloader.drop()

    @property
    def nbytes(self) -> int:
        """Bytes of all contexts that exist now, wherever they are."""
        return self._offloader.num_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of the contexts that hold device memory now."""
        return self._offloader.device_bytes

    @property
    def kernel_bytes(self) -> int:
        """Bytes of what :meth:`kernels` has kept; beside the weights that they were made of."""
        return sum(kernel.nbytes for kernels in self._kernels.values() for kernel in kernels)

    @property
    def num_chunks(self) -> int:
        """Chunks that have run to their end."""
        return self._chunk + (not self._in_chunk)

    def layer_bytes(self) -> dict[str, int]:
        """Bytes of each layer's context by module path, in the order of the modules; 0 before the first chunk."""
        there = self._offloader.layer_bytes()
        return {entry.path: there.get(entry.path, 0) for entry in self._entries.values()}

    def contexts(self) -> Iterator[tuple[str, Tensor]]:
        """Path and context (B, C, k - 1, H, W) of every layer between two chunks, in the order in which they run.

        Each is where it happens to be, and belongs to the cache: read it, and let go of it before the next chunk.

        Raises:
            CacheError: the cache is not open, or a chunk is running.
        """
        self._require_between_chunks("contexts can be read")
        return self._offloader.contexts()

    def restore(self, num_chunks: int, contexts: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        """Stand where another cache of the same module stood after ``num_chunks`` chunks.

        Args:
            num_chunks: chunks that lie behind these contexts.
            contexts: what :meth:`contexts` gave, in that order, on any device.
            device: where the module computes.

        Raises:
            CacheError: the cache was used before, or the contexts are not those of this module's layers.
        """
        self._require_between_chunks("contexts can be restored")
        if self._chunk >= 0:
            raise CacheError(f"contexts cannot be restored: the cache has run {self.num_chunks} chunks already")
        entries = {entry.path: (layer, entry) for layer, entry in self._entries.items()}
        for path, context in contexts:
            layer, entry = entries.pop(path, (None, None))
            if layer is None or entry is None or context.ndim != 5:
                raise CacheError(f"there is no layer {path!r} that a context of shape {tuple(context.shape)} fits")
            frames = cast("CausalLayer", layer).context_frames
            if context.shape[2] != frames:
                raise CacheError(f"the context of {path!r} has {context.shape[2]} frames, {frames} were due")
            self._offloader.restore(path, context, device)
            B, C, _, H, W = context.shape
            entry.signature = _signature(B, C, H, W, context.dtype, device)
            entry.chunk = num_chunks - 1
        if entries:
            self._drop(_State.FAILED)
            raise CacheError(f"no context came for {len(entries)} layers, among them {next(iter(entries))!r}")
        self._chunk = num_chunks - 1

    def _require_between_chunks(self, what: str) -> None:
        if self._state is not _State.OPEN:
            raise CacheError(f"no {what}: the cache is {self._state.value}")
        if self._in_chunk:
            raise CacheError(f"no {what} while a chunk is running")

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """The life of one chunk. On any exception inside, every context is freed and the cache is unusable.

        Raises:
            CacheError: the cache is not open, another chunk is running, or a layer did not run in this chunk.
        """
        if self._state is not _State.OPEN:
            raise CacheError(f"no chunk can run: the cache is {self._state.value}")
        if self._in_chunk:
            raise CacheError("a chunk is already running on this cache; one cache serves one video, chunk by chunk")
        self._in_chunk = True
        self._open_path = None
        self._chunk += 1
        try:
            yield
            self._require_all_advanced()
        except BaseException:
            self._drop(_State.FAILED)
            raise
        finally:
            if not self.buffers.keeps:
                self.buffers.clear()
            self._in_chunk = False

    def _require_all_advanced(self) -> None:
        left = [entry.path for entry in self._entries.values() if entry.chunk != self._chunk]
        if left:
            raise CacheError(
                f"chunk {self._chunk} ended, but {len(left)} of {len(self._entries)} layers did not run in it, "
                f"among them {left[0]!r}; a context that misses a chunk is wrong from then on"
            )

    def _enter_window(self, path: str) -> None:
        """One window at a time: plans and the moments at which contexts move are made for that."""
        if self._open_path is not None:
            raise CacheError(
                f"layer {path!r} opened its window inside that of {self._open_path!r}; leave one before the next"
            )
        self._open_path = path

    def attempt(self, step: Callable[[], T]) -> T:
        """Run a step that takes device memory. If there is none left, move every context to the host and try once more.

        Kept kernels, and memory that the workspace holds and nobody uses, are given up as well, and none is kept any
        more. The chunk then goes on as if nothing had happened: the same numbers, bit for bit. What is called a step
        must be harmless to repeat after it has run out of memory: it computes from what is there into something new,
        or takes all memory that it needs before it changes anything.

        Raises:
            RuntimeError: the device's own error, if the step fails again or nothing could be moved.
        """
        try:
            return step()
        except RuntimeError as exc:
            if not is_out_of_memory(exc) or self._state is not _State.OPEN:
                raise
            failure = exc.with_traceback(None)  # the frames would keep alive what the step had allocated
        idle_bytes = self.buffers.idle_bytes + self.kernel_bytes
        self._kernels.clear()
        self._keeps_kernels = False  # there is no room for that any more
        self.buffers.clear()
        if self.buffers.keeps:
            self.buffers = BufferPool()
        freed = self._offloader.evict()
        if not freed and not idle_bytes:
            raise failure
        if freed:
            self._tell("all contexts were moved to the host", freed, "stay there")
        else:
            self._tell("memory that the layers keep was given up", idle_bytes, "is not kept")
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return step()

    def kernels(self, layer: nn.Module, prepare: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``prepare`` makes of a layer's weights; once for all chunks if it is kept, so they must not change then.

        Args:
            layer: whose.
            prepare: allocates all that it returns, and is harmless to repeat.
        """
        found = self._kernels.get(layer)
        if found is None:
            found = self.attempt(prepare)
            if self._keeps_kernels and not any(isinstance(kernel, nn.Parameter) for kernel in found):
                self._kernels[layer] = found
        return found

    def _tell(self, what: str, num_bytes: int, then: str) -> None:
        if what in self._told:
            return
        self._told.add(what)
        warnings.warn(
            f"the device ran out of memory in chunk {self.num_chunks}; {what}, which set {format_bytes(num_bytes)} "
            f"free, and {then} for the rest of this video, which will be slower",
            stacklevel=3,
        )

    def window(
        self, layer: CausalLayer, *, like: Tensor, blocks: Sequence[Block] | None = None, halo: int = 0
    ) -> Window:
        """The window of ``layer`` for as many new frames as ``like`` has.

        Args:
            layer: a layer of the module this cache was made for, with ``context_frames > 0``.
            like: a tensor (B, C, T, H, W) with the shape, dtype, device and memory layout of the layer's input.
            blocks: what the window holds at a time, covering all frames and, for each range of frames, all rows, in
                order; None for everything at once. It then has to go over all :meth:`~Window.blocks`.
            halo: rows above and below an output row that it depends on. Bands of rows have them in the window, as
                zeros where the frame ends; whole frames do not, and are padded by the layer.

        Raises:
            CacheError: the layer is not of this module, ran already in this chunk, or its context is of another
                batch, size, dtype or device.
        """
        entry = self._entries.get(layer) if isinstance(layer, nn.Module) else None
        if entry is None:
            raise CacheError(
                f"{type(layer).__name__} is not a layer of the module this cache was made for; an encoder and a "
                "decoder, and two models, each need a cache of their own"
            )
        if not self._in_chunk:
            raise CacheError(f"layer {entry.path!r} ran outside a chunk; wrap the call in: with cache.chunk()")
        if entry.chunk == self._chunk:
            raise CacheError(
                f"layer {entry.path!r} ran twice in chunk {self._chunk}; every call needs a layer of its own"
            )
        _require_same_video(entry, like)
        return Window(self, layer, entry, like, blocks, halo)


class Window:
    """The input of one causal layer for one chunk: ``[context | new frames]``. Made by :meth:`ConvCache.window`.

    Its last frames become the layer's context when :meth:`input` is called for the last of the new frames, bands one
    after the other, or else when the ``with`` block is left; leaving it frees the window.
    """

    def __init__(
        self,
        cache: ConvCache,
        layer: CausalLayer,
        entry: _Entry,
        like: Tensor,
        blocks: Sequence[Block] | None,
        halo: int,
    ) -> None:
        self.max_conv_elements = cache.max_conv_elements
        self.attempt = cache.attempt
        self._cache = cache
        self._entry = entry
        self._initial_context = layer.initial_context
        self._context_frames = layer.context_frames
        B, C, T, self._height, W = like.shape
        self._blocks = [Block(range(T), range(self._height))] if blocks is None else blocks
        rows = max(len(block.rows) for block in self._blocks)
        self._banded = rows < self._height
        self._halo = halo if self._banded else 0
        "rows of it in the window"
        frames = max(len(block.frames) for block in self._blocks)
        self.shape = (B, C, layer.context_frames + frames, rows + 2 * self._halo, W)
        "of the largest block with everything that it depends on"
        self._context_shape = (B, C, layer.context_frames, self._height, W)
        self._kind = TensorKind.of(like)
        self._block = self._blocks[0]
        "what is in the window now"
        self.rows = range(0)
        "of the frame, that are to be written into ``new``; those before them are in the window already"
        self._first_row = 0
        "where in the window they begin"
        self._memory: Tensor | None = None
        "of the largest block"
        self._tensor: Tensor | None = None
        "that of the block, in this memory"
        self._context: Tensor | None = None
        "what stands before the frames of the block; overwritten row by row with what stands before the next ones"
        self._had_context = self._is_read = False

    def __enter__(self) -> Self:
        self._cache._enter_window(self._entry.path)
        self._memory = self.attempt(self._open)
        self._tensor = self._part(self._block)
        self._begin(self._block)
        return self

    def _open(self) -> Tensor:
        self._context = self._cache._offloader.open(self._entry.path)
        self._had_context = self._context is not None
        return self._cache.buffers.take(self.shape, self._kind)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.input()
            self._cache._offloader.done(self._entry.path)
        self._memory = self._tensor = self._context = self._cache._open_path = None
        if len(self._blocks) == 1 and not self._cache.buffers.keeps:
            # Memory of this size is better given up than kept beside the statistics of the next norm.
            self._cache.buffers.clear()

    def blocks(self) -> Iterator[Block]:
        """Go over all blocks; each has to be written and convolved before the next."""
        for block in _allocating(self._blocks) if self._require().is_meta else self._blocks:
            if block is not self._blocks[0]:
                self._begin(block)
            yield block

    def _part(self, block: Block) -> Tensor:
        """The window of a block in the memory of the largest. Bands are dense, whatever their height."""
        assert self._memory is not None
        B, C, _, _, W = self.shape
        num_frames, num_rows = self._context_frames + len(block.frames), len(block.rows) + 2 * self._halo
        if not self._banded:  # in other layouts, frames would not stay where they are
            return self._memory[:, :, :num_frames]
        return dense_within(self._memory, (B, C, num_frames, num_rows, W))

    def _begin(self, block: Block) -> None:
        """Move on: rows that the last block shares with this one stay, context stands before the others."""
        held, last = self._require(), self._block
        tensor = self._tensor = self._part(block)
        halo, above, height = self._halo, block.rows.start, self._height
        stop = min(height, block.rows.stop + halo)
        if above:
            if tensor.shape == held.shape:
                for i in range(2 * halo):  # one by one: source and target may overlap
                    tensor[:, :, :, i].copy_(tensor[:, :, :, len(last.rows) + i])
            else:  # of another height, every frame lies somewhere else
                shared = held[:, :, :, len(last.rows) : len(last.rows) + 2 * halo]
                tensor[:, :, :, : 2 * halo].copy_(self.attempt(shared.clone))
            self.rows = range(min(height, above + halo), stop)
        else:
            if halo:
                tensor[:, :, :, :halo].zero_()
            self.rows = range(stop)
        end = stop - above + halo
        if end < tensor.shape[3]:
            tensor[:, :, :, end:].zero_()
        self._first_row = self.rows.start - above + halo
        self._block, self._is_read = block, False
        if block.frames.start and not self._banded:  # what stands before these frames is in the window itself
            for i in range(self._context_frames):
                tensor[:, :, i].copy_(held[:, :, len(last.frames) + i])
        elif self._has_context and self._context is not None:
            there = self._context[:, :, :, self.rows.start : self.rows.stop]
            tensor[:, :, : self._context_frames, self._first_row : end].copy_(there)

    @property
    def _has_context(self) -> bool:
        return self._had_context or self._block.frames.start > 0

    def _require(self) -> Tensor:
        if self._tensor is None:
            raise CacheError(f"the window of layer {self._entry.path!r} is not open")
        return self._tensor

    @property
    def new(self) -> Tensor:
        """The part (B, C, T, H, W) into which the producer writes every element of a block's frames in ``rows``."""
        rows = slice(self._first_row, self._first_row + len(self.rows))
        return self._require()[:, :, self._context_frames :, rows]

    def input(self) -> Tensor:
        """The whole window (B, C, k - 1 + T, H, W), once ``new`` is written; it may not change any more."""
        num_frames, num_rows = len(self._block.frames), len(self._block.rows)
        tensor = self._require()
        if not self._is_read:
            self._is_read = True
            if not self._has_context:
                self._fill_front()
            if self._banded or self._block is self._blocks[-1]:
                self._keep(tensor[:, :, num_frames:, self._halo : self._halo + num_rows].detach())
        return tensor

    def _fill_front(self) -> None:
        new = self.new
        front = self._require()[:, :, : self._context_frames, self._first_row : self._first_row + len(self.rows)]
        if self._initial_context == "zeros":
            front.zero_()
        else:
            front.copy_(new[:, :, :1].expand_as(front))

    def _keep(self, tail: Tensor) -> None:
        rows = self._block.rows
        if self._context is None:  # not before: what wrote the window may be gone by now
            self._context = self.attempt(partial(empty_context, self._context_shape, self._kind))
        context = self._context
        context[:, :, :, rows.start : rows.stop].copy_(tail)
        if self._block is self._blocks[-1]:
            # Before the layer computes, so that a context that leaves is on its way meanwhile.
            self.attempt(lambda: self._cache._offloader.keep(self._entry.path, context))
            self._entry.chunk = self._cache._chunk


def _allocating(blocks: Sequence[Block]) -> Iterator[Block]:
    """What a dry run has to see: the first two and the last two bands of a slice, since all between them are alike."""
    for _, band_group in groupby(blocks, key=lambda block: block.frames):
        slice_blocks = list(band_group)
        yield from slice_blocks if len(slice_blocks) <= 4 else (*slice_blocks[:2], *slice_blocks[-2:])


def _require_same_video(entry: _Entry, like: Tensor) -> None:
    B, C, _, H, W = like.shape
    got = _signature(B, C, H, W, like.dtype, like.device)
    have = entry.signature
    if have is None:
        entry.signature = got
        return
    wrong = [f"{name} {got[name]} instead of {have[name]}" for name in have if have[name] != got[name]]
    if wrong:
        raise CacheError(
            f"layer {entry.path!r} got {', '.join(wrong)}; a cache serves one video, so use a new one for another video"
        )


def _signature(B: int, C: int, H: int, W: int, dtype: torch.dtype, device: torch.device) -> Signature:
    return {"batch": B, "channels": C, "size": f"{W}x{H}", "dtype": dtype, "device": device}

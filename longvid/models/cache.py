"""ConvCache: the causal context of every layer for one video and one direction.

A causal convolution with k taps in time needs the last k - 1 input frames of the chunk before: its **context**. All
contexts of a video are in one ConvCache, keyed by the layer's module path, and never on a module. So two videos may
interleave on one model, and a video leaves nothing behind.

Layers reach their context through a :class:`~longvid.models.layers.window.Window`. Layers with one tap in time have no
entry. The :class:`~longvid.memory.offloader.Offloader` decides whether a context is on the device or on the host
between chunks.

Axes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from longvid.errors import CacheError
from longvid.memory.buffer_pool import TensorKind
from longvid.memory.offloader import Offloader

__all__ = ["CausalLayer", "ConvCache"]


class CausalLayer(Protocol):
    """What the cache needs to know of a layer: :class:`longvid.CausalConv3d` or a layer of the same form."""

    context_frames: int
    "frames of context, k - 1; 0 for a layer that needs none"
    initial_context: Literal["repeat", "zeros"]
    "what stands in front of the first frame of a video: that frame again, or zeros"


class _State(Enum):
    UNOPENED = "not open yet; use it in a with statement"
    OPEN = "open"
    FAILED = "inconsistent, because an earlier chunk failed; start the video again with a new cache"
    CLOSED = "closed; a cache serves one video, make a new one"


@dataclass(slots=True)
class _Entry:
    """What the cache knows of one layer, apart from its context."""

    path: str
    chunk: int = -1
    "the last chunk in which the layer ran"
    piece: int = 0
    "the last piece of that chunk in which it ran, in a group"
    signature: dict[str, object] | None = None
    "facts of the layer's input that must not change within a video; None before the first chunk"


class _EndOfChunk(BaseException):
    """Ends a chunk of a cold start behind the last layer that counts in it."""


class ConvCache:
    """All contexts of one video and one direction, and nothing else.

    Args:
        module: the encoder or the decoder. Every submodule with ``context_frames > 0`` gets an entry.
        offloader: decides where the contexts live; on the device by default.

    Use it in a ``with`` statement; leaving it frees every context. Each chunk runs inside :meth:`chunk`. If a chunk
    fails, all contexts are dropped at once and the cache refuses further use: they would be inconsistent.
    """

    def __init__(self, module: nn.Module, *, offloader: Offloader | None = None) -> None:
        self.offloader = offloader or Offloader()
        self._entries = {
            layer: _Entry(path) for path, layer in module.named_modules() if getattr(layer, "context_frames", 0) > 0
        }
        self._state = _State.UNOPENED
        self._chunk = -1
        self._in_chunk = False
        self._open: _Entry | None = None
        "whose window is open"
        self._group: list[_Entry] = []
        "layers that run piece by piece now"
        self.piece = 0
        "which piece of a chunk a group computes now; 0 also outside groups"
        self._is_last_piece = True
        self.last_layer: str | None = None
        """path of the layer whose context is the last that counts in a chunk of a cold start: the chunk ends there,
        without an output; None for whole chunks"""

    def __enter__(self) -> Self:
        if self._state is not _State.UNOPENED:
            raise CacheError(f"the cache cannot be entered: it is {self._state.value}")
        self._state = _State.OPEN
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free every context. May be called again."""
        self._drop(_State.CLOSED)

    def _drop(self, state: _State) -> None:
        self._state = state
        self.offloader.drop()

    @property
    def nbytes(self) -> int:
        """Bytes of all contexts that exist now, wherever they are."""
        return self.offloader.num_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of the contexts that hold device memory now."""
        return self.offloader.device_bytes

    @property
    def is_open(self) -> bool:
        """Whether it is inside its ``with`` statement and no chunk has failed."""
        return self._state is _State.OPEN

    @property
    def num_chunks(self) -> int:
        """Chunks that have run to their end."""
        return self._chunk + (not self._in_chunk)

    def layer_bytes(self) -> dict[str, int]:
        """Bytes of each layer's context by module path, in the order of the modules; 0 before the first chunk."""
        there = self.offloader.layer_bytes()
        return {entry.path: there.get(entry.path, 0) for entry in self._entries.values()}

    def contexts(self) -> Iterator[tuple[str, Tensor]]:
        """Path and context (B, C, k - 1, H, W) of every layer between two chunks, in the order in which they run.

        Each is where it happens to be, and belongs to the cache: read it, and let go of it before the next chunk.

        Raises:
            CacheError: the cache is not open, or a chunk is running.
        """
        self._require_between_chunks("contexts can be read")
        return self.offloader.contexts()

    def start_at(self, chunk: int) -> None:
        """Start in the middle of a video: the next chunk is number ``chunk``, and no layer has a context yet.

        Results are those of the whole video once as many chunks have run as :func:`longvid.warmup` says.

        Raises:
            CacheError: the cache is not open, or has run a chunk.
        """
        self._require_between_chunks("start in the middle")
        if self._chunk >= 0:
            raise CacheError(f"no start at chunk {chunk}: the cache has run {self.num_chunks} chunks already")
        self._chunk = chunk - 1

    def _require_between_chunks(self, what: str) -> None:
        if self._state is not _State.OPEN:
            raise CacheError(f"no {what}: the cache is {self._state.value}")
        if self._in_chunk:
            raise CacheError(f"no {what}: a chunk is already running on this cache, which serves one video at a time")

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """The life of one chunk. On any exception inside, every context is freed and the cache is unusable.

        With a ``last_layer`` set, the block ends behind that layer, and what follows the ``with`` statement runs.

        Raises:
            CacheError: the cache is not open, another chunk is running, or a layer did not run in this chunk.
        """
        self._require_between_chunks("chunk can run")
        self._in_chunk = True
        self._open = None
        self._chunk += 1
        try:
            yield
            left = [entry.path for entry in self._entries.values() if entry.chunk != self._chunk]
            if left:
                raise CacheError(
                    f"chunk {self._chunk} ended, but {len(left)} of {len(self._entries)} layers did not run in it, "
                    f"among them {left[0]!r}; a context that misses a chunk is wrong from then on"
                )
        except _EndOfChunk:
            self._open = None
            if self._group:
                self.offloader.end()
        except BaseException:
            self._drop(_State.FAILED)
            raise
        finally:
            self._in_chunk = False
            self._group, self.piece, self._is_last_piece = [], 0, True

    def pieces(self, modules: Sequence[nn.Module], parts: Sequence[range]) -> Iterator[range]:
        """Iterate over parts of a chunk, for each of which all layers in ``modules`` run once more.

        Their contexts are on the device from the first part to the last.
        """
        inside = {part for module in modules for part in module.modules()}
        group = [entry for layer, entry in self._entries.items() if layer in inside]
        assert group
        assert not self._group
        name = group[0].path if len(group) == 1 else f"{group[0].path} .. {group[-1].path}"
        self.offloader.begin(name)
        self._group = group
        for self.piece, part in enumerate(parts):
            self._is_last_piece = self.piece == len(parts) - 1
            yield part
            for entry in group:
                if (entry.chunk, entry.piece) != (self._chunk, self.piece):
                    raise CacheError(f"layer {entry.path!r} did not run in piece {self.piece} of chunk {self._chunk}")
        self._group, self.piece = [], 0
        self.offloader.end()

    def open_window(self, layer: CausalLayer, shape: tuple[int, int, int, int, int], kind: TensorKind) -> str:
        """Say that the window of a layer opens whose input has this shape, whatever T is; return the layer's path.

        Raises CacheError if the layer is not of the cache's module, ran already in this chunk, or has a context of
        another batch, size, dtype or device; or if another window is open: plans and offloading count on one.
        """
        entry = self._entries.get(layer) if isinstance(layer, nn.Module) else None
        if entry is None:
            raise CacheError(
                f"{type(layer).__name__} is not a layer of the module this cache was made for; an encoder and a "
                "decoder, and two models, each need a cache of their own"
            )
        path = entry.path
        if not self._in_chunk:
            raise CacheError(f"layer {path!r} ran outside a chunk; wrap the call in: with cache.chunk()")
        again = entry in self._group and self.piece == entry.piece + 1
        if entry.chunk == self._chunk and not again:
            raise CacheError(f"layer {path!r} ran twice in chunk {self._chunk}; every call needs a layer of its own")
        got = _signature(shape, kind.dtype, kind.device)
        have = entry.signature = entry.signature or got
        wrong = [f"{name} {got[name]} instead of {have[name]}" for name in have if have[name] != got[name]]
        if wrong:
            raise CacheError(
                f"layer {path!r} got {', '.join(wrong)}; a cache serves one video, so use a new one for another video"
            )
        if self._open is not None:
            raise CacheError(
                f"layer {path!r} opened its window inside that of {self._open.path!r}; leave one before the next"
            )
        self._open = entry
        return path

    def close_window(self, *, failed: bool) -> None:
        """Say that the open window is closed, and whether an exception did that."""
        if self._open is not None and not failed:
            self.offloader.done(self._open.path)
        self._open = None

    def keep(self, context: Tensor) -> None:
        """Make ``context`` that of the open window's layer for the next chunk. The layer has then run in this one."""
        assert self._open is not None
        self.offloader.keep(self._open.path, context, complete=self._is_last_piece)
        self._open.chunk, self._open.piece = self._chunk, self.piece
        if self._open.path == self.last_layer and self._is_last_piece:
            raise _EndOfChunk


def _signature(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    B, C, _, H, W = shape
    return {"batch": B, "channels": C, "size": f"{W}x{H}", "dtype": dtype, "device": device}

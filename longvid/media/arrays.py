"""Frames from memory, from zarr arrays, and from iterables, as sources that are read once.

Torch tensors are recognised by the name of their module, so that neither torch nor zarr is imported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from longvid.errors import SourceError
from longvid.frames import FrameBlock, frame_digest
from longvid.media.frame_source import DEFAULT_FRAME_RATE, FrameSource, Reading
from longvid.media.timing.resampling import Instants

__all__ = [
    "ArrayFrames",
    "IterableFrames",
    "check_layout",
    "is_array",
    "to_numpy",
]

_BLOCK_FRAMES = 16
_BLOCK_BYTES = 64 * 2**20
_MOST_CHUNK_BYTES = 2 * 2**30
"largest chunk of a stored array: reading a part of a chunk loads all of it"
_EXPECTED = "uint8 with axes (T, H, W, 3)"


class ArrayFrames(FrameSource):
    """Frames of a numpy array, a torch tensor or a ``zarr.Array`` of shape (T, H, W, 3), sliced as they are needed.

    ``size`` can only be that of the array, since arrays are not resized here. Without ``frame_rate`` 24 frames per
    second are assumed, and ``info`` says so. For the rest see :func:`longvid.media.sources.open_source`.
    """

    def __init__(self, array: Any, *, name: str | None = None, **reading: Unpack[Reading]) -> None:
        kind = "tensor" if type(array).__name__ == "Tensor" else "array"
        module = type(array).__module__.partition(".")[0]
        super().__init__(name or f"the {module} {kind}", **reading)
        check_layout(array, self._name, ranks=(4,))
        count, height, width = (int(length) for length in array.shape[:3])
        if self._fps is not None:
            count = Instants(self._fps, 1 / (self._frame_rate or DEFAULT_FRAME_RATE)).before(count)
        if not count:
            raise SourceError(f"{self._name} holds no frames: its shape is {tuple(array.shape)}", kind="no-frames")
        if self._begin >= count:
            raise self._beyond_end(count)
        self._array = array
        self._stop = count if self._end is None else min(count, self._end)
        self._set_info("array", (height, width), self._stop - self._begin)
        self._step = _aligned_step(array, height, width, self._name)

    def fingerprint(self) -> dict[str, Any]:
        """Size and window of the array, and a digest of the frames in the window.

        A longvid store has a digest already. Any other array is read once more for it, which takes little time
        compared with encoding.
        """
        content = getattr(self._array, "digests", None)
        if not isinstance(content, str):
            digest = hashlib.sha256()
            for block in self._slices():
                digest.update(np.ascontiguousarray(block.frames_THWC).data)
            content = digest.hexdigest()
        return {
            "kind": self.info.kind,
            "shape": [int(length) for length in self._array.shape],
            "start": self._begin,
            "end": self._stop,
            "content": content,
            **self._timing,
        }

    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the frames in bounded blocks that begin where the array's chunks begin."""
        self._start()
        self._begin += first
        return self._within_limits(self._slices(), done=first)

    def close(self) -> None:
        """Release the array, which itself stays as it is."""
        super().close()
        self._array = None

    def _slices(self) -> Iterator[FrameBlock]:
        begin = self._begin
        while begin < self._stop:
            self._check_open()
            end = min(self._stop, (begin // self._step + 1) * self._step)
            if self._fps is None:
                frames = self._read(begin, end)
            else:
                shown = self._instants.shown(begin, end)
                shown = shown[shown < shown[0] + self._step]
                frames = self._read(int(shown[0]), int(shown[-1]) + 1)[shown - shown[0]]
                end = begin + len(shown)
            yield FrameBlock.whole(frames, np.arange(begin, end, dtype=np.int64))
            begin = end

    def _read(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        try:
            return to_numpy(self._array[begin:end])
        except (OSError, ValueError, RuntimeError) as exc:
            raise SourceError(f"frames {begin} to {end - 1} of {self._name} cannot be read: {exc}") from exc


class IterableFrames(FrameSource):
    """Frames from an iterable of uint8 pieces of shape (T, H, W, 3) or (H, W, 3); their number is not known in advance.

    The first piece is taken at once to learn the size, and none is taken beyond the window. Every piece is copied, so
    that a generator may reuse its buffer. What the iterable raises comes out unchanged.
    """

    def __init__(self, pieces: Iterable[Any], **reading: Unpack[Reading]) -> None:
        super().__init__(f"the {type(pieces).__name__}", **reading)
        self._iterator = iter(pieces)
        self._num_pieces = 0
        first = self._next_piece()
        if first is None:
            raise SourceError(f"{self._name} gave no frames", kind="no-frames")
        self._first: npt.NDArray[np.uint8] | None = first
        self._set_info("iterable", first.shape[1:3], None)

    def fingerprint(self) -> dict[str, Any]:
        """Size, window and first frame; later frames are compared when a run resumes."""
        first = self._first
        return {
            "kind": self.info.kind,
            "size": [self.info.height, self.info.width],
            "start": self._begin,
            "end": self._end,
            "first_frame": None if first is None else frame_digest(first[0]),
            **self._timing,
        }

    def blocks(self, *, first: int = 0) -> Iterator[FrameBlock]:
        """Yield the frames, one block for each piece."""
        self._start()
        return self._within_limits(self._cut_pieces(self._begin + first), done=first)

    def close(self) -> None:
        """End the iterable if it is a generator."""
        if self._closed:
            return
        super().close()
        self._first = None
        close = getattr(self._iterator, "close", None)
        if callable(close):
            close()

    def _cut_pieces(self, start: int) -> Iterator[FrameBlock]:
        position = num_taken = 0
        piece, self._first = self._first, None
        while piece is not None:
            num_taken += len(piece)
            if self._fps is not None:
                shown = self._instants.shown(position, self._instants.before(num_taken))
                piece = piece[shown - (num_taken - len(piece))]
            begin, end = max(start - position, 0), len(piece)
            if self._end is not None:
                end = min(end, self._end - position)
            if begin < end:
                yield FrameBlock.whole(piece[begin:end], np.arange(position + begin, position + end, dtype=np.int64))
            position += len(piece)
            if self._end is not None and position >= self._end:
                return
            self._check_open()
            piece = self._next_piece()
        if position <= self._begin:
            raise self._beyond_end(position)

    def _next_piece(self) -> npt.NDArray[np.uint8] | None:
        """Take the next piece that is not empty, with a time axis."""
        for piece in self._iterator:
            name = f"piece {self._num_pieces} of {self._name}"
            self._num_pieces += 1
            check_layout(piece, name, ranks=(3, 4))
            frames_THWC = np.array(to_numpy(piece), dtype=np.uint8, ndmin=4)
            (height, width), before = frames_THWC.shape[1:3], getattr(self, "info", None)
            if before is not None and (height, width) != (before.height, before.width):
                raise SourceError(
                    f"{name} has frames of {width}x{height} pixels where {before.width}x{before.height} came before; "
                    f"bring all pieces to one size first",
                    kind="geometry-changed",
                )
            if len(frames_THWC):
                return frames_THWC
        return None


def is_array(value: Any) -> bool:
    """Whether the value can be sliced as an array: it has a shape, a dtype and an index."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__"))


def _aligned_step(array: Any, height: int, width: int, name: str) -> int:
    """Frames per block: whole chunks where the array has chunks, since a part of one costs as much as all of it."""
    step = max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // max(1, height * width * 3)))
    chunks = getattr(array, "chunks", None)
    if not (isinstance(chunks, tuple) and chunks and isinstance(chunks[0], int)):
        return step
    chunk = max(1, chunks[0])
    if chunk * height * width * 3 > _MOST_CHUNK_BYTES:
        raise SourceError(
            f"{name} is stored in chunks of {chunk} frames of {width}x{height}, "
            f"{chunk * height * width * 3 / 2**30:.1f} GiB each, which would have to be held whole; store it in "
            f"shorter chunks, such as {step} frames",
            kind="layout",
        )
    return max(chunk, step // chunk * chunk)


def check_layout(array: Any, name: str, *, ranks: tuple[int, ...]) -> None:
    """Raise SourceError unless ``array``, which messages call ``name``, holds frames in as many axes as allowed."""
    if not is_array(array):
        raise SourceError(
            f"{name} is a {type(array).__name__}; expected a numpy array or a torch tensor, {_EXPECTED}", kind="layout"
        )
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    given = f"{name} is {dtype} with shape {shape}; expected {_EXPECTED}"
    if dtype != "uint8":
        how = "Bring the values to 0..255 and cast them to uint8"
        if "float" in dtype:
            how = "Convert values of 0..1 with (x * 255).round().clip(0, 255) and cast the result to uint8"
        raise SourceError(f"{given}. {how}", kind="layout")
    if len(shape) not in ranks or shape[-1] != 3:
        hint = ". Move the channels to the last axis" if 3 in shape[:-1] and len(shape) in (*ranks, 5) else ""
        raise SourceError(f"{given}{hint}", kind="layout")
    if not (shape[-3] and shape[-2]):
        raise SourceError(f"{given}, with at least one pixel", kind="layout")


def to_numpy(piece: Any) -> npt.NDArray[np.uint8]:
    """The frames of a numpy array or of a torch tensor on any device."""
    if type(piece).__module__.startswith("torch"):
        piece = piece.detach().cpu().numpy()
    return np.asarray(piece, dtype=np.uint8)

"""Makes frames whole that consist of two fields, taken one after the other: FFmpeg's filter bwdif.

The number of frames and their time stamps stay. What a frame becomes depends on itself and on the frames before and
after it alone, so that it does not matter where reading began.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, TypeVar

import av
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from longvid.errors import SourceError
from longvid.frames import Deinterlace

__all__ = ["Delivered", "Fields", "Whole"]

T = TypeVar("T")

Delivered: TypeAlias = tuple[T, int, bool]
"a frame with its time stamp and whether it is the source's own; one that is repeated is the same object again"


_UNMARKED = ("utvideo", "huffyuv", "ffvhuff", "magicyuv", "png", "qtrle", "mjpeg", "jpeg2000", "hap", "cinepak")
"decoders that do not mark the frames of interlaced video as such"
_INTERLACED = (2, 3, 4, 5)
"field orders, by the numbers of FFmpeg"


class Whole(NamedTuple):
    """A frame without fields."""

    frame: VideoFrame
    original: VideoFrame
    "as it was decoded"


class Fields:
    """What is done with the interlaced frames of one file."""

    def __init__(self, name: str, mode: Deinterlace) -> None:
        self._name, self._mode = name, mode
        self._said = False

    def warn(self) -> None:
        """Say that there are such frames, once."""
        if not self._said:
            self._said = True
            how = "frames are made whole by the filter bwdif; --deinterlace off leaves the fields as they are"
            if self._mode == "off":
                how = (
                    "its fields are left as they are, so that motion shows combs; --deinterlace auto makes frames whole"
                )
            warnings.warn(f"{self._name} is interlaced: {how}", stacklevel=4)

    def warn_of_header(self, codec: VideoCodecContext) -> None:
        """Say that a header declares fields where the decoder marks no frame, so that they are left as they are."""
        if codec.name in _UNMARKED and codec.field_order in _INTERLACED and not self._said:
            warnings.warn(
                f"{self._name} is interlaced by its header, but its decoder ({codec.name}) does not mark the frames, "
                "and their fields are left as they are; make them whole with ffmpeg -vf bwdif first",
                stacklevel=4,
            )

    def frames(
        self,
        read: Callable[[int], Iterator[Delivered[VideoFrame]]],
        read_again: Callable[[int], Iterator[Delivered[VideoFrame]]],
        index: int,
        *,
        before: int,
    ) -> Iterator[Delivered[Whole]]:
        """Yield the frames from number ``index`` on. Where they are interlaced, ``before`` earlier ones are read too.

        The two functions read from a frame on, for the first time and later.
        """
        if self._mode == "auto" and self._said:
            before = min(index, before)
            yield from itertools.islice(_deinterlaced(read(index - before), self.warn), before, None)
            return
        delivered = read(index)
        first = next(delivered, None)
        if first is None:
            return
        delivered = itertools.chain([first], delivered)
        if self._mode == "off":
            whole = Whole(first[0], first[0])
            for frame, pts, valid in delivered:
                if frame.interlaced_frame:
                    self.warn()
                whole = whole if whole.frame is frame else Whole(frame, frame)
                yield whole, pts, valid
            return
        if not (index and first[0].interlaced_frame):
            before = 0
        if before:
            delivered = read_again(index - before)
        yield from itertools.islice(_deinterlaced(delivered, self.warn), before, None)


def _deinterlaced(delivered: Iterator[Delivered[VideoFrame]], found: Callable[[], None]) -> Iterator[Delivered[Whole]]:
    """Yield the frames with those made whole that are marked as interlaced; ``found`` is called before such a frame.

    A frame waits for the one after it only if it is interlaced. The frames beside damage have no neighbour there.
    """
    state = _State(found)
    try:
        for item in delivered:
            yield from state.add(item)
    except SourceError:
        yield from state.flush(None)
        raise
    yield from state.flush(None)


class _State:
    """The last frame, those that stand for it, and the frame before it."""

    def __init__(self, found: Callable[[], None]) -> None:
        self._found = found
        self._filter = _Filter()
        self._previous: VideoFrame | None = None
        self._frame: VideoFrame | None = None
        self._whole: Whole | None = None
        self._waiting: list[tuple[int, bool]] = []
        self._is_whole_source = False
        "the source's own frame has come, and not only repetitions before it"
        self._gap = False

    def add(self, item: Delivered[VideoFrame]) -> Iterator[Delivered[Whole]]:
        frame, pts, valid = item
        if frame is not self._frame:
            adjacent = self._frame is not None and valid and not self._gap and _alike(frame, self._frame)
            yield from self.flush(frame if adjacent else None)
            self._previous = self._frame if adjacent and frame.interlaced_frame else None
            self._frame, self._gap, self._is_whole_source = frame, False, False
            self._whole = None if frame.interlaced_frame else Whole(frame, frame)
        self._is_whole_source = self._is_whole_source or valid
        if not valid and self._is_whole_source:
            self._gap = True
            yield from self.flush(None)
        self._waiting.append((pts, valid))
        if self._whole is not None:
            yield from self.flush(None)

    def flush(self, following: VideoFrame | None) -> Iterator[Delivered[Whole]]:
        """Yield what waits for the frame after the last one."""
        if self._frame is None or not self._waiting:
            return
        if self._whole is None:
            self._found()
            self._whole = Whole(self._filter.apply(self._previous, self._frame, following), self._frame)
        waiting, self._waiting = self._waiting, []
        for pts, valid in waiting:
            yield self._whole, pts, valid


class _Filter:
    """The filter graph. It is kept while frames follow each other, and made again elsewhere."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._last: VideoFrame | None = None

    def apply(self, previous: VideoFrame | None, frame: VideoFrame, following: VideoFrame | None) -> VideoFrame:
        """A frame made whole, by the frames before and after it."""
        whole = None
        if self._graph is None or self._last is not frame or previous is None:
            self._graph = _graph(frame)
            for earlier in (previous, frame):
                if earlier is not None:
                    self._graph.vpush(earlier)
        try:
            self._graph.vpush(following)
            while True:
                whole = self._graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            pass
        self._last = following
        if following is None:
            self._graph = None
        assert whole is not None
        return whole


def _graph(frame: VideoFrame) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or None
    )
    # all frames that come in are filtered; which of them come out so is decided outside
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=all"), graph.add("buffersink")).configure()
    return graph


def _alike(frame: VideoFrame, other: VideoFrame | None) -> bool:
    return other is not None and (frame.width, frame.height, frame.format.name) == (
        other.width,
        other.height,
        other.format.name,
    )

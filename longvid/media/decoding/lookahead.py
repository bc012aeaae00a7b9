"""An iterator whose next items can be looked at before they are taken."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["Lookahead"]

T = TypeVar("T")


class Lookahead(Generic[T], Iterator[T]):
    """The items of an iterable."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._ahead: deque[T] = deque()

    def __next__(self) -> T:
        return self._ahead.popleft() if self._ahead else next(self._items)

    def peek(self, count: int) -> list[T]:
        """The next ``count`` items, or fewer at the end; they come out later all the same."""
        self._ahead.extend(itertools.islice(self._items, max(0, count - len(self._ahead))))
        return list(itertools.islice(self._ahead, count))

"""Names of pictures: those in a folder in natural order, and numbered ones by a pattern such as ``frames/%05d.png``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from longvid.errors import SourceError
from longvid.media.decoding.media_file import unopened
from longvid.media.output.formats import PICTURES

__all__ = ["has_picture_suffix", "is_pattern", "list_pictures", "natural_key"]

_NUMBER = re.compile(r"%(0[0-9]+)?d")
_DIGITS = re.compile(r"([0-9]+)")
_SUFFIXES = ", ".join(PICTURES)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people count: ``a2`` before ``a10``, large and small letters alike."""
    parts: list[str | int] = list(_DIGITS.split(name.casefold()))
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def has_picture_suffix(path: str) -> bool:
    """Whether a name ends as those of pictures do."""
    return path.lower().endswith(PICTURES)


def is_pattern(path: str) -> bool:
    """Whether a path stands for numbered pictures: a name with one ``%05d`` that is not the name of a file itself."""
    name = os.path.basename(path)
    return len(_NUMBER.findall(name)) == 1 and has_picture_suffix(name) and not os.path.lexists(path)


def list_pictures(path: str) -> list[str]:
    """Names of the pictures that a folder or a pattern stands for, in their order; folders in it are not looked into.

    Hidden files and files with other suffixes do not count.

    Raises:
        SourceError: there is no such folder or no picture in it, or a number is missing.
    """
    if not is_pattern(path):
        names = sorted(_entries(path), key=natural_key)
        if not names:
            raise SourceError(
                f"{path} is a folder without pictures ({_SUFFIXES}); name a folder that has some, or a video file",
                kind="not-video",
            )
        return names
    folder, pattern = os.path.split(path)
    numbered = _numbered(folder or os.curdir, pattern)
    if not numbered:
        raise SourceError(f"there is no picture {path}, with any number; check the name", kind="missing")
    first, last = min(numbered), max(numbered)
    if last - first + 1 != len(numbered):
        gap = next(number for number in range(first, last) if number not in numbered)
        missing = last - first + 1 - len(numbered)
        raise SourceError(
            f"{os.path.join(folder, _format(pattern, gap))} is missing: of the numbers {first} to {last} of {path}, "
            f"{missing} of {last - first + 1} are missing; add them, or name the folder, {folder or os.curdir}, "
            "whose pictures are read in the order of their names",
            kind="missing",
        )
    return [numbered[number] for number in range(first, last + 1)]


def _numbered(folder: str, pattern: str) -> dict[int, str]:
    """Names that follow the pattern, by their numbers."""
    before, after = _NUMBER.sub("\0", pattern).split("\0")
    form = re.compile(re.escape(before) + "([0-9]+)" + re.escape(after))
    found = {}
    for name in _entries(folder, hidden=pattern.startswith(".")):
        match = form.fullmatch(name)
        if match and _format(pattern, int(match[1])) == name:
            found[int(match[1])] = name
    return found


def _format(pattern: str, number: int) -> str:
    return _NUMBER.sub(lambda match: match[0] % number, pattern)


def _entries(folder: str, *, hidden: bool = False) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                counts = has_picture_suffix(entry.name) and (hidden or not entry.name.startswith("."))
                if counts and not entry.is_dir():  # a link that leads nowhere counts: it is an error when it is read
                    yield entry.name
    except (OSError, ValueError) as exc:
        raise unopened(folder, exc) from exc

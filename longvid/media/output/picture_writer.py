"""Numbered pictures, written frame by frame; they take their names only when all are complete."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from longvid.errors import StoreError
from longvid.files import sync_path
from longvid.media.output.errors import writing
from longvid.media.output.formats import PICTURES

__all__ = ["PictureWriter", "is_pictures", "picture_path"]

_NUMBER = re.compile(r"%(0\d+)?d")
_DEFAULT_NAME = "frame-%06d.png"
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


@dataclass(frozen=True, slots=True)
class _Kind:
    encoder: str
    pix_fmt: str
    largest: int
    "pixels of a side"
    options: Mapping[str, str] = field(default_factory=dict)


_JPEG = _Kind("mjpeg", "yuvj444p", 65500, {"qmin": "2", "qmax": "2", "huffman": "optimal"})
_TIFF = _Kind("tiff", "rgb24", 65535, {"compression_algo": "deflate"})
_KINDS = {
    ".png": _Kind("png", "rgb24", 65535),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": _Kind("libwebp", "bgra", 16383, {"lossless": "1", "compression_level": "4"}),
}
assert tuple(_KINDS) == PICTURES


def picture_path(out: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path with which pictures are named in a folder whose path ends in a slash; any other path as it is."""
    text = os.fspath(out)
    is_folder = text.endswith(("/", os.sep)) and Path(text).suffix != ".zarr"
    return text + _DEFAULT_NAME if is_folder else out


def is_pictures(path: Path) -> bool:
    """Whether a path stands for pictures, by its suffix."""
    return path.suffix.lower() in _KINDS


class PictureWriter:
    """Writes every frame as a picture of its own; a context manager.

    ``path`` has a ``%05d`` in its name, which stands for the number of a frame; the first one has the number ``first``.
    Without it, there may be one frame only. Pictures are written to a hidden folder beside their own, and take their
    names on a clean exit; the folder is removed if the block raises. The last folder of the path is made if it is
    missing. PNG, TIFF and WebP are lossless, JPEG is of high quality in 4:4:4.

    Raises:
        StoreError: a picture exists and may not be replaced, or one exists that this run would not replace though its
            name is of the same pattern, or the format does not take such frames.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: tuple[int, int],
        num_frames: int,
        first: int = 0,
        overwrite: bool = False,
    ) -> None:
        self._path = Path(path)
        self._height, self._width = size
        self._num_frames, self._first, self._overwrite = num_frames, first, overwrite
        self._kind = _KINDS[self._path.suffix.lower()]
        self._written = 0
        self._staging: Path | None = None
        self._made_folder = False
        self._scaler = VideoReformatter()
        self._check_names()
        self._check_present()

    def write(
        self,
        frames_THWC: npt.NDArray[np.uint8],
        pts_T: npt.NDArray[np.int64],
        valid_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Append frames, uint8 RGB; pictures have no place for time stamps and marks.

        Raises:
            StoreError: the frames have another size, or a picture cannot be written.
        """
        if self._staging is None:
            raise StoreError(f"{self._path} is not open for writing; use the writer in a with block")
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != (self._height, self._width, 3):
            raise StoreError(
                f"frames for {self._path} are {frames_THWC.dtype} with shape {frames_THWC.shape}; expected uint8 with "
                f"shape (T, {self._height}, {self._width}, 3)",
                kind="format",
            )
        with writing(self._path):
            for frame_HWC in frames_THWC:
                name = self._name(self._first + self._written)
                (self._staging / name).write_bytes(self._encoded(frame_HWC))
                self._written += 1

    def __enter__(self) -> Self:
        folder = self._path.parent
        with writing(self._path):
            if not folder.exists():
                folder.mkdir()
                self._made_folder = True
            staging = folder / f".partial-{secrets.token_hex(4)}"
            staging.mkdir()
            self._staging = staging
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        staging, self._staging = self._staging, None
        try:
            if exc_type is None and staging is not None:
                self._finish(staging)
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            if self._made_folder:
                with contextlib.suppress(OSError):
                    self._path.parent.rmdir()  # only if it is empty

    def _finish(self, staging: Path) -> None:
        if not self._written:
            raise StoreError(f"no frames were written to {self._path}, so that there is no picture to keep")
        self._check_present()
        with writing(self._path):
            for number in range(self._first, self._first + self._written):
                name = self._name(number)
                if self._overwrite:
                    (staging / name).replace(self._path.parent / name)
                else:
                    _move_new(staging / name, self._path.parent / name)
            sync_path(self._path.parent)

    def _name(self, number: int) -> str:
        return self._path.name % number if _NUMBER.search(self._path.name) else self._path.name

    def _check_names(self) -> None:
        name, parent = self._path.name, self._path.parent
        numbers, rest = _NUMBER.findall(name), _NUMBER.sub("", name)
        if len(numbers) > 1 or "%" in rest or "%" in str(parent):
            raise self._wrong("only one %d or %05d may stand in the name of the pictures, and no other %")
        if not numbers and self._num_frames > 1:
            raise self._wrong(
                f"it is one picture, and {self._num_frames} frames were asked for; give {self._path.stem}-%05d"
                f"{self._path.suffix}, or --frames 1"
            )
        if min(self._height, self._width) < 1 or max(self._height, self._width) > self._kind.largest:
            raise self._wrong(
                f"{self._path.suffix} takes up to {self._kind.largest}x{self._kind.largest} pixels, and these have "
                f"{self._width}x{self._height}; choose .png"
            )
        if not parent.is_dir() and (os.path.lexists(parent) or not parent.parent.is_dir()):
            missing = parent if os.path.lexists(parent) else parent.parent
            raise StoreError(f"{self._path} cannot be written: there is no folder {missing}; make it", kind="missing")

    def _check_present(self) -> None:
        """Compare the names of the pictures with what is in their folder."""
        pattern = _NUMBER.search(self._path.name)
        parts = [self._path.name] if pattern is None else self._path.name.split(pattern[0])
        own = re.compile(r"(\d+)".join(map(re.escape, parts)))
        wanted = range(self._first, self._first + self._num_frames)
        if not self._path.parent.is_dir():
            return
        with writing(self._path), os.scandir(self._path.parent) as entries:
            for entry in entries:
                found = own.fullmatch(entry.name)
                if found is None:
                    continue
                number = int(found[1]) if found.groups() else self._first
                replaced = number in wanted and self._name(number) == entry.name
                if not entry.is_file(follow_symlinks=False):
                    raise StoreError(
                        f"{entry.path} is not a file; choose another name for the pictures", kind="foreign"
                    )
                if replaced and not self._overwrite and entry.stat().st_size:
                    raise StoreError(
                        f"{entry.path} exists; replace it with --overwrite (overwrite=True), or choose another folder",
                        kind="exists",
                    )
                if not replaced and self._overwrite:
                    raise StoreError(
                        f"{entry.path} would stay, since frames {wanted[0]} to {wanted[-1]} are written, and would be "
                        "taken for a frame of this video; remove it, or choose another folder",
                        kind="exists",
                    )

    def _wrong(self, why: str) -> StoreError:
        return StoreError(f"{self._path} cannot be written: {why}", kind="format")

    def _encoded(self, frame_HWC: npt.NDArray[np.uint8]) -> bytes:
        codec: Any = av.CodecContext.create(self._kind.encoder, "w")
        codec.width, codec.height, codec.pix_fmt = self._width, self._height, self._kind.pix_fmt
        codec.time_base = Fraction(1, 25)
        codec.options = dict(self._kind.options)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), "rgb24")
        if self._kind.pix_fmt != "rgb24":
            is_yuv = self._kind.pix_fmt.startswith("yuv")
            frame = self._scaler.reformat(
                frame,
                format=self._kind.pix_fmt,
                dst_colorspace=5 if is_yuv else None,  # JPEG files have the matrix of BT.601
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=_EXACT,
            )
        frame.pts = 0
        return b"".join(bytes(packet) for packet in (*codec.encode(frame), *codec.encode(None)))


def _move_new(source: Path, target: Path) -> None:
    """Give a file its name if no other has it; an empty file counts as none."""
    with contextlib.suppress(FileNotFoundError):
        if not target.stat().st_size:
            target.unlink()
    try:
        os.link(source, target)
    except FileExistsError:
        raise StoreError(f"{target} appeared during the run; choose another folder", kind="exists") from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise StoreError(f"{target} appeared during the run; choose another folder", kind="exists") from None
        source.rename(target)

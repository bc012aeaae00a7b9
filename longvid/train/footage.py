"""Clips to train on, drawn from videos and images.

Every file is decoded once, to arrays in a cache folder that are then memory-mapped: whole videos 320 pixels wide,
stretches of them 640 wide, and single frames at full size for pans and zooms. A clip is a square crop with flips, time
reversal, stride, brightness and grain. What is drawn depends on the numbers given to the generator only, so a run can
be repeated and continued.

Axes: T time, H height, W width, C colour.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from longvid.errors import SourceError
from longvid.frames import Frames
from longvid.media.video_file import VideoFile

__all__ = ["Footage", "HoldOut", "find_files", "read_middle"]

IMAGES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".mpg", ".mkv", ".mov", ".webm", ".avi", ".3gp", ".m4v")
STRETCH, EVERY = 96, 288
"At 640 pixels wide, the first STRETCH of EVERY frames are kept."
STILL_EVERY = 48
"One frame in so many is kept at full size."


@dataclass(frozen=True, slots=True)
class HoldOut:
    """Footage that is never trained on: files by name, or seconds of them."""

    pattern: str
    start: float = 0.0
    stop: float = float("inf")

    @classmethod
    def parse(cls, text: str) -> HoldOut:
        """Read ``"city*"`` or ``"bunny*@240-270"`` (seconds); ValueError if it is neither of them."""
        parts = re.fullmatch(r"([^@]+)(?:@([\d.]+)-([\d.]+|inf))?", text)
        found = parts and (cls(parts[1], float(parts[2]), float(parts[3])) if parts[2] else cls(parts[1]))
        if not found or found.start >= found.stop:
            raise ValueError(f"{text!r} names no footage; write a file name pattern, or one and seconds: name*@240-270")
        return found

    def __str__(self) -> str:
        return self.pattern if self.whole else f"{self.pattern}@{self.start:g}-{self.stop:g}"

    @property
    def whole(self) -> bool:
        """Whether nothing of a file is left to train on."""
        return self.start == 0.0 and self.stop == float("inf")

    def matches(self, path: Path) -> bool:
        """Whether a file is meant."""
        return fnmatch(path.name, self.pattern)

    def frame_range(self, rate: float) -> tuple[int, int]:
        """Half-open range of frames at ``rate`` frames per second."""
        return round(self.start * rate), 1 << 40 if self.stop == float("inf") else round(self.stop * rate)


def find_files(paths: Sequence[Path], leave_out: Sequence[Path] = ()) -> list[Path]:
    """The videos and images among ``paths`` and in the folders among them, but not in ``leave_out``; sorted by name.

    Raises SourceError if a path does not exist, or there is nothing to train on.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise SourceError(f"{path} does not exist", kind="missing")
        inside = path.rglob("*") if path.is_dir() else [path]
        found |= {p for p in inside if p.suffix.lower() in IMAGES + VIDEOS and p.is_file()}
    own = [folder.resolve() for folder in leave_out]
    found = {p for p in found if not any(folder in p.resolve().parents for folder in own)}
    if not found:
        raise SourceError(
            f"no videos or images in {', '.join(map(str, paths))}; looked for {', '.join(VIDEOS + IMAGES)}",
            kind="missing",
        )
    return sorted(found, key=lambda p: (p.name, str(p)))


def read_middle(path: Path, held: HoldOut, *, size: tuple[int, int], frames: int) -> Frames:
    """The middle of what is held out of a video, resized to (height, width): ``frames`` or fewer, cut to 1 + 4 n.

    Raises SourceError if fewer than 5 frames are held out.
    """
    with VideoFile(path) as video:
        # Some containers do not say how long they are; then they are counted.
        total = video.info.num_frames or sum(len(block.frames_THWC) for block in video.blocks())
        first, stop = held.frame_range(float(video.info.frame_rate or 25))
    stop = min(stop, total)
    frames = min(frames, stop - first)
    if frames < 5:
        raise SourceError(
            f"{path}: {max(0, frames)} frames lie in {held.start:g} to {held.stop:g} seconds, too few to judge by; "
            "hold out more",
            kind="no-frames",
        )
    frames -= (frames - 1) % 4
    with VideoFile(path, start=first + (stop - first - frames) // 2, frames=frames, size=size, fit="stretch") as video:
        return np.concatenate([block.frames_THWC for block in video.blocks()])


@dataclass(slots=True)
class Footage:
    """Everything that clips are drawn from."""

    motion: list[list[Frames]] = field(default_factory=list)
    "runs of frames (T, H, W, 3) at 320 wide, by file"
    closer: list[list[Frames]] = field(default_factory=list)
    "the same at 640 wide, by file"
    stills: list[list[Frames]] = field(default_factory=list)
    "frames (1, H, W, 3) of videos at full size, by file"
    images: list[Frames] = field(default_factory=list)
    "(H, W, 3)"

    @classmethod
    def prepare(cls, files: Iterable[Path], cache: Path, hold_out: Sequence[HoldOut]) -> Footage:
        """Decode what is not in the cache yet, file by file."""
        cache.mkdir(parents=True, exist_ok=True)
        footage = cls()
        for path in files:
            held = [h for h in hold_out if h.matches(path)]
            if path.suffix.lower() in IMAGES:
                if not held:
                    with av.open(str(path)) as container:
                        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
                    footage.images.append(image.astype(np.uint8, copy=False))
            elif not any(h.whole for h in held):
                footage._add_video(path, cache, held)
        return footage

    def _add_video(self, path: Path, cache: Path, held: Sequence[HoldOut]) -> None:
        with VideoFile(path) as video:
            height, width, rate = video.info.height, video.info.width, float(video.info.frame_rate or 25)
        ranges = [h.frame_range(rate) for h in held]
        key = hashlib.sha256(f"{path.resolve()} {path.stat().st_size} {ranges}".encode()).hexdigest()[:8]
        heights = {w: max(8, round(height * w / width / 8) * 8) for w in (320, 640)}
        kinds = [(self.motion, "320", (heights[320], 320), 1 << 30, 1 << 30)]
        if width >= 640:
            kinds.append((self.closer, "640", (heights[640], 640), STRETCH, EVERY))
            kinds.append((self.stills, "stills", (height, width), 1, STILL_EVERY))
        for files, name, size, keep, every in kinds:
            folder = cache / f"{path.stem}-{key}-{name}"
            if not folder.exists():
                _decode_runs(path, folder, size, ranges, keep, every)
            runs = [np.load(file, mmap_mode="r") for file in sorted(folder.iterdir())]
            if runs:
                files.append(runs)

    def clip(
        self, rng: np.random.Generator, *, num_frames: int, size: int, augment: bool = True
    ) -> npt.NDArray[np.float32]:
        """One clip (num_frames, size, size, 3) of whole numbers 0 to 255."""
        if augment and (self.stills or self.images) and rng.random() < 0.2:
            clip = _pan(rng, self._still(rng), num_frames, size)
        else:
            closer = bool(augment and self.closer and rng.random() < 0.25)
            clip = self._motion(rng, self.closer if closer else self.motion, num_frames, size, augment)
        if rng.random() < 0.5:
            clip = clip[:, :, ::-1]
        if rng.random() < 0.5:
            clip = clip[::-1]
        if augment:
            if rng.random() < 0.15:
                clip = clip[:, ::-1]
            if rng.random() < 0.15:
                clip = clip.swapaxes(1, 2)
            if rng.random() < 0.3:
                clip = (clip - 128) * rng.uniform(0.6, 1.2) + 128 + rng.uniform(-20, 20)
            if rng.random() < 0.3:
                clip = clip + rng.uniform(0.5, 4.0) * rng.standard_normal(clip.shape, dtype=np.float32)
        return np.clip(np.rint(clip), 0, 255).astype(np.float32)

    @staticmethod
    def _motion(
        rng: np.random.Generator, files: list[list[Frames]], num_frames: int, size: int, augment: bool
    ) -> npt.NDArray[np.float32]:
        # Long videos weigh more, but less than their length: they repeat themselves.
        weights = np.array([sum(map(len, runs)) for runs in files]) ** 0.7
        runs = files[rng.choice(len(files), p=weights / weights.sum())]
        lengths = np.array([len(run) for run in runs])
        run = runs[rng.choice(len(runs), p=lengths / lengths.sum())]
        stride = 2 if augment and rng.random() < 0.2 and len(run) >= 2 * num_frames else 1
        index = stride * np.arange(num_frames)
        if len(run) > index[-1]:
            index += rng.integers(len(run) - index[-1])
        else:  # too short: there and back again
            index = np.abs((index + rng.integers(len(run))) % max(1, 2 * len(run) - 2) - (len(run) - 1))
        _, H, W, _ = run.shape
        y, x = rng.integers(max(1, H - size + 1)), rng.integers(max(1, W - size + 1))
        crop = run[index.min() : index.max() + 1, y : y + size, x : x + size][index - index.min()]
        pad = ((0, 0), (0, size - crop.shape[1]), (0, size - crop.shape[2]), (0, 0))
        return np.pad(crop, pad, mode="edge").astype(np.float32)

    def _still(self, rng: np.random.Generator) -> Frames:
        """An image or a frame of a video, half and half if there are both: photographs show what footage lacks."""
        if self.images and (not self.stills or rng.random() < 0.5):
            return self.images[rng.integers(len(self.images))]
        weights = np.sqrt([len(runs) for runs in self.stills])
        runs = self.stills[rng.choice(len(self.stills), p=weights / weights.sum())]
        return np.array(runs[rng.integers(len(runs))][0])


def _pan(rng: np.random.Generator, image: Frames, num_frames: int, size: int) -> npt.NDArray[np.float32]:
    """A camera moving over a still: linear in place and scale, or standing still."""
    still = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    short = min(still.shape[2:])
    scale = min(1.0, rng.uniform(176, 480) / short) if short > 176 else 1.0
    if scale < 1:
        still = F.interpolate(still, scale_factor=scale, mode="bilinear", antialias=True)
    H, W = still.shape[2:]
    moving = rng.random() < 0.8
    speed = rng.uniform(0, 3) * np.array([np.cos(a := rng.uniform(0, 2 * np.pi)), np.sin(a)]) * moving
    zoom = np.exp(rng.uniform(-0.004, 0.004) * moving * np.arange(num_frames))
    zoom = zoom / zoom.max()  # never sampled more coarsely than the still is
    start = rng.uniform([size / 2, size / 2], [max(size / 2 + 1, H - size / 2), max(size / 2 + 1, W - size / 2)])
    steps = torch.arange(size) - (size - 1) / 2
    frames = np.empty((num_frames, size, size, 3), dtype=np.float32)
    for t in range(num_frames):
        y, x = start + speed * t
        ys, xs = (y + steps * zoom[t]) / H * 2 - 1, (x + steps * zoom[t]) / W * 2 - 1
        grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None].float()
        frame = F.grid_sample(still, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        frames[t] = frame[0].permute(1, 2, 0).numpy()
    return frames


def _decode_runs(
    path: Path, folder: Path, size: tuple[int, int], held: Sequence[tuple[int, int]], keep: int, every: int
) -> None:
    """Write runs of consecutive frames as .npy files; the folder appears once it is whole."""
    unfinished = folder.with_name(folder.name + ".part")
    unfinished.mkdir(exist_ok=True)
    count = 0

    def is_kept(item: tuple[int, Frames]) -> bool:
        return item[0] % every < keep and not any(start <= item[0] < stop for start, stop in held)

    with VideoFile(path, size=size, fit="stretch") as video:
        frames = enumerate(itertools.chain.from_iterable(block.frames_THWC for block in video.blocks()))
        for kept, run in itertools.groupby(frames, is_kept):
            while kept and (part := list(itertools.islice(run, 4096))):
                np.save(unfinished / f"{count:06d}.npy", np.stack([frame for _, frame in part]))
                count += 1
    os.replace(unfinished, folder)

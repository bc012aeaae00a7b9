"""How frames come to the size that was asked for: what is cut off, the size they are scaled to, and where that lies."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from longvid.frames import Fit, Pixels
from longvid.media.images.orientation import Orientation

__all__ = ["Geometry", "Shape"]

_SAME_ASPECT = Fraction(2, 100)
"aspects that differ by no more are taken for the same one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What a file says of the geometry of its frames."""

    coded: tuple[int, int]
    "(height, width) as decoded"
    box: tuple[int, int, int, int] | None
    "(top, left, height, width) of the part that is shown, None for all"
    orientation: Orientation
    pixel_aspect: Fraction
    "width of a pixel by its height, as coded"

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) of the part that is shown, before it is turned."""
        return self.coded if self.box is None else self.box[2:]

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) of the part that is shown, after it is turned."""
        return self.orientation.turned(self.shown)

    @property
    def upright_pixel_aspect(self) -> Fraction:
        """Width of a pixel by its height, after the turn."""
        return 1 / self.pixel_aspect if self.orientation.turns % 2 else self.pixel_aspect

    @property
    def display_aspect(self) -> Fraction:
        """Width by height of the picture on a screen."""
        height, width = self.upright
        return Fraction(width, height) * self.upright_pixel_aspect


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How frames of one geometry come to one size. All sizes are (height, width), upright."""

    geometry: Geometry
    size: tuple[int, int]
    "of the frames that come out"
    scaled: tuple[int, int]
    "of the picture after it is scaled"
    corner: tuple[int, int]
    "(top, left) of the picture in the frames that come out; negative if it is cropped"
    pixel_aspect: Fraction
    "width of a pixel by its height, of the frames that come out"
    fit: Fit | None
    "how another shape was brought to the size that was asked for; None if no size was asked for"

    @classmethod
    def plan(cls, geometry: Geometry, size: tuple[int, int] | None, fit: Fit | None, pixels: Pixels) -> Shape:
        """Decide it; ``fit`` None crops if the aspects differ by more than 2 %."""
        height, width = geometry.upright
        if size is None:
            aspect = geometry.upright_pixel_aspect
            if pixels == "square":
                width, aspect = max(1, round(width * aspect)), Fraction(1)
            size = height, width
            return cls(geometry=geometry, size=size, scaled=size, corner=(0, 0), pixel_aspect=aspect, fit=None)
        asked, shown = Fraction(size[1], size[0]), geometry.display_aspect
        square = fit != "stretch" or pixels == "square"
        if fit is None:
            fit = "crop" if abs(shown / asked - 1) > _SAME_ASPECT else "stretch"
        scaled = size
        if fit != "stretch":
            wider = shown > asked
            if wider == (fit == "crop"):  # the height decides
                scaled = size[0], max(1, round(size[0] * shown))
            else:
                scaled = max(1, round(size[1] / shown)), size[1]
            bound = max if fit == "crop" else min
            scaled = bound(size[0], scaled[0]), bound(size[1], scaled[1])
        return cls(
            geometry=geometry,
            size=size,
            scaled=scaled,
            corner=(int((size[0] - scaled[0]) / 2), int((size[1] - scaled[1]) / 2)),
            pixel_aspect=Fraction(1) if square else shown / asked,
            fit=fit,
        )

    @property
    def target(self) -> tuple[int, int]:
        """(height, width) that the shown part is scaled to, before it is turned."""
        return self.geometry.orientation.turned(self.scaled)

    @property
    def is_resized(self) -> bool:
        """Whether the shown part is scaled."""
        return self.target != self.geometry.shown

    @property
    def shrinks(self) -> bool:
        """Whether the picture becomes smaller, or stays, in both directions."""
        return all(new <= old for new, old in zip(self.target, self.geometry.shown, strict=True))

"""The plot of a tuning: peak against time, one panel for each direction. It imports matplotlib when it draws."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from longvid.units import format_bytes

if TYPE_CHECKING:
    from longvid.runtime.tune import Tuning

__all__ = ["draw"]


def draw(tuning: Tuning, path: str | os.PathLike[str]) -> None:
    """Draw peak against time as a picture; needs matplotlib (``pip install "longvid[plot]"``)."""
    from matplotlib.figure import Figure

    directions = [d for d in ("encode", "decode") if any(point.direction == d for point in tuning.points)]
    figure = Figure(figsize=(4.2 * len(directions) + 0.6, 4.0), layout="constrained")
    scope = tuning.profile.scope
    figure.suptitle(f"{scope.model}, {scope.size}, {scope.dtype}, {scope.device}", fontsize=10)
    panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions, strict=True):
        row = [point for point in tuning.points if point.direction == direction]
        (knee,) = (point for point in row if point.knee)
        axes.axhline(1 + tuning.slack, color="#888888", linewidth=0.8, linestyle=":")
        x, y = [point.peak_bytes / 2**20 for point in row], [point.slowdown for point in row]
        axes.plot(x, y, color="#b8cdd6", zorder=1)
        axes.scatter(x, y, color="#1f6f8b", zorder=2)
        axes.scatter(knee.peak_bytes / 2**20, knee.slowdown, s=200, facecolors="none", edgecolors="#c8553d", zorder=3)
        axes.set_title(f"{direction}: knee at {format_bytes(knee.peak_bytes)}", fontsize=10)
        axes.set_xlabel("measured peak in MiB, weights included")
        axes.margins(x=0.12, y=0.15)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("time of a chunk / nothing offloaded")
    figure.savefig(path, dpi=130)

"""Cuts lengths, slices of frames and row tiles: what of a layer is computed at once."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["even_parts", "row_tiles", "tiles_with_halo"]


def even_parts(length: int, longest: int, *, multiple: int = 1) -> list[range]:
    """Cut ``range(length)`` into the fewest parts of at most ``longest``, about equally long.

    All parts but the last end at a multiple of ``multiple``, and have at least that length, whatever ``longest`` is.
    """
    num_units = -(-length // multiple)
    num_parts = -(-num_units // max(1, longest // multiple))
    edges = [*(num_units * i // num_parts * multiple for i in range(num_parts)), length]
    return [range(a, b) for a, b in pairwise(edges)]


def tiles_with_halo(height: int, *, halo: int, row: int, limit: int) -> list[tuple[range, range]]:
    """Cut a frame into row tiles: the rows that each reads, with ``halo`` more on both sides, and those that it gives.

    A tile reads at most ``limit`` elements, of which each row has ``row``; but it gives at least one row.
    """
    longest = height if row * height <= limit else max(1, limit // row - 2 * halo)
    tiles = even_parts(height, longest)
    return [(range(max(0, rows.start - halo), min(height, rows.stop + halo)), rows) for rows in tiles]


def row_tiles(height: int, most: int, *, halo: int, multiple: int) -> list[range]:
    """Cut the rows of a frame into tiles of at most ``most`` rows for a window that moves down the frame.

    What they read in turn, up to ``halo`` rows below each, ends at multiples of ``multiple``, or with the frame.
    Between the first and the last all are of one height: another one costs a copy of the window.
    """
    rows = max(multiple, most // multiple * multiple)
    edges = [0, *range(rows - halo, height, rows), height] if rows > halo else [*range(0, height, rows), height]
    return [range(a, b) for a, b in pairwise(edges)]

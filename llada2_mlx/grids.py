"""What can be done with grids of codes as they are: cut out, put in, mirror, join, compare.

Places and sizes are in codes: one is 16 pixels of an encoded picture, and 32 of a decoded one. No code changes, only
where it stands. Nothing here knows which sizes a model has tokens for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import Enum

import numpy as np

from .errors import RequestError
from .vq import Origin, VQGrid

# What the part of a code that a mask has to cover can be, and by how many codes a mask can grow.
LEAST_THRESHOLD, MOST_THRESHOLD = 0.01, 1.0
MOST_GROWN = 64


class Flip(Enum):
    """What changes places; the value is what a person calls it."""

    SIDES = "left and right"
    ENDS = "top and bottom"
    BOTH = "both"


class Layout(Enum):
    """How grids are joined; the value is what a person calls it."""

    ROW = "side by side"
    COLUMN = "one below the other"


def crop(grid: VQGrid, left: int, top: int, width: int = 0, height: int = 0) -> VQGrid:
    """The part of a grid that begins ``left`` and ``top`` codes from its corner.

    Args:
        width, height: of the part; 0 is all that is left.

    Raises:
        RequestError: the part is not inside the grid.
    """
    width, height = width or grid.width - left, height or grid.height - top
    _require_inside(grid, left, top, width, height, "The part to cut out")
    return replace(grid, codes=grid.codes[top : top + height, left : left + width])


def paste(grid: VQGrid, piece: VQGrid, left: int, top: int, where: np.ndarray | None = None) -> VQGrid:
    """``grid`` with ``piece`` put over it, ``left`` and ``top`` codes from its corner.

    Args:
        where: booleans [height, width] of the piece: which of its codes to put; all if None.

    Raises:
        RequestError: the piece reaches outside, ``where`` has another size, or the two are of two codebooks.
    """
    _require_one_codebook((grid, piece))
    _require_inside(grid, left, top, piece.width, piece.height, "The piece")
    if where is None:
        where = np.ones(piece.codes.shape, bool)
    if where.shape != piece.codes.shape:
        raise RequestError(
            f"The mask is for {_size(where)}, and the piece has {_size(piece.codes)}. Both have to be one size."
        )
    codes = grid.codes.copy()
    inside = codes[top : top + piece.height, left : left + piece.width]
    inside[where] = piece.codes[where]
    return replace(grid, codes=codes, origin=_common_origin((grid, piece)))


def flip(grid: VQGrid, which: Flip) -> VQGrid:
    """A grid whose codes change places. What a code shows is not mirrored: only the layout is."""
    codes = grid.codes
    if which is not Flip.ENDS:
        codes = codes[:, ::-1]
    if which is not Flip.SIDES:
        codes = codes[::-1]
    return replace(grid, codes=codes.copy())


def join(grids: Sequence[VQGrid], layout: Layout) -> VQGrid:
    """One grid of several, from left to right or from top to bottom.

    Raises:
        RequestError: there is none, the sides that meet are not of one length, or they are of several codebooks.
    """
    if not grids:
        raise RequestError("There is no grid to join. Give at least one.")
    _require_one_codebook(grids)
    axis, side = (1, "height") if layout is Layout.ROW else (0, "width")
    lengths = [grid.codes.shape[1 - axis] for grid in grids]
    if len(set(lengths)) > 1:
        raise RequestError(
            f"Grids that stand {layout.value} need one {side}; these have {' and '.join(map(str, lengths))} codes. Crop one of them first."
        )
    codes = np.concatenate([grid.codes for grid in grids], axis)
    return replace(grids[0], codes=codes, origin=_common_origin(grids))


def difference(one: VQGrid, other: VQGrid) -> np.ndarray:
    """Booleans [height, width]: where two grids have different codes.

    Raises:
        RequestError: they have two sizes, or are of two codebooks.
    """
    _require_one_codebook((one, other))
    if one.codes.shape != other.codes.shape:
        raise RequestError(
            f"Grids of one size can be compared; these have {_size(one.codes)} and {_size(other.codes)}. Crop one of them first."
        )
    return one.codes != other.codes


def cells(mask: np.ndarray, height: int, width: int, threshold: float = 0.5) -> np.ndarray:
    """Booleans [height, width]: the codes that a mask of any size covers to at least ``threshold``.

    A mask of another shape than the grid's loses its edges, as a picture does when it is encoded: it is scaled to cover the
    grid, and the middle counts.

    Args:
        mask: floats [rows, columns] in 0 .. 1, over the whole picture.

    Raises:
        RequestError: the mask is empty or has another shape, or the threshold is out of range.
    """
    require_threshold(threshold)
    if mask.ndim != 2 or 0 in mask.shape:
        raise RequestError(f"A mask of shape {list(mask.shape)} cannot be used; it needs rows and columns.")
    rows, columns = mask.shape
    kept = min(rows, columns * height / width), min(columns, rows * width / height)
    covered = _shares(rows, kept[0], height) @ mask.astype(np.float64) @ _shares(columns, kept[1], width).T
    return covered >= threshold - 1e-6  # sums of fractions are not exact


def paired(first: Sequence[VQGrid], second: Sequence[VQGrid]) -> list[tuple[VQGrid, VQGrid]]:
    """The grids of two batches, each with its counterpart; a single one goes with all of the other batch.

    Raises:
        RequestError: the batches are of two sizes.
    """
    count = max(len(first), len(second))
    if {len(first), len(second)} - {1, count}:
        raise RequestError(
            f"One batch has {len(first)} grids and the other {len(second)}; both need as many, or one of them a single grid."
        )
    spread = lambda grids: grids if len(grids) == count else [*grids] * count
    return list(zip(spread(first), spread(second), strict=True))


def grown(cells: np.ndarray, by: int) -> np.ndarray:
    """What is true in ``cells``, and what is at most ``by`` codes from it, corners included: booleans [height, width].

    Raises:
        RequestError: ``by`` is not 0 to ``MOST_GROWN``.
    """
    require_growth(by)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(cells, by), (2 * by + 1, 2 * by + 1))
    return windows.any(axis=(-2, -1))


def require_threshold(threshold: float) -> None:
    """Raise ``RequestError`` unless the threshold of a mask is ``LEAST_THRESHOLD`` to ``MOST_THRESHOLD``."""
    if not LEAST_THRESHOLD <= threshold <= MOST_THRESHOLD:  # false for NaN, too
        raise RequestError(
            f"The mask threshold is {threshold}; it has to be from {LEAST_THRESHOLD:g} to {MOST_THRESHOLD:g}, the part of a code "
            "that the mask has to cover."
        )


def require_growth(by: int) -> None:
    """Raise ``RequestError`` unless a mask grows by 0 to ``MOST_GROWN`` codes."""
    if not 0 <= by <= MOST_GROWN:
        raise RequestError(f"The mask is to grow by {by} codes; it has to be from 0 to {MOST_GROWN}.")


def require_added(left: int, top: int, right: int, bottom: int) -> None:
    """Raise ``RequestError`` unless codes are to be added on at least one side, and taken away on none."""
    if min(left, top, right, bottom) < 0 or not left + top + right + bottom:
        raise RequestError("Nothing is to be added. Say how many codes the picture grows by on at least one side.")


def require_covered(masks: Sequence[np.ndarray]) -> None:
    """Raise ``RequestError`` if one of the masks, of any size and one for each picture, covers nothing."""
    for number, mask in enumerate(masks, 1):
        if not np.any(mask):
            of = f" of picture {number}" if len(masks) > 1 else ""
            raise RequestError(f"The mask{of} covers no code. Paint over what is to be redrawn.")


def _shares(length: int, kept: float, parts: int) -> np.ndarray:
    """[parts, length]: the share of each of ``length`` pixels in each of the equal ``parts`` of the middle, ``kept`` pixels."""
    begins, pixels = (length - kept) / 2 + np.arange(parts)[:, None] * (kept / parts), np.arange(length)[None]
    ends = begins + kept / parts
    return (np.minimum(ends, pixels + 1) - np.maximum(begins, pixels)).clip(min=0) * (parts / kept)


def _require_inside(grid: VQGrid, left: int, top: int, width: int, height: int, what: str) -> None:
    if min(left, top) < 0 or left >= grid.width or top >= grid.height:
        raise RequestError(
            f"{what} begins at left {left}, top {top}, outside the grid of {_size(grid.codes)}. "
            f"Left has to be 0 to {grid.width - 1}, and top 0 to {grid.height - 1}."
        )
    if min(width, height) < 1 or left + width > grid.width or top + height > grid.height:
        raise RequestError(
            f"{what} is {width} wide and {height} high, and begins at left {left}, top {top}, in a grid of {_size(grid.codes)}. "
            f"There it can be 1 to {grid.width - left} wide and 1 to {grid.height - top} high."
        )


def _require_one_codebook(grids: Iterable[VQGrid]) -> None:
    first, *others = grids
    for other in others:
        if first.codebook_size != other.codebook_size or not first.origin.may_equal(other.origin):
            names = [grid.origin.model or "another model" for grid in (first, other)]
            raise RequestError(
                f"The grids are of two codebooks, of {names[0]} ({first.codebook_size} codes) and of {names[1]} "
                f"({other.codebook_size} codes). The same code means something else in each: use grids of one model."
            )


def _common_origin(grids: Sequence[VQGrid]) -> Origin:
    """The first origin that says which codebook it is; made for a use only if all were."""
    origins = [grid.origin for grid in grids]
    known = next((each for each in origins if each.vectors or each.table), origins[0])
    return known if len({each.use for each in origins}) == 1 else replace(known, use="")


def _size(codes: np.ndarray) -> str:
    return f"{codes.shape[0]} x {codes.shape[1]} codes (height x width)"

"""What is done with grids of codes as they are: every place is looked at, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest

from llada2_mlx.errors import RequestError
from llada2_mlx.grids import Flip, Layout, cells, crop, difference, flip, grown, join, paired, paste
from llada2_mlx.vq import Origin, VQGrid

OURS = Origin("ours", vectors="aa", table="bb", use="editing")


def numbered(height: int, width: int, origin: Origin = OURS, first: int = 0) -> VQGrid:
    """A grid in which every code is another."""
    return VQGrid(first + np.arange(height * width).reshape(height, width), 512, origin)


@pytest.fixture
def grid() -> VQGrid:
    return numbered(8, 10)


def test_a_part_is_cut_out(grid: VQGrid) -> None:
    part = crop(grid, left=3, top=2, width=4, height=5)
    assert part.codes.tolist() == [[10 * row + column for column in range(3, 7)] for row in range(2, 7)]
    assert part.origin == OURS and part.codebook_size == 512
    assert crop(grid, 0, 0) == grid
    assert crop(grid, 9, 7).codes.tolist() == [[79]]  # up to the edges


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ((10, 0), "Left has to be 0 to 9, and top 0 to 7"),
        ((0, 8), "outside the grid of 8 x 10 codes"),
        ((-1, 0), "begins at left -1"),
        ((7, 0, 4, 1), "There it can be 1 to 3 wide and 1 to 8 high"),
        ((0, 7, 1, 2), "1 to 10 wide and 1 to 1 high"),
        ((0, 0, -2, 1), "is -2 wide"),
    ],
)
def test_a_part_outside_is_refused(grid: VQGrid, place: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        crop(grid, *place)


def test_a_piece_is_pasted_and_all_else_stays(grid: VQGrid) -> None:
    before = grid.codes.copy()
    piece = numbered(2, 3, first=100)
    pasted = paste(grid, piece, left=7, top=6)
    assert (pasted.codes[6:, 7:] == piece.codes).all()
    elsewhere = np.ones((8, 10), bool)
    elsewhere[6:, 7:] = False
    assert (pasted.codes[elsewhere] == before[elsewhere]).all()
    assert (grid.codes == before).all()


def test_what_was_cut_out_is_pasted_back(grid: VQGrid) -> None:
    assert paste(grid, crop(grid, 2, 3, 4, 5), 2, 3) == grid


def test_only_where_the_mask_says(grid: VQGrid) -> None:
    piece, where = numbered(2, 2, first=100), np.array([[True, False], [False, True]])
    inside = paste(grid, piece, 0, 0, where).codes[:2, :2]
    assert inside.tolist() == [[100, 1], [10, 103]]
    with pytest.raises(RequestError, match=r"The mask is for 3 x 2 codes .* the piece has 2 x 2 codes"):
        paste(grid, piece, 0, 0, np.ones((3, 2), bool))


def test_a_piece_that_reaches_outside_is_refused(grid: VQGrid) -> None:
    with pytest.raises(RequestError, match="The piece is 3 wide and 2 high, and begins at left 8, top 0"):
        paste(grid, numbered(2, 3), 8, 0)
    with pytest.raises(RequestError, match="The piece is 10 wide and 9 high"):
        paste(grid, numbered(9, 10), 0, 0)


def test_flips(grid: VQGrid) -> None:
    assert flip(grid, Flip.SIDES).codes[0].tolist() == list(range(9, -1, -1))
    assert flip(grid, Flip.ENDS).codes[:, 0].tolist() == list(range(70, -1, -10))
    assert flip(grid, Flip.BOTH).to_list() == list(range(79, -1, -1))
    for which in Flip:
        assert flip(flip(grid, which), which) == grid and flip(grid, which).origin == OURS


def test_grids_are_joined(grid: VQGrid) -> None:
    other = numbered(8, 3, first=200)
    row = join([grid, other], Layout.ROW)
    assert (row.height, row.width) == (8, 13)
    assert crop(row, 0, 0, 10) == grid and crop(row, 10, 0) == other
    column = join([numbered(2, 4), numbered(3, 4, first=50), numbered(1, 4, first=90)], Layout.COLUMN)
    assert (column.height, column.width) == (6, 4)
    assert crop(column, 0, 2, 4, 3) == numbered(3, 4, first=50)
    assert join([grid], Layout.ROW) == grid


def test_sides_that_do_not_meet_are_refused(grid: VQGrid) -> None:
    with pytest.raises(RequestError, match="side by side need one height; these have 8 and 7 codes"):
        join([grid, numbered(7, 10)], Layout.ROW)
    with pytest.raises(RequestError, match="one below the other need one width; these have 10 and 9 codes"):
        join([grid, numbered(8, 9)], Layout.COLUMN)
    with pytest.raises(RequestError, match="no grid to join"):
        join([], Layout.ROW)


def test_a_difference_is_where_codes_differ(grid: VQGrid) -> None:
    other = paste(grid, numbered(2, 2, first=100), 4, 5)
    where = difference(grid, other)
    assert where.dtype == bool and np.argwhere(where).tolist() == [[5, 4], [5, 5], [6, 4], [6, 5]]
    assert not difference(grid, grid).any()
    with pytest.raises(RequestError, match=r"these have 8 x 10 codes \(height x width\) and 10 x 8 codes"):
        difference(grid, numbered(10, 8))


@pytest.mark.parametrize(
    "stranger",
    [
        numbered(8, 10, Origin("theirs", vectors="cc", table="bb")),
        numbered(8, 10, Origin("theirs", table="cc")),
        VQGrid(np.zeros((8, 10), int), 256, Origin("theirs")),
    ],
)
def test_two_codebooks_do_not_mix(grid: VQGrid, stranger: VQGrid) -> None:
    for mix in (
        lambda: paste(grid, stranger, 0, 0),
        lambda: join([grid, stranger], Layout.ROW),
        lambda: difference(grid, stranger),
    ):
        with pytest.raises(RequestError, match="two codebooks, of ours .* and of theirs"):
            mix()


def test_a_copy_of_a_model_is_the_same_model(grid: VQGrid) -> None:
    copy = numbered(8, 10, Origin("copy", vectors="aa", table="other decoders"))
    assert not difference(grid, copy).any()


def test_what_is_known_of_either_origin_is_kept(grid: VQGrid) -> None:
    unknown = numbered(8, 10, Origin())
    joined = join([unknown, grid], Layout.ROW)
    assert joined.origin == Origin("ours", "aa", "bb")  # made for editing only in part
    assert join([grid, grid], Layout.ROW).origin == OURS
    assert paste(grid, crop(grid, 0, 0, 2, 2), 1, 1).origin == OURS


def test_a_mask_is_scaled_to_codes() -> None:
    mask = np.zeros((64, 96))
    mask[16:32, 32:64] = 1
    expected = np.zeros((4, 6), bool)
    expected[1, 2:4] = True
    assert (cells(mask, 4, 6) == expected).all()  # 16 pixels a code
    assert (cells(mask[::16, ::16], 4, 6) == expected).all()  # a pixel a code
    assert cells(mask, 2, 3)[0].tolist() == [False, True, False]  # just half of a code
    assert cells(expected.astype(float), 8, 12).sum() == 4 * expected.sum()  # fewer pixels than codes
    assert cells(np.full((7, 5), 0.5), 8, 8).all() and not cells(np.full((7, 5), 0.49), 8, 8).any()
    assert cells(np.full((7, 5), 0.3), 3, 11, threshold=0.3).all()
    assert not cells(np.zeros((64, 64)), 8, 8).any()  # what ComfyUI gives for no transparency


@pytest.mark.parametrize("shape", [(0, 8), (8,), (1, 8, 8)])
def test_what_is_no_mask(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="it needs rows and columns"):
        cells(np.zeros(shape), 8, 8)


@pytest.mark.parametrize("threshold", [-1, 0, 0.009, 1.01, 7, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    for mask in (np.zeros((8, 8)), np.ones((8, 8))):
        with pytest.raises(RequestError, match=r"mask threshold is .*; it has to be from 0\.01 to 1"):
            cells(mask, 8, 8, threshold)


@pytest.mark.parametrize("by", [0, 1, 2, 5, 64])
def test_a_mask_grows_in_all_directions(by: int) -> None:
    where = np.zeros((9, 12), bool)
    where[0, 3] = where[6, 10] = True
    found = grown(where, by)
    assert found.dtype == bool and found.shape == where.shape
    for (row, column), covered in np.ndenumerate(found):
        near = max(abs(row - 0), abs(column - 3)) <= by or max(abs(row - 6), abs(column - 10)) <= by
        assert covered == near
    assert not grown(np.zeros((9, 12), bool), by).any()
    assert where.sum() == 2  # what was given stays as it was


@pytest.mark.parametrize("by", [-1, 65, 100_000])
def test_a_growth_out_of_range_is_refused(by: int) -> None:
    with pytest.raises(RequestError, match=f"is to grow by {by} codes; it has to be from 0 to 64"):
        grown(np.zeros((8, 8), bool), by)


def test_batches_are_paired(grid: VQGrid) -> None:
    others = [numbered(8, 10, first=first) for first in (1, 2)]
    assert paired([grid], others) == [(grid, others[0]), (grid, others[1])]
    assert paired(others, [grid]) == [(others[0], grid), (others[1], grid)]
    assert paired(others, others) == [(other, other) for other in others]
    with pytest.raises(RequestError, match="One batch has 2 grids and the other 3"):
        paired(others, [grid] * 3)
    with pytest.raises(RequestError, match="One batch has 0 grids and the other 1"):
        paired([], [grid])

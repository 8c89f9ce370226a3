"""Redrawing a part of a picture and growing one: what is kept is kept, and what is run is what has to be."""

from __future__ import annotations

import numpy as np
import pytest

from llada2_mlx import tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.tasks import Seeing
from llada2_mlx.vq import VQGrid

SAMPLING = Sampling(steps=4, threshold=1.0)


@pytest.fixture
def fresh(checkpoint: Checkpoint) -> Backbone:
    return Backbone(checkpoint, "float32")


def grid(backbone: Backbone, height: int = 16, width: int = 16, seed: int = 1) -> VQGrid:
    most = backbone.config.codebook_size
    return VQGrid(np.random.default_rng(seed).integers(0, most, (height, width)), most)


def corner(rows: slice, columns: slice, side: int = 16) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize("seeing", Seeing)
def test_only_what_is_masked_changes(backbone: Backbone, seeing: Seeing) -> None:
    before, mask = grid(backbone), corner(slice(4, 9), slice(3, 11))
    drawing = tasks.redraw(backbone, before, mask, "a star", seeing, sampling=SAMPLING)
    assert (drawing.grid.codes[~mask] == before.codes[~mask]).all()
    assert (drawing.grid.codes[mask] != before.codes[mask]).any()
    assert (drawing.masked == mask).all()
    (confidence,) = drawing.confidence
    assert (confidence[~mask] == 1).all() and (confidence[mask] < 1).any() and (confidence[mask] > 0).all()


def test_blocks_without_a_mask_are_not_run(backbone: Backbone) -> None:
    before = grid(backbone)
    prompt = len(tasks.prompts.text_to_image(backbone.tokens, "a star", 16, 16).conditional)
    for rows in (slice(0, 1), slice(7, 8), slice(15, 16)):
        mask = corner(rows, slice(0, 16))
        report = tasks.redraw(backbone, before, mask, "a star", Seeing.BEFORE, sampling=SAMPLING).report
        first, last = (prompt + rows.start * 16) // 32, (prompt + rows.start * 16 + 15) // 32
        assert report.blocks == last - first + 1
        # what comes before is read once, and nothing that comes after
        assert report.positions == 2 * (first * 32 + 32 * report.steps + 32 * (report.blocks - 1))


def test_all_masked_is_drawing(backbone: Backbone) -> None:
    everything = np.ones((16, 16), bool)
    redrawn = tasks.redraw(backbone, grid(backbone), everything, "a star", Seeing.BEFORE, 2.0, sampling=SAMPLING)
    drawn = tasks.text_to_vq(backbone, "a star", 512, 512, 2.0, sampling=SAMPLING)
    assert redrawn.grid == drawn.grid


def test_all_masked_with_the_picture_in_sight_is_an_edit(backbone: Backbone) -> None:
    everything, before = np.ones((16, 16), bool), grid(backbone)
    redrawn = tasks.redraw(backbone, before, everything, "make it red", Seeing.PICTURE, sampling=SAMPLING)
    assert redrawn.grid == tasks.edit(backbone, before, "make it red", sampling=SAMPLING).grid


def test_the_picture_that_is_seen_matters(backbone: Backbone) -> None:
    """Also what comes after the mask, which a model that only draws does not see."""
    mask = corner(slice(0, 2), slice(0, 16))
    one, other = grid(backbone), grid(backbone, seed=2)
    other = VQGrid(np.where(np.arange(16)[:, None] < 12, one.codes, other.codes), one.codebook_size)
    draw = lambda before, seeing: tasks.redraw(backbone, before, mask, "a star", seeing, sampling=SAMPLING).grid.codes[
        mask
    ]
    assert (draw(one, Seeing.PICTURE) != draw(other, Seeing.PICTURE)).any()
    assert (draw(one, Seeing.BEFORE) == draw(other, Seeing.BEFORE)).all()


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.zeros((16, 16), bool), "covers no code"),
        (np.ones((8, 16), bool), r"A mask of \[8, 16\] codes does not fit"),
        (np.ones(256, bool), "does not fit"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(fresh: Backbone, mask: np.ndarray, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        tasks.redraw(fresh, grid(fresh), mask, "a star")
    assert not fresh.loaded


def test_a_grid_of_another_codebook_is_refused(fresh: Backbone) -> None:
    other = VQGrid(np.zeros((8, 8), int), 5)
    for seeing in Seeing:
        with pytest.raises(RequestError, match="codebook"):
            tasks.redraw(fresh, other, np.ones((8, 8), bool), "a star", seeing)
        with pytest.raises(RequestError, match="codebook"):
            tasks.grow(fresh, other, "a star", right=8, seeing=seeing)
    assert not fresh.loaded


@pytest.mark.parametrize("seeing", Seeing)
@pytest.mark.parametrize("sides", [(0, 0, 4, 0), (2, 0, 0, 0), (0, 3, 0, 5), (2, 2, 2, 2)])
def test_a_picture_grows_around_its_codes(backbone: Backbone, seeing: Seeing, sides: tuple[int, int, int, int]) -> None:
    before, (left, top, right, bottom) = grid(backbone, 8, 8), sides
    drawing = tasks.grow(backbone, before, "a star", left, top, right, bottom, seeing, sampling=SAMPLING)
    assert (drawing.grid.height, drawing.grid.width) == (8 + top + bottom, 8 + left + right)
    assert (drawing.grid.codes[top : top + 8, left : left + 8] == before.codes).all()
    assert (~drawing.masked).sum() == 64 and not drawing.masked[top : top + 8, left : left + 8].any()


@pytest.mark.parametrize(
    ("sides", "sentence"),
    [
        ({}, "Nothing is to be added"),
        ({"left": -2}, "Nothing is to be added"),
        ({"right": 3}, "no size tokens"),
        ({"bottom": 200}, "no size tokens"),
    ],
)
def test_a_size_that_cannot_be_is_refused(fresh: Backbone, sides: dict, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        tasks.grow(fresh, grid(fresh), "a star", **sides)
    assert not fresh.loaded

"""Codes as colours: by the codebook alone, the same every time, and cheap."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from synthetic import tiny

from llada2_mlx.checkpoint.codebook import VECTORS
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.errors import CheckpointError, RequestError
from llada2_mlx.imaging.look import look, look_at, palette
from llada2_mlx.imaging.pixels import to_cells, to_mask, to_pixels
from llada2_mlx.vq import Origin, VQGrid

NAME = "image_tokenizer/image_tokenizer.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


def file_of(model: Path) -> Path:
    (path,) = (model / "image_tokenizer").glob("*.safetensors")
    return path


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return load(file_of(model).read_bytes())  # not mapped: the file is going to be replaced


def rewrite(model: Path, vectors: torch.Tensor) -> Checkpoint:
    save_file(tensors_of(model) | {VECTORS: vectors}, file_of(model))
    return Checkpoint(model)


def test_a_palette_has_a_colour_for_each_code() -> None:
    colours = palette(Checkpoint(BUILT_IN))
    assert colours.shape == (2048, 3) and colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) > 1000  # few codes share one
    assert (colours.min(axis=0) == 0).all() and (colours.max(axis=0) == 255).all()
    with pytest.raises(ValueError):
        colours[0, 0] = 1


def test_near_codes_have_near_colours() -> None:
    """The nearest code by the tokenizer's own measure is far nearer in colour than any code."""
    checkpoint = Checkpoint(BUILT_IN)
    with safe_open(BUILT_IN / NAME, "pt") as file:
        vectors = torch.nn.functional.normalize(file.get_tensor(VECTORS).float())
    alike = vectors @ vectors.T
    alike.fill_diagonal_(-2)
    nearest = alike.argmax(dim=1).numpy()
    colours = palette(checkpoint).astype(float)
    distance = lambda others: np.linalg.norm(colours - colours[others], axis=1).mean()
    assert distance(nearest) < 0.5 * distance(np.random.default_rng(0).permutation(len(colours)))


def test_three_directions_are_three_channels(model: Path) -> None:
    """Of a codebook that is spread along three known axes, each axis is one channel, the widest first."""
    count, width = tensors_of(model)[VECTORS].shape
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(count, 3, generator=generator) * 2 - 1
    vectors = torch.zeros(count, width)
    vectors[:, 5] = 100  # so that dividing by the length changes almost nothing
    for axis, scale in ((2, 3), (9, 2), (0, 1)):
        vectors[:, axis] = places[:, {2: 0, 9: 1, 0: 2}[axis]] * scale
    colours = palette(rewrite(model, vectors)).astype(float)
    for channel in range(3):
        assert np.corrcoef(colours[:, channel], places[:, channel])[0, 1] > 0.95  # not reversed either


def test_lengths_do_not_matter_and_a_replaced_file_does(model: Path) -> None:
    vectors = tensors_of(model)[VECTORS].float()
    first = palette(rewrite(model, vectors))
    lengths = 0.5 + torch.rand(len(vectors), 1, generator=torch.Generator().manual_seed(0))
    assert np.abs(palette(rewrite(model, vectors * lengths)).astype(int) - first).max() <= 1
    assert (palette(rewrite(model, vectors.flip(0))) != first).any()


@pytest.mark.parametrize("width", [1, 2])
def test_a_codebook_of_few_dimensions(model: Path, width: int) -> None:
    vectors = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
    colours = palette(rewrite(model, vectors))
    assert (colours[:, width:] == 128).all() and len(np.unique(colours[:, 0])) > 1


def test_a_codebook_of_equal_vectors_is_grey(model: Path) -> None:
    assert (palette(rewrite(model, torch.ones(256, 16))) == 128).all()


def test_only_the_codebook_is_read(model: Path) -> None:
    save_file({VECTORS: tensors_of(model)[VECTORS]}, file_of(model))
    assert (palette(Checkpoint(model)) == palette(Checkpoint(tiny()))).all()


def test_no_codebook(model: Path) -> None:
    path, tensors = file_of(model), tensors_of(model)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="The codebook in .* cannot be read"):
        palette(Checkpoint(model))
    save_file({name: tensor for name, tensor in tensors.items() if name != VECTORS}, path)
    with pytest.raises(CheckpointError, match="The codebook in .* cannot be read"):
        palette(Checkpoint(model))
    save_file(tensors | {VECTORS: tensors[VECTORS] * float("nan")}, path)
    with pytest.raises(CheckpointError, match="no codebook of finite vectors"):
        palette(Checkpoint(model))
    path.unlink()
    with pytest.raises(CheckpointError, match="has 0 safetensors files"):
        palette(Checkpoint(model))


COLOURS = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 40]], np.uint8)


def test_each_code_is_a_square_of_its_colour() -> None:
    codes = np.array([[0, 1, 2], [2, 1, 0]])
    picture = look(codes, COLOURS, scale=5)
    assert picture.shape == (10, 15, 3) and picture.dtype == np.uint8
    for row in range(10):
        for column in range(15):
            assert (picture[row, column] == COLOURS[codes[row // 5, column // 5]]).all()
    assert (look(codes, COLOURS, scale=1) == COLOURS[codes]).all()


def test_masked_codes_are_hatched_and_not_looked_at() -> None:
    codes, masked = np.array([[1, -1], [2, 99]]), np.array([[False, True], [False, True]])
    picture = look(codes, COLOURS, masked, scale=8)
    assert (picture[:, :8] == look(codes[:, :1], COLOURS, scale=8)).all()
    hatched = picture[:, 8:]
    assert (hatched == hatched[..., :1]).all()  # greys
    assert len(np.unique(hatched)) == 2 and 0.4 < (hatched == hatched.max()).mean() < 0.6
    assert (look(codes, COLOURS, np.ones((2, 2), bool), scale=1) > 0).all()  # also where a code is a pixel


def test_what_cannot_be_looked_at() -> None:
    with pytest.raises(RequestError, match="codes from 0 to 3; there are colours for 0 to 2"):
        look(np.array([[0, 3]]), COLOURS)
    with pytest.raises(RequestError, match="codes from -1 to 0"):
        look(np.array([[0, -1]]), COLOURS)
    for scale in (0, -1, 65):
        with pytest.raises(RequestError, match=f"1 to 64 pixels on a side, not by {scale}"):
            look(np.array([[0]]), COLOURS, scale=scale)
    with pytest.raises(RequestError, match=r"The mask is for a grid of \[1, 2\] codes"):
        look(np.array([[0]]), COLOURS, np.zeros((1, 2), bool))


def test_a_grid_of_another_codebook_is_not_looked_at(model: Path) -> None:
    checkpoint, codes = Checkpoint(model), np.arange(80).reshape(8, 10) % 5
    assert (look_at(VQGrid(codes, 256), checkpoint, scale=2) == look(codes, palette(checkpoint), scale=2)).all()
    for size in (5, 255, 2048):  # also where each code has a colour
        with pytest.raises(RequestError, match=f"model with {size} codes; the image tokenizer of model has 256"):
            look_at(VQGrid(codes, size), checkpoint)
    with pytest.raises(RequestError, match="model has another codebook"):
        look_at(VQGrid(codes, 256, Origin("theirs", vectors="aa")), checkpoint)


def test_it_is_cheap_enough_for_ten_a_second() -> None:
    codes = np.random.default_rng(0).integers(0, 3, (32, 32))  # 1024 x 1024 pixels decoded
    began = time.perf_counter()
    for _ in range(10):
        look(codes, COLOURS, codes == 0, scale=16)
    assert time.perf_counter() - began < 0.5  # half of the second; it takes a twentieth


def test_pictures_of_one_size_are_a_batch_and_others_a_list() -> None:
    small, large = np.full((4, 6, 3), 51, np.uint8), np.zeros((8, 6, 3), np.uint8)
    (batch,) = to_pixels([small, small])
    assert batch.shape == (2, 4, 6, 3) and batch.dtype == torch.float32 and torch.allclose(batch, torch.tensor(0.2))
    assert [tuple(each.shape) for each in to_pixels([small, large])] == [(1, 4, 6, 3), (1, 8, 6, 3)]


def test_a_mask_of_codes_and_back() -> None:
    where = np.random.default_rng(0).random((8, 10)) > 0.5
    mask = to_mask([where, ~where], 32)
    assert mask.shape == (2, 256, 320) and set(mask.unique().tolist()) == {0, 1}
    grids = [VQGrid(np.zeros((8, 10), int), 4)] * 2
    first, second = to_cells(mask, grids)
    assert (first == where).all() and (second == ~where).all()
    assert all((each == where).all() for each in to_cells(mask[:1], grids))  # one for all
    assert (to_cells(mask[0], grids[:1])[0] == where).all()  # without a batch
    assert to_cells(None, grids) == [None, None]
    with pytest.raises(RequestError, match=r"have several \(8 x 10, 10 x 8\)"):
        to_mask([where, where.T], 32)
    with pytest.raises(RequestError, match="does not fit 2 grids"):
        to_cells(mask[[0, 0, 0]], grids)
    with pytest.raises(RequestError, match="needs rows and columns"):
        to_cells(mask[:1, :0], grids)

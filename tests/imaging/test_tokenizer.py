"""The image tokenizer on pictures of every kind. Parity is in test_parity.py."""

from __future__ import annotations

import pytest
import torch
from pictures import noise
from PIL import Image
from synthetic import tiny

from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging.prepare import Purpose, prepare
from llada2_mlx.imaging.tokenizer import ImageTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return ImageTokenizer(Checkpoint(tiny()), torch.device("cpu"))


@pytest.mark.parametrize(("size", "rows", "columns"), [((1, 1), 8, 8), ((300, 200), 12, 18), ((160, 480), 30, 10)])
def test_a_grid_has_a_code_a_patch(tokenizer: ImageTokenizer, size: tuple[int, int], rows: int, columns: int) -> None:
    grid = tokenizer.encode(noise(*size), Purpose.UNDERSTAND)
    assert (grid.height, grid.width, grid.codebook_size) == (rows, columns, 256)


def test_an_opaque_picture_is_its_rgb(tokenizer: ImageTokenizer) -> None:
    picture = noise(128, 128)
    opaque = picture.convert("RGBA")
    assert tokenizer.encode(opaque, Purpose.UNDERSTAND) == tokenizer.encode(picture, Purpose.UNDERSTAND)


def test_a_batch_is_its_pictures(tokenizer: ImageTokenizer) -> None:
    pictures = [prepare(image, Purpose.UNDERSTAND) for image in (noise(128, 128), Image.new("RGB", (128, 128), "red"))]
    steps = []
    both = tokenizer.encode_prepared(pictures, steps.append)
    assert both == tuple(tokenizer.encode_prepared([picture])[0] for picture in pictures)
    assert both[0] != both[1]
    assert [(step.done, step.total) for step in steps] == [(1, 2), (2, 2)]


def test_nothing_is_refused(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(RequestError):
        tokenizer.encode(Image.new("RGB", (0, 0)), Purpose.EDIT)

"""What Shapes has learned further, before it becomes the built-in model: its backbone and words stand in ``further/``.

Made by ``python -m llada2_mlx.shapes.training --stages further``; the other parts are the built-in model's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.shapes import measures
from llada2_mlx.shapes.studio import Studio

LEARNED = Path(__file__).parent / "further"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("further") / "shapes"
    shutil.copytree(BUILT_IN, folder, ignore=shutil.ignore_patterns("mlx-*"))
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(LEARNED / name, folder)
    return Studio(Checkpoint(folder))


def test_a_picture_after_a_plan(studio: Studio) -> None:
    score = measures.thinking(studio, 4)
    assert score.share >= 0.75, score


def test_what_it_could_before(studio: Studio) -> None:
    score = measures.text_to_image(studio, 8)
    assert score.share >= 0.75, score

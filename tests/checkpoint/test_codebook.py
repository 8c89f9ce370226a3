"""A grid knows whose codes it holds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llada2_mlx.checkpoint.codebook import doubt, origin, require_same
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.vq import Origin, VQGrid

GOLDEN = Checkpoint(Path(__file__).parent.parent / "golden/checkpoint")
SHAPES = Checkpoint(BUILT_IN)


def grid(of: Origin, side: int = 16) -> VQGrid:
    return VQGrid(np.zeros((side, side), dtype=int), 2048, of)


def test_a_copy_is_the_same_model_and_a_part_of_it_too(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(BUILT_IN / "image_tokenizer", copy / "image_tokenizer")
    require_same(grid(origin(SHAPES)), Checkpoint(copy))
    (copy / "image_tokenizer/image_tokenizer.safetensors").unlink()  # what a decoder alone brings
    assert not origin(Checkpoint(copy)).vectors
    require_same(grid(origin(SHAPES)), Checkpoint(copy))
    table = copy / "image_tokenizer/sigvq_embedding.pt"
    table.write_bytes(bytes(table.stat().st_size))
    with pytest.raises(RequestError, match="another codebook"):
        require_same(grid(origin(SHAPES)), Checkpoint(copy))


def test_another_model_is_refused_and_an_unknown_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="of the model shapes, and checkpoint has another codebook"):
        require_same(grid(origin(SHAPES)), GOLDEN)
    require_same(grid(Origin()), GOLDEN)
    require_same(grid(origin(SHAPES)), Checkpoint(tmp_path))
    (tmp_path / "image_tokenizer").mkdir()
    (tmp_path / "image_tokenizer/damaged.safetensors").write_bytes(b"no")
    assert origin(Checkpoint(tmp_path)) == Origin(model=tmp_path.name)


def test_the_origin_is_kept_in_a_file(tmp_path: Path) -> None:
    made = grid(replace(origin(SHAPES), use="editing"))
    made.save(tmp_path / "grid.safetensors")
    assert VQGrid.load(tmp_path / "grid.safetensors").origin == made.origin
    grid(Origin()).save(tmp_path / "old.safetensors")
    assert VQGrid.load(tmp_path / "old.safetensors").origin == Origin()


def test_a_purpose_that_does_not_fit_is_said() -> None:
    own = origin(SHAPES)
    assert doubt(grid(replace(own, use="understanding")), SHAPES, "understanding") is None
    assert doubt(grid(own), SHAPES, "understanding") is None
    assert "made for editing, not for understanding" in doubt(
        grid(replace(own, use="editing")), SHAPES, "understanding"
    )
    assert "at 256 x 256" in doubt(grid(own, 8), SHAPES, "understanding")

"""Grids of codes: what is one, and what comes back from a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from synthetic import tiny

from llada2_mlx.checkpoint.codebook import origin
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.vq import Origin, VQGrid, picture_seed


@pytest.fixture
def grid() -> VQGrid:
    return VQGrid(np.arange(80, dtype=np.int64).reshape(8, 10), 128)


def test_a_grid_is_int32_and_read_only(grid: VQGrid) -> None:
    assert (grid.height, grid.width, grid.codes.dtype) == (8, 10, np.int32)
    with pytest.raises(ValueError):
        grid.codes[0, 0] = 1


@pytest.mark.parametrize(
    "codes",
    [
        [[1, 2], [3]],
        np.zeros((8,), int),
        np.zeros((0, 8), int),
        np.zeros((8, 8)),
        np.zeros((1, 8, 8), int),
        np.zeros((8, 8), bool),
        [["a"]],
    ],
)
def test_what_is_no_grid(codes) -> None:
    with pytest.raises(RequestError, match="array of integers"):
        VQGrid(codes, 128)


@pytest.mark.parametrize("code", [-1, 128, 2**40])
def test_codes_outside_the_codebook(code: int) -> None:
    with pytest.raises(RequestError, match="the codebook has 0 to 127"):
        VQGrid(np.full((8, 8), code), 128)


def test_the_wrong_number_of_codes() -> None:
    with pytest.raises(RequestError, match="63 codes"):
        VQGrid.from_list([0] * 63, 8, 8, 128)


def test_a_file_gives_the_grid_back_and_states_its_size(grid: VQGrid, tmp_path: Path) -> None:
    grid.save(tmp_path / "grid.safetensors")
    assert VQGrid.load(tmp_path / "grid.safetensors") == grid
    with safe_open(tmp_path / "grid.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "llada2-vq", "height": "8", "width": "10", "codebook_size": "128"}
    assert [path.name for path in tmp_path.iterdir()] == ["grid.safetensors"]


def test_a_file_has_the_rights_of_any_other(grid: VQGrid, tmp_path: Path) -> None:
    grid.save(tmp_path / "grid.safetensors")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "grid.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_notes_are_kept_in_the_file_and_do_not_hide_what_the_grid_says(grid: VQGrid, tmp_path: Path) -> None:
    path = tmp_path / "grid.safetensors"
    ours = VQGrid(grid.codes, 128, Origin("ours", "aa", "bb", "editing"))
    ours.save(path, {"workflow": "{}", "model": "theirs", "height": "1"})
    assert VQGrid.load(path) == grid and VQGrid.load(path).origin == ours.origin
    with safe_open(path, "numpy") as file:
        assert file.metadata()["workflow"] == "{}"


def test_which_codebook_is_known_by_the_vectors_first() -> None:
    both = Origin("a", "v", "t")
    assert both.may_equal(Origin("b", "v", "u")) and not both.may_equal(Origin("a", "w", "t"))
    assert both.may_equal(Origin("a", "", "t")) and not both.may_equal(Origin("a", "", "u"))
    assert both.may_equal(Origin("b")) and Origin("a", "v").may_equal(Origin("b", "", "t"))  # nothing is known


def test_grids_differ_by_codes_and_by_codebook(grid: VQGrid) -> None:
    assert grid != VQGrid(grid.codes, 256)
    assert grid != VQGrid(grid.codes[::-1], 128)
    assert grid != "grid"


def test_bad_files(grid: VQGrid, tmp_path: Path) -> None:
    path = tmp_path / "grid.safetensors"
    with pytest.raises(RequestError, match="There is no file"):
        VQGrid.load(path)
    grid.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RequestError, match="is not a grid of codes"):
        VQGrid.load(path)
    save_file({"codes": grid.codes}, path)
    with pytest.raises(RequestError, match="is not a grid of codes"):
        VQGrid.load(path)
    save_file({"codes": grid.codes}, path, {"height": "10", "width": "8", "codebook_size": "128"})
    with pytest.raises(RequestError, match="states 10 x 8 codes and holds 8 x 10"):
        VQGrid.load(path)
    save_file({"codes": grid.codes}, path, {"height": "8", "width": "10", "codebook_size": "16"})
    with pytest.raises(RequestError, match="the codebook has 0 to 15"):
        VQGrid.load(path)


def test_a_write_that_fails_leaves_what_was_there(
    grid: VQGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.safetensors"
    grid.save(path)
    before = path.read_bytes()

    def half_written(target: Path, content: bytes) -> None:
        with target.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError):
        grid.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.safetensors"]


def test_the_seeds_of_a_batch() -> None:
    assert [picture_seed(2**64 - 1, index) for index in range(2)] == [2**64 - 1, 0]


def test_a_hidden_companion_does_not_hide_whose_codes_they_are(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny(), tmp_path / "model"))
    known = origin(Checkpoint(folder))
    (folder / "image_tokenizer/._image_tokenizer.safetensors").write_bytes(bytes(4096))
    assert known.vectors and origin(Checkpoint(folder)) == known

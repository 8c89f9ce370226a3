"""What the soak test does to a model's files, tried without a server."""

from __future__ import annotations

import shutil
from pathlib import Path

from soak import Second

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.shapes.studio import Studio

PROMPT = "A large red circle in the top left"


def test_the_second_model_becomes_another_and_itself_again(tmp_path: Path) -> None:
    second = Second(tmp_path / "model", tmp_path / "others.safetensors")
    shutil.copytree(BUILT_IN, second.folder, ignore=shutil.ignore_patterns("mlx-*bit", "training"))
    second.make_others()
    own = (BUILT_IN / "model.safetensors").read_bytes()
    before = Studio(Checkpoint(second.folder)).codes(PROMPT)
    second.become("the others")
    assert (second.folder / "model.safetensors").read_bytes() != own
    assert Studio(Checkpoint(second.folder)).codes(PROMPT) != before
    second.renew()
    assert (second.folder / "model.safetensors").read_bytes() == second.others.read_bytes()
    second.damage()
    assert (second.folder / "model.safetensors").stat().st_size < len(own)
    second.become("its own")
    assert (second.folder / "model.safetensors").read_bytes() == own
    assert not list(second.folder.rglob("being-copied"))

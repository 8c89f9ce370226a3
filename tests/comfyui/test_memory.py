"""Our parts under ComfyUI's model management, asked directly: with ``--cpu`` ComfyUI evicts nothing by itself."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from client import ROOT
from published import BACKBONE
from rehearsal.pieces import write_backbone

LARGE = replace(
    BACKBONE, hidden_size=1024, num_hidden_layers=4, num_experts=32, vocab_size=8192, image_token_offset=4096
)


def run(script: str, comfyui: tuple[Path, Path], base: Path) -> None:
    folder, python = comfyui
    command = [python, Path(__file__).parent / script, ROOT, base]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("all is well"), (
        done.stdout[-2000:] + done.stderr[-4000:]
    )


def test_parts_are_loaded_shared_and_let_go(comfyui: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    run("memory_script.py", comfyui, tmp_path)


def test_large_models_make_room_for_each_other(comfyui: tuple[Path, Path], tmp_path: Path) -> None:
    write_backbone(tmp_path / "models/llada2/large", LARGE)
    run("large_memory_script.py", comfyui, tmp_path)

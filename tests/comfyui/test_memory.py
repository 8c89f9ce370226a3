"""Our parts under ComfyUI's model management, asked directly: with ``--cpu`` ComfyUI evicts nothing by itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

from client import ROOT

SCRIPT = Path(__file__).parent / "memory_script.py"


def test_parts_are_loaded_shared_and_let_go(comfyui: tuple[Path, Path], tmp_path: Path) -> None:
    folder, python = comfyui
    (tmp_path / "models").mkdir()
    done = subprocess.run([python, SCRIPT, ROOT, tmp_path], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("all is well"), (
        done.stdout[-2000:] + done.stderr[-4000:]
    )

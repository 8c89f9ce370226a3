"""A package that is missing or broken: one clear message, and nodes that are still there."""

from __future__ import annotations

from pathlib import Path

import pytest
from client import serve, workflow

DIRECT = "raise ImportError('mlx is built for another machine', name='mlx.core')"
# a lazy loader's way: the import that failed is behind another error
WRAPPED = f"try:\n    {DIRECT}\nexcept ImportError as error:\n    raise RuntimeError('Failed to import') from error"


@pytest.mark.parametrize("fault", [DIRECT, WRAPPED], ids=["direct", "wrapped"])
def test_a_broken_package_is_one_sentence(comfyui: tuple[Path, Path], base: Path, tmp_path: Path, fault: str) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text(fault)
    with serve(*comfyui, base, PYTHONPATH=str(tmp_path)) as comfy:
        assert "LLaDA2TextToVQ" in comfy.get("/object_info/LLaDA2TextToVQ")
        run = comfy.run(workflow("text_to_image"))
        assert run.error["node_id"] == "1"
        message = run.error["exception_message"]
        assert "ComfyUI-LLaDA2-MLX needs the package mlx, which cannot be imported" in message
        assert "-m pip install -r" in message and "requirements.txt" in message


def test_a_missing_package_is_named_at_the_start(comfyui: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    # a finder that hides a package from this interpreter, as if it were not installed
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda name, *rest: None if name.partition('.')[0] == 'torchdiffeq' else find(name, *rest)\n"
    )
    with serve(*comfyui, base, PYTHONPATH=str(tmp_path)) as comfy:
        assert "the nodes cannot run without torchdiffeq" in comfy.log()
        assert "needs torchdiffeq, which this Python does not have" in comfy.refused(workflow("text_to_image"))

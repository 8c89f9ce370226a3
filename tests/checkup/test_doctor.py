"""The doctor, as a person calls it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import tiny

from llada2_mlx import __version__, cli
from llada2_mlx.checkpoint.layout import BUILT_IN
from llada2_mlx.checkup import doctor, parity
from llada2_mlx.checkup.doctor import Line, State


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole model, one cut short, and one that has two parts."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("whole", "cut", "parts"):
        shutil.copytree(tiny(), folder / name)
    weights = next((folder / "cut/vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    for name in ("image_tokenizer", "decoder", "decoder-turbo"):
        shutil.rmtree(folder / "parts" / name)
    return folder


@pytest.mark.parametrize("altered", [False, True], ids=["right", "wrong"])
def test_what_a_person_reads(
    altered: bool,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In words where all is well, as JSON where the built-in VAE is another than it was: one call each."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if altered:
        shutil.copytree(BUILT_IN, tmp_path / "other")
        path = next((tmp_path / "other/vae").glob("*.safetensors"))
        save_file({n: v.flip(0) if n == "decoder.conv_in.weight" else v for n, v in load_file(path).items()}, path)
        monkeypatch.setattr(parity, "BUILT_IN", tmp_path / "other")
    status = cli.main(["doctor", "--models", str(models), *(["--json"] if altered else [])])
    out = capsys.readouterr().out
    assert status == altered
    if not altered:
        for words in (
            f"machine:\n  this pack: {__version__}\n",
            f"  torch: {torch.__version__}\n",
            "  MLX runs on: the CPU\n",
            "  whole: has backbone, image tokenizer, decoder, turbo decoder, VAE\n",
            "? cut: has backbone, image tokenizer, decoder, turbo decoder\n    VAE: ",
            "  parts: has backbone, VAE; lacks image tokenizer, decoder, turbo decoder\n",
            "  whole, precision: float32, ",
            "  MLX, cpu: drawing, float32: equal (64 of 64 equal)\n",
            "  MLX, cpu: decoder's transformer, float32: equal (relative error ",
            "  PyTorch, cpu: VAE, float32: equal (relative error ",
        ):
            assert words in out
        assert out.endswith("\nThis machine computes what it should.\n") and "!" not in out
        return
    said = json.loads(out)
    assert said["version"] == __version__ and said["ok"] is False
    wrong = [line["name"] for line in said["lines"] if line["state"] == "wrong"]
    assert wrong == ["PyTorch, cpu: VAE, float32"]
    assert {line["section"] for line in said["lines"]} == {"machine", "packages", "models", "parity"}


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--models", "no/such/folder"]) == 1
    assert "There is no folder no/such/folder" in capsys.readouterr().err


def test_a_line() -> None:
    assert (
        str(Line("packages", "torch", "2.12", State.DOUBT, ("Update.", "Really.")))
        == "? torch: 2.12\n    Update.\n    Really."
    )
    assert str(Line("parity", "VAE", "WRONG", State.WRONG)) == "! VAE: WRONG"


def test_only_what_is_wrong_makes_it_fail() -> None:
    lines = [Line("packages", "torch", "2.12", State.DOUBT), Line("machine", "chip", "one")]
    assert doctor.as_json(lines)["ok"] and not doctor.as_json([*lines, Line("parity", "VAE", "", State.WRONG)])["ok"]


def test_a_package_that_fails_is_a_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    line = doctor._guarded("MLX runs on", doctor._mlx_device)
    assert line.state is State.DOUBT and "mlx.core" in line.notes[0]


def test_the_models_of_comfyui_are_found_beside_the_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.beside_comfyui() == []
    pack = tmp_path / "ComfyUI/custom_nodes/any name/llada2_mlx/checkup/doctor.py"
    monkeypatch.setattr(doctor, "__file__", str(pack))
    assert doctor.beside_comfyui() == []
    (tmp_path / "ComfyUI/models/llada2").mkdir(parents=True)
    assert doctor.beside_comfyui() == [tmp_path / "ComfyUI/models/llada2"]

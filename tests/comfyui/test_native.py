"""The decoder in ComfyUI's own samplers: the same latent as ours, and graphs that decode with KSampler."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from client import ROOT
from safetensors.torch import load_file, save_file
from test_memory import run

from llada2_mlx.checkpoint.layout import BUILT_IN


def exact(source: Path, target: Path) -> Path:
    """A copy of a model's parts in float32, in which ComfyUI computes on a CPU whatever is stored."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model*.safetensors", "image_tokenizer.safetensors"))
    for path in target.glob("decoder*/*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    prior = target / "image_tokenizer/sigvq_embedding.pt"
    torch.save({name: tensor.float() for name, tensor in torch.load(prior, weights_only=True).items()}, prior)
    return target


def without(path: Path, name: str) -> None:
    """Take a tensor out of a file."""
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def test_comfyuis_sampler_gives_our_latent(comfyui: tuple[Path, Path], tmp_path: Path) -> None:
    models = tmp_path / "models/llada2"
    exact(BUILT_IN, models / "exact")
    exact(ROOT / "tests/golden/checkpoint", models / "golden")
    torn = exact(BUILT_IN, models / "torn")
    without(torn / "decoder/decoder_model.safetensors", "layers.1.ffn_norm1.weight")
    without(torn / "decoder-turbo/decoder_model.safetensors", "layers.1.attention.to_k.weight")
    run("native_script.py", comfyui, tmp_path)

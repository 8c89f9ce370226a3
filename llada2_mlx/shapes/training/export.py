"""The published layout on disk: names, files and configs as every loader expects them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...checkpoint.config import BackboneConfig
from ...files import write_json
from .text import write_tokenizer

Tensors = Mapping[str, torch.Tensor]


@torch.no_grad()
def rounded(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its weights as the checkpoint will keep them, so that what learns from it learns from that."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.to(torch.bfloat16))
    return module


def write_text(
    folder: Path, config: BackboneConfig, sizes: dict[str, int], sentences: Iterable[str] = (), world: str = ""
) -> None:
    """The backbone's config and its text tokenizer: what prompts are made of.

    Args:
        sizes: in pixels, what the checkpoint states that it was made for.
        sentences: what the tokenizer's merges are learned from.
        world: all that a model knows, for a person; empty for everything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"image_sizes": sizes} | ({"world": world} if world else {})
    published = {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "hidden_act": "silu"}
    write_json(folder / "config.json", published | stated | asdict(config))
    write_tokenizer(folder, config.image_token_offset, sentences)


def write_backbone(folder: Path, tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> None:
    """The backbone's weights, by their published names."""
    _save(folder / "model.safetensors", tensors, dtype)


def write_image_tokenizer(
    folder: Path,
    vision: torch.nn.Module,
    quantiser: torch.nn.Module,
    configs: dict[str, dict[str, Any]],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The vision transformer and the quantiser; ``configs`` has theirs as ``vision_config`` and ``vq_config``."""
    path = folder / "image_tokenizer"
    parts = {"model.visual.": vision, "model.vqmodel.": quantiser}
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.state_dict().items()}
    _save(path / "image_tokenizer.safetensors", tensors, dtype)
    write_json(path / "config.json", {"model_type": "glm_image", **configs})
    patch = configs["vision_config"]["patch_size"]
    write_json(
        path / "preprocessor_config.json", {"patch_size": patch, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )


def write_prior(folder: Path, tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> None:
    """The SigVQ prior, which both decoders share."""
    stored = {name: value.to(dtype) for name, value in tensors.items()}
    torch.save(stored, folder / "image_tokenizer/sigvq_embedding.pt")


def write_decoder(
    folder: Path, transformer: torch.nn.Module, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """A diffusion decoder, into ``decoder`` or ``decoder-turbo``."""
    tensors = {
        name.replace("cap_embedder", "semantic_embedder"): value for name, value in transformer.state_dict().items()
    }
    _save(folder / "decoder_model.safetensors", tensors, dtype)
    write_json(folder / "config.json", {"_class_name": "ZImageTransformer2DModel", **config})


def write_vae(
    folder: Path, model: torch.nn.Module, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """The VAE; its config says how to scale and shift latents."""
    _save(folder / "vae/diffusion_pytorch_model.safetensors", model.state_dict(), dtype)
    write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKL", **config})


def _save(path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: value.detach().to(dtype).contiguous() for name, value in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})

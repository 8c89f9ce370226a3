"""Trained modules -> the published layout: names, files and configs as every loader expects them. Weights in bf16."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...imaging.decoder import SigVQPrior
from . import backbone, decoder, tokenizer, vae
from .text import sentences, write_tokenizer

SIZES = {"drawing": 256, "understanding": 256, "editing": 128}


@torch.no_grad()
def rounded(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its weights as the checkpoint will keep them, so that what learns from it learns from that."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.to(torch.bfloat16))
    return module


def write_text(folder: Path) -> None:
    """The backbone's config and its text tokenizer: what prompts are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    published = {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "hidden_act": "silu"}
    _write_json(folder / "config.json", published | {"image_sizes": SIZES} | asdict(backbone.CONFIG))
    write_tokenizer(folder, backbone.TEXT_IDS, sentences())


def write_backbone(folder: Path, network: torch.nn.Module) -> None:
    """The backbone's weights."""
    _save(folder / "model.safetensors", network.state_dict())


def write_image_tokenizer(folder: Path, trained: tokenizer.Tokenizer) -> None:
    """The vision transformer and the quantiser."""
    path = folder / "image_tokenizer"
    parts = {"model.visual.": trained.vision, "model.vqmodel.": trained.quantiser}
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.state_dict().items()}
    _save(path / "image_tokenizer.safetensors", tensors)
    configs = {"vision_config": tokenizer.VISION, "vq_config": tokenizer.QUANTISER}
    _write_json(path / "config.json", {"model_type": "glm_image", **configs})
    preprocessing = {"patch_size": tokenizer.PATCH, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    _write_json(path / "preprocessor_config.json", preprocessing)


def write_prior(folder: Path, prior: SigVQPrior) -> None:
    """The SigVQ prior, which both decoders share."""
    tensors = {name: value.to(torch.bfloat16) for name, value in prior.state_dict().items()}
    torch.save(tensors, folder / "image_tokenizer/sigvq_embedding.pt")


def write_decoder(folder: Path, transformer: torch.nn.Module) -> None:
    """A diffusion decoder, into ``decoder`` or ``decoder-turbo``."""
    tensors = {
        name.replace("cap_embedder", "semantic_embedder"): value for name, value in transformer.state_dict().items()
    }
    _save(folder / "decoder_model.safetensors", tensors)
    config = {"_class_name": "ZImageTransformer2DModel", **decoder.CONFIG, "cap_feat_dim": decoder.FEATURES}
    _write_json(folder / "config.json", config)


def write_vae(folder: Path, trained: vae.Autoencoder, scale: float, shift: float) -> None:
    """The VAE, with the scale and shift that bring its latents near to a standard normal distribution."""
    _save(folder / "vae/diffusion_pytorch_model.safetensors", trained.model.state_dict())
    config = {"_class_name": "AutoencoderKL", **vae.CONFIG, "scaling_factor": scale, "shift_factor": shift}
    _write_json(folder / "vae/config.json", config)


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")

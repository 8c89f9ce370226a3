"""Complete checkpoints in the real layout, of any size, with random weights."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from torch import nn

from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.weights import published_names
from llada2_mlx.checkpoint.config import BackboneConfig
from llada2_mlx.checkpoint.layout import INDEX
from llada2_mlx.shapes.training import export

BACKBONE = BackboneConfig(
    vocab_size=512 + 256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=600000,
    partial_rotary_factor=0.5,
    max_position_embeddings=8192,
    num_experts=16,
    num_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    image_token_offset=512,
)
EXPERT_FILES, OTHER_FILES = 6, 7  # of the published model


@dataclass(frozen=True)
class Sizes:
    """How large the parts are. ``drawing`` is what the checkpoint states as the size that it draws, in pixels."""

    backbone: BackboneConfig = BACKBONE
    drawing: int = 256
    vision_width: int = 32
    vision_layers: int = 1
    code_width: int = 16
    feature_width: int = 32
    decoder_width: int = 32
    decoder_layers: int = 1
    vae_widths: tuple[int, ...] = (8, 8, 8, 8)


@cache
def tiny() -> Path:
    """The folder of the smallest one; written once in a run of the tests, for reading only."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_checkpoint(folder / "tiny")


def write_checkpoint(folder: Path, sizes: Sizes = Sizes(), seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a checkpoint with all its parts; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        write_backbone(folder, sizes, dtype)
        write_image_tokenizer(folder, sizes, dtype)
        write_decoder(folder / "decoder", sizes, dtype)
        write_decoder(folder / "decoder-turbo", sizes, dtype)
        write_vae(folder, sizes, dtype)
    return folder


def write_strewn(folder: Path) -> Path:
    """Write one with all its parts, its backbone in thirteen files as the published one; returns ``folder``."""
    shutil.copytree(tiny(), folder)
    write_backbone(folder, Sizes(replace(BACKBONE, num_hidden_layers=5)), torch.bfloat16)
    split(folder, as_published(sorted(load_file(folder / "model.safetensors"))))
    return folder


def names_of(files: int) -> list[str]:
    return [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]


def split(folder: Path, files: dict[str, str]) -> None:
    """Put a model's tensors, which are in one file, into the files that are named."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in set(files.values()):
        save_file({name: weights[name] for name, own in files.items() if own == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def as_published(names: list[str]) -> dict[str, str]:
    """The published pattern: the experts in their order in six files, all else strewn over seven more, whatever its layer."""
    shards = names_of(EXPERT_FILES + OTHER_FILES)
    experts = [name for name in names if ".mlp.experts." in name]
    others = [name for name in names if name not in experts]
    cut = -(-len(experts) // EXPERT_FILES)
    files = {name: shards[index // cut] for index, name in enumerate(experts)}
    return files | {name: shards[EXPERT_FILES + 5 * index % OTHER_FILES] for index, name in enumerate(others)}


def write_backbone(folder: Path, sizes: Sizes, dtype: torch.dtype) -> None:
    config = sizes.backbone
    tensors = {}
    for parameter, value in tree_flatten(LLaDA2(config).parameters()):
        names = published_names(parameter, value.shape)
        shape = value.shape[1:] if ".switch_mlp." in parameter else value.shape
        for name in names:
            norm, bias = name.endswith("norm.weight"), name.endswith("expert_bias")
            tensors[name] = torch.ones(shape) if norm else torch.randn(shape) * (0.01 if bias else shape[-1] ** -0.5)
    export.write_backbone(folder, tensors, dtype)
    export.write_text(folder, config, {"drawing": sizes.drawing})


def write_image_tokenizer(folder: Path, sizes: Sizes, dtype: torch.dtype) -> None:
    from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE, GlmImageVQVAEConfig

    codes = sizes.backbone.codebook_size
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 2 * sizes.vision_width,
        "num_heads": 2,
        "depth": sizes.vision_layers,
    }
    vision |= {"patch_size": 16, "image_size": 256, "in_channels": 3, "hidden_act": "gelu", "attention_bias": True}
    quantiser = {
        "num_embeddings": codes,
        "embed_dim": sizes.code_width,
        "latent_channels": sizes.vision_width,
        "in_channels": 3,
    }
    export.write_image_tokenizer(
        folder,
        GlmImageVisionModel(GlmImageVisionConfig(**vision)),
        GlmImageVQVAE(GlmImageVQVAEConfig(**quantiser)),
        {"vision_config": vision, "vq_config": quantiser},
        dtype,
    )
    width = sizes.feature_width
    prior = {
        "prior_token_embedding.weight": torch.randn(codes, width),
        "prior_projector.net.0.proj.weight": torch.randn(width, width) * width**-0.5,
        "prior_projector.net.0.proj.bias": torch.zeros(width),
        "prior_projector.net.2.weight": torch.randn(width, width) * width**-0.5,
        "prior_projector.net.2.bias": torch.zeros(width),
    }
    export.write_prior(folder, prior, dtype)


def write_decoder(folder: Path, sizes: Sizes, dtype: torch.dtype) -> None:
    from diffusers import ZImageTransformer2DModel

    heads, width = 2, sizes.decoder_width
    config = {
        "dim": width,
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": sizes.decoder_layers,
        "n_refiner_layers": 1,
    }
    config |= {
        "axes_dims": [width // heads // 2, width // heads // 4, width // heads // 4],
        "axes_lens": [1536, 512, 512],
        "in_channels": 16,
    }
    module = ZImageTransformer2DModel(**config, cap_feat_dim=sizes.feature_width)
    randomise(module)
    # the published config states another width than its weights have, and the loader has to read the weights
    export.write_decoder(folder, module, config | {"cap_feat_dim": 2560}, dtype)


def write_vae(folder: Path, sizes: Sizes, dtype: torch.dtype) -> None:
    from diffusers import AutoencoderKL

    blocks = len(sizes.vae_widths)
    config = {
        "block_out_channels": list(sizes.vae_widths),
        "latent_channels": 16,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    config |= {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    config |= {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }
    export.write_vae(folder, AutoencoderKL(**config), config, dtype)


def randomise(module: nn.Module) -> None:
    """Give the parameters that diffusers leaves at zero a value, so that nothing is switched off."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)

"""A synthetic checkpoint of the published model's names, shapes and types, written piece by piece."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from mlx.utils import tree_flatten
from published import BACKBONE

from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.weights import published_names
from llada2_mlx.checkpoint.config import BackboneConfig
from llada2_mlx.checkpoint.layout import INDEX
from llada2_mlx.files import write_json
from llada2_mlx.shapes.training import export

SHARDS = 13
POOL = 1 << 26  # random values that all tensors are cut from

VISION = {
    "hidden_size": 1536, "intermediate_size": 6144, "num_heads": 16, "depth": 40, "patch_size": 16, "image_size": 2048,
    "in_channels": 3, "hidden_act": "gelu", "attention_bias": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
QUANTISER = {"num_embeddings": 16384, "embed_dim": 2048, "latent_channels": 1536, "in_channels": 3}
FEATURES = 4096
DECODER = {
    "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "in_channels": 16, "norm_eps": 1e-5, "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0,
    "all_f_patch_size": [1], "all_patch_size": [2],
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]
Value = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Values:
    """Random values for tensors: cut from one pool at a place of each tensor's own, and scaled to its width."""

    pool: torch.Tensor

    @classmethod
    def make(cls) -> Values:
        return cls(torch.empty(POOL, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0)))

    def of(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return (
                torch.zeros(shape, dtype=torch.bfloat16) if "bias" in name else torch.ones(shape, dtype=torch.bfloat16)
            )
        size = prod(shape)
        start = random.Random(name).randrange(len(self.pool))
        cut = (
            self.pool.roll(-start)
            if size > len(self.pool) // 2
            else self.pool.narrow(0, start % (len(self.pool) - size), size)
        )
        whole = cut.repeat(-(-size // len(cut)))[:size]
        return whole.mul(prod(shape[1:]) ** -0.5).view(shape)


def write_backbone(folder: Path, config: BackboneConfig = BACKBONE) -> None:
    """A backbone in shards, 32.6 GB as published, with their index, config and text tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, value in tree_flatten(LLaDA2(config).parameters()):
        shape = value.shape[1:] if ".switch_mlp." in parameter else value.shape
        shapes |= dict.fromkeys(published_names(parameter, value.shape), tuple(shape))
    values, weight_map = Values.make(), {}
    for number, names in enumerate(_even(shapes), 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write(folder / file, {name: shapes[name] for name in names}, values.of)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    export.write_text(folder, config, {})


def write_image_parts(folder: Path) -> None:
    """The image tokenizer, its prior, one decoder and the VAE."""
    from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE, GlmImageVQVAEConfig

    values = Values.make()
    with torch.device("meta"):
        vision = GlmImageVisionModel(GlmImageVisionConfig(**VISION))
        quantiser = GlmImageVQVAE(GlmImageVQVAEConfig(**QUANTISER))
    (folder / "image_tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer = _shapes(vision, "model.visual.") | _shapes(quantiser, "model.vqmodel.")
    write(folder / "image_tokenizer/image_tokenizer.safetensors", tokenizer, values.of)
    configs = {"vision_config": VISION, "vq_config": QUANTISER}
    write_json(folder / "image_tokenizer/config.json", {"model_type": "glm_image", **configs})
    normal = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(folder / "image_tokenizer/preprocessor_config.json", normal)
    write_drawing_parts(folder, values.of, lambda path, shapes: write(path, shapes, values.of))


def write_drawing_parts(
    folder: Path, prior: Value, write_file: Callable[[Path, Shapes], None], layers: int = DECODER["n_layers"]
) -> None:
    """The prior, one decoder with so many main layers, and the VAE.

    Args:
        prior: gives the values of the prior's tensors.
        write_file: writes the other two.
    """
    from diffusers import AutoencoderKL, ZImageTransformer2DModel

    config = DECODER | {"n_layers": layers}
    with torch.device("meta"):
        transformer, vae = ZImageTransformer2DModel(**config, cap_feat_dim=FEATURES), AutoencoderKL(**VAE)
    for name in ("image_tokenizer", "decoder-turbo", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shapes = {
        "prior_token_embedding.weight": (16384, FEATURES),
        "prior_projector.net.0.proj.weight": (FEATURES, FEATURES),
        "prior_projector.net.0.proj.bias": (FEATURES,),
        "prior_projector.net.2.weight": (FEATURES, FEATURES),
        "prior_projector.net.2.bias": (FEATURES,),
    }
    export.write_prior(folder, {name: prior(name, shape) for name, shape in shapes.items()})
    renamed = {name.replace("cap_embedder", "semantic_embedder"): shape for name, shape in _shapes(transformer).items()}
    write_file(folder / "decoder-turbo/decoder_model.safetensors", renamed)
    stated = {"_class_name": "ZImageTransformer2DModel", **config, "cap_feat_dim": 2560}  # as published, and not true
    write_json(folder / "decoder-turbo/config.json", stated)
    write_file(folder / "vae/diffusion_pytorch_model.safetensors", _shapes(vae))
    write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKL", **VAE})


def write(path: Path, shapes: Shapes, value: Value) -> None:
    """A safetensors file in bf16, one tensor in memory at a time."""
    with open(path, "wb") as file:
        file.write(_header(shapes))
        for name, shape in shapes.items():
            file.write(value(name, shape).contiguous().view(torch.uint8).numpy().data)


def write_hollow(path: Path, shapes: Shapes) -> None:
    """The same file with a hole in place of its values, so that it takes no room on the disk: for its header."""
    header = _header(shapes)
    path.write_bytes(header)
    os.truncate(path, len(header) + 2 * sum(map(prod, shapes.values())))


def _header(shapes: Shapes) -> bytes:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def _shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def _even(shapes: Shapes) -> Iterator[list[str]]:
    """The names in shards of about one size."""
    total, done, shard = sum(map(prod, shapes.values())), 0, []
    number = 1
    for name, shape in shapes.items():
        shard.append(name)
        done += prod(shape)
        if done >= total * number / SHARDS:
            yield shard
            shard, number = [], number + 1

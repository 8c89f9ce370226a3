"""The random checkpoint that is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from synthetic import BACKBONE, Sizes, write_backbone

from llada2_mlx.checkpoint.config import BackboneConfig

# Work is in the proportions of the published model: 9.6 text ids a code, and the whole head about as much work as half
# of the layers. MLX's CPU backend does one or two GFLOP/s, so what ends in minutes there is small.
_TINY = replace(BACKBONE, head_dim=32, moe_intermediate_size=64, max_position_embeddings=8192)
_SMALL = replace(
    BACKBONE,
    vocab_size=4288 + 448,
    image_token_offset=4288,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    num_experts=32,
    moe_intermediate_size=128,
)
_MID = replace(
    BACKBONE,
    vocab_size=49152 + 5120,
    image_token_offset=49152,
    hidden_size=1024,
    intermediate_size=2560,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=64,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    moe_intermediate_size=256,
)
SIZES: dict[str, BackboneConfig] = {"tiny": _TINY, "small": _SMALL, "mid": _MID}

# What each embedding has along the direction that tells text from codes, and the head's text rows against it.
_LEVEL, _AGAINST = 4.0, -64.0
# Sharper attention and larger embeddings, so that masked positions, which all have one embedding, come out different.
_SHARPNESS = 2.0


def write(folder: Path, config: BackboneConfig, seed: int = 0) -> Path:
    """Write a backbone whose text ids are never the best candidate; returns ``folder``.

    A trained model puts text far below codes where a code is due. Samplers that look at the whole vocabulary
    rely on that, so a random model has to have it too: the first hidden dimension is a constant, and the head's
    text rows point against it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        write_backbone(folder, Sizes(config), torch.bfloat16)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embeddings, head = tensors["model.word_embeddings.weight"], tensors["lm_head.weight"]
    embeddings *= config.hidden_size**0.5
    embeddings[:, 0] = _LEVEL
    head[:, 0] = 0
    head[: config.image_token_offset, 0] = _AGAINST
    for name, value in tensors.items():
        if name.endswith((".attention.dense.weight", ".down_proj.weight")):
            value[0] = 0  # no layer writes to it
        elif name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            value[0] = 0  # or reads it
        elif name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
            value *= _SHARPNESS
    save_file(tensors, path, metadata={"format": "pt"})
    return folder

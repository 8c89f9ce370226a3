"""A checkpoint whose weights are made by hand: it tells one story, whatever it is asked, if its blocks are of one token.

Its first layer looks at the two tokens before a mask, by rotary positions alone. The output head knows which token comes
after which two. All else adds nothing. So a real network, from real files, tells a story that a test knows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from synthetic import BACKBONE, Sizes, write_checkpoint

from llada2_mlx import prompts
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.shapes.training import export
from llada2_mlx.tokens import Tokens

TEXTS = ("The fox dug.", "A big lynx", "Run!")  # no two of its contexts are confused
SIZES = ((8, 10), (10, 8))  # codes, height x width
_WIDTH, _HEAD = 128, 16
_SHARP = 50.0  # how much better a key at the right distance is


def codes(picture: int) -> list[int]:
    """The codes of a picture, counted from 0."""
    return list(range(100 * picture, 100 * picture + 80))


def write_storyteller(folder: Path) -> Path:
    """Write the checkpoint; returns ``folder``."""
    config = replace(BACKBONE, hidden_size=_WIDTH, num_attention_heads=8, num_key_value_heads=8)
    write_checkpoint(folder, Sizes(backbone=config), dtype=torch.float32)
    tokens, tensors = Tokens(Checkpoint(folder)), load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("down_proj.weight", "dense.weight", "word_embeddings.weight", "lm_head.weight")):
            tensors[name].zero_()
    # each token is a direction of its own beside a first number that all share
    seen = torch.nn.functional.normalize(torch.randn(config.vocab_size, 64, generator=torch.Generator().manual_seed(1)))
    seen[tokens.mask] = 0
    tensors["model.word_embeddings.weight"][:, 0] = 1
    tensors["model.word_embeddings.weight"][:, 1:65] = seen
    attention = "model.layers.0.attention."
    queries, keys, values = tensors[attention + "query_key_value.weight"].zero_().split(_WIDTH)
    frequencies = config.rope_theta ** -(torch.arange(4) / 4)
    for head in range(8):
        own, distance = slice(head * _HEAD, (head + 1) * _HEAD), 1 + head // 4
        turned = -distance * frequencies
        queries[own, 0] = torch.cat([turned.cos(), turned.sin(), torch.zeros(8)])
        keys[own, 0] = torch.cat([torch.ones(4), torch.zeros(12)])
        values[own, 1:65] = torch.eye(64)[head % 4 * _HEAD : (head % 4 + 1) * _HEAD]
    tensors[attention + "query_layernorm.weight"].fill_(_SHARP)
    tensors[attention + "key_layernorm.weight"].fill_(1)
    tensors[attention + "dense.weight"].copy_(torch.eye(_WIDTH))
    story = _story(tokens)
    for two, one, after in zip(story, story[1:], story[2:], strict=False):
        tensors["lm_head.weight"][after] += torch.cat([seen[one], seen[two]])
    export.write_backbone(folder, tensors, torch.float32)
    return folder


def _story(tokens: Tokens) -> list[int]:
    """The ids of the story, after the last two of every request."""
    ids = prompts.story(tokens, "x").conditional[-2:]
    for number, (text, size) in enumerate(zip(TEXTS, (*SIZES, None), strict=True)):
        ids += tokens.encode(text)
        picture = [*tokens.header(*size), *tokens.codes_to_ids(codes(number)), tokens.image_end] if size else []
        ids += picture or [tokens.end]
    return ids

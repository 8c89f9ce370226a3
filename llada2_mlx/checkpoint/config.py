"""The backbone's architecture, as its ``config.json`` states it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

# A network with larger numbers than these cannot be, and to build it takes for ever, or all memory.
_LAYERS = ("num_hidden_layers", "n_layers", "n_refiner_layers", "depth", "layers_per_block", "num_res_blocks")
_MOST = dict.fromkeys(_LAYERS, 512) | dict.fromkeys(("num_experts", "num_shared_experts"), 4096) | {"axes_lens": 2**20}
_MOST_OF_OTHERS = 2**30
PRECISIONS = ("auto", "float32", "bf16", "8bit", "6bit", "4bit")  # to choose from, see ``precision``


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes and constants of the LLaDA2 mixture-of-experts backbone.

    Field names are those of the published ``config.json``; nothing has a default that a checkpoint
    could silently depend on.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    num_experts: int
    num_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    moe_intermediate_size: int
    first_k_dense_replace: int
    image_token_offset: int

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def codebook_size(self) -> int:
        """How many image codes the vocabulary ends with: code ``k`` is id ``image_token_offset + k``."""
        return self.vocab_size - self.image_token_offset

    @classmethod
    def from_dict(cls, published: dict[str, Any]) -> BackboneConfig:
        """Read the fields from a published config.

        Raises:
            CheckpointError: the config is of another architecture, lacks a field, or states something
                that this network does not compute.
        """
        kind = published.get("model_type")
        if kind != "llada2_moe":
            raise CheckpointError(
                f"config.json is of a {kind!r} model; a LLaDA2.0-Uni backbone has model_type 'llada2_moe'."
            )
        rope = published.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"config.json has rope_parameters = {rope!r}; an object is needed.")
        values = {**rope, **published, "num_shared_experts": published.get("num_shared_experts") or 0}
        missing = [f.name for f in fields(cls) if values.get(f.name) is None]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}.")
        unsupported = {
            "hidden_act": "silu",
            "use_bias": False,
            "use_qkv_bias": False,
            "use_qk_norm": True,
            "rope_type": "default",
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "sliding_window": None,
        }
        for name, supported in unsupported.items():
            if values.get(name, supported) != supported:
                raise CheckpointError(f"config.json has {name} = {values[name]!r}; only {supported!r} is supported.")
        require_possible(values, "config.json")
        config = cls(**{f.name: _number(f.name, values[f.name], f.type) for f in fields(cls)})
        config._check()
        return config

    def _check(self) -> None:
        may_be_zero = {"num_shared_experts", "first_k_dense_replace"}
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in may_be_zero):
                raise CheckpointError(f"config.json has {field.name} = {value}; it has to be larger.")
        group_size, kept = self.num_experts // self.n_group, self.topk_group * (self.num_experts // self.n_group)
        for holds, what in (
            (
                self.num_attention_heads % self.num_key_value_heads == 0,
                "num_key_value_heads has to divide num_attention_heads",
            ),
            (self.num_experts % self.n_group == 0, "n_group has to divide num_experts"),
            (self.topk_group <= self.n_group, "topk_group cannot be larger than n_group"),
            (self.topk_group == self.n_group or group_size > 1, "a group needs two experts to have a score"),
            (
                self.num_experts_per_tok <= kept,
                "num_experts_per_tok cannot be larger than the kept groups are together",
            ),
            (
                self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim,
                "partial_rotary_factor times head_dim has to be even, and within the head",
            ),
            (self.image_token_offset < self.vocab_size, "image_token_offset has to be inside the vocabulary"),
        ):
            if not holds:
                raise CheckpointError(f"config.json describes no network: {what}.")


def require_possible(stated: Any, where: str | Path, name: str = "") -> None:
    """Check before a network is built that it is not larger than any can be.

    Args:
        stated: of a config, or one value of it, which is called ``name``; what is in it is checked too.

    Raises:
        CheckpointError: a number is too large.
    """
    if isinstance(stated, (dict, list)):
        for key, value in stated.items() if isinstance(stated, dict) else ((name, value) for value in stated):
            require_possible(value, where, key)
    elif isinstance(stated, int) and abs(stated) > (most := _MOST.get(name, _MOST_OF_OTHERS)):
        raise CheckpointError(f"{where} has {name} = {stated:.6g}; no network has more than {most}.")


def _number(name: str, value: Any, kind: str) -> int | float:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or (kind == "int" and value != int(value)):
        raise CheckpointError(f"config.json has {name} = {value!r}; a number is needed.")
    return int(value) if kind == "int" else float(value)

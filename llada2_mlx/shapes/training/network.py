"""The backbone in PyTorch, as a trainer needs it: the arithmetic of ``llada2_mlx.model``, with any mask and gradients.

What it exports must run in MLX; ``tests/shapes`` compares the two forwards.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ...checkpoint.config import BackboneConfig

BALANCE = 1e-3  # how far a step moves an expert's bias towards an even load


class Attention(nn.Module):
    """Grouped-query attention with packed QKV, per-head RMSNorm on q and k, and partial RoPE."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.width, bias=False)
        self.query_layernorm = nn.RMSNorm(self.width, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(self.width, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        qkv = rearrange(self.query_key_value(x), "b n (h d) -> b h n d", d=self.width)
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = _turn(self.query_layernorm(query), turns), _turn(self.key_layernorm(key), turns)
        shared = self.heads // self.kv_heads
        self._looked = query, key
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(rearrange(out, "b h n d -> b n (h d)"))

    def scores(self, head: int) -> torch.Tensor:
        """How much a head wanted to look where, in the last forward: [batch, length, length], before any mask."""
        query, key = self._looked[0][:, head], self._looked[1][:, head // (self.heads // self.kv_heads)]
        return query @ key.transpose(-1, -2) * self.width**-0.5


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Group-limited sigmoid router. Its bias is moved so that all experts get as much to do (no auxiliary loss)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * config.hidden_size**-0.5)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, hidden] -> experts and weights, both [tokens, top_k]."""
        scores = torch.sigmoid(F.linear(x, self.weight))
        choice = scores.detach() + self.expert_bias
        if self.kept_groups < self.groups:
            grouped = choice.unflatten(-1, (self.groups, -1))
            kept = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.kept_groups, dim=-1).indices
            dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
            choice = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(self.top_k, dim=-1).indices
        if self.training:
            load = torch.bincount(experts.flatten(), minlength=len(self.expert_bias)).float()
            self.expert_bias += BALANCE * torch.sign(load.mean() - load)
        weights = scores.gather(-1, experts)
        if self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return experts, weights * self.scale


class SparseMoE(nn.Module):
    """Routed experts, each run once on the tokens that chose it, and the shared one."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        experts, weights = self.gate(tokens)
        order = experts.flatten().argsort()
        counts = torch.bincount(experts.flatten(), minlength=len(self.experts)).tolist()
        sources = order // experts.shape[-1]
        inputs = tokens[sources].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, inputs, strict=True)])
        routed = torch.zeros_like(tokens).index_add(0, sources, outputs * weights.flatten()[order, None])
        return (routed + self.shared_experts(tokens)).view_as(x)


class Layer(nn.Module):
    """Pre-norm residual block; the first ``first_k_dense_replace`` layers have a dense MLP."""

    def __init__(self, config: BackboneConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else SparseMoE(config)

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_layernorm(x), turns, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Token ids to hidden states to logits. Its state dict has the published names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "gate.weight" not in name:
                deep = name.endswith(("dense.weight", "down_proj.weight"))
                scale = (2 * config.num_hidden_layers) ** -0.5 if deep else 1.0
                nn.init.normal_(parameter, std=scale * (0.02 if "embed" in name else parameter.shape[1] ** -0.5))
        nn.init.normal_(self.lm_head.weight, std=0.02)
        half = config.rotary_dim // 2
        self.register_buffer("frequencies", config.rope_theta ** -(torch.arange(half) / half).float(), persistent=False)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, inner: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            ids, positions: [batch, length] integers.
            mask: [batch, length, length] bool, true where a row may look.
            inner: a list that gets the output of every layer.

        Returns:
            [batch, length, hidden] float32.
        """
        angles = positions[:, None, :, None] * self.frequencies
        turns, x = (angles.cos(), angles.sin()), self.model.word_embeddings(ids)
        for layer in self.model.layers:
            x = layer(x, turns, mask[:, None])
            if inner is not None:
                inner.append(x)
        return self.model.norm(x)


def _turn(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE on the first dims of each head, in halves."""
    cosine, sine = turns
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)

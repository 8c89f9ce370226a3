"""The LLaDA2 backbone in MLX: token ids in, hidden states out.

Module and parameter names are those of the published checkpoint, except that the experts of a layer
are stacked into one ``switch_mlp``. The network is not causal by itself: the mask decides who sees whom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from ..checkpoint.config import BackboneConfig

PREFILL = 1024  # positions of a prompt that go through the network in one pass, in each branch


class LayerCache(Protocol):
    """What a layer needs of a cache: put new keys and values in, get everything there is to attend to."""

    def update(self, keys: mx.array, values: mx.array, start: int | mx.array) -> tuple[mx.array, mx.array]: ...


class Attention(nn.Module):
    """Grouped-query attention with packed QKV, per-head RMSNorm on q and k, and partial RoPE."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rotary_dim, self.rope_theta = config.rotary_dim, config.rope_theta
        packed = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, packed, bias=False)
        self.query_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, start: int | mx.array, mask: mx.array | None, cache: LayerCache | None) -> mx.array:
        batch, length, _ = x.shape
        qkv = self.query_key_value(x).reshape(batch, length, -1, self.head_dim)
        q, k, v = mx.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
        q = self._rope(self.query_layernorm(q).swapaxes(1, 2), start)
        k = self._rope(self.key_layernorm(k).swapaxes(1, 2), start)
        v = v.swapaxes(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, start)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
        return self.dense(out.swapaxes(1, 2).reshape(batch, length, -1))

    def _rope(self, x: mx.array, start: int | mx.array) -> mx.array:
        """``x`` [batch, heads, length, head dim], rotated by its positions."""
        rotate = lambda x, offset: mx.fast.rope(
            x, self.rotary_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offset
        )
        if isinstance(start, int):
            return rotate(x, start)
        batch, heads, length, width = x.shape  # a position of its own each: sequences of one
        alone = x.swapaxes(1, 2).reshape(batch * length, heads, 1, width)
        return rotate(alone, start.flatten()).reshape(batch, length, heads, width).swapaxes(1, 2)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Group-limited sigmoid router. Its parameters and arithmetic are float32 whatever the network's type.

    The bias takes part in the choice of experts and not in their weights.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = mx.zeros((config.num_experts, config.hidden_size))
        self.expert_bias = mx.zeros((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """``x`` [..., hidden] -> expert indices and float32 weights, both [..., top_k], in no fixed order."""
        scores = mx.sigmoid(x.astype(mx.float32) @ self.weight.T)
        choice = scores + self.expert_bias
        dropped_groups = self.groups - self.kept_groups
        if dropped_groups:
            grouped = mx.unflatten(choice, -1, (self.groups, -1))
            group_scores = mx.topk(grouped, 2, axis=-1).sum(axis=-1)
            dropped = mx.argpartition(group_scores, kth=dropped_groups - 1, axis=-1)[..., :dropped_groups]
            grouped = mx.put_along_axis(grouped, dropped[..., None], mx.array(-mx.inf), axis=-2)
            choice = mx.flatten(grouped, -2)
        experts = mx.argpartition(-choice, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if self.top_k > 1:  # a single expert keeps its own score, as published
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return experts, weights * self.scale


class SparseMoE(nn.Module):
    """Routed experts plus the shared expert that every token passes."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.gate = Router(config)
        self.switch_mlp = SwitchGLU(config.hidden_size, config.moe_intermediate_size, config.num_experts)
        if config.num_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = self.gate(x)
        routed = (self.switch_mlp(x, experts) * weights[..., None]).sum(axis=-2).astype(x.dtype)
        return routed + self.shared_experts(x) if "shared_experts" in self else routed


class Layer(nn.Module):
    """Pre-norm residual block; the first ``first_k_dense_replace`` layers have a dense MLP."""

    def __init__(self, config: BackboneConfig, index: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else SparseMoE(config)

    def __call__(self, x: mx.array, start: int | mx.array, mask: mx.array | None, cache: LayerCache | None) -> mx.array:
        x = x + self.attention(self.input_layernorm(x), start, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and final norm: what the checkpoint calls ``model``."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LLaDA2(nn.Module):
    """The backbone with its output head.

    ``prefill`` is how many positions of a prompt go through it in one pass, in each branch: fewer take less memory and more time.

    Source: inclusionAI/LLaDA2.0-Uni (``LLaDA2MoeModelLM``), arXiv:2604.20796.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.prefill = PREFILL
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._head_covariance: mx.array | None = None

    def __call__(
        self,
        ids: mx.array,
        start: int | mx.array = 0,
        mask: mx.array | None = None,
        cache: list[LayerCache] | None = None,
    ) -> mx.array:
        """Hidden states after the final norm.

        Args:
            ids: token ids [batch, length], integers.
            start: position of the first of ``ids`` in the sequence. RoPE sees differences of positions alone, so
                rows whose own text begins later need no positions of their own. Or a position for each of ``ids``,
                [batch, length], for a cache that does not write at positions.
            mask: bool, broadcastable to [batch, heads, length, keys], true where a query may look;
                None lets every query see every key.
            cache: one entry a layer; None attends to ``ids`` alone.

        Returns:
            [batch, length, hidden] in the network's type.
        """
        x = self.model.word_embeddings(ids)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, start, mask, cache[index] if cache is not None else None)
        return self.model.norm(x)

    def logits(self, hidden: mx.array, rows: slice = slice(None)) -> mx.array:
        """Logits of some rows of the vocabulary: [..., hidden] -> [..., rows], float32."""
        head = self.lm_head
        if "scales" not in head:
            weight = head.weight[rows]
            return (hidden.astype(weight.dtype) @ weight.T).astype(mx.float32)
        weight, *rest = (head[name][rows] for name in ("weight", "scales", "biases"))
        hidden = hidden.astype(mx.float32)  # in bf16 several rows would tie
        bits = {"group_size": head.group_size, "bits": head.bits}
        return mx.quantized_matmul(hidden, weight, *rest, transpose=True, **bits).astype(mx.float32)

    def logit_std(self, hidden: mx.array) -> mx.array:
        """Standard deviation (n - 1) of the logits over the whole vocabulary, without the logits.

        The head is linear, so the variance of its outputs is ``h^T C h`` with ``C`` the covariance of its
        rows. [..., hidden] -> [..., 1], float32.
        """
        hidden = hidden.astype(mx.float32)
        variance = ((hidden @ self.head_covariance) * hidden).sum(axis=-1, keepdims=True)
        return mx.sqrt(mx.maximum(variance, 0))

    @property
    def head_covariance(self) -> mx.array:
        """Covariance (n - 1) of the head's rows, [hidden, hidden] float32; computed once, on first use."""
        if self._head_covariance is None:
            self._head_covariance = _covariance(self._head_rows, self.config.vocab_size, self.config.hidden_size)
        return self._head_covariance

    def _head_rows(self, start: int, end: int) -> mx.array:
        """Some rows of the head, in float32."""
        head = self.lm_head
        if "scales" not in head:
            return head.weight[start:end].astype(mx.float32)
        packed = (head[name][start:end] for name in ("weight", "scales", "biases"))
        return mx.dequantize(*packed, group_size=head.group_size, bits=head.bits).astype(mx.float32)


def _covariance(read: Callable[[int, int], mx.array], rows: int, width: int, chunk: int = 16384) -> mx.array:
    """Covariance of the rows of a matrix in float32, with one chunk of it in memory at a time."""
    total, outer = mx.zeros((1, width)), mx.zeros((width, width))
    for start in range(0, rows, chunk):
        total = total + read(start, start + chunk).sum(axis=0, keepdims=True)
        mx.eval(total)
    for start in range(0, rows, chunk):
        centred = read(start, start + chunk) - total / rows
        outer = outer + centred.T @ centred
        mx.eval(outer)
    covariance = outer / (rows - 1)
    mx.eval(covariance)
    return covariance

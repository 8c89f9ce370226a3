"""What the language model takes beside its weights, and how it is made to fit: with smaller pieces, and fewer buffers kept.

The figures were found with MLX's own counter on small random models (docs/performance.md); what is computed from them is an upper
bound, and ``tests/backbone/test_working.py`` holds it to that.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import mlx.core as mx

from ..checkpoint.config import BackboneConfig
from ..worker import CACHE_BYTES, on_cpu
from .network import PREFILL

BLOCK = 32  # positions of a block that is reckoned with
BRANCHES = 2  # with guidance
# Positions of each branch in a pass, and bytes of freed buffers that MLX may keep: the first that fits is taken.
WAYS = ((PREFILL, CACHE_BYTES), (PREFILL, 250_000_000), (512, 250_000_000), (256, 250_000_000), (128, 100_000_000))
VALUE = 4  # bytes: also where the network runs in bf16, experts' outputs are weighed in float32
WRITING = 2  # how often keys and values are there while they are written
HEAD = 10  # arrays of all logits at once, above temperature 0 with top-p
COVARIANCE = 3 * 16384  # rows of the head, in three arrays of a chunk


@dataclass(frozen=True)
class Working:
    """How the network works in the memory that there is.

    Args:
        piece: positions of each branch that go through in one pass, at most.
        cache: bytes of freed buffers that MLX may keep.
        size: bytes beside the weights in all, for as many positions as the model's context has in all branches together.
        longest: positions in all branches together for which the memory is enough; 0 where it is enough for none.
        fits: whether those are at least the model's context.
    """

    piece: int
    cache: int
    size: int
    longest: int
    fits: bool


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together.

    Args:
        pictures: how many.
        branches: of each.
        positions: of a branch, with the prompt.
    """

    pictures: int
    branches: int
    positions: int


def fit(config: BackboneConfig, dtype: mx.Dtype, left: int) -> Working:
    """The first of ``WAYS`` that fits into ``left`` bytes, else the last.

    Args:
        dtype: that the network runs in.
        left: of the memory, without the weights.
    """
    most = config.max_position_embeddings
    for piece, cache in WAYS:
        size_of = lambda written, piece=piece, cache=cache: cache + work_bytes(config, dtype, piece, written)
        if (size := size_of(most)) <= left:
            break
    longest = bisect_right(range(1, most + 1), left, key=size_of)
    return Working(piece, cache, size, longest, size <= left)


def work_bytes(config: BackboneConfig, dtype: mx.Dtype, piece: int, written: int, branches: int = BRANCHES) -> int:
    """Bytes beside the weights at most, without MLX's buffer cache.

    Args:
        dtype: that the network runs in.
        piece: positions of each branch in a pass; the block goes along with the last one.
        written: positions in all branches together.
        branches: in one batch.
    """
    c = config
    kept = WRITING * written * _kept_values(c) * dtype.size
    passing = branches * (piece + BLOCK) * position_values(c, written // branches) * VALUE
    head = HEAD * BLOCK * c.vocab_size * VALUE
    covariance = (min(COVARIANCE, 3 * c.vocab_size) + 2 * c.hidden_size) * c.hidden_size * VALUE
    return max(kept + passing + head, covariance)


def batch_bytes(config: BackboneConfig, dtype: mx.Dtype, batch: Batch) -> int:
    """Bytes at most that a batch takes more than its first picture alone.

    The prompt is read once; then each picture has its keys and values, and in a step a finished block and the next one.
    """
    c, more = config, batch.pictures - 1
    kept = WRITING * batch.branches * batch.positions * _kept_values(c) * dtype.size
    passing = batch.branches * 2 * BLOCK * position_values(c, batch.positions) * VALUE
    head = HEAD * BLOCK * (c.vocab_size - c.image_token_offset) * VALUE
    return more * (kept + passing + head)


def position_values(config: BackboneConfig, keys: int) -> int:
    """How many values a position of a pass takes at most, in the layer that takes most.

    Args:
        keys: that it attends to. Only on a CPU are its scores written out.
    """
    c = config
    scores = 3 * c.num_attention_heads * keys // 2 if on_cpu() else 0
    attention = 4 * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim + scores
    dense = 3 * c.intermediate_size
    chosen = 3 * c.num_experts_per_tok * (c.hidden_size + c.moe_intermediate_size)
    sparse = chosen + 3 * c.num_shared_experts * c.moe_intermediate_size + 4 * c.num_experts
    return 10 * c.hidden_size + max(attention, dense, sparse)


def _kept_values(config: BackboneConfig) -> int:
    """Values of the keys and values of a position, in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

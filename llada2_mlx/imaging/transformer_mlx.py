"""The decoder's transformer in MLX: Z-Image's single-stream diffusion transformer (arXiv:2511.22699), without what is not used here.

Names of modules and parameters are those of the published checkpoint. One picture at a time; branches of guidance run one
after the other, because a call is bound by arithmetic and a batch of two would only take more memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .attention import SCORES
from .step_cache import StepCache

ADALN = 256  # the time embedding has this width, or the network's where that is smaller
FREQUENCIES, TIME_HIDDEN = 256, 1024  # of the time embedding
PIECE = 1024  # tokens of which a layer makes what is many times their width, at most
MULTIPLE = 32  # tokens of the picture and of the condition are padded to multiples of this
QK_EPS, FINAL_EPS = 1e-5, 1e-6
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")  # in the order of ``Norms``


@dataclass(frozen=True)
class Config:
    """The sizes of a transformer, under the names of its ``config.json``; what that leaves out is as published.

    Args:
        dim: width of a token.
        n_heads: of attention.
        n_layers, n_refiner_layers: main layers, and layers of either refiner.
        in_channels: of the latent.
        axes_dims: how many values of a head turn with a token's place in the condition, its row and its column.
        rope_theta: base of these rotations.
        t_scale: what a time in 0 .. 1 is multiplied by.
        all_patch_size: sides of a patch, in latents; there has to be one.
    """

    dim: int = 3840
    n_heads: int = 30
    n_layers: int = 30
    n_refiner_layers: int = 2
    in_channels: int = 16
    axes_dims: tuple[int, ...] = (32, 48, 48)
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True
    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    siglip_feat_dim: int | None = None

    @classmethod
    def from_dict(cls, stated: dict[str, Any]) -> Config:
        """The sizes that a config states.

        Raises:
            ValueError: they make no network, or one that is not built here.
        """
        known = {field.name for field in fields(cls)}
        own = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in stated.items() if key in known})
        own.check()
        return own

    def check(self) -> None:
        """Raise ``ValueError`` if these sizes make no network."""
        counts = (self.dim, self.n_heads, self.in_channels, *self.axes_dims, self.n_layers)
        if not all(isinstance(n, int) and n > 0 for n in counts) or self.n_refiner_layers < 0:
            raise ValueError("sizes have to be positive whole numbers")
        if self.dim % self.n_heads or sum(self.axes_dims) != self.head_dim or any(n % 2 for n in self.axes_dims):
            raise ValueError(
                f"axes_dims {list(self.axes_dims)} have to be even and add up to dim / n_heads = {self.dim / self.n_heads:g}"
            )
        if len(self.axes_dims) != 3 or len(self.all_patch_size) != 1 or self.all_f_patch_size != (1,):
            raise ValueError("three axes, one patch size and an all_f_patch_size of [1] are needed")
        if self.siglip_feat_dim is not None:
            raise ValueError("siglip_feat_dim is for another kind of condition")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads

    @property
    def patch(self) -> int:
        """Side of a patch, in latents."""
        return self.all_patch_size[0]


@dataclass(frozen=True)
class Norms:
    """The weights of a layer's four norms, [dim] each. Scales and gates of a time are in them: a norm is linear in its weight."""

    before_attention: mx.array
    after_attention: mx.array
    before_feed_forward: mx.array
    after_feed_forward: mx.array


class Attention(nn.Module):
    """Attention of all tokens to all, with RMSNorm on queries and keys, and RoPE in three axes."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(3))
        self.to_out = [nn.Linear(config.dim, config.dim, bias=False)]
        if config.qk_norm:
            self.norm_q, self.norm_k = (nn.RMSNorm(config.head_dim, eps=QK_EPS) for _ in range(2))

    def heads(self, x: mx.array, turns: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values [1, length, heads, head dim] of ``x`` [1, length, dim], turned."""
        split = lambda x: x.reshape(1, x.shape[1], -1, self.head_dim)
        q, k, v = split(self.to_q(x)), split(self.to_k(x)), split(self.to_v(x))
        if "norm_q" in self:
            q, k = self.norm_q(q), self.norm_k(k)
        return turned(q, turns), turned(k, turns), v

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """What some queries find in all keys and values, [1, queries, dim]."""
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.to_out[0](out.swapaxes(1, 2).reshape(1, q.shape[2], -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(nn.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """A block with norms before and after attention and feed-forward.

    Args:
        timed: whether a time scales what goes into them and gates what comes out.
    """

    def __init__(self, config: Config, timed: bool):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config.dim)
        for name in NORMS:
            self[name] = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.eps = config.norm_eps
        if timed:
            self.adaLN_modulation = [nn.Linear(min(config.dim, ADALN), 4 * config.dim)]

    def norms(self, embedding: mx.array | None = None) -> Norms:
        """The norms at a time, [min(dim, 256)] float32 as the network embeds it, in the type of their weights."""
        weights = [self[name].weight for name in NORMS]
        if embedding is None:
            return Norms(*weights)
        scale, gate, scale_ff, gate_ff = mx.split(self.adaLN_modulation[0](embedding), 4, axis=-1)
        factors = (1 + scale, mx.tanh(gate), 1 + scale_ff, mx.tanh(gate_ff))
        return Norms(*((w * factor).astype(w.dtype) for w, factor in zip(weights, factors)))

    def __call__(self, x: mx.array, turns: Turns, norms: Norms) -> mx.array:
        """``x`` [1, length, dim] -> the same shape, evaluated."""
        return joined([piece for (piece,) in self._pieces(x, turns, norms)])

    def _pieces(self, x: mx.array, turns: Turns, norms: Norms) -> list[tuple[mx.array]]:
        """The result in pieces: queries, keys and values are gone when they are joined."""
        normed = lambda x, weight: mx.fast.rms_norm(x, weight, self.eps)
        heads = lambda x, turns: self.attention.heads(normed(x, norms.before_attention), turns)
        parts = [*zip(*in_pieces(heads, PIECE, x, turns.turns))]
        q, k, v = (joined(parts.pop(0)) for _ in range(3))  # each lets its pieces go

        def rest(x: mx.array, q: mx.array) -> tuple[mx.array]:
            x = x + normed(self.attention(q, k, v), norms.after_attention)
            mx.eval(x)
            return (x + normed(self.feed_forward(normed(x, norms.before_feed_forward)), norms.after_feed_forward),)

        # where no kernel has this head's width scores are written out, and macOS ends a kernel of seconds
        fewer = max(SCORES // (q.shape[2] * k.shape[1]), 1)
        return in_pieces(rest, min(PIECE, fewer), x, q)


class FinalLayer(nn.Module):
    """A token of the picture -> the values of its patch."""

    def __init__(self, config: Config):
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch**2 * config.in_channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(min(config.dim, ADALN), config.dim)]

    def __call__(self, x: mx.array, embedding: mx.array) -> mx.array:
        scale = 1 + self.adaLN_modulation[1](nn.silu(embedding))
        return self.linear(mx.fast.layer_norm(x, scale.astype(x.dtype), None, FINAL_EPS))


class TimeEmbedder(nn.Module):
    """A time, scaled -> [min(dim, 256)] float32: cosines and sines at many frequencies, through two layers."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = [nn.Linear(FREQUENCIES, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, min(dim, ADALN))]

    def __call__(self, time: np.float32) -> mx.array:
        half = FREQUENCIES // 2
        angles = time * np.exp(-math.log(10000) * np.arange(half, dtype=np.float32) / half)
        x = mx.array(np.concatenate([np.cos(angles), np.sin(angles)])[None])
        for layer in self.mlp:
            x = layer(x)
        return x[0]


def in_pieces(function: Callable[..., tuple[mx.array, ...]], most: int, *given: mx.array) -> list[tuple[mx.array, ...]]:
    """What a function of tokens gives, evaluated, for at most so many of them after the other: what it makes on the way is less.

    Args:
        function: gives arrays for arrays [1, length, ...]; what it makes of a token depends on no other one.
        given: arrays [1, length, ...].
    """
    made = []
    for start in range(0, given[0].shape[1], most):
        made.append(function(*(x[:, start : start + most] for x in given)))
        mx.eval(made[-1])
    return made


def joined(pieces: Sequence[mx.array]) -> mx.array:
    """Pieces [1, length, ...] one after the other, evaluated."""
    whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
    mx.eval(whole)
    return whole


class Turns:
    """RoPE of tokens with a place each in three axes: the rotations, computed once in double precision.

    ``mx.fast.rope`` knows one axis, along which tokens follow one another. A head's values turn in neighbouring pairs.

    Args:
        places: [length, 3] whole numbers.
    """

    def __init__(self, config: Config, places: np.ndarray):
        angles = [
            np.outer(place, config.rope_theta ** (-np.arange(0, width, 2) / width))
            for place, width in zip(places.T, config.axes_dims)
        ]
        angles = np.concatenate(angles, axis=1).astype(np.float32)[None, :, None]
        self.turns = mx.array(np.exp(1j * angles).astype(np.complex64))  # [1, length, 1, head dim / 2]


def turned(x: mx.array, turns: mx.array) -> mx.array:
    """``x`` [1, length, heads, head dim], turned; the product is float32."""
    pairs = x.astype(mx.float32).view(mx.complex64)
    return (pairs * turns).view(mx.float32).astype(x.dtype)


@dataclass(frozen=True)
class Context:
    """What is the same in all calls for one picture and condition.

    Args:
        tokens: the refined condition [1, length, dim].
        picture, everything: the rotations of the picture's tokens, and of those with the condition's.
    """

    tokens: mx.array
    picture: Turns
    everything: Turns


class ZImageTransformer(nn.Module):
    """A latent, a time and a condition -> the velocity.

    Source: the Z-Image technical report (arXiv:2511.22699), and the published weights' names.

    Args:
        features: width of the condition.
    """

    def __init__(self, config: Config, features: int):
        super().__init__()
        self.config = config
        own = f"{config.patch}-1"
        self.all_x_embedder = {own: nn.Linear(config.patch**2 * config.in_channels, config.dim)}
        self.all_final_layer = {own: FinalLayer(config)}
        self.t_embedder = TimeEmbedder(config.dim)
        self.semantic_embedder = [nn.RMSNorm(features, eps=config.norm_eps), nn.Linear(features, config.dim)]
        self.context_refiner = [Layer(config, timed=False) for _ in range(config.n_refiner_layers)]
        self.noise_refiner = [Layer(config, timed=True) for _ in range(config.n_refiner_layers)]
        self.layers = [Layer(config, timed=True) for _ in range(config.n_layers)]
        self.x_pad_token, self.cap_pad_token = mx.zeros((1, config.dim)), mx.zeros((1, config.dim))

    @property
    def timed_layers(self) -> list[Layer]:
        """The layers that see the time and the latent, in their order."""
        return [*self.noise_refiner, *self.layers]

    def context(self, features: mx.array, size: tuple[int, int]) -> Context:
        """What a condition, features [tokens, width], gives for a latent of a height and width."""
        length = features.shape[0] + -features.shape[0] % MULTIPLE
        steps = np.arange(1, length + 1)
        places = np.stack([steps, 0 * steps, 0 * steps], axis=1)
        x = features[None]
        for layer in self.semantic_embedder:
            x = layer(x)
        x, turns = _padded(x, self.cap_pad_token), Turns(self.config, places)
        mx.eval(x)
        for layer in self.context_refiner:
            x = layer(x, turns, layer.norms())
        rows, columns = (side // self.config.patch for side in size)
        grid = np.stack(np.meshgrid([length + 1], np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
        grid = grid.reshape(-1, 3)
        grid = np.concatenate([grid, np.zeros((-len(grid) % MULTIPLE, 3), dtype=grid.dtype)])
        both = Turns(self.config, np.concatenate([grid, places]))
        return Context(x, Turns(self.config, grid), both)

    def times(self, time: float) -> tuple[mx.array, list[Norms]]:
        """The embedding of a time in 0 .. 1, and what it makes of the norms of ``timed_layers``: the same in all branches."""
        embedding, made = self.t_embedder(np.float32(time) * np.float32(self.config.t_scale)), []
        for layer in self.timed_layers:
            made.append(layer.norms(embedding))
            mx.eval(
                [*vars(made[-1]).values()]
            )  # one by one: for the float32 embedding a layer's matrix is made float32
        return embedding, made

    def velocity(
        self,
        latent: mx.array,
        context: Context,
        embedding: mx.array,
        norms: Iterable[Norms],
        cache: StepCache | None = None,
    ) -> Generator[None, None, mx.array]:
        """The velocity of a latent [channels, height, width], in its shape and in float32; evaluated layer by layer.

        Args:
            cache: of ``layers`` but the first; those that it saves are yielded for too.

        Yields:
            After each of ``timed_layers``.
        """
        own, at = f"{self.config.patch}-1", iter(norms)
        patches = self._patches(latent.astype(self.x_pad_token.dtype))
        x = _padded(self.all_x_embedder[own](patches), self.x_pad_token)
        for layer in self.noise_refiner:
            x = layer(x, context.picture, next(at))
            yield
        x = mx.concatenate([x, context.tokens], axis=1)
        first, *others = self.layers
        before, x = x, first(x, context.everything, next(at))
        yield
        known = cache.recall(before, x) if cache and others else None
        del before
        after = x if cache else None
        for layer in others:
            if known is None:
                x = layer(x, context.everything, next(at))
            yield
        if known is not None:
            x = known
        elif cache and others:
            cache.remember(after, x)
        del after, known
        x = self.all_final_layer[own](x[:, : patches.shape[1]], embedding)
        return self._latent(x, latent.shape).astype(mx.float32)

    def _patches(self, latent: mx.array) -> mx.array:
        """[channels, height, width] -> [1, tokens, values]; a patch is row by row, channels last."""
        channels, height, width = latent.shape
        side = self.config.patch
        cut = latent.reshape(channels, height // side, side, width // side, side)
        return cut.transpose(1, 3, 2, 4, 0).reshape(1, -1, side * side * channels)

    def _latent(self, patches: mx.array, shape: tuple[int, ...]) -> mx.array:
        channels, height, width = shape
        side = self.config.patch
        cut = patches.reshape(height // side, width // side, side, side, channels)
        return cut.transpose(4, 0, 2, 1, 3).reshape(shape)


def _padded(x: mx.array, token: mx.array) -> mx.array:
    """``x`` [1, length, dim], filled up with ``token`` to a multiple of 32 tokens; they are attended to like the others."""
    missing = -x.shape[1] % MULTIPLE
    return mx.concatenate([x, mx.broadcast_to(token[None], (1, missing, x.shape[-1]))], axis=1) if missing else x

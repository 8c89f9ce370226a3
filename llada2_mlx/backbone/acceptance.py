"""Which candidates become tokens: how they are drawn, and which of them are accepted in a step.

Arrays here have a leading axis for pictures, so that several can be denoised at once. Each picture is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from ..errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and how fast.

    Args:
        block_length: positions in a block.
        steps: denoising steps for a block, at most.
        threshold: a candidate more probable than this is accepted at once.
        temperature: 0 takes the most probable token, whatever the seed; above 0 the logits are divided by it.
        top_k: above temperature 0, how many of the most probable tokens stay; 0 keeps all.
        top_p: above temperature 0, the smallest set of tokens with at least this probability stays; 1 keeps all.
        seed: of the random draws above temperature 0.

    Raises:
        RequestError: a value is out of range.
    """

    block_length: int = 32
    steps: int = 32
    threshold: float = 0.95
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("block_length", 1, 4096),
            ("steps", 1, 4096),
            ("threshold", 0, 1),
            ("temperature", 0, 100),
            ("top_k", 0, 2**31),
            ("top_p", 0, 1),
            ("seed", 0, 2**64 - 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise RequestError(f"{name.replace('_', ' ')} is {value}; it has to be from {least} to {most}.")
        if 0 < self.temperature < 0.001:
            raise RequestError(f"temperature is {self.temperature}; it has to be 0, or from 0.001 to 100.")


class Candidates(NamedTuple):
    """What could be written at each position of a block.

    Args:
        tokens: rows of the logits, integers [pictures, length].
        probability: of each of them, in the distribution that it was drawn from, float [pictures, length].
        logits: before temperature, top-k and top-p, float [pictures, length, rows].
    """

    tokens: mx.array
    probability: mx.array
    logits: mx.array


class Acceptance(Protocol):
    """Decides which candidates of a block become tokens."""

    def __call__(self, candidates: Candidates, masked: mx.array, step: int, keys: Sequence[mx.array]) -> mx.array:
        """Which positions are accepted.

        Args:
            masked: which positions are still to be written, bool [pictures, length].
            step: the denoising step of this block, from 0.
            keys: one for each picture, for what is decided at random.

        Returns:
            bool [pictures, length], true for masked positions alone.
        """
        ...


@dataclass(frozen=True)
class ThresholdAcceptance:
    """All masked positions over the threshold if there are at least the step's quota of them, else the quota's most probable.

    Args:
        block_length: positions in a block.
        steps: denoising steps for a block; the quotas of all steps sum to ``block_length``.
        threshold: what a probability has to exceed.
    """

    block_length: int
    steps: int
    threshold: float

    def quota(self, step: int) -> int:
        """How many positions ``step`` accepts at least; the first steps take what does not divide evenly."""
        return self.block_length // self.steps + (step < self.block_length % self.steps)

    def __call__(self, candidates: Candidates, masked: mx.array, step: int, keys: Sequence[mx.array] = ()) -> mx.array:
        quota = self.quota(step)
        confidence = mx.where(masked, candidates.probability, -mx.inf)
        over = confidence > self.threshold
        return mx.where(over.sum(axis=-1, keepdims=True) >= quota, over, best(confidence, masked, quota))


def best(score: mx.array, masked: mx.array, count: int | mx.array) -> mx.array:
    """The ``count`` masked positions of each picture with the highest score: bool [pictures, length].

    Args:
        score, masked: [pictures, length].
        count: one number, or [pictures, 1].
    """
    rank = mx.argsort(mx.argsort(-mx.where(masked, score, -mx.inf), axis=-1), axis=-1)
    return (rank < count) & masked


def draw_candidates(logits: mx.array, sampling: Sampling, keys: Sequence[mx.array] = ()) -> Candidates:
    """Each position's candidate and its probability, from logits [pictures, length, rows].

    Above temperature 0 the logits are divided by it, then cut to top-k, then to top-p, and the probability is
    that of the changed distribution.

    Args:
        keys: one for each picture, for the draws above temperature 0.
    """
    untouched = logits
    if not sampling.temperature:
        choice = mx.argmax(logits, axis=-1)
    else:
        logits = logits / sampling.temperature
        if 0 < sampling.top_k < logits.shape[-1]:
            least = mx.min(mx.topk(logits, sampling.top_k, axis=-1), axis=-1, keepdims=True)
            logits = mx.where(logits < least, -mx.inf, logits)
        if sampling.top_p < 1:
            order = mx.argsort(-logits, axis=-1)
            probabilities = mx.take_along_axis(mx.softmax(logits, axis=-1), order, axis=-1)
            outside = mx.cumsum(probabilities, axis=-1) - probabilities >= max(sampling.top_p, 1e-12)
            outside = mx.put_along_axis(mx.zeros_like(outside), order, outside, axis=-1)
            logits = mx.where(outside, -mx.inf, logits)
        drawn = [mx.random.categorical(picture, key=key) for picture, key in zip(logits, keys, strict=True)]
        choice = mx.stack(drawn)
    chosen = mx.take_along_axis(logits, choice[..., None], axis=-1)[..., 0]
    return Candidates(choice, mx.exp(chosen - mx.logsumexp(logits, axis=-1)), untouched)

"""SPRINT: fewer keys for most of a block's steps, and another rule of acceptance. Faster, and lossy.

The first steps of a block run as they always do. Then each layer keeps only some positions of the prefix, and the later steps
run the block against those. Source: the published LLaDA2.0-Uni code (arXiv:2604.20796).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from .acceptance import Candidates, best
from .guidance import Guidance
from .network import LLaDA2
from .session import BatchedRunner, PrefixCache, Report, Session

# Positions whose whole-vocabulary logits are in memory at once.
_CONFIDENCE_CHUNK = 128


class Remasking(Enum):
    """By what the masked positions of a block are ranked; all of the guided logits of what may be chosen."""

    LOW_CONFIDENCE = "low confidence"  # the candidate's probability
    TOP_K_MARGIN = "top-k margin"  # the first choice's probability less the second's
    NEG_ENTROPY = "negative entropy"  # 1 - entropy / the largest that there can be
    RANDOM = "random"


@dataclass(frozen=True)
class Sprint:
    """How SPRINT saves work.

    Args:
        keep_ratio: the part of the prefix that the later steps of a block see.
        warm_up: steps of a block that see all of it.
        alpha: how positions are ranked: 1 by the norm of their keys, 0 by the network's confidence there. As published,
            confidence alone decides below 1 where positions are pinned.
        text_keep_ratio: 1 pins positions of text, so that they are kept in any case; below 1 does not, whatever it is.
        image_keep_ratio: the same for image codes.
        remasking: by what candidates are ranked.

    Raises:
        RequestError: a value is out of range.
    """

    keep_ratio: float = 0.7
    warm_up: int = 2
    alpha: float = 0.5
    text_keep_ratio: float = 1.0
    image_keep_ratio: float = 0.0
    remasking: Remasking = Remasking.LOW_CONFIDENCE

    def __post_init__(self) -> None:
        for name, least, most in (
            ("keep_ratio", 0, 1),
            ("warm_up", 1, 4096),
            ("alpha", 0, 1),
            ("text_keep_ratio", 0, 1),
            ("image_keep_ratio", 0, 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise RequestError(
                    f"SPRINT's {name.replace('_', ' ')} is {value}; it has to be from {least} to {most}."
                )

    @property
    def by_confidence(self) -> bool:
        """Whether the network's confidence in the prefix is looked at."""
        return self.alpha < 1 and self.keep_ratio < 1 and min(self.text_keep_ratio, self.image_keep_ratio) < 1

    def pinned(self, text: np.ndarray) -> np.ndarray:
        """Which positions are kept in any case, of those that are text or else image codes: bool, of the same shape."""
        return np.where(text, self.text_keep_ratio >= 1, self.image_keep_ratio >= 1)

    def counts(self, pinned: np.ndarray) -> np.ndarray:
        """How many positions each branch keeps: pinned [branches, prefix] -> integers [branches]."""
        prefix = pinned.shape[1]
        if self.keep_ratio >= 1:
            return np.full(len(pinned), prefix)
        return np.maximum(pinned.sum(axis=1), max(1, int(prefix * self.keep_ratio)))


@dataclass(frozen=True)
class SprintAcceptance:
    """The best of those that are left over the steps that are left, and all whose first choice is over the threshold.

    Args:
        steps: denoising steps for a block.
        threshold: what the probability of the first choice has to exceed.
        remasking: by what positions are ranked.
    """

    steps: int
    threshold: float
    remasking: Remasking

    def __call__(self, candidates: Candidates, masked: mx.array, step: int, keys: Sequence[mx.array]) -> mx.array:
        probabilities = mx.softmax(candidates.logits.astype(mx.float32), axis=-1)
        quota = -(-masked.sum(axis=-1, keepdims=True) // (self.steps - step))
        certain = mx.max(probabilities, axis=-1) > self.threshold
        return best(self._score(candidates.tokens, probabilities, keys), masked, quota) | (certain & masked)

    def _score(self, tokens: mx.array, probabilities: mx.array, keys: Sequence[mx.array]) -> mx.array:
        match self.remasking:
            case Remasking.LOW_CONFIDENCE:
                return mx.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0]
            case Remasking.TOP_K_MARGIN:
                two = mx.topk(probabilities, min(2, probabilities.shape[-1]), axis=-1)
                return mx.max(two, axis=-1) - mx.min(two, axis=-1)
            case Remasking.NEG_ENTROPY:
                entropy = -(probabilities * mx.log(mx.maximum(probabilities, 1e-30))).sum(axis=-1)
                return 1 - entropy / np.log(max(probabilities.shape[-1], 2))
            case Remasking.RANDOM:
                return mx.stack([mx.random.uniform(shape=tokens.shape[1:], key=key) for key in keys])


class SprintRunner(BatchedRunner):
    """Steps as the batched runner's, but that those after the warm-up see only what was kept of the prefix.

    There a shorter prompt's missing head is seen too, as published: as mask tokens that all stand where the prompt begins.

    Args:
        mask: the id of the mask token.
    """

    def __init__(
        self,
        model: LLaDA2,
        session: Session,
        guidance: Guidance,
        report: Report,
        rows: slice,
        sprint: Sprint,
        mask: int,
    ) -> None:
        super().__init__(model, session, guidance, report, rows)
        self.sprint, self.mask_id = sprint, mask
        self.block, self.steps, self.kept, self.seen, self.pairs = -1, 0, None, None, 0
        self.heads = [0] * len(session.begins)  # how much of each missing head has keys and values
        known = 0 if session.confidence is None else session.confidence.shape[1]
        if sprint.by_confidence and known < session.final:  # written without SPRINT: read it again
            session.final, session.confidence = 0, None

    def logits(self, tokens: mx.array, here: slice) -> mx.array:
        if here.start != self.block:
            self.block, self.steps, self.kept = here.start, 0, None
        self.steps += 1
        if not here.start or self.steps <= self.sprint.warm_up:
            return super().logits(tokens, here)
        if self.kept is None:
            self._prune(tokens, here.start)
        self.report.positions += len(self.session.begins) * self.size
        self.report.pairs += self.pairs
        return self._guided(self.model(tokens[:, here], self._positions(here), self.seen, self.kept))

    def look_ahead(self) -> Callable[[], None] | None:
        # what is kept of the prefix is chosen by its tokens
        choosing = self.block and self.kept is None and self.steps >= self.sprint.warm_up
        return None if choosing else super().look_ahead()

    def _finish(self, hidden: mx.array) -> None:
        if not self.sprint.by_confidence:
            return
        session, parts = self.session, []
        for start in range(0, hidden.shape[1], _CONFIDENCE_CHUNK):
            parts.append(self._confidence(hidden[:, start : start + _CONFIDENCE_CHUNK]))
        known = [] if session.confidence is None else [session.confidence[:, : session.final]]
        if not known and session.final:  # nothing of a branch stands there yet
            known = [np.zeros((len(session.ids), session.final), np.float32)]
        session.confidence = np.concatenate([*known, *parts], axis=1)

    def _confidence(self, hidden: mx.array) -> np.ndarray:
        """The probability of the first choice over the whole vocabulary: [branches, length, hidden] -> [branches, length]."""
        logits = self.model.logits(hidden)
        self.report.head_rows += self.model.config.vocab_size
        self.report.syncs += 1
        return np.array(mx.exp(mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1)))

    def _prune(self, tokens: mx.array, prefix: int) -> None:
        """Choose what the rest of the block's steps see of the prefix."""
        for row, begin in enumerate(self.session.begins):
            self._write_head(row, begin, prefix)
        text = np.array(tokens[:, :prefix]) < self.model.config.image_token_offset
        self.report.syncs += 1
        pinned = self.sprint.pinned(text)
        counts = self.sprint.counts(pinned)
        most = int(counts.max())
        self.kept = [_Kept(*(array[:, :, :prefix] for array in layer.arrays)) for layer in self.session.layers]
        if most < prefix:
            order = None
            for kept in self.kept:
                if order is None or self._uses_norms(pinned).any():
                    order = mx.argsort(-self._score(kept.keys, pinned), axis=-1)[:, :most]
                kept.choose(order)
        self.seen = None
        if counts.min() < most:
            seen = np.arange(most + self.size) < counts[:, None]
            seen[:, most:] = True
            self.seen = mx.array(seen)[:, None, None, :]
        self.pairs = self.size * int(counts.sum() + len(counts) * self.size)

    def _uses_norms(self, pinned: np.ndarray) -> np.ndarray:
        """Whether the norms of keys count, [branches]: not where one is pinned, as published, unless nothing else would."""
        return np.full(len(pinned), True) if self.sprint.alpha == 1 else ~pinned.any(axis=1) & (self.sprint.alpha > 0)

    def _score(self, keys: mx.array, pinned: np.ndarray) -> mx.array:
        """How worth keeping each position is, [branches, prefix]; infinite where it is pinned."""
        score = mx.zeros(pinned.shape)
        if (used := self._uses_norms(pinned)).any():
            norm = mx.linalg.norm(keys.astype(mx.float32), axis=-1).mean(axis=1)
            score = mx.array(used)[:, None] * self.sprint.alpha * norm / norm.mean(axis=-1, keepdims=True)
        if self.sprint.by_confidence:
            score = score + (1 - self.sprint.alpha) * mx.array(self.session.confidence[:, : pinned.shape[1]])
        return mx.where(mx.array(pinned), mx.inf, score)

    def _positions(self, here: slice) -> int | mx.array:
        """Where the block's positions stand; those of a missing head all stand where the prompt begins."""
        if max(self.session.begins) <= here.start:
            return here.start
        begins = np.array(self.session.begins)[:, None]
        return mx.array(np.maximum(np.arange(here.start, here.stop), begins).astype(np.int32))

    def _write_head(self, row: int, begin: int, prefix: int) -> None:
        """Give a missing head the keys and values that it has as published, as far as the prefix goes.

        In blocks of its own it sees nothing; in the block in which the prompt begins it sees the prompt there.
        """
        whole = begin // self.size * self.size
        for positions, real in ((slice(0, whole), None), (slice(whole, begin), slice(begin, whole + self.size))):
            if not self.heads[row] <= positions.start < positions.stop <= prefix or (real and real.stop > prefix):
                continue
            caches = [_Head(layer, row, real) for layer in self.session.layers]
            hidden = self.model(mx.array([[self.mask_id]]), begin, None, caches)
            self._count(1, 1, len(range(begin, whole + self.size)) if real else 0)
            for layer, head in zip(self.session.layers, caches, strict=True):
                layer.fill(row, positions, head.keys, head.values)
            if self.sprint.by_confidence:
                self.session.confidence[row, positions] = self._confidence(hidden)[0, 0]
            self.heads[row] = positions.stop


class _Kept:
    """A layer's kept keys and values, to which a step's own are added and not written."""

    def __init__(self, keys: mx.array, values: mx.array):
        self.keys, self.values = keys, values

    def choose(self, order: mx.array) -> None:
        """Keep the positions ``order``, integers [branches, kept]."""
        index = order[:, None, :, None]
        self.keys, self.values = (mx.take_along_axis(array, index, axis=2) for array in (self.keys, self.values))

    def update(self, keys: mx.array, values: mx.array, start: int | mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)


class _Head:
    """A layer's cache for a token that sees positions ``real`` of a row and not itself; it remembers the token's own."""

    def __init__(self, layer: PrefixCache, row: int, real: slice | None):
        self.layer, self.row, self.real = layer, row, real

    def update(self, keys: mx.array, values: mx.array, start: int | mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        if self.real is None:  # attention to one value of zeros gives zeros
            return mx.zeros_like(keys), mx.zeros_like(values)
        return tuple(array[self.row : self.row + 1, :, self.real] for array in self.layer.arrays)

"""Block diffusion: block after block, masks are denoised in a few steps until none is left.

The sequence (prompt, then masks) is cut into blocks counted from position 0. A block sees itself and every
block before it, none after. So a finished block never changes and its keys and values are final: they are
kept, and a step runs the current block alone. ``Method`` has the slower ways to the same tokens.

Every function here runs on the backbone's own thread (see ``handle.py``).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from enum import Enum

import mlx.core as mx
import numpy as np

from ..errors import LLaDA2Error, RequestError
from ..progress import Progress
from .guidance import Guidance
from .network import LLaDA2

# Positions of prompt that go through the network in one pass before the first step.
PREFILL = 1024


class Method(Enum):
    """How a step gets its logits. All give the same tokens."""

    CACHED = "cached"  # the prefix's keys and values are kept
    RECOMPUTE = "recompute"  # the whole sequence runs at each step; everything else as above
    PLAIN = "plain"  # so it does, branch by branch, with guidance on the logits of the whole vocabulary


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


@dataclass
class Report:
    """What a generation did, so that speed can be tested by counting.

    ``positions`` counts each branch's positions that went through the network; ``head_rows`` the rows of the
    output head that were multiplied, summed over steps and products; ``syncs`` how often the host waited.
    """

    blocks: int = 0
    steps: int = 0
    positions: int = 0
    head_rows: int = 0
    syncs: int = 0
    branches: int = 1
    seconds: float = 0.0


@dataclass
class Generation:
    """Generated ids, prompt aside, and the report."""

    ids: list[int]
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class Vocabulary:
    """Which ids may be chosen, and which of them mean something to the loop.

    Args:
        mask: id of a position that is still to be denoised.
        first: the smallest id that may be chosen; the image codes are the end of the vocabulary.
        end: the id that ends a text, or None where the length is fixed.
    """

    mask: int
    first: int = 0
    end: int | None = None


class PrefixCache:
    """Keys and values of one layer, [batch, kv heads, capacity, head dim].

    New ones are written at their positions and everything up to there is returned, so what a denoising step
    writes for its unfinished block is overwritten by the next.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array, start: int) -> tuple[mx.array, mx.array]:
        if self.keys is None:
            batch, heads, _, width = keys.shape
            self.keys = mx.zeros((batch, heads, self.capacity, width), keys.dtype)
            self.values = mx.zeros((batch, heads, self.capacity, width), values.dtype)
        end = start + keys.shape[2]
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        return self.keys[..., :end, :], self.values[..., :end, :]


def generate(
    model: LLaDA2,
    branches: tuple[list[int], ...],
    length: int,
    vocabulary: Vocabulary,
    sampling: Sampling = Sampling(),
    guidance: Guidance = Guidance(),
    method: Method = Method.CACHED,
) -> Generator[Progress, None, Generation]:
    """Denoise ``length`` tokens after a prompt.

    Args:
        branches: prompt ids, the conditional branch first. All end at the same position: a shorter one has
            nothing before it (never attended to), a longer one loses its head.
        length: tokens wanted. The last block is run whole, also where ``length`` ends inside it.

    Yields:
        Progress after each step; the work happens between two values.

    Returns:
        The generated ids: ``length`` of them, or up to and with the first end token.

    Raises:
        RequestError: the request is longer than the model's ``max_position_embeddings``.
        LLaDA2Error: the network's output is not finite.
    """
    began = time.perf_counter()
    guidance, branches = guidance.select(branches)
    prompt, size = len(branches[0]), sampling.block_length
    blocks = -(-(prompt + length) // size)
    check_length(prompt, length, model.config.max_position_embeddings)
    steps = min(sampling.steps, length)
    tokens, first = _layout(branches, blocks * size, vocabulary.mask)
    report, key, drawn = Report(branches=len(branches)), mx.random.key(sampling.seed), None
    if method is Method.PLAIN:
        network = _Plain(model, guidance, report, first, size, vocabulary.first)
    else:
        cache = [PrefixCache(blocks * size) for _ in model.model.layers] if method is Method.CACHED else None
        network = _Batched(model, guidance, report, first, size, vocabulary.first, cache)

    first_block = prompt // size
    for start in network.prefill(tokens, first_block * size):
        yield Progress("reading the prompt", start, first_block * size)

    done = np.full(blocks * size, vocabulary.mask)  # the conditional branch as the host knows it
    for block in range(first_block, blocks):
        report.blocks += 1
        here = slice(block * size, (block + 1) * size)
        for step in range(steps):
            logits = network.logits(tokens, here)
            if sampling.temperature:
                key, drawn = mx.random.split(key)
            choice, probability = candidates(logits, sampling, drawn)
            masked = tokens[0, here] == vocabulary.mask
            quota = size // steps + (step < size % steps)
            accepted = accept(probability, masked, quota, sampling.threshold)
            choice = (choice + vocabulary.first).astype(tokens.dtype)
            # a branch keeps what its own prompt has at that position
            tokens[:, here] = mx.where(accepted & (tokens[:, here] == vocabulary.mask), choice, tokens[:, here])
            report.steps += 1
            done[here], finite = _fetch(report, tokens, here, probability)
            if not finite:
                raise LLaDA2Error(
                    "The network's output is not finite (NaN or infinity): its weights or their precision are at fault."
                )
            generated = done[prompt : here.stop].tolist()
            yield Progress(
                "denoising", (block - first_block) * steps + step + 1, (blocks - first_block) * steps, tuple(generated)
            )
            if vocabulary.mask not in done[here] or vocabulary.mask not in _through_end(generated, vocabulary.end):
                break
        # a mask that is left is one that the model chose itself; the end may stand behind it
        if vocabulary.end in generated:
            break

    ids = _through_end(done[prompt : prompt + length].tolist(), vocabulary.end)
    report.seconds = time.perf_counter() - began
    return Generation(ids, report)


def check_length(prompt: int, length: int, most: int) -> None:
    """Raise ``RequestError`` if prompt and answer together are longer than the model allows."""
    if length < 1:
        raise RequestError(f"{length} tokens are asked for; at least 1 is needed.")
    if prompt + length > most:
        raise RequestError(
            f"The request is too long: {prompt} tokens of prompt and {length} to generate make {prompt + length}, "
            f"and the model takes {most}. Shorten the text, or ask for a smaller picture or answer."
        )


def candidates(logits: mx.array, sampling: Sampling, key: mx.array | None) -> tuple[mx.array, mx.array]:
    """Each position's candidate and its probability: logits [length, rows] -> two arrays [length].

    Above temperature 0 the logits are divided by it, then cut to top-k, then to top-p, and the probability is
    that of the changed distribution.
    """
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
        choice = mx.random.categorical(logits, key=key)
    chosen = mx.take_along_axis(logits, choice[:, None], axis=-1)[:, 0]
    return choice, mx.exp(chosen - mx.logsumexp(logits, axis=-1))


def accept(probability: mx.array, masked: mx.array, quota: int, threshold: float) -> mx.array:
    """Which candidates of a block become tokens: bool [length].

    All masked positions over the threshold if there are at least ``quota`` of them, else the ``quota`` most
    probable masked ones.
    """
    confidence = mx.where(masked, probability, -mx.inf)
    over = confidence > threshold
    rank = mx.argsort(mx.argsort(-confidence))
    best = (rank < quota) & masked
    return mx.where(over.sum() >= quota, over, best)


def block_mask(start: int, end: int, size: int, first: mx.array | None) -> mx.array | None:
    """Who sees whom when positions ``start .. end - 1`` run against everything before ``end``.

    A query sees the keys of its own block and of those before, and of a branch whose text begins at ``first``
    none before that. What stands there itself is never looked at; it sees its like, so that no row is empty.

    Returns:
        bool [branches or 1, 1, end - start, end], or None where everything is seen.
    """
    whole = end - start <= size
    if whole and first is None:
        return None
    queries, keys = mx.arange(start, end)[:, None], mx.arange(end)[None]
    mask = keys // size <= queries // size
    if first is not None:
        begin = first[:, None, None]
        mask = mask & ((keys >= begin) | (queries < begin))
    return mx.reshape(mask, (-1, 1, end - start, end))


class _Batched:
    """The branches as one batch, so that a step reads each expert's weights once; guidance on hidden states."""

    def __init__(
        self,
        model: LLaDA2,
        guidance: Guidance,
        report: Report,
        first: list[int],
        size: int,
        first_row: int,
        cache: list[PrefixCache] | None,
    ):
        self.model, self.guidance, self.report, self.size, self.first_row = model, guidance, report, size, first_row
        self.begins = mx.array(first, dtype=mx.int32) if any(first) else None  # where each branch begins
        self.cache, self.cached = cache, 0  # positions whose keys and values are final
        self.rows = model.config.vocab_size - first_row
        self.span, self.mask = None, None
        if guidance.rescale:
            _ = model.head_covariance  # made now, not in the first step

    def prefill(self, tokens: mx.array, end: int) -> Generator[int, None, None]:
        """Put the prompt's blocks into the cache, all but the last ``PREFILL`` positions, which the first step takes along."""
        chunk = max(PREFILL // self.size, 1) * self.size
        while self.cache is not None and end - self.cached > chunk:
            start, self.cached = self.cached, self.cached + chunk
            self._run(tokens, start, self.cached)
            mx.async_eval([layer.keys for layer in self.cache], [layer.values for layer in self.cache])
            yield self.cached

    def logits(self, tokens: mx.array, here: slice) -> mx.array:
        """Guided logits of the block ``here``: [block length, rows that may be chosen]."""
        start = self.cached if self.cache is not None else 0
        hidden = self._run(tokens, start, here.stop)[:, -self.size :]
        self.cached = here.start
        self.report.head_rows += self.rows
        return self.model.logits(self.guidance.combine(self.model, hidden), self.first_row)

    def _run(self, tokens: mx.array, start: int, end: int) -> mx.array:
        if self.span != (start, end):  # the mask is made once a block, not once a step
            self.span, self.mask = (start, end), block_mask(start, end, self.size, self.begins)
        self.report.positions += tokens.shape[0] * (end - start)
        return self.model(tokens[:, start:end], start, self.mask, self.cache)


class _Plain:
    """The reference: no cache, one branch after the other from position 0, logits of the whole vocabulary."""

    def __init__(self, model: LLaDA2, guidance: Guidance, report: Report, first: list[int], size: int, first_row: int):
        self.model, self.guidance, self.report, self.size, self.first_row = model, guidance, report, size, first_row
        self.first = first

    def prefill(self, tokens: mx.array, end: int) -> Generator[int, None, None]:
        yield from ()

    def logits(self, tokens: mx.array, here: slice) -> mx.array:
        branches = mx.stack([self._branch(tokens[i : i + 1], first, here) for i, first in enumerate(self.first)])
        guided = (branches * mx.array(self.guidance.coefficients)[:, None, None]).sum(axis=0)
        if self.guidance.rescale:
            std = lambda logits: mx.std(logits, axis=-1, keepdims=True, ddof=1)
            ratio = std(branches[0]) / (std(guided) + 1e-6)
            guided = self.guidance.rescale * guided * ratio + (1 - self.guidance.rescale) * guided
        return guided[:, self.first_row :]

    def _branch(self, tokens: mx.array, first: int, here: slice) -> mx.array:
        position = mx.arange(first, here.stop)
        mask = position[None] // self.size <= position[:, None] // self.size
        hidden = self.model(tokens[:, first : here.stop], mask=mask)
        self.report.positions += here.stop - first
        self.report.head_rows += self.model.config.vocab_size
        # a branch may begin inside the block; what stands before its head is not looked at
        hidden = hidden[0, -self.size :]
        return self.model.logits(mx.pad(hidden, ((self.size - hidden.shape[0], 0), (0, 0))))


def _layout(branches: tuple[list[int], ...], total: int, mask: int) -> tuple[mx.array, list[int]]:
    """Ids [branches, total], prompts ending at one position, then masks; and where each branch begins."""
    prompt = len(branches[0])
    ids = np.full((len(branches), total), mask, dtype=np.int32)
    first = []
    for row, branch in zip(ids, branches):
        branch = branch[max(len(branch) - prompt, 0) :]
        first.append(prompt - len(branch))
        row[: first[-1]] = 0  # any id but the mask: nobody looks there
        row[first[-1] : prompt] = branch
    return mx.array(ids), first


def _fetch(report: Report, tokens: mx.array, here: slice, probability: mx.array) -> tuple[np.ndarray, bool]:
    """The block's ids and whether the step was finite: the one time in a step that the host waits."""
    block = mx.concatenate([tokens[0, here], mx.isfinite(probability).all()[None].astype(tokens.dtype)])
    mx.eval(block, tokens)
    report.syncs += 1
    host = np.array(block)
    return host[:-1], bool(host[-1])


def _through_end(ids: list[int], end: int | None) -> list[int]:
    """``ids`` up to and with the first end token; all of them where there is none."""
    return ids[: ids.index(end) + 1] if end in ids else ids

"""Block diffusion: block after block, masks are denoised in a few steps until none is left.

A step runs the current block alone, against what the session keeps of everything before it. ``Method`` has the slower ways
to the same tokens.

Every function here runs on the backbone's own thread (see ``handle.py``).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import mlx.core as mx
import numpy as np

from ..errors import LLaDA2Error, RequestError
from ..progress import Progress
from .acceptance import Sampling, ThresholdAcceptance, candidates
from .guidance import Guidance
from .network import LLaDA2
from .session import BatchedRunner, PlainRunner, Report, Session


class Method(Enum):
    """How a step gets its logits. All give the same tokens."""

    CACHED = "cached"  # the prefix's keys and values are kept
    RECOMPUTE = "recompute"  # the whole sequence runs at each step; everything else as above
    PLAIN = "plain"  # so it does, branch by branch, with guidance on the logits of the whole vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Which ids may be chosen, and which of them mean something to the loop.

    Args:
        mask: id of a position that is still to be denoised.
        first, stop: ids from ``first`` up to and without ``stop`` may be chosen; None is the vocabulary's end. The image
            codes are the end of the vocabulary.
        ends: ids of which the first that is written ends a text; none where the length is fixed.
    """

    mask: int
    first: int = 0
    stop: int | None = None
    ends: frozenset[int] = frozenset()

    @property
    def rows(self) -> slice:
        """The rows of the output head that may be chosen."""
        return slice(self.first, self.stop)

    def through_end(self, ids: list[int]) -> list[int]:
        """``ids`` up to and with the first end; all of them where there is none."""
        return ids[: next((at for at, each in enumerate(ids, 1) if each in self.ends), len(ids))]

    def has_end(self, ids: list[int]) -> bool:
        return not self.ends.isdisjoint(ids)


@dataclass(frozen=True)
class Draft:
    """What is to be written: for each branch the ids before, then ids that all branches share, with masks to be filled.

    Args:
        branches: the prompts, the conditional branch first; or what each branch of a session goes on with.
        body: ids after the prompts. Masks among them are written, everything else is kept, and a block without a mask
            is only read. A last block that the body does not fill is filled up with masks, and is run whole.
    """

    branches: tuple[Sequence[int], ...]
    body: tuple[int, ...]

    @classmethod
    def blank(cls, branches: Sequence[Sequence[int]], length: int, mask: int) -> Draft:
        """Prompts, and ``length`` positions to write after them."""
        return cls(tuple(branches), (mask,) * length)


@dataclass
class Generation:
    """The ids of the draft's body as they were written, the report, and the session where it is kept."""

    ids: list[int]
    report: Report = field(default_factory=Report)
    session: Session | None = None


def generate(
    model: LLaDA2,
    draft: Draft,
    vocabulary: Vocabulary,
    sampling: Sampling = Sampling(),
    guidance: Guidance = Guidance(),
    method: Method = Method.CACHED,
    session: Session | None = None,
    keep: bool = False,
) -> Generator[Progress, None, Generation]:
    """Denoise the masks of a draft.

    Args:
        session: what has been written before, of the same method; it is continued, and belongs to this call from now on
            (``fork`` it to keep it). None begins one with the draft's prompts, and leaves out branches that the guidance
            does not weigh; a session has only the branches that are weighed.
        keep: whether a session that was begun here is handed back, to be continued. Else its keys and values are let go
            on MLX's own thread, with the rest of the work.

    Yields:
        Progress after each step; the work happens between two values.

    Returns:
        The body's ids, all of them or up to and with the first end; and the session in which they are written, if kept.

    Raises:
        RequestError: the request is longer than the model's ``max_position_embeddings``.
        LLaDA2Error: the network's output is not finite.
    """
    began = time.perf_counter()
    size, length = sampling.block_length, len(draft.body)
    keep = keep or session is not None
    if session is None:
        guidance, branches = guidance.select(draft.branches)
        session = Session.begin(branches, size, len(model.model.layers) if method is Method.CACHED else None)
    else:
        guidance, _ = guidance.select(tuple([] for _ in guidance.coefficients))
        _check_session(session, guidance, sampling, method)
        session.append(draft.branches)
    prompt = len(session)
    check_length(prompt, length, model.config.max_position_embeddings)
    done = np.full(-(-(prompt + length) // size) * size, vocabulary.mask)  # the conditional branch as the host knows it
    done[prompt : prompt + length] = draft.body
    tokens = mx.array(
        np.concatenate([session.ids, np.tile(done[prompt:], (len(session.ids), 1))], axis=1, dtype=np.int32)
    )
    done[:prompt] = session.ids[0]
    steps = min(sampling.steps, max(draft.body.count(vocabulary.mask), 1))
    report = Report(branches=len(session.ids))
    runner = (PlainRunner if method is Method.PLAIN else BatchedRunner)(
        model, session, guidance, report, vocabulary.rows
    )
    acceptance = ThresholdAcceptance(size, steps, sampling.threshold)
    key, drawn = mx.random.key(sampling.seed), None

    blocks, generated = _blocks_to_write(done, prompt, length, size, vocabulary.mask), []
    for number, block in enumerate(blocks):
        report.blocks += 1
        here = slice(block * size, (block + 1) * size)
        for position in runner.prefill(tokens, here.start):
            yield Progress("reading the prompt", position, here.start)
        for step in range(steps):
            logits = runner.logits(tokens, here)
            if sampling.temperature:
                key, drawn = mx.random.split(key)
            choice, probability = candidates(logits[None], sampling, [drawn])
            masked = tokens[:1, here] == vocabulary.mask
            accepted = acceptance(probability, masked, step)
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
            yield Progress("denoising", number * steps + step + 1, len(blocks) * steps, tuple(generated))
            if vocabulary.mask not in done[here] or vocabulary.mask not in vocabulary.through_end(generated):
                break
        # a mask that is left is one that the model chose itself; the end may stand behind it
        if vocabulary.has_end(generated):
            break

    ids = vocabulary.through_end(done[prompt : prompt + length].tolist())
    session.ids = np.array(tokens)[:, : prompt + len(ids)]
    session.trim(len(session))
    report.seconds = time.perf_counter() - began
    return Generation(ids, report, session if keep else None)


def _blocks_to_write(done: np.ndarray, prompt: int, length: int, size: int, mask: int) -> list[int]:
    """The blocks with a mask that is to be written, from the one in which the prompt ends.

    Masks in the prompt's part of that block are written too, as published; what fills up the last block is not asked for.
    """
    wanted = np.flatnonzero(done[: prompt + length] == mask) // size
    return sorted({int(block) for block in wanted if block >= prompt // size})


def _check_session(session: Session, guidance: Guidance, sampling: Sampling, method: Method) -> None:
    """Raise ``ValueError`` if a session cannot be continued so."""
    if len(session.ids) != len(guidance.coefficients):
        raise ValueError(f"{len(session.ids)} branches do not fit the {len(guidance.coefficients)} of the guidance")
    if session.block_length != sampling.block_length:
        raise ValueError(f"the session has blocks of {session.block_length}, not of {sampling.block_length}")
    if (session.layers is not None) != (method is Method.CACHED):
        raise ValueError(f"a session cannot be continued by another method ({method.value})")


def check_length(prompt: int, length: int, most: int) -> None:
    """Raise ``RequestError`` if prompt and answer together are longer than the model allows."""
    if length < 1:
        raise RequestError(f"{length} tokens are asked for; at least 1 is needed.")
    if prompt + length > most:
        raise RequestError(
            f"The request is too long: {prompt} tokens of prompt and {length} to generate make {prompt + length}, "
            f"and the model takes {most}. Shorten the text, or ask for a smaller picture or answer."
        )


def _fetch(report: Report, tokens: mx.array, here: slice, probability: mx.array) -> tuple[np.ndarray, bool]:
    """The block's ids and whether the step was finite: the one time in a step that the host waits."""
    block = mx.concatenate([tokens[0, here], mx.isfinite(probability).all()[None].astype(tokens.dtype)])
    mx.eval(block, tokens)
    report.syncs += 1
    host = np.array(block)
    return host[:-1], bool(host[-1])

"""Block diffusion: block after block, masks are denoised in a few steps until none is left.

A step runs the current block alone, against what the session keeps of everything before it. ``Method`` has the slower ways
to the same tokens. While a step runs, the graph of the next one is built; it is given out as soon as the tokens say that it is needed.

Every function here runs on the backbone's own thread (see ``handle.py``).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import LLaDA2Error, RequestError
from ..progress import Progress
from .acceptance import Acceptance, Sampling, ThresholdAcceptance, draw_candidates
from .guidance import Guidance
from .network import LLaDA2
from .session import BatchedRunner, PlainRunner, Report, Session
from .sprint import Sprint, SprintAcceptance, SprintRunner

# How the progress calls the work, unless told otherwise.
DENOISING = "denoising"


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
    """What was written.

    Args:
        pictures: for each picture the ids of the draft's body.
        report: what it took.
        session: where it is kept; the branches of the first picture, then those of the second, and so on.
        confidence: the probability with which each position of the body was accepted, float32 [pictures, length]; 1 where
            the draft had no mask, 0 where a text had ended before.
    """

    pictures: list[list[int]]
    report: Report = field(default_factory=Report)
    session: Session | None = None
    confidence: np.ndarray | None = None

    @property
    def ids(self) -> list[int]:
        """The ids of the only picture, or of the text."""
        (ids,) = self.pictures
        return ids


class _State(NamedTuple):
    """How far a generation has come, in arrays that MLX may still be computing.

    Args:
        tokens: ids of all branches, integers [pictures * branches, positions].
        confidence: the probability with which each was accepted, float32 [pictures, positions].
        block: the ids of each picture's block.
        finite: whether the last step's probabilities are.
    """

    tokens: mx.array
    confidence: mx.array
    block: mx.array | None = None
    finite: mx.array | None = None


def generate(
    model: LLaDA2,
    draft: Draft,
    vocabulary: Vocabulary,
    sampling: Sampling = Sampling(),
    guidance: Guidance = Guidance(),
    method: Method = Method.CACHED,
    session: Session | None = None,
    keep: bool = False,
    sprint: Sprint | None = None,
    seeds: Sequence[int] | None = None,
    phase: str = DENOISING,
) -> Generator[Progress, None, Generation]:
    """Denoise the masks of a draft.

    Args:
        session: what has been written before, of the same method; it is continued, and belongs to this call from now on
            (``fork`` it to keep it). None begins one with the draft's prompts, and leaves out branches that the guidance
            does not weigh; a session has only the branches that are weighed.
        keep: whether a session that was begun here is handed back, to be continued. Else its keys and values are let go
            on MLX's own thread, with the rest of the work.
        sprint: None is exact. SPRINT is a way of its own of the cached method.
        seeds: one for each picture, in place of the sampling's. All are denoised together, and each is what it would be
            alone. Texts, which end somewhere, are written one at a time.
        phase: what the progress calls it.

    Yields:
        Progress after each step; the next one may be running by then, and ends unread if this generator is closed.

    Returns:
        The body's ids, all of them or up to and with the first end; and the session in which they are written, if kept.

    Raises:
        RequestError: the request is longer than the model's ``max_position_embeddings``.
        LLaDA2Error: the network's output is not finite.
    """
    began = time.perf_counter()
    size, length = sampling.block_length, len(draft.body)
    seeds = (sampling.seed,) if seeds is None else tuple(seeds)
    keep = keep or session is not None
    if session is None:
        guidance, branches = guidance.select(draft.branches)
        session = _begin(model, branches, size, method, vocabulary.mask)
    else:
        guidance, _ = guidance.select(tuple([] for _ in guidance.coefficients))
        _check_session(session, guidance, sampling, method)
        session.append(draft.branches)
    if sprint is not None and method is not Method.CACHED:
        raise ValueError(f"SPRINT is not there for the method {method.value}")
    if len(seeds) != 1 and vocabulary.ends:
        raise ValueError("texts that end somewhere are written one at a time")
    prompt, branches, pictures = len(session), len(session.ids), len(seeds)
    check_length(prompt, length, model.config.max_position_embeddings)
    # the conditional branches as the host knows them
    done = np.full((pictures, -(-(prompt + length) // size) * size), vocabulary.mask)
    done[:, prompt : prompt + length] = draft.body
    blocks = _blocks_to_write(np.append(session.ids[0], draft.body), prompt, size, vocabulary.mask)
    steps = min(sampling.steps, max(draft.body.count(vocabulary.mask), 1))
    report, acceptance = Report(branches=branches), _acceptance(size, steps, sampling, sprint)

    if pictures > 1:
        if blocks:  # what all have in common is read once
            runner = _runner(model, session, guidance, report, vocabulary, method, sprint)
            for position in runner.prefill(_padded(session, done[:1]), min(blocks[0] * size, prompt), whole=True):
                yield Progress("reading the prompt", position, prompt)
        session = session.fork([*range(branches)] * pictures)
    state, generated = _State(_padded(session, done), mx.zeros(done.shape)), [[]]
    done[:, :prompt] = session.ids[::branches]
    runner = _runner(model, session, guidance, report, vocabulary, method, sprint)
    # a key for each step, so that a draw does not depend on what was drawn before
    random = [mx.random.split(mx.random.key(seed), max(len(blocks), 1) * steps) for seed in seeds]

    def denoised(state: _State, number: int, here: slice, step: int) -> _State:
        """What a step makes of a block; nothing is computed yet."""
        keys = [own[number * steps + step] for own in random]
        tokens, confidence = state.tokens[...], state.confidence[...]  # the state before stays as it is
        found = draw_candidates(runner.logits(tokens, here), sampling, keys)
        accepted = acceptance(found, tokens[::branches, here] == vocabulary.mask, step, keys)
        choice = (found.tokens + vocabulary.first).astype(tokens.dtype)
        every = lambda picture: mx.repeat(picture, branches, axis=0)
        # a branch keeps what its own prompt has at that position
        free = every(accepted) & (tokens[:, here] == vocabulary.mask)
        tokens[:, here] = mx.where(free, every(choice), tokens[:, here])
        confidence[:, here] = mx.where(accepted, found.probability, confidence[:, here])
        return _State(tokens, confidence, tokens[::branches, here], mx.isfinite(found.probability).all())

    for number, block in enumerate(blocks):
        report.blocks += 1
        here = slice(block * size, (block + 1) * size)
        for position in runner.prefill(state.tokens, here.start):
            yield Progress("reading the prompt", position, here.start)
        following = denoised(state, number, here, 0)
        _give_out(following)
        for step in range(steps):
            state, following = following, None
            # the next step's graph is built while this one runs
            take_back = runner.look_ahead() if step + 1 < steps else None
            if take_back is not None:
                following = denoised(state, number, here, step + 1)
                report.ahead += 1
            report.steps += 1
            done[:, here], finite = _fetch(report, state)
            if not finite:
                raise LLaDA2Error(
                    "The network's output is not finite (NaN or infinity): its weights or their precision are at fault."
                )
            generated = done[:, prompt : here.stop].tolist()
            finished = all(vocabulary.mask not in vocabulary.through_end(ids) for ids in generated) or (
                vocabulary.mask not in done[:, here]
            )
            if not finished and step + 1 < steps:
                take_back = None  # the old keys and values may be written over
                if following is None:
                    following = denoised(state, number, here, step + 1)
                _give_out(following)  # it runs while others look at this one
            elif take_back is not None:
                take_back()
                following = None  # or the old keys and values would stay beside the new ones
                report.dropped += 1
            yield Progress(phase, number * steps + step + 1, len(blocks) * steps, tuple(generated[0]))
            if finished:
                break
        # a mask that is left is one that the model chose itself; the end may stand behind it
        if all(map(vocabulary.has_end, generated)):
            break

    written = [vocabulary.through_end(ids) for ids in done[:, prompt : prompt + length].tolist()]
    session.ids = np.array(state.tokens)[:, : prompt + len(written[0])]
    session.trim(len(session))
    certain = np.where(
        np.array(draft.body) == vocabulary.mask, np.array(state.confidence)[:, prompt : prompt + length], 1
    )
    report.seconds = time.perf_counter() - began
    return Generation(written, report, session if keep else None, certain.astype(np.float32))


def add_branches(
    model: LLaDA2, session: Session, branches: Sequence[Sequence[int]], mask: int, sprint: Sprint | None = None
) -> Generator[Progress, None, tuple[Session, Report]]:
    """The session with more branches, which end at the same position; what it has computed is kept.

    Args:
        session: one that keeps its keys and values, and belongs to this call from now on.
        branches: ids; a longer one loses its head.
        mask: id of the mask token.
        sprint: what the session is used with.

    Returns:
        The session, and what it took.
    """
    size, end = session.block_length, len(session)
    fresh = _begin(model, (session.ids[0], *branches), size, Method.CACHED, mask).fork(range(1, len(branches) + 1))
    # nothing stands before; one block at least, so that the caches have its rows
    fresh.final = max(min(min(fresh.begins) // size * size, session.final - size), 0)
    report = Report(branches=len(branches))
    vocabulary, guidance = Vocabulary(mask), Guidance((1.0,))
    runner = _runner(model, fresh, guidance, report, vocabulary, Method.CACHED, sprint)
    for position in runner.prefill(mx.array(fresh.ids), session.final, whole=True):
        yield Progress("reading the prompt", position, end)
    return session.join(fresh), report


def _begin(model: LLaDA2, branches: Sequence[Sequence[int]], size: int, method: Method, mask: int) -> Session:
    return Session.begin(branches, size, len(model.model.layers) if method is Method.CACHED else None, fill=mask)


def _runner(
    model: LLaDA2,
    session: Session,
    guidance: Guidance,
    report: Report,
    vocabulary: Vocabulary,
    method: Method,
    sprint: Sprint | None,
) -> BatchedRunner | PlainRunner:
    common = model, session, guidance, report, vocabulary.rows
    if sprint is not None:
        return SprintRunner(*common, sprint, vocabulary.mask)
    return PlainRunner(*common) if method is Method.PLAIN else BatchedRunner(*common)


def _acceptance(size: int, steps: int, sampling: Sampling, sprint: Sprint | None) -> Acceptance:
    if sprint is not None:
        return SprintAcceptance(steps, sampling.threshold, sprint.remasking)
    return ThresholdAcceptance(size, steps, sampling.threshold)


def _padded(session: Session, done: np.ndarray) -> mx.array:
    """Ids of each branch with what each picture writes after its prompt: int32 [pictures * branches, positions]."""
    written = np.repeat(done[:, len(session) :], len(session.ids) // len(done), axis=0)
    return mx.array(np.concatenate([session.ids, written], axis=1, dtype=np.int32))


def _blocks_to_write(ids: np.ndarray, prompt: int, size: int, mask: int) -> list[int]:
    """The blocks with a mask that is to be written, from the one in which the prompt ends.

    Masks in the prompt's part of that block are written too, as published; what fills up the last block is not asked for.
    """
    wanted = np.flatnonzero(ids == mask) // size
    return sorted({int(block) for block in wanted if block >= prompt // size})


def _check_session(session: Session, guidance: Guidance, sampling: Sampling, method: Method) -> None:
    """Raise ``ValueError`` if a session cannot be continued so."""
    if len(session.ids) != len(guidance.coefficients):
        raise ValueError(f"{len(session.ids)} branches do not fit the {len(guidance.coefficients)} of the guidance")
    if session.block_length != sampling.block_length:
        raise ValueError(f"the session has blocks of {session.block_length}, not of {sampling.block_length}")
    if (session.layers is not None) != (method is Method.CACHED):
        raise ValueError(f"a session cannot be continued by another method ({method.value})")


def require_length(length: int) -> None:
    """Raise ``RequestError`` unless at least one token is asked for."""
    if length < 1:
        raise RequestError(f"{length} tokens are asked for; at least 1 is needed.")


def check_length(prompt: int, length: int, most: int) -> None:
    """Raise ``RequestError`` if prompt and answer together are longer than the model allows."""
    require_length(length)
    if prompt + length > most:
        raise RequestError(
            f"The request is too long: {prompt} tokens of prompt and {length} to generate make {prompt + length}, "
            f"and the model takes {most}. Shorten the text, or ask for a smaller picture or answer."
        )


def _give_out(state: _State) -> None:
    """Let MLX begin with a step; the host does not wait."""
    mx.async_eval(*state)


def _fetch(report: Report, state: _State) -> tuple[np.ndarray, bool]:
    """The block's ids in each picture, and whether the step was finite: the one time in a step that the host waits."""
    mx.eval(*state)
    report.syncs += 1
    return np.array(state.block), state.finite.item()

"""A conversation with the backbone: turns of text and pictures, of which nothing is read twice.

A conversation is a value: an answer makes a new one, and the one before can be continued in another way. What the
network has read of it is kept beside it, and is read again from the ids where it is gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace

from . import prompts
from .backbone.acceptance import Sampling
from .backbone.denoising import Draft, Generation, Method, Vocabulary, check_length, generate
from .backbone.handle import Backbone
from .backbone.network import LLaDA2
from .backbone.session import Report, Session
from .backbone.sprint import Sprint
from .checkpoint.codebook import require_same
from .errors import RequestError
from .progress import OnStep, Progress, ignore
from .prompts import Turn
from .tasks import readable
from .tokens import Tokens
from .vq import Pictures, grids_of

# How many conversations keep what the network has read of them: one of 8,192 tokens takes 0.34 GB with the published model.
KEPT = 4


@dataclass(frozen=True)
class Conversation:
    """What was said so far. It never changes: ``reply`` makes a new one.

    Args:
        system: what the model is told of its part; empty is what it was trained with.
        turns: what was said, and the answers.
    """

    system: str = ""
    turns: tuple[Turn, ...] = ()
    _read: _Read | None = field(default=None, repr=False, compare=False)

    def transcript(self) -> str:
        """The conversation as a text."""
        return "\n\n".join(f"You: {_shown(turn)}{turn.text}\n\nLLaDA2: {turn.answer}" for turn in self.turns)

    def and_then(self, turn: Turn) -> Conversation:
        """The conversation with one more turn, of which nothing has been read yet."""
        return replace(self, turns=(*self.turns, turn))


@dataclass(frozen=True)
class Reply:
    """An answer, its token ids without what ended it, what it took, and the conversation with it."""

    text: str
    ids: list[int]
    report: Report
    conversation: Conversation


def reply(
    backbone: Backbone,
    conversation: Conversation,
    text: str,
    pictures: Pictures | None = None,
    max_new_tokens: int = 2048,
    sampling: Sampling = Sampling(steps=32),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
    on_text: Callable[[str], None] | None = None,
    sprint: Sprint | None = None,
) -> Reply:
    """Answer what is said now in a conversation.

    What this backbone has read of the conversation is not read again, as long as it has its weights and the blocks are
    as long; else all is read from the ids. A conversation may be continued twice, and at the same time.

    Args:
        text: what is said; all of it is text, no control token is read in it.
        pictures: what is shown with it, prepared for understanding: one picture, or a set.
        max_new_tokens: the answer's length at most.
        on_text: called after each step with the answer so far; a stretch not yet denoised reads "…".
        sampling, method: how tokens are chosen, and how the network is run.
        sprint: None is exact.

    Raises:
        RequestError: nothing is said, a picture is of another model or has no size token, or the conversation is longer
            than the model allows; before anything runs.
    """
    tokens, text = backbone.tokens, prompts.require_text(text, "message")
    ids = prompts.chat(tokens, conversation.turns, text, pictures, conversation.system).conditional
    for turn in (*conversation.turns, Turn(text, pictures)):
        for grid in grids_of(turn.pictures) if turn.pictures else ():
            require_same(grid, backbone.checkpoint)
    _check_room(backbone, conversation, len(ids), max_new_tokens)

    def step(progress: Progress) -> None:
        on_step(progress)
        if on_text and progress.generated:
            on_text(readable(backbone, tuple(vocabulary.through_end(list(progress.generated[:max_new_tokens])))))

    vocabulary = Vocabulary(tokens.mask, ends=tokens.ends)
    draft = Draft.blank((ids,), max_new_tokens, tokens.mask)
    options = {"sampling": sampling, "method": method, "sprint": sprint, "on_step": step}
    done, read = backbone.run(_answer, draft, vocabulary, conversation._read, **options)
    turn = answered(backbone, text, pictures, done.ids)
    return Reply(turn.answer, list(turn.ids), done.report, replace(conversation.and_then(turn), _read=read))


def answered(backbone: Backbone, text: str, pictures: Pictures | None, ids: list[int]) -> Turn:
    """A turn with the answer ``ids``, without what ended it and without masks, which would be written by the next turn."""
    tokens = backbone.tokens
    ids = [token for token in ids if token not in tokens.ends and token != tokens.mask]
    return Turn(text, pictures, readable(backbone, tuple(ids)), tuple(ids), tokens.fingerprint)


def settled(tokens: Tokens, progress: Progress) -> list[int]:
    """The ids at the beginning of an answer that no further step changes."""
    done = (at for at, token in enumerate(progress.generated) if token == tokens.mask or token in tokens.ends)
    return list(progress.generated[: next(done, None)])


def _check_room(backbone: Backbone, conversation: Conversation, prompt: int, length: int) -> None:
    most = backbone.config.max_position_embeddings
    if length >= 1 and prompt + length > most:
        raise RequestError(
            f"The conversation is too long: it has {prompt} tokens after {len(conversation.turns)} turns, with what is said "
            f"now, and {length} for the answer make {prompt + length}; the model takes {most}. Begin a new one, show fewer or "
            "smaller pictures, or ask for a shorter answer."
        )
    check_length(prompt, length, most)


def _answer(
    network: LLaDA2,
    draft: Draft,
    vocabulary: Vocabulary,
    read: _Read | None,
    *,
    sampling: Sampling,
    method: Method,
    sprint: Sprint | None,
) -> Generator[Progress, None, tuple[Generation, _Read | None]]:
    """Write the draft's answer after as much of its prompt as the network has read already."""
    session = read.of(network, sampling.block_length) if read and method is Method.CACHED else None
    if session is not None:
        (ids,), known = draft.branches, session.ids[0].tolist()
        same = next((at for at, (one, other) in enumerate(zip(ids, known)) if one != other), min(len(ids), len(known)))
        session.trim(same)
        draft = replace(draft, branches=(ids[same:],))
    keep = method is Method.CACHED
    options = {"sampling": sampling, "method": method, "sprint": sprint}
    done = yield from generate(network, draft, vocabulary, session=session, keep=keep, **options)
    return done, _Read(network, done.session) if keep else None


class _Read:
    """What a network has read of a conversation. It goes when the network does, or when others have taken its place."""

    _recent: deque[weakref.ref[_Read]] = deque()

    def __init__(self, network: LLaDA2, session: Session):
        self._session: Session | None = session
        own = weakref.ref(self)
        self._network = weakref.ref(network, lambda _: _forget(own))
        self._recent.append(own)
        while len(self._recent) > KEPT:
            _forget(self._recent.popleft())

    def of(self, network: LLaDA2, block_length: int) -> Session | None:
        """A session to continue, if it is this network's and has such blocks; this one stays as it is."""
        session = self._session  # once, because another thread may let it go
        if session is None or self._network() is not network or session.block_length != block_length:
            return None
        return session.fork()


def _forget(read: weakref.ref[_Read]) -> None:
    if (known := read()) is not None:
        known._session = None


def _shown(turn: Turn) -> str:
    count = len(grids_of(turn.pictures)) if turn.pictures else 0
    return f"[{count} picture{'s' * (count > 1)}] " if count else ""

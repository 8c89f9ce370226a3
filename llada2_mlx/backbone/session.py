"""What has been written so far: the branches' ids, the layers' keys and values, and how much of it is final.

The sequence is cut into blocks counted from position 0. A block sees itself and every block before it, none after. So the
keys and values of a finished block never change. A session keeps them, and a generation continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .guidance import Guidance
from .network import LLaDA2


@dataclass
class Report:
    """What a generation did, so that speed can be tested by counting.

    ``positions`` counts each branch's positions that went through the network; ``pairs`` the queries times the keys that
    each layer's attention was given; ``head_rows`` the rows of the output head that were multiplied, summed over steps
    and products; ``syncs`` how often the host waited; ``ahead`` the steps whose graph was there before the step before was
    read, and ``dropped`` those of them that were not needed, and so never run.
    """

    blocks: int = 0
    steps: int = 0
    positions: int = 0
    pairs: int = 0
    head_rows: int = 0
    syncs: int = 0
    ahead: int = 0
    dropped: int = 0
    branches: int = 1
    seconds: float = 0.0

    def __add__(self, other: Report) -> Report:
        """What two generations did together; ``branches`` is the larger number of the two."""
        total = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Report(**total | {"branches": max(self.branches, other.branches)})


class _Part(NamedTuple):
    """Rows of a cache that are joined with others, or taken out, when it is next written to."""

    keys: mx.array
    values: mx.array
    rows: tuple[int, ...] | None = None  # None: all


class PrefixCache:
    """Keys and values of one layer, [branches, kv heads, capacity, head dim].

    New ones are written at their positions and everything up to there is returned, so what a denoising step
    writes for its unfinished block is overwritten by the next. A fork shares the arrays until one of the two is written
    to. Outside of ``update`` nothing is computed, so that any thread may fork and join.
    """

    def __init__(self, parts: tuple[_Part, ...] = (), capacity: int = 0):
        self._parts, self.capacity = parts, capacity

    @property
    def arrays(self) -> list[mx.array]:
        """The keys and values that are there, to be evaluated."""
        return [array for part in self._parts for array in (part.keys, part.values)]

    def update(self, keys: mx.array, values: mx.array, start: int) -> tuple[mx.array, mx.array]:
        end = start + keys.shape[2]
        self.capacity = max(self.capacity, end)
        room = tuple(
            self._room([(part[kind], part.rows) for part in self._parts], (keys, values)[kind]) for kind in (0, 1)
        )
        self._parts = ()  # so that MLX may write into what nobody else holds
        for array, new in zip(room, (keys, values), strict=True):
            array[..., start:end, :] = new
        self._parts = (_Part(*room),)
        return room[0][..., :end, :], room[1][..., :end, :]

    def fill(self, row: int, positions: slice, keys: mx.array, values: mx.array) -> None:
        """Write the same keys and values, [1, kv heads, 1, head dim], at several positions of one row.

        Only for a cache that has been written to since it was forked or joined.
        """
        for array, new in zip(self.arrays, (keys, values), strict=True):
            array[row : row + 1, :, positions] = new

    def _room(self, parts: list[tuple[mx.array, tuple[int, ...] | None]], like: mx.array) -> mx.array:
        """One array of ``capacity`` positions with the rows of all parts; an object of its own."""
        if not parts:
            batch, heads, _, width = like.shape
            return mx.zeros((batch, heads, self.capacity, width), like.dtype)
        rows = []
        for array, chosen in parts:
            array = array[...] if chosen is None else array[mx.array(chosen)]
            missing = self.capacity - array.shape[2]
            if missing > 0:
                array = mx.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))
            rows.append(array[:, :, : self.capacity] if missing < 0 else array)
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    def fork(self, rows: Sequence[int]) -> PrefixCache:
        """A cache of its own with some rows of what is there."""
        places = [(part, row) for part in self._parts for row in part.rows or range(part.keys.shape[0])]
        chosen = groupby((places[row] for row in rows if places), key=lambda place: id(place[0]))
        parts = []
        for _, run in chosen:
            (part, *_), taken = zip(*run)
            whole = taken == tuple(range(part.keys.shape[0]))  # then nothing has to be taken out
            parts.append(part._replace(rows=None if whole else taken))
        return PrefixCache(tuple(parts), self.capacity)

    def join(self, other: PrefixCache) -> PrefixCache:
        """A cache with the rows of both."""
        return PrefixCache(self._parts + other._parts, max(self.capacity, other.capacity))


@dataclass
class Session:
    """What has been written in some branches that end at the same position.

    Args:
        ids: token ids, int32 [branches, positions]. Where a branch's own text begins later there is nothing before it.
        begins: the position at which each branch's own text begins.
        block_length: positions in a block.
        final: positions whose keys and values are in ``layers`` and never change; whole blocks.
        layers: a cache for each layer; None where nothing is kept.
        confidence: how probable the network's first choice is at each position that is final, float [branches, final];
            None unless SPRINT asked for it.
    """

    ids: np.ndarray
    begins: tuple[int, ...]
    block_length: int
    final: int = 0
    layers: list[PrefixCache] | None = None
    confidence: np.ndarray | None = None

    @classmethod
    def begin(cls, branches: Sequence[Sequence[int]], block_length: int, layers: int | None, fill: int = 0) -> Session:
        """A session in which only the prompts are written, and nothing has been computed.

        All branches end where the first one, the conditional branch, ends: a shorter one has nothing before it (it is
        never attended to), a longer one loses its head.

        Args:
            layers: how many layers the network has; None keeps no keys and values.
            fill: the id that stands where a branch has nothing; only SPRINT looks there.
        """
        end = len(branches[0])
        ids = np.full((len(branches), end), fill, dtype=np.int32)
        begins = []
        for row, branch in zip(ids, branches):
            branch = branch[max(len(branch) - end, 0) :]
            begins.append(end - len(branch))
            row[begins[-1] :] = branch
        return cls(
            ids, tuple(begins), block_length, 0, None if layers is None else [PrefixCache() for _ in range(layers)]
        )

    def __len__(self) -> int:
        """Positions that are written."""
        return self.ids.shape[1]

    def append(self, branches: Sequence[Sequence[int]]) -> None:
        """Write more ids, for each branch its own; equally many, so that all go on ending at the same position."""
        if len(branches) != len(self.ids) or len({len(branch) for branch in branches}) != 1:
            raise ValueError("each branch of a session is continued, by equally many ids")
        self.ids = np.concatenate([self.ids, np.asarray(branches, dtype=np.int32)], axis=1)

    def trim(self, length: int) -> None:
        """Forget what stands from position ``length`` on. The block that it cuts is computed anew when it is needed."""
        if not 0 <= length <= len(self):
            raise ValueError(f"a session of {len(self)} positions cannot be trimmed to {length}")
        self.ids = self.ids[:, :length]
        self.final = min(self.final, length // self.block_length * self.block_length)
        self.begins = tuple(min(begin, length) for begin in self.begins)
        if self.confidence is not None:
            self.confidence = self.confidence[:, : self.final]

    def fork(self, branches: Sequence[int] | None = None) -> Session:
        """A session of its own with what is written here in some branches, or in all. Neither changes the other."""
        rows = list(range(len(self.ids)) if branches is None else branches)
        layers = None if self.layers is None else [layer.fork(rows) for layer in self.layers]
        confidence = None if self.confidence is None else self.confidence[rows]
        begins = tuple(self.begins[row] for row in rows)
        return replace(self, ids=self.ids[rows], begins=begins, layers=layers, confidence=confidence)

    def join(self, other: Session) -> Session:
        """One session with the branches of both, which end at the same position.

        Raises:
            ValueError: they end at different positions or have other blocks, or one keeps nothing and the other does.
        """
        if len(self) != len(other) or self.block_length != other.block_length:
            raise ValueError("only sessions with the same blocks that end at the same position can be joined")
        if (self.layers is None) != (other.layers is None):
            raise ValueError("a session that keeps its keys and values cannot be joined with one that does not")
        ids, final = np.concatenate([self.ids, other.ids]), min(self.final, other.final)
        layers = None
        if self.layers is not None and final:
            layers = [a.join(b) for a, b in zip(self.layers, other.layers, strict=True)]
        elif self.layers is not None:
            layers = [PrefixCache() for _ in self.layers]
        confidence = None
        if self.confidence is not None and other.confidence is not None:
            confidence = np.concatenate([self.confidence[:, :final], other.confidence[:, :final]])
        begins = self.begins + other.begins
        return replace(self, ids=ids, begins=begins, final=final, layers=layers, confidence=confidence)


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


class Runner:
    """What a step's logits come from.

    The session's branches are those of the first picture, then those of the second, and so on.
    """

    def __init__(self, model: LLaDA2, session: Session, guidance: Guidance, report: Report, rows: slice):
        self.model, self.session, self.guidance, self.report, self.rows = model, session, guidance, report, rows
        self.size = session.block_length

    def prefill(self, tokens: mx.array, end: int, whole: bool = False) -> Generator[int, None, None]:
        """Put finished blocks into the cache, if there is one.

        Args:
            whole: all of them; else all but what fits into one pass, which the next step takes along.
        """
        yield from ()

    def logits(self, tokens: mx.array, here: slice) -> mx.array:
        """Guided logits of the block ``here``: [pictures, block length, rows that may be chosen]; nothing is computed yet."""
        raise NotImplementedError

    def look_ahead(self) -> Callable[[], None] | None:
        """Call this before building a later step of the block that may not be needed.

        Returns:
            Call it to undo the building, or let go of it: then MLX may write over the old keys and values. None where the step cannot
            be built yet, because it needs tokens that the host has not read.
        """
        session, report, layers = self.session, self.report, self.session.layers
        counted = report.positions, report.pairs, report.head_rows
        if layers is not None:
            session.layers = session.fork().layers

        def take_back() -> None:
            session.layers = layers
            report.positions, report.pairs, report.head_rows = counted

        return take_back


class BatchedRunner(Runner):
    """All branches of all pictures as one batch, so that a step reads each expert's weights once; guidance on hidden states."""

    def __init__(self, model: LLaDA2, session: Session, guidance: Guidance, report: Report, rows: slice):
        super().__init__(model, session, guidance, report, rows)
        self.begins = mx.array(session.begins, dtype=mx.int32) if any(session.begins) else None
        self.span, self.mask = None, None
        if guidance.rescale:
            _ = model.head_covariance  # made now, not in the first step

    def prefill(self, tokens: mx.array, end: int, whole: bool = False) -> Generator[int, None, None]:
        session, chunk = self.session, max(self.model.prefill // self.size, 1) * self.size
        while session.layers is not None and end - session.final > (0 if whole else chunk):
            start, stop = session.final, min(session.final + chunk, end)
            hidden = self._run(tokens, start, stop)
            mx.async_eval([layer.arrays for layer in session.layers])
            self._finish(hidden)
            session.final = stop
            yield session.final

    def logits(self, tokens: mx.array, here: slice) -> mx.array:
        start = self.session.final if self.session.layers is not None else 0
        hidden = self._run(tokens, start, here.stop)
        if self.session.layers is not None:
            if start < here.start:
                self._finish(hidden[:, : here.start - start])
            self.session.final = here.start
        return self._guided(hidden[:, -self.size :])

    def _run(self, tokens: mx.array, start: int, end: int) -> mx.array:
        if self.span != (start, end):  # the mask is made once a block, not once a step
            self.span, self.mask = (start, end), block_mask(start, end, self.size, self.begins)
        self._count(tokens.shape[0], end - start, end)
        return self.model(tokens[:, start:end], start, self.mask, self.session.layers)

    def _count(self, branches: int, queries: int, keys: int) -> None:
        self.report.positions += branches * queries
        self.report.pairs += branches * queries * keys

    def _guided(self, hidden: mx.array) -> mx.array:
        """Hidden states of the block in all branches -> guided logits of the rows that may be chosen."""
        self.report.head_rows += len(range(*self.rows.indices(self.model.config.vocab_size)))
        pictures = mx.unflatten(hidden, 0, (-1, len(self.guidance.coefficients)))
        return self.model.logits(self.guidance.combine(self.model, pictures), self.rows)

    def _finish(self, hidden: mx.array) -> None:
        """Called with the hidden states of positions that become final."""


class PlainRunner(Runner):
    """The reference: no cache, one branch after the other from position 0, logits of the whole vocabulary."""

    def logits(self, tokens: mx.array, here: slice) -> mx.array:
        begins = enumerate(self.session.begins)
        branches = mx.stack([self._branch(tokens[i : i + 1], first, here) for i, first in begins])
        branches = mx.unflatten(branches, 0, (-1, len(self.guidance.coefficients)))
        guided = (branches * mx.array(self.guidance.coefficients)[:, None, None]).sum(axis=1)
        if self.guidance.rescale:
            std = lambda logits: mx.std(logits, axis=-1, keepdims=True, ddof=1)
            ratio = std(branches[:, 0]) / (std(guided) + 1e-6)
            guided = self.guidance.rescale * guided * ratio + (1 - self.guidance.rescale) * guided
        return guided[..., self.rows]

    def _branch(self, tokens: mx.array, first: int, here: slice) -> mx.array:
        position = mx.arange(first, here.stop)
        mask = position[None] // self.size <= position[:, None] // self.size
        hidden = self.model(tokens[:, first : here.stop], mask=mask)
        self.report.positions += here.stop - first
        self.report.pairs += (here.stop - first) ** 2
        self.report.head_rows += self.model.config.vocab_size
        # a branch may begin inside the block; what stands before its head is not looked at
        hidden = hidden[0, -self.size :]
        return self.model.logits(mx.pad(hidden, ((self.size - hidden.shape[0], 0), (0, 0))))

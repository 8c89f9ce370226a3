"""What is measured: requests, ways to run them, rows and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Draft, Generation, Method, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.session import Runner
from llada2_mlx.backbone.sprint import Sprint
from llada2_mlx.progress import Progress

Job = Callable[..., Generator[Progress, None, Generation]]

STEPS = 8
# nothing is accepted early, so the work depends on no weight
SAMPLING = Sampling(steps=STEPS, threshold=1.0)
# A case is repeated while its runs have taken less than this, in seconds.
PATIENCE = 30.0
# In this context a step's graph is built when the tokens of the one before are known, and not ahead.
WHEN_NEEDED = patch.object(Runner, "look_ahead", lambda self: None)


@dataclass(frozen=True)
class Request:
    """What is generated: prompts, how many tokens, which may be chosen, and the guidance."""

    branches: tuple[list[int], ...]
    length: int
    vocabulary: Vocabulary
    guidance: Guidance = Guidance()

    def shortened(self) -> Request:
        """The same request for one token: its first block only."""
        return Request(self.branches, 1, self.vocabulary, self.guidance)


@dataclass
class Row:
    """One way to run a request, and what it took. Counts are None where they are not known."""

    name: str
    steps: int
    positions: int | None
    pairs: int | None
    head_rows: int | None
    syncs: int | None
    seconds: float
    cpu_seconds: float  # of this process: where MLX runs on a CPU, what a busy machine does not change
    runs: list[float]
    equal_tokens: str  # of all, as those of the section's first row


@dataclass
class Section:
    """Rows that belong together: the first one is what the others are compared with."""

    title: str
    rows: list[Row] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value}


def picture(backbone: Backbone, pixels: int, rescale: float = 0.7) -> Request:
    """A square drawing of ``pixels``, as drawn with the defaults of the node: guidance 2.0.

    The prompts have 36 and 30 tokens, those of the figures in docs/performance.md.
    """
    vocabulary = Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)
    branches = (_text(backbone, 36, 1), _text(backbone, 30, 2))
    return Request(branches, (pixels // 32) ** 2, vocabulary, Guidance.simple(2.0, rescale))


def question(backbone: Backbone, codes: int = 2500, length: int = 64) -> Request:
    """A question of 20 tokens about a picture of ``codes`` codes, and an answer of ``length`` tokens without an end."""
    tokens = backbone.tokens
    seen = np.random.default_rng(3).integers(0, backbone.config.codebook_size, codes).tolist()
    prompt = [*tokens.header(50, 50), *tokens.codes_to_ids(seen), tokens.image_end, *_text(backbone, 20, 4)]
    return Request((prompt,), length, Vocabulary(tokens.mask))


def ours(
    request: Request,
    method: Method = Method.CACHED,
    sprint: Sprint | None = None,
    sampling: Sampling = SAMPLING,
    pictures: int = 1,
) -> Job:
    """The job that runs ``request`` the way that ``method`` and ``sprint`` say, for several pictures together."""

    def job(network: LLaDA2) -> Generator[Progress, None, Generation]:
        draft = Draft.blank(request.branches, request.length, request.vocabulary.mask)
        return generate(
            network, draft, request.vocabulary, sampling, request.guidance, method, sprint=sprint, seeds=range(pictures)
        )

    return job


@dataclass(frozen=True)
class Case:
    """A named way to run a request: a short job that warms up, and the job that is timed."""

    name: str
    warm_up: Job
    job: Job
    backbone: Backbone

    @classmethod
    def of(cls, name: str, backbone: Backbone, request: Request, way: Callable[[Request], Job] = ours) -> Case:
        return cls(name, way(request.shortened()), way(request), backbone)


def run(cases: list[Case], repeats: int) -> Iterator[Row]:
    """Time the cases, one run of each in turn so that a slow minute of the machine meets all of them.

    A case is run ``repeats`` times, and fewer if its runs take long; the time is the median.
    """
    done: list[list[Generation]] = [[] for _ in cases]
    busy: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case.backbone.run(case.warm_up)
    for _ in range(repeats):
        for case, results, cpu in zip(cases, done, busy):
            if sum(result.report.seconds for result in results) < PATIENCE:
                began = time.process_time()
                results.append(case.backbone.run(case.job))
                cpu.append(time.process_time() - began)
    for case, results, cpu in zip(cases, done, busy):
        report, runs = results[0].report, [result.report.seconds for result in results]
        first, here = done[0][0].pictures[0], results[0].pictures[0]
        equal = f"{sum(a == b for a, b in zip(first, here))}/{len(first)}"
        counts = [count or None for count in (report.positions, report.pairs, report.head_rows, report.syncs)]
        yield Row(case.name, report.steps, *counts, statistics.median(runs), statistics.median(cpu), runs, equal)


def compare(title: str, cases: list[Case], repeats: int) -> Section:
    """Rows for all cases, and how many times as long each takes as the first."""
    section = Section(title, list(run(cases, repeats)))
    for row in section.rows[1:]:
        section.ratios[f"{row.name} / {section.rows[0].name}"] = row.seconds / section.rows[0].seconds
    return section


def _text(backbone: Backbone, count: int, seed: int) -> list[int]:
    """Ids of plain text, none of them special."""
    words = backbone.tokens.encode("A large red circle in the top left and a small blue star in the bottom right")
    return np.random.default_rng(seed).choice(words, count).tolist()

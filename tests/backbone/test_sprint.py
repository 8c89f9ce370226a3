"""SPRINT: against the published rule spelled out without a session, and by counting. The golden cases are in test_parity.py."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from llada2_mlx.backbone.acceptance import Sampling, draw_candidates
from llada2_mlx.backbone.denoising import Draft, Method, Vocabulary, add_branches, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.sprint import Remasking, Sprint, SprintAcceptance
from llada2_mlx.errors import RequestError
from llada2_mlx.progress import Progress

SIMPLE = Guidance.simple(2.0)
SAMPLING = Sampling(steps=8, threshold=1.0)


def ids(count: int, seed: int = 0) -> list[int]:
    """Random text ids below the golden tokenizer's special ones."""
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


@pytest.fixture(scope="module")
def image(backbone: Backbone) -> Vocabulary:
    return Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)


class _Recorder:
    """Keeps a layer's keys and values, and adds one of zeros that rows without a key may see."""

    def update(self, keys, values, start):
        self.keys, self.values = keys, values
        pad = lambda array: mx.pad(array, ((0, 0), (0, 0), (0, 1), (0, 0)))
        return pad(keys), pad(values)


class _Fixed:
    def __init__(self, recorder: _Recorder, kept: np.ndarray):
        self.keys, self.values = recorder.keys[:, :, mx.array(kept)], recorder.values[:, :, mx.array(kept)]

    def update(self, keys, values, start):
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)


class _Branch:
    """One branch as published: it runs whole in the first steps of a block, and the block alone after that."""

    def __init__(self, network: LLaDA2, prompt: list[int], total: int, end: int, mask: int, sprint: Sprint):
        self.network, self.sprint, self.begin, self.size = network, sprint, end - len(prompt), 32
        self.ids = np.array([mask] * self.begin + prompt + [mask] * (total - end))
        self.positions = np.maximum(np.arange(total) - self.begin, 0)

    def hidden(self, block: int, step: int) -> mx.array:
        start, stop = block * self.size, (block + 1) * self.size
        if start and step >= self.sprint.warm_up:
            return self._run(slice(start, stop), None, self.kept)
        queries, keys = np.arange(stop)[:, None], np.arange(stop)[None]
        seen = (keys // self.size <= queries // self.size) & (keys >= self.begin)
        seen = np.concatenate([seen, ~seen.any(axis=1, keepdims=True)], axis=1)
        recorders = [_Recorder() for _ in self.network.model.layers]
        hidden = self._run(slice(0, stop), mx.array(seen)[None, None], recorders)
        if start and step == self.sprint.warm_up - 1:
            self.kept = [_Fixed(recorder, self._keep(recorder, hidden, start)) for recorder in recorders]
        return hidden[:, start:]

    def _run(self, here: slice, mask, cache) -> mx.array:
        positions = mx.array(self.positions[None, here].astype(np.int32))
        return self.network(mx.array(self.ids[None, here].astype(np.int32)), positions, mask, cache)

    def _keep(self, recorder: _Recorder, hidden: mx.array, prefix: int) -> np.ndarray:
        probability = np.array(mx.softmax(self.network.logits(hidden[0, :prefix]), axis=-1)).max(axis=-1)
        norm = np.linalg.norm(np.array(recorder.keys)[0, :, :prefix], axis=-1).mean(axis=0)
        pinned = (self.ids[:prefix] < self.network.config.image_token_offset) & (self.sprint.text_keep_ratio >= 1)
        norm[pinned] = np.inf
        with np.errstate(invalid="ignore"):
            score = self.sprint.alpha * norm / norm.mean() + (1 - self.sprint.alpha) * probability
        score[pinned] = np.inf
        count = max(1, int(prefix * self.sprint.keep_ratio), pinned.sum())
        return np.argsort(-score, kind="stable")[:count]


def published(backbone: Backbone, prompts: list[list[int]], length: int, sprint: Sprint, steps: int) -> list[int]:
    """Codes as the published rule gives them, at temperature 0 and without a threshold."""
    mask, offset, end = backbone.tokens.mask, backbone.config.image_token_offset, len(prompts[0])
    total = -(-(end + length) // 32) * 32

    def job(network: LLaDA2):
        yield Progress("computing", 1, 1)
        branches = [_Branch(network, prompt, total, end, mask, sprint) for prompt in prompts]
        for block in range(end // 32, total // 32):
            here = slice(block * 32, (block + 1) * 32)
            for step in range(steps):
                hidden = mx.concatenate([branch.hidden(block, step) for branch in branches])
                logits = np.array(
                    network.logits(SIMPLE.combine(network, hidden), slice(offset, None)), dtype=np.float64
                )
                masked = branches[0].ids[here] == mask
                shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
                probability = np.where(masked, (shifted / shifted.sum(axis=-1, keepdims=True)).max(axis=-1), -1)
                quota = -(-masked.sum() // (steps - step))
                best = np.argsort(-probability, kind="stable")[:quota]
                for branch in branches:
                    branch.ids[here][best] = offset + logits[best].argmax(axis=-1)
        return branches[0].ids[end : end + length].tolist()

    return backbone.run(job)


@pytest.mark.parametrize("keep_ratio", [0.3, 0.7])
@pytest.mark.parametrize("text_keep_ratio", [1.0, 0.5])
@pytest.mark.parametrize(
    ("conditional", "unconditional"),
    [(40, 30), (70, 20), (100, 3), (95, 25), (75, 11), (96, 32), (64, 20), (64, 64), (45, 60), (33, 1)],
)
def test_the_published_rule(
    backbone: Backbone,
    image: Vocabulary,
    conditional: int,
    unconditional: int,
    text_keep_ratio: float,
    keep_ratio: float,
) -> None:
    """Heads that are missing in whole blocks, in part of one, in the block that is written (75 and 11), and longer ones."""
    sprint = Sprint(keep_ratio, warm_up=2, alpha=0.5, text_keep_ratio=text_keep_ratio)
    prompts = [ids(conditional, conditional), ids(unconditional, unconditional + 1)[-conditional:]]
    draft = Draft.blank(prompts, 70, image.mask)
    done = backbone.run(generate, draft, image, SAMPLING, SIMPLE, sprint=sprint)
    assert done.ids == published(backbone, prompts, 70, sprint, 8)


def test_everything_kept_leaves_only_the_rule_of_acceptance(backbone: Backbone, image: Vocabulary) -> None:
    """Without a missing head, a step sees what it sees without SPRINT."""
    draft = Draft.blank((ids(40), ids(40, 1)), 60, image.mask)
    runs = [
        backbone.run(generate, draft, image, SAMPLING, SIMPLE, sprint=Sprint(1.0, warm_up)).ids for warm_up in (1, 3, 8)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_less_is_attended_to_and_nothing_else_is_run(backbone: Backbone, image: Vocabulary) -> None:
    offset = backbone.config.image_token_offset
    prompt = [*ids(32), *(offset + each % 128 for each in ids(224, 1))]
    draft = Draft.blank((prompt,), 64, image.mask)
    exact = backbone.run(generate, draft, image, SAMPLING)
    sprint = Sprint(keep_ratio=0.25, warm_up=1)
    done = backbone.run(generate, draft, image, SAMPLING, sprint=sprint)
    assert done.report.positions == exact.report.positions == 288 + 7 * 32 + 64 + 7 * 32
    first = 288 * 288 + 7 * 32 * 288
    assert exact.report.pairs == first + 64 * 320 + 7 * 32 * 320
    kept = 64, 72  # a quarter of the prefix; the 32 of text are among them
    assert done.report.pairs == 288 * 288 + 7 * 32 * (kept[0] + 32) + 64 * 320 + 7 * 32 * (kept[1] + 32)


def test_text_is_kept_though_it_is_more_than_the_ratio() -> None:
    text = np.array([[True] * 30 + [False] * 70, [True] * 60 + [False] * 40])
    sprint = Sprint(keep_ratio=0.5)
    assert sprint.counts(sprint.pinned(text)).tolist() == [50, 60]
    assert Sprint(keep_ratio=0.0).counts(np.zeros((1, 40), bool)).tolist() == [1]
    assert Sprint(keep_ratio=1.0).counts(np.zeros((1, 40), bool)).tolist() == [40]
    assert replace(sprint, image_keep_ratio=1.0).pinned(text).all()
    assert not replace(sprint, text_keep_ratio=0.9).pinned(text).any()


@pytest.mark.parametrize("sprint", [Sprint(0.4), Sprint(0.4, alpha=1.0, text_keep_ratio=0.0), Sprint(0.4, alpha=0.0)])
def test_a_session_goes_on_with_sprint(backbone: Backbone, image: Vocabulary, sprint: Sprint) -> None:
    """Whether what came before was written with SPRINT or without, and whether a branch joins later."""
    prompt, more = ids(70), ids(20, 3)

    def job(network: LLaDA2, before: Sprint | None):
        draft = Draft.blank((prompt,), 58, image.mask)
        began = yield from generate(network, draft, image, SAMPLING, keep=True, sprint=before)
        session, _ = yield from add_branches(network, began.session, [ids(30, 4)], image.mask, sprint)
        read = len(session), session.final
        done = yield from generate(
            network, Draft.blank((more, more), 40, image.mask), image, SAMPLING, SIMPLE, session=session, sprint=sprint
        )
        return began.ids, read, done

    for before in (None, sprint):
        written, read, done = backbone.run(job, before)
        assert read == (128, 96)
        branches = [*prompt, *written, *more], [*ids(30, 4), *more]
        anew = backbone.run(generate, Draft.blank(branches, 40, image.mask), image, SAMPLING, SIMPLE, sprint=sprint)
        assert done.ids == anew.ids


def test_pictures_drawn_together_are_what_they_are_alone(backbone: Backbone, image: Vocabulary) -> None:
    draft = Draft.blank((ids(70), ids(20, 1)), 50, image.mask)
    sampling = Sampling(steps=8, temperature=1.0, threshold=0.3)
    for sprint in (None, Sprint(0.4), Sprint(0.4, remasking=Remasking.RANDOM)):
        together = backbone.run(generate, draft, image, sampling, SIMPLE, sprint=sprint, seeds=(3, 4, 5))
        alone = [
            backbone.run(generate, draft, image, replace(sampling, seed=seed), SIMPLE, sprint=sprint)
            for seed in (3, 4, 5)
        ]
        assert together.pictures == [each.ids for each in alone]
        assert len({tuple(ids) for ids in together.pictures}) == 3
        assert np.allclose(together.confidence, [each.confidence[0] for each in alone], rtol=1e-3)
        assert together.report.steps == max(each.report.steps for each in alone) or sprint is None


def test_remasking_ranks_what_is_masked() -> None:
    logits = mx.log(mx.array([[[0.5, 0.49, 0.01], [0.45, 0.3, 0.25], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]]]))
    masked = mx.array([[True, True, True, False]])
    found = draw_candidates(logits, Sampling())
    accept = lambda remasking, threshold=1.0: SprintAcceptance(3, threshold, remasking)(
        found, masked, 0, [mx.random.key(1)]
    ).tolist()
    assert accept(Remasking.LOW_CONFIDENCE) == [[True, False, False, False]]
    assert accept(Remasking.TOP_K_MARGIN) == [[False, True, False, False]]
    assert accept(Remasking.NEG_ENTROPY) == [[True, False, False, False]]
    assert sum(accept(Remasking.RANDOM)[0]) == 1
    assert accept(Remasking.LOW_CONFIDENCE, 0.42) == [[True, True, False, False]]


@pytest.mark.parametrize(
    "options",
    [{"keep_ratio": 1.1}, {"warm_up": 0}, {"alpha": -0.1}, {"text_keep_ratio": 2}, {"image_keep_ratio": float("nan")}],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(RequestError, match=r"SPRINT's .* has to be from"):
        Sprint(**options)


def test_only_the_cached_method_has_sprint(backbone: Backbone, image: Vocabulary) -> None:
    with pytest.raises(ValueError, match="SPRINT"):
        backbone.run(generate, Draft.blank((ids(40),), 8, image.mask), image, method=Method.RECOMPUTE, sprint=Sprint())

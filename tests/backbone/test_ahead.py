"""The next step's graph is built while a step runs; it is given out as soon as it is needed, and else never runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from benchmarks.working import SMALL, peaks

from llada2_mlx.backbone import denoising
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Draft, Generation, Method, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.session import Report, Runner, Session
from llada2_mlx.backbone.sprint import Sprint, SprintAcceptance

LATE, AT_ONCE = Sampling(steps=4, threshold=1.0), Sampling(steps=4, threshold=0.0)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def written(backbone: Backbone, sampling: Sampling, blocks: int = 2, **how) -> Generation:
    draft = Draft.blank((ids(64), ids(40, 1)), 32 * blocks, backbone.tokens.mask)
    vocabulary = Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)
    return backbone.run(generate, draft, vocabulary, sampling, Guidance.simple(2.0), **how)


def pending(session: denoising.Session, folder: Path) -> int:
    """How many operations MLX has still to run for a session's keys and values."""
    with open(folder / "graph.dot", "w") as file:
        mx.export_to_dot(file, *[array for layer in session.layers for array in layer.arrays])
    return (folder / "graph.dot").read_text().count("rectangle")


@pytest.fixture
def events(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in its order: a step is built, given out, read; what is seen of it is told."""
    written(backbone, LATE)  # what is made once is made now
    happened: list[str] = []

    def noted(owner: object, name: str, what: str) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (happened.append(what), own(*args, **kwargs))[1])

    noted(LLaDA2, "__call__", "built")
    noted(denoising, "_give_out", "given out")
    noted(denoising, "_fetch", "read")
    return happened


def test_a_step_is_built_before_the_one_before_it_is_read(backbone: Backbone, events: list[str]) -> None:
    done = written(backbone, LATE, blocks=1, on_step=lambda _: events.append("told"))
    begin, step = ["built", "given out"], ["built", "read", "given out", "told"]
    assert events == begin + 3 * step + ["read", "told"]
    assert (done.report.steps, done.report.ahead, done.report.dropped) == (4, 3, 0)


def test_what_is_not_needed_is_counted_and_never_runs(backbone: Backbone, events: list[str], tmp_path: Path) -> None:
    done = written(backbone, AT_ONCE, blocks=3, keep=True)
    assert events == 3 * ["built", "given out", "built", "read"]
    report = done.report
    assert (report.steps, report.ahead, report.dropped) == (3, 3, 3)
    # two branches: 64 positions before, and each finished block along with the next one
    assert report.positions == 2 * (64 + 32 + 2 * 64)
    assert backbone._worker.call(pending, done.session, tmp_path) == 0


def test_a_session_goes_on_where_a_step_was_dropped(backbone: Backbone) -> None:
    """The keys and values are those of the steps that ran."""
    more = (ids(32, 2), ids(32, 2))
    results = []
    for sampling in (AT_ONCE, Sampling(steps=1, threshold=0.0)):  # of one step there is nothing to build ahead
        session = written(backbone, sampling, keep=True).session
        draft = Draft.blank(more, 32, backbone.tokens.mask)
        vocabulary = Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)
        results.append(backbone.run(generate, draft, vocabulary, LATE, Guidance.simple(2.0), session=session).ids)
    assert results[0] == results[1]


@pytest.mark.parametrize("method", [Method.RECOMPUTE, Method.PLAIN])
def test_the_slower_ways_too(backbone: Backbone, method: Method) -> None:
    report = written(backbone, AT_ONCE, method=method).report
    assert (report.steps, report.ahead, report.dropped) == (2, 2, 2)
    alone = written(backbone, Sampling(steps=1, threshold=0.0), method=method).report
    assert (report.positions, report.pairs, report.head_rows) == (alone.positions, alone.pairs, alone.head_rows)


def test_what_sprint_chooses_by_tokens_is_chosen_when_they_are_known(backbone: Backbone, events: list[str]) -> None:
    """Of four steps the second is the first that sees less; the third and fourth need no tokens of the prefix."""
    report = written(backbone, LATE, blocks=1, sprint=Sprint(0.5, warm_up=1)).report
    assert (report.steps, report.ahead, report.dropped) == (4, 2, 0)
    assert events[:4] == ["built", "given out", "read", "built"]


def test_sprint_drops_what_is_not_needed(backbone: Backbone) -> None:
    """A block that ends in its warm-up."""
    sprint = Sprint(0.5, warm_up=2)
    report = written(backbone, AT_ONCE, sprint=sprint).report
    assert (report.steps, report.ahead, report.dropped) == (2, 2, 2)
    assert report.pairs == written(backbone, Sampling(steps=1, threshold=0.0), sprint=sprint).report.pairs


def test_a_drop_after_the_prefix_was_pruned_changes_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks end in their third step of four: the first accepts nothing early, the third everything."""

    class Late(SprintAcceptance):
        def __call__(self, candidates, masked, step, keys):
            return masked if step == 2 else super().__call__(candidates, masked, step, keys)

    late = lambda size, steps, sampling, sprint: Late(steps, 1.0, sprint.remasking)
    monkeypatch.setattr(denoising, "_acceptance", late)
    sprint = Sprint(0.5, warm_up=1)
    ahead = written(backbone, LATE, sprint=sprint)
    assert (ahead.report.steps, ahead.report.ahead, ahead.report.dropped) == (6, 4, 2)
    monkeypatch.setattr(Runner, "look_ahead", lambda self: None)
    needed = written(backbone, LATE, sprint=sprint)
    assert ahead.ids == needed.ids
    assert (ahead.report.positions, ahead.report.pairs) == (needed.report.positions, needed.report.pairs)


def test_new_keys_and_values_are_written_in_place_of_the_old() -> None:
    """A step after a long prompt takes less than those of all layers once more."""
    config = replace(SMALL, num_hidden_layers=8)
    kept = 2 * config.head_dim * 4 * (2048 + 32) * config.num_hidden_layers
    assert kept < peaks(config, 2048, 1).later < 1.5 * kept


def test_a_drop_keeps_nothing() -> None:
    """Nor is anything copied when what was built ahead is needed."""
    large, new = mx.random.normal((1, 4, 8192, 128)), mx.ones((1, 4, 32, 128))
    session = Session.begin([ids(64)], 32, 1)
    runner = Runner(None, session, Guidance(), Report(), slice(None))
    write = lambda: session.layers[0].update(new, new, 32)
    session.layers[0].update(large, large + 1, 0)

    def peak() -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(session.layers[0].arrays)
        return mx.get_peak_memory() - before

    peak()
    write()
    peak()  # what lay in others' arrays lies in its own now
    take_back = runner.look_ahead()
    write()
    kept = peak()  # may still be undone: the old and the new
    assert kept > 2 * large.nbytes - 1_000_000
    del take_back
    take_back = runner.look_ahead()
    write()
    del take_back
    assert peak() < 1_000_000
    take_back = runner.look_ahead()
    write()
    take_back()
    write()
    assert peak() < 1_000_000

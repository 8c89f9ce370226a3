"""The loop itself: its identities, its counters, its acceptance rule, its errors."""

from __future__ import annotations

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from llada2_mlx.backbone.acceptance import Candidates, Sampling, ThresholdAcceptance, draw_candidates
from llada2_mlx.backbone.denoising import Draft, Method, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.session import block_mask
from llada2_mlx.errors import RequestError
from llada2_mlx.progress import Progress

SIMPLE, EDITING = Guidance.simple(2.0), Guidance.editing(4.0, 1.2)


def ids(count: int, seed: int = 0) -> list[int]:
    """Random text ids below the golden tokenizer's special ones."""
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def blank(backbone: Backbone, branches: tuple[list[int], ...], length: int) -> Draft:
    return Draft.blank(branches, length, backbone.tokens.mask)


def image(backbone: Backbone) -> Vocabulary:
    return Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)


def text(backbone: Backbone) -> Vocabulary:
    return Vocabulary(backbone.tokens.mask, ends=frozenset({backbone.tokens.end}))


@pytest.mark.parametrize("lengths", [(20, 20), (32, 7), (45, 64), (70, 30), (3, 33)], ids=str)
@pytest.mark.parametrize("guidance", [SIMPLE, EDITING], ids=["simple", "editing"])
def test_every_method_gives_the_same_tokens(backbone: Backbone, lengths: tuple[int, int], guidance: Guidance) -> None:
    branches = (ids(lengths[0], 1), ids(lengths[1], 2), ids(12, 3))[: len(guidance.coefficients)]
    results = [
        backbone.run(
            generate, blank(backbone, branches, 40), image(backbone), Sampling(steps=4), guidance, method=method
        ).ids
        for method in Method
    ]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 40 and min(results[0]) >= backbone.config.image_token_offset


def test_every_method_gives_the_same_text_above_temperature_0(backbone: Backbone) -> None:
    sampling = Sampling(steps=6, temperature=0.8, top_k=20, top_p=0.9, seed=7)
    results = [
        backbone.run(generate, blank(backbone, (ids(41),), 50), text(backbone), sampling, method=method).ids
        for method in Method
    ]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(("method", "positions"), [(Method.CACHED, 5120), (Method.RECOMPUTE, 27520)])
def test_positions_of_a_512_picture(backbone: Backbone, method: Method, positions: int) -> None:
    # 16 x 16 codes after 36 tokens, 30 unconditional ones, 8 steps, nothing accepted early
    sampling = Sampling(steps=8, threshold=1.0)
    done = backbone.run(
        generate, blank(backbone, (ids(36, 1), ids(30, 2)), 256), image(backbone), sampling, SIMPLE, method=method
    )
    assert done.report.positions == positions
    assert (done.report.blocks, done.report.steps) == (9, 71)  # the first block has 28 masks: 7 steps
    assert done.report.head_rows == 71 * backbone.config.codebook_size


def test_positions_of_a_1024_picture(backbone: Backbone) -> None:
    done = backbone.run(
        generate,
        blank(backbone, (ids(36, 1), ids(30, 2)), 1024),
        image(backbone),
        Sampling(steps=8, threshold=1.0),
        SIMPLE,
    )
    assert done.report.positions == 18944


def test_one_synchronisation_per_step(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone.run(
        generate, blank(backbone, (ids(40), ids(30)), 64), image(backbone), Sampling(steps=4), SIMPLE
    )  # what is made once is made now
    waits = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
    done = backbone.run(generate, blank(backbone, (ids(40), ids(30)), 64), image(backbone), Sampling(steps=4), SIMPLE)
    assert len(waits) == done.report.syncs == done.report.steps


def test_branches_run_as_one_batch(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    network = type(backbone._model)
    call = network.__call__
    monkeypatch.setattr(
        network, "__call__", lambda self, tokens, *rest: (shapes.append(tokens.shape), call(self, tokens, *rest))[1]
    )
    done = backbone.run(
        generate, blank(backbone, (ids(40), ids(30), ids(20)), 32), image(backbone), Sampling(steps=4), EDITING
    )
    assert len(shapes) == done.report.steps + done.report.dropped
    assert {shape[0] for shape in shapes} == {3}


def test_a_branch_without_weight_is_not_run(backbone: Backbone) -> None:
    branches = (ids(40), ids(30), ids(20))
    run = lambda guidance: (
        backbone.run(
            generate, blank(backbone, branches, 32), image(backbone), Sampling(steps=2), guidance
        ).report.branches
    )
    assert run(Guidance.editing(4.0, 0.0)) == 2
    assert run(Guidance.editing(4.0, 1.0)) == 3
    assert run(Guidance.editing(1.0, 0.0)) == 1


def test_a_long_prompt_is_read_in_pieces(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    branches, whole = (ids(300, 1), ids(220, 2)), []
    run = lambda steps: (
        backbone.run(
            generate, blank(backbone, branches, 32), image(backbone), Sampling(steps=4), SIMPLE, on_step=steps.append
        ).ids
    )
    expected = run(whole)
    monkeypatch.setattr(backbone.load(), "prefill", 64)
    pieces: list[Progress] = []
    assert run(pieces) == expected
    assert {p.phase for p in pieces} - {p.phase for p in whole} == {"reading the prompt"}


def test_a_step_that_raises_ends_the_work_and_the_next_run_is_whole(backbone: Backbone) -> None:
    class Cancelled(BaseException):
        pass

    seen = []

    def cancel(progress: Progress) -> None:
        seen.append((progress, threading.current_thread()))
        if len(seen) == 3:
            raise Cancelled

    run = lambda on_step: (
        backbone.run(generate, blank(backbone, (ids(40),), 64), image(backbone), Sampling(steps=4), on_step=on_step).ids
    )
    expected = run(lambda progress: None)
    with pytest.raises(Cancelled):
        run(cancel)
    assert len(seen) == 3
    assert {thread for _, thread in seen} == {threading.current_thread()}
    assert run(lambda progress: None) == expected


def test_a_backbone_serves_several_threads(checkpoint) -> None:
    backbone = Backbone(checkpoint, "float32")
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        results[number] = backbone.run(
            generate, blank(backbone, (ids(40, number),), 32), image(backbone), Sampling(steps=4)
        ).ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backbone.unload()
    assert not backbone.loaded
    expected = {
        n: backbone.run(generate, blank(backbone, (ids(40, n),), 32), image(backbone), Sampling(steps=4)).ids
        for n in range(3)
    }
    assert results == expected


def test_progress_is_monotonic_and_shows_what_is_there(backbone: Backbone) -> None:
    steps: list[Progress] = []
    prompt = ids(40)
    done = backbone.run(
        generate, blank(backbone, (prompt,), 40), image(backbone), Sampling(steps=4), on_step=steps.append
    )
    denoising = [step for step in steps if step.phase == "denoising"]
    assert [s.done for s in denoising] == sorted({s.done for s in denoising})
    assert denoising[-1].done <= denoising[-1].total
    assert list(denoising[-1].generated[:40]) == done.ids
    masks = [step.generated[:24].count(backbone.tokens.mask) for step in denoising]
    assert masks == sorted(masks, reverse=True)


def test_the_last_block_is_run_whole_and_the_answer_cut(backbone: Backbone) -> None:
    run = lambda length: backbone.run(generate, blank(backbone, (ids(10),), length), image(backbone), Sampling(steps=4))
    short, whole = run(30), run(54)
    assert (short.report.positions, short.ids) == (whole.report.positions, whole.ids[:30])


def test_steps_are_cut_to_the_length(backbone: Backbone) -> None:
    assert backbone.run(generate, blank(backbone, (ids(31),), 1), image(backbone), Sampling(steps=32)).report.steps == 1


def test_masks_in_a_prompt_are_filled_in_its_last_block_only(backbone: Backbone) -> None:
    mask = backbone.tokens.mask
    prompt = ids(40)
    prompt[3] = prompt[35] = mask
    done = []
    result = backbone.run(
        generate, blank(backbone, (prompt,), 24), image(backbone), Sampling(steps=8), on_step=done.append
    )
    assert mask not in result.ids
    assert (
        result.report.positions == 64 + 6 * 32
    )  # 25 masks are 7 steps; the first block was taken as it is, its mask with it


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1])
def test_a_seed_is_a_seed(backbone: Backbone, seed: int) -> None:
    sampling = Sampling(steps=4, temperature=1.5, seed=seed)
    run = lambda sampling: backbone.run(generate, blank(backbone, (ids(40),), 64), image(backbone), sampling).ids
    assert run(sampling) == run(sampling)
    assert run(sampling) != run(replace(sampling, seed=seed ^ 1))
    cold = replace(sampling, temperature=0.0)
    assert run(cold) == run(replace(cold, seed=seed ^ 1))


def test_generation_leaves_mlx_random_state_alone(backbone: Backbone) -> None:
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    backbone.run(generate, blank(backbone, (ids(40),), 32), image(backbone), Sampling(steps=2, temperature=1.0))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_request_longer_than_the_model_is_refused_before_it_runs(backbone: Backbone) -> None:
    steps = []
    with pytest.raises(RequestError, match="8192"):
        backbone.run(
            generate, blank(backbone, (ids(8000),), 300), image(backbone), Sampling(steps=1), on_step=steps.append
        )
    assert not [step for step in steps if step.phase != "loading weights"]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"block_length": 0},
        {"threshold": 1.5},
        {"temperature": -1},
        {"top_p": 2},
        {"seed": -1},
        {"temperature": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(RequestError, match="has to be from"):
        Sampling(**options)


# --- acceptance, candidates, mask -----------------------------------------------------------------------------------


def accepted(probability: list[float], masked: list[bool], quota: int, threshold: float = 0.9) -> list[int]:
    acceptance = ThresholdAcceptance(quota, 1, threshold)
    found = Candidates(None, mx.array([probability]), None)
    return np.flatnonzero(np.array(acceptance(found, mx.array([masked]), 0))[0]).tolist()


def test_all_over_the_threshold_are_accepted() -> None:
    assert accepted([0.95, 0.2, 0.99, 0.91], [True] * 4, 2) == [0, 2, 3]


def test_too_few_over_the_threshold_and_the_quota_counts() -> None:
    assert accepted([0.95, 0.2, 0.5, 0.7], [True] * 4, 2) == [0, 3]


def test_only_masked_positions_are_accepted() -> None:
    assert accepted([0.95, 0.2, 0.99, 0.7], [False, True, False, True], 1) == [3]
    assert accepted([0.95, 0.2, 0.99, 0.7], [False, True, False, False], 4) == [1]


def test_a_quota_of_nothing_still_takes_the_certain_ones() -> None:
    assert accepted([0.95, 0.2], [True, True], 0) == [0]
    assert accepted([0.5, 0.2], [True, True], 0) == []


def test_the_candidate_is_the_most_probable_at_temperature_0() -> None:
    logits = mx.array([[[1.0, 3.0, 2.0]]])
    choice, probability, _ = draw_candidates(logits, Sampling(top_k=1, top_p=0.1))
    assert choice.tolist() == [[1]]
    assert probability.item() == pytest.approx(np.exp(3) / np.exp([1, 2, 3]).sum(), rel=1e-6)


def draws(sampling: Sampling, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    logits = mx.broadcast_to(mx.log(mx.array([[[0.5, 0.3, 0.15, 0.05]]])), (1, count, 4))
    choice, probability, _ = draw_candidates(logits, sampling, [mx.random.key(1)])
    return np.array(choice)[0], np.array(probability)[0]


def test_temperature_divides_the_logits() -> None:
    choice, probability = draws(Sampling(temperature=0.5))
    expected = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    expected /= expected.sum()
    assert np.bincount(choice, minlength=4) / len(choice) == pytest.approx(expected, abs=0.04)
    assert probability == pytest.approx(expected[choice], rel=1e-5)


def test_top_k_keeps_the_best() -> None:
    choice, probability = draws(Sampling(temperature=1.0, top_k=2))
    assert set(choice) == {0, 1}
    assert probability == pytest.approx(np.array([0.625, 0.375])[choice], rel=1e-5)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    choice, _ = draws(Sampling(temperature=1.0, top_p=0.75))
    assert set(choice) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.85))[0]) == {0, 1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=0.0))[0]) == {0}


def test_top_k_comes_before_top_p() -> None:
    # of the two that top-k leaves, the first has 0.625: more than 0.6
    assert set(draws(Sampling(temperature=1.0, top_k=2, top_p=0.6))[0]) == {0}
    assert set(draws(Sampling(temperature=1.0, top_p=0.6))[0]) == {0, 1}


def test_pictures_side_by_side_are_what_they_are_alone() -> None:
    logits = mx.random.normal((3, 8, 20), key=mx.random.key(5))
    masked = mx.array(np.random.default_rng(1).integers(0, 2, (3, 8)).astype(bool))
    keys = [mx.random.key(seed) for seed in (4, 5, 6)]
    for sampling in (Sampling(), Sampling(temperature=1.0, top_k=9, top_p=0.8)):
        together = draw_candidates(logits, sampling, keys)
        acceptance = ThresholdAcceptance(8, 3, 0.3)
        found = acceptance(together, masked, 1)
        for i in range(3):
            alone = draw_candidates(logits[i : i + 1], sampling, keys[i : i + 1])
            assert alone.tokens.tolist() == together.tokens[i : i + 1].tolist()
            assert acceptance(alone, masked[i : i + 1], 1).tolist() == found[i : i + 1].tolist()


def test_quotas_add_up_to_a_block() -> None:
    for steps in range(1, 33):
        quotas = [ThresholdAcceptance(32, steps, 1.0).quota(step) for step in range(steps)]
        assert sum(quotas) == 32 and quotas == sorted(quotas, reverse=True)


def test_a_block_sees_itself_and_what_is_before() -> None:
    mask = np.array(block_mask(2, 6, 2, None))[0, 0]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]] * 2 + [[1] * 6] * 2


def test_a_missing_head_is_never_attended_to() -> None:
    mask = np.array(block_mask(0, 6, 2, mx.array([0, 3])))[:, 0]
    assert mask[0].tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2 + [[1] * 6] * 2
    assert mask[1, 3:].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert mask.any(axis=-1).all()  # an empty row would be NaN


def test_one_block_that_sees_everything_needs_no_mask() -> None:
    assert block_mask(64, 96, 32, None) is None

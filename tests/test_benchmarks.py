"""The benchmarks at the smallest size: every way does the same work's tokens, so that their times can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from benchmarks import ahead, breakdown, calls, fitting, model, upstream, working
from benchmarks.__main__ import main
from benchmarks.measure import Case, compare, ours, picture, question
from counting import hollow_checkpoint
from rehearsal.pieces import DECODER

from llada2_mlx.backbone.acceptance import Candidates, ThresholdAcceptance
from llada2_mlx.backbone.denoising import Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = model.write(tmp_path_factory.mktemp("benchmarks") / "tiny", model.SIZES["tiny"])
    return Backbone(Checkpoint(folder), "float32")


def test_rows_are_of_the_same_tokens(random_model: Backbone) -> None:
    request = picture(random_model, 256)
    cases = [
        Case.of(method.name, random_model, request, lambda request, method=method: ours(request, method))
        for method in Method
    ]
    section = compare("a picture", cases, 1)
    assert [row.equal_tokens for row in section.rows] == ["64/64"] * 3
    assert [row.positions for row in section.rows[:2]] == [1664, 4480]
    assert len(section.ratios) == 2


def test_tokens_are_many(random_model: Backbone) -> None:
    """Else it would say little that they are equal."""
    assert len(set(random_model.run(ours(picture(random_model, 256))).ids)) > 10


@pytest.mark.skipif(upstream.version() is None, reason="mlx-vlm is not installed")
@pytest.mark.parametrize("kind", ["codes", "text"])
def test_mlx_vlm_gives_the_same_tokens(random_model: Backbone, kind: str) -> None:
    request = picture(random_model, 256, rescale=0.0) if kind == "codes" else question(random_model, codes=60)
    mine, theirs = (random_model.run(way(request)).ids for way in (ours, getattr(upstream, kind)))
    assert mine == theirs


def test_parts_are_those_of_a_generation(random_model: Backbone) -> None:
    seconds = breakdown.parts(random_model, question(random_model, codes=60))
    assert {"attention", "routed experts", "output head", "the rest"} <= set(seconds)
    assert min(seconds.values()) > 0


def test_the_command_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(upstream, "version", lambda: None)
    call = ["--size", "tiny", "--only", "precisions", "mlx-vlm-codes", "--repeats", "1"]
    main([*call, "--json", str(tmp_path / "figures.json")])
    precisions, theirs = json.loads((tmp_path / "figures.json").read_text())["sections"].values()
    told = capsys.readouterr().out
    assert [row["name"] for row in precisions["rows"]] == ["bf16", "float32", "8bit", "6bit", "4bit"]
    assert all(row["seconds"] > 0 and f"{row['seconds']:.2f}" in told for row in precisions["rows"])
    bytes_of = precisions["details"]["weight_bytes"]
    assert bytes_of["float32"] >= bytes_of["bf16"] > bytes_of["8bit"] > bytes_of["6bit"] > bytes_of["4bit"]
    assert "not installed" in theirs["notes"][0] and theirs["notes"][0] in told


def test_work_grows_with_what_runs_together() -> None:
    """The first step takes the prompt along; a later one has its block alone, and the keys and values."""
    alone, together = (working.peaks(working.SMALL, 96, branches) for branches in (1, 2))
    assert (alone.positions, together.positions) == (128, 256)
    assert 1.7 * alone.most < together.most < 2.3 * alone.most
    assert alone.later < alone.most / 2


def test_a_call_of_the_decoder_counts_what_its_layers_shapes_say() -> None:
    """Of a layer four square matrices, three to or from 8/3 of the width, and two products of all tokens with all."""
    width, main, refining = 3840, calls.DECODER["n_layers"], calls.DECODER["n_refiner_layers"]
    layer = lambda tokens: 2 * tokens * width * width * (4 + 8) + 4 * tokens**2 * width
    counted = calls.work((512,))
    assert counted.whole[512] == pytest.approx(main * layer(2048) + refining * layer(1024), rel=0.01)
    assert counted.cached[512] == pytest.approx(layer(2048) + refining * layer(1024), rel=0.06)


def test_every_preset_is_measured_once() -> None:
    measured = [options for _, options in calls.rows()]
    assert len(set(measured)) == len(measured) and set(calls.PRESETS.values()) <= set(measured)


def test_a_guess_holds_where_the_next_step_finds_the_same() -> None:
    """Positions that are accepted one after the other, by candidates that stay; then one that becomes another."""
    found = ahead.Guesses()
    acceptance = ahead.Guessing(ThresholdAcceptance(block_length=4, steps=4, threshold=1.0), 4, found)
    probability, masked = mx.array([[0.9, 0.8, 0.7, 0.6]]), mx.array([[True] * 4])
    for step, tokens in enumerate(([1, 2, 3, 4], [9, 2, 3, 4], [9, 9, 3, 4], [9, 9, 9, 5])):
        candidates = Candidates(mx.array([tokens]), probability, mx.zeros((1, 4, 10)))
        accepted = acceptance(candidates, masked, step, ())
        assert accepted.tolist() == [[at == step for at in range(4)]]
        masked = masked & ~accepted
    assert (found.made, found.held) == (3, 2)


def test_guessing_and_timing_change_no_token(random_model: Backbone) -> None:
    work = lambda: results.append(random_model.run(ours(picture(random_model, 256))))
    results = []
    work()
    found = ahead.guesses(work)
    plain, guessed = results
    assert plain.ids == guessed.ids
    # a guess in each step but the first of a block
    assert found.held <= found.made == plain.report.steps - plain.report.blocks > 0
    report = ahead.built(work)
    assert (report.steps, report.ahead) == (plain.report.steps, plain.report.ahead)
    assert min(ahead.waits(work)) > 0 and all(each.ids == plain.ids for each in results)


def test_what_fits_into_macs_is_as_the_page_says(tmp_path: Path) -> None:
    made = [fitting.HEADER, *fitting.rows(hollow_checkpoint(tmp_path, DECODER["n_layers"]))]
    told = (Path(__file__).parent.parent / "docs/performance.md").read_text().splitlines()
    assert len(made) == 6 and [row for row in made if row not in told] == []

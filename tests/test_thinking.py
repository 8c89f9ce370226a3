"""Thinking: a plan in words, and then the picture in the same session."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from scripted import scripted

from llada2_mlx import prompts, tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.sprint import Sprint
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError

PLAN = "A red fox, low sun."


@pytest.fixture
def fresh(checkpoint: Checkpoint) -> Backbone:
    return Backbone(checkpoint, "float32")


def think(backbone: Backbone, script: list[int], patch: pytest.MonkeyPatch, **options):
    prompt = prompts.thinking(backbone.tokens, "a fox", 8, 8).conditional
    scripted(backbone, prompt, script, patch)
    options = {"thinking": tasks.Thinking(8, 100), "guidance": 2.0, "rescale": 0.0} | options
    return tasks.text_to_vq(backbone, "a fox", 256, 256, sampling=Sampling(steps=4), **options)


@pytest.mark.parametrize("method", Method)
def test_the_size_is_the_models_choice(fresh: Backbone, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    tokens, codes = fresh.tokens, [5, 9, 33] * 40
    script = [*tokens.encode(PLAN), *tokens.header(8, 10), *tokens.codes_to_ids(codes)]
    drawing = think(fresh, script, monkeypatch, method=method)
    assert (drawing.grid.height, drawing.grid.width) == (8, 10)
    assert drawing.grid.to_list() == codes[:80]
    assert drawing.reasoning == PLAN
    assert drawing.warnings == ("The model chose 320 x 256 pixels in place of the 256 x 256 pixels asked for.",)


def test_the_size_that_was_asked_for_needs_no_word(fresh: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, texts = fresh.tokens, []
    script = [*tokens.encode(PLAN), *tokens.header(8, 8), *tokens.codes_to_ids([7]), *tokens.encode("behind")]
    drawing = think(fresh, script, monkeypatch, on_text=texts.append)
    assert (drawing.reasoning, drawing.warnings) == (PLAN, ())
    assert texts[-1] == PLAN and not any("behind" in text for text in texts)


def test_a_picture_without_a_header_has_the_size_that_was_asked_for(
    fresh: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = fresh.tokens
    drawing = think(fresh, [*tokens.encode(PLAN), tokens.boi, *tokens.codes_to_ids([7])], monkeypatch)
    assert (drawing.grid.height, drawing.grid.width, drawing.reasoning) == (8, 8, PLAN)
    assert "stated no size" in drawing.warnings[0]


@pytest.mark.parametrize("length", [100, 40])
def test_no_picture_is_an_error(fresh: Backbone, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    tokens = fresh.tokens
    with pytest.raises(RequestError, match=f"thought for {length} tokens .* Raise the length"):
        think(fresh, tokens.encode("x"), monkeypatch, thinking=tasks.Thinking(8, length))
    with pytest.raises(RequestError, match="without beginning a picture"):
        think(fresh, [*tokens.encode("x"), tokens.end], monkeypatch, thinking=tasks.Thinking(8, length))


def test_a_picture_behind_the_end_does_not_count(fresh: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = fresh.tokens
    with pytest.raises(RequestError, match="without beginning"):
        think(fresh, [*tokens.encode("x"), tokens.end, *tokens.header(8, 8)], monkeypatch)


def test_a_size_that_the_model_cannot_draw_is_an_error(fresh: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = fresh.tokens
    side = max(tokens.sizes)
    object.__setattr__(fresh.config, "max_position_embeddings", 1000)
    with pytest.raises(RequestError, match="too long"):
        think(fresh, [*tokens.encode("x"), *tokens.header(side, side)], monkeypatch)


def test_too_long_a_plan_is_refused_before_anything_runs(fresh: Backbone) -> None:
    with pytest.raises(RequestError, match="too long"):
        tasks.text_to_vq(fresh, "a fox", 256, 256, thinking=tasks.Thinking(length=10**6))
    assert not fresh.loaded


@pytest.mark.parametrize("options", [{"steps": 0}, {"temperature": -1.0}, {"length": 0}])
def test_options_out_of_range_are_refused(fresh: Backbone, options: dict) -> None:
    with pytest.raises(RequestError):
        tasks.text_to_vq(fresh, "a fox", 256, 256, thinking=tasks.Thinking(**options))
    assert not fresh.loaded


@pytest.mark.parametrize("sprint", [None, Sprint(0.5)])
def test_nothing_is_computed_twice(backbone: Backbone, sprint: Sprint | None) -> None:
    """On the golden checkpoint, whose model begins a picture two tokens after a prompt of 114."""
    steps: Counter[str] = Counter()
    drawing = tasks.text_to_vq(
        backbone,
        "a fox in the snow",
        256,
        256,
        sampling=Sampling(steps=8),
        thinking=tasks.Thinking(8, 256),
        on_step=lambda progress: steps.update([progress.phase]),
        sprint=sprint,
    )
    written, drawn = steps[tasks.THINKING], steps["denoising"]
    reading = 96 + 96  # each branch's whole blocks of prompt, once
    # the picture's second and third block take along the one before; SPRINT reads the shorter prompt's missing head
    assert drawing.report.positions == reading + 32 * written + 2 * 32 * (drawn + 2) + (sprint is not None)
    assert drawing.report.steps == written + drawn


def test_pictures_of_one_size_are_kept_and_the_others_are_told_of(
    fresh: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, widths, drawings = fresh.tokens, (8, 10, 8, 12), []
    for width in widths:
        script = [*tokens.encode(PLAN), *tokens.header(8, width), *tokens.codes_to_ids([width] * 100)]
        drawings.append(think(fresh, script, monkeypatch))
    (first, *others) = drawings
    mixed = replace(
        first,
        grids=tuple(drawing.grid for drawing in drawings),
        confidence=tuple(drawing.confidence[0] for drawing in drawings),
    )
    kept = tasks.of_one_size(mixed, 5)
    assert kept.grids == (first.grid, others[1].grid)
    assert [each.shape for each in kept.confidence] == [(8, 8), (8, 8)]
    assert len(kept.warnings) == 2 and "Picture 2" in kept.warnings[0] and "320 x 256" in kept.warnings[0]
    assert "Picture 4" in kept.warnings[1] and kept.warnings[1].endswith("Draw it alone with seed 8.")
    assert tasks.of_one_size(first, 5) == first


def test_pictures_with_plans_of_their_own(backbone: Backbone) -> None:
    draw = lambda temperature, pictures, seed: tasks.text_to_vq(
        backbone,
        "a fox in the snow",
        256,
        256,
        sampling=Sampling(steps=8, temperature=1.0, seed=seed),
        thinking=tasks.Thinking(8, 256, temperature),
        pictures=pictures,
    )
    for temperature in (0.0, 0.01):
        together = draw(temperature, 2, 3)
        assert list(together.grids) == [draw(temperature, 1, seed).grid for seed in (3, 4)]
        assert len(together.confidence) == 2 and together.confidence[0].shape == (8, 8)

"""What a user asks for, on the built-in checkpoint."""

from __future__ import annotations

import pytest
from synthetic import tiny

from llada2_mlx import tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Generation, Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.vq import VQGrid


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(Checkpoint(tiny()))


@pytest.fixture(scope="module")
def grid(backbone: Backbone) -> VQGrid:
    return tasks.text_to_vq(backbone, "a cat").grid


def test_size_0_is_the_models_own(backbone: Backbone, grid: VQGrid) -> None:
    assert (grid.height, grid.width) == (8, 8)
    wide = tasks.text_to_vq(backbone, "a cat", width=320).grid
    assert (wide.height, wide.width) == (8, 10)


def test_a_checkpoint_that_states_no_size_draws_at_1024(checkpoint: Checkpoint) -> None:
    assert tasks.grid_size(Backbone(checkpoint), 0, 0) == (32, 32)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 256), "multiples of 32"),
        ((128, 256), "no size tokens"),
        ((288, 256), "no size tokens"),
        ((-64, 256), "multiples"),
        ((8192, 256), "no size tokens"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused_before_anything_runs(size: tuple[int, int], message: str) -> None:
    fresh = Backbone(Checkpoint(tiny()))
    with pytest.raises(RequestError, match=message):
        tasks.text_to_vq(fresh, "a cat", *size)
    assert not fresh.loaded


def test_a_prompt_that_is_too_long_is_refused_before_anything_runs() -> None:
    fresh = Backbone(Checkpoint(tiny()))
    with pytest.raises(
        RequestError, match=r"too long: 10\d\d\d tokens of prompt and 64 to generate .* the model takes 8192"
    ):
        tasks.text_to_vq(fresh, "x" * 10_000, 256, 256)
    assert not fresh.loaded


@pytest.mark.parametrize("prompt", ["🦊🌨️ 狐狸 in the snow", "x" * 1100, "a\nb\tc", "<boi>"])
def test_unusual_prompts(backbone: Backbone, prompt: str) -> None:
    grid = tasks.text_to_vq(backbone, prompt, sampling=Sampling(steps=2)).grid
    assert (grid.height, grid.width) == (8, 8)
    assert grid == tasks.text_to_vq(backbone, prompt, sampling=Sampling(steps=2), method=Method.RECOMPUTE).grid


def test_an_edit_has_the_size_of_its_source(backbone: Backbone, grid: VQGrid) -> None:
    for image_guidance, branches in ((0.0, 2), (1.2, 3)):
        drawing = tasks.edit(backbone, grid, "make it blue", image_guidance=image_guidance)
        assert (drawing.grid.height, drawing.grid.width, drawing.report.branches) == (8, 8, branches)


def test_an_answer_grows(backbone: Backbone, grid: VQGrid) -> None:
    texts: list[str] = []
    answer = tasks.understand(backbone, grid, "what is it?", 40, on_text=texts.append)
    assert texts[-1] == answer.text
    assert "…" in texts[0] and len(texts) == answer.report.steps
    assert len(answer.ids) <= 40


def test_a_text_that_is_not_whole_yet(backbone: Backbone) -> None:
    tokens = backbone.tokens
    a, b = tokens.encode("one "), tokens.encode("two")
    hole = [tokens.mask] * 3
    assert tasks.readable(backbone, (*a, *hole, *b, *hole)) == "one …two…"
    assert tasks.readable(backbone, (*a, tokens.end, *b)) == "one "
    assert tasks.readable(backbone, tuple(hole)) == "…"


@pytest.mark.parametrize("text", ["猫", "🦊", "é", "a🦊b", "猫犬"])
def test_no_half_character_is_shown(backbone: Backbone, text: str) -> None:
    tokens = backbone.tokens
    ids, hole = tokens.encode(text), [tokens.mask]
    for cut in range(1, len(ids)):
        parts = (ids[:cut], ids[cut:])
        for shown in (
            (*parts[0], *hole),
            (*hole, *parts[1], tokens.end),
            (*parts[0], *hole, *parts[1]),
            (*hole, *parts[0], *hole, *hole, *parts[1], *hole),
            tuple(parts[0]),
        ):
            assert "\ufffd" not in (said := tasks.readable(backbone, shown)) and "……" not in said
    assert tasks.readable(backbone, (*ids, *hole)) == text + "…"
    assert tasks.readable(backbone, (*ids, tokens.end)) == text


def test_what_is_not_half_is_shown(backbone: Backbone) -> None:
    tokens, text = backbone.tokens, "a \ufffd b…"
    ids = tokens.encode(text)
    assert tasks.readable(backbone, (tokens.mask, *ids)) == "…" + text
    assert tasks.readable(backbone, (*tokens.encode("x\ufffd"), tokens.end)) == "x\ufffd"


@pytest.mark.parametrize(("length", "text"), [(3, "ab"), (4, "ab"), (5, "ab猫"), (6, "ab猫\ufffd")])
def test_an_answer_that_is_cut_ends_in_a_whole_character(
    backbone: Backbone, grid: VQGrid, monkeypatch: pytest.MonkeyPatch, length: int, text: str
) -> None:
    tokens = backbone.tokens
    ids = [*tokens.encode("ab猫"), tokens.encode("猫")[0], tokens.end][: length + (length == 6)]
    monkeypatch.setattr(backbone, "run", lambda *_, **__: Generation([ids]))
    assert tasks.understand(backbone, grid, "what?", length).text == text


def test_an_answer_longer_than_the_model_is_refused(backbone: Backbone, grid: VQGrid) -> None:
    with pytest.raises(RequestError, match="too long"):
        tasks.understand(backbone, grid, "what?", 8192)


def test_seeds_matter_above_temperature_0_only(backbone: Backbone, grid: VQGrid) -> None:
    draw = lambda **options: tasks.text_to_vq(backbone, "a cat", sampling=Sampling(steps=8, **options)).grid
    assert draw(seed=1) == grid
    assert draw(seed=1, temperature=1.0) == draw(seed=1, temperature=1.0)
    assert draw(seed=1, temperature=1.0) != draw(seed=2, temperature=1.0)

"""Several pictures that are read together, and one that is changed with others to refer to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image
from synthetic import tiny

from llada2_mlx import cli, prompts, tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.codebook import doubt, origin
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging.prepare import Purpose, prepare
from llada2_mlx.vq import GridSet, Origin, VQGrid, grids_of, readings, with_source

QUICK = Sampling(steps=2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(Checkpoint(tiny()))


def grid(rows: int, columns: int, seed: int = 0, codebook: int = 256, of: Origin = Origin()) -> VQGrid:
    return VQGrid(np.random.default_rng(seed).integers(0, codebook, (rows, columns)), codebook, of)


SMALL, WIDE, TALL = grid(8, 8, 1), grid(8, 20, 2), grid(16, 10, 3)


# --- the set --------------------------------------------------------------------------------------------------------


def test_a_set_keeps_its_order_and_is_no_batch() -> None:
    together = GridSet((SMALL, WIDE, TALL))
    assert grids_of(together) == (SMALL, WIDE, TALL) and grids_of(WIDE) == (WIDE,)
    assert readings(together) == (together,)  # one answer
    assert readings((SMALL, SMALL)) == (SMALL, SMALL)  # one each
    assert GridSet([SMALL, WIDE]) == GridSet((SMALL, WIDE)) != GridSet((WIDE, SMALL))


def test_no_picture_is_no_set() -> None:
    with pytest.raises(RequestError, match="The set holds no picture. Connect one"):
        GridSet(())


def test_pictures_of_two_models_are_no_set() -> None:
    with pytest.raises(
        RequestError, match="picture 1 is of a model with 256 codes, picture 3 of a model with 512 codes"
    ):
        GridSet((SMALL, WIDE, grid(8, 8, codebook=512)))
    one, other = Origin("one", vectors="a", table="t"), Origin("other", vectors="b", table="t")
    with pytest.raises(RequestError, match="picture 1 is of one, picture 2 of other. Encode all of them with the same"):
        GridSet((replace(SMALL, origin=one), replace(WIDE, origin=other)))
    with pytest.raises(RequestError, match="picture 2 is of one, picture 3 of other"):  # whatever the first is of
        GridSet((SMALL, replace(SMALL, origin=one), replace(WIDE, origin=other)))
    # a copy of a model under another name, and codes that do not say
    GridSet((replace(SMALL, origin=one), replace(WIDE, origin=replace(one, model="copy")), TALL))


@pytest.mark.parametrize(("source", "order"), [(0, (0, 1, 2)), (3, (0, 1, 2)), (1, (1, 2, 0)), (2, (0, 2, 1))])
def test_the_source_goes_last_and_the_others_keep_their_order(source: int, order: tuple[int, ...]) -> None:
    grids = (SMALL, WIDE, TALL)
    assert with_source(GridSet(grids), source).grids == tuple(grids[index] for index in order)


@pytest.mark.parametrize("source", [4, -1])
def test_a_source_that_is_not_there(source: int) -> None:
    with pytest.raises(RequestError, match=rf"Picture {source} is asked for, and the set has 3. Choose 1 to 3, or 0"):
        with_source(GridSet((SMALL, WIDE, TALL)), source)


def test_a_batch_has_no_source() -> None:
    assert with_source((SMALL,), 0) == (SMALL,)
    with pytest.raises(RequestError, match="source is 1: .* this is a batch"):
        with_source((SMALL,), 1)


# --- prompts --------------------------------------------------------------------------------------------------------


def block(tokens, grid: VQGrid) -> list[int]:
    head = f"<|image|><|reserved_token_{grid.height}|><|reserved_token_{grid.width}|><boi>"
    return [
        *tokens.encode(head),
        *(tokens.image_offset + code for code in grid.to_list()),
        *tokens.encode("<|/image|>"),
    ]


def test_a_question_stands_after_all_pictures(backbone: Backbone) -> None:
    tokens = backbone.tokens
    (ids,) = prompts.understand(tokens, GridSet((SMALL, WIDE)), " Which is red? ").branches
    assert ids == [*block(tokens, SMALL), *block(tokens, WIDE), *tokens.encode("Which is red?")]
    assert prompts.understand(tokens, GridSet((SMALL,)), "x") == prompts.understand(tokens, SMALL, "x")


def test_the_branches_of_an_edit_with_references(backbone: Backbone) -> None:
    tokens = backbone.tokens
    full, no_text, no_image = prompts.edit(tokens, GridSet((SMALL, TALL, WIDE)), "Put it in.").branches
    begin = tokens.encode("<role>SYSTEM</role> You are an image editing assistant. <role>HUMAN</role>")
    end = [*tokens.encode("<role>ASSISTANT</role>"), *tokens.header(WIDE.height, WIDE.width)]
    pictures = [*block(tokens, SMALL), *block(tokens, TALL), *block(tokens, WIDE)]
    assert full == [*begin, *pictures, *tokens.encode("Put it in."), *end]
    assert no_text == [*begin, *pictures, *tokens.encode("<uncondition>"), *end]
    assert no_image == [*begin, tokens.image, *tokens.encode("Put it in."), *end]


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_an_answer_depends_on_every_picture_and_on_their_order(backbone: Backbone) -> None:
    sets = [GridSet(grids) for grids in ((SMALL, WIDE), (WIDE, SMALL), (SMALL, TALL), (SMALL,))]
    answers = [tasks.understand(backbone, each, "What is it?", 24, QUICK).ids for each in sets]
    assert len({tuple(answer) for answer in answers}) == len(sets)
    plain = tasks.understand(backbone, sets[0], "What is it?", 24, QUICK, Method.PLAIN)
    assert plain.ids == answers[0]


@pytest.mark.parametrize("image_guidance", [0.0, 1.5])
def test_the_result_has_the_size_of_the_last_picture(backbone: Backbone, image_guidance: float) -> None:
    for last in (SMALL, WIDE):
        edit = lambda method, last=last: tasks.edit(
            backbone, GridSet((TALL, last)), "Put it in.", 4.0, image_guidance, sampling=QUICK, method=method
        )
        drawing = edit(Method.CACHED)
        assert (drawing.grid.height, drawing.grid.width) == (last.height, last.width)
        assert drawing.grid == edit(Method.RECOMPUTE).grid


def test_too_many_pictures_are_refused_before_anything_runs() -> None:
    fresh = Backbone(Checkpoint(tiny()))
    twenty = GridSet((grid(28, 28),) * 20)  # what 448 x 448 pixels give
    for work in (
        lambda: tasks.understand(fresh, twenty, "Which?", 2048),
        lambda: tasks.edit(fresh, twenty, "Mix them."),
    ):
        with pytest.raises(
            RequestError,
            match=r"too long: 15\d\d\d tokens .* takes 8192\..* The 20 pictures alone have 15680 codes: take",
        ):
            work()
    assert not fresh.loaded
    few = GridSet((SMALL,) * 20)
    assert tasks.understand(fresh, few, "Which?", 8, QUICK).report.positions > 20 * 64  # as many as there is room for


def test_pictures_of_another_model_are_refused() -> None:
    fresh = Backbone(Checkpoint(tiny()))
    stranger = replace(SMALL, origin=Origin("stranger", vectors="other"))
    for work in (tasks.understand, tasks.edit):
        with pytest.raises(RequestError, match="of the model stranger, and tiny has another codebook"):
            work(fresh, GridSet((SMALL, stranger)), "What?")
        with pytest.raises(RequestError, match="codebook of 512, the model tiny has 256"):
            work(fresh, GridSet((grid(8, 8, codebook=512),)), "What?")
        with pytest.raises(RequestError, match="no size tokens"):
            work(fresh, GridSet((grid(9, 8), SMALL)), "What?")
    assert not fresh.loaded


def test_a_doubt_names_its_picture() -> None:
    shapes = Checkpoint(BUILT_IN)
    own = replace(origin(shapes), use="understanding")
    fits, small = grid(16, 16, of=own), grid(8, 8, of=own)
    assert doubt(GridSet((fits, fits)), shapes, "understanding") is None
    assert "Picture 2 of 3: This model was made for understanding at 256 x 256" in doubt(
        GridSet((fits, small, fits)), shapes, "understanding"
    )
    assert "Picture 1 of 2: These codes were made for editing" in doubt(
        GridSet((replace(fits, origin=replace(own, use="editing")), fits)), shapes, "understanding"
    )
    assert "Picture" not in doubt(GridSet((small,)), shapes, "understanding")


# --- preparing and the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3000, 2000), (448, 448), (100, 100), (500, 1000)])
def test_a_picture_among_others_has_at_most_448_by_448_of_area(size: tuple[int, int]) -> None:
    one, among = (prepare(noise(*size), use) for use in (Purpose.UNDERSTAND, Purpose.UNDERSTAND_SEVERAL))
    assert among.width * among.height <= 448**2 and among.width % 32 == among.height % 32 == 0
    assert (one.size == among.size) == (size[0] * size[1] <= 448**2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "BUILT_IN", tiny())
    noise(300, 200).save("one.png")
    Image.new("RGB", (900, 800), "red").save("two.png")

    def command(*words: str) -> tuple[int, str, str]:
        status = cli.main(list(words))
        return status, *capsys.readouterr()

    return command


def test_several_pictures_on_the_command_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    read, understand = [], tasks.understand
    monkeypatch.setattr(
        tasks, "understand", lambda *words, **options: read.append(words[1]) or understand(*words, **options)
    )
    quick = ("--max-new-tokens", "8", "--steps", "2")
    status, out, _ = run("understand", "one.png", "Which?", "--with", "two.png", "--with", "one.png", *quick)
    assert status == 0 and out
    first, second, third = read[0].grids
    assert (first.height, first.width) == (12, 18) and first == third
    assert (second.height, second.width) == (26, 28)  # 448 x 448 of area
    run("understand", "two.png", "Which?", *quick)
    assert (read[1].height, read[1].width) == (46, 52)  # alone it may have 800 x 800


def test_an_edit_with_a_reference_on_the_command_line(run) -> None:
    words = ("edit", "one.png", "Put it in.", "--with", "two.png", "--steps", "1", "--decoder-steps", "2")
    status, out, _ = run(*words, "--upscale", "1", "-o", "edited.png")
    assert (status, out) == (0, "edited.png: 608 x 416 pixels\n")
    with Image.open("edited.png") as image:
        parameters = json.loads(image.text["parameters"])
    assert (parameters["image"], parameters["others"]) == ("one.png", ["two.png"])


def test_encoding_for_a_set_on_the_command_line(run) -> None:
    status, out, _ = run("encode", "two.png", "-o", "codes.safetensors", "--purpose", "understand-with-others")
    assert (status, out) == (0, "codes.safetensors: VQGrid(26 x 28 codes of 256)\n")


def test_a_picture_that_is_missing_is_said_before_anything_is_read(run) -> None:
    status, _, err = run("understand", "one.png", "Which?", "--with", "gone.png")
    assert status == 1 and "There is no picture gone.png" in err

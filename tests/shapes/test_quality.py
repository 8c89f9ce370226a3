"""The built-in model does what it was trained for, on combinations that it never saw. Pictures are read by plain code.

The thresholds lie below the table in docs/shapes.md, because a dozen of pictures is few and platforms round differently.
``python -m llada2_mlx.shapes.measures`` gives the whole table.
"""

from __future__ import annotations

from itertools import islice

import pytest
from demonstration import Demo
from PIL import Image

from llada2_mlx.checkpoint.config import PRECISIONS
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint, Part
from llada2_mlx.imaging.prepare import Purpose
from llada2_mlx.shapes import gallery, measures
from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.studio import Studio
from llada2_mlx.shapes.world import SUMMARY, Background, Colour, Kind, Pattern, Place, Tone, draw, scenes
from llada2_mlx.tasks import Seeing


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


def test_the_built_in_model_is_whole_and_small() -> None:
    checkpoint = Checkpoint(BUILT_IN).require(*Part)
    assert checkpoint.world == SUMMARY
    copies = {path for name in PRECISIONS for path in BUILT_IN.rglob(f"mlx-{name}/**/*")}  # made by who uses it
    assert sum(path.stat().st_size for path in {*BUILT_IN.rglob("*")} - copies if path.is_file()) <= 16e6
    assert {info.dtype for info in checkpoint.backbone_tensors().values()} == {"BF16"}
    assert (
        checkpoint.config.n_group > 1
        and checkpoint.config.num_shared_experts
        and checkpoint.config.rotary_dim < checkpoint.config.head_dim
    )


def test_it_draws_what_it_is_told(studio: Studio) -> None:
    assert measures.text_to_image(studio, 12).share >= 0.8


def test_without_guidance_towards_the_prompt_it_draws_anything(studio: Studio) -> None:
    """At guidance 0 the unconditional branch alone decides."""
    assert measures.text_to_image(studio, 6, guidance=0.0).share <= 0.2


def test_it_answers_questions(studio: Studio) -> None:
    assert measures.answers(studio, 12).share >= 0.7


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1024, 768), (64, 64)])
def test_it_answers_about_a_picture_of_any_size(studio: Studio, size: tuple[int, int]) -> None:
    for scene in islice(scenes("sizes"), 2):
        square = draw(scene).resize((min(size),) * 2, Image.Resampling.BICUBIC)
        # more of the background on two sides, which the square that the model reads leaves out
        picture = Image.new("RGB", size, square.getpixel((0, 0)))
        picture.paste(square, tuple((side - min(size)) // 2 for side in size))
        shape = scene.shapes[0]
        answer = studio.ask(picture, f"What colour is the shape in the {shape.place.value}?")
        assert shape.colour.value in answer.lower()


def test_it_edits_pictures(studio: Studio) -> None:
    assert measures.edited(studio, 10).share >= 0.6


def test_it_edits_what_the_gallery_shows(demo: Demo) -> None:
    circle, star = (Kind.CIRCLE, Colour.RED, Place.TOP_LEFT), (Kind.STAR, Colour.BLUE, Place.BOTTOM_RIGHT)
    plain = Background(Pattern.PLAIN, Tone.WHITE)
    expected = (
        ({(Kind.CIRCLE, Colour.YELLOW, Place.TOP_LEFT), star}, plain),
        ({circle, (Kind.STAR, Colour.PURPLE, Place.BOTTOM_RIGHT)}, plain),
        ({circle, star}, Background(Pattern.STRIPED, Tone.GREY)),
        ({circle, star}, Background(Pattern.GRADIENT, Tone.SKY)),
    )
    found = [read(demo.picture(instruction)) for _, instruction in gallery.EDITS]
    assert sum(scene is not None and (scene.layout(), scene.background) == e for scene, e in zip(found, expected)) >= 3


def test_it_plans_before_it_draws(studio: Studio) -> None:
    shares = measures.thinking(studio, 6).shares
    assert shares["plan"] >= 0.6 and shares["picture"] >= 0.6


def test_it_draws_without_being_told_where(studio: Studio) -> None:
    assert measures.without_a_place(studio, 10).share >= 0.7


def test_it_answers_about_two_pictures(studio: Studio) -> None:
    assert measures.answers_about_two(studio, 20).share >= 0.8


def test_it_takes_something_from_another_picture(studio: Studio) -> None:
    assert measures.borrowed(studio, 9).share >= 0.4


def test_it_tells_stories(studio: Studio) -> None:
    score = measures.stories(studio, 4)
    assert score.shares["picture 1"] >= 0.5 and score.share >= 0.5


@pytest.mark.parametrize(("seeing", "least"), [(Seeing.BEFORE, 0.8), (Seeing.PICTURE, 0.65)])
def test_it_redraws_a_part(studio: Studio, seeing: Seeing, least: float) -> None:
    assert measures.repainted(studio, 12, seeing).share >= least


def test_it_grows_pictures(studio: Studio) -> None:
    assert measures.grown(studio, 8).share >= 0.75


def test_pictures_survive_being_codes(studio: Studio) -> None:
    assert measures.round_trip(studio, 12).share >= 0.85


def test_the_full_decoder_draws_the_same(studio: Studio) -> None:
    for scene in islice(scenes("full"), 2):
        grid = studio.tokenizer.encode(draw(scene), Purpose.EDIT)
        full, turbo = read(studio.decode(grid, turbo=False)), read(studio.decode(grid))
        assert full is not None and turbo is not None and full.layout() == turbo.layout()


def test_pictures_are_prepared_at_the_models_own_sizes(studio: Studio) -> None:
    picture = draw(next(scenes("sizes")))
    assert studio.tokenizer.encode(picture, Purpose.EDIT).codes.shape == (8, 8)
    assert studio.tokenizer.encode(picture, Purpose.UNDERSTAND).codes.shape == (16, 16)
    assert studio.tokenizer.encode(picture.resize((800, 600)), Purpose.UNDERSTAND).codes.size < 320
    assert studio.codes("A red circle in the top left").codes.shape == (8, 8)

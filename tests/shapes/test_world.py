"""The world, its words, and the detector that reads it."""

from __future__ import annotations

import random
from itertools import islice, product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from llada2_mlx.shapes import grammar
from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.grammar import Change, Topic, caption, describe, edit, question
from llada2_mlx.shapes.measures import edits, prompts, questions
from llada2_mlx.shapes.world import (
    Background,
    Colour,
    Kind,
    Pattern,
    Place,
    Scene,
    Shape,
    Size,
    Tone,
    draw,
    held_out,
    held_out_shape,
    scenes,
)

PLAIN = Background(Pattern.PLAIN, Tone.WHITE)


def scene_of(*shapes: tuple[Kind, Colour, Place]) -> Scene:
    return Scene((), PLAIN).with_shapes(*(Shape(*shape, Size.LARGE) for shape in shapes))


def test_the_detector_reads_every_drawn_picture() -> None:
    for scene in islice(scenes("detector"), 100):
        assert read(draw(scene)) == scene


@pytest.mark.parametrize(
    "wear",
    [
        lambda picture: picture.resize((128, 128), Image.Resampling.BICUBIC),
        lambda picture: picture.resize((512, 512), Image.Resampling.BICUBIC),
        lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
        lambda picture: Image.fromarray(
            np.clip(np.asarray(picture) + np.random.default_rng(0).normal(0, 12, (256, 256, 3)), 0, 255).astype(
                np.uint8
            )
        ),
    ],
    ids=["half size", "double size", "blurred", "noisy"],
)
def test_the_detector_reads_worn_pictures(wear) -> None:
    for scene in islice(scenes("worn"), 20):
        assert read(wear(draw(scene))) == scene


def test_the_detector_tells_every_shape_from_every_other() -> None:
    for kind, colour, size in product(Kind, Colour, Size):
        scene = Scene((Shape(kind, colour, Place.TOP_RIGHT, size),), PLAIN)
        assert read(draw(scene)) == scene


def test_the_detector_sees_nothing_in_an_empty_picture_and_no_scene_in_noise() -> None:
    assert read(draw(Scene((), PLAIN))) == Scene((), PLAIN)
    assert read(Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))) is None


def test_held_out_combinations_are_spread_evenly() -> None:
    out = [shape for shape in product(Kind, Colour, Place) if held_out_shape(*shape)]
    assert len(out) == 16
    for values, least in ((Kind, 2), (Colour, 2), (Place, 4)):
        for value in values:
            assert sum(value in shape for shape in out) >= least


def test_a_ring_left_of_a_square_is_held_out() -> None:
    ring, square = (Kind.RING, Colour.RED, Place.TOP_LEFT), (Kind.SQUARE, Colour.RED, Place.BOTTOM_RIGHT)
    swapped = (Kind.RING, Colour.RED, Place.BOTTOM_RIGHT), (Kind.SQUARE, Colour.RED, Place.TOP_LEFT)
    assert not any(held_out_shape(*shape) for shape in (ring, square, *swapped))
    assert held_out(scene_of(ring, square)) and not held_out(scene_of(*swapped))


def test_training_scenes_and_test_scenes_have_nothing_in_common() -> None:
    assert not any(held_out(scene) for scene in islice(scenes("a", test=False), 200))
    assert all(held_out(scene) for scene in islice(scenes("a", test=True), 200))
    assert all(held_out(scene) for scene, _ in prompts(20))
    assert all(held_out(scene) for scene, _ in questions(20))
    assert all(held_out(made.result) for _, made in edits(20))


def test_a_caption_names_every_shape_with_its_colour_and_place() -> None:
    rng = random.Random(0)
    for scene in islice(scenes("captions"), 50):
        text = caption(scene, rng)
        for shape in scene.shapes:
            assert f"{shape.colour.value} {shape.kind.value}" in text and shape.place.value in text


def test_a_description_says_everything_in_one_wording() -> None:
    scene = scene_of((Kind.RING, Colour.ORANGE, Place.BOTTOM_LEFT), (Kind.STAR, Colour.RED, Place.TOP_RIGHT))
    said = "A red star in the top right and an orange ring in the bottom left, on a plain white background."
    assert describe(scene) == said


@pytest.mark.parametrize("topic", Topic)
def test_every_topic_has_questions_with_answers(topic: Topic) -> None:
    rng = random.Random(0)
    asked = [question(scene, topic, rng) for scene in islice(scenes("asked"), 100)]
    assert len({q.text for q in asked}) > 3 and len({q.answer for q in asked}) > 1


def test_answers_are_right() -> None:
    star, ring = (Kind.STAR, Colour.RED, Place.TOP_LEFT), (Kind.RING, Colour.BLUE, Place.TOP_RIGHT)
    scene, rng, answers = scene_of(star, ring), random.Random(0), {}
    for topic in Topic:
        for _ in range(200):
            asked = question(scene, topic, rng)
            assert answers.setdefault(asked.text, asked.answer) == asked.answer  # one question, one answer
    assert answers["What colour is the star?"] == "red"
    assert answers["Which shape is blue?"] == "ring"
    assert answers["How many shapes are there?"] == "two" and answers["How many stars are there?"] == "one"
    assert answers["Is there a red star?"] == "yes" and answers["Is there a blue star?"] == "no"
    assert answers["Where is the ring?"] == "in the top right"


@pytest.mark.parametrize("change", Change)
def test_an_edit_changes_what_it_says_and_nothing_else(change: Change) -> None:
    rng, seen = random.Random(0), 0
    for scene in islice(scenes("edited"), 60):
        made = edit(scene, change, rng)
        if made is None:
            continue
        seen += 1
        before, after = scene.layout(), made.result.layout()
        gone, come = before - after, after - before
        expected = {
            Change.RECOLOUR: (1, 1), Change.REMOVE: (1, 0), Change.ADD: (0, 1), Change.MOVE: (1, 1), Change.BACKGROUND: (0, 0),
        }[change]  # fmt: skip
        assert (len(gone), len(come)) == expected
        assert (scene.background == made.result.background) == (change is not Change.BACKGROUND)
        for _, colour, place in come:
            named = colour.value if change is Change.RECOLOUR else place.value
            assert named in made.instruction
    assert seen > 20


def test_a_reference_means_one_shape() -> None:
    rng = random.Random(0)
    scene = scene_of((Kind.STAR, Colour.RED, Place.TOP_LEFT), (Kind.STAR, Colour.BLUE, Place.TOP_RIGHT))
    said = {grammar.reference(scene, scene.shapes[0], rng) for _ in range(100)}
    assert "the star" not in said and {"the red star", "the star in the top left"} <= said

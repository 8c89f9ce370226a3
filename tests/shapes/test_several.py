"""Words for more than one picture, for plans, and for prompts without a place."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from llada2_mlx.shapes.grammar import placeless, plan, read_plan
from llada2_mlx.shapes.several import About, Event, Loan, borrowing, pair_question, tale
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
    held_out_pair,
    held_out_shape,
    scenes,
)


def scene_of(*shapes: tuple[Kind, Colour, Place], tone: Tone = Tone.WHITE) -> Scene:
    return Scene((), Background(Pattern.PLAIN, tone)).with_shapes(*(Shape(*shape, Size.LARGE) for shape in shapes))


STAR, RING = (Kind.STAR, Colour.RED, Place.TOP_LEFT), (Kind.RING, Colour.BLUE, Place.TOP_RIGHT)
OTHER_STAR, CIRCLE = (Kind.STAR, Colour.GREEN, Place.BOTTOM_LEFT), (Kind.CIRCLE, Colour.RED, Place.BOTTOM_RIGHT)
BOTH = scene_of(STAR, RING), scene_of(OTHER_STAR, CIRCLE, tone=Tone.GREY)


def test_a_plan_says_what_is_drawn_and_is_read_again() -> None:
    assert plan(BOTH[0]) == "Star, red, top left. Ring, blue, top right."
    for scene in islice(scenes("plans"), 50):
        assert read_plan(plan(scene)) == scene.layout()
    assert read_plan("A red star.") is None and read_plan("Star, red, middle.") is None and read_plan("") is None


def test_a_prompt_without_a_place_names_none() -> None:
    rng = random.Random(0)
    said = {placeless(BOTH[0].shapes[:1], rng) for _ in range(50)}
    assert {"A red star", "Draw a red star."} <= said
    assert not any(place.value in text for text in said for place in Place)


def test_what_is_held_out_without_a_place_is_what_is_held_out_somewhere() -> None:
    pairs = {(kind, colour) for kind in Kind for colour in Colour if held_out_pair(kind, colour)}
    assert len(pairs) == 8
    assert pairs == {(k, c) for k in Kind for c in Colour for p in Place if held_out_shape(k, c, p)}


@pytest.mark.parametrize("about", About)
def test_every_topic_has_questions_about_two_pictures(about: About) -> None:
    rng, world = random.Random(0), scenes("two")
    asked = [pair_question((next(world), next(world)), about, rng) for _ in range(100)]
    asked = [each for each in asked if each]
    assert len(asked) > 60 and len({q.text for q in asked}) > 1 and len({q.answer for q in asked}) > 1


def test_answers_about_two_pictures_are_right() -> None:
    rng, answers = random.Random(0), {}
    for about in About:
        for _ in range(600):
            if asked := pair_question(BOTH, about, rng):
                assert answers.setdefault(asked.text, asked.answer) == asked.answer  # one question, one answer
    assert answers["Which picture has the ring?"] == "the first"
    assert answers["Which picture has a green star?"] == "the second"
    assert "Which picture has the star?" not in answers  # both have one
    assert answers["Do both pictures have a star?"] == "yes"
    assert answers["Is there a circle in both pictures?"] == "no"
    assert answers["How many shapes are there in both pictures?"] == "four"
    assert answers["How many stars are in both pictures?"] == "two"
    assert answers["Which picture has more shapes?"] == "neither"
    assert answers["In the first picture, what colour is the star?"] == "red"
    assert answers["In the second picture, what colour is the star?"] == "green"
    assert answers["How many shapes are in the second picture?"] == "two"
    fewer = scene_of(STAR), BOTH[1]
    assert {pair_question(fewer, About.MORE, rng).answer for _ in range(10)} == {"the second"}


@pytest.mark.parametrize("loan", Loan)
def test_an_edit_with_a_reference_takes_what_it_says_and_keeps_the_rest(loan: Loan) -> None:
    rng, world, seen = random.Random(0), scenes("loans"), 0
    for _ in range(60):
        first, second = next(world), next(world)
        if (made := borrowing((first, second), loan, rng)) is None:
            continue
        seen += 1
        come = made.result.layout() - second.layout()
        assert second.layout() <= made.result.layout()
        if loan is Loan.BACKGROUND:
            assert not come and made.result.background == first.background != second.background
            continue
        ((kind, colour, place),) = come
        assert (kind, colour) in {(shape.kind, shape.colour) for shape in first.shapes}
        assert made.result.background == second.background
        if loan is Loan.SHAPE:
            assert (kind, colour, place) in first.layout()
        else:
            assert f"the {place.value} of the second" in made.instruction
    assert seen > 20


def test_a_story_tells_what_happens() -> None:
    rng, happened = random.Random(0), {}
    for scene in islice(scenes("stories", test=False), 300):
        told = tale(scene, 2, rng)
        assert len(told.texts) == len(told.scenes) == 3 and told.scenes[0] == scene
        for event, text, before, after in zip(told.events, told.texts[1:], told.scenes, told.scenes[1:], strict=False):
            gone, come = before.layout() - after.layout(), after.layout() - before.layout()
            counts = {Event.MOVE: (1, 1), Event.TURN: (1, 1), Event.VANISH: (1, 0), Event.COME: (0, 1)}[event]
            assert (len(gone), len(come)) == counts and before.background == after.background
            if event is Event.MOVE:
                ((_, _, start),), ((_, _, end),) = gone, come
                way = text.split("moves ")[1].rstrip(".")
                sides = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
                assert way.removeprefix("to the ") == end.value or sides[way] in set(end.value.split()) - set(
                    start.value.split()
                )
            if event is Event.TURN:
                ((kind, colour, _),) = come
                assert text.endswith(f"turns {colour.value}.") and (kind.value in text or "shape" in text)
            happened[event] = happened.get(event, 0) + 1
    assert set(happened) == set(Event)
    alone = tale(BOTH[0], 0, rng)
    assert alone.texts == ("A red star in the top left and a blue ring in the top right.",) and not alone.events
    assert alone.prompt.endswith(".")


def test_a_story_says_then_what_the_same_shape_does() -> None:
    rng = random.Random(1)
    for _ in range(200):
        told = tale(scene_of(STAR), 2, rng)
        if told.events == (Event.MOVE, Event.TURN) and "The star moves right, then turns " in told.prompt:
            assert told.texts[1] == "The star moves right." and told.texts[2].startswith("The star turns ")
            return
    raise AssertionError("no such story")

"""Words for the world: captions, questions with their answers, and edits with their results, each in several wordings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from .world import (
    MOST_SHAPES,
    Background,
    Colour,
    Kind,
    Pattern,
    Place,
    Scene,
    Shape,
    random_background,
    random_shape,
)

_Asked = tuple[str, str, tuple[Shape, ...]]  # question, answer, what it is about

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


class Topic(Enum):
    """What a question is about."""

    COLOUR = "colour"
    SHAPE = "shape"
    COUNT = "count"
    EXISTENCE = "existence"
    PLACE = "place"
    DESCRIPTION = "description"


class Change(Enum):
    """What an edit does."""

    RECOLOUR = "recolour"
    REMOVE = "remove"
    ADD = "add"
    MOVE = "move"
    BACKGROUND = "background"


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one right answer."""

    topic: Topic
    text: str
    answer: str
    about: tuple[Shape, ...]  # the shapes that answer it


@dataclass(frozen=True)
class Edit:
    """An instruction, and the scene that a picture shows after it."""

    change: Change
    instruction: str
    result: Scene


def caption(scene: Scene, rng: random.Random, with_background: bool | None = None) -> str:
    """A prompt for a scene: every shape with colour and place; size and background now and then, or the latter as told."""
    sized = rng.random() < 0.5
    shapes = list(scene.shapes)
    if rng.random() < 0.3:
        rng.shuffle(shapes)
    text = listed([_placed(shape, sized, rng) for shape in shapes])
    if with_background if with_background is not None else rng.random() < 0.7:
        text += rng.choice([", ", " "]) + "on " + _background(scene.background, rng)
    text = rng.choice(["", "", "", "A picture of ", "Draw "]) + text
    return text[0].upper() + text[1:] + rng.choice([".", ""])


def placeless(shapes: Sequence[Shape], rng: random.Random) -> str:
    """A prompt for shapes, wherever they may be: ``A red circle``."""
    sized = rng.random() < 0.3
    text = rng.choice(["", "", "", "A picture of ", "Draw "]) + listed([_named(shape, sized) for shape in shapes])
    return text[0].upper() + text[1:] + rng.choice([".", ""])


def plan(scene: Scene) -> str:
    """The one plan of a scene that counts as right: ``Circle, red, top left. Star, blue, bottom right.``"""
    said = [f"{shape.kind.value}, {shape.colour.value}, {shape.place.value}." for shape in scene.shapes]
    return " ".join(sentence.capitalize() for sentence in said)


def read_plan(text: str) -> set[tuple[Kind, Colour, Place]] | None:
    """What a plan says is to be drawn, as ``Scene.layout``; None where it is no plan."""
    found = set()
    for sentence in text.lower().split(". "):
        try:
            kind, colour, place = sentence.rstrip(".").split(", ")
            found.add((Kind(kind), Colour(colour), Place(place)))
        except ValueError:
            return None
    return found


def describe(scene: Scene) -> str:
    """The one description of a scene that counts as right."""
    return f"{placed(scene)}, on {_background(scene.background)}.".capitalize()


def placed(scene: Scene) -> str:
    """The shapes of a scene with their places, in one wording."""
    return listed([f"{_named(shape)} in the {shape.place.value}" for shape in scene.shapes])


def question(scene: Scene, topic: Topic, rng: random.Random) -> Question:
    """A question about a scene."""
    return Question(topic, *_QUESTIONS[topic](scene, rng))


def edit(scene: Scene, change: Change, rng: random.Random) -> Edit | None:
    """An edit of a scene; None where there is nothing to do it to."""
    made = _EDITS[change](scene, rng)
    return made and Edit(change, *made)


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def listed(parts: list[str]) -> str:
    """Parts of a sentence: ``a, b and c``."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _named(shape: Shape, sized: bool = False) -> str:
    return article(f"{shape.size.value + ' ' if sized else ''}{shape.colour.value} {shape.kind.value}")


def _placed(shape: Shape, sized: bool, rng: random.Random) -> str:
    where = rng.choice(["in the {}", "in the {}", "at the {}", "in the {} corner"])
    return f"{_named(shape, sized)} {where.format(shape.place.value)}"


def _background(background: Background, rng: random.Random | None = None) -> str:
    """A background as a noun phrase; without random numbers in the wording of descriptions."""
    tone = background.tone.value
    wordings = {
        Pattern.PLAIN: [f"a plain {tone} background", f"{article(tone)} background", f"plain {tone}"],
        Pattern.GRADIENT: [
            f"{article(tone)} gradient",
            f"a gradient of {tone}",
            f"{article(tone)} gradient background",
        ],
        Pattern.STRIPED: [f"{tone} stripes", f"a striped {tone} background", f"a background of {tone} stripes"],
    }[background.pattern]
    return rng.choice(wordings) if rng else wordings[0]


def _unique(scene: Scene, key: Callable[[Shape], object]) -> list[Shape]:
    """The shapes that a property tells from the others."""
    values = [key(shape) for shape in scene.shapes]
    return [shape for shape in scene.shapes if values.count(key(shape)) == 1]


def reference(scene: Scene, shape: Shape, rng: random.Random) -> str:
    """Words that mean this shape and no other of the scene."""
    ways = [f"the {shape.kind.value} in the {shape.place.value}", f"the shape in the {shape.place.value}"]
    if shape in _unique(scene, lambda s: s.kind):
        ways += [f"the {shape.kind.value}"] * 2
    if shape in _unique(scene, lambda s: (s.kind, s.colour)):
        ways += [f"the {shape.colour.value} {shape.kind.value}"] * 2
    return rng.choice(ways)


def _ask_colour(scene: Scene, rng: random.Random) -> _Asked:
    shape = rng.choice(scene.shapes)
    ways = [f"the shape in the {shape.place.value}", f"the {shape.kind.value} in the {shape.place.value}"]
    if shape in _unique(scene, lambda s: s.kind):
        ways += [f"the {shape.kind.value}"] * 2
    wording = rng.choice(["What colour is {}?", "What color is {}?", "Which colour does {} have?"])
    return wording.format(rng.choice(ways)), shape.colour.value, (shape,)


def _ask_shape(scene: Scene, rng: random.Random) -> _Asked:
    by_colour = _unique(scene, lambda s: s.colour)
    if by_colour and rng.random() < 0.5:
        shape = rng.choice(by_colour)
        wording = rng.choice(["Which shape is {}?", "What shape is {}?"])
        return wording.format(shape.colour.value), shape.kind.value, (shape,)
    shape = rng.choice(scene.shapes)
    return f"{rng.choice(['What', 'Which'])} shape is in the {shape.place.value}?", shape.kind.value, (shape,)


def _ask_count(scene: Scene, rng: random.Random) -> _Asked:
    if rng.random() < 0.5:
        wording = rng.choice(["How many shapes are there?", "How many shapes are in the picture?"])
        return wording, NUMBERS[len(scene.shapes)], scene.shapes
    kind = rng.choice([shape.kind for shape in scene.shapes] + [rng.choice(list(Kind))])
    wording = rng.choice(["How many {}s are there?", "How many {}s are in the picture?", "How many {}s can you see?"])
    counted = tuple(shape for shape in scene.shapes if shape.kind is kind)
    return wording.format(kind.value), NUMBERS[len(counted)], counted


def _ask_existence(scene: Scene, rng: random.Random) -> _Asked:
    shape = rng.choice(scene.shapes)
    kind, colour = shape.kind, shape.colour
    if rng.random() < 0.6:  # a shape that is nearly there
        if rng.random() < 0.5:
            kind = rng.choice(list(Kind))
        else:
            colour = rng.choice(list(Colour))
    wording = rng.choice(["Is there {}?", "Is there {} in the picture?", "Can you see {}?"])
    if rng.random() < 0.3:
        there = tuple(s for s in scene.shapes if s.kind is kind)
        return wording.format(article(kind.value)), _yes(there), there
    there = tuple(s for s in scene.shapes if s.kind is kind and s.colour is colour)
    return wording.format(article(f"{colour.value} {kind.value}")), _yes(there), there


def _ask_place(scene: Scene, rng: random.Random) -> _Asked:
    by_kind, by_both = _unique(scene, lambda s: s.kind), _unique(scene, lambda s: (s.kind, s.colour))
    if by_kind and (not by_both or rng.random() < 0.5):
        shape = rng.choice(by_kind)
        name = shape.kind.value
    elif by_both:
        shape = rng.choice(by_both)
        name = f"{shape.colour.value} {shape.kind.value}"
    else:  # two shapes that only their places tell apart
        kind = rng.choice([kind for kind in Kind if all(s.kind is not kind for s in scene.shapes)])
        return f"Where is the {kind.value}?", "nowhere", ()
    wording = rng.choice(["Where is the {}?", "In which corner is the {}?", "Where can you see the {}?"])
    return wording.format(name), f"in the {shape.place.value}", (shape,)


def _ask_description(scene: Scene, rng: random.Random) -> _Asked:
    wordings = [
        "Describe the picture.",
        "Describe this image in detail.",
        "What is in the picture?",
        "What do you see?",
    ]
    return rng.choice(wordings), describe(scene), scene.shapes


def _yes(there: tuple[Shape, ...]) -> str:
    return "yes" if there else "no"


def _recolour(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    shape = rng.choice(scene.shapes)
    colour = rng.choice([colour for colour in Colour if colour is not shape.colour])
    wording = rng.choice(
        [
            "Make {} {}.",
            "Paint {} {}.",
            "Turn {} {}.",
            "Change the colour of {} to {}.",
            "Change the color of {} to {}.",
        ]
    )
    changed = [replace(s, colour=colour) if s is shape else s for s in scene.shapes]
    return wording.format(reference(scene, shape, rng), colour.value), scene.with_shapes(*changed)


def _remove(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    if len(scene.shapes) < 2:
        return None
    shape = rng.choice(scene.shapes)
    wording = rng.choice(["Remove {}.", "Delete {}.", "Take away {}."])
    return wording.format(reference(scene, shape, rng)), scene.with_shapes(*(s for s in scene.shapes if s is not shape))


def _add(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    if len(scene.shapes) == MOST_SHAPES:
        return None
    shape = random_shape(rng, rng.choice(scene.free()))
    name = _placed(shape, rng.random() < 0.5, rng)
    return rng.choice(["Add {}.", "Put {}.", "Draw {}."]).format(name), scene.with_shapes(*scene.shapes, shape)


def _move(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    shape, place = rng.choice(scene.shapes), rng.choice(scene.free())
    wording = rng.choice(["Move {} to the {}.", "Put {} into the {} corner.", "Shift {} to the {}."])
    moved = [replace(s, place=place) if s is shape else s for s in scene.shapes]
    return wording.format(reference(scene, shape, rng), place.value), scene.with_shapes(*moved)


def _change_background(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    background = random_background(rng)
    if background == scene.background:
        return None
    wording = rng.choice(["Change the background to {}.", "Put it on {}.", "Replace the background with {}."])
    return wording.format(_background(background, rng)), replace(scene, background=background)


_QUESTIONS = {
    Topic.COLOUR: _ask_colour,
    Topic.SHAPE: _ask_shape,
    Topic.COUNT: _ask_count,
    Topic.EXISTENCE: _ask_existence,
    Topic.PLACE: _ask_place,
    Topic.DESCRIPTION: _ask_description,
}
_EDITS = {
    Change.RECOLOUR: _recolour,
    Change.REMOVE: _remove,
    Change.ADD: _add,
    Change.MOVE: _move,
    Change.BACKGROUND: _change_background,
}

"""Words for more than one picture: questions about two, edits that take something from another picture, and stories."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum

from .grammar import NUMBERS, Question, Topic, article, caption, placed, question, reference
from .world import MOST_SHAPES, Colour, Kind, Scene, Shape, random_shape

ORDINALS = ("first", "second")
MOST_PICTURES = 3  # of a story

_Pair = tuple[Scene, Scene]
_Asked = tuple[str, str, tuple[tuple[int, Shape], ...]]  # question, answer, what it is about


class About(Enum):
    """What a question about two pictures is about."""

    WHICH = "which"
    BOTH = "both"
    TOTAL = "total"
    MORE = "more"
    ONE = "one of them"


class Loan(Enum):
    """What an edit takes from the first picture."""

    SHAPE = "shape"
    PLACED = "shape to a place"
    BACKGROUND = "background"


class Event(Enum):
    """What happens between two pictures of a story."""

    MOVE = "move"
    TURN = "turn"
    VANISH = "vanish"
    COME = "come"


@dataclass(frozen=True)
class PairQuestion:
    """A question about two scenes and its one right answer."""

    about: About
    text: str
    answer: str
    shapes: tuple[tuple[int, Shape], ...]  # the shapes that answer it, with the number of their picture from 0
    topic: Topic | None = None  # where it is about one of the pictures


@dataclass(frozen=True)
class Borrowing:
    """An instruction for two pictures, and the scene that the second shows after it."""

    loan: Loan
    instruction: str
    result: Scene
    taken: Shape | None  # the shape of the first picture


@dataclass(frozen=True)
class Tale:
    """A story: what is asked for, and the texts and scenes that tell it in turn."""

    prompt: str
    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    events: tuple[Event, ...]  # before the second scene, before the third


def pair_question(scenes: _Pair, about: About, rng: random.Random) -> PairQuestion | None:
    """A question about two scenes; None where there is none of this kind."""
    if about is About.ONE:
        return _ask_one(scenes, rng)
    asked = _QUESTIONS[about](scenes, rng)
    return asked and PairQuestion(about, *asked)


def borrowing(scenes: _Pair, loan: Loan, rng: random.Random) -> Borrowing | None:
    """An edit of the second scene by something of the first; None where there is nothing to take or no room."""
    first, second = scenes
    if loan is Loan.BACKGROUND:
        if first.background == second.background:
            return None
        wording = rng.choice(
            [
                "Give the second picture the background of the first.",
                "Put the second picture on the background of the first.",
            ]
        )
        return Borrowing(loan, wording, replace(second, background=first.background), None)
    if len(second.shapes) == MOST_SHAPES:
        return None
    if loan is Loan.PLACED:
        shape, place = rng.choice(first.shapes), rng.choice(second.free())
        wording = rng.choice(
            [
                "Put {} of the first picture into the {} of the second.",
                "Copy {} of the first picture to the {} of the second.",
            ]
        )
    else:
        fits = [shape for shape in first.shapes if not second.at(shape.place)]
        if not fits:
            return None
        shape = rng.choice(fits)
        place = shape.place
        wording = rng.choice(
            [
                "Put {} of the first picture into the second.",
                "Copy {} of the first picture to the second.",
                "Add {} of the first picture to the second.",
            ]
        )
    words = wording.format(reference(first, shape, rng), place.value)
    return Borrowing(loan, words, second.with_shapes(*second.shapes, replace(shape, place=place)), shape)


def tale(scene: Scene, events: int, rng: random.Random) -> Tale:
    """A story that begins with a scene, and of which ``events`` more pictures tell what happens."""
    scenes, texts, said, happened = [scene], [f"{placed(scene)}.".capitalize()], [], []
    before: Shape | None = None  # what the last sentence was about
    for _ in range(events):
        found = None
        while found is None:
            event = rng.choice(list(Event))
            found = _EVENTS[event](scenes[-1], rng)
        shape, subject, verb, result = found
        texts.append(f"{subject} {verb}."[0].upper() + f"{subject} {verb}."[1:])
        said.append(verb if shape is not None and shape is before else f"{subject} {verb}")
        before = next((s for s in result.shapes if shape and s not in scenes[-1].shapes), None) if shape else None
        happened.append(event)
        scenes.append(result)
    prompt = caption(scene, rng).rstrip(".") + "."
    if said:
        sentence = ", then ".join(said)
        prompt += f" {sentence[0].upper()}{sentence[1:]}."
    return Tale(prompt, tuple(texts), tuple(scenes), tuple(happened))


def _called(scene: Scene, shape: Shape) -> str:
    """The one name of a shape in a story."""
    kinds, both = ([key(s) for s in scene.shapes] for key in (lambda s: s.kind, lambda s: (s.kind, s.colour)))
    if kinds.count(shape.kind) == 1:
        return f"the {shape.kind.value}"
    if both.count((shape.kind, shape.colour)) == 1:
        return f"the {shape.colour.value} {shape.kind.value}"
    return f"the shape in the {shape.place.value}"


_Happened = tuple[Shape | None, str, str, Scene]  # who, by which name, does what, and then


def _move(scene: Scene, rng: random.Random) -> _Happened | None:
    shape, place = rng.choice(scene.shapes), rng.choice(scene.free())
    (vertical, across), (down, along) = (where.value.split() for where in (shape.place, place))
    way = f"to the {place.value}"
    if vertical == down:
        way = along
    elif across == along:
        way = "down" if down == "bottom" else "up"
    moved = scene.with_shapes(*(replace(s, place=place) if s is shape else s for s in scene.shapes))
    return shape, _called(scene, shape), f"moves {way}", moved


def _turn(scene: Scene, rng: random.Random) -> _Happened | None:
    shape = rng.choice(scene.shapes)
    colour = rng.choice([colour for colour in Colour if colour is not shape.colour])
    turned = scene.with_shapes(*(replace(s, colour=colour) if s is shape else s for s in scene.shapes))
    return shape, _called(scene, shape), f"turns {colour.value}", turned


def _vanish(scene: Scene, rng: random.Random) -> _Happened | None:
    if len(scene.shapes) < 2:
        return None
    shape = rng.choice(scene.shapes)
    left = scene.with_shapes(*(s for s in scene.shapes if s is not shape))
    return shape, _called(scene, shape), "vanishes", left


def _come(scene: Scene, rng: random.Random) -> _Happened | None:
    if len(scene.shapes) == MOST_SHAPES:
        return None
    shape = random_shape(rng, rng.choice(scene.free()))
    subject = article(f"{shape.colour.value} {shape.kind.value}")
    return None, subject, f"comes to the {shape.place.value}", scene.with_shapes(*scene.shapes, shape)


_EVENTS = {Event.MOVE: _move, Event.TURN: _turn, Event.VANISH: _vanish, Event.COME: _come}


def _ask_which(scenes: _Pair, rng: random.Random) -> _Asked | None:
    """By kind, or by colour and kind, whichever tells the pictures apart."""
    ways = []
    for number, (own, other) in enumerate((scenes, scenes[::-1])):
        for shape in own.shapes:
            for name, key in (
                (shape.kind.value, lambda s: s.kind),
                (f"{shape.colour.value} {shape.kind.value}", lambda s: (s.kind, s.colour)),
            ):
                if all(key(s) != key(shape) for s in other.shapes):
                    ways.append((name, number, tuple((number, s) for s in own.shapes if key(s) == key(shape))))
    if not ways:
        return None
    name, number, shapes = rng.choice(ways)
    thing = f"the {name}" if len(shapes) == 1 and rng.random() < 0.5 else article(name)
    wording = rng.choice(["Which picture has {}?", "In which picture is {}?", "In which picture can you see {}?"])
    return wording.format(thing), f"the {ORDINALS[number]}", shapes


def _ask_both(scenes: _Pair, rng: random.Random) -> _Asked:
    shape = rng.choice(rng.choice(scenes).shapes)
    by_colour = rng.random() < 0.3
    same = lambda s: s.kind is shape.kind and (not by_colour or s.colour is shape.colour)
    there = tuple((number, s) for number, scene in enumerate(scenes) for s in scene.shapes if same(s))
    name = f"{shape.colour.value} {shape.kind.value}" if by_colour else shape.kind.value
    wording = rng.choice(["Do both pictures have {}?", "Is there {} in both pictures?"])
    answer = "yes" if {number for number, _ in there} == {0, 1} else "no"
    return wording.format(article(name)), answer, there


def _ask_total(scenes: _Pair, rng: random.Random) -> _Asked:
    everything = tuple((number, shape) for number, scene in enumerate(scenes) for shape in scene.shapes)
    if rng.random() < 0.5:
        what, counted = "shape", everything
    else:
        kind = rng.choice([shape.kind for _, shape in everything] + [rng.choice(list(Kind))])
        what, counted = kind.value, tuple(each for each in everything if each[1].kind is kind)
    wording = rng.choice(["How many {}s are there in both pictures?", "How many {}s are in both pictures?"])
    return wording.format(what), NUMBERS[len(counted)], counted


def _ask_more(scenes: _Pair, rng: random.Random) -> _Asked:
    counts = [len(scene.shapes) for scene in scenes]
    answer = "neither" if counts[0] == counts[1] else f"the {ORDINALS[counts[1] > counts[0]]}"
    everything = tuple((number, shape) for number, scene in enumerate(scenes) for shape in scene.shapes)
    wording = rng.choice(["Which picture has more shapes?", "In which picture are more shapes?"])
    return wording, answer, everything


def _ask_one(scenes: _Pair, rng: random.Random) -> PairQuestion:
    number, topic = rng.randrange(2), rng.choice(list(Topic))
    asked: Question = question(scenes[number], topic, rng)
    name, text = f"the {ORDINALS[number]} picture", asked.text
    for words in ("the picture", "this image"):
        text = text.replace(words, name)
    if name not in text:
        text = f"In {name}, {text[0].lower()}{text[1:]}"
    return PairQuestion(About.ONE, text, asked.answer, tuple((number, shape) for shape in asked.about), topic)


_QUESTIONS = {About.WHICH: _ask_which, About.BOTH: _ask_both, About.TOTAL: _ask_total, About.MORE: _ask_more}

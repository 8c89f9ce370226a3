"""How well a model does in the world: every measure on held-out scenes, read by the detector.

``python -m llada2_mlx.shapes.measures`` prints the table of what it learned first, with ``--further`` that of the rest.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ..backbone.sprint import Sprint
from ..checkpoint.config import PRECISIONS
from ..checkpoint.layout import BUILT_IN, Checkpoint
from ..errors import RequestError
from ..tasks import Seeing
from .detector import read
from .grammar import Change, Edit, Question, Topic, caption, edit, placeless, question, read_plan
from .several import MOST_PICTURES, About, Loan, borrowing, pair_question, tale
from .studio import Studio
from .world import Colour, Kind, Place, Scene, Shape, Size, draw, held_out, held_out_pair, scenes

T = TypeVar("T")


@dataclass
class Score:
    """How many of how many, in all and of each kind."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, right: bool) -> None:
        """Count one more."""
        self.asked[kind] += 1
        self.right[kind] += right

    @property
    def share(self) -> float:
        """Of all, 0 .. 1."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))

    @property
    def shares(self) -> dict[str, float]:
        """Of each kind."""
        return {kind: self.right[kind] / asked for kind, asked in self.asked.items()}

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {100 * share:.0f}" for kind, share in self.shares.items())
        return f"{100 * self.share:.1f} % of {sum(self.asked.values())}" + (
            f" ({kinds})" if len(self.asked) > 1 else ""
        )


def prompts(count: int, with_background: bool | None = None) -> Iterator[tuple[Scene, str]]:
    """Held-out scenes and a caption for each."""
    rng = random.Random("test captions")
    for scene in islice(scenes("test prompts", test=True), count):
        yield scene, caption(scene, rng, with_background)


def questions(count: int) -> Iterator[tuple[Scene, Question]]:
    """Held-out scenes and a question about each, the topics in turn."""
    rng = random.Random("test questions")
    for scene, topic in zip(islice(scenes("test questions", test=True), count), cycle(Topic)):
        yield scene, question(scene, topic, rng)


def edits(count: int) -> Iterator[tuple[Scene, Edit]]:
    """Scenes and an edit for each, the changes in turn; the result is held out."""
    rng, changes, done = random.Random("test edits"), cycle(Change), 0
    change = next(changes)
    for scene in scenes("test edits"):
        if done == count:
            return
        made = edit(scene, change, rng)
        if made and held_out(made.result):
            yield scene, made
            done, change = done + 1, next(changes)


def same_layout(picture: Image.Image, scene: Scene) -> bool:
    """Whether a picture shows the scene's shapes, each in its colour and place, and no other."""
    found = read(picture)
    return found is not None and found.layout() == scene.layout()


def same_scene(picture: Image.Image, scene: Scene) -> bool:
    """The same, and its background."""
    found = read(picture)
    return found is not None and found.layout() == scene.layout() and found.background == scene.background


def text_to_image(studio: Studio, count: int, guidance: float = 2.0, turbo: bool = True) -> Score:
    """Pictures for prompts: all shapes there, with the right colour and place."""
    score = Score()
    for scene, prompt in prompts(count):
        picture = studio.decode(studio.codes(prompt, guidance), turbo)
        score.add(f"{len(scene.shapes)} shapes", same_layout(picture, scene))
    return score


def round_trip(studio: Studio, count: int) -> Score:
    """Drawn pictures through codes and back: the same scene read."""
    score = Score()
    for scene in islice(scenes("test round trip", test=True), count):
        score.add(f"{len(scene.shapes)} shapes", same_scene(studio.redraw(draw(scene)), scene))
    return score


def answers(studio: Studio, count: int) -> Score:
    """Questions about drawn pictures: the exact answer."""
    score = Score()
    for scene, asked in questions(count):
        score.add(asked.topic.value, studio.ask(draw(scene), asked.text) == asked.answer)
    return score


def own_answers(studio: Studio, count: int) -> Score:
    """Questions about pictures that the model drew itself: the exact answer by the prompt."""
    score, rng, topics = Score(), random.Random("test own questions"), cycle(Topic)
    for (scene, prompt), topic in zip(prompts(count, with_background=True), topics):
        asked = question(scene, topic, rng)
        score.add(topic.value, studio.ask(studio.draw(prompt), asked.text) == asked.answer)
    return score


def edited(studio: Studio, count: int) -> Score:
    """Edits of drawn pictures: the change made and the rest kept, background and all."""
    score = Score()
    for scene, made in edits(count):
        picture = studio.edit(draw(scene), made.instruction)
        score.add(made.change.value, same_scene(picture, made.result))
    return score


def thinking(studio: Studio, count: int) -> Score:
    """Pictures for prompts after a plan in words: the plan names all shapes, and the picture shows them."""
    score = Score()
    for scene, prompt in prompts(count):
        plan, picture = _asked(lambda prompt=prompt: studio.think(prompt), ("", None))
        score.add("plan", read_plan(plan) == scene.layout())
        score.add("picture", picture is not None and same_layout(picture, scene))
    return score


def without_a_place(studio: Studio, count: int) -> Score:
    """Pictures for prompts that name one shape and no place: it is there once, somewhere, and nothing else."""
    score, rng = Score(), random.Random("test without a place")
    names = cycle((kind, colour) for kind in Kind for colour in Colour if held_out_pair(kind, colour))
    for kind, colour in islice(names, count):
        shape = Shape(kind, colour, rng.choice(list(Place)), rng.choice(list(Size)))
        found = read(studio.draw(placeless([shape], rng)))
        shown = [(each.kind, each.colour) for each in found.shapes] if found else None
        score.add(kind.value, shown == [(kind, colour)])
    return score


def answers_about_two(studio: Studio, count: int) -> Score:
    """Questions about two drawn pictures, both of them held out: the exact answer."""
    score, rng, topics = Score(), random.Random("test two"), cycle(About)
    world, about = scenes("test two", test=True), next(topics)
    while sum(score.asked.values()) < count:
        both = next(world), next(world)
        if asked := pair_question(both, about, rng):
            score.add(about.value, studio.ask_about([draw(scene) for scene in both], asked.text) == asked.answer)
            about = next(topics)
    return score


def borrowed(studio: Studio, count: int) -> Score:
    """Edits that take something from a reference: it is there, and the rest is kept; the result is held out."""
    score, rng, kinds = Score(), random.Random("test borrowing"), cycle(Loan)
    world, loan = scenes("test borrowing"), next(kinds)
    while sum(score.asked.values()) < count:
        both = next(world), next(world)
        made = borrowing(both, loan, rng)
        if made and held_out(made.result):
            picture = studio.edit_with([draw(scene) for scene in both], made.instruction)
            score.add(loan.value, same_scene(picture, made.result))
            loan = next(kinds)
    return score


def stories(studio: Studio, count: int) -> Score:
    """Stories of three pictures, the last of them held out: all texts as they should be, and what each picture shows."""
    score, rng = Score(), random.Random("test stories")
    told = (tale(scene, MOST_PICTURES - 1, rng) for scene in scenes("test stories"))
    for wanted in islice((each for each in told if held_out(each.scenes[-1])), count):
        texts, pictures = _asked(lambda wanted=wanted: studio.tell(wanted.prompt), ([], []))
        score.add("texts", texts == list(wanted.texts))
        score.add("number of pictures", len(pictures) == len(wanted.scenes))
        for number, scene in enumerate(wanted.scenes):
            shown = number < len(pictures) and same_layout(pictures[number], scene)
            score.add(f"picture {number + 1}", shown)
    return score


def repainted(studio: Studio, count: int, seeing: Seeing) -> Score:
    """Drawn pictures of which the places that an edit changes are drawn anew: the change made and the rest kept."""
    score, rng = Score(), random.Random("test redrawing")
    wanted = (pair for pair in edits(2 * count) if pair[1].change is not Change.BACKGROUND)
    for scene, made in islice(wanted, count):
        changed = [place for place in Place if scene.at(place) != made.result.at(place)]
        masked = np.zeros((8, 8), bool)
        for place in changed:
            row, column = 4 * ("bottom" in place.value), 4 * (not place.left)
            masked[row : row + 4, column : column + 4] = True
        text = made.instruction if seeing is Seeing.PICTURE else caption(made.result, rng, with_background=True)
        picture = studio.repaint(draw(scene), masked, text, seeing)
        score.add(made.change.value, same_scene(picture, made.result))
    return score


def grown(studio: Studio, count: int) -> Score:
    """Drawn pictures of which a half that shows something is cut away and grown again: the whole scene, background and all.

    The sides come in turn; the prompt is a caption of the whole. No lesson is about it: those of redrawing mask the
    places that an edit changes, one or two, and a little around them.
    """
    score, rng, sides = Score(), random.Random("test growing"), cycle(("left", "right", "top", "bottom"))
    world = scenes("test growing", test=True)
    for side in islice(sides, count):
        scene = next(scene for scene in world if any(side in shape.place.value for shape in scene.shapes))
        picture = studio.regrow(draw(scene), side, caption(scene, rng, with_background=True))
        score.add(side, same_scene(picture, scene))
    return score


def _asked(work: Callable[[], T], otherwise: T) -> T:
    """What ``work`` gives; ``otherwise`` where the model wrote what is no picture, plan or story."""
    try:
        return work()
    except RequestError:
        return otherwise


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(studio: Studio, say: Callable[[str], None], scale: float = 1.0, only: Sequence[str] = ()) -> None:
    """Tell the measures of what it learned first, with what it should be.

    Args:
        scale: the share of the pictures to take.
        only: names of rows; all if there are none.
    """
    count = lambda full: max(1, round(full * scale))
    _tell(
        say,
        only,
        (
            ("text to image", "90 %", lambda: text_to_image(studio, count(200))),
            (
                "text to image, guidance 1.0",
                "less than at 2.0",
                lambda: text_to_image(studio, count(200), guidance=1.0),
            ),
            ("text to image, guidance 0", "near chance", lambda: text_to_image(studio, count(25), guidance=0.0)),
            (
                "text to image, full decoder",
                "within 5 points of turbo",
                lambda: text_to_image(studio, count(25), turbo=False),
            ),
            ("picture, codes, picture", "95 %", lambda: round_trip(studio, count(200))),
            ("question about a drawn picture", "90 %, each kind 80 %", lambda: answers(studio, count(300))),
            ("question about its own picture", "85 %", lambda: own_answers(studio, count(50))),
            ("edit", "80 %, each kind 60 %", lambda: edited(studio, count(100))),
        ),
    )
    if only:
        return
    scene, prompt = next(prompts(1))
    for name, wanted, work in (
        (
            "256 x 256 picture, all stages, turbo",
            "20 s",
            lambda: Studio(studio.checkpoint, studio.precision, studio.sprint, studio.engine).draw(prompt),
        ),
        ("answer", "5 s", lambda: studio.ask(draw(scene), "What is in the picture?")),
    ):
        say(f"| {name} | under {wanted} | {seconds(work):.1f} s |")


def further_table(studio: Studio, say: Callable[[str], None], scale: float = 1.0, only: Sequence[str] = ()) -> None:
    """The same of what it learned later: plans, several pictures, stories and redrawing; and growing."""
    count = lambda full: max(1, round(full * scale))
    _tell(
        say,
        only,
        (
            ("picture after a plan", "each kind 80 %", lambda: thinking(studio, count(100))),
            ("picture for a prompt without a place", "80 %", lambda: without_a_place(studio, count(80))),
            ("question about two pictures", "80 %", lambda: answers_about_two(studio, count(150))),
            ("edit with a reference", "80 %", lambda: borrowed(studio, count(90))),
            ("story of three pictures", "each kind 80 %", lambda: stories(studio, count(50))),
            ("redrawing, the picture seen", "80 %", lambda: repainted(studio, count(80), Seeing.PICTURE)),
            ("redrawing, what comes before seen", "80 %", lambda: repainted(studio, count(80), Seeing.BEFORE)),
            ("growing a picture", "80 %", lambda: grown(studio, count(80))),
        ),
    )


def _tell(
    say: Callable[[str], None], only: Sequence[str], rows: Sequence[tuple[str, str, Callable[[], object]]]
) -> None:
    names = [name for name, *_ in rows]
    if unknown := set(only).difference(names):
        raise SystemExit(f"There is no row {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    say("| measure | should be | is |\n|---|---|---|")
    for name, wanted, measure in rows:
        if only and name not in only:
            continue
        say(f"| {name} | {wanted} | {measure()} |")


def main() -> None:
    """Print the table of a model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="a model folder; the built-in one if left out")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the backbone")
    parser.add_argument("--scale", type=float, default=1.0, help="the share of the pictures to take")
    parser.add_argument(
        "--keep-ratio", type=float, help="draw and answer with SPRINT, which keeps this much of the prefix"
    )
    parser.add_argument(
        "--further",
        action="store_true",
        help="plans, several pictures, stories, redrawing and growing, in place of the first table",
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="rows of the table, by their names")
    parser.add_argument("--engine", choices=("torch", "mlx", "mlx-8bit"), default="torch", help="of the decoders")
    arguments = parser.parse_args()
    sprint = None if arguments.keep_ratio is None else Sprint(arguments.keep_ratio)
    studio = Studio(Checkpoint(arguments.model), arguments.precision, sprint, arguments.engine)
    tell = further_table if arguments.further else table
    tell(studio, lambda line: print(line, flush=True), arguments.scale, arguments.only)


if __name__ == "__main__":
    sys.exit(main())

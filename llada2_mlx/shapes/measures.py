"""How well a model does in the world: every measure on held-out scenes, read by the detector.

``python -m llada2_mlx.shapes.measures`` prints the whole table.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

from ..backbone.sprint import Sprint
from ..checkpoint.config import PRECISIONS
from ..checkpoint.layout import BUILT_IN, Checkpoint
from .detector import read
from .grammar import Change, Edit, Question, Topic, caption, edit, question
from .studio import Studio
from .world import Scene, draw, held_out, scenes


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


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(studio: Studio, say: Callable[[str], None], scale: float = 1.0) -> None:
    """Tell every measure, with what it should be. ``scale`` takes that share of the pictures."""
    count = lambda full: max(1, round(full * scale))
    rows: Iterable[tuple[str, str, Callable[[], object]]] = (
        ("text to image", "90 %", lambda: text_to_image(studio, count(200))),
        ("text to image, guidance 1.0", "less than at 2.0", lambda: text_to_image(studio, count(200), guidance=1.0)),
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
    )
    say("| measure | should be | is |\n|---|---|---|")
    for name, wanted, measure in rows:
        say(f"| {name} | {wanted} | {measure()} |")
    scene, prompt = next(prompts(1))
    for name, wanted, work in (
        (
            "256 x 256 picture, all stages, turbo",
            "20 s",
            lambda: Studio(studio.checkpoint, studio.precision, studio.sprint).draw(prompt),
        ),
        ("answer", "5 s", lambda: studio.ask(draw(scene), "What is in the picture?")),
    ):
        say(f"| {name} | under {wanted} | {seconds(work):.1f} s |")


def main() -> None:
    """Print the table of a model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="a model folder; the built-in one if left out")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the backbone")
    parser.add_argument("--scale", type=float, default=1.0, help="the share of the pictures to take")
    parser.add_argument(
        "--keep-ratio", type=float, help="draw and answer with SPRINT, which keeps this much of the prefix"
    )
    arguments = parser.parse_args()
    sprint = None if arguments.keep_ratio is None else Sprint(arguments.keep_ratio)
    studio = Studio(Checkpoint(arguments.model), arguments.precision, sprint)
    table(studio, lambda line: print(line, flush=True), arguments.scale)


if __name__ == "__main__":
    sys.exit(main())

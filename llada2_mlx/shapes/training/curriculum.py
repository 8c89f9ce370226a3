"""What the backbone learns: captions, questions and edits, with the prompts that the tasks use.

Several questions share the clean blocks of their picture. An edit is learned with its instruction and without it on the
same masks, and so is what guidance makes of the two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import repeat

import torch

from ... import prompts
from ...backbone.guidance import Guidance
from ...tokens import Tokens
from ...vq import VQGrid
from ..grammar import Question, Topic, caption, question
from ..world import Colour, Kind, Place, Scene, Shape, held_out_shape
from .packed import BLOCK, INSTRUCTION, PARTS, Packed, aligned, find, part, stacked
from .tokenizer import CODES, patch_names

BATCHES = {"draw": 20, "edit": 7, "ask": 8, "ask small": 16}  # pictures, each with QUESTIONS where it is asked about
QUESTIONS = 5
GUIDED = {"edit": Guidance.editing(text_scale=4.0, image_scale=0.0)}  # as the tasks do it
COLOURS, KINDS = 1 + len(Colour), 1 + len(Kind)  # with none
DROPPED = 0.1  # share of prompts, and of the source pictures of edits, left out for guidance


@dataclass(frozen=True)
class Example:
    """A scene that the backbone may see, its codes, and what an edit makes of it."""

    scene: Scene
    small: list[list[int]]  # as it is drawn and edited
    large: list[list[int]]  # as it is understood
    instruction: str
    result: Scene
    changed: list[list[int]]
    any_before: frozenset[int] = frozenset()  # which of ``small`` and of ``changed`` may be any codes, by their index
    any_after: frozenset[int] = frozenset()


class Curriculum:
    """Draws training batches from examples.

    Args:
        tokens: of the checkpoint whose prompts are to be learned.
        examples: none of them held out.
        scrambled: share of edits in which any codes stand where they are only to be copied.
    """

    def __init__(self, tokens: Tokens, examples: Sequence[Example], scrambled: float = 0.0) -> None:
        self.tokens, self.examples, self.scrambled = tokens, examples, scrambled
        self.sizes = dict(BATCHES)
        self.makers: dict[str, Callable[[random.Random], list[Packed]]] = {
            task: partial(self._any, make, examples)
            for task, make in {
                "draw": self._draw,
                "edit": self._edit,
                "ask": self._ask,
                "ask small": self._ask_small,
            }.items()
        }

    @staticmethod
    def _any(
        make: Callable[[Example, random.Random], list[Packed]], examples: Sequence[Example], rng: random.Random
    ) -> list[Packed]:
        return make(rng.choice(examples), rng)

    def batch(self, task: str, rng: random.Random) -> dict[str, torch.Tensor]:
        """A batch of a task; see ``stacked``."""
        make = self.makers[task]
        return stacked([made for _ in range(self.sizes[task]) for made in make(rng)], self.tokens.end)

    def _draw(self, example: Example, rng: random.Random, masked: frozenset[int] | None = None) -> list[Packed]:
        text = caption(example.scene, rng)
        conditional, unconditional = prompts.text_to_image(self.tokens, text, 8, 8).branches
        asks = {place: PARTS[place] for place in Place if example.scene.at(place)}
        if rng.random() < DROPPED:
            begin, prompt = aligned(unconditional, len(conditional))
            sequence = Packed(begin)
        else:
            sequence, prompt, start = Packed(), conditional, find(conditional, self.tokens.encode(text))
            for shape, end in self.phrases(text, example.scene).items():
                sequence.telling[start + end - 1] = PARTS[shape.place]
                sequence.named[start + end - 1] = shape_class(shape)
        return [self._picture(sequence, prompt, example.scene, example.small, asks, rng, masked=masked)]

    def _edit(self, example: Example, rng: random.Random) -> list[Packed]:
        if rng.random() < self.scrambled:
            example = scrambled(example, rng)
        branches = prompts.edit(self.tokens, grid_of(example.small), example.instruction).branches
        masks = rng.random()  # the same in all branches
        numbers = (0, 1, 2) if rng.random() < DROPPED else (0, 1)
        return [self._edit_branch(example, branches, number, random.Random(masks)) for number in numbers]

    def _edit_branch(
        self,
        example: Example,
        branches: tuple[list[int], ...],
        number: int,
        rng: random.Random,
        masked: frozenset[int] | None = None,
    ) -> Packed:
        begin, branch = aligned(branches[number], len(branches[0]))
        sequence, asks, scene, result = Packed(begin, number), {}, example.scene, example.result
        changed = [place for place in Place if scene.at(place) != result.at(place)]
        if number != 2:
            source = branch.index(self.tokens.boi) + 1
            sequence.picture(source, len(example.small[0]), len(example.small))
            self._tell(sequence, source, scene, len(example.small), example.any_before)
            sequence.moving = {
                len(branch) + index: source + before
                for index, before in moves(scene, result, len(example.small)).items()
            }
        if number != 1:
            instruction = self.tokens.encode(example.instruction)
            last = find(branch, instruction) + len(instruction) - 1
            sequence.telling[last] = INSTRUCTION
            sequence.asking[last] = sum(PARTS[place] for place in changed if scene.at(place))
            made = [shape for shape in map(result.at, changed) if shape]
            if changed:
                sequence.named[last] = shape_class(made[0] if made else None)
            asks = {place: INSTRUCTION for place in changed or Place}
        return self._picture(sequence, branch, result, example.changed, asks, rng, example.any_after, masked)

    def _picture(
        self,
        sequence: Packed,
        prompt: list[int],
        scene: Scene,
        codes: list[list[int]],
        asks: dict[Place, int],
        rng: random.Random,
        untold: frozenset[int] = frozenset(),
        masked: frozenset[int] | None = None,
    ) -> Packed:
        """A picture after its prompt. ``masked`` are the codes that are drawn, by their index; None is all of them."""
        response = self.tokens.codes_to_ids(flat(codes))
        fill = continued(response, len(prompt), len(codes[0]))
        ids, first, side = [*prompt, *response], len(prompt), len(codes)
        sequence.picture(first, side, side)
        sequence.named |= {first + i: name for i, name in enumerate(classes(scene, side)) if i not in untold}
        sequence.asking |= {first + index: asks.get(place, 0) for index, place in enumerate(places(side))}
        open = None if masked is None else {first + index for index in masked}
        sequence.clean([*ids, *fill][:-BLOCK], 0, 0)
        sequence.masked(prompt, response, 1, self.tokens.mask, rng, clean_to=len(ids) + len(fill), fill=fill, open=open)
        return sequence

    def _ask(self, example: Example, rng: random.Random) -> list[Packed]:
        return [self._questions(example, example.large, rng)]

    def _ask_small(self, example: Example, rng: random.Random) -> list[Packed]:
        return [self._questions(example, example.small, rng)]

    def _questions(self, example: Example, codes: list[list[int]], rng: random.Random) -> Packed:
        sequence, shared, scene = Packed(), None, example.scene
        first = len(self.tokens.header(len(codes), len(codes[0])))
        sequence.picture(first, len(codes[0]), len(codes))
        self._tell(sequence, first, scene, len(codes))
        topics = [Topic.DESCRIPTION, *rng.sample([t for t in Topic if t is not Topic.DESCRIPTION], QUESTIONS - 1)]
        for group, topic in enumerate(topics, 1):
            asked = next(made for made in map(question, repeat(scene), repeat(topic), repeat(rng)) if fair(made, scene))
            prompt = prompts.understand(self.tokens, grid_of(codes), asked.text).conditional
            if shared is None:
                shared = (len(codes) * len(codes[0]) + 5) // BLOCK * BLOCK  # what is the same for every question
                sequence.clean(prompt[:shared], 0, 0)
            answer = self.tokens.encode(asked.answer)
            if topic is Topic.DESCRIPTION:
                phrases, begun = {}, 0
                for shape, end in self.phrases(asked.answer, scene).items():
                    phrases |= dict.fromkeys(range(begun, end), PARTS[shape.place])
                    begun = end
            else:
                about = sum(PARTS[shape.place] for shape in asked.about)
                phrases = dict.fromkeys(range(len(answer)), about)
            sequence.asking = {len(prompt) + index: parts for index, parts in phrases.items()}
            response = [*answer, self.tokens.end]
            while (len(prompt) + len(response)) % BLOCK:
                response.append(self.tokens.end)
            sequence.masked(
                prompt, response, group, self.tokens.mask, rng, clean_to=shared, matters=len(prompt) + len(answer) + 1
            )
        return sequence

    def phrases(self, text: str, scene: Scene) -> dict[Shape, int]:
        """Where in a text, in tokens, what is said of each shape ends, with its place; in the order of the text."""
        ends = {shape: text.index(shape.place.value) + len(shape.place.value) for shape in scene.shapes}
        return {shape: len(self.tokens.encode(text[:end])) for shape, end in sorted(ends.items(), key=lambda x: x[1])}

    @staticmethod
    def _tell(
        sequence: Packed, first: int, scene: Scene, side: int, untold: frozenset[int] = frozenset(), picture: int = 0
    ) -> None:
        """Say that the codes of a given picture tell of its shapes."""
        for index, (name, place) in enumerate(zip(classes(scene, side), places(side), strict=True)):
            if name and index not in untold:
                sequence.telling[first + index], sequence.named[first + index] = part(place, picture), name


def shape_class(shape: Shape | None) -> int:
    """The class of a shape, by colour and kind; 0 for none."""
    return _class(1 + list(Colour).index(shape.colour), 1 + list(Kind).index(shape.kind)) if shape else 0


def classes(scene: Scene, side: int) -> list[int]:
    """The class of what each code of a picture is part of."""
    return _class(*patch_names([scene], side)).flatten().tolist()


def _class(colour: int | torch.Tensor, kind: int | torch.Tensor) -> int | torch.Tensor:
    return colour * KINDS + kind


def fair(asked: Question, scene: Scene) -> bool:
    """Whether a question does not teach that a held-out shape is never there, by asking for it where one is like it."""
    return asked.answer != "no" or not any(
        f"{colour.value} {kind.value}" in asked.text and held_out_shape(kind, colour, shape.place)
        for shape in scene.shapes
        for kind, colour in (
            *((kind, shape.colour) for kind in Kind),
            *((shape.kind, colour) for colour in Colour),
        )
    )


@cache
def places(side: int) -> list[Place]:
    """The place that each code of a picture belongs to."""
    return [list(Place)[2 * row // side * 2 + 2 * column // side] for row in range(side) for column in range(side)]


def _moved(scene: Scene, result: Scene) -> tuple[Place, Place] | None:
    """From where to where a shape moves, if one does."""
    places = [
        (before.place, after.place)
        for before in scene.shapes
        for after in result.shapes
        if replace(before, place=after.place) == after
    ]
    moved = [(start, end) for start, end in places if not result.at(start) and not scene.at(end)]
    return moved[0] if moved else None


def moves(scene: Scene, result: Scene, side: int) -> dict[int, int]:
    """Which code of a picture moves to where in the next: index in the result -> index in the source."""
    return carried(side, *found) if (found := _moved(scene, result)) else {}


def carried(side: int, start: Place, end: Place) -> dict[int, int]:
    """Index at the place ``end`` -> index at the place ``start``."""
    at_start, at_end = ([index for index, at in enumerate(places(side)) if at is place] for place in (start, end))
    return dict(zip(at_end, at_start, strict=True))


def scrambled(example: Example, rng: random.Random) -> Example:
    """The edit with any codes for parts of the shapes that stay as they are or that move: they are to be copied,
    whatever they are. What is left of a shape that moves still tells which it is."""
    side = len(example.small)
    kept = {shape.place for shape in example.scene.shapes if shape in example.result.shapes}
    if example.scene.background != example.result.background:
        return example
    shares = {place: rng.uniform(0.3, 1.0) for place in Place}
    copied = {
        index: index for index, place in enumerate(places(side)) if place in kept and rng.random() < shares[place]
    }
    copied |= {
        index: source for index, source in moves(example.scene, example.result, side).items() if rng.random() < 0.5
    }
    before, after = map(flat, (example.small, example.changed))
    for index, source in copied.items():
        before[source] = after[index] = rng.randrange(CODES)
    before, after = (
        [codes[start : start + side] for start in range(0, side * side, side)] for codes in (before, after)
    )
    return replace(
        example, small=before, changed=after, any_before=frozenset(copied.values()), any_after=frozenset(copied)
    )


def grid_of(codes: list[list[int]]) -> VQGrid:
    return VQGrid.from_list(flat(codes), len(codes), len(codes[0]), CODES)


def flat(codes: list[list[int]]) -> list[int]:
    """Codes row after row."""
    return [code for row in codes for code in row]


def continued(response: list[int], before: int, columns: int) -> list[int]:
    """What fills up the last block after a picture, which runs whole: it goes on like the last row."""
    filled = list(response)
    while (before + len(filled)) % BLOCK:
        filled.append(filled[-columns])
    return filled[len(response) :]

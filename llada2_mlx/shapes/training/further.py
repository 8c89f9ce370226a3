"""What the backbone learns after that: plans, prompts without a place, two pictures, stories, redrawing.

A plan and a story are one sequence in which texts and pictures follow each other. Each of them is learned by noisy copies
of its own blocks, which see what generation lets them see: all that was written before, and of a text's last block
whatever the model goes on with after ``<boi>``, which is thrown away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ... import prompts
from ...backbone.guidance import Guidance
from ...tokens import Tokens
from ...vq import GridSet
from ..grammar import Question, Topic, caption, placeless, plan
from ..several import (
    MOST_PICTURES,
    About,
    Borrowing,
    Loan,
    PairQuestion,
    Tale,
    borrowing,
    pair_question,
    tale,
)
from ..world import (
    Place,
    Scene,
    Shape,
    held_out,
    held_out_pair,
    random_background,
    random_shape,
    scenes,
)
from .curriculum import (
    BATCHES,
    DROPPED,
    GUIDED,
    QUESTIONS,
    Curriculum,
    Example,
    carried,
    classes,
    continued,
    fair,
    flat,
    grid_of,
    moves,
    places,
    shape_class,
)
from .packed import BLOCK, Packed, aligned, find, instruction, part

SIZES = {
    "ask own": BATCHES["ask"],
    "plan": 12,
    "free": 20,
    "two": 2,
    "two small": 8,
    "borrow": 6,
    "story": 5,
    "story words": 6,
    "story begin": 8,
    "story on": 3,
    "redraw": 7,
    "redraw before": 16,
}
GUIDED |= {
    "borrow": GUIDED["edit"],
    "redraw": GUIDED["edit"],
    "story begin": Guidance.simple(7.5),  # as stories do it
    "story on": Guidance.editing(text_scale=7.5, image_scale=1.5),
}
# Without words for a place, a shape is at the first of these most of the time: with places that are all as likely, none
# gets most of the votes, and codes that are chosen a few at a time would draw a part of the shape at each.
PREFERRED = tuple(Place)
_VERB = re.compile(r"(moves|turns|vanishes|comes)[^.]*")
_WORD = re.compile(r"\w+")
FAVOURED = 0.85
UNPLACED_PLANS = 0.3  # share of plans for prompts without a place


@dataclass(frozen=True)
class Unplaced:
    """A scene for a prompt that says of no shape where it is; its shapes in the order in which they are named."""

    shapes: tuple[Shape, ...]
    scene: Scene
    codes: list[list[int]]


@dataclass(frozen=True)
class Loaned:
    """Two scenes and what an edit of the second takes from the first, with the codes of all three pictures."""

    scenes: tuple[Scene, Scene]
    made: Borrowing
    codes: tuple[list[list[int]], ...]


@dataclass(frozen=True)
class Told:
    """A story with the codes of its pictures."""

    tale: Tale
    codes: tuple[list[list[int]], ...]


@dataclass(frozen=True)
class Material:
    """Examples of what is learned further, none of them held out."""

    unplaced: Sequence[Unplaced]
    loans: Sequence[Loaned]
    tales: Sequence[Told]


@dataclass(frozen=True)
class Written:
    """A text or a picture in a sequence."""

    start: int  # its first position, in the ids before and with it
    ids: list[int]
    codes: list[list[int]] | None = None  # of a picture


class FurtherCurriculum(Curriculum):
    """The same lessons and more.

    Args:
        examples: as before; questions about two pictures take two of them, and redrawing a part of one.
        material: for the other tasks.
        own: examples whose ``large`` is of what the decoder draws.
    """

    def __init__(
        self,
        tokens: Tokens,
        examples: Sequence[Example],
        material: Material,
        own: Sequence[Example],
        scrambled: float = 0.0,
    ) -> None:
        super().__init__(tokens, examples, scrambled)
        self.material = material
        self.sizes |= SIZES
        self.makers |= {
            "ask own": partial(self._any, self._ask, own),
            "plan": self._plan,
            "free": lambda rng: [self._unplaced(rng.choice(material.unplaced), rng)],
            "two": partial(self._two, large=True),
            "two small": partial(self._two, large=False),
            "borrow": lambda rng: self._borrow(rng.choice(material.loans), rng),
            "story": lambda rng: [self._story(rng.choice(material.tales), rng)],
            "story words": lambda rng: [self._story_words(self._longest(rng), rng)],
            "story begin": lambda rng: self._story_picture(rng.choice(material.tales), 0, rng),
            "story on": self._story_on,
            "redraw": partial(self._any, self._redraw, examples),
            "redraw before": partial(self._any, self._redraw_before, examples),
        }

    def _plan(self, rng: random.Random) -> list[Packed]:
        """A plan in words, the header, and the picture."""
        if rng.random() < UNPLACED_PLANS:
            given = rng.choice(self.material.unplaced)
            scene, codes, text = given.scene, given.codes, placeless(given.shapes, rng)
        else:
            example = rng.choice(self.examples)
            scene, codes, text = example.scene, example.small, caption(example.scene, rng)
        return [self._planned(scene, codes, text, rng)]

    def _planned(self, scene: Scene, codes: list[list[int]], text: str, rng: random.Random) -> Packed:
        conditional, unconditional = prompts.thinking(self.tokens, text, len(codes), len(codes[0])).branches
        header = self.tokens.header(len(codes), len(codes[0]))
        planned = plan(scene)
        thought = [*self.tokens.encode(planned), *header]
        before = [*conditional, *thought]
        asks = {place: part(place) for place in Place if scene.at(place)}
        if rng.random() < DROPPED:
            begin, branch = aligned(unconditional, len(before))
            return self._picture(Packed(begin), branch, scene, codes, asks, rng)
        sequence, begun = Packed(), len(conditional)
        for shape, end in self.phrases(planned, scene).items():
            last = len(conditional) + end - 1
            sequence.telling[last] = part(shape.place)
            sequence.asking |= dict.fromkeys(range(begun, last + 1), part(shape.place))
            sequence.named |= dict.fromkeys(range(begun, last + 1), shape_class(shape))
            begun = last + 1
        start = find(conditional, self.tokens.encode(text))
        if all(shape.place.value in text for shape in scene.shapes):
            ends = self.phrases(text, scene)
        else:
            ends = self._namings(text, scene)
        for shape, end in ends.items():
            sequence.telling[start + end - 1], sequence.named[start + end - 1] = part(shape.place), shape_class(shape)
        self._picture(sequence, before, scene, codes, asks, rng)
        self._text(sequence, conditional, thought, self.tokens.codes_to_ids(flat(codes)), 2, rng)
        return sequence

    def _unplaced(self, given: Unplaced, rng: random.Random) -> Packed:
        """A picture for a prompt that says of no shape where it is."""
        text, side = placeless(given.shapes, rng), len(given.codes)
        conditional, unconditional = prompts.text_to_image(self.tokens, text, side, side).branches
        asks = {shape.place: part(shape.place) for shape in given.shapes}
        if rng.random() < DROPPED:
            begin, branch = aligned(unconditional, len(conditional))
            return self._picture(Packed(begin), branch, given.scene, given.codes, asks, rng)
        sequence, start = Packed(), find(conditional, self.tokens.encode(text))
        for shape, end in self._namings(text, given.scene).items():
            sequence.telling[start + end - 1], sequence.named[start + end - 1] = part(shape.place), shape_class(shape)
        return self._picture(sequence, conditional, given.scene, given.codes, asks, rng)

    def _two(self, rng: random.Random, large: bool) -> list[Packed]:
        """Questions about two pictures."""
        pair = [rng.choice(self.examples) for _ in range(2)]
        both = (pair[0].scene, pair[1].scene)
        return [self._questions_about_two(both, [each.large if large else each.small for each in pair], rng)]

    def _questions_about_two(
        self, both: tuple[Scene, Scene], codes: Sequence[list[list[int]]], rng: random.Random
    ) -> Packed:
        sequence, pictures = Packed(), GridSet(tuple(map(grid_of, codes)))
        given = prompts.blocks(self.tokens, pictures)
        position = 0
        for picture, (scene, rows) in enumerate(zip(both, codes, strict=True)):
            position += len(self.tokens.header(len(rows), len(rows[0])))
            sequence.picture(position, len(rows[0]), len(rows))
            self._tell(sequence, position, scene, len(rows), picture=picture)
            position += len(rows) * len(rows[0]) + 1
        shared = len(given) // BLOCK * BLOCK  # what is the same for every question
        sequence.clean(given[:shared], 0, 0)
        for group, about in enumerate(rng.sample(list(About), QUESTIONS), 1):
            # two pictures may have no fair question of a kind; which has more shapes is always one
            while (asked := pair_question(both, about, rng)) is None or not fair_of_two(asked, both):
                about = rng.choice(list(About))
            prompt = prompts.understand(self.tokens, pictures, asked.text).conditional
            answer, first = self.tokens.encode(asked.answer), len(prompt)
            if asked.topic is Topic.DESCRIPTION:
                asking, begun, number = {}, 0, asked.shapes[0][0]
                for shape, end in self.phrases(asked.answer, both[number]).items():
                    asking |= dict.fromkeys(range(first + begun, first + end), part(shape.place, number))
                    begun = end
            else:
                told = sum(part(shape.place, number) for number, shape in asked.shapes)
                asking = dict.fromkeys(range(first, first + len(answer)), told)
            sequence.asking = asking
            response = [*answer, self.tokens.end]
            fill = [self.tokens.end] * (-(first + len(response)) % BLOCK)
            options = {"clean_to": shared, "matters": first + len(response), "fill": fill}
            sequence.masked(prompt, response, group, self.tokens.mask, rng, **options)
        return sequence

    def _borrow(self, given: Loaned, rng: random.Random) -> list[Packed]:
        """An edit of the second picture by something of the first."""
        first, source, after = given.codes
        branches = prompts.edit(
            self.tokens, GridSet((grid_of(first), grid_of(source))), given.made.instruction
        ).branches
        masks = rng.random()  # the same in all branches
        numbers = (0, 1, 2) if rng.random() < DROPPED else (0, 1)
        return [self._borrow_branch(given, branches, number, random.Random(masks)) for number in numbers]

    def _borrow_branch(self, given: Loaned, branches: tuple[list[int], ...], number: int, rng: random.Random) -> Packed:
        begin, branch = aligned(branches[number], len(branches[0]))
        sequence, asks, made, side = Packed(begin, number), {}, given.made, len(given.codes[0])
        scene, result = given.scenes[1], made.result
        changed = [place for place in Place if scene.at(place) != result.at(place)]
        if number != 2:
            starts = [at + 1 for at, token in enumerate(branch) if token == self.tokens.boi][:2]
            for picture, (start, shown) in enumerate(zip(starts, given.scenes, strict=True)):
                sequence.picture(start, side, side)
                self._tell(sequence, start, shown, side, picture=picture)
            if made.taken:
                (place,) = changed
                sequence.moving = {
                    len(branch) + index: starts[0] + before
                    for index, before in carried(side, made.taken.place, place).items()
                }
        if number != 1:
            ids = self.tokens.encode(made.instruction)
            last = find(branch, ids) + len(ids) - 1
            sequence.telling[last] = instruction(2)
            if made.taken:
                sequence.asking[last] = part(made.taken.place)
                sequence.named[last] = shape_class(made.taken)
            asks = {place: instruction(2) for place in changed or Place}
        return self._picture(sequence, branch, result, given.codes[2], asks, rng)

    def _story(self, told: Told, rng: random.Random) -> Packed:
        """A whole story: all its texts and pictures, and its end."""
        sequence, ids, pieces = self._clean_story(told)
        for group, (piece, after) in enumerate(pieces, 1):
            if piece.codes is None:
                self._text(sequence, ids[: piece.start], piece.ids, after, group, rng)
            else:
                codes = piece.ids[:-1]  # its end is not drawn
                fill = continued(codes, piece.start, len(piece.codes[0]))
                options = {"clean_to": len(ids) + BLOCK, "fill": fill}
                sequence.masked(ids[: piece.start], codes, group, self.tokens.mask, rng, **options)
        return sequence

    def _story_words(self, told: Told, rng: random.Random) -> Packed:
        """The texts of a story alone, each of them twice: a few words, which a few wrong ones spoil."""
        sequence, ids, pieces = self._clean_story(told)
        texts = [each for each in pieces if each[0].codes is None for _ in range(2)]
        for group, (piece, after) in enumerate(texts, 1):
            self._text(sequence, ids[: piece.start], piece.ids, after, group, rng)
        # the codes that a last block is filled up with would outweigh the words
        sequence.targets = [target if target < self.tokens.image_offset else -1 for target in sequence.targets]
        return sequence

    def _clean_story(self, told: Told) -> tuple[Packed, list[int], list[tuple[Written, list[int]]]]:
        """A sequence with a whole story to be read, its ids, and each of its pieces with the ids of what follows it."""
        ids, pieces = self._written(told)
        sequence = Packed()
        self._tell_story(sequence, told, pieces)
        sequence.clean([*ids, *[self.tokens.end] * (-len(ids) % BLOCK)], 0, 0)
        return sequence, ids, list(zip(pieces, [*(piece.ids for piece in pieces[1:]), []], strict=True))

    def _longest(self, rng: random.Random) -> Told:
        return max(rng.choices(self.material.tales, k=4), key=lambda told: len(told.codes))

    def _story_on(self, rng: random.Random) -> list[Packed]:
        longer = [each for each in rng.choices(self.material.tales, k=20) if len(each.codes) > 1]
        told = longer[0]
        return self._story_picture(told, rng.randrange(1, len(told.codes)), rng)

    def _story_picture(self, told: Told, picture: int, rng: random.Random) -> list[Packed]:
        """One picture of a story in all branches of its guidance, on the same masks."""
        ids, pieces = self._written(told)
        text, drawn = pieces[2 * picture], pieces[2 * picture + 1]
        header, side = text.ids[-4:], len(drawn.codes)
        options = {"told": ids[: text.start], "text": text.ids[:-4], "header": header, "first": not picture}
        branches = prompts.story_picture(self.tokens, **options).branches
        masks, made, scenes_told = rng.random(), [], told.tale.scenes
        for number, full in enumerate(branches):
            begin, branch = aligned(full, len(branches[0]))
            sequence, asks = Packed(begin, number), {}
            if number == 0:
                self._tell_story(sequence, told, pieces[: 2 * picture + 1])
                sequence.moving |= self._moving(told, pieces, picture)
                asks = self._asks(told.tale, picture)
            elif number == 1 and picture:  # the pictures are there, and the text is not
                later = len(branches[0]) - len(full)
                for before, scene in enumerate(scenes_told[:picture]):
                    start = pieces[2 * before + 1].start + later
                    sequence.picture(start, side, side)
                    self._tell(sequence, start, scene, side, picture=before)
            made.append(self._picture(sequence, branch, scenes_told[picture], drawn.codes, asks, random.Random(masks)))
        return made

    def _redraw(self, example: Example, rng: random.Random) -> list[Packed]:
        """An edit of which only a part is drawn, and the rest is kept as it is."""
        while example.scene.background != example.result.background or example.scene == example.result:
            example = rng.choice(self.examples)
        masked = self._masked_part(example, rng)
        kept = replace(example, changed=_mixed(example.small, example.changed, masked))
        branches = prompts.edit(
            self.tokens, grid_of(kept.small), kept.instruction, (len(kept.small), len(kept.small[0]))
        ).branches
        masks = rng.random()
        return [self._edit_branch(kept, branches, number, random.Random(masks), masked) for number in (0, 1)]

    def _redraw_before(self, example: Example, rng: random.Random) -> list[Packed]:
        """A picture of which only a part is drawn; its prompt says what the whole is to show."""
        if example.scene.background == example.result.background and rng.random() < 0.7:
            masked = self._masked_part(example, rng)
            scene, codes = example.result, _mixed(example.small, example.changed, masked)
        else:
            scene, codes = example.scene, example.small
            masked = _rectangles([rng.choice(list(Place))], len(codes), rng)
        return self._draw(replace(example, scene=scene, small=codes), rng, masked)

    @staticmethod
    def _masked_part(example: Example, rng: random.Random) -> frozenset[int]:
        changed = [place for place in Place if example.scene.at(place) != example.result.at(place)]
        return _rectangles(changed or [rng.choice(list(Place))], len(example.small), rng)

    def _text(
        self,
        sequence: Packed,
        before: list[int],
        text: list[int],
        after: list[int],
        group: int,
        rng: random.Random,
    ) -> None:
        """Noisy copies of a text whose clean blocks are there; ``after`` is what follows it, at its end nothing."""
        end = len(before) + len(text)
        fill = after[: -end % BLOCK]
        fill = [*fill, *[self.tokens.end] * (-(end + len(fill)) % BLOCK)]
        sequence.masked(before, text, group, self.tokens.mask, rng, clean_to=end + BLOCK, matters=end, fill=fill)

    def _written(self, told: Told) -> tuple[list[int], list[Written]]:
        """The ids of a story with its request; and its texts and pictures in turn, each with what ends it."""
        tokens = self.tokens
        ids, pieces = list(prompts.story(tokens, told.tale.prompt).conditional), []

        def add(own: list[int], codes: list[list[int]] | None = None) -> None:
            pieces.append(Written(len(ids), own, codes))
            ids.extend(own)

        for text, codes in zip(told.tale.texts, told.codes, strict=True):
            add([*tokens.encode(text), *tokens.header(len(codes), len(codes[0]))])
            add([*tokens.codes_to_ids(flat(codes)), tokens.image_end], codes)
        add([tokens.end])
        return ids, pieces

    def _tell_story(self, sequence: Packed, told: Told, pieces: Sequence[Written]) -> None:
        """Say what the texts and pictures of a story tell of, as far as ``pieces`` goes."""
        story, first = told.tale, pieces[0].start
        request = prompts.story(self.tokens, story.prompt).conditional
        asked, begun = find(request, self.tokens.encode(story.prompt)), first
        for start, text in ((asked, story.prompt), (first, story.texts[0])):
            for shape, end in self.phrases(text, story.scenes[0]).items():
                last = start + end - 1
                sequence.telling[last], sequence.named[last] = part(shape.place), shape_class(shape)
        for shape, end in self.phrases(story.texts[0], story.scenes[0]).items():
            sequence.asking |= dict.fromkeys(range(begun, first + end), part(shape.place))
            sequence.named |= dict.fromkeys(range(begun, first + end), shape_class(shape))
            begun = first + end
        for number, piece in enumerate(pieces):
            picture = number // 2
            if piece.codes is not None:
                side = len(piece.codes)
                scene = story.scenes[picture]
                sequence.picture(piece.start, side, side)
                self._tell(sequence, piece.start, scene, side, picture=picture)
                sequence.named |= {piece.start + i: name for i, name in enumerate(classes(scene, side))}
                asks = self._asks(story, picture)
                sequence.asking |= {piece.start + i: asks.get(at, 0) for i, at in enumerate(places(side))}
                sequence.moving |= self._moving(told, pieces, picture)
            elif 0 < picture < len(story.scenes):
                scene, result = story.scenes[picture - 1], story.scenes[picture]
                changed = [place for place in Place if scene.at(place) != result.at(place)]
                made = [shape for shape in map(result.at, changed) if shape]
                last = piece.start + len(piece.ids) - 5  # before the header
                sequence.telling[last] = instruction(picture)
                sequence.asking[last] = sum(part(place, picture - 1) for place in changed if scene.at(place))
                about = shape_class(made[0] if made else None)
                sequence.named |= dict.fromkeys(range(piece.start, last + 1), about)
                copied = self._copied(story.prompt, story.texts[picture], story.texts[1:picture])
                sequence.moving |= {piece.start + index: asked + before for index, before in copied.items()}

    def _copied(self, prompt: str, text: str, told: Sequence[str]) -> dict[int, int]:
        """Index in what happens in a story -> index in its prompt of the same word, after what is told already."""
        at = lambda words, end: len(self.tokens.encode(words[:end].rstrip()))  # a word has the space before it
        begun = prompt.index(". ") + 2
        for each in told:
            begun = prompt.index(verb := _VERB.search(each)[0], begun) + len(verb)
        subject, verb = text[: _VERB.search(text).start()], _VERB.search(text)[0]
        there = prompt.index(verb, begun)
        pairs = {len(subject): there}
        for word in _WORD.finditer(verb):
            pairs[len(subject) + word.start()] = there + word.start()
        for word in list(_WORD.finditer(subject))[1:]:  # its article may be another
            if (before := prompt.rfind(f" {word[0]}", 0, there)) >= 0:
                pairs[word.start()] = before + 1
        return {at(text, index): at(prompt, before) for index, before in pairs.items()}

    @staticmethod
    def _asks(story: Tale, picture: int) -> dict[Place, int]:
        """What the codes of a picture of a story look at: the words for their place, or what changes there."""
        scene = story.scenes[picture]
        if not picture:
            return {place: part(place) for place in Place if scene.at(place)}
        before = story.scenes[picture - 1]
        return {place: instruction(picture) for place in Place if scene.at(place) != before.at(place)}

    @staticmethod
    def _moving(told: Told, pieces: Sequence[Written], picture: int) -> dict[int, int]:
        """Position -> position in the picture before of the code that moves to there."""
        if not picture:
            return {}
        before, after = told.tale.scenes[picture - 1 : picture + 1]
        text, side = pieces[2 * picture], len(told.codes[picture])
        source = pieces[2 * picture - 1].start
        target = text.start + len(text.ids)
        return {target + index: source + at for index, at in moves(before, after, side).items()}

    def _namings(self, text: str, scene: Scene) -> dict[Shape, int]:
        """Where in a text, in tokens, the name of each shape ends."""
        named = {shape: f"{shape.colour.value} {shape.kind.value}" for shape in scene.shapes}
        return {shape: len(self.tokens.encode(text[: text.index(name) + len(name)])) for shape, name in named.items()}


def fair_of_two(asked: PairQuestion, both: tuple[Scene, Scene]) -> bool:
    """Whether a question about two pictures does not teach that a held-out shape is never there; see ``fair``."""
    if asked.about is About.ONE:
        number = "second picture" in asked.text
        return fair(Question(Topic.EXISTENCE, asked.text, asked.answer, ()), both[number])
    without = {0, 1} - {number for number, _ in asked.shapes}
    return all(fair(Question(Topic.EXISTENCE, asked.text, "no", ()), both[number]) for number in without)


def unplaced(seed: str) -> Iterator[tuple[tuple[Shape, ...], Scene]]:
    """Endless scenes of one or two shapes for prompts without a place, none of them held out; see ``PREFERRED``."""
    rng = random.Random(seed)
    while True:
        free, shapes = list(PREFERRED), []
        for _ in range(1 if rng.random() < 0.7 else 2):
            place = free[0] if rng.random() < FAVOURED else rng.choice(free)
            free.remove(place)
            shapes.append(random_shape(rng, place))
        scene = Scene((), random_background(rng)).with_shapes(*shapes)
        names = {(shape.kind, shape.colour) for shape in shapes}
        if len(names) == len(shapes) and not held_out(scene) and not any(held_out_pair(*name) for name in names):
            yield tuple(shapes), scene


def loans(seed: str) -> Iterator[tuple[tuple[Scene, Scene], Borrowing]]:
    """Endless edits with a reference, no picture of them held out."""
    rng, world = random.Random(seed), scenes(f"{seed} scenes", test=False)
    for both in zip(world, world):
        made = borrowing(both, rng.choice(list(Loan)), rng)
        if made and not held_out(made.result):
            yield both, made


def tales(seed: str) -> Iterator[Tale]:
    """Endless stories of one to three pictures, none of them held out; most of three."""
    rng = random.Random(seed)
    for scene in scenes(f"{seed} scenes", test=False):
        told = tale(scene, rng.choice((0, 1, 1, *[MOST_PICTURES - 1] * 5)), rng)
        if not any(map(held_out, told.scenes)):
            yield told


def _rectangles(around: Sequence[Place], side: int, rng: random.Random) -> frozenset[int]:
    """Cells that cover places, each with up to two rows and columns more on each side."""
    found: set[int] = set()
    for place in around:
        own = [divmod(index, side) for index, at in enumerate(places(side)) if at is place]
        (top, left), (bottom, right) = own[0], own[-1]
        more = [rng.choice((0, 0, 1, 2)) for _ in range(4)]
        found |= {
            row * side + column
            for row in range(max(0, top - more[0]), min(side, bottom + 1 + more[1]))
            for column in range(max(0, left - more[2]), min(side, right + 1 + more[3]))
        }
    return frozenset(found)


def _mixed(before: list[list[int]], after: list[list[int]], masked: frozenset[int]) -> list[list[int]]:
    """``after`` where it is masked, ``before`` elsewhere."""
    side = len(before[0])
    return [
        [(after if row * side + column in masked else before)[row][column] for column in range(side)]
        for row in range(len(before))
    ]

"""The backbone: block diffusion on captions, questions and edits, with the prompts that the tasks use.

Every block that a task denoises is learned at once: the sequence with its clean tokens is followed by a noisy copy of
each such block, which sees the clean blocks before its own and itself (arXiv:2503.09573). Several questions share the
clean blocks of their picture.

More losses make it learn in minutes what it would find out in hours, as in the decoder. After its second layer, a code
has to know its row and column, and a word that ends what is said of a shape, which shape that is. In its third, the first
head of a code that is being edited is told to look at the same place of the source; another head of a code that is being
drawn, at the word for its place, of an answer, at the codes that it is about, of an instruction, at what is to be changed,
which it then has to know. In the fourth, a code that is to be changed is told to look at the instruction, and after it
a masked code has to know which shape it will be part of. Where nothing changes, heads of the fourth and of the last
layer look at the source too, and those of the last, where something moved to, at where it was: one head is too narrow
to carry a code over.

An edit is learned with its instruction and without it on the same masks, and so is what guidance makes of the two.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat

import torch
from torch import nn
from torch.nn import functional as F

from ... import prompts
from ...backbone.guidance import Guidance
from ...checkpoint.config import BackboneConfig
from ...tokens import Tokens
from ...vq import VQGrid
from ..grammar import Question, Topic, caption, question
from ..world import Colour, Kind, Place, Scene, Shape, held_out_shape
from .loop import Schedule
from .network import Network
from .tokenizer import CODES, patch_names

TEXT_IDS = 1024
CONFIG = BackboneConfig(
    vocab_size=TEXT_IDS + CODES,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=2000,
    partial_rotary_factor=0.75,
    max_position_embeddings=8192,
    num_experts=8,
    num_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    moe_intermediate_size=96,
    first_k_dense_replace=1,
    image_token_offset=TEXT_IDS,
)
BLOCK = 32
BATCHES = {"draw": 20, "edit": 7, "ask": 8, "ask small": 16}  # pictures, each with QUESTIONS where it is asked about
QUESTIONS = 5
SIDES = 16  # rows and columns of the largest grid
PLACED_LAYER, LOOKING_LAYER, CHANGING_LAYER = 1, 2, 3
SOURCE_HEAD, PART_HEAD = 0, CONFIG.num_attention_heads // CONFIG.num_key_value_heads  # with keys of their own
COPYING = ((CHANGING_LAYER, SOURCE_HEAD), (4, SOURCE_HEAD), (4, PART_HEAD))  # layers and heads
PLACING, LOOKING, NAMING, GUIDING = 0.3, 0.2, 0.5, 0.5  # weights of the additional losses
GUIDANCE = Guidance.editing(text_scale=4.0, image_scale=0.0)  # as the task does it
PARTS = {place: 1 << number for number, place in enumerate(Place)}  # what a token tells of, as bits
INSTRUCTION = 1 << len(Place)
PADDING_LEARNED = 0.1  # share of the ends after the first that are to be learned
COLOURS, KINDS = 1 + len(Colour), 1 + len(Kind)  # with none
DROPPED = 0.1  # share of prompts, and of the source pictures of edits, left out for guidance


@dataclass(frozen=True)
class Stage:
    """A part of the training: how long, which tasks in turn from which step on, and how many edits are scrambled."""

    schedule: Schedule
    turns: dict[int, tuple[str, ...]]
    scrambled: float = 0.0


MOSTLY_EDITS = ("edit", "ask", "edit", "edit", "draw", "edit", "edit", "ask", "edit", "edit")

STAGES = {
    "backbone-first": Stage(
        Schedule(steps=5000, rate=2e-3, warmup=150, average=0.998),
        {  # drawing is learned first
            0: ("draw", "edit", "draw", "ask", "draw", "edit", "ask small", "draw", "edit", "ask"),
            2500: ("edit", "ask", "draw", "edit", "edit", "ask", "ask small", "edit", "draw", "ask"),
            3600: ("edit", "ask", "edit", "edit", "draw", "edit", "ask", "edit", "edit", "edit"),
        },
    ),
    "backbone-second": Stage(
        Schedule(steps=3600, rate=1.2e-3, warmup=150, average=0.998),
        {0: ("edit", "ask", "edit", "draw", "edit", "ask", "edit", "edit", "ask small", "edit")},
    ),
    "backbone-third": Stage(
        Schedule(steps=1600, rate=1e-3, warmup=60, average=0.996),
        {0: MOSTLY_EDITS},
        scrambled=0.5,
    ),
    "backbone-fourth": Stage(
        Schedule(steps=5000, rate=1.2e-3, warmup=100, average=0.998),
        {0: MOSTLY_EDITS},
        scrambled=0.5,
    ),
    "backbone-fifth": Stage(
        Schedule(steps=1500, rate=8e-4, warmup=60, average=0.996),
        {0: ("edit", "draw", "edit", "ask", "edit", "draw", "edit", "edit", "ask", "edit")},
        scrambled=0.5,
    ),
}


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


class Packed:
    """One training sequence: clean blocks, and noisy copies of blocks.

    Each token has a position and a group. Group 0 is what all share; the others, a question each, do not see each other.

    Args:
        begin: the first position that there is; a branch that is shorter than the conditional one begins later.
        branch: the number of an edit's branch.
    """

    def __init__(self, begin: int = 0, branch: int = -1) -> None:
        self.begin, self.branch = begin, branch
        self.ids: list[int] = []
        self.targets: list[int] = []  # -1 where nothing is to be learned
        self.positions: list[int] = []
        self.groups: list[int] = []
        self.noisy: list[int] = []
        self.cells: list[int] = []  # row * SIDES + column of a code, -1 of other tokens
        self.sources: list[int] = []  # the index in this sequence of the code that stands at the same place of a source
        self.moved: list[int] = []  # the same, of the code that an edit moves to here
        self.names: list[int] = []  # colour and kind of the shape that a token has to know, -1 of other tokens
        self.parts: list[int] = []  # PARTS and INSTRUCTION that a token tells of
        self.asks: list[int] = []  # those that it is told to look at
        self._pictures: list[tuple[int, int, int]] = []  # first position, columns, rows
        self.named: dict[int, int] = {}  # position -> name, part and ask of the tokens that are added from now on
        self.telling: dict[int, int] = {}
        self.asking: dict[int, int] = {}
        self.moving: dict[int, int] = {}  # position -> position of the code that moves to there

    def picture(self, start: int, columns: int, rows: int) -> None:
        """Say that a picture begins at a position."""
        self._pictures.append((start, columns, rows))

    def clean(self, ids: Sequence[int], start: int, group: int) -> None:
        """Whole blocks of clean tokens."""
        self._add(ids, [-1] * len(ids), start, group, 0)

    def masked(
        self,
        prompt: list[int],
        response: list[int],
        group: int,
        mask: int,
        rng: random.Random,
        clean_to: int,
        matters: int | None = None,
    ) -> None:
        """A noisy copy of each block that holds a token of the response.

        Args:
            clean_to: the position to which the clean blocks that it may see are there already; the others are added.
            matters: the position from which on only a few tokens are to be learned; such a block is all masked half
                of the time.
        """
        ids = [*prompt, *response]
        for start in range(len(prompt) // BLOCK * BLOCK, len(ids), BLOCK):
            for missing in range(clean_to, start, BLOCK):
                self.clean(ids[missing : missing + BLOCK], missing, group)
            clean_to = max(clean_to, start)
            own, share = range(max(start, len(prompt)), start + BLOCK), rng.random()
            if matters is not None and rng.random() < 0.5:
                share = 1.0
            hidden = {place for place in own if rng.random() < share} or {rng.choice(own)}
            places = range(start, start + BLOCK)
            block = [mask if place in hidden else ids[place] for place in places]
            learned = {
                place for place in hidden if matters is None or place < matters or rng.random() < PADDING_LEARNED
            }
            self._add(block, [ids[place] if place in learned else -1 for place in places], start, group, 1)

    def _add(self, ids: Sequence[int], targets: Sequence[int], start: int, group: int, noisy: int) -> None:
        before = max(0, self.begin - start)
        ids, targets, start = ids[before:], targets[before:], start + before
        self.ids += ids
        self.targets += targets
        self.positions += range(start, start + len(ids))
        self.groups += [group] * len(ids)
        self.noisy += [noisy] * len(ids)
        for position, target in zip(range(start, start + len(ids)), targets, strict=True):
            cell = source = -1
            for number, (first, columns, rows) in enumerate(self._pictures):
                if 0 <= (index := position - first) < columns * rows:
                    cell = index // columns * SIDES + index % columns
                    source = self._pictures[0][0] - self.begin + index if number and noisy else -1
            self.cells.append(cell)
            self.sources.append(source)
            self.moved.append(self.moving[position] - self.begin if noisy and position in self.moving else -1)
            self.parts.append(self.telling.get(position, 0))
            self.asks.append(self.asking.get(position, 0))
            told = target >= 0 or self.parts[-1]
            self.names.append(self.named.get(position, -1) if told else -1)


class Curriculum:
    """Draws training batches from examples.

    Args:
        tokens: of the checkpoint whose prompts are to be learned.
        examples: none of them held out.
        scrambled: share of edits in which any codes stand where they are only to be copied.
    """

    def __init__(self, tokens: Tokens, examples: Sequence[Example], scrambled: float = 0.0) -> None:
        self.tokens, self.examples, self.scrambled = tokens, examples, scrambled

    def batch(self, task: str, rng: random.Random) -> dict[str, torch.Tensor]:
        """``mask`` bool [batch, length, length], ``branches`` [batch], and of each token [batch, length] integers:
        ``ids``, ``targets``, ``positions``, ``cells``, ``sources``, ``moved``, ``names``, ``parts``, ``asks`` (see
        ``Packed``).
        """
        make = {"draw": self._draw, "edit": self._edit, "ask": self._ask, "ask small": self._ask_small}[task]
        sequences = [made for _ in range(BATCHES[task]) for made in make(rng.choice(self.examples), rng)]
        longest = max(len(sequence.ids) for sequence in sequences)
        columns = {
            "ids": self.tokens.end,
            "targets": -1,
            "positions": 0,
            "groups": -1,
            "noisy": 0,
            "cells": -1,
            "sources": -1,
            "moved": -1,
            "names": -1,
            "parts": 0,
            "asks": 0,
        }
        batch = {
            name: torch.tensor(
                [values + [fill] * (longest - len(values)) for values in (getattr(s, name) for s in sequences)]
            )
            for name, fill in columns.items()
        }
        block, group, noisy = batch["positions"] // BLOCK, batch.pop("groups"), batch.pop("noisy")
        row, column = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
        same = (row(group) == column(group)) & (row(noisy) == column(noisy)) & (row(block) == column(block))
        shared = (column(group) == 0) | (column(group) == row(group))
        earlier = (column(noisy) == 0) & shared & (column(block) < row(block)) & (column(group) >= 0)
        branches = torch.tensor([sequence.branch for sequence in sequences])
        return batch | {"mask": same | earlier, "branches": branches}

    def _draw(self, example: Example, rng: random.Random) -> list[Packed]:
        text = caption(example.scene, rng)
        conditional, unconditional = prompts.text_to_image(self.tokens, text, 8, 8).branches
        asks = {place: PARTS[place] for place in Place if example.scene.at(place)}
        if rng.random() < DROPPED:
            begin, prompt = _aligned(unconditional, len(conditional))
            sequence = Packed(begin)
        else:
            sequence, prompt, start = Packed(), conditional, _find(conditional, self.tokens.encode(text))
            for shape, end in self._phrases(text, example.scene).items():
                sequence.telling[start + end - 1] = PARTS[shape.place]
                sequence.named[start + end - 1] = _name(shape)
        return [self._picture(sequence, prompt, example.scene, example.small, asks, rng)]

    def _edit(self, example: Example, rng: random.Random) -> list[Packed]:
        if rng.random() < self.scrambled:
            example = _scrambled(example, rng)
        branches = prompts.edit(self.tokens, _grid(example.small), example.instruction).branches
        masks = rng.random()  # the same in all branches
        numbers = (0, 1, 2) if rng.random() < DROPPED else (0, 1)
        return [self._edit_branch(example, branches, number, random.Random(masks)) for number in numbers]

    def _edit_branch(
        self, example: Example, branches: tuple[list[int], ...], number: int, rng: random.Random
    ) -> Packed:
        begin, branch = _aligned(branches[number], len(branches[0]))
        sequence, asks, scene, result = Packed(begin, number), {}, example.scene, example.result
        changed = [place for place in Place if scene.at(place) != result.at(place)]
        if number != 2:
            source = branch.index(self.tokens.boi) + 1
            sequence.picture(source, len(example.small[0]), len(example.small))
            self._tell(sequence, source, scene, len(example.small), example.any_before)
            sequence.moving = {
                len(branch) + index: source + before for index, before in _moves(example, len(example.small)).items()
            }
        if number != 1:
            instruction = self.tokens.encode(example.instruction)
            last = _find(branch, instruction) + len(instruction) - 1
            sequence.telling[last] = INSTRUCTION
            sequence.asking[last] = sum(PARTS[place] for place in changed if scene.at(place))
            made = [shape for shape in map(result.at, changed) if shape]
            if changed:
                sequence.named[last] = _name(made[0] if made else None)
            asks = {place: INSTRUCTION for place in changed or Place}
        return self._picture(sequence, branch, result, example.changed, asks, rng, example.any_after)

    def _picture(
        self,
        sequence: Packed,
        prompt: list[int],
        scene: Scene,
        codes: list[list[int]],
        asks: dict[Place, int],
        rng: random.Random,
        untold: frozenset[int] = frozenset(),
    ) -> Packed:
        response = self.tokens.codes_to_ids([code for row in codes for code in row])
        while (
            len(prompt) + len(response)
        ) % BLOCK:  # the last block runs whole: what follows goes on like the last row
            response.append(response[-len(codes[0])])
        ids, first, side = [*prompt, *response], len(prompt), len(codes)
        sequence.picture(first, side, side)
        sequence.named |= {first + i: name for i, name in enumerate(_names(scene, side)) if i not in untold}
        sequence.asking |= {first + index: asks.get(place, 0) for index, place in enumerate(_places(side))}
        sequence.clean(ids[:-BLOCK], 0, 0)
        sequence.masked(prompt, response, 1, self.tokens.mask, rng, clean_to=len(ids))
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
            asked = next(
                made for made in map(question, repeat(scene), repeat(topic), repeat(rng)) if _fair(made, scene)
            )
            prompt = prompts.understand(self.tokens, _grid(codes), asked.text).conditional
            if shared is None:
                shared = (len(codes) * len(codes[0]) + 5) // BLOCK * BLOCK  # what is the same for every question
                sequence.clean(prompt[:shared], 0, 0)
            answer = self.tokens.encode(asked.answer)
            if topic is Topic.DESCRIPTION:
                phrases, begun = {}, 0
                for shape, end in self._phrases(asked.answer, scene).items():
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

    def _phrases(self, text: str, scene: Scene) -> dict[Shape, int]:
        """Where in a text, in tokens, what is said of each shape ends, with its place; in the order of the text."""
        ends = {shape: text.index(shape.place.value) + len(shape.place.value) for shape in scene.shapes}
        return {shape: len(self.tokens.encode(text[:end])) for shape, end in sorted(ends.items(), key=lambda x: x[1])}

    @staticmethod
    def _tell(sequence: Packed, first: int, scene: Scene, side: int, untold: frozenset[int] = frozenset()) -> None:
        """Say that the codes of a given picture tell of its shapes."""
        for index, (name, place) in enumerate(zip(_names(scene, side), _places(side), strict=True)):
            if name and index not in untold:
                sequence.telling[first + index], sequence.named[first + index] = PARTS[place], name


class Learner(nn.Module):
    """The network, and the heads that ask it where a code is, and what it is part of."""

    def __init__(self, config: BackboneConfig = CONFIG) -> None:
        super().__init__()
        self.network = Network(config)
        self.placed = nn.Linear(config.hidden_size, 2 * SIDES)
        # colour and kind apart: of both as one class, it would learn which of them are held out where
        self.named = nn.Linear(config.hidden_size, COLOURS + KINDS)

    @torch.no_grad()
    def begin_with(self, book: torch.Tensor) -> None:
        """Let the embeddings and head rows of the codes begin near to what the tokenizer knows of them."""
        offset = self.network.config.image_token_offset
        for weight in (self.network.model.word_embeddings.weight, self.network.lm_head.weight):
            weight[offset:] = weight.std() * book + 0.2 * weight[offset:]

    def losses(self, task: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross entropy of the masked tokens, and the additional losses."""
        inner: list[torch.Tensor] = []
        hidden = self.network(batch["ids"], batch["positions"], batch["mask"], inner)
        learned, cells, names = (batch[name] >= 0 for name in ("targets", "cells", "names"))
        loss = F.cross_entropy(self.network.lm_head(hidden[learned]), batch["targets"][learned])
        by_row, by_column = self.placed(inner[PLACED_LAYER][cells]).chunk(2, dim=-1)
        cell = batch["cells"][cells]
        place = F.cross_entropy(by_row, cell // SIDES) + F.cross_entropy(by_column, cell % SIDES)
        told = {"loss": loss + PLACING * place, task: loss, "place": place}
        for layer, which in (
            (PLACED_LAYER, names & (batch["parts"] > 0) & (batch["parts"] < INSTRUCTION)),
            (LOOKING_LAYER, names & (batch["parts"] == INSTRUCTION)),
            (CHANGING_LAYER, names & learned),
        ):
            if which.any():
                by_colour, by_kind = self.named(inner[layer][which]).split([COLOURS, KINDS], dim=-1)
                name = batch["names"][which]
                told[f"name {layer}"] = F.cross_entropy(by_colour, name // KINDS) + F.cross_entropy(
                    by_kind, name % KINDS
                )
                told["loss"] = told["loss"] + NAMING * told[f"name {layer}"]
        part, wanted = batch["parts"][:, None, :], batch["asks"][:, :, None]
        at_source = batch["sources"][:, :, None] == torch.arange(part.shape[-1])
        kept = at_source & (wanted < INSTRUCTION)
        moved = batch["moved"][:, :, None] == torch.arange(part.shape[-1])
        for name, layer, head, right in (
            ("source", LOOKING_LAYER, SOURCE_HEAD, at_source),
            *((f"source {layer} {head}", layer, head, kept) for layer, head in COPYING),
            *((f"moved {layer} {head}", layer, head, moved) for layer, head in COPYING if layer > CHANGING_LAYER),
            ("part", LOOKING_LAYER, PART_HEAD, (part & wanted & (INSTRUCTION - 1)) > 0),
            ("instruction", CHANGING_LAYER, PART_HEAD, (part & wanted & INSTRUCTION) > 0),
        ):
            right = right & batch["mask"]
            if (which := right.any(dim=-1)).any():
                scores = self.network.model.layers[layer].attention.scores(head).masked_fill(~batch["mask"], -torch.inf)
                chances = scores[which].log_softmax(dim=-1).masked_fill(~right[which], -torch.inf)
                told[name] = -chances.logsumexp(dim=-1).mean()
                told["loss"] = told["loss"] + LOOKING * told[name]
        if (batch["branches"] >= 0).any():
            told["guided"] = self._guided(hidden, batch["targets"], batch["branches"])
            told["loss"] = told["loss"] + GUIDING * told["guided"]
        return told

    def _guided(self, hidden: torch.Tensor, targets: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
        """Cross entropy of what guidance makes of an edit's branches with the instruction and without it."""
        both = [hidden[branches == branch][targets[branches == branch] >= 0] for branch in (0, 1)]
        conditional, guided = (
            self.network.lm_head(sum(share * part for share, part in zip(shares, both, strict=True)))
            for shares in ((1, 0), GUIDANCE.coefficients[:2])
        )
        with torch.no_grad():
            ratio = conditional.std(dim=-1, keepdim=True) / guided.std(dim=-1, keepdim=True)
        guided = guided * (GUIDANCE.rescale * ratio + 1 - GUIDANCE.rescale)
        wanted = targets[branches == 0]
        return F.cross_entropy(guided, wanted[wanted >= 0])


def losses(learner: Learner, curriculum: Curriculum, turns: Mapping[int, tuple[str, ...]]):
    """The losses of a step for ``loop.train``; the tasks take turns."""

    def of(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        tasks = turns[max(first for first in turns if first <= step)]
        task = tasks[step % len(tasks)]
        return learner.losses(task, curriculum.batch(task, rng))

    return of


def _name(shape: Shape | None) -> int:
    """The class of a shape, by colour and kind; 0 for none."""
    return _class(1 + list(Colour).index(shape.colour), 1 + list(Kind).index(shape.kind)) if shape else 0


def _names(scene: Scene, side: int) -> list[int]:
    """The class of what each code of a picture is part of."""
    return _class(*patch_names([scene], side)).flatten().tolist()


def _class(colour: int | torch.Tensor, kind: int | torch.Tensor) -> int | torch.Tensor:
    return colour * KINDS + kind


def _fair(asked: Question, scene: Scene) -> bool:
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
def _places(side: int) -> list[Place]:
    """The place that each code of a picture belongs to."""
    return [list(Place)[2 * row // side * 2 + 2 * column // side] for row in range(side) for column in range(side)]


def _moved(example: Example) -> tuple[Place, Place] | None:
    """From where to where an edit moves a shape, if it does."""
    places = [
        (before.place, after.place)
        for before in example.scene.shapes
        for after in example.result.shapes
        if replace(before, place=after.place) == after
    ]
    moved = [(start, end) for start, end in places if not example.result.at(start) and not example.scene.at(end)]
    return moved[0] if moved else None


def _moves(example: Example, side: int) -> dict[int, int]:
    """Which code of the source moves to where: index in the result -> index in the source."""
    if not (moved := _moved(example)):
        return {}
    start, end = ([index for index, at in enumerate(_places(side)) if at is place] for place in moved)
    return dict(zip(end, start, strict=True))


def _scrambled(example: Example, rng: random.Random) -> Example:
    """The edit with any codes for parts of the shapes that stay as they are or that move: they are to be copied,
    whatever they are. What is left of a shape that moves still tells which it is."""
    side = len(example.small)
    kept = {shape.place for shape in example.scene.shapes if shape in example.result.shapes}
    if example.scene.background != example.result.background:
        return example
    shares = {place: rng.uniform(0.3, 1.0) for place in Place}
    copied = {
        index: index for index, place in enumerate(_places(side)) if place in kept and rng.random() < shares[place]
    }
    copied |= {index: source for index, source in _moves(example, side).items() if rng.random() < 0.5}
    before, after = ([code for row in codes for code in row] for codes in (example.small, example.changed))
    for index, source in copied.items():
        before[source] = after[index] = rng.randrange(CODES)
    before, after = (
        [codes[start : start + side] for start in range(0, side * side, side)] for codes in (before, after)
    )
    return replace(
        example, small=before, changed=after, any_before=frozenset(copied.values()), any_after=frozenset(copied)
    )


def _aligned(branch: list[int], length: int) -> tuple[int, list[int]]:
    """Where a branch begins that ends with a conditional one of this length, as ``denoising`` lays them out, and its ids."""
    begin = max(0, length - len(branch))
    return begin, [0] * begin + branch[len(branch) - (length - begin) :]


def _find(ids: list[int], part: list[int]) -> int:
    """Where ``part`` begins in ``ids``."""
    return next(start for start in range(len(ids)) if ids[start : start + len(part)] == part)


def _grid(codes: list[list[int]]) -> VQGrid:
    return VQGrid.from_list([code for row in codes for code in row], len(codes), len(codes[0]), CODES)

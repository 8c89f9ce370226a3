"""The backbone: block diffusion on captions, questions and edits, with the prompts that the tasks use.

Every block that a task denoises is learned at once: the sequence with its clean tokens is followed by a noisy copy of
each such block, which sees the clean blocks before its own and itself (arXiv:2503.09573). Several questions share the
clean blocks of their picture.

Three more losses make it learn in minutes what it would find out in hours, as in the decoder: after its second layer, a
code has to know its row and column; in its third, the first head of a code that is being edited is told to look at the
same place of the source; after its fourth, a masked code has to know which colour and kind of shape it will be part of.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ... import prompts
from ...config import BackboneConfig
from ...tokens import Tokens
from ...vq import VQGrid
from ..grammar import Change, Topic, caption, question
from ..world import Colour, Kind, Scene
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
SCHEDULE = Schedule(steps=6000, rate=2e-3, warmup=150, average=0.998)
BATCHES = {"draw": 20, "edit": 14, "ask": 8, "ask small": 16}  # pictures, each with QUESTIONS where it is asked about
TURNS = ("draw", "edit", "draw", "ask", "draw", "edit", "ask small", "draw", "edit", "ask")
QUESTIONS = 5
SIDES = 16  # rows and columns of the largest grid
PLACED_LAYER, LOOKING_LAYER, NAMED_LAYER = 1, 2, 3
PLACING, LOOKING, NAMING = 0.1, 0.1, 0.5  # weights of the additional losses
NAMES = (1 + len(Colour)) * (1 + len(Kind))
DROPPED = 0.1  # share of prompts, instructions and (half of it) source pictures that are left out, for guidance


@dataclass(frozen=True)
class Example:
    """A scene that the backbone may see, its codes, and what an edit makes of it."""

    scene: Scene
    small: list[list[int]]  # as it is drawn and edited
    large: list[list[int]]  # as it is understood
    change: Change
    instruction: str
    result: Scene
    changed: list[list[int]]


class Packed:
    """One training sequence: clean blocks, and noisy copies of blocks.

    Each token has a position and a group. Group 0 is what all share; the others, a question each, do not see each other.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.targets: list[int] = []  # -1 where nothing is to be learned
        self.positions: list[int] = []
        self.groups: list[int] = []
        self.noisy: list[int] = []
        self.cells: list[int] = []  # row * SIDES + column of a code, -1 of other tokens
        self.sources: list[int] = []  # the index in this sequence of the code that stands at the same place of a source
        self.names: list[int] = []  # colour and kind of the shape that a masked code is part of, -1 of other tokens
        # first position, columns, rows, names
        self._pictures: list[tuple[int, int, int, list[int] | None]] = []

    def picture(self, start: int, columns: int, rows: int, names: list[int] | None = None) -> None:
        """Say that a picture begins at a position, and what its codes will be part of."""
        self._pictures.append((start, columns, rows, names))

    def clean(self, ids: Sequence[int], start: int, group: int) -> None:
        """Whole blocks of clean tokens."""
        self._add(ids, [-1] * len(ids), start, group, 0)

    def masked(
        self, prompt: list[int], response: list[int], group: int, mask: int, rng: random.Random, clean_to: int
    ) -> None:
        """A noisy copy of each block that holds a token of the response.

        Args:
            clean_to: the position to which the clean blocks that it may see are there already; the others are added.
        """
        ids = [*prompt, *response]
        for start in range(len(prompt) // BLOCK * BLOCK, len(ids), BLOCK):
            for missing in range(clean_to, start, BLOCK):
                self.clean(ids[missing : missing + BLOCK], missing, group)
            clean_to = max(clean_to, start)
            own, share = range(max(start, len(prompt)), start + BLOCK), rng.random()
            hidden = {place for place in own if rng.random() < share} or {rng.choice(own)}
            places = range(start, start + BLOCK)
            block = [mask if place in hidden else ids[place] for place in places]
            self._add(block, [ids[place] if place in hidden else -1 for place in places], start, group, 1)

    def _add(self, ids: Sequence[int], targets: Sequence[int], start: int, group: int, noisy: int) -> None:
        self.ids += ids
        self.targets += targets
        self.positions += range(start, start + len(ids))
        self.groups += [group] * len(ids)
        self.noisy += [noisy] * len(ids)
        for position, target in zip(range(start, start + len(ids)), targets, strict=True):
            cell = source = name = -1
            for number, (first, columns, rows, names) in enumerate(self._pictures):
                if 0 <= (index := position - first) < columns * rows:
                    cell = index // columns * SIDES + index % columns
                    source = self._pictures[0][0] + index if number and noisy else -1
                    name = names[index] if names and target >= 0 else -1
            self.names.append(name)
            self.cells.append(cell)
            self.sources.append(source)


class Curriculum:
    """Draws training batches from examples.

    Args:
        tokens: of the checkpoint whose prompts are to be learned.
        examples: none of them held out.
    """

    def __init__(self, tokens: Tokens, examples: Sequence[Example]) -> None:
        self.tokens, self.examples = tokens, examples

    def batch(self, task: str, rng: random.Random) -> dict[str, torch.Tensor]:
        """``ids``, ``targets``, ``positions`` [batch, length] and ``mask`` [batch, length, length]."""
        make = {"draw": self._draw, "edit": self._edit, "ask": self._ask, "ask small": self._ask_small}[task]
        sequences = [make(rng.choice(self.examples), rng) for _ in range(BATCHES[task])]
        longest = max(len(sequence.ids) for sequence in sequences)
        columns = {
            "ids": self.tokens.end,
            "targets": -1,
            "positions": 0,
            "groups": -1,
            "noisy": 0,
            "cells": -1,
            "sources": -1,
            "names": -1,
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
        return batch | {"mask": same | earlier}

    def _draw(self, example: Example, rng: random.Random) -> Packed:
        conditional, unconditional = prompts.text_to_image(self.tokens, caption(example.scene, rng), 8, 8).branches
        prompt = unconditional if rng.random() < DROPPED else conditional
        return self._picture(prompt, None, example.scene, example.small, rng)

    def _edit(self, example: Example, rng: random.Random) -> Packed:
        branches = prompts.edit(self.tokens, _grid(example.small), example.instruction).branches
        branch = rng.choices(branches, (1 - 1.5 * DROPPED, DROPPED, DROPPED / 2))[0]
        source = branch.index(self.tokens.boi) + 1 if branch is not branches[2] else None
        return self._picture(branch, source, example.result, example.changed, rng)

    def _picture(
        self, prompt: list[int], source: int | None, scene: Scene, codes: list[list[int]], rng: random.Random
    ) -> Packed:
        response = self.tokens.codes_to_ids([code for row in codes for code in row])
        while (
            len(prompt) + len(response)
        ) % BLOCK:  # the last block runs whole: what follows goes on like the last row
            response.append(response[-len(codes[0])])
        sequence, ids = Packed(), [*prompt, *response]
        if source is not None:
            sequence.picture(source, len(codes[0]), len(codes))
        colours, kinds = patch_names([scene], len(codes))
        sequence.picture(len(prompt), len(codes[0]), len(codes), (colours * (1 + len(Kind)) + kinds).flatten().tolist())
        sequence.clean(ids[:-BLOCK], 0, 0)
        sequence.masked(prompt, response, 1, self.tokens.mask, rng, clean_to=len(ids))
        return sequence

    def _ask(self, example: Example, rng: random.Random) -> Packed:
        return self._questions(example, example.large, rng)

    def _ask_small(self, example: Example, rng: random.Random) -> Packed:
        return self._questions(example, example.small, rng)

    def _questions(self, example: Example, codes: list[list[int]], rng: random.Random) -> Packed:
        sequence, shared = Packed(), None
        sequence.picture(len(self.tokens.header(len(codes), len(codes[0]))), len(codes[0]), len(codes))
        topics = [Topic.DESCRIPTION, *rng.sample([t for t in Topic if t is not Topic.DESCRIPTION], QUESTIONS - 1)]
        for group, topic in enumerate(topics, 1):
            asked = question(example.scene, topic, rng)
            prompt = prompts.understand(self.tokens, _grid(codes), asked.text).conditional
            if shared is None:
                shared = (len(codes) * len(codes[0]) + 5) // BLOCK * BLOCK  # what is the same for every question
                sequence.clean(prompt[:shared], 0, 0)
            response = [*self.tokens.encode(asked.answer), self.tokens.end]
            while (len(prompt) + len(response)) % BLOCK:
                response.append(self.tokens.end)
            sequence.masked(prompt, response, group, self.tokens.mask, rng, clean_to=shared)
        return sequence


class Learner(nn.Module):
    """The network, and the heads that ask it where a code is, and what it is part of."""

    def __init__(self, config: BackboneConfig = CONFIG) -> None:
        super().__init__()
        self.network = Network(config)
        self.placed = nn.Linear(config.hidden_size, 2 * SIDES)
        self.named = nn.Linear(config.hidden_size, NAMES)

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
        learned, cells, sources, names = (batch[name] >= 0 for name in ("targets", "cells", "sources", "names"))
        loss = F.cross_entropy(self.network.lm_head(hidden[learned]), batch["targets"][learned])
        by_row, by_column = self.placed(inner[PLACED_LAYER][cells]).chunk(2, dim=-1)
        cell = batch["cells"][cells]
        place = F.cross_entropy(by_row, cell // SIDES) + F.cross_entropy(by_column, cell % SIDES)
        told = {"loss": loss + PLACING * place, task: loss, "place": place}
        if names.any():
            told["name"] = F.cross_entropy(self.named(inner[NAMED_LAYER][names]), batch["names"][names])
            told["loss"] = told["loss"] + NAMING * told["name"]
        if sources.any():
            query, key = self.network.model.layers[LOOKING_LAYER].attention.looked
            scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~batch["mask"], -torch.inf)
            told["look"] = F.cross_entropy(scores[sources], batch["sources"][sources])
            told["loss"] = told["loss"] + LOOKING * told["look"]
        return told


def losses(learner: Learner, curriculum: Curriculum):
    """The losses of a step for ``loop.train``; the tasks take turns."""

    def of(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        task = TURNS[step % len(TURNS)]
        return learner.losses(task, curriculum.batch(task, rng))

    return of


def _grid(codes: list[list[int]]) -> VQGrid:
    return VQGrid.from_list([code for row in codes for code in row], len(codes), len(codes[0]), CODES)

"""The backbone: block diffusion on what its curriculum gives.

More losses make it learn in minutes what it would find out in hours, as in the decoder. After its second layer, a code
has to know its row and column, and a word that ends what is said of a shape, which shape that is. In its third, the first
head of a code that is being edited is told to look at the same place of the source; another head of a code that is being
drawn, at the word for its place, of an answer, at the codes that it is about, of an instruction, at what is to be changed,
which it then has to know. In the fourth, a code that is to be changed is told to look at the instruction, and after it
a masked code has to know which shape it will be part of. Where nothing changes, heads of the fourth and of the last
layer look at the source too, and those of the last, where something moved to, at where it was: one head is too narrow
to carry a code over.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...backbone.guidance import Guidance
from ...checkpoint.config import BackboneConfig
from .curriculum import COLOURS, GUIDED, KINDS, Curriculum
from .loop import Schedule
from .network import Network
from .packed import INSTRUCTIONS, SIDES
from .tokenizer import CODES

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
PLACED_LAYER, LOOKING_LAYER, CHANGING_LAYER = 1, 2, 3
SOURCE_HEAD, PART_HEAD = 0, CONFIG.num_attention_heads // CONFIG.num_key_value_heads  # with keys of their own
COPYING = ((CHANGING_LAYER, SOURCE_HEAD), (4, SOURCE_HEAD), (4, PART_HEAD))  # layers and heads
PLACING, LOOKING, NAMING, GUIDING = 0.3, 0.2, 0.5, 0.5  # weights of the additional losses


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        schedule: how long, and how fast.
        turns: the first step of each, and the tasks in turn.
        scrambled: the share of edits in which any codes stand where they are only to be copied.
        mean_of: stages whose weights, in the mean, it begins with; those of the one before if there are none.
    """

    schedule: Schedule
    turns: dict[int, tuple[str, ...]]
    scrambled: float = 0.0
    mean_of: tuple[str, ...] = ()


# each task often enough that it gets better, and those of before often enough that they get no worse
TURNS = (
    *("edit", "story", "plan", "two", "borrow", "story on", "edit", "redraw", "draw", "ask", "plan", "story", "edit"),
    *("two small", "free", "borrow", "story", "edit", "story begin", "redraw before", "two", "plan", "draw", "edit"),
    *("ask small", "story on", "story", "edit", "borrow", "ask"),
)
MOSTLY_SEVERAL = (  # pictures: questions about two, edits that take something from another, stories
    *("two", "story", "borrow", "two", "edit", "two small", "story", "two", "borrow", "story on", "draw", "two"),
    *("borrow", "story", "two", "plan", "redraw", "ask", "two", "borrow", "story", "story begin", "free", "two"),
    *("edit", "two small", "borrow", "story", "two", "redraw before", "story on", "ask small"),
)
MOSTLY_STORIES = (  # and edits, which have to be as good again as before
    *("edit", "story", "borrow", "edit", "two", "story", "edit", "story on", "redraw", "borrow", "edit", "story"),
    *("draw", "edit", "borrow", "two", "edit", "story", "plan", "edit", "two small", "redraw before", "story on"),
    *("edit", "free", "borrow", "story", "ask", "edit", "story begin", "two", "ask small"),
)
MOSTLY_STORY_WORDS = (  # which are what stories fail by, and edits
    *("edit", "story", "borrow", "edit", "story words", "two", "edit", "story on", "story words", "edit", "plan"),
    *("story", "edit", "story words", "borrow", "edit", "draw", "story words", "two", "edit", "story", "borrow"),
    *("edit", "story words", "redraw", "edit", "two small", "story on", "story words", "edit", "free", "story"),
    *("ask", "edit", "story words", "borrow", "edit", "story begin", "two", "story words", "edit", "story"),
    *("ask small", "redraw before", "edit", "story words"),
)
ALL_OF_IT = (  # questions first, which had become a little worse
    *("ask", "edit", "story on", "ask", "borrow", "edit", "ask small", "story", "two", "ask", "edit", "draw"),
    *("ask", "borrow", "edit", "story on", "ask", "two", "edit", "plan", "ask", "story", "edit", "redraw"),
    *("ask", "story words", "edit", "free", "ask", "borrow", "ask small", "story begin", "edit", "redraw before"),
)
MOSTLY_OWN = (  # questions about its own pictures, whose edges are not as sharp, and drawing them
    *("ask own", "draw", "edit", "ask own", "story on", "draw", "ask own", "borrow", "ask own", "edit", "draw"),
    *("two", "ask own", "draw", "story words", "ask own", "edit", "plan", "ask own", "draw", "borrow", "ask own"),
    *("free", "edit", "ask own", "draw", "story begin", "ask own", "two", "redraw before", "ask"),
)
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
# What is learned after that, from a checkpoint alone: it has no heads that ask, so they come first.
FURTHER = {
    "backbone-heads": Stage(Schedule(steps=80, rate=3e-3, warmup=10), {0: ("draw", "edit", "ask", "edit")}),
    "backbone-sixth": Stage(Schedule(steps=4000, rate=1.2e-3, warmup=200, average=0.998), {0: TURNS}, scrambled=0.3),
    "backbone-seventh": Stage(
        Schedule(steps=3000, rate=1.2e-3, warmup=100, average=0.998), {0: MOSTLY_SEVERAL}, scrambled=0.3
    ),
    "backbone-eighth": Stage(
        Schedule(steps=1500, rate=1e-3, warmup=100, average=0.998), {0: MOSTLY_STORIES}, scrambled=0.3
    ),
    "backbone-ninth": Stage(
        Schedule(steps=3000, rate=9e-4, warmup=100, average=0.998), {0: MOSTLY_STORY_WORDS}, scrambled=0.3
    ),
    "backbone-tenth": Stage(Schedule(steps=1000, rate=6e-4, warmup=50, average=0.996), {0: ALL_OF_IT}, scrambled=0.3),
    "backbone-eleventh": Stage(
        Schedule(steps=600, rate=6e-4, warmup=40, average=0.996),
        {0: MOSTLY_OWN},
        scrambled=0.3,
        mean_of=("backbone-ninth", "backbone-tenth"),  # tells stories as the one, and answers as the other
    ),
}
# Stages whose weights, in the mean, are what is written: what the last began with, and what it learned, half each.
BLENDED = ("backbone-ninth", "backbone-tenth", "backbone-eleventh", "backbone-eleventh")


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

    @torch.no_grad()
    def begin_words(self, words: Mapping[int, list[int]]) -> None:
        """Let new tokens begin as the mean of those that stood in their place."""
        for weight in (self.network.model.word_embeddings.weight, self.network.lm_head.weight):
            for word, pieces in words.items():
                weight[word] = weight[pieces].mean(dim=0)

    def losses(self, task: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross entropy of the masked tokens, and the additional losses."""
        inner: list[torch.Tensor] = []
        hidden = self.network(batch["ids"], batch["positions"], batch["mask"], inner)
        learned, cells, names = (batch[name] >= 0 for name in ("targets", "cells", "names"))
        wanted = batch["targets"][learned]
        each, text = F.cross_entropy(self.network.lm_head(hidden[learned]), wanted, reduction="none"), wanted < TEXT_IDS
        mixed = text.any() and not text.all()
        # a plan is a fifth of what is learned with its picture, and has to be right to the last word
        loss = each[text].mean() + each[~text].mean() if mixed else each.mean()
        by_row, by_column = self.placed(inner[PLACED_LAYER][cells]).chunk(2, dim=-1)
        cell = batch["cells"][cells]
        place = F.cross_entropy(by_row, cell // SIDES) + F.cross_entropy(by_column, cell % SIDES)
        told = {"loss": loss + PLACING * place, task: loss, "place": place}
        if mixed:
            told |= {f"{task}, words": each[text].mean(), f"{task}, codes": each[~text].mean()}
        for layer, which in (
            (PLACED_LAYER, names & ((batch["parts"] & ~INSTRUCTIONS) > 0)),
            (LOOKING_LAYER, names & ((batch["parts"] & INSTRUCTIONS) > 0)),
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
        kept = at_source & ((wanted & INSTRUCTIONS) == 0)
        moved = batch["moved"][:, :, None] == torch.arange(part.shape[-1])
        for name, layer, head, right in (
            ("source", LOOKING_LAYER, SOURCE_HEAD, at_source),
            *((f"source {layer} {head}", layer, head, kept) for layer, head in COPYING),
            *((f"moved {layer} {head}", layer, head, moved) for layer, head in COPYING if layer > CHANGING_LAYER),
            ("part", LOOKING_LAYER, PART_HEAD, (part & wanted & ~INSTRUCTIONS) > 0),
            ("instruction", CHANGING_LAYER, PART_HEAD, (part & wanted & INSTRUCTIONS) > 0),
        ):
            right = right & batch["mask"]
            if (which := right.any(dim=-1)).any():
                scores = self.network.model.layers[layer].attention.scores(head).masked_fill(~batch["mask"], -torch.inf)
                chances = scores[which].log_softmax(dim=-1).masked_fill(~right[which], -torch.inf)
                told[name] = -chances.logsumexp(dim=-1).mean()
                told["loss"] = told["loss"] + LOOKING * told[name]
        if (batch["branches"] >= 0).any():
            told["guided"] = self._guided(hidden, batch["targets"], batch["branches"], GUIDED[task])
            told["loss"] = told["loss"] + GUIDING * told["guided"]
        return told

    def _guided(
        self, hidden: torch.Tensor, targets: torch.Tensor, branches: torch.Tensor, guidance: Guidance
    ) -> torch.Tensor:
        """Cross entropy of what guidance makes of the branches that it weighs."""
        weighed = [branch for branch, weight in enumerate(guidance.coefficients) if weight]
        parts = [hidden[branches == branch][targets[branches == branch] >= 0] for branch in weighed]
        mixed = sum(guidance.coefficients[branch] * part for branch, part in zip(weighed, parts, strict=True))
        guided = self.network.lm_head(mixed)
        with torch.no_grad():
            conditional = self.network.lm_head(parts[0])
            ratio = conditional.std(dim=-1, keepdim=True) / guided.std(dim=-1, keepdim=True)
        guided = guided * (guidance.rescale * ratio + 1 - guidance.rescale)
        wanted = targets[branches == 0]
        return F.cross_entropy(guided, wanted[wanted >= 0])


def losses(learner: Learner, curriculum: Curriculum, turns: Mapping[int, tuple[str, ...]]):
    """The losses of a step for ``loop.train``; the tasks take turns."""

    def of(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        tasks = turns[max(first for first in turns if first <= step)]
        task = tasks[step % len(tasks)]
        return learner.losses(task, curriculum.batch(task, rng))

    return of

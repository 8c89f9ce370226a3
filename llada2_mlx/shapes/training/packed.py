"""Training sequences: clean blocks, noisy copies of those that a task denoises, and what their tokens are told.

The sequence with its clean tokens is followed by a noisy copy of each block that a task denoises, which sees the clean
blocks before its own and itself (arXiv:2503.09573): what generation will see.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import torch

from ..several import MOST_PICTURES
from ..world import Place

BLOCK = 32
SIDES = 16  # rows and columns of the largest grid
PADDING_LEARNED = 0.1  # share of the ends after the first that are to be learned
# What a token tells of, as bits: the places of a picture, and an instruction that changes it; each picture has bits of its own.
PARTS = {place: 1 << number for number, place in enumerate(Place)}
INSTRUCTION = 1 << len(Place)
_BITS = len(Place) + 1
INSTRUCTIONS = sum(INSTRUCTION << _BITS * picture for picture in range(MOST_PICTURES))


def part(place: Place, picture: int = 0) -> int:
    """The bit of a place of a picture."""
    return PARTS[place] << _BITS * picture


def instruction(picture: int = 0) -> int:
    """The bit of the instruction that makes a picture of the one before it."""
    return INSTRUCTION << _BITS * picture


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
        self.sources: list[int] = []  # the index in this sequence of the same code of the picture before
        self.moved: list[int] = []  # the same, of the code that an edit moves to here
        self.names: list[int] = []  # colour and kind of the shape that a token has to know, -1 of other tokens
        self.parts: list[int] = []  # bits of what a token tells of
        self.asks: list[int] = []  # those that it is told to look at
        self._pictures: list[tuple[int, int, int]] = []  # first position, columns, rows
        self.named: dict[int, int] = {}  # position -> name, part and ask of the tokens that are added from now on
        self.telling: dict[int, int] = {}
        self.asking: dict[int, int] = {}
        self.moving: dict[int, int] = {}  # position -> position of the code that moves to there

    def picture(self, start: int, columns: int, rows: int) -> None:
        """Say that a picture begins at a position; what it is made of is the picture said before it."""
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
        fill: Sequence[int] = (),
        open: Collection[int] | None = None,
    ) -> None:
        """A noisy copy of each block that holds a token of the response.

        Args:
            fill: what the last block is filled up with: it is learned too, but of no picture and told nothing.
            open: positions of the response that may be masked; the others are kept, and a block without one is only
                read. None is all.
            clean_to: the position to which the clean blocks that it may see are there already; the others are added.
            matters: the position from which on only a few tokens are to be learned; such a block is all masked half
                of the time.
        """
        end = len(prompt) + len(response)
        ids = [*prompt, *response, *fill]
        for start in range(len(prompt) // BLOCK * BLOCK, len(ids), BLOCK):
            own = [place for place in range(max(start, len(prompt)), start + BLOCK) if open is None or place in open]
            if not own:
                continue
            own += [place for place in range(max(start, end), start + BLOCK) if place not in own]
            for missing in range(clean_to, start, BLOCK):
                self.clean(ids[missing : missing + BLOCK], missing, group)
            clean_to, share = max(clean_to, start), rng.random()
            if matters is not None and rng.random() < 0.5:
                share = 1.0
            hidden = {place for place in own if rng.random() < share} or {rng.choice(own)}
            places = range(start, start + BLOCK)
            block = [mask if place in hidden else ids[place] for place in places]
            learned = {
                place for place in hidden if matters is None or place < matters or rng.random() < PADDING_LEARNED
            }
            targets = [ids[place] if place in learned else -1 for place in places]
            self._add(block, targets, start, group, 1, hidden, range(len(prompt), end))

    def _add(
        self,
        ids: Sequence[int],
        targets: Sequence[int],
        start: int,
        group: int,
        noisy: int,
        hidden: Collection[int] = (),
        response: range | None = None,
    ) -> None:
        """Tokens from a position on; those of ``hidden`` are masks and tell nothing, those after the response fill up."""
        before = max(0, self.begin - start)
        ids, targets, start = ids[before:], targets[before:], start + before
        self.ids += ids
        self.targets += targets
        self.positions += range(start, start + len(ids))
        self.groups += [group] * len(ids)
        self.noisy += [noisy] * len(ids)
        for position, target in zip(range(start, start + len(ids)), targets, strict=True):
            told, made = response is None or position < response.stop, response is not None and position in response
            cell, source = self._cell(position) if told else (-1, -1)
            self.cells.append(cell)
            self.sources.append(source if made else -1)
            self.moved.append(self.moving[position] - self.begin if made and position in self.moving else -1)
            self.parts.append(self.telling.get(position, 0) if told and position not in hidden else 0)
            self.asks.append(self.asking.get(position, 0) if told else 0)
            knows = told and (target >= 0 or self.parts[-1])
            self.names.append(self.named.get(position, -1) if knows else -1)

    def _cell(self, position: int) -> tuple[int, int]:
        """Which cell of a picture is at a position, and the index of the same one of the picture before; -1 for none."""
        for number, (first, columns, rows) in enumerate(self._pictures):
            if 0 <= (index := position - first) < columns * rows:
                cell = index // columns * SIDES + index % columns
                return cell, self._pictures[number - 1][0] - self.begin + index if number else -1
        return -1, -1


def stacked(sequences: Sequence[Packed], end: int) -> dict[str, torch.Tensor]:
    """A batch of sequences, filled up with ``end``: ``mask`` bool [batch, length, length], ``branches`` [batch], and of
    each token [batch, length] integers: ``ids``, ``targets``, ``positions``, ``cells``, ``sources``, ``moved``, ``names``,
    ``parts``, ``asks`` (see ``Packed``).
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    columns = {
        "ids": end,
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


def aligned(branch: Sequence[int], length: int) -> tuple[int, list[int]]:
    """Where a branch begins that ends with a conditional one of this length, as ``denoising`` lays them out, and its ids."""
    begin = max(0, length - len(branch))
    return begin, [0] * begin + list(branch[len(branch) - (length - begin) :])


def find(ids: Sequence[int], piece: Sequence[int]) -> int:
    """Where ``piece`` begins in ``ids``."""
    return next(start for start in range(len(ids)) if list(ids[start : start + len(piece)]) == list(piece))

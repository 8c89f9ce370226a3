"""What could be done before a step's tokens are known: how often the next state of a block is guessed right, and what the host takes.

``python -m benchmarks.ahead`` in ``tests/``. The guess is what the step's own candidates would give if the next step found the same:
the rule of acceptance, applied once more to what is left. (Self-speculation, arXiv:2603.25702.)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from llada2_mlx import tasks
from llada2_mlx.backbone import denoising
from llada2_mlx.backbone.acceptance import Acceptance, Candidates, Sampling
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.shapes import measures

from .accuracy import GOLDEN


@dataclass
class Guesses:
    """How many next states were guessed, and how many of them came; ``blocks`` and ``steps`` were run, ``last`` used all their steps."""

    made: int = 0
    held: int = 0
    blocks: int = 0
    steps: int = 0
    last: int = 0

    @property
    def thrown(self) -> int:
        """Steps that would have run for nothing, had each been given out before the one before it was read."""
        return self.blocks - self.last


@dataclass
class Guessing:
    """An acceptance that decides as another one does, and guesses what that one will decide next."""

    own: Acceptance
    steps: int
    found: Guesses
    guess: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False)

    def __call__(self, candidates: Candidates, masked: mx.array, step: int, keys: Sequence[mx.array]) -> mx.array:
        accepted = self.own(candidates, masked, step, keys)
        found, now = self.found, _state(candidates, accepted)
        found.blocks += step == 0
        found.steps += 1
        found.last += step == self.steps - 1
        if step and self.guess is not None:
            found.made += 1
            found.held += all(map(np.array_equal, self.guess, now))
        left = masked & ~accepted
        following = self.own(candidates, left, step + 1, keys) if step + 1 < self.steps else None
        self.guess = _state(candidates, following) if following is not None and left.any().item() else None
        return accepted


def _state(candidates: Candidates, accepted: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Which positions are accepted, and as what; the others count as 0."""
    return np.array(accepted), np.array(mx.where(accepted, candidates.tokens, 0))


def guesses(work: Callable[[], object]) -> Guesses:
    """What was guessed while ``work`` generates."""
    found, make = Guesses(), denoising._acceptance
    guessing = lambda size, steps, *rest: Guessing(make(size, steps, *rest), steps, found)
    with patch.object(denoising, "_acceptance", guessing):
        work()
    return found


def host_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Median seconds a step between two evaluations, in which the network waits for the host; and those of an evaluation."""
    fetch, times = denoising._fetch, []

    def timed(*args):
        began = time.perf_counter()
        result = fetch(*args)
        times.append((began, time.perf_counter()))
        return result

    with patch.object(denoising, "_fetch", timed):
        work()
    between = [began - before for (_, before), (began, _) in zip(times, times[1:])]
    return statistics.median(between), statistics.median(end - began for began, end in times)


def works(prompts: int) -> dict[str, Callable[[], object]]:
    """What is generated, by its name: at the defaults of the nodes, and with nothing accepted early."""
    shapes, golden = (Backbone(Checkpoint(folder), "float32") for folder in (BUILT_IN, GOLDEN))
    wanted = [prompt for _, prompt in islice(measures.prompts(prompts), prompts)]
    slow = Sampling(steps=8, threshold=1.0)
    draw = lambda backbone: [tasks.text_to_vq(backbone, text, 256, 256) for text in wanted]
    late = lambda backbone: [tasks.text_to_vq(backbone, text, 256, 256, sampling=slow) for text in wanted]
    grids = [drawing.grid for drawing in draw(shapes)]
    ask = lambda: [tasks.understand(shapes, grid, "How many shapes are there?", 32) for grid in grids]
    edit = lambda: [tasks.edit(shapes, grid, "Make the background striped.") for grid in grids]
    return {
        "Shapes, text to image": lambda: draw(shapes),
        "Shapes, the same, nothing accepted early": lambda: late(shapes),
        "Shapes, question": ask,
        "Shapes, edit": edit,
        "golden, text to image": lambda: draw(golden),
        "golden, the same, nothing accepted early": lambda: late(golden),
    }


def main(tell: Callable[[str], None] = print) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.ahead", description=main.__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    tell("| what | blocks | steps | guesses | held | steps thrown away | ms for the host | ms for the network |")
    tell("|---|---|---|---|---|---|---|---|")
    for name, work in works(parser.parse_args().prompts).items():
        found, (host, network) = guesses(work), host_seconds(work)
        held = f"{100 * found.held / found.made:.0f} %" if found.made else ""
        thrown = f"{found.thrown} ({100 * found.thrown / found.steps:.0f} %)"
        figures = f"{found.made} | {held} | {thrown} | {1000 * host:.1f} | {1000 * network:.1f}"
        tell(f"| {name} | {found.blocks} | {found.steps} | {figures} |")


if __name__ == "__main__":
    main()

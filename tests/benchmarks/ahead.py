"""What can be done before a step's tokens are known: how often the next state of a block is guessed right, and how long the network waits.

``python -m benchmarks.ahead`` in ``tests/``. The guess is what the step's own candidates would give if the next step found the same:
the rule of acceptance, applied once more to what is left. (Self-speculation, arXiv:2603.25702.)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from llada2_mlx import tasks
from llada2_mlx.backbone import denoising
from llada2_mlx.backbone.acceptance import Acceptance, Candidates, Sampling
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.session import Report
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.shapes import measures

from . import measure, model
from .accuracy import GOLDEN
from .measure import WHEN_NEEDED


@dataclass
class Guesses:
    """How many next states were guessed, and how many of them came."""

    made: int = 0
    held: int = 0


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
    with patch.object(denoising, "_acceptance", guessing), WHEN_NEEDED:
        work()
    return found


def built(work: Callable[[], object]) -> Report:
    """What all generations of ``work`` did together."""
    reports, generate = [], Backbone.run

    def counted(self, job, *args, **options):
        result = generate(self, job, *args, **options)
        reports.append(result.report)
        return result

    with patch.object(Backbone, "run", counted):
        work()
    return sum(reports, Report())


def waits(work: Callable[[], object]) -> tuple[float, float]:
    """Median seconds from the end of a step to the beginning of the next of its block; and those that the host then waits for it."""
    give_out, fetch, progress = denoising._give_out, denoising._fetch, denoising.Progress
    read, idle, running = None, [], []

    def timed_give_out(*args):
        if read is not None:
            idle.append(time.perf_counter() - read)
        return give_out(*args)

    def timed_fetch(*args):
        nonlocal read
        began = time.perf_counter()
        result = fetch(*args)
        read = time.perf_counter()
        running.append(read - began)
        return result

    def told(*args):  # what begins after a step was told is the first of a block
        nonlocal read
        read = None
        return progress(*args)

    with ExitStack() as stack:
        for name, timed in (("_give_out", timed_give_out), ("_fetch", timed_fetch), ("Progress", told)):
            stack.enter_context(patch.object(denoising, name, timed))
        work()
    return statistics.median(idle), statistics.median(running)


def works(prompts: int, folder: Path) -> dict[str, Callable[[], object]]:
    """What is generated, by its name: at the defaults of the nodes, and with nothing accepted early.

    Args:
        folder: where a random model is written that has the published number of layers, so that its graph is as large.
    """
    deep = Backbone(
        Checkpoint(model.write(folder / "deep", replace(model.SIZES["tiny"], num_hidden_layers=20))), "float32"
    )
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
        "20 layers, random, text to image": lambda: deep.run(measure.ours(measure.picture(deep, 512))),
    }


def main(tell: Callable[[str], None] = print) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.ahead", description=main.__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    tell(
        "| what | guesses | held | blocks | steps | built ahead | dropped | ms between steps, built when needed | ahead | ms waited for a step |"
    )
    tell("|---|---|---|---|---|---|---|---|---|---|")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(arguments.prompts, Path(folder)).items():
            tell(_row(name, work))


def _row(name: str, work: Callable[[], object]) -> str:
    found, report = guesses(work), built(work)
    with WHEN_NEEDED:
        before, _ = waits(work)
    after, network = waits(work)
    held = f"{100 * found.held / found.made:.0f} %" if found.made else ""
    counts = f"{report.blocks} | {report.steps} | {report.ahead} | {report.dropped}"
    return f"| {name} | {found.made} | {held} | {counts} | {1000 * before:.2f} | {1000 * after:.2f} | {1000 * network:.1f} |"


if __name__ == "__main__":
    main()

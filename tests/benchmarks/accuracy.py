"""What few bits cost: hidden states and tokens against the model as it is stored, on golden and on Shapes.

``python tests/benchmarks/accuracy.py`` prints a table; with ``--pictures`` one of what it costs in pictures, answers and
edits, the rows of ``python -m llada2_mlx.shapes.measures`` that use the backbone.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
from PIL import Image

from llada2_mlx import prompts, tasks
from llada2_mlx.backbone.convert import convert
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.progress import Progress
from llada2_mlx.shapes import measures
from llada2_mlx.shapes.studio import Studio
from llada2_mlx.vq import VQGrid
from llada2_mlx.worker import MLXWorker

GOLDEN = Path(__file__).parent.parent / "golden/checkpoint"


def hidden_states(network, ids):
    yield Progress("computing", 1, 1)
    return np.array(network(mx.array([ids])).astype(mx.float32))[0]


class Sharing(Studio):
    """A studio that decodes nothing that another one has decoded: one decoder for all precisions of a backbone."""

    pictures: ClassVar[dict[tuple[int, ...], Image.Image]] = {}

    def decode(self, grid: VQGrid, turbo: bool = True) -> Image.Image:
        assert turbo
        codes = tuple(grid.to_list())
        if codes not in self.pictures:
            self.pictures[codes] = super().decode(grid)
        return self.pictures[codes]


def pictures(scale: float, precisions: list[str]) -> None:
    """Print what each precision gets right of the same prompts, questions and edits."""
    count = lambda full: max(1, round(full * scale))
    print("| precision | text to image | question | question about its own picture | edit |\n|---|---|---|---|---|")
    for precision in precisions:
        studio = Sharing(Checkpoint(BUILT_IN), precision)
        print(f"| {precision} ", end="")
        for measure, full in (
            (measures.text_to_image, 200),
            (measures.answers, 300),
            (measures.own_answers, 50),
            (measures.edited, 100),
        ):
            score = measure(studio, count(full))
            print(f"| {100 * score.share:.1f} % of {count(full)} ", end="", flush=True)
        print("|")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pictures", type=float, metavar="SHARE", help="the other table, on this share of the pictures"
    )
    parser.add_argument("--precisions", nargs="*", default=["float32", "8bit", "6bit", "4bit"], help="of that table")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--groups", type=int, nargs="*", default=[64], help="group sizes to try")
    arguments = parser.parse_args()
    if arguments.pictures:
        return pictures(arguments.pictures, arguments.precisions)
    wanted = [prompt for _, prompt in islice(measures.prompts(arguments.prompts), arguments.prompts)]
    print(
        "| model | bits of the experts | group | GB | error of hidden states | equal codes |\n|---|---|---|---|---|---|"
    )
    for name, folder in (("golden", GOLDEN), ("Shapes", BUILT_IN)):
        whole = Backbone(Checkpoint(folder), "float32")
        grids = [tasks.text_to_vq(whole, prompt, 256, 256).grid for prompt in wanted]
        texts = [
            [*prompts.text_to_image(whole.tokens, prompt, 8, 8).conditional, *whole.tokens.codes_to_ids(grid.to_list())]
            for prompt, grid in zip(wanted, grids, strict=True)
        ]
        expected = [whole.run(hidden_states, ids) for ids in texts]
        for group in arguments.groups:
            for bits in (16, 8, 6, 4):
                with tempfile.TemporaryDirectory() as place:
                    copy = MLXWorker().drive(convert(whole.checkpoint, Path(place) / "copy", bits, group))
                    small = Backbone(copy)
                    errors = [
                        np.linalg.norm(small.run(hidden_states, ids) - states, axis=-1)
                        / np.linalg.norm(states, axis=-1)
                        for ids, states in zip(texts, expected, strict=True)
                    ]
                    drawn = [tasks.text_to_vq(small, prompt, 256, 256).grid for prompt in wanted]
                same = np.mean([np.equal(a.to_list(), b.to_list()).mean() for a, b in zip(drawn, grids, strict=True)])
                error = np.median(np.concatenate(errors))
                print(
                    f"| {name} | {bits} | {group if bits < 16 else ''} | {small.size / 1e9:.4f} | {100 * error:.2f} % "
                    f"| {100 * same:.1f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

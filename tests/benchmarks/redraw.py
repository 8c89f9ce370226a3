"""Ways to redraw a part of a picture, on held-out scenes of Shapes: is the new thing there, the rest kept, and a seam to be seen?

``python tests/benchmarks/redraw.py --scenes 20`` prints a table. The mask is the quarter of the picture in which something
is to change: another colour, a shape gone, a shape more.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image

from llada2_mlx import tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.imaging.prepare import Purpose
from llada2_mlx.shapes.grammar import Change, Edit, caption
from llada2_mlx.shapes.measures import edits, same_scene
from llada2_mlx.shapes.studio import Studio
from llada2_mlx.shapes.world import CODE, SIDE, Place, Scene, draw
from llada2_mlx.tasks import Seeing

_CELLS = SIDE // CODE
# what the model sees, positions in a block, guidance
WAYS = {
    "what comes before": (Seeing.BEFORE, 32, 2.0),
    "the whole picture": (Seeing.PICTURE, 32, 2.0),
    "the whole picture, guidance 4": (Seeing.PICTURE, 32, 4.0),
    "what comes before, blocks of 64": (Seeing.BEFORE, 64, 2.0),
    "what comes before, one block": (Seeing.BEFORE, 256, 2.0),
    "the whole picture, one block": (Seeing.PICTURE, 256, 2.0),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument(
        "--ways", type=int, default=len(WAYS), help="so many of the ways, from the first (default: all)"
    )
    arguments = parser.parse_args()
    studio, rng, rows = Studio(), random.Random("test redraw"), defaultdict(list)
    for scene, made, place in islice(changes(), arguments.scenes):
        mask = quarter(place)
        grid = studio.tokenizer.encode(draw(scene), Purpose.EDIT)
        described, truth = caption(made.result, rng, True), draw(made.result)
        for name, (seeing, length, guidance) in islice(WAYS.items(), arguments.ways):
            text, began = made.instruction if seeing is Seeing.PICTURE else described, time.perf_counter()
            sampling = Sampling(steps=8, block_length=length)
            drawing = tasks.redraw(studio.backbone, grid, mask, text, seeing, guidance, sampling=sampling)
            seconds, picture = time.perf_counter() - began, studio.decode(drawing.grid)
            seen = jump(picture, mask) - jump(truth, mask)
            rows[name].append((same_scene(picture, made.result), drawing.report.positions, seconds, seen))
    print("| way | right | positions | seconds | seam |\n|---|---|---|---|---|")
    for name, found in rows.items():
        right, positions, seconds, seen = np.mean(np.array(found, float), axis=0)
        print(f"| {name} | {100 * right:.0f} % of {len(found)} | {positions:.0f} | {seconds:.2f} | {seen:+.3f} |")


def changes() -> Iterator[tuple[Scene, Edit, Place]]:
    """Held-out scenes, and an edit of each that changes one place alone."""
    for scene, made in edits(1000):
        places = [place for place in Place if scene.at(place) != made.result.at(place)]
        if made.change in (Change.RECOLOUR, Change.REMOVE, Change.ADD) and len(places) == 1:
            yield scene, made, places[0]


def quarter(place: Place) -> np.ndarray:
    """The codes of a place: bool [8, 8]."""
    mask, half = np.zeros((_CELLS, _CELLS), bool), _CELLS // 2
    down, right = "bottom" in place.value, not place.left
    mask[half * down : half * (down + 1), half * right : half * (right + 1)] = True
    return mask


def jump(picture: Image.Image, mask: np.ndarray) -> float:
    """How much pixels differ on the two sides of the mask's edge, 0 to 1."""
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    inside = mask.repeat(CODE, 0).repeat(CODE, 1)
    edges = [np.abs(np.diff(pixels, axis=axis)).mean(-1)[np.diff(inside, axis=axis)] for axis in (0, 1)]
    return float(np.concatenate(edges).mean())


if __name__ == "__main__":
    main()

"""What fewer network calls of the full decoder cost: presets, solvers, time shifts and the step cache, on Shapes.

``python tests/benchmarks/calls.py --scenes 3`` prints a table: network calls, what they would take at the published size,
how far the latent is from a solution by Euler with 400 points, and how many pictures the detector reads as the scene that
was drawn. The noise is the same throughout. In float32, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from counting import META, LiveBytes, hollow_checkpoint, on_meta  # noqa: E402
from rehearsal.pieces import DECODER  # noqa: E402

from llada2_mlx.checkpoint.layout import Part  # noqa: E402
from llada2_mlx.imaging.flow import PRESETS, DecodeOptions  # noqa: E402
from llada2_mlx.imaging.pixels import to_images  # noqa: E402
from llada2_mlx.imaging.prepare import Purpose  # noqa: E402
from llada2_mlx.imaging.transformer_torch import Decoder  # noqa: E402
from llada2_mlx.shapes.measures import same_scene  # noqa: E402
from llada2_mlx.shapes.studio import Studio  # noqa: E402
from llada2_mlx.shapes.world import draw, scenes  # noqa: E402
from llada2_mlx.vq import VQGrid  # noqa: E402

REFERENCE = DecodeOptions(steps=400)
SIDES = (512, 1024)
PUBLISHED, BALANCED, FAST = PRESETS.values()


@dataclass(frozen=True)
class Work:
    """FLOP of a call of one branch at the published size, by the side of the picture: all of it, and with the step cache's."""

    whole: dict[int, float]
    cached: dict[int, float]


def rows() -> Iterator[tuple[str, DecodeOptions]]:
    """What is compared, by name."""
    yield from PRESETS.items()
    yield "fast, guided from 0.1 to 0.8", replace(FAST, guidance_start=0.1, guidance_end=0.8)
    yield "ab2, 9 points, shift 1", replace(FAST, steps=9)
    yield "ab2, 13 points, shift 3", replace(FAST, time_shift=3.0)
    for solver in ("unipc_2", "dpmpp_2m", "euler"):
        yield f"{solver}, 13 points, shift 1", replace(FAST, solver=solver)
    yield "ab2, 25 points, shift 3", replace(BALANCED, time_shift=3.0)
    yield "euler, 25 points, shift 6", replace(PUBLISHED, steps=25)
    for name, threshold in (("fast", 0.02), ("balanced", 0.01), ("balanced", 0.02)):
        yield f"{name}, cache {threshold}", replace(PRESETS[name], cache_threshold=threshold)
    for threshold in (0.05, 0.02, 0.01):
        yield f"as published, cache {threshold}", replace(PUBLISHED, cache_threshold=threshold)


def work(sides: tuple[int, ...] = SIDES) -> Work:
    """Counted on the meta device, operation by operation; what runs once a picture is not in it."""

    def call(layers: int, side: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, total = hollow_checkpoint(Path(folder), layers), []
            with on_meta():
                decoder = Decoder(checkpoint, Part.DECODER_TURBO, META)
            grid = VQGrid(np.zeros((side // 32, side // 32), dtype="int32"), 16384)
            for steps in (2, 3):
                with on_meta(), LiveBytes(), FlopCounterMode(display=False) as counter:
                    decoder.sample([grid], DecodeOptions(steps, guidance=0.0))
                total.append(counter.get_total_flops())
        return total[1] - total[0]

    # a call that the cache saves runs all but the main layers from the second on
    return Work({side: call(DECODER["n_layers"], side) for side in sides}, {side: call(1, side) for side in sides})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=3, help="held-out scenes; 400 points take most of the time (3)")
    parser.add_argument(
        "--reference", type=Path, help="keep the solutions with 400 points here, or take them from here"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    of, studio = work(), Studio()
    print(
        f"A call of one branch: {', '.join(f'{of.whole[side] / 1e12:.1f} TFLOP at {side}' for side in SIDES)}", end="; "
    )
    print(f"of the step cache: {', '.join(f'{of.cached[side] / 1e12:.1f}' for side in SIDES)}\n")
    studio.decoder.transformer.float()
    wanted = list(islice(scenes("test round trip", test=True), arguments.scenes))
    grids = [studio.tokenizer.encode(draw(scene), Purpose.EDIT) for scene in wanted]
    if arguments.reference and arguments.reference.exists():
        solutions = torch.load(arguments.reference, weights_only=True)[: len(grids)]
    else:
        solutions = [studio.decoder.sample([grid], REFERENCE) for grid in grids]
        if arguments.reference:
            torch.save(solutions, arguments.reference)
    print(
        "| way | calls | whole | TFLOP at 512 | at 1024 | distance | read |\n|---|---|---|---|---|---|---|", flush=True
    )
    for name, options in rows():
        distances, skipped, read = [], 0, 0
        for scene, grid, solution in zip(wanted, grids, solutions, strict=True):
            latent = studio.decoder.sample([grid], options)
            distances.append(float((latent - solution).norm() / solution.norm()))
            skipped += studio.decoder.skipped_calls / len(grids)
            read += same_scene(to_images(studio.vae.decode(latent))[0], scene)
        whole = options.network_calls - skipped
        flop = (f"{(whole * of.whole[side] + skipped * of.cached[side]) / 1e12:,.0f}" for side in SIDES)
        counts = f"{options.network_calls} | {whole:.0f} | {' | '.join(flop)}"
        print(f"| {name} | {counts} | {100 * np.mean(distances):.2f} % | {read} of {len(grids)} |", flush=True)


if __name__ == "__main__":
    main()

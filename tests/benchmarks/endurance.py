"""Many pictures in a row with the built-in model, all stages: memory has to stay where it is.

``python tests/benchmarks/endurance.py`` prints a table, and fails where memory grew.
"""

from __future__ import annotations

import argparse
import resource
import sys

import mlx.core as mx

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.shapes import measures
from llada2_mlx.shapes.studio import Studio

WARM = 10  # pictures until everything is loaded and every buffer has been used
ALLOWED = 50e6  # bytes, of which the system's allocator may keep more or less


def peak() -> int:
    """The most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Draw, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100)
    pictures = parser.parse_args().pictures
    if pictures < 2 * WARM:
        parser.error(f"--pictures has to be at least {2 * WARM}: the first {WARM} are the warm-up")
    studio, peaks = Studio(Checkpoint(BUILT_IN)), {}
    print("| pictures | peak of the process, MB | MLX in use, MB | MLX buffer cache, MB |\n|---|---|---|---|")
    for number, (_, prompt) in enumerate(measures.prompts(pictures), 1):
        studio.draw(prompt)
        if number % WARM == 0:
            peaks[number] = peak()
            used = (peaks[number], mx.get_active_memory(), mx.get_cache_memory())
            print(f"| {number} | {' | '.join(f'{size / 1e6:.1f}' for size in used)} |", flush=True)
    grown = peaks[max(peaks)] - peaks[WARM]
    print(f"\nFrom picture {WARM} to picture {max(peaks)} the peak grew by {grown / 1e6:.1f} MB.")
    if grown > ALLOWED:
        raise SystemExit("That is too much.")


if __name__ == "__main__":
    main()

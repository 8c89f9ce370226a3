"""What the published backbone would take on Apple chips if nothing but reading its weights took time. Computed, not measured.

``python tests/benchmarks/apple.py`` prints the table. A step reads every matrix that it needs once: of the experts those
that its tokens choose, of the output head the rows that may be chosen. What a chip can read in a second is what its
maker states, times ``SHARE``. Work that is bound by arithmetic (long prompts, the image decoder) is not in it.
"""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from published import BACKBONE  # noqa: E402

from llada2_mlx.backbone import precision  # noqa: E402

SHARE = 0.7  # of the stated bandwidth that is reached; an assumption
BLOCK, STEPS, TEXT_STEPS = 32, 8, 32
PROMPT, ANSWER = 36, 300  # tokens
CHIPS = {  # GB/s
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819, "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    "M5": 153, "M5 Pro": 307, "M5 Max": 614,
}  # fmt: skip
TOGETHER = (1, 2, 4, 8)  # pictures
# what `auto` takes in 16 GB, in 32 GB and from 48 GB on, which these chips are sold with
FITTING = {"M1": "4bit", "M4": "8bit", "M3 Max": "bf16", "M4 Max": "bf16", "M3 Ultra": "bf16"}


def main() -> None:
    """Print the table."""
    precisions = ("bf16", "8bit", "4bit")
    jobs = {
        "512 x 512": lambda bits: drawing_bytes(bits, 16),
        "1024 x 1024": lambda bits: drawing_bytes(bits, 32),
        "answer": answer_bytes,
    }
    print(f"| chip | GB/s | {' | '.join(f'{job}, {name}' for job in jobs for name in precisions)} |")
    print("|---" * (2 + len(jobs) * len(precisions)) + "|")
    read = [work(name) for work in jobs.values() for name in precisions]
    print(f"| GB read | | {' | '.join(f'{size / 1e9:,.0f}' for size in read)} |")
    for chip, speed in CHIPS.items():
        print(f"| {chip} | {speed} | {' | '.join(f'{size / 1e9 / speed / SHARE:.0f} s' for size in read)} |")
    print(f"\n| pictures together, 512 x 512 | {' | '.join(f'{name}, GB a picture' for name in precisions)} |")
    print("|---" * (1 + len(precisions)) + "|")
    for pictures in TOGETHER:
        each = [drawing_bytes(name, 16, pictures) / pictures / 1e9 for name in precisions]
        print(f"| {pictures} | {' | '.join(f'{size:,.0f}' for size in each)} |")
    print(f"\n| pictures a minute at most, 512 x 512 | {' | '.join(f'{count} together' for count in TOGETHER)} |")
    print("|---" * (1 + len(TOGETHER)) + "|")
    for chip, name in FITTING.items():
        most = [60 * CHIPS[chip] * SHARE / (drawing_bytes(name, 16, count) / count / 1e9) for count in TOGETHER]
        print(f"| {chip}, {name} | {' | '.join(f'{pictures:.1f}' for pictures in most)} |")
    print(f"\nProducts of a picture, 512 x 512: {drawing_products(16) / 1e12:.1f} TFLOP")


def drawing_bytes(name: str, side: int, pictures: int = 1) -> float:
    """Pictures of side x side codes together: both branches, all blocks, ``STEPS`` steps each."""
    blocks, tokens = blocks_of(PROMPT, side * side), 2 * BLOCK * pictures
    return blocks * (step_bytes(name, 2 * tokens) + (STEPS - 1) * step_bytes(name, tokens))


def drawing_products(side: int) -> float:
    """Floating-point operations of a picture's matrix products, without attention's scores: as many however many are drawn."""
    positions = blocks_of(PROMPT, side * side) * (STEPS + 1) * 2 * BLOCK
    active = 0.0
    for parameter, value in tree_flatten(precision.build(BACKBONE, None).parameters()):
        if not parameter.startswith(("lm_head.", "model.word_embeddings.")):
            share = BACKBONE.num_experts_per_tok / BACKBONE.num_experts if ".switch_mlp." in parameter else 1
            active += share * prod(value.shape)
    # both branches share a product with the head
    return 2 * positions * (active + BACKBONE.codebook_size * BACKBONE.hidden_size / 2)


def answer_bytes(name: str) -> float:
    """An answer: every token of a block settles in a step of its own."""
    text = BACKBONE.vocab_size
    blocks = blocks_of(PROMPT, ANSWER)
    return blocks * (step_bytes(name, 2 * BLOCK, text) + (TEXT_STEPS - 1) * step_bytes(name, BLOCK, text))


def blocks_of(prompt: int, length: int) -> int:
    """Blocks that hold something to denoise."""
    return -(-(prompt + length) // BLOCK) - prompt // BLOCK


def step_bytes(name: str, tokens: int, rows: int = BACKBONE.codebook_size) -> float:
    """What a step of so many tokens reads. Each token chooses its experts independently of the others."""
    chosen = 1 - (1 - BACKBONE.num_experts_per_tok / BACKBONE.num_experts) ** tokens
    block = precision.scheme(BACKBONE, precision.BITS[name]) if name in precision.BITS else None
    total = 0.0
    for parameter, value in tree_flatten(precision.build(BACKBONE, block).parameters()):
        size = prod(value.shape) * (4 if value.dtype == mx.uint32 or ".mlp.gate." in parameter else 2)
        if ".switch_mlp." in parameter:
            size *= chosen
        elif parameter.startswith("lm_head."):
            size *= rows / BACKBONE.vocab_size
        elif parameter.startswith("model.word_embeddings."):
            continue
        total += size
    return total


if __name__ == "__main__":
    main()

"""What MLX has in memory beside the weights while the language model works, by its own counter.

``python -m benchmarks.working`` in ``tests/``. A random model, of which one size at a time is changed, so that the differences say
what a position costs: in prefilling, in the first step, and in a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from synthetic import BACKBONE

from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import DENOISING, Draft, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.session import PREFILL
from llada2_mlx.checkpoint.config import BackboneConfig
from llada2_mlx.worker import MLXWorker

BLOCK, MASK = 32, 3
SMALL = replace(
    BACKBONE,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=64,
    num_experts_per_tok=4,
    topk_group=4,
    moe_intermediate_size=64,
)
CASES: dict[str, tuple[BackboneConfig, int, int]] = {
    "as it is": (SMALL, 480, 1),
    "8 experts a token, not 4": (replace(SMALL, num_experts_per_tok=8), 480, 1),
    "experts of 128, not 64": (replace(SMALL, moe_intermediate_size=128), 480, 1),
    "experts of 256": (replace(SMALL, moe_intermediate_size=256), 480, 1),
    "hidden size of 512, not 256": (replace(SMALL, hidden_size=512), 480, 1),
    "dense layer of 1024, not 256": (replace(SMALL, intermediate_size=1024), 480, 1),
    "6 layers, not 3": (replace(SMALL, num_hidden_layers=6), 480, 1),
    "4 heads, not 1": (replace(SMALL, num_attention_heads=4), 480, 1),
    "2 branches": (SMALL, 480, 2),
    "a prompt of 240, not 480": (SMALL, 240, 1),
    "a prompt of 960": (SMALL, 960, 1),
    "a prompt of 2048": (SMALL, 2048, 1),
}


@dataclass(frozen=True)
class Peaks:
    """Bytes beside the weights at most: in all, and in the last step. ``positions`` are those of the largest pass."""

    positions: int
    most: int
    later: int


def peaks(config: BackboneConfig, prompt: int, branches: int) -> Peaks:
    """Two steps of one block after a prompt, in float32 with random weights; on a thread of its own."""
    worker = MLXWorker()
    made: dict[str, int] = {}

    def job():
        model = LLaDA2(config)
        random = lambda value: mx.random.normal(value.shape) * 0.02 if value.ndim > 1 else mx.ones(value.shape)
        model.load_weights([(name, random(value)) for name, value in tree_flatten(model.parameters())])
        mx.eval(model.parameters())
        mx.clear_cache()
        made["weights"] = mx.get_active_memory()
        mx.reset_peak_memory()
        draw = np.random.default_rng(0)
        texts = tuple(draw.integers(MASK + 1, config.image_token_offset, prompt).tolist() for _ in range(branches))
        guidance = Guidance() if branches == 1 else Guidance.simple(2.0)
        vocabulary = Vocabulary(MASK, first=config.image_token_offset)
        steps = Sampling(block_length=BLOCK, steps=2, threshold=1.0)
        return (yield from generate(model, Draft.blank(texts, BLOCK, MASK), vocabulary, steps, guidance))

    seen: list[tuple[str, int]] = []

    def note(progress) -> None:
        seen.append((progress.phase, mx.get_peak_memory() - made["weights"]))
        mx.reset_peak_memory()

    worker.drive(job(), note)
    later = [size for phase, size in seen if phase == DENOISING][-1]
    rest = prompt % PREFILL or PREFILL
    largest = max(PREFILL if prompt > PREFILL else 0, rest // BLOCK * BLOCK + BLOCK)
    return Peaks(largest * branches, max(size for _, size in seen), later)


def main(tell: Callable[[str], None] = print) -> None:
    tell("| changed | positions in a pass | MB | values a position | a later step, MB |\n|---|---|---|---|---|")
    for name, (config, prompt, branches) in CASES.items():
        found = peaks(config, prompt, branches)
        values = found.most / 4 / found.positions
        tell(f"| {name} | {found.positions} | {found.most / 1e6:.1f} | {values:.0f} | {found.later / 1e6:.1f} |")


if __name__ == "__main__":
    main()

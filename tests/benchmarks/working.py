"""What MLX has in memory beside the weights while the language model works, by its own counter.

``python -m benchmarks.working`` in ``tests/``. A random model, of which one size at a time is changed, so that the differences say
what a position costs: in prefilling, in the first step, and in a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from synthetic import BACKBONE

from llada2_mlx.backbone import denoising
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import DENOISING, Draft, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.network import PREFILL, LLaDA2
from llada2_mlx.backbone.working import BLOCK, Batch, batch_bytes, work_bytes
from llada2_mlx.checkpoint.config import BackboneConfig
from llada2_mlx.worker import MLXWorker

MASK = 3
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
MIDDLE = replace(
    SMALL,
    vocab_size=4096 + 2048,
    image_token_offset=4096,
    hidden_size=512,
    intermediate_size=1280,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_experts=32,
    num_experts_per_tok=8,
    n_group=8,
    moe_intermediate_size=128,
)
CASES: dict[str, tuple[BackboneConfig, int, int]] = {
    "as it is": (SMALL, 480, 1),
    "8 experts a token, not 4": (replace(SMALL, num_experts_per_tok=8), 480, 1),
    "experts of 128, not 64": (replace(SMALL, moe_intermediate_size=128), 480, 1),
    "256 experts, not 16": (replace(SMALL, num_experts=256), 480, 1),
    "hidden size of 512, not 256": (replace(SMALL, hidden_size=512), 480, 1),
    "dense layer of 1024, not 256": (replace(SMALL, intermediate_size=1024), 480, 1),
    "6 layers, not 3": (replace(SMALL, num_hidden_layers=6), 480, 1),
    "4 heads, not 1": (replace(SMALL, num_attention_heads=4), 480, 1),
    "2 branches": (SMALL, 480, 2),
    "a prompt of 240, not 480": (SMALL, 240, 1),
    "a prompt of 2048": (SMALL, 2048, 1),
    "a model of middle size": (MIDDLE, 480, 2),
}


@dataclass(frozen=True)
class Peaks:
    """Bytes beside the weights.

    Args:
        positions: of the largest pass, in all branches.
        most: at once.
        later: at once in the last step.
        reckoned: what ``work_bytes`` says of it.
    """

    positions: int
    most: int
    later: int
    reckoned: int


def peaks(
    config: BackboneConfig,
    prompt: int,
    branches: int,
    piece: int = PREFILL,
    temperature: float = 0.0,
    text: bool = False,
    pictures: int = 1,
) -> Peaks:
    """Two steps of one block after a prompt, in float32 with random weights; on a thread of its own.

    Args:
        piece: positions of a prompt in a pass.
        text: whether any id may be chosen, not image codes alone.
        pictures: drawn together, two blocks of each.
    """
    worker = MLXWorker()
    made: dict[str, int] = {}
    blocks = 1 if pictures == 1 else 2

    def job():
        model = LLaDA2(config)
        model.prefill = piece
        random = lambda value: mx.random.normal(value.shape) * 0.02 if value.ndim > 1 else mx.ones(value.shape)
        model.load_weights([(name, random(value)) for name, value in tree_flatten(model.parameters())])
        mx.eval(model.parameters())
        mx.clear_cache()
        made["weights"] = mx.get_active_memory()
        mx.reset_peak_memory()
        draw = np.random.default_rng(0)
        texts = tuple(draw.integers(MASK + 1, config.image_token_offset, prompt).tolist() for _ in range(branches))
        guidance = Guidance() if branches == 1 else Guidance.simple(2.0)
        vocabulary = Vocabulary(MASK, first=0 if text else config.image_token_offset)
        top_p = 0.9 if temperature else 1.0
        steps = Sampling(block_length=BLOCK, steps=2, threshold=1.0, temperature=temperature, top_p=top_p)
        draft = Draft.blank(texts, blocks * BLOCK, MASK)
        return (yield from generate(model, draft, vocabulary, steps, guidance, seeds=range(pictures)))

    seen: list[tuple[str, int]] = []

    def note(phase: str) -> None:
        seen.append((phase, mx.get_peak_memory() - made["weights"]))
        mx.reset_peak_memory()

    def fetched(*args):  # what follows may run before it is told
        result = fetch(*args)
        note(DENOISING)
        return result

    fetch = denoising._fetch
    with patch.object(denoising, "_fetch", fetched):
        worker.drive(job(), lambda progress: progress.phase == DENOISING or note(progress.phase))
    later = [size for phase, size in seen if phase == DENOISING][-1]
    rest = prompt % piece or piece
    largest = max(piece - BLOCK if prompt > piece else 0, rest // BLOCK * BLOCK)
    written = prompt + blocks * BLOCK
    reckoned = work_bytes(config, mx.float32, largest, branches * written, branches)
    reckoned += batch_bytes(config, mx.float32, Batch(pictures, branches, written))
    return Peaks((largest + BLOCK) * branches, max(size for _, size in seen), later, reckoned)


def main(tell: Callable[[str], None] = print) -> None:
    tell("| changed | positions in a pass | MB | values a position | MB reckoned | a later step, MB |")
    tell("|---|---|---|---|---|---|")
    for name, (config, prompt, branches) in CASES.items():
        found = peaks(config, prompt, branches)
        values = found.most / 4 / found.positions
        figures = f"{found.most / 1e6:.1f} | {values:.0f} | {found.reckoned / 1e6:.1f} | {found.later / 1e6:.1f}"
        tell(f"| {name} | {found.positions} | {figures} |")


if __name__ == "__main__":
    main()

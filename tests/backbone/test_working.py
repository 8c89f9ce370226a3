"""What the language model takes beside its weights: reckoned, against MLX's own counter; and how it is made to fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from benchmarks.working import MIDDLE, SMALL, peaks
from macs import MEMORY, as_on_metal, recommended
from published import BACKBONE as PUBLISHED
from synthetic import BACKBONE, tiny

from llada2_mlx import tasks
from llada2_mlx.backbone import handle
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Draft, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.precision import choose, precision_bytes
from llada2_mlx.backbone.working import WAYS, Batch, batch_bytes, fit, position_values, work_bytes
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.vq import VQGrid


@pytest.fixture
def metal() -> Iterator[None]:
    with as_on_metal():
        yield


WIDE = replace(BACKBONE, vocab_size=2**15)
COUNTED = {
    "tiny": (BACKBONE, 480, 1, {}),
    "tiny, two branches": (BACKBONE, 480, 2, {}),
    "tiny, in pieces": (BACKBONE, 500, 2, {"piece": 128}),
    "tiny, one block": (BACKBONE, 32, 2, {}),
    "tiny, a text of many words": (WIDE, 32, 2, {"text": True, "temperature": 1.0}),
    "small": (SMALL, 224, 1, {}),
    "small, one expert": (replace(SMALL, num_experts_per_tok=1), 224, 1, {}),
    "small, 128 experts": (replace(SMALL, num_experts=128), 224, 1, {}),
    "small, a wide dense layer": (replace(SMALL, intermediate_size=2048, num_experts_per_tok=1), 224, 1, {}),
    "small, 8 heads": (replace(SMALL, num_attention_heads=8, num_key_value_heads=4), 224, 1, {}),
    "small, 9 layers": (replace(SMALL, num_hidden_layers=9), 224, 1, {}),
    "middle": (MIDDLE, 96, 2, {}),
    "small, four pictures": (SMALL, 96, 2, {"pictures": 4}),
    "small, sixteen pictures": (SMALL, 96, 1, {"pictures": 16}),
}


@pytest.mark.parametrize("case", COUNTED)
def test_no_more_is_taken_than_is_reckoned(case: str) -> None:
    """Twice as much at most: nearer where a layer's experts bind, further where a short prompt takes little of anything."""
    config, prompt, branches, how = COUNTED[case]
    found = peaks(config, prompt, branches, **how)
    assert found.most <= found.reckoned <= 2 * found.most


def test_what_is_reckoned_for_the_published_model(metal: None) -> None:
    """As ``docs/performance.md`` says."""
    assert position_values(PUBLISHED, 4096) == 10 * 2048 + 3 * 8 * (2048 + 512) + 3 * 512 + 4 * 256
    of = lambda piece, written, branches=2: work_bytes(PUBLISHED, mx.bfloat16, piece, written, branches) / 1e9
    assert of(1024, 8192) == pytest.approx(1.61, abs=0.01)
    assert of(512, 2 * 1184) == pytest.approx(0.79, abs=0.01)
    assert of(1024, 0) - of(512, 0) == pytest.approx(2 * 512 * 84_480 * 4 / 1e9, rel=0.01)
    assert of(1024, 8192) - of(1024, 0) == pytest.approx(8192 * 20 * 4 * 128 * 2 * 2 * 2 / 1e9, rel=0.01)


def test_what_a_batch_takes_more(metal: None) -> None:
    """As ``docs/performance.md`` says, for each picture of 1024 x 1024; and one alone takes no more."""
    of = lambda pictures: batch_bytes(PUBLISHED, mx.bfloat16, Batch(pictures, 2, 160 + 1024))
    assert of(1) == 0 and of(2) == pytest.approx(0.26e9, abs=0.005e9) and of(5) == 4 * of(2)


def test_a_batch_is_told_to_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its pictures, branches and positions, drawn with thinking or without."""
    shapes, seen, run = Backbone(Checkpoint(BUILT_IN), "float32"), [], Backbone.run

    def note(self, *args, batch=None, **options):
        seen.append(batch)
        return run(self, *args, batch=batch, **options)

    monkeypatch.setattr(Backbone, "run", note)
    for pictures in (1, 3):
        tasks.text_to_vq(shapes, "a red circle", 256, 256, pictures=pictures, sampling=Sampling(steps=1))
    alone, together = seen
    assert alone is None and (together.pictures, together.branches) == (3, 2)
    assert 64 < together.positions < 64 + 100
    assert shapes.work_bytes() == shapes.working.size < shapes.work_bytes(together)


@pytest.mark.parametrize(
    ("memory", "expected", "piece"), [(16, "4bit", 512), (24, "6bit", 1024), (32, "8bit", 1024), (48, "bf16", 1024), (64, "bf16", 1024)]
)  # fmt: skip
def test_auto_on_a_mac(metal: None, memory: int, expected: str, piece: int) -> None:
    assert memory in MEMORY
    there = recommended(memory)
    chosen, reason = choose(PUBLISHED, "bf16", there)
    assert chosen == expected and reason.startswith(f"Precision: {chosen}. {chosen} takes ")
    assert ("too much" in reason) == (chosen != "bf16") and f"in the {there / 1e9:.1f} GB" in reason
    assert ("pieces of 512 tokens" in reason) == (piece == 512)
    size = precision_bytes(PUBLISHED, chosen)
    found = fit(PUBLISHED, mx.bfloat16, there - size)
    assert found.fits and found.piece == piece and size + found.size <= there
    assert f"{size / 1e9:.1f} GB, and {found.size / 1e9:.1f} GB to work" in reason


def test_where_little_is_left_the_reason_says_how_much_fits(metal: None) -> None:
    size = precision_bytes(PUBLISHED, "4bit")
    chosen, reason = choose(PUBLISHED, "bf16", int(10.7e9))
    found = fit(PUBLISHED, mx.bfloat16, int(10.7e9) - size)
    assert chosen == "4bit" and not found.fits and found.piece == 128
    assert f"enough for {found.longest // 2} tokens with guidance" in reason and 1184 < found.longest // 2 < 4096
    needed = [found.cache + work_bytes(PUBLISHED, mx.bfloat16, 128, found.longest + more) for more in (0, 1)]
    assert needed[0] <= 10.7e9 - size < needed[1]


def test_ways_take_less_and_less(metal: None) -> None:
    sizes = [cache + work_bytes(PUBLISHED, mx.bfloat16, piece, 8192) for piece, cache in WAYS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for (piece, cache), size in zip(WAYS, sizes, strict=True):
        found = fit(PUBLISHED, mx.bfloat16, size)
        assert (found.piece, found.cache, found.size, found.longest, found.fits) == (piece, cache, size, 8192, True)
    least = fit(PUBLISHED, mx.bfloat16, sizes[-1] - 1)
    assert (least.piece, least.fits) == (128, False) and 8000 < least.longest < 8192
    assert fit(PUBLISHED, mx.bfloat16, 0).longest == fit(PUBLISHED, mx.bfloat16, -(10**10)).longest == 0


def test_a_backbone_works_as_the_memory_that_is_left_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes get shorter and MLX keeps fewer buffers; both are as before when it has worked."""
    roomy = Backbone(Checkpoint(tiny()), "float32")
    monkeypatch.setattr(handle, "machine_bytes", lambda: roomy.size)
    tight = Backbone(Checkpoint(tiny()), "float32")
    assert (roomy.working.piece, roomy.working.cache) == WAYS[0] and (tight.working.piece, tight.working.cache) == WAYS[
        -1
    ]
    prompt = np.random.default_rng(0).integers(0, 200, 300).tolist()
    mask = roomy.tokens.mask

    def run(backbone: Backbone) -> tuple[list[int], list[str], set[int]]:
        phases, limits = [], set()

        def note(progress) -> None:
            phases.append(progress.phase)
            limits.add(limit())

        draft, vocabulary = Draft.blank((prompt,), 32, mask), Vocabulary(mask, first=backbone.config.image_token_offset)
        backbone.load()
        return backbone.run(generate, draft, vocabulary, Sampling(steps=2), on_step=note).ids, phases, limits

    before = mx.set_cache_limit(2 * WAYS[0][1])
    try:
        (tokens, whole, roomy_limits), (same, pieces, tight_limits) = run(roomy), run(tight)
        assert tokens == same and limit() == 2 * WAYS[0][1]
    finally:
        mx.set_cache_limit(before)
    assert (roomy_limits, tight_limits) == ({WAYS[0][1]}, {WAYS[-1][1]})
    # 288 positions before the block in which the prompt ends: all with the first step, or two pieces of 128 before it
    assert (whole.count("reading the prompt"), pieces.count("reading the prompt")) == (0, 2)


def limit() -> int:
    """Bytes of freed buffers that MLX may keep."""
    mx.set_cache_limit(found := mx.set_cache_limit(0))
    return found


@pytest.mark.parametrize("piece", [32, 128])
def test_pieces_change_no_token_of_golden(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    draw = lambda count, seed: np.random.default_rng(seed).integers(0, 256, count).tolist()
    branches, mask = (draw(333, 1), draw(250, 2), draw(40, 3)), backbone.tokens.mask
    vocabulary = Vocabulary(mask, first=backbone.config.image_token_offset)
    draft = Draft.blank(branches, 64, mask)
    run = lambda: backbone.run(generate, draft, vocabulary, Sampling(steps=4), Guidance.editing(4.0, 1.2))
    whole = run()
    monkeypatch.setattr(backbone.load(), "prefill", piece)
    pieces = run()
    assert pieces.ids == whole.ids and pieces.report.positions == whole.report.positions
    np.testing.assert_allclose(pieces.confidence, whole.confidence, atol=1e-5)


def test_pieces_change_no_token_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Backbone(Checkpoint(BUILT_IN), "float32")
    prompt = "A large red circle in the top left and a small blue star in the bottom right, on a plain white background"
    steps: list[str] = []

    def run() -> tuple[VQGrid, VQGrid]:
        drawn = tasks.text_to_vq(shapes, prompt)
        edited = tasks.edit(shapes, drawn.grid, "Make the circle blue.", on_step=lambda p: steps.append(p.phase))
        return drawn.grid, edited.grid

    whole = run()
    assert "reading the prompt" not in steps
    monkeypatch.setattr(shapes.load(), "prefill", 32)
    assert run() == whole and "reading the prompt" in steps

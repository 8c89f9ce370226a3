"""What the decoder takes in MLX beside its weights: reckoned, against MLX's own counter; and that pieces change nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from benchmarks.decoding import CASES, GUIDED, Case, peak
from benchmarks.fitting import decoding
from counting import hollow_checkpoint
from macs import as_on_metal, recommended
from published import BACKBONE
from rehearsal.pieces import DECODER
from synthetic import tiny

from llada2_mlx.backbone.precision import precision_bytes
from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging import transformer_mlx
from llada2_mlx.imaging.decoder_mlx import MLXDecoder
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.vq import VQGrid

FOUND: dict[str, int] = {}


@pytest.mark.parametrize("case", CASES)
def test_no_more_is_taken_than_is_reckoned(case: str) -> None:
    """Twice as much at most: nearer where there are pieces, further where all tokens are one."""
    found = peak(CASES[case])
    FOUND[case] = found.most
    assert found.most <= found.reckoned <= 2 * found.most


def test_what_it_depends_on() -> None:
    """Not on the layers, nor on the bits of the weights; pieces halve it, and a picture more costs nothing in MLX."""
    most = lambda name: FOUND.get(name) or peak(CASES[name]).most
    for same in ("8 bits", "4 layers, not 2"):
        assert most(same) == pytest.approx(most("as it is"), rel=0.05)
    assert most("two pictures") == pytest.approx(most("guidance"), rel=0.05)
    assert most("as it is") < 0.7 * most("in one piece")


def test_a_layer_of_many_tokens_takes_little_more_than_they_do() -> None:
    """Another size than those of the table: eight pieces."""
    found = peak(Case({}, side=16, options=GUIDED))
    tokens, width = 8 * 16**2, 192
    assert found.most <= found.reckoned < 10 * tokens * width * 2 + 2e6


@pytest.mark.parametrize("piece", [32, 96, 500])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Of 640 tokens: the last piece is shorter."""
    decoder = MLXDecoder(Checkpoint(tiny()), Part.DECODER)
    grid = [VQGrid(np.random.default_rng(0).integers(0, 256, (8, 10)), 256)]
    whole = decoder.sample(grid, DecodeOptions(steps=3))
    monkeypatch.setattr(transformer_mlx, "PIECE", piece)
    np.testing.assert_allclose(decoder.sample(grid, DecodeOptions(steps=3)), whole, atol=1e-4)


def test_what_is_reckoned_for_the_published_decoder() -> None:
    """As ``docs/performance.md`` says: both models stay on a Mac of 24 GB, with 4 and 8 bits."""
    there = recommended(24)
    with tempfile.TemporaryDirectory() as folder:
        eight = decoding(hollow_checkpoint(Path(folder), DECODER["n_layers"]), there, "mlx-8bit")
    tokens = 8 * 32**2
    of_layers = 2 * 3840 * (5 * tokens + 16 * 1024)
    assert of_layers < eight.working < of_layers + 0.4e9
    with as_on_metal(there):
        assert precision_bytes(BACKBONE, "4bit") + eight.size + eight.working <= there

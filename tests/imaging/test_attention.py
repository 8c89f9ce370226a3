"""Attention in pieces gives what attention at once gives, and no matrix of scores is larger than allowed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llada2_mlx.imaging import attention
from llada2_mlx.imaging.attention import SCORES, QueriesInPieces, attention_for


class Scores(TorchFunctionMode):
    """Notes how many scores each attention makes, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.sizes.append(query.shape[:-1].numel() * key.shape[-2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("most", [1, 300, 1000, 2399, 2400, 10**6])
@pytest.mark.parametrize("mask", [None, "keys", "all", "float"])
def test_pieces_are_exact(most: int, mask: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for length in (20, 20, 20))
    masks = {
        None: None,
        "keys": torch.rand(2, 1, 1, 20, generator=generator) > 0.3,
        "all": torch.rand(2, 1, 20, 20, generator=generator) > 0.3,
        "float": torch.randn(20, 20, generator=generator),
    }
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask])
    with Scores() as scores, QueriesInPieces(most):
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask])
    assert torch.allclose(found, expected, atol=1e-6)
    assert max(scores.sizes) <= max(most, 2 * 3 * 20) and sum(scores.sizes) == 2 * 3 * 20 * 20


@pytest.mark.parametrize("pixels", [1024, 2048])
def test_no_matrix_of_scores_of_a_large_decode_is_too_large(pixels: int) -> None:
    """By shapes: 30 heads, and as many tokens of the condition as of the picture; and the VAE's middle attention."""
    tokens = 2 * (pixels // 16) ** 2
    decoder = torch.empty(1, 30, tokens, 128, device="meta")
    middle = torch.empty(1, 1, (pixels // 8) ** 2, 512, device="meta")
    for states in (decoder, middle):
        with Scores() as scores, QueriesInPieces():
            found = functional.scaled_dot_product_attention(states, states, states)
        assert found.shape == states.shape and max(scores.sizes) <= SCORES


def test_only_mps_is_cut_and_an_old_pytorch_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for version, expected in (("2.11.0", 1), ("2.12.1+cpu", 1), ("2.13.0", 0), ("3.0.0a0", 0)):
        attention._advise.cache_clear()
        caplog.clear()
        monkeypatch.setattr(torch, "__version__", version)
        with caplog.at_level(logging.WARNING):
            assert attention_for(torch.device("mps")).most == SCORES
            attention_for(torch.device("mps"))
        assert len([record for record in caplog.records if "2.13 or later" in record.message]) == expected
    attention._advise.cache_clear()
    assert attention_for(torch.device("cpu")).most > 2**60

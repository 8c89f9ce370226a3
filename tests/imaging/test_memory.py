"""What is reserved for the decoder and the VAE, and how many scores their attentions make: counted at the published sizes."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import CPU, META, Attentions, LiveBytes, hollow_checkpoint, on_meta
from pictures import noise
from synthetic import tiny

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging import attention, tokenizer
from llada2_mlx.imaging.attention import SCORES, QueriesInPieces, attention_for
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.prepare import LARGEST_SIDE
from llada2_mlx.imaging.tokenizer import ImageTokenizer
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.imaging.vae import VAE
from llada2_mlx.vq import VQGrid

MPS = torch.device("mps")
PART = Part.DECODER_TURBO
AT_MOST = 1.3  # times what is counted


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return hollow_checkpoint(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def decoder(published: Checkpoint) -> Decoder:
    with on_meta():
        return Decoder(published, PART, META)


@pytest.fixture(scope="module")
def vae(published: Checkpoint) -> VAE:
    with on_meta():
        return VAE(published, META)


def grids(codes: int, pictures: int = 1) -> list[VQGrid]:
    return [VQGrid(np.zeros((codes, codes), dtype="int32"), 16384)] * pictures


def counted(work, writes: dict[int, bool]) -> int:
    """Bytes that ``work`` has in memory at once, as on MPS."""
    gc.collect()
    with on_meta(as_mps=True), Attentions(writes), LiveBytes() as live:
        work()
    return live.peak


def test_live_bytes_are_counted() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100).t() + 1
        del first
        assert live.now == 4000 and live.peak == 8000
        third = second[:1]
        second = None
        assert live.now == 4000
        third = torch.zeros(500, dtype=torch.float16)
        assert live.now == 1000 and third.sum().item() == 0
    assert live.peak == 8000


# a condition is four tokens a code, a picture one or four
@pytest.mark.parametrize("old", [False, True], ids=["2.13", "2.12"])
@pytest.mark.parametrize(
    ("codes", "upscale", "guidance", "pictures"),
    [(16, 2, 1.0, 1), (16, 2, 0.0, 4), (32, 2, 1.0, 1), (32, 1, 1.0, 2), (64, 2, 1.0, 1), (64, 1, 0.0, 1)],
)
def test_what_the_decoder_needs_is_reserved(
    decoder: Decoder,
    published: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    codes: int,
    upscale: int,
    guidance: float,
    pictures: int,
    old: bool,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1" if old else "2.13.0")
    options, given = DecodeOptions(steps=2, upscale=upscale, guidance=guidance), grids(codes, pictures)
    needed = counted(lambda: decoder.sample(given, options), {128: old})
    reserved = Decoder.working_bytes(published, PART, given, options, MPS)
    assert needed <= reserved <= AT_MOST * needed
    # only MPS writes scores out, and only before 2.13
    assert (reserved > Decoder.working_bytes(published, PART, given, options, CPU)) == old


@pytest.mark.parametrize(("codes", "guidance"), [(16, 1.0), (32, 0.0), (64, 1.0)])
def test_what_a_step_cache_remembers_is_reserved(tmp_path: Path, codes: int, guidance: float) -> None:
    """With two main layers, so that there is something to remember; the third call takes the place of the second."""
    published = hollow_checkpoint(tmp_path, 2)
    with on_meta():
        decoder = Decoder(published, PART, META)
    options, given = DecodeOptions(steps=3, guidance=guidance, cache_threshold=0.1), grids(codes)
    needed = counted(lambda: decoder.sample(given, options), {})
    assert decoder.skipped_calls == 0  # without values every distance is 1
    reserved = Decoder.working_bytes(published, PART, given, options, MPS)
    assert needed <= reserved <= AT_MOST * needed
    assert Decoder.working_bytes(published, PART, given, replace(options, cache_threshold=0.0), MPS) < reserved


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (256, 120)])
@pytest.mark.parametrize("device", [CPU, MPS], ids=str)
def test_what_the_vae_needs_is_reserved(
    vae: VAE, published: Checkpoint, size: tuple[int, int], device: torch.device
) -> None:
    """Its attention has one head of 512, which no kernel of MPS takes: there scores are written out in any PyTorch."""
    latents = torch.empty(1, 16, *size, device=META)
    needed = counted(lambda: vae.decode(latents), {512: device == MPS})
    assert needed <= VAE.working_bytes(published, latents, device) <= AT_MOST * needed


def test_a_tile_bounds_what_the_vae_needs(published: Checkpoint) -> None:
    small, large = (VAE.working_bytes(published, torch.empty(1, 16, side, side), CPU) for side in (128, 256))
    assert large - small == 36 * (2048**2 - 1024**2)


@pytest.mark.parametrize("codes", [32, 64], ids=["1024", "2048"])
def test_no_matrix_of_scores_of_a_large_decode_is_too_large(
    decoder: Decoder, vae: VAE, monkeypatch: pytest.MonkeyPatch, codes: int
) -> None:
    """A guided decode at the published widths, every attention in it, as it runs on MPS."""

    with on_meta(as_mps=True), Attentions() as seen, LiveBytes():
        latents = decoder.sample(grids(codes), DecodeOptions(steps=2))
        most = max(seen.scores)
        vae.decode(latents)
    assert SCORES / 2 < most <= SCORES and max(seen.scores) == most
    # what pieces and one branch after the other are for
    monkeypatch.setattr(attention, "attention_for", lambda device: QueriesInPieces(2**62))
    with on_meta(as_mps=True), Attentions() as seen, LiveBytes():
        decoder.sample(grids(codes), DecodeOptions(steps=2))
    assert max(seen.scores) == 30 * (8 * codes**2) ** 2  # of one branch
    assert 2 * max(seen.scores) > 1.8 * 2**31


def test_no_matrix_of_scores_of_the_tokenizer_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest picture that it takes has 64,516 patches; a person can ask for that by the size of the node."""
    encoder = ImageTokenizer(Checkpoint(tiny()), CPU)
    monkeypatch.setattr(tokenizer, "attention_for", lambda device: attention_for(MPS))
    patches, heads = (LARGEST_SIDE // 16) ** 2, encoder.vision.config.num_heads
    with Attentions() as seen:
        encoder.encode_prepared([noise(LARGEST_SIDE, LARGEST_SIDE)])
    assert sum(seen.scores) == heads * patches**2 > 2**31 and max(seen.scores) <= SCORES

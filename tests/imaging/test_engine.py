"""What the decoder runs in, by machine: what a Mac would choose is decided from its numbers, which are given here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import hollow_checkpoint
from rehearsal.pieces import DECODER
from synthetic import tiny

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging import decoder_copy, engine
from llada2_mlx.imaging.decoder_copy import convert_decoder
from llada2_mlx.imaging.decoder_mlx import MLXDecoder
from llada2_mlx.imaging.engine import check_engine, open_decoder, plan
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.vq import VQGrid
from llada2_mlx.worker import MLXWorker

CPU, MPS = torch.device("cpu"), torch.device("mps")
PART = Part.DECODER_TURBO


def grids(codes: int) -> list[VQGrid]:
    return [VQGrid(np.zeros((codes, codes), dtype="int32"), 16384)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The published sizes, in files without values."""
    return hollow_checkpoint(tmp_path_factory.mktemp("published"), DECODER["n_layers"])


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX runs in bf16 and writes no scores, as on Metal."""
    monkeypatch.setattr(decoder_copy, "on_cpu", lambda: False)


@pytest.mark.parametrize(
    ("memory", "version", "codes", "taken", "why"),
    [
        (48e9, "2.13.0", 32, "torch", "PyTorch. It takes 12."),
        (48e9, "2.12.1", 32, "mlx", "attention of PyTorch 2.12.1 on MPS is slow"),
        (17e9, "2.13.0", 32, "torch", "PyTorch"),
        (17e9, "2.10.0", 32, "mlx", "2.13 or later does not"),
        (16.5e9, "2.13.0", 64, "mlx", "4.5 GB to work, in the 16.5 GB"),  # a picture of 2048 x 2048
        (14.0e9, "2.13.0", 64, "mlx-8bit", "2.3 GB to work, in the 14.0 GB"),
        (11.4e9, "2.13.0", 16, "mlx-8bit", "MLX with 8 bits. As it is it takes 12.3 GB"),
        (11.4e9, "2.12.0", 32, "mlx-8bit", "MLX with 8 bits"),
    ],
)
def test_auto_on_a_mac(
    published: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    metal: None,
    memory: float,
    version: str,
    codes: int,
    taken: str,
    why: str,
) -> None:
    monkeypatch.setattr(engine, "machine_bytes", lambda: memory)
    monkeypatch.setattr(torch, "__version__", version)
    found = plan(published, PART, "auto", grids(codes), DecodeOptions(), MPS)
    assert (found.engine, why in found.reason) == (taken, True), found.reason
    assert found.reason.count(". ") <= 1 and found.reason.endswith(".")
    assert found.size + found.working <= memory
    assert (found.size < 7e9) == (taken == "mlx-8bit")


def test_elsewhere_auto_is_pytorch_and_says_nothing(published: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "machine_bytes", lambda: 1e9)
    for device in (CPU, torch.device("cuda")):
        found = plan(published, PART, "auto", grids(16), DecodeOptions(), device)
        assert (found.engine, found.reason) == ("torch", None)


@pytest.mark.parametrize("wanted", ["torch", "mlx", "mlx-8bit"])
def test_what_is_asked_for_is_taken(published: Checkpoint, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setattr(engine, "machine_bytes", lambda: 1e9)
    found = plan(published, PART, wanted, grids(16), DecodeOptions(), MPS)
    assert (found.engine, found.reason) == (wanted, None)


def test_an_engine_that_there_is_not_is_refused() -> None:
    with pytest.raises(RequestError, match="no engine 'tpu'; there are auto, torch, mlx, mlx-8bit"):
        check_engine(Checkpoint(tiny()), PART, "tpu")


def test_a_decoder_with_8_bits_runs_in_mlx(tmp_path: Path) -> None:
    shutil.copytree(tiny() / "image_tokenizer", tmp_path / "image_tokenizer")
    MLXWorker().drive(convert_decoder(tiny() / "decoder-turbo", tmp_path / "decoder-turbo"))
    checkpoint = Checkpoint(tmp_path)
    grid = [VQGrid(np.zeros((8, 8), dtype="int32"), 256)]
    for device in (CPU, MPS):
        found = plan(checkpoint, PART, "auto", grid, DecodeOptions(), device)
        assert found.engine == "mlx" and "8 bits, which PyTorch does not run" in found.reason
    with pytest.raises(RequestError, match="has 8 bits, which only MLX runs. Choose the engine auto or mlx"):
        plan(checkpoint, PART, "torch", grid, DecodeOptions(), CPU)
    assert plan(checkpoint, PART, "mlx-8bit", grid, DecodeOptions()).size == found.size


def test_an_engine_opens_its_class(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Path(shutil.copytree(tiny(), tmp_path / "tiny")))
    assert isinstance(open_decoder(checkpoint, PART, "torch", CPU), Decoder)
    grid = [VQGrid(np.zeros((8, 8), dtype="int32"), 256)]
    prior = (checkpoint.root / "image_tokenizer/sigvq_embedding.pt").stat().st_size
    for name in ("mlx", "mlx-8bit"):
        decoder = open_decoder(checkpoint, PART, name)
        assert isinstance(decoder, MLXDecoder)
        assert decoder.size + prior == plan(checkpoint, PART, name, grid, DecodeOptions()).size

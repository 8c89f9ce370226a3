"""The parity that the doctor looks at: it holds here, finds what is wrong, and bears what is only less precise."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.checkup import parity
from llada2_mlx.checkup.parity import Check, Verdict, checks, of_mlx, of_torch, typical

CPU = torch.device("cpu")
OF_MLX = [*(f"language model, {way}" for way in ("float32", "bf16", "8 bits", "4 bits")), "drawing, float32"]
OF_TORCH = ["image tokenizer, float32", "decoder, float32", "decoder, bf16", "VAE, float32"]
TRANSFORMER = "decoder's transformer, float32"
KERNELS = ["256 experts in 4 bits, 4 tokens", "256 experts in 4 bits, 96 tokens"]


def verdicts(some: Iterator[Check]) -> dict[str, Verdict]:
    return {check.what: check.verdict for check in some}


def those(found: dict[str, Verdict], verdict: Verdict) -> set[str]:
    return {name for name, each in found.items() if each is verdict}


def test_it_holds_here_and_the_record_is_of_the_built_in_model() -> None:
    """If the built-in model was changed on purpose: python -m llada2_mlx.checkup.parity."""
    found = {check.what: check for check in checks(CPU)}
    assert set(found) == {*OF_MLX, *KERNELS, TRANSFORMER, *OF_TORCH}
    assert {check.verdict for check in found.values()} == {Verdict.EQUAL}
    assert all(check.error < 1e-5 for name, check in found.items() if "float32" in name and check.error is not None)
    assert 1e-3 < found["decoder, bf16"].error and 1e-3 < found["language model, bf16"].error  # they did run in bf16


def test_recording_gives_the_record() -> None:
    kept = parity.recorded()
    made = parity.record(kept["picture"])
    assert set(made) == set(kept)
    for name, value in kept.items():
        assert made[name].dtype == value.dtype
        if value.dtype.kind in "iu":
            assert np.array_equal(made[name], value), name
        else:  # another processor sums in another order
            assert parity.relative(made[name], value) < 1e-5, name
    assert len(set(kept["encoded"].flatten())) > 20 and len(set(kept["drawn"].flatten())) > 20


def altered(folder: Path, **tensors: str) -> Checkpoint:
    """The built-in model with the rows of some tensors in another order: by file, as it is named below, and tensor."""
    files = {
        "backbone": "model.safetensors",
        "decoder": "decoder-turbo/decoder_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "tokenizer": "image_tokenizer/image_tokenizer.safetensors",
    }
    shutil.copytree(BUILT_IN, folder / "altered")
    for file, tensor in tensors.items():
        path = folder / "altered" / files[file]
        content = load_file(path)
        save_file(content | {tensor: content[tensor].flip(0)}, path, metadata={"format": "pt"})
    return Checkpoint(folder / "altered")


def test_other_numbers_of_mlx_are_found(tmp_path: Path) -> None:
    found = verdicts(of_mlx(altered(tmp_path, backbone="model.layers.2.attention.dense.weight")))
    # few bits are compared with what their weights stand for
    wrong = {"language model, float32", "language model, bf16", "drawing, float32"}
    assert those(found, Verdict.WRONG) == wrong


def test_other_numbers_of_the_transformer_in_mlx_are_found(tmp_path: Path) -> None:
    found = verdicts(of_mlx(altered(tmp_path, decoder="layers.1.attention.to_v.weight")))
    assert those(found, Verdict.WRONG) == {TRANSFORMER}


def test_other_numbers_of_pytorch_are_found(tmp_path: Path) -> None:
    other = altered(
        tmp_path,
        decoder="layers.1.attention.to_v.weight",
        vae="decoder.conv_in.weight",
        tokenizer="model.vqmodel.quant_conv.weight",
    )
    assert those(verdicts(of_torch(other, CPU)), Verdict.WRONG) == set(OF_TORCH)


def test_a_kernel_that_leaves_rows_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MLX before 0.32.4 does on M5, where many rows are multiplied sorted by expert."""
    whole = mx.gather_qmm

    def gather_qmm(x: mx.array, *args, sorted_indices: bool = False, **options) -> mx.array:
        out = whole(x, *args, sorted_indices=sorted_indices, **options)
        if sorted_indices:
            out[:16] = 0
        return out

    monkeypatch.setattr(mx, "gather_qmm", gather_qmm)
    wrong = {"language model, 8 bits", "language model, 4 bits", KERNELS[1]}
    assert those(verdicts(of_mlx(Checkpoint(BUILT_IN))), Verdict.WRONG) == wrong


class TenBits(TorchFunctionMode):
    """Rounds what PyTorch multiplies."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        multiplying = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.matmul)
        if function in multiplying:
            args = tuple(self.rounded(value) for value in args)
        return function(*args, **kwargs or {})

    @staticmethod
    def rounded(value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_float32_with_10_bits_is_told_and_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As M5 multiplies float32 unless it is told not to; codes stay the same."""

    def rounding(function: Callable, count: int) -> Callable:
        def call(*args, **options):
            first = 0 if count == 3 else 1  # a layer has itself before what it multiplies
            rounded = lambda x: ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)
            new = [
                rounded(x) if first <= i < first + count and x.dtype == mx.float32 else x for i, x in enumerate(args)
            ]
            return function(*new, **options)

        return call

    monkeypatch.setattr(nn.Linear, "__call__", rounding(nn.Linear.__call__, 1))
    monkeypatch.setattr(SwitchLinear, "__call__", rounding(SwitchLinear.__call__, 1))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", rounding(mx.fast.scaled_dot_product_attention, 3))
    with TenBits():
        found = verdicts(checks(CPU))
    assert those(found, Verdict.REDUCED) == {"language model, float32", TRANSFORMER, "decoder, float32"}
    assert not those(found, Verdict.WRONG)


def test_what_a_library_raises_is_a_check_that_failed(tmp_path: Path) -> None:
    shutil.copytree(BUILT_IN, tmp_path / "broken")
    (tmp_path / "broken/decoder-turbo/decoder_model.safetensors").write_bytes(b"no weights")
    read, failed = of_torch(Checkpoint(tmp_path / "broken"), CPU)
    assert read.verdict is Verdict.EQUAL
    assert failed.verdict is Verdict.WRONG and "CheckpointError" in failed.told and failed.where == "PyTorch"


def test_a_position_may_go_to_another_expert_and_none_may_be_garbage() -> None:
    expected = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    flipped, garbage, missing = expected.copy(), expected.copy(), expected.copy()
    flipped[3] *= 1.2
    garbage[3] *= -1
    missing[3, 2] = np.nan
    assert typical(expected, expected) == typical(flipped, expected) == 0
    assert typical(garbage, expected) == typical(missing, expected) == typical(expected[:9], expected) == np.inf

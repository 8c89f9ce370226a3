"""Copies of a decoder with 8 bits: what is in them, that they are never half there, and what runs from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import Sizes, tiny, write_decoder

from llada2_mlx.checkpoint.layout import Checkpoint, Part, safetensors_header
from llada2_mlx.errors import CheckpointError, LLaDA2Error, RequestError
from llada2_mlx.files import locked
from llada2_mlx.imaging.decoder_copy import (
    block_of,
    convert_decoder,
    is_current,
    own_copy,
    size_of_copy,
    weights_of,
)
from llada2_mlx.imaging.decoder_mlx import MLXDecoder
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.vq import VQGrid
from llada2_mlx.worker import MLXWorker

OPTIONS = DecodeOptions(steps=2, upscale=1, guidance=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The decoder of a checkpoint of its own, so wide that all matrices of its layers can have 8 bits, most in groups of 32."""
    shutil.copytree(tiny() / "image_tokenizer", tmp_path / "model/image_tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        write_decoder(tmp_path / "model/decoder", Sizes(decoder_width=96), torch.bfloat16)
    return tmp_path / "model/decoder"


@pytest.fixture(scope="module")
def worker() -> MLXWorker:
    return MLXWorker()


def grid() -> VQGrid:
    return VQGrid(np.random.default_rng(0).integers(0, 256, (8, 10)), 256)


def test_a_copy_holds_what_the_decoder_does_with_8_bits(folder: Path, tmp_path: Path, worker: MLXWorker) -> None:
    told = []
    copy = worker.drive(convert_decoder(folder, tmp_path / "copy"), told.append)
    whole, packed = load_file(weights_of(folder)), mx.load(str(weights_of(copy)))
    assert told[-1].done == told[-1].total == len(whole) and is_current(copy, folder)
    assert block_of(folder) is None and block_of(copy)["bits"] == 8
    quantised = {name.removesuffix(".scales") for name in packed if name.endswith(".scales")}
    layers = ("layers.", "noise_refiner.", "context_refiner.")
    assert quantised == {
        name.removesuffix(".weight")
        for name, value in whole.items()
        if name.startswith(layers) and value.ndim == 2 and name.endswith(".weight") and value.shape[1] % 32 == 0
    }
    for name, value in whole.items():
        path = name.removesuffix(".weight")
        if path not in quantised:
            same = np.array(packed[name].astype(mx.float32))
            assert packed[name].dtype == mx.bfloat16 and (same == value.float().numpy()).all()
            continue
        weight, scales, biases = packed[name], packed[f"{path}.scales"], packed[f"{path}.biases"]
        groups = 64 if value.shape[1] % 64 == 0 else 32  # the widths are 96 and 256
        assert scales.shape[1] == value.shape[1] // groups
        exact = (scales.astype(mx.float32), biases.astype(mx.float32))
        found = np.array(mx.dequantize(weight, *exact, group_size=groups, bits=8))
        off = np.abs(found - value.float().numpy())
        # half a step, and what rounding the scale and the offset to bf16 adds at the ends of the range
        steps = np.repeat(np.abs(np.array(exact[0])), groups, axis=1)
        assert 0 < off.max() and (off <= 2 * steps).all()
    sizes = {name: value.nbytes for name, value in packed.items()}
    assert sum(sizes.values()) == size_of_copy(folder)
    assert sum(sizes.values()) < 0.8 * sum(value.nbytes for value in whole.values())


def test_the_published_decoder_takes_six_and_a_half_gigabytes(tmp_path: Path) -> None:
    from counting import hollow_checkpoint
    from rehearsal.pieces import DECODER

    folder = hollow_checkpoint(tmp_path, DECODER["n_layers"]).root / "decoder-turbo"
    assert 12.2e9 < weights_of(folder).stat().st_size < 12.4e9
    assert 6.5e9 < size_of_copy(folder) < 6.6e9


def test_no_more_than_a_tensor_is_in_memory(tmp_path: Path, worker: MLXWorker) -> None:
    folder = tmp_path / "decoder"
    write_decoder(folder, Sizes(decoder_width=192, decoder_layers=3), torch.bfloat16)
    largest = max(value.nbytes for value in load_file(weights_of(folder)).values())
    worker.call(mx.clear_cache)
    before = worker.call(mx.get_active_memory)
    worker.call(mx.reset_peak_memory)
    worker.drive(convert_decoder(folder, tmp_path / "copy"))
    total = weights_of(folder).stat().st_size
    assert worker.call(mx.get_peak_memory) - before < 4 * largest < total


def test_a_decoder_that_runs_from_its_copy_is_near_the_whole_one(folder: Path) -> None:
    checkpoint, calls = Checkpoint(folder.parent), []
    whole = MLXDecoder(checkpoint)
    small = MLXDecoder(checkpoint, on_step=calls.append, quantised=True)
    assert {call.phase for call in calls} == {"converting", "loading weights"}
    assert own_copy(folder) == folder / "mlx-8bit" and is_current(own_copy(folder), folder)
    assert "scales" in small.transformer.layers[0].feed_forward.w2 and small.size < 0.8 * whole.size
    ours, exact = small.sample([grid()], OPTIONS), whole.sample([grid()], OPTIONS)
    assert 0 < (ours - exact).norm() < 0.02 * exact.norm()
    # the second time it is only read; and the decoder's own folder is still one decoder
    calls.clear()
    again = MLXDecoder(checkpoint.require(Part.DECODER), on_step=calls.append, quantised=True)
    assert {call.phase for call in calls} == {"loading weights"}
    assert torch.equal(again.sample([grid()], OPTIONS), ours)


def test_a_copy_in_place_of_the_decoder_runs_in_mlx_alone(folder: Path, tmp_path: Path, worker: MLXWorker) -> None:
    shutil.copytree(folder.parent / "image_tokenizer", tmp_path / "small/image_tokenizer")
    worker.drive(convert_decoder(folder, tmp_path / "small/decoder"))
    checkpoint = Checkpoint(tmp_path / "small")
    expected = MLXDecoder(Checkpoint(folder.parent), quantised=True).sample([grid()], OPTIONS)
    for quantised in (False, True):
        assert torch.equal(MLXDecoder(checkpoint, quantised=quantised).sample([grid()], OPTIONS), expected)
    with pytest.raises(CheckpointError, match="few bits, which only MLX runs. Choose the engine auto or mlx"):
        Decoder(checkpoint, device=torch.device("cpu"))
    with pytest.raises(RequestError, match="8 bits already"):
        worker.drive(convert_decoder(tmp_path / "small/decoder", tmp_path / "smaller"))


def test_stopped_anywhere_nothing_is_taken_for_a_copy(folder: Path, worker: MLXWorker) -> None:
    copy = own_copy(folder)

    def stop(progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.drive(convert_decoder(folder, copy), stop)
    assert [path.name for path in copy.iterdir()] == ["conversion.json"] and not is_current(copy, folder)
    (copy / ".123-abc.partial").write_bytes(b"of a killed run")
    (copy / "decoder_model.safetensors").write_bytes(b"half")
    worker.drive(convert_decoder(folder, copy))
    assert is_current(copy, folder)
    assert {path.name for path in copy.iterdir()} == {"conversion.json", "config.json", weights_of(folder).name}


def test_a_copy_of_what_was_replaced_is_made_again(folder: Path, worker: MLXWorker) -> None:
    copy, config = own_copy(folder), folder / "config.json"
    worker.drive(convert_decoder(folder, copy))
    written = weights_of(copy).stat().st_mtime_ns
    worker.drive(convert_decoder(folder, copy))
    assert weights_of(copy).stat().st_mtime_ns == written
    config.write_text(json.dumps(json.loads(config.read_text()) | {"t_scale": 999.0}))
    assert not is_current(copy, folder)
    worker.drive(convert_decoder(folder, copy))
    assert is_current(copy, folder) and json.loads((copy / "config.json").read_text())["t_scale"] == 999.0


def test_what_no_conversion_made_is_left_alone(folder: Path, worker: MLXWorker) -> None:
    mine = own_copy(folder) / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RequestError, match="mlx-8bit is where the converted copy goes, but it holds something else"):
        worker.drive(convert_decoder(folder, own_copy(folder)))
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]


def test_killed_before_a_copy_says_what_it_is_it_is_made(folder: Path, worker: MLXWorker) -> None:
    begun = own_copy(folder) / ".123-abc.partial"
    begun.parent.mkdir()
    begun.write_text("{")
    worker.drive(convert_decoder(folder, own_copy(folder)))
    assert is_current(own_copy(folder), folder) and not begun.exists()


def test_two_programs_do_not_write_one_copy(folder: Path, worker: MLXWorker) -> None:
    with locked(folder / ".mlx-8bit.lock"), pytest.raises(LLaDA2Error, match="being written by another program"):
        worker.drive(convert_decoder(folder, own_copy(folder)))
    assert not is_current(own_copy(folder), folder)


def test_a_full_disk_is_said_before_the_work(folder: Path, worker: MLXWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="The decoder with 8 bits takes .* where .* are free. Make room"):
        worker.drive(convert_decoder(folder, own_copy(folder)))


def test_values_that_are_not_finite_make_no_copy(folder: Path, worker: MLXWorker) -> None:
    tensors, path = load_file(weights_of(folder)), weights_of(folder)
    tensors["layers.0.attention.to_v.weight"][3, 4] = float("inf")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="not finite .* in layers.0.attention.to_v.weight"):
        worker.drive(convert_decoder(folder, own_copy(folder)))
    assert not list(own_copy(folder).glob("*.safetensors")) and not is_current(own_copy(folder), folder)


def test_a_folder_that_may_not_be_written_has_its_copy_in_the_users_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert own_copy(folder).is_relative_to(tmp_path / "cache/llada2-mlx") and own_copy(folder).name == "mlx-8bit"
    assert own_copy(folder) != own_copy(folder.parent / "decoder-turbo")


@pytest.mark.parametrize("block", [{"bits": 4, "group_size": 64}, {"bits": 8, "group_size": 7}, "8", []])
def test_a_quantization_that_cannot_be_read_is_said(folder: Path, block: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization": block}))
    with pytest.raises(CheckpointError, match="quantization that cannot be read: affine, with 8 bits"):
        MLXDecoder(Checkpoint(folder.parent))


def test_a_cut_off_copy_is_none(folder: Path, worker: MLXWorker) -> None:
    copy = worker.drive(convert_decoder(folder, own_copy(folder)))
    path = weights_of(copy)
    path.write_bytes(path.read_bytes()[:-10])
    assert not is_current(copy, folder) and safetensors_header(weights_of(folder))

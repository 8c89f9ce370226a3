"""The decoder in MLX: parity with diffusers' class on networks of other sizes, and how often what runs.

Parity with the published code is in test_parity.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import randomise, tiny

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint, Part
from llada2_mlx.errors import CheckpointError, LLaDA2Error, RequestError
from llada2_mlx.imaging import decoder_mlx
from llada2_mlx.imaging.decoder_mlx import MLXDecoder
from llada2_mlx.imaging.flow import ADAPTIVE_SOLVERS, SOLVERS, DecodeOptions, Sampler
from llada2_mlx.imaging.transformer_mlx import Config, Layer, Turns
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.shapes.training import export
from llada2_mlx.vq import VQGrid

CPU = torch.device("cpu")
OPTIONS = DecodeOptions(steps=3, upscale=1)
FEATURES = 32  # of the tiny checkpoint's prior


def grid(seed: int = 0, size: tuple[int, int] = (8, 10), codes: int = 256) -> VQGrid:
    return VQGrid(np.random.default_rng(seed).integers(0, codes, size), codes)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    return ((actual - expected).norm() / expected.norm()).item()


def in_float32(decoder: Decoder | MLXDecoder) -> Decoder | MLXDecoder:
    """The same weights, run in float32: MLX on a CPU does so anyway."""
    decoder.prior.float()
    if isinstance(decoder, Decoder):
        decoder.transformer.float()
    return decoder


@pytest.fixture(scope="module")
def both() -> tuple[MLXDecoder, Decoder]:
    checkpoint = Checkpoint(tiny())
    return in_float32(MLXDecoder(checkpoint, Part.DECODER)), in_float32(Decoder(checkpoint, Part.DECODER, CPU))


def with_decoder(folder: Path, **config: object) -> Checkpoint:
    """The tiny checkpoint with a decoder of another shape, with random weights in float32."""
    from diffusers import ZImageTransformer2DModel

    shutil.copytree(tiny() / "image_tokenizer", folder / "image_tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = ZImageTransformer2DModel(**config, cap_feat_dim=FEATURES)
        randomise(module)
        for name, value in module.named_parameters():
            if "norm" in name:  # diffusers makes all ones
                torch.nn.init.normal_(value, 1.0, 0.2)
    export.write_decoder(folder / "decoder", module, {"axes_lens": [2048, 512, 512], **config}, torch.float32)
    return Checkpoint(folder)


OTHERS = {
    "three heads, three refiner layers": {
        "dim": 48,
        "n_heads": 3,
        "n_kv_heads": 3,
        "n_layers": 3,
        "n_refiner_layers": 3,
        "axes_dims": [8, 4, 4],
        "t_scale": 500.0,
        "norm_eps": 1e-3,
        "rope_theta": 1000.0,
    },
    "no norm of queries, other channels": {
        "dim": 64,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 1,
        "n_refiner_layers": 2,
        "axes_dims": [4, 12, 16],
        "qk_norm": False,
        "in_channels": 6,
    },
    "wider than the time embedding": {
        "dim": 288,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "n_refiner_layers": 0,
        "axes_dims": [24, 24, 24],
    },
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=list(OTHERS))
def test_networks_of_other_sizes(tmp_path: Path, config: dict) -> None:
    """At grids whose picture and condition fill no multiple of 32 tokens."""
    checkpoint = with_decoder(tmp_path, **config)
    ours, theirs = in_float32(MLXDecoder(checkpoint)), in_float32(Decoder(checkpoint, device=CPU))
    for seed, size in enumerate([(9, 11), (13, 8), (8, 8)]):
        features = theirs.features(grid(seed, size))
        latent = torch.randn(ours.channels, 1, 2 * size[0], 2 * size[1], generator=torch.Generator().manual_seed(seed))
        ahead, theirs_ahead = ours.velocity(features), theirs.velocity(features)
        for time in (0.0, 0.37, torch.tensor(0.93)):
            expected = theirs_ahead(time, latent, lambda pieces=1: None)
            assert relative(ahead(time, latent, lambda pieces=1: None), expected) < 1e-5


@pytest.mark.parametrize("solver", [*SOLVERS, "published"])
def test_every_sampler_and_solver(both: tuple[MLXDecoder, Decoder], solver: str) -> None:
    how = {"sampler": Sampler.RENOISE} if solver == "published" else {"solver": solver}
    # where guidance ends the velocity jumps, and an adaptive solver's step depends on the last bit there
    how |= {"guidance": 0.0} if solver in ADAPTIVE_SOLVERS else {"guidance_end": 0.7}
    options = DecodeOptions(steps=3, upscale=1, seed=3, **how)
    ours, theirs = (decoder.sample([grid(1, (9, 8))], options) for decoder in both)
    assert relative(ours, theirs) < 1e-4


def test_the_step_cache_and_what_is_seen_on_the_way_are_those_of_pytorch() -> None:
    """On Shapes' full decoder: the tiny one has too few layers to save anything."""
    drawn, seen = grid(2, (8, 8), 2048), []
    for decoder in (MLXDecoder(Checkpoint(BUILT_IN)), Decoder(Checkpoint(BUILT_IN), device=CPU)):
        decoder, shown = in_float32(decoder), []
        exact = decoder.sample([drawn], DecodeOptions(9))
        cached = decoder.sample([drawn], DecodeOptions(9, cache_threshold=0.1), on_latent=shown.append)
        seen.append((cached, decoder.skipped_calls, shown))
        assert decoder.sample([drawn], DecodeOptions(9, cache_threshold=1e-9)).equal(exact)
        assert decoder.skipped_calls == 0 and not cached.equal(exact)
    (ours, skipped, shown), (theirs, expected, wanted) = seen
    assert relative(ours, theirs) < 1e-4 and skipped == expected > 0
    assert len(shown) == len(wanted) == 8
    assert all(relative(a, b) < 1e-4 for a, b in zip(shown, wanted))


def test_the_larger_picture_and_strong_guidance(both: tuple[MLXDecoder, Decoder]) -> None:
    options = DecodeOptions(steps=3, guidance=4.0, seed=2**64 - 1)
    ours, theirs = (decoder.sample([grid()], options) for decoder in both)
    assert relative(ours, theirs) < 1e-4


def test_queries_in_pieces_are_the_same(both: tuple[MLXDecoder, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = both[0].sample([grid()], OPTIONS)
    monkeypatch.setattr("llada2_mlx.imaging.transformer_mlx.SCORES", 2 * 7 * 400)
    assert relative(both[0].sample([grid()], OPTIONS), whole) < 1e-5


def test_a_picture_of_a_batch_is_what_it_is_alone(both: tuple[MLXDecoder, Decoder]) -> None:
    decoder = both[0]
    batch = decoder.sample([grid(0), grid(1)], replace(OPTIONS, seed=7))
    for index in range(2):
        assert torch.equal(batch[index : index + 1], decoder.sample([grid(index)], replace(OPTIONS, seed=7 + index)))


def test_what_stays_the_same_is_computed_once(
    both: tuple[MLXDecoder, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refined condition and the rotations once a picture and branch; what a time makes of the norms once for both branches."""
    decoder, counts = both[0], {"untimed": 0, "timed": 0, "turns": 0}
    norms, turns = Layer.norms, Turns.__init__

    def count_norms(self, embedding=None):
        counts["untimed" if embedding is None else "timed"] += 1
        return norms(self, embedding)

    def count_turns(self, *args):
        counts["turns"] += 1
        turns(self, *args)

    monkeypatch.setattr(Layer, "norms", count_norms)
    monkeypatch.setattr(Turns, "__init__", count_turns)
    decoder.sample([grid(0), grid(1)], replace(OPTIONS, steps=5))
    layers = decoder.transformer.config
    assert counts["untimed"] == 2 * 2 * layers.n_refiner_layers  # pictures, branches
    assert counts["timed"] == 2 * 4 * (layers.n_layers + layers.n_refiner_layers)  # pictures, calls
    assert counts["turns"] == 2 * 2 * 3


def test_each_layer_is_told_in_the_callers_thread_and_may_end_the_work(both: tuple[MLXDecoder, Decoder]) -> None:
    decoder, told = both[0], []

    class Cancelled(BaseException):
        pass

    def cancel(progress) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append(progress)
        if len(told) == 3:
            raise Cancelled

    expected = decoder.sample([grid()], OPTIONS)
    with pytest.raises(Cancelled):
        decoder.sample([grid()], OPTIONS, cancel)
    assert [progress.done for progress in told] == [1, 2, 3] and told[-1].total == 2 * 2 * 2
    assert torch.equal(decoder.sample([grid()], OPTIONS), expected)


def test_it_may_be_used_from_any_thread(both: tuple[MLXDecoder, Decoder]) -> None:
    decoder, results = both[0], {}
    work = lambda seed: results.update({seed: decoder.sample([grid()], replace(OPTIONS, seed=seed))})
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert torch.equal(results[seed], decoder.sample([grid()], replace(OPTIONS, seed=seed)))


def test_in_bf16_weights_and_activations_are_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Metal. The velocity is float32, and near that of float32."""
    exact = MLXDecoder(Checkpoint(tiny()), Part.DECODER).sample([grid()], OPTIONS)
    monkeypatch.setattr(decoder_mlx, "run_type", lambda stored: mx.bfloat16)
    decoder, seen = MLXDecoder(Checkpoint(tiny()), Part.DECODER), set()
    call = Layer.__call__

    def note(self, x, turns, norms):
        out = call(self, x, turns, norms)
        seen.update({x.dtype, out.dtype, *(value.dtype for value in vars(norms).values())})
        return out

    monkeypatch.setattr(Layer, "__call__", note)
    rounded = decoder.sample([grid()], OPTIONS)
    assert seen == {mx.bfloat16} and 0 < relative(rounded, exact) < 0.03


def test_a_grid_of_another_model_is_refused(both: tuple[MLXDecoder, Decoder]) -> None:
    with pytest.raises(RequestError, match="a model with 128 codes; the decoder of tiny knows 256"):
        both[0].sample([grid(), grid(codes=128)], OPTIONS)


def damaged(folder: Path, change) -> Checkpoint:
    """The tiny checkpoint's decoder with ``change(tensors, config)`` made to it."""
    for name in ("decoder", "image_tokenizer"):
        shutil.copytree(tiny() / name, folder / name)
    weights, config = next((folder / "decoder").glob("*.safetensors")), folder / "decoder/config.json"
    tensors, stated = load_file(weights), json.loads(config.read_text())
    change(tensors, stated)
    save_file(tensors, weights)
    config.write_text(json.dumps(stated))
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, config: tensors.pop("x_pad_token"), "missing: x_pad_token"),
        (lambda tensors, config: tensors.update(more=torch.ones(1)), "unexpected: more"),
        (lambda tensors, config: config.update(n_layers=2), "missing: layers.1"),
        (lambda tensors, config: config.update(n_heads=3), "describes no network"),
        (lambda tensors, config: config.update(dim="wide"), "describes no network"),
        (lambda tensors, config: config.update(siglip_feat_dim=8), "another kind of condition"),
        (
            lambda tensors, config: tensors.update(x_pad_token=torch.ones(1, 32, dtype=torch.int32)),
            "only weights in BF16",
        ),
        (
            lambda tensors, config: tensors["layers.0.attention.to_q.weight"].fill_(float("nan")),
            "not finite .*attention.to_q",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_said(tmp_path: Path, change, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        MLXDecoder(damaged(tmp_path, change))


def test_what_is_not_finite_is_said_in_its_call() -> None:
    decoder = MLXDecoder(Checkpoint(tiny()), Part.DECODER)
    infinite = mx.full((32, 85), mx.inf)
    mx.eval(infinite)  # in this thread, which made it
    decoder.transformer.layers[0].feed_forward.w2.weight = infinite
    with pytest.raises(LLaDA2Error, match="decoder gave values that are not finite .* network call 1"):
        decoder.sample([grid()], OPTIONS)


def test_the_published_sizes_are_the_defaults() -> None:
    assert Config.from_dict({}).head_dim == 128 and sum(Config().axes_dims) == 128

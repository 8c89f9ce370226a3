"""The step cache: what it saves, what it may change, and that each branch and picture has its own."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint, Part
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.step_cache import StepCache
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.progress import Progress
from llada2_mlx.vq import VQGrid

OPTIONS = DecodeOptions(9, seed=1)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Shapes' full decoder, which has four main layers and no refiners."""
    return Decoder(Checkpoint(BUILT_IN), Part.DECODER, torch.device("cpu"))


def grid(seed: int = 0) -> VQGrid:
    return VQGrid(np.random.default_rng(seed).integers(0, 2048, (8, 8)), 2048)


def layer_runs(
    decoder: Decoder, options: DecodeOptions, *grids: VQGrid
) -> tuple[torch.Tensor, list[int], list[Progress]]:
    """The latents, how often each main layer ran, and what was told."""
    runs, told, layers = [0] * len(decoder.transformer.layers), [], decoder.transformer.layers

    def count(index: int):
        def hook(*_: object) -> None:
            runs[index] += 1

        return hook

    handles = [layer.register_forward_hook(count(index)) for index, layer in enumerate(layers)]
    try:
        return decoder.sample(grids, options, told.append), runs, told
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("arrays", [torch.tensor, mx.array], ids=["torch", "mlx"])
def test_what_the_other_layers_added_is_added_again_where_the_first_adds_nearly_the_same(arrays) -> None:
    """By hand: the distance is the mean of differences over the mean of what was added in the last whole call."""
    cache, asked = StepCache(0.1), []

    def rest(features):
        asked.append(features.tolist())
        return 2 * features + 1

    def call(before: list[float], after: list[float]) -> list[float]:
        return cache(arrays(before), arrays(after), rest).tolist()

    assert call([0.0, 0.0], [1.0, 3.0]) == [3.0, 7.0]  # the first adds 1 and 3; the rest 2 and 4
    assert call([5.0, 5.0], [6.25, 8.0]) == [8.25, 12.0]  # 0.25 / 4 off: kept, on what is there now
    assert call([5.0, 5.0], [6.25, 8.25]) == [13.5, 17.5]  # 0.5 / 4 off: whole, and remembered
    assert call([0.0, 0.0], [1.25, 3.25]) == [8.5, 12.5]  # nothing off what was last added
    assert asked == [[1.0, 3.0], [6.25, 8.25]] and (cache.calls, cache.skipped) == (4, 2)


def test_a_threshold_that_nothing_is_under_changes_no_bit(decoder: Decoder) -> None:
    expected, runs, told = layer_runs(decoder, OPTIONS, grid())
    assert runs == [16] * 4
    cached, cached_runs, cached_told = layer_runs(decoder, replace(OPTIONS, cache_threshold=1e-9), grid())
    assert torch.equal(cached, expected) and cached_runs == runs and cached_told == told


def test_the_first_layer_runs_in_every_call_and_the_others_in_fewer(decoder: Decoder) -> None:
    exact, _, told = layer_runs(decoder, OPTIONS, grid())
    _, runs, cached_told = layer_runs(decoder, replace(OPTIONS, cache_threshold=0.1), grid())
    assert runs[0] == 16 and 2 <= runs[1] < 16 and runs[1:] == runs[1:2] * 3
    assert decoder.skipped_calls == 16 - runs[1]
    assert cached_told[-1].done == cached_told[-1].total == told[-1].total
    assert all(a.done < b.done for a, b in zip(cached_told, cached_told[1:]))
    assert len(cached_told) == sum(runs) + 16 - runs[1]


def test_the_farther_the_threshold_the_fewer_the_calls_and_the_farther_the_picture(decoder: Decoder) -> None:
    options = replace(OPTIONS, steps=25)
    exact = decoder.sample([grid()], options)
    off, whole = [], []
    for threshold in (0.02, 0.06, 0.2):
        latent, runs, _ = layer_runs(decoder, replace(options, cache_threshold=threshold), grid())
        off.append(float((latent - exact).norm() / exact.norm()))
        whole.append(runs[1])
    assert off == sorted(off) and whole == sorted(whole, reverse=True) and whole[-1] < whole[0]
    assert off[0] < 0.02 and off[-1] > 0


def test_a_picture_of_a_batch_is_what_it_is_alone(decoder: Decoder) -> None:
    options = replace(OPTIONS, steps=5, cache_threshold=0.1)
    batch = decoder.sample([grid(0), grid(1)], options)
    for index in range(2):
        own = decoder.sample([grid(index)], replace(options, seed=1 + index))
        assert torch.equal(batch[index : index + 1], own)


def test_the_network_is_whole_again_afterwards_also_when_stopped(decoder: Decoder) -> None:
    class Cancelled(BaseException):
        pass

    def cancel(progress: Progress) -> None:
        if progress.done == 3:
            raise Cancelled

    expected, layers = decoder.sample([grid()], OPTIONS), decoder.transformer.layers
    with pytest.raises(Cancelled):
        decoder.sample([grid()], replace(OPTIONS, cache_threshold=0.1), cancel)
    assert decoder.transformer.layers is layers and not any(layer._forward_hooks for layer in layers)
    assert torch.equal(decoder.sample([grid()], OPTIONS), expected)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_cannot_be_is_refused(threshold: float) -> None:
    with pytest.raises(RequestError, match="from 0 .off. to 1"):
        DecodeOptions(cache_threshold=threshold)

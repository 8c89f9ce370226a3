"""Guidance in an interval of time, and presets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from synthetic import tiny

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging.flow import (
    CUSTOM,
    FIXED_SOLVERS,
    PRESETS,
    DecodeOptions,
    Sampler,
    combined,
    solve,
    with_preset,
)
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.progress import Progress
from llada2_mlx.vq import VQGrid


class Pull:
    """A velocity towards a point that turns with time; counts its calls."""

    pieces = 3

    def __init__(self, point: float):
        self.point, self.times = point, []

    def __call__(self, time, latent, tell) -> torch.Tensor:
        self.times.append(float(time))
        for _ in range(self.pieces):
            tell()
        return (self.point * math.cos(2 * float(time)) - latent) * (1 + float(time))


def run(options: DecodeOptions) -> tuple[torch.Tensor, Pull, Pull, list[Progress]]:
    positive, negative, told = Pull(2.0), Pull(-1.0), []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 1, 2, 2, generator=generator)
    latent = solve(combined(positive, negative, options), noise, options, generator, told.append)
    return latent, positive, negative, told


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("solver", FIXED_SOLVERS)
def test_the_negative_branch_runs_in_its_interval_alone(solver: str, sampler: Sampler) -> None:
    options = DecodeOptions(9, solver=solver, sampler=sampler, time_shift=2.0, guidance_start=0.2, guidance_end=0.6)
    _, positive, negative, told = run(options)
    assert negative.times == [time for time in positive.times if 0.2 <= time < 0.6]
    assert 0 < len(negative.times) < len(positive.times) == options.calls
    assert len(positive.times) + len(negative.times) == options.network_calls
    assert told[-1].done == told[-1].total == 6 * options.calls
    assert all(a.done < b.done for a, b in zip(told, told[1:]))


def test_an_interval_that_is_all_of_it_changes_no_bit() -> None:
    decoder = Decoder(Checkpoint(tiny()), Part.DECODER, torch.device("cpu"))
    grid = VQGrid(np.random.default_rng(0).integers(0, 256, (8, 10)), 256)
    usual = decoder.sample([grid], DecodeOptions(6, upscale=1))
    whole = {"guidance_start": 0.0, "guidance_end": 1.0}
    assert torch.equal(usual, decoder.sample([grid], DecodeOptions(6, upscale=1, **whole)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance_start": 0.7, "guidance_end": 0.3}, "start at 0.7 and to end at 0.3"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "start before the end"),
        ({"guidance_end": 1.1}, "from 0"),
        ({"guidance_start": float("nan")}, "from 0"),
        ({"time_shift": 0.5}, "time shift"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        DecodeOptions(**options)


MINE = DecodeOptions(7, 0.5, 9, 1, Sampler.RENOISE, "midpoint", 2.0, 0.1, 0.9)


def test_custom_decides_nothing_and_as_published_is_what_untouched_options_are() -> None:
    assert with_preset(MINE, CUSTOM) is MINE
    assert PRESETS["as published"] == DecodeOptions() and DecodeOptions().network_calls == 98


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_decides_the_way_and_leaves_guidance_seed_and_size(name: str) -> None:
    made = with_preset(MINE, name)
    assert (made.guidance, made.seed, made.upscale) == (0.5, 9, 1)
    assert made == DecodeOptions(**vars(PRESETS[name]) | {"guidance": 0.5, "seed": 9, "upscale": 1})
    _, positive, negative, _ = run(made)
    assert len(positive.times) + len(negative.times) == made.network_calls == PRESETS[name].network_calls


def test_each_preset_takes_at_most_half_of_the_calls_of_the_one_before() -> None:
    calls = [preset.network_calls for preset in PRESETS.values()]
    assert all(2 * fewer <= more for more, fewer in zip(calls, calls[1:]))
    assert 4 * calls[-1] <= calls[0]


def test_there_is_no_other_preset() -> None:
    with pytest.raises(RequestError, match="no preset 'best'; there are custom, as published"):
        with_preset(MINE, "best")

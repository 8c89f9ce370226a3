"""Guidance in an interval of time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from synthetic import tiny

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging.flow import FIXED_SOLVERS, DecodeOptions, Sampler, combined, solve
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

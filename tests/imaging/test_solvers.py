"""The solvers of our own: their orders on an equation that can be solved, and against a dense solution."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from llada2_mlx.imaging.flow import ode_times
from llada2_mlx.imaging.solvers import MULTISTEP, integrate

CPU = torch.device("cpu")
# Gaussian data of this mean and spread: x_t is normal with mean t m and spread sqrt((1 - t)^2 + (t s)^2), and the
# probability-flow ODE moves each point with its quantile.
MEAN, SPREAD = 0.7, 0.4


def velocity(time: float, latent: torch.Tensor) -> torch.Tensor:
    spread = (1 - time) ** 2 + (time * SPREAD) ** 2
    return MEAN + (time * SPREAD**2 - (1 - time)) / spread * (latent - time * MEAN)


def exact(time: float, noise: torch.Tensor) -> torch.Tensor:
    return time * MEAN + math.sqrt((1 - time) ** 2 + (time * SPREAD) ** 2) * noise


def error(name: str, times: list[float]) -> float:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    solved = integrate(velocity, exact(times[0], noise), times, MULTISTEP[name]())
    return float((solved - exact(times[-1], noise)).norm())


@pytest.mark.parametrize("name", MULTISTEP)
def test_each_is_of_its_order(name: str) -> None:
    """Away from the ends, where lambda is finite. UniPC's corrector adds one to the order of its predictor."""
    order = 3 if name == "unipc_2" else 2
    errors = [error(name, torch.linspace(0.1, 0.9, steps + 1).double().tolist()) for steps in (40, 80, 160)]
    for more, fewer in pairwise(errors):
        assert math.log2(more / fewer) > order - 0.15


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", MULTISTEP)
def test_from_noise_to_picture_too(name: str, shift: float) -> None:
    """There the first and the last steps are of lower order, and the order is reached later."""
    errors = [error(name, ode_times(steps + 1, shift, CPU).double().tolist()) for steps in (160, 640)]
    assert errors[1] < errors[0] / 9 and errors[1] < 1e-3


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_picture_that_is_seen_at_once_is_reached_in_any_steps(name: str) -> None:
    """Where the data are one point, ``x + (1 - t) v`` is that point everywhere, and every one of the steps is exact."""
    point, noise = torch.tensor([0.5, -2.0]), torch.tensor([3.0, 1.0])
    latent = integrate(lambda time, x: (point - x) / (1 - time), noise, [0, 0.05, 0.3, 0.8, 1], MULTISTEP[name]())
    assert torch.allclose(latent, point, atol=1e-6)


@pytest.mark.parametrize("name", MULTISTEP)
def test_one_call_for_each_interval(name: str) -> None:
    asked = []
    integrate(
        lambda time, x: (asked.append(time), velocity(time, x))[1], torch.zeros(2), [0, 0.1, 0.6, 1], MULTISTEP[name]()
    )
    assert asked == [0, 0.1, 0.6]

"""Solvers for ``dx/dt = v(t, x)`` from noise (0) to picture (1) that remember one call, and call the network once a step.

Of the solvers in data prediction: the picture as seen at a time is ``D = x + (1 - t) v``, the noise's share sigma is
``1 - t``, the picture's alpha is ``t``, and lambda = log(alpha / sigma) runs from minus to plus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch


class Multistep(Protocol):
    """What is remembered of a solution, and how it goes on."""

    def step(self, time: float, following: float, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """The latent at the time ``following``.

        Args:
            latent: at ``time``; what the last step gave.
            velocity: at that time and latent, in its shape.
        """
        ...


class AdamsBashforth2:
    """Adams-Bashforth of order 2 with variable steps (Hairer, Norsett, Wanner: Solving ODEs I, III.5); Euler first."""

    def __init__(self) -> None:
        self._last: tuple[float, torch.Tensor] | None = None

    def step(self, time: float, following: float, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        ahead, slope = following - time, velocity
        if self._last is not None:
            before, earlier = self._last
            slope = velocity + ahead / (2 * (time - before)) * (velocity - earlier)
        self._last = time, velocity
        return latent + ahead * slope


class DPMSolver2M:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, algorithm 2); of order 1 in the first two steps and the last.

    At the start lambda is minus infinity, so that the second step cannot tell a slope in lambda; at the end it is infinity.
    """

    def __init__(self) -> None:
        self._last: tuple[float, torch.Tensor] | None = None

    def step(self, time: float, following: float, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        picture, last = latent + (1 - time) * velocity, self._last
        self._last = time, picture
        return _predicted(latent, picture, last, time, following)


class UniPC2:
    """UniPC of order 2 with B(h) = exp(h) - 1 in data prediction (Zhao et al., arXiv:2302.04867, algorithms 1 and 2).

    Its predictor is the step of DPM-Solver++(2M). The corrector takes the call that the next step makes anyway, and does not
    call again. The last step is of order 1.
    """

    def __init__(self) -> None:
        # times, pictures as seen, and the corrected latent, of the last step; of the step before its time and picture
        self._last: tuple[float, torch.Tensor, torch.Tensor] | None = None
        self._before: tuple[float, torch.Tensor] | None = None

    def step(self, time: float, following: float, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        picture = latent + (1 - time) * velocity
        if self._last is not None:
            latent = self._corrected(time, picture)
        self._before = self._last and self._last[:2]
        self._last = time, picture, latent
        return _predicted(latent, picture, self._before, time, following)

    def _corrected(self, time: float, picture: torch.Tensor) -> torch.Tensor:
        """The latent at ``time``, now that it is known what is seen there."""
        then, seen, latent = self._last
        change = picture - seen
        if math.isinf(_lambda(then)) or self._before is None:
            return _towards(latent, seen + change / 2, then, time)
        step = _lambda(time) - _lambda(then)
        shrunk = -math.expm1(-step)
        # the two conditions of order 2; ``ratio`` is the place of the step before, in units of this one
        first = 1 / shrunk - 1 / step
        second = _second(step, shrunk)
        before, earlier = self._before
        ratio = (_lambda(before) - _lambda(then)) / step
        if math.isinf(ratio):
            return _towards(latent, seen + first * change, then, time)
        older = (first - second) / (1 - ratio)
        return _towards(latent, seen + older / ratio * (earlier - seen) + (first - older) * change, then, time)


def _second(step: float, shrunk: float) -> float:
    """``2 phi_3(h) / B(h)`` with ``h = -step``: the second condition's right side."""
    phi = (-shrunk / -step - 1) / -step - 1 / 2
    return 2 * phi / -shrunk


def _lambda(time: float) -> float:
    """log(alpha / sigma): how clear the picture is at a time in 0 .. 1."""
    if time <= 0:
        return -math.inf
    return math.inf if time >= 1 else math.log(time / (1 - time))


def _predicted(
    latent: torch.Tensor,
    picture: torch.Tensor,
    last: tuple[float, torch.Tensor] | None,
    time: float,
    following: float,
) -> torch.Tensor:
    """A step of order 2 with the picture seen at ``time`` and the one of the step before, ``last``, with its time."""
    seen = picture
    if last is not None and following < 1:
        before, earlier = last
        ratio = (_lambda(following) - _lambda(time)) / (_lambda(time) - _lambda(before))  # 0 after the start
        seen = picture + ratio / 2 * (picture - earlier)
    return _towards(latent, seen, time, following)


def _towards(latent: torch.Tensor, picture: torch.Tensor, time: float, following: float) -> torch.Tensor:
    """The exact solution at ``following`` where ``picture`` is seen all the while."""
    kept = (1 - following) / (1 - time)
    return kept * latent + (following - time * kept) * picture


MULTISTEP: dict[str, Callable[[], Multistep]] = {"ab2": AdamsBashforth2, "dpmpp_2m": DPMSolver2M, "unipc_2": UniPC2}


def integrate(
    velocity: Callable[[float, torch.Tensor], torch.Tensor],
    latent: torch.Tensor,
    times: Sequence[float],
    solver: Multistep,
) -> torch.Tensor:
    """Solve over a grid of times, with one call for each interval.

    Returns:
        The latent at the last of ``times``.
    """
    for time, following in pairwise(times):
        latent = solver.step(time, following, latent, velocity(time, latent))
    return latent

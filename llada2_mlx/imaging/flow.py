"""Flow matching: a velocity becomes a latent. Times, samplers, solvers and guidance; no network is known here.

Time runs from 0 (noise) to 1 (picture); the velocity is ``dx/dt``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Protocol

import torch

from ..errors import LLaDA2Error, RequestError
from ..progress import OnStep, Progress
from .device import has_float64
from .solvers import MULTISTEP, integrate

# Where in an interval a solver calls the network. torchdiffeq's; its Adams methods assume even steps, and the time grid is
# shifted: they diverge. Then our own.
FIXED_SOLVERS: dict[str, tuple[float, ...]] = {
    "euler": (0,),
    "midpoint": (0, 1 / 2),
    "heun2": (0, 1),
    "heun3": (0, 1 / 3, 2 / 3),
    "rk4": (0, 1 / 3, 2 / 3, 1),
    **dict.fromkeys(MULTISTEP, (0,)),
}
ADAPTIVE_SOLVERS = ("dopri5", "bosh3", "adaptive_heun")
SOLVERS = (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS)


class Sampler(Enum):
    """How noise becomes a latent; the value is what a person calls it."""

    ODE = "ODE"  # the probability-flow ODE over a shifted time grid
    RENOISE = "as published"  # fresh noise at every step, the way the turbo decoder was published


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Args:
        steps: points of the time grid. The ODE has one interval fewer, so Euler calls the network ``steps - 1`` times.
        guidance: 0 for none (one network call instead of two), 1 as published for the full decoder.
        seed: of the noise, in 0 .. 2^64 - 1; drawn on the CPU, so that one seed gives one picture on every device.
        upscale: side of the picture over that of the tokenizer's, 1 or 2.
        sampler: the ODE, or the way the turbo decoder was published.
        solver: one of ``SOLVERS``, for the ODE.
        time_shift: how far the ODE's time grid is moved towards the noise; 1 leaves it even.
        guidance_start, guidance_end: the times, 0 (noise) to 1 (picture), from which on and before which there is guidance;
            outside of them the negative branch does not run (Kynkaanniemi et al., arXiv:2404.07724).
        cache_threshold: 0 to 1, of ``step_cache.StepCache``; 0 for no step cache.

    Raises:
        RequestError: a value is out of range.
    """

    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    upscale: int = 2
    sampler: Sampler = Sampler.ODE
    solver: str = "euler"
    time_shift: float = 6.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    cache_threshold: float = 0.0

    def __post_init__(self) -> None:
        least = 2 if self.sampler is Sampler.ODE else 1
        if not least <= self.steps <= 1000:
            raise RequestError(f"steps is {self.steps}; it has to be from {least} to 1000.")
        if not 0 <= self.guidance <= 100:
            raise RequestError(f"guidance is {self.guidance}; it has to be from 0 (none) to 100.")
        if self.upscale not in (1, 2):
            raise RequestError(f"upscale is {self.upscale}; it has to be 1 or 2.")
        if self.solver not in SOLVERS:
            raise RequestError(f"There is no solver {self.solver!r}; there are {', '.join(SOLVERS)}.")
        if not 1 <= self.time_shift <= 100:
            raise RequestError(f"time shift is {self.time_shift}; it has to be from 1 to 100.")
        if not 0 <= self.guidance_start < self.guidance_end <= 1:
            raise RequestError(
                f"Guidance is to start at {self.guidance_start} and to end at {self.guidance_end}; both have to be from 0 (noise) "
                "to 1 (picture), and the start before the end. Set guidance to 0 for none."
            )
        if not 0 <= self.cache_threshold <= 1:
            raise RequestError(f"The cache threshold is {self.cache_threshold}; it has to be from 0 (off) to 1.")
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"The seed is {self.seed}; it has to be from 0 to {2**64 - 1}.")

    @property
    def calls(self) -> int | None:
        """How often the velocity is computed; None where the solver decides that itself."""
        if self.sampler is Sampler.RENOISE:
            return self.steps
        return (self.steps - 1) * len(FIXED_SOLVERS[self.solver]) if self.solver in FIXED_SOLVERS else None

    @property
    def network_calls(self) -> int | None:
        """How often the network runs in both branches, a step cache aside; None as for ``calls``."""
        if self.calls is None or not self.guidance:
            return self.calls
        if self.sampler is Sampler.RENOISE:
            times = torch.linspace(0, 1, self.steps + 1)[:-1].tolist()
        else:
            grid = ode_times(self.steps, self.time_shift, torch.device("cpu")).tolist()
            times = [a + part * (b - a) for a, b in pairwise(grid) for part in FIXED_SOLVERS[self.solver]]
        return len(times) + sum(map(self.guides, times))

    def guides(self, time: float) -> bool:
        """Whether there is guidance at a time."""
        return self.guidance_start <= time and (time < self.guidance_end or self.guidance_end == 1)


CUSTOM = "custom"
# Ways of the full decoder from noise to picture, from the most network calls to the fewest. ``python tests/benchmarks/calls.py``
# measures them; the table is in docs/performance.md.
PRESETS = {
    "as published": DecodeOptions(),
    "balanced": DecodeOptions(steps=25, solver="ab2", time_shift=1.0),
    "fast": DecodeOptions(steps=13, solver="ab2", time_shift=1.0),
}


def with_preset(options: DecodeOptions, name: str) -> DecodeOptions:
    """The options with all that a preset decides: steps, sampler, solver, time shift and the interval of guidance.

    Guidance, seed, upscale and the step cache stay as they are.

    Args:
        name: of ``PRESETS``, or ``CUSTOM``, which decides nothing.

    Raises:
        RequestError: there is no such preset.
    """
    if name == CUSTOM:
        return options
    if name not in PRESETS:
        raise RequestError(f"There is no preset {name!r}; there are {', '.join((CUSTOM, *PRESETS))}.")
    kept = ("guidance", "seed", "upscale", "cache_threshold")
    return replace(PRESETS[name], **{field: getattr(options, field) for field in kept})


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """``p + scale (p - n)``, scaled down to the norm of ``p`` if longer. One picture, any shape."""
    guided = positive + scale * (positive - negative)
    return guided * (positive.norm() / guided.norm().clamp_min(1e-12)).clamp_max(1)


def shifted(time: torch.Tensor, shift: float) -> torch.Tensor:
    """Times in 0 .. 1, moved towards the noise."""
    return time / (time + shift - shift * time)


def ode_times(steps: int, shift: float, device: torch.device) -> torch.Tensor:
    """The ODE's time grid: ``steps`` points from 0 to 1, shifted towards the noise."""
    return shifted(torch.linspace(0, 1, steps, device=device), shift)


# Is handed the latent that a network call sees at the end of the way, float32 in the latent's shape. What it raises ends the work.
OnLatent = Callable[[torch.Tensor], None]


class Tell(Protocol):
    """Is told how many more pieces of a call are done."""

    def __call__(self, pieces: int = 1) -> None: ...


class Velocity(Protocol):
    """What a network predicts, whatever it runs in.

    ``pieces`` is of how many pieces a call tells, in all.
    """

    pieces: int

    def __call__(self, time: torch.Tensor | float, latent: torch.Tensor, tell: Tell) -> torch.Tensor:
        """The velocity at a time and a latent, float32 in the latent's shape; ``tell()`` is called within it."""
        ...


class Guided:
    """A velocity that is guided away from another; the two are computed one after the other, see ``guide``.

    Args:
        guides: whether there is guidance at a time; where there is none, the other is not computed.
    """

    def __init__(self, positive: Velocity, negative: Velocity, scale: float, guides: Callable[[float], bool]):
        self.positive, self.negative, self.scale, self.guides = positive, negative, scale, guides
        self.pieces = positive.pieces + negative.pieces

    def __call__(self, time: torch.Tensor | float, latent: torch.Tensor, tell: Tell) -> torch.Tensor:
        predicted = self.positive(time, latent, tell)
        if not self.guides(float(time)):
            tell(self.negative.pieces)
            return predicted
        return guide(predicted, self.negative(time, latent, tell), self.scale)


def combined(positive: Velocity, negative: Velocity | None, options: DecodeOptions) -> Velocity:
    """The velocity of one picture: guided as the options say.

    Args:
        negative: is not needed where ``options.guidance`` is 0.
    """
    return Guided(positive, negative, options.guidance, options.guides) if options.guidance else positive


def solve(
    velocity: Velocity,
    noise: torch.Tensor,
    options: DecodeOptions,
    generator: torch.Generator,
    on_step: OnStep,
    on_latent: OnLatent | None = None,
) -> torch.Tensor:
    """From noise to a latent, the way that ``options`` say.

    Args:
        noise: the start, float32 [channels, 1, height, width].
        generator: has drawn ``noise``, and draws what the sampler needs more.
        on_step: called several times in a network call; what it raises ends the work.
        on_latent: handed after each call what is seen of the picture.

    Raises:
        LLaDA2Error: the velocity is not finite.
    """
    calls = _Calls(velocity, options, on_step, on_latent)
    if options.sampler is Sampler.ODE:
        return _integrate(calls, noise, options)
    return _renoise(calls, noise, options.steps, generator)


class _Calls:
    """A velocity whose calls are counted, told and checked."""

    def __init__(self, velocity: Velocity, options: DecodeOptions, on_step: OnStep, on_latent: OnLatent | None = None):
        self.velocity, self.on_step, self.on_latent = velocity, on_step, on_latent
        self.calls, self.told, self.time = 0, 0, 0.0
        self.total = options.calls * velocity.pieces if options.calls else None

    def __call__(self, time: torch.Tensor | float, latent: torch.Tensor) -> torch.Tensor:
        self.time = float(time)
        result = self.velocity(time, latent, self._tell)
        self.calls += 1
        if not torch.isfinite(result).all():
            raise LLaDA2Error(
                f"The decoder gave values that are not finite (NaN or infinity) in network call {self.calls}, so there is no "
                "picture. Try the other decoder or a smaller picture; on a Mac, PyTorch 2.13 or later. If it stays, download "
                "the decoder again."
            )
        if self.on_latent is not None:
            self.on_latent(latent.to(torch.float32) + (1 - self.time) * result)
        return result

    def _tell(self, pieces: int = 1) -> None:
        self.told += pieces
        if self.total is None:  # nobody knows how many calls it will take, only how far it is
            self.on_step(Progress("decoding", round(100 * min(self.time, 1)), 100))
        else:
            self.on_step(Progress("decoding", self.told, self.total))


def _integrate(velocity: _Calls, noise: torch.Tensor, options: DecodeOptions) -> torch.Tensor:
    """Solve ``dx/dt = velocity(t, x)`` from 0 to 1."""
    times = ode_times(options.steps, options.time_shift, noise.device)
    if options.solver in MULTISTEP:
        return integrate(velocity, noise, times.tolist(), MULTISTEP[options.solver]())
    from torchdiffeq import odeint

    adaptive = options.solver in ADAPTIVE_SOLVERS
    tolerance = {"options": {"dtype": torch.float32}, "rtol": 1e-3, "atol": 1e-4} if adaptive else {}
    return odeint(velocity, noise, times, method=options.solver, **tolerance)[-1]


def _renoise(velocity: _Calls, noise: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
    """The published turbo sampler: predict the picture, then go back to the next time with fresh noise.

    The noise is drawn in float64, on the CPU; so is the arithmetic where the device has float64.
    """
    dtype = torch.float64 if has_float64(noise.device) else torch.float32
    latent, times = noise.to(dtype), torch.linspace(0, 1, steps + 1).tolist()
    for time, following in zip(times, times[1:]):
        picture = latent + (1 - time) * velocity(time, latent).to(dtype)
        fresh = torch.randn(noise.shape, generator=generator, dtype=torch.float64).to(dtype).to(noise.device)
        latent = following * picture + (1 - following) * fresh
    return latent

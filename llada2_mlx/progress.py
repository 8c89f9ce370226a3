"""How the library tells its caller where it is: one value, handed to one callable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a piece of work is.

    Args:
        phase: what is being done, for a person: "loading weights", "denoising", ...
        done: steps finished.
        total: steps there are at most; fewer may be needed.
        generated: while denoising, the ids generated so far (blocks begun, prompt aside), masks among them.
        in_bytes: a step is a byte.
    """

    phase: str
    done: int
    total: int
    generated: tuple[int, ...] = ()
    in_bytes: bool = False


# Called after every step, in the caller's own thread. What it raises ends the work and reaches the caller.
OnStep = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """An ``OnStep`` that does nothing."""


class Pace:
    """Says when a person is to be shown something again.

    Args:
        interval: seconds that have to pass.
        clock: gives the time in seconds.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock, self._last = interval, clock, -math.inf

    def due(self, at_once: bool = False) -> bool:
        """Whether so much time has passed since it was due before; with ``at_once`` it is in any case."""
        now = self._clock()
        if not at_once and now - self._last < self._interval:
            return False
        self._last = now
        return True


def amount(size: int) -> str:
    """A number of bytes, for a person."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"

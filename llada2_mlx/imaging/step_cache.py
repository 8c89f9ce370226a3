"""A step cache: where the first layer says that little has changed, what the other layers add is that of an earlier call.

First-block caching: what TeaCache (Liu et al., arXiv:2411.19108) measures on a network's timestep embedding is measured on
what the first layer adds. Knows no backend: PyTorch's tensors and MLX's arrays do the arithmetic that is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Features = TypeVar("Features")  # a torch.Tensor or an mx.array


class StepCache:
    """What is remembered of one branch's last whole call; one picture's, so that every branch and picture has its own.

    Args:
        threshold: over 0; how far what the first layer adds may be from what it added then, as the mean of absolute differences
            over the mean of absolute values. Above it the call is whole, and remembered.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.calls = self.skipped = 0
        self._first: Features | None = None
        self._rest: Features | None = None

    def __call__(self, before: Features, after: Features, rest: Callable[[Features], Features]) -> Features:
        """The features after all layers.

        Args:
            before, after: the first layer's input and output, of one shape and dtype.
            rest: the other layers; is called with ``after`` where the cache does not hold.

        Returns:
            ``rest(after)`` itself, or ``after`` plus what ``rest`` added in the last whole call.
        """
        if (known := self.recall(before, after)) is not None:
            return known
        result = rest(after)
        self.remember(after, result)
        return result

    def recall(self, before: Features, after: Features) -> Features | None:
        """The features after all layers where the cache holds; else None: the call is whole, and ends with ``remember``."""
        self.calls += 1
        added = self.kept(after - before)
        if self._rest is not None and self._distance(added) <= self.threshold:
            self.skipped += 1
            return after + self._rest
        self._first, self._rest = added, None  # makes room for the other layers' work
        return None

    def remember(self, after: Features, result: Features) -> None:
        """What the other layers of a whole call made of ``after``."""
        self._rest = self.kept(result - after)

    def kept(self, features: Features) -> Features:
        """What is to be remembered, as a backend has to keep it."""
        return features

    def size(self, features: Features) -> Features:
        """The mean of absolute values, a scalar."""
        return abs(features).mean()

    def _distance(self, added: Features) -> float:
        return float(self.size(added - self._first) / self.size(self._first))

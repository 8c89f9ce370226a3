"""Classifier-free guidance: several branches -> one guided hidden state.

The output head is linear, so a combination of hidden states gives the same logits as that combination of
logits, with one head product instead of one a branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..errors import RequestError
from .network import LLaDA2


@dataclass(frozen=True)
class Guidance:
    """A linear combination of branches, and the rescale.

    Args:
        coefficients: one for each branch, the conditional branch first; they sum to 1.
        rescale: 0 leaves the guided logits as they are, 1 gives them the conditional branch's standard
            deviation over the whole vocabulary, per position; values between mix the two.
    """

    coefficients: tuple[float, ...] = (1.0,)
    rescale: float = 0.0

    @classmethod
    def simple(cls, scale: float, rescale: float = 0.7) -> Guidance:
        """``u + scale (c - u)`` for branches c (conditional), u (unconditional). Ho & Salimans, arXiv:2207.12598."""
        _check(scale, "guidance scale")
        _check(rescale, "rescale", 1)
        return cls((scale, 1 - scale), rescale)

    @classmethod
    def editing(cls, text_scale: float, image_scale: float, rescale: float = 0.7) -> Guidance:
        """``t + text_scale (c - t) + image_scale (t - i)`` for branches c (full), t (no text), i (no image)."""
        _check(text_scale, "text guidance")
        _check(image_scale, "image guidance")
        _check(rescale, "rescale", 1)
        return cls((text_scale, 1 - text_scale + image_scale, -image_scale), rescale)

    def select(self, branches: tuple[list[int], ...]) -> tuple[Guidance, tuple[list[int], ...]]:
        """Guidance and branches without those that change nothing; the conditional branch always stays."""
        if len(branches) != len(self.coefficients):
            raise ValueError(f"{len(branches)} branches do not fit the {len(self.coefficients)} of the guidance")
        kept = [i for i, coefficient in enumerate(self.coefficients) if i == 0 or coefficient != 0]
        rescale = self.rescale if len(kept) > 1 else 0.0  # what is conditional already has its own deviation
        return Guidance(tuple(self.coefficients[i] for i in kept), rescale), tuple(branches[i] for i in kept)

    def combine(self, model: LLaDA2, hidden: mx.array) -> mx.array:
        """Hidden states [..., branches, length, hidden] -> guided ones [..., length, hidden], float32 if guided.

        The rescale multiplies a position's logits by a positive number, so it can be applied to the hidden
        state: it never changes the best candidate, only its probability and with it the order of acceptance.
        Lin et al., arXiv:2305.08891.
        """
        if len(self.coefficients) == 1:
            return hidden[..., 0, :, :]
        hidden = hidden.astype(mx.float32)
        guided = (hidden * mx.array(self.coefficients)[:, None, None]).sum(axis=-3)
        if not self.rescale:
            return guided
        ratio = model.logit_std(hidden[..., 0, :, :]) / (model.logit_std(guided) + 1e-6)
        return guided * (self.rescale * ratio + (1 - self.rescale))


def _check(value: float, what: str, most: float = 100) -> None:
    if not 0 <= value <= most:  # false for NaN, too
        raise RequestError(f"The {what} is {value}; it has to be from 0 to {most}.")

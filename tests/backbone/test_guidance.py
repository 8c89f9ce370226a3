"""Guided hidden states and guided logits are the same thing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.errors import RequestError
from llada2_mlx.progress import Progress


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance.simple(2.0, 0.0),
        Guidance.simple(4.0),
        Guidance.simple(0.0),
        Guidance.editing(4.0, 1.2),
        Guidance.editing(3.0, 2.0, 1.0),
    ],
)
def test_hidden_states_and_logits_are_guided_alike(backbone: Backbone, guidance: Guidance) -> None:
    def job(network):
        yield Progress("computing", 1, 1)
        hidden = mx.random.normal((len(guidance.coefficients), 5, network.config.hidden_size), key=mx.random.key(4))
        guided = network.logits(guidance.combine(network, hidden))
        return np.array(guided), np.array(network.logits(hidden)), np.array(network.logit_std(hidden[0]))

    guided, logits, std = backbone.run(job)
    expected = np.tensordot(guidance.coefficients, logits, 1)
    deviation = logits[0].std(-1, ddof=1, keepdims=True)
    assert std == pytest.approx(deviation, rel=1e-4)
    rescaled = expected * deviation / (expected.std(-1, ddof=1, keepdims=True) + 1e-6)
    expected = guidance.rescale * rescaled + (1 - guidance.rescale) * expected
    assert guided == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())


def test_the_published_formulas() -> None:
    c, u, t, i = 0.3, -1.2, 2.0, 0.7
    assert np.dot(Guidance.simple(2.5).coefficients, (c, u)) == pytest.approx(u + 2.5 * (c - u))
    assert np.dot(Guidance.editing(4.0, 1.5).coefficients, (c, t, i)) == pytest.approx(
        t + 4.0 * (c - t) + 1.5 * (t - i)
    )


def test_branches_that_change_nothing_are_left_out() -> None:
    branches = ([1], [2], [3])
    guidance, kept = Guidance.editing(4.0, 0.0).select(branches)
    assert (guidance.coefficients, kept) == ((4.0, -3.0), ([1], [2]))
    assert Guidance.simple(1.0).select(branches[:2]) == (Guidance((1.0,), 0.0), ([1],))
    # at scale 0 the conditional branch still gives the deviation to rescale to
    assert Guidance.simple(0.0).select(branches[:2])[1] == ([1], [2])


@pytest.mark.parametrize(
    "make", [lambda: Guidance.simple(-1), lambda: Guidance.simple(2, 1.5), lambda: Guidance.editing(float("nan"), 0)]
)
def test_scales_out_of_range_are_refused(make) -> None:
    with pytest.raises(RequestError, match="has to be"):
        make()

"""A network that writes what a script says: weights that nobody has to train."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import PREFILL, LLaDA2


class ScriptedNetwork:
    """At each position it is sure of the script's id there, whatever stands before; behind the script, of the last.

    Its hidden states are its logits. Guidance leaves them as they are, if it does not rescale.

    Args:
        script: ids from position 0 on.
    """

    def __init__(self, backbone: Backbone, script: Sequence[int]):
        self.config, self.model, self.script = backbone.config, SimpleNamespace(layers=[]), list(script)
        self.prefill = PREFILL

    def __call__(self, ids: mx.array, start: int = 0, mask=None, cache=None) -> mx.array:
        batch, length = ids.shape
        here = np.minimum(np.arange(start, start + length), len(self.script) - 1)
        sure = np.full((batch, length, self.config.vocab_size), -10.0, np.float32)
        sure[:, np.arange(length), np.array(self.script)[here]] = 10.0
        return mx.array(sure)

    def logits(self, hidden: mx.array, rows: slice = slice(None)) -> mx.array:
        return hidden[..., rows]


class SteeredNetwork:
    """A network that is its own but for the texts: there it is sure of the script's id, as ``ScriptedNetwork`` is.

    Wherever text ids can be chosen, a text is written. So it has to draw with ids from the image codes on alone.
    """

    def __init__(self, network: LLaDA2, script: Sequence[int]):
        self.network, self.script, self.end = network, np.array(script), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, ids: mx.array, start: int = 0, mask=None, cache=None) -> mx.array:
        self.end = start + ids.shape[1]
        return self.network(ids, start, mask, cache)

    def logits(self, hidden: mx.array, rows: slice = slice(None)) -> mx.array:
        logits = self.network.logits(hidden, rows)
        if rows.start:
            return logits
        here = np.minimum(np.arange(self.end - hidden.shape[-2], self.end), len(self.script) - 1)
        wanted = mx.array(self.script[here])[:, None] == mx.arange(logits.shape[-1])
        return mx.broadcast_to(mx.where(wanted, 100.0, -100.0), logits.shape)


def scripted(backbone: Backbone, prompt: Sequence[int], script: Sequence[int], patch: pytest.MonkeyPatch) -> None:
    """Let ``backbone`` write ``script`` after ``prompt``."""
    network = ScriptedNetwork(backbone, [*prompt, *script])
    patch.setattr(backbone, "load", lambda on_step=None: network)

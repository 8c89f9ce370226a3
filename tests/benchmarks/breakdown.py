"""Where the time of a generation goes, part by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from llada2_mlx.backbone import denoising
from llada2_mlx.backbone.acceptance import ThresholdAcceptance
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import MLP, Attention, LLaDA2, Router

from .measure import WHEN_NEEDED, Request, ours

# Label, and the function whose time it is; none of them calls another.
_PARTS = {
    "attention": (Attention, "__call__"),
    "router": (Router, "__call__"),
    "routed experts": (SwitchGLU, "__call__"),
    "dense and shared MLP": (MLP, "__call__"),
    "guidance and rescale": (Guidance, "combine"),
    "output head": (LLaDA2, "logits"),
    "candidates": (denoising, "draw_candidates"),
    "acceptance": (ThresholdAcceptance, "__call__"),
}


def parts(backbone: Backbone, request: Request) -> dict[str, float]:
    """Seconds in each part of a generation, evaluated part by part, so that they are more than the whole takes.

    "the rest" is what no part has: norms, sums, the embedding, the masks, making the graph and waiting for it.
    """
    backbone.run(ours(request.shortened()))
    spent: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        # what is built ahead would be computed here, needed or not
        stack.enter_context(WHEN_NEEDED)
        for label, (owner, name) in _PARTS.items():
            stack.enter_context(_timed(owner, name, label, spent))
        whole = backbone.run(ours(request)).report.seconds
    return {**spent, "the rest": whole - sum(spent.values())}


@contextmanager
def _timed(owner: Any, name: str, label: str, spent: dict[str, float]) -> Iterator[None]:
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        mx.eval(_arrays((args, options)))  # what comes before is not this part's
        began = time.perf_counter()
        result = function(*args, **options)
        mx.eval(result)
        spent[label] += time.perf_counter() - began
        return result

    with mock.patch.object(owner, name, timed):
        yield


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]

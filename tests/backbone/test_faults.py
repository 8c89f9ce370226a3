"""Faults that only show where nobody looks: each test here fails if one line of the backbone is changed."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from synthetic import tiny

from llada2_mlx.backbone import precision, weights
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.convert import convert
from llada2_mlx.backbone.denoising import Draft, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import LLaDA2Error
from llada2_mlx.progress import Progress
from llada2_mlx.worker import MLXWorker


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 200, count).tolist()


# --- a quantised network is a float network with the weights that its bits stand for --------------------------------


def dequantised(network: LLaDA2) -> LLaDA2:
    """A float32 network with the values of a quantised one."""
    plain = LLaDA2(network.config)
    found = {}
    for path, module in tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module):
        own = dict(tree_flatten(module.parameters()))
        if "scales" in own:
            bits = {"group_size": module.group_size, "bits": module.bits}
            own = {"weight": mx.dequantize(own["weight"], own["scales"], own["biases"], **bits)}
        found |= {f"{path}.{name}": value.astype(mx.float32) for name, value in own.items()}
    plain.load_weights(list(found.items()))
    return plain


@pytest.fixture(scope="module", params=[4, 6, 8])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    copy = tmp_path_factory.mktemp("copies") / f"{request.param}bit"
    MLXWorker().drive(convert(Checkpoint(tiny()), copy, request.param))
    backbone = Backbone(Checkpoint(copy))
    assert backbone.precision == f"{request.param}bit"
    return backbone


def both(backbone: Backbone, compute) -> list:
    """``compute(network)`` of the quantised network and of the float one."""

    def job(network):
        yield Progress("computing", 1, 1)
        return [compute(network), compute(dequantised(network))]

    return backbone.run(job)


def test_logits_of_a_quantised_head(quantised: Backbone) -> None:
    states = np.random.default_rng(1).normal(size=(2, 5, quantised.config.hidden_size)).astype(np.float32)
    for rows in (slice(None), slice(quantised.config.image_token_offset, None), slice(20, 30)):
        few, whole = both(quantised, lambda network, rows=rows: np.array(network.logits(mx.array(states), rows)))
        assert few.shape == whole.shape
        assert few == pytest.approx(whole, abs=1e-4 * float(np.abs(whole).max()))


def test_the_covariance_of_a_quantised_head(quantised: Backbone) -> None:
    few, whole = both(quantised, lambda network: np.array(network.head_covariance))
    assert few == pytest.approx(whole, abs=1e-5 * float(np.abs(whole).max()))
    states = np.random.default_rng(2).normal(size=(5, quantised.config.hidden_size)).astype(np.float32)
    std, expected = both(quantised, lambda network: np.array(network.logit_std(mx.array(states))))
    assert std == pytest.approx(expected, rel=1e-4)
    logits, _ = both(quantised, lambda network: np.array(network.logits(mx.array(states))))
    assert std[:, 0] == pytest.approx(logits.std(-1, ddof=1), rel=1e-4)


@pytest.mark.parametrize("kind", ["simple", "editing", "text"])
def test_the_tokens_of_a_quantised_copy(quantised: Backbone, kind: str) -> None:
    tokens, offset = quantised.tokens, quantised.config.image_token_offset
    vocabulary = Vocabulary(tokens.mask, first=0 if kind == "text" else offset)
    guidance = {"simple": Guidance.simple(2.0), "editing": Guidance.editing(4.0, 1.2), "text": Guidance()}[kind]
    branches = (ids(45, 1), ids(30, 2), ids(20, 3))[: len(guidance.coefficients)]
    draft = Draft.blank(branches, 64, tokens.mask)

    def job(network):
        few = yield from generate(network, draft, vocabulary, Sampling(steps=4), guidance)
        whole = yield from generate(dequantised(network), draft, vocabulary, Sampling(steps=4), guidance)
        return few, whole

    few, whole = quantised.run(job)
    assert few.ids == whole.ids and few.report.steps == whole.report.steps


def test_a_quantised_head_makes_no_ties(quantised: Backbone) -> None:
    """Hidden states of a network in bf16 meet the head in float32: in bf16 some of the best rows would be equal."""

    def job(network):
        yield Progress("computing", 1, 1)
        head = network.lm_head
        head.scales, head.biases = head.scales.astype(mx.bfloat16), head.biases.astype(mx.bfloat16)
        hidden = mx.random.normal((200, network.config.hidden_size), key=mx.random.key(3)).astype(mx.bfloat16)
        best = mx.topk(network.logits(hidden), 2, axis=-1)
        return np.array(best)

    best = Backbone(quantised.checkpoint).run(job)
    assert (best[:, 0] != best[:, 1]).all()


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_network_that_gives_nothing_finite_is_said_at_the_first_step() -> None:
    backbone, steps = Backbone(Checkpoint(tiny()), "float32"), []
    draft = Draft.blank((ids(40),), 64, backbone.tokens.mask)
    vocabulary = Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)

    def job(network):
        network.model.norm.weight = network.model.norm.weight * float("nan")
        return (yield from generate(network, draft, vocabulary))

    with pytest.raises(LLaDA2Error, match="not finite"):
        backbone.run(job, on_step=steps.append)
    assert not [step for step in steps if step.phase == "denoising"]


def test_a_prompt_is_read_in_pieces_and_each_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(Checkpoint(tiny()), "float32")
    lengths, evaluated = [], []
    call, evaluate = LLaDA2.__call__, mx.async_eval
    monkeypatch.setattr(backbone.load(), "prefill", 64)
    monkeypatch.setattr(
        LLaDA2, "__call__", lambda self, tokens, *rest: (lengths.append(tokens.shape[1]), call(self, tokens, *rest))[1]
    )
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (evaluated.append(_count(arrays)), evaluate(*arrays)))
    draft = Draft.blank((ids(300),), 32, backbone.tokens.mask)
    vocabulary = Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)
    report = backbone.run(generate, draft, vocabulary, Sampling(steps=1)).report
    # 288 positions before the block in which the prompt ends: four pieces, the rest goes along with the first step
    assert lengths[:5] == [64] * 5 and sum(lengths) == report.positions
    # and then each step's four arrays
    assert evaluated == [2 * backbone.config.num_hidden_layers] * 4 + [4] * report.blocks


def _count(value) -> int:
    return sum(map(_count, value)) if isinstance(value, (list, tuple)) else 1


@pytest.mark.parametrize(("cpu", "expected"), [(False, mx.bfloat16), (True, mx.float32)])
def test_experts_have_the_networks_type_on_metal(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, expected: mx.Dtype
) -> None:
    for module in (precision, weights):
        monkeypatch.setattr(module, "on_cpu", lambda: cpu)
    types = MLXWorker().drive(_types(Checkpoint(tiny())))
    experts = {kind for name, kind in types.items() if ".switch_mlp." in name}
    routers = {kind for name, kind in types.items() if precision.is_router(name)}
    rest = {kind for name, kind in types.items() if ".switch_mlp." not in name and not precision.is_router(name)}
    assert (experts, routers, rest) == ({expected}, {mx.float32}, {mx.bfloat16})
    size = precision.memory_bytes(Checkpoint(tiny()).config, mx.bfloat16)
    network = LLaDA2(Checkpoint(tiny()).config)
    counts = {name: value.size for name, value in tree_flatten(network.parameters())}
    assert size == sum(counts[name] * kind.size for name, kind in types.items())


def _types(checkpoint: Checkpoint):
    network = yield from weights.load_backbone(checkpoint, mx.bfloat16)
    return {name: value.dtype for name, value in tree_flatten(network.parameters())}

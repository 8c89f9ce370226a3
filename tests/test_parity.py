"""Parity with what the model's published code computes. Runs any golden directory: ``--golden DIR``.

Tokens, grids and sizes are equal; float tensors agree within 1e-4 relative.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from llada2_mlx import prompts, tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Draft, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.sprint import Remasking, Sprint
from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging.decoder_mlx import MLXDecoder
from llada2_mlx.imaging.flow import DecodeOptions, Sampler
from llada2_mlx.imaging.prepare import Purpose, fit
from llada2_mlx.imaging.tokenizer import ImageTokenizer
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.imaging.vae import VAE
from llada2_mlx.progress import Progress
from llada2_mlx.vq import VQGrid

PREPARATIONS = {
    "understand": Purpose.UNDERSTAND,
    "understand_multi": Purpose.UNDERSTAND_SEVERAL,
    "edit": Purpose.EDIT_PUBLISHED,
}
REMASKING = {
    "low_confidence": Remasking.LOW_CONFIDENCE,
    "top_k_margin": Remasking.TOP_K_MARGIN,
    "neg_entropy": Remasking.NEG_ENTROPY,
    "random": Remasking.RANDOM,
}
KINDS = {"text", "image", "generate_image", "understand_image", "edit_image"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the golden directory, named after it."""
    expected = metafunc.config.getoption("--golden") / "expected"
    read = lambda name: json.loads((expected / name).read_text())
    if "generation_case" in metafunc.fixturenames:
        content = read("generation.json")
        assert {case["kind"] for case in content["cases"]} <= KINDS, "a kind of case that no test knows"
        cases = [case for case in content["cases"] if case["kind"] == metafunc.function.__name__.removeprefix("test_")]
        values = [({**content["defaults"][case["kind"]], **case["params"]}, case) for case in cases]
        params = [pytest.param(*value, id=case["name"]) for value, case in zip(values, cases)]
        metafunc.parametrize(("params", "generation_case"), params)
    if "encode_case" in metafunc.fixturenames:
        cases = [(case["image"], way, case[way]) for case in read("encode.json") for way in PREPARATIONS if way in case]
        metafunc.parametrize("encode_case", cases, ids=[f"{Path(image).stem}-{way}" for image, way, _ in cases])
    if "decode_case" in metafunc.fixturenames:
        cases = read("decode.json")
        metafunc.parametrize("decode_case", cases, ids=[f"{case['decoder']}-{case['index']}" for case in cases])


def close(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Within 1e-4 of the expected tensor's own norm."""
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def ids(golden: Path) -> dict:
    content = json.loads((golden / "expected/generation.json").read_text())
    return {"mask": content["mask_id"], "end": content["eos_id"], "special": content["special_ids"]}


@pytest.fixture(scope="module")
def forward(golden: Path) -> dict[str, np.ndarray]:
    return load_file(golden / "expected/forward.safetensors")


@pytest.fixture(scope="module")
def latents(golden: Path) -> dict[str, np.ndarray]:
    return load_file(golden / "expected/decode.safetensors")


@pytest.fixture(scope="module")
def image_tokenizer(checkpoint: Checkpoint) -> ImageTokenizer:
    return ImageTokenizer(checkpoint, torch.device("cpu"))


def compute(backbone: Backbone, function) -> list[np.ndarray]:
    """What ``function(network)`` gives, as numpy arrays; it runs on the backbone's own thread."""

    def job(network):
        yield Progress("computing", 1, 1)
        return [np.array(array) for array in function(network)]

    return backbone.run(job)


def test_special_ids(backbone: Backbone, ids: dict) -> None:
    tokens = backbone.tokens
    assert (tokens.mask, tokens.end) == (ids["mask"], ids["end"])
    assert all(tokens.encode(token) == [number] for token, number in ids["special"].items())


def test_forward(backbone: Backbone, forward: dict) -> None:
    def run(network):
        mask = mx.array(forward["forward.block_mask"].astype(bool))
        hidden = network(mx.array(forward["forward.input_ids"]), mask=mask)
        return hidden, network.logits(hidden)

    hidden, logits = compute(backbone, run)
    assert close(hidden, forward["forward.last_hidden_state"])
    assert close(logits, forward["forward.logits"])


def test_gate(backbone: Backbone, forward: dict) -> None:
    layer, tensors = moe_layer(forward)
    width = tensors["gate_in"].shape[-1]
    run = lambda network: network.model.layers[layer].mlp.gate(mx.array(tensors["gate_in"].reshape(-1, width)))
    experts, weights = compute(backbone, run)
    order, expected_order = (
        np.argsort(experts, -1),
        np.argsort(tensors["gate_idx"], -1),
    )  # the order within a row is free
    assert (np.take_along_axis(experts, order, -1) == np.take_along_axis(tensors["gate_idx"], expected_order, -1)).all()
    assert close(np.take_along_axis(weights, order, -1), np.take_along_axis(tensors["gate_w"], expected_order, -1))


def test_moe_block(backbone: Backbone, forward: dict) -> None:
    layer, tensors = moe_layer(forward)
    (out,) = compute(backbone, lambda network: [network.model.layers[layer].mlp(mx.array(tensors["moe_in"]))])
    assert close(out, tensors["moe_out"])


def moe_layer(forward: dict[str, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
    """The layer whose gate and block the fixtures hold, and its tensors: ``layer1.gate_in`` and so on."""
    prefix = min(name.partition(".")[0] for name in forward if name.endswith(".gate_in"))
    return int(prefix.removeprefix("layer")), {
        name.partition(".")[2]: tensor for name, tensor in forward.items() if name.startswith(prefix)
    }


def sampling(params: dict) -> Sampling:
    names = ("block_length", "steps", "threshold", "temperature")
    return Sampling(**{name: params[name] for name in names if name in params})


def sprint(params: dict) -> Sprint | None:
    """SPRINT's options where the case uses it; the published names are in the golden directory's defaults."""
    if not params.get("use_sprint"):
        return None
    ours = {
        "keep_ratio": "keep_ratio",
        "cache_warmup_steps": "warm_up",
        "confidence_alpha": "alpha",
        "text_keep_ratio": "text_keep_ratio",
        "image_keep_ratio": "image_keep_ratio",
    }
    options = {ours[name]: params[name] for name in ours if params.get(name) is not None}
    return Sprint(**options, remasking=REMASKING[params.get("remasking", "low_confidence")])


def test_text(backbone: Backbone, ids: dict, params: dict, generation_case: dict) -> None:
    prompt = generation_case["prompt_ids"]
    vocabulary = Vocabulary(ids["mask"], ends=frozenset({params["eos_id"]}))
    done = backbone.run(
        generate,
        Draft.blank((prompt,), params["gen_length"], ids["mask"]),
        vocabulary,
        sampling(params),
        sprint=sprint(params),
    )
    assert prompt + done.ids == generation_case["expected"]["output_ids"]


def test_image(backbone: Backbone, ids: dict, params: dict, generation_case: dict) -> None:
    if params["mode"] == "editing":
        names = ["prompt_ids", "uncond_text", "uncond_img"]
        guidance = Guidance.editing(params["cfg_text_scale"], params["cfg_image_scale"], params["cfg_rescale"])
    elif generation_case.get("uncond_ids") is not None:
        names = ["prompt_ids", "uncond_ids"]
        guidance = Guidance.simple(params["cfg_scale"], params["cfg_rescale"])
    else:
        names, guidance = ["prompt_ids"], Guidance()
    vocabulary = Vocabulary(ids["mask"], first=backbone.config.image_token_offset)
    branches = tuple(generation_case[name] for name in names)
    done = backbone.run(
        generate,
        Draft.blank(branches, params["gen_length"], ids["mask"]),
        vocabulary,
        sampling(params),
        guidance,
        sprint=sprint(params),
    )
    assert generation_case["prompt_ids"] + done.ids == generation_case["expected"]["output_ids"]


def assert_prompts(request: prompts.Prompt, call: dict, *names: str) -> None:
    """The branches are those that the published code was called with, where it was called with one."""
    for branch, name in zip(request.branches, names, strict=True):
        assert call.get(name) in (None, branch)


def test_generate_image(backbone: Backbone, params: dict, generation_case: dict) -> None:
    expected, (*first, call) = generation_case["expected"]["result"], generation_case["expected"]["calls"]
    make = prompts.thinking if first else prompts.text_to_image
    request = make(backbone.tokens, generation_case["prompt"], expected["h"], expected["w"])
    if first:
        assert_prompts(request, {**call, "input_ids": first[0]["input_ids"]}, "input_ids", "uncond_ids")
    else:
        assert_prompts(request, call, "input_ids", "uncond_ids")
    drawing = tasks.text_to_vq(
        backbone,
        generation_case["prompt"],
        params["image_w"],
        params["image_h"],
        params["cfg_scale"],
        params["cfg_rescale"],
        sampling(params),
        thinking=tasks.Thinking(params["thinking_steps"], params["thinking_gen_length"]) if first else None,
        sprint=sprint(params),
    )
    assert drawing.grid == VQGrid.from_list(
        expected["token_ids"], expected["h"], expected["w"], backbone.config.codebook_size
    )
    assert drawing.reasoning == expected.get("thinking", "")


def source_grid(backbone: Backbone, case: dict) -> VQGrid:
    codes = [token - backbone.config.image_token_offset for token in case["image_tokens"]]
    return VQGrid.from_list(codes, case["image_h"], case["image_w"], backbone.config.codebook_size)


def test_understand_image(backbone: Backbone, params: dict, generation_case: dict) -> None:
    (call,) = generation_case["expected"]["calls"]
    grid, question, tokens = source_grid(backbone, generation_case), generation_case["question"], backbone.tokens
    assert prompts.understand(tokens, grid, question).branches == (call["input_ids"],)
    answer = tasks.understand(
        backbone,
        grid,
        question,
        params["gen_length"],
        sampling(params),
        sprint=sprint(params),
    )
    assert call["input_ids"] + answer.ids == call["output_ids"]
    # the published function decodes question and answer together
    assert tokens.decode(tokens.encode(question) + answer.ids) == generation_case["expected"]["result"]["text"]
    assert answer.text == tokens.decode(answer.ids)


def test_edit_image(backbone: Backbone, params: dict, generation_case: dict) -> None:
    expected, (call,) = generation_case["expected"]["result"], generation_case["expected"]["calls"]
    grid = source_grid(backbone, generation_case)
    request = prompts.edit(backbone.tokens, grid, generation_case["instruction"])
    assert_prompts(request, call, "input_ids", "uncond_text", "uncond_img")
    drawing = tasks.edit(
        backbone,
        grid,
        generation_case["instruction"],
        params["cfg_text_scale"],
        params["cfg_image_scale"],
        params["cfg_rescale"],
        sampling(params),
    )
    assert drawing.grid == VQGrid.from_list(
        expected["token_ids"], expected["h"], expected["w"], backbone.config.codebook_size
    )


def test_encode(golden: Path, image_tokenizer: ImageTokenizer, encode_case: tuple) -> None:
    name, way, expected = encode_case
    with Image.open(golden / "expected" / name) as image:
        prepared = fit(image, PREPARATIONS[way])
    assert list(prepared.size) == expected["size"]
    (grid,) = image_tokenizer.encode_prepared([prepared])
    assert [1, grid.height, grid.width] == expected["grid"]
    assert grid.to_list() == expected["token_ids"]


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_decode(checkpoint: Checkpoint, latents: dict, decode_case: dict, engine: str) -> None:
    case, cpu = decode_case, torch.device("cpu")
    part = Part.DECODER_TURBO if case["decoder"] == "decoder-turbo" else Part.DECODER
    decoder = MLXDecoder(checkpoint, part) if engine == "mlx" else Decoder(checkpoint, part, cpu)
    grid = VQGrid.from_list(case["token_ids"], case["h"], case["w"], decoder.codebook_size)
    sampler = Sampler.RENOISE if case["renoise"] else Sampler.ODE
    options = DecodeOptions(
        case["steps"],
        case["guidance"],
        case["seed"],
        case["resolution_multiplier"],
        sampler,
        time_shift=case.get("time_shift", 6.0),
    )
    calls = []
    latent = decoder.sample([grid], options, calls.append)
    # a call tells of each layer that sees the latent, in each branch
    layers = decoder.velocity(decoder.features(grid)).pieces * (2 if case["guidance"] else 1)
    assert len(calls) == case["model_calls"] * layers
    assert close(decoder.features(grid).numpy(), latents[f"{case['index']}.features"])
    assert close(latent.numpy(), latents[f"{case['index']}.latents"])
    if f"{case['index']}.pixels" in latents:
        pixels = VAE(checkpoint, cpu).decode(latent)
        assert close(pixels.permute(0, 3, 1, 2).numpy(), latents[f"{case['index']}.pixels"])

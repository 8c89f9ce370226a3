"""ZImageDecode's ways from noise to picture, inside a real ComfyUI: what the graph says is what the library does."""

from __future__ import annotations

import re
from zlib import crc32

import numpy as np
import pytest
from client import Comfy, failed, ran, told
from PIL import Image

from llada2_mlx.checkpoint.codebook import origin
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.imaging.flow import PRESETS, DecodeOptions, with_preset
from llada2_mlx.imaging.pixels import to_images
from llada2_mlx.shapes.studio import Studio
from llada2_mlx.vq import VQGrid

GRID = VQGrid(np.random.default_rng(5).integers(0, 2048, (8, 8)), 2048, origin(Checkpoint(BUILT_IN)))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


@pytest.fixture
def graph(comfy: Comfy, request: pytest.FixtureRequest):
    """A graph that decodes saved codes by the full decoder, in few steps, as it was saved before there were these inputs."""
    file = f"decode-{crc32(request.node.nodeid.encode()):08x}.safetensors"
    GRID.save(comfy.base / "input" / file)

    def made(**more) -> dict:
        inputs = {"vq": ["1", 0], "model": "the codes' own", "decoder": "full", "decoder.steps": 4}
        inputs |= {"decoder.solver": "euler", "guidance": 1.0, "seed": 3, "upscale": 2}
        return {
            "1": {"class_type": "LLaDA2LoadVQ", "inputs": {"file": file}},
            "2": {"class_type": "ZImageDecode", "inputs": inputs | more},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "decode"}},
        }

    return made


def picture(comfy: Comfy, prompt: dict) -> np.ndarray:
    (path,) = comfy.images(ran(comfy.run(prompt)))
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def direct(studio: Studio, options: DecodeOptions) -> np.ndarray:
    """What the library makes of the same codes."""
    return np.asarray(to_images(studio.vae.decode(studio.decoder.sample([GRID], options)))[0], dtype=int)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of pixels, 0 to 255. One way in bf16 under two versions of PyTorch is 0.4 off, another way 6 and more."""
    return float(np.abs(one - other).mean())


def test_a_graph_that_was_saved_before_gives_the_same_picture(comfy: Comfy, graph, studio: Studio) -> None:
    expected = direct(studio, DecodeOptions(4, seed=3))
    assert distance(picture(comfy, graph()), expected) < 1


def test_the_way_through_time_is_the_graphs(comfy: Comfy, graph, studio: Studio) -> None:
    way = {"time_shift": 1.5, "guidance_start": 0.1, "guidance_end": 0.5}
    expected = direct(studio, DecodeOptions(4, seed=3, solver="ab2", **way))
    assert distance(picture(comfy, graph(**{"decoder.solver": "ab2"}, **way)), expected) < 1
    for name in way:  # each of them counts
        others = {key: value for key, value in way.items() if key != name}
        assert distance(picture(comfy, graph(**{"decoder.solver": "ab2"}, **others)), expected) > 3


def test_an_interval_that_cannot_be_is_said_before_the_codes_are_drawn(comfy: Comfy, graph) -> None:
    run = comfy.run(graph(guidance_start=0.6, guidance_end=0.4))
    assert "start at 0.6 and to end at 0.4" in failed(run, "2") and "1" not in run.executed
    assert "time_shift" in comfy.refused(graph(time_shift=0.5))


def test_a_preset_wins_over_what_the_graph_says(comfy: Comfy, graph, studio: Studio) -> None:
    expected = direct(studio, with_preset(DecodeOptions(seed=3), "fast"))
    given = graph(preset="fast", time_shift=1.5, guidance_start=0.3, **{"decoder.solver": "midpoint"})
    assert distance(picture(comfy, given), expected) < 1
    (_, said) = comfy.get("/object_info/ZImageDecode")["ZImageDecode"]["input"]["optional"]["preset"]
    assert said["default"] == "custom"
    assert all(f"{name} {preset.network_calls}" in said["tooltip"] for name, preset in PRESETS.items())


def test_a_preset_for_turbo_is_refused_before_the_codes_are_drawn(comfy: Comfy, graph) -> None:
    run = comfy.run(graph(preset="fast", decoder="turbo", **{"decoder.sampler": "ODE"}))
    assert "'fast' is of the full decoder" in failed(run, "2") and "1" not in run.executed


def test_the_step_cache_is_the_graphs_and_says_what_it_saved(comfy: Comfy, graph, studio: Studio) -> None:
    options = DecodeOptions(12, seed=3, cache_threshold=0.2)
    expected, steps = direct(studio, options), {"decoder.steps": 12}
    run = ran(comfy.run(graph(cache_threshold=0.2, **steps)))
    (path,) = comfy.images(run)
    shown = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    saved, total = map(
        int, re.fullmatch(r"The step cache saved (\d+) of (\d+) network calls\.", told(run, "2")).groups()
    )
    assert total == options.network_calls == 22 and abs(saved - studio.decoder.skipped_calls) <= 2 and saved > 0
    plain = ran(comfy.run(graph(**steps)))
    assert not any("step cache" in text for _, text in plain.texts)
    (path,) = comfy.images(plain)
    assert distance(shown, expected) < distance(shown, np.asarray(Image.open(path).convert("RGB"), dtype=int))

"""The hub's model in a real ComfyUI, from a hub that is served on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import PACK, ROOT, Comfy, serve, workflow
from hub_server import Hub, serving

from llada2_mlx.checkpoint.layout import BUILT_IN, HUB_MODEL

TEXT_TO_IMAGE = {"1": {"model": HUB_MODEL}, "3": {"model": HUB_MODEL}}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """The built-in model, served as the published one."""
    with serving(BUILT_IN, HUB_MODEL) as served:
        yield served


@pytest.fixture(scope="module")
def downloading(comfyui: tuple[Path, Path], hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A ComfyUI with an empty cache that knows this hub alone."""
    base = tmp_path_factory.mktemp("downloading")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(base / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    with serve(*comfyui, base, **environment) as client:
        yield client


def test_the_hubs_model_is_fetched_part_by_part(downloading: Comfy, hub: Hub) -> None:
    # queueing does not ask the hub
    assert "smaller than min" in downloading.refused(workflow("text_to_image", **TEXT_TO_IMAGE | {"2": {"steps": 0}}))
    assert not hub.requests

    # a download can be cancelled
    hub.pause, asked = 0.05, []

    def cancel(kind: str, data: dict) -> None:
        if kind == "text" and not asked:
            asked.append(time.monotonic())
            downloading.post("/interrupt", {})

    run = downloading.run(workflow("text_to_image", **TEXT_TO_IMAGE), cancel)
    assert asked and run.interrupted and run.error["node_id"] == "1"
    assert time.monotonic() - asked[0] < 5

    # and begun again
    hub.pause = 0
    run = downloading.run(workflow("text_to_image", **TEXT_TO_IMAGE))
    assert run.error is None, run.error
    assert downloading.images(run)
    for node in ("1", "3"):
        texts = [text for name, text in run.texts if name == node]
        assert any(text.startswith("downloading: ") and " MB of " in text for text in texts), texts
    fetched = hub.fetched()
    assert {"model.safetensors", "decoder-turbo/config.json", "vae/config.json"} <= fetched
    assert not any(name.startswith(("decoder/", "image_tokenizer/image_tokenizer")) for name in fetched)

    hub.requests.clear()
    run = downloading.run(workflow("text_to_image", **TEXT_TO_IMAGE | {"2": {"seed": 5}}))
    assert run.error is None and not hub.requests


def test_few_bits_are_converted_while_they_arrive(comfyui: tuple[Path, Path], hub: Hub, tmp_path: Path) -> None:
    """A model that is not here, asked for with 4 bits: the node keeps the copy alone, under an id that ``hub.txt`` names."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / PACK).symlink_to(ROOT)
    (tmp_path / "models/llada2").mkdir(parents=True)
    (tmp_path / "models/llada2/hub.txt").write_text("# mine\nsomeone/Shapes\nno id\n")
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    hub.repo, hub.pause = "someone/Shapes", 0
    hub.requests.clear()
    try:
        with serve(*comfyui, tmp_path, **environment) as client:
            about = client.get("/object_info/LoadLLaDA2Backbone")["LoadLLaDA2Backbone"]
            told = about["input"]["required"]["model"][1]["options"]
            assert told[-2:] == [HUB_MODEL, "someone/Shapes"]
            assert "hub.txt, line 3: 'no id' is no hub id such as" in client.log()
            graph = {"1": {"model": "someone/Shapes", "precision": "4bit"}, "3": {"model": "someone/Shapes"}}
            run = client.run(workflow("text_to_image", **graph))
            assert run.error is None, run.error
            assert client.images(run)
            assert any(text.startswith("downloading: ") for name, text in run.texts if name == "1")
            (folder,) = (tmp_path / "home/hub/models--someone--Shapes/snapshots").iterdir()
            assert (folder / "mlx-4bit/config.json").exists() and not (folder / "model.safetensors").exists()
            assert hub.ranges("model.safetensors") == [0]

            hub.requests.clear()
            run = client.run(
                workflow("text_to_image", **graph | {"1": {"model": "someone/Shapes", "precision": "bf16"}})
            )
            assert run.error["node_id"] == "1" and "only as a smaller copy, 4bit" in run.error["exception_message"]
            assert not hub.requests
    finally:
        hub.repo = HUB_MODEL

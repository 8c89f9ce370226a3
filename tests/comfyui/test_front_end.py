"""What the front end asks a ComfyUI server for beside the nodes: their help pages."""

from __future__ import annotations

import re
import urllib.request

import pytest
from client import PACK, ROOT, Comfy

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def nodes_of_ours(comfy: Comfy) -> dict[str, dict]:
    """Name -> what the server says of it."""
    everything = comfy.get("/object_info")
    return {name: info for name, info in everything.items() if info["python_module"] == f"custom_nodes.{PACK}"}


def input_names(info: dict) -> list[str]:
    """The inputs of a node, in order, once each; those that belong to a choice are called ``choice.input``."""
    names: list[str] = []

    def add(inputs: dict, before: str) -> None:
        for name, (kind, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            names.append(before + name)
            for choice in options[0]["options"] if kind == DYNAMIC else ():
                add(choice["inputs"], f"{before}{name}.")

    add(info["input"], "")
    return list(dict.fromkeys(names))


@pytest.fixture(scope="module")
def nodes(comfy: Comfy) -> dict[str, dict]:
    return nodes_of_ours(comfy)


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(comfy: Comfy, nodes: dict[str, dict]) -> None:
    assert len(nodes) >= 20
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(nodes)
    for name, info in nodes.items():
        # where the front end looks, in every language that has no page of its own
        with urllib.request.urlopen(f"http://{comfy.address}/extensions/{PACK}/docs/{name}.md", timeout=30) as answer:
            page = answer.read().decode()
        assert page.startswith(f"# {info['display_name']}\n"), name
        inputs, outputs = page.split("\n## Outputs\n")
        named = lambda part: re.findall(r"^\| `([^`]+)`", part, re.MULTILINE)
        assert list(dict.fromkeys(named(inputs))) == input_names(info), name
        assert named(outputs.split("\n## What goes wrong\n")[0]) == info["output_name"], name


def test_a_picture_of_a_help_page_is_served(comfy: Comfy) -> None:
    with urllib.request.urlopen(
        f"http://{comfy.address}/extensions/{PACK}/docs/images/drawn.jpg", timeout=30
    ) as answer:
        assert answer.headers["Content-Type"] == "image/jpeg" and answer.read(2) == b"\xff\xd8"

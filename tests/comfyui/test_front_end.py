"""What others ask a ComfyUI server for beside the nodes: their help pages, their words in other languages, runs from a program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import DYNAMIC, PACK, ROOT, Comfy
from PIL import Image

from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.world import Colour, Kind, Place

LANGUAGES = ("zh", "ja", "de", "fr")


def nodes_of_ours(comfy: Comfy) -> dict[str, dict]:
    """Name -> what the server says of it."""
    everything = comfy.get("/object_info")
    return {name: info for name, info in everything.items() if info["python_module"] == f"custom_nodes.{PACK}"}


def inputs_of(info: dict) -> Iterator[tuple[str, str]]:
    """Name and tooltip of each input of a node, in order; those that belong to a choice are called ``choice.input``."""

    def each(inputs: dict, before: str) -> Iterator[tuple[str, str]]:
        for name, (kind, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            yield before + name, options[0]["tooltip"]
            for choice in options[0]["options"] if kind == DYNAMIC else ():
                yield from each(choice["inputs"], f"{before}{name}.")

    return each(info["input"], "")


def input_names(info: dict) -> list[str]:
    """The inputs of a node, in order, once each."""
    return list(dict.fromkeys(name for name, _ in inputs_of(info)))


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
        named = lambda part: re.findall(r"^- `([^`]+)`", part, re.MULTILINE)
        assert list(dict.fromkeys(named(inputs))) == input_names(info), name
        assert named(outputs.split("\n## What goes wrong\n")[0]) == info["output_name"], name


def test_a_picture_of_a_help_page_is_served(comfy: Comfy) -> None:
    with urllib.request.urlopen(
        f"http://{comfy.address}/extensions/{PACK}/docs/images/drawn.jpg", timeout=30
    ) as answer:
        assert answer.headers["Content-Type"] == "image/jpeg" and answer.read(2) == b"\xff\xd8"


def sockets_of(info: dict) -> Iterator[str]:
    """The types of a node's inputs and outputs."""
    for kind, *_ in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.values():
        if isinstance(kind, str):
            yield from kind.split(",")  # an input that takes several
    yield from info["output"]


def test_every_socket_of_ours_has_a_colour(comfy: Comfy, nodes: dict[str, dict]) -> None:
    ours = {kind for info in nodes.values() for kind in sockets_of(info) if kind.startswith("LLADA2_")}
    (path,) = [path for path in comfy.get("/extensions") if PACK in path]
    with urllib.request.urlopen(f"http://{comfy.address}{path}", timeout=30) as answer:
        colours = dict(re.findall(r"(LLADA2_\w+): \"(#[0-9a-f]{6})\"", answer.read().decode()))
    assert len(ours) >= 5 and set(colours) == ours
    assert len(set(colours.values())) == len(colours)


@pytest.mark.parametrize("chosen", ["full", "turbo"])
def test_what_a_beginner_needs_of_the_decoder_is_not_folded(nodes: dict[str, dict], chosen: str) -> None:
    inputs = nodes["ZImageDecode"]["input"]
    first = {**inputs["required"], **inputs["optional"]}
    (choice,) = [option for option in first["decoder"][1]["options"] if option["key"] == chosen]
    shown = [name for name, spec in {**first, **choice["inputs"]["required"]}.items() if not spec[1].get("advanced")]
    assert shown == ["vq", "model", "decoder", "seed", "preset", "steps"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_of_the_nodes_is_there_in_another_language(
    comfy: Comfy, nodes: dict[str, dict], language: str
) -> None:
    served = comfy.get("/i18n")[language]
    folder = ROOT / "locales" / language
    own = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert served == own.pop("main") | own, "a file is not served"
    words = served["nodeDefs"]
    assert set(words) == set(nodes)
    for name, info in nodes.items():
        # the front end asks with "_" for "."
        assert set(words[name]["inputs"]) == {each.replace(".", "_") for each in input_names(info)}, name
        assert set(words[name]["outputs"]) == {str(index) for index in range(len(info["output"]))}, name
        slots = [*words[name]["inputs"].values(), *words[name]["outputs"].values()]
        assert all(set(slot) == {"name", "tooltip"} and all(slot.values()) for slot in slots), name
        texts = [words[name]["display_name"], words[name]["description"], *(slot["tooltip"] for slot in slots)]
        assert not [text for text in texts if set(text) & set("@{}|")], "vue-i18n reads these as commands"
        assert words[name]["description"] != info["description"], name
    parts = {part for info in nodes.values() for part in info["category"].split("/")}
    assert set(served["nodeCategories"]) == parts


@pytest.mark.parametrize("language", LANGUAGES)
def test_another_language_states_the_same_numbers(nodes: dict[str, dict], language: str) -> None:
    """A bound or a default that changes in a tooltip has to change in all of them."""
    words = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())
    numbers = lambda *texts: set(re.findall(r"\d+", " ".join(texts)))
    agree = lambda expected, found: expected <= found <= expected | {"1", "2"}  # a language may write "one" as a figure
    for name, info in nodes.items():
        own = words[name]
        assert agree(numbers(info["description"]), numbers(own["description"])), name
        said: dict[str, list[str]] = {}  # an input of the same name can belong to several choices
        for each, tooltip in inputs_of(info):
            said.setdefault(each.replace(".", "_"), []).append(tooltip)
        for each, tooltips in said.items():
            assert agree(numbers(*tooltips), numbers(own["inputs"][each]["tooltip"])), (name, each)
        for index, tooltip in enumerate(info["output_tooltips"]):
            assert agree(numbers(tooltip), numbers(own["outputs"][str(index)]["tooltip"])), (name, index)


def test_the_program_in_the_documentation_draws_a_picture(comfy: Comfy, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert 'SERVER = "127.0.0.1:8188"' in program
    (tmp_path / "workflows").symlink_to(ROOT / "workflows")
    run = subprocess.run(
        [sys.executable, "-c", program.replace("127.0.0.1:8188", comfy.address)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "LLaDA2TextToVQ: " in run.stdout and "ZImageDecode: " in run.stdout
    with Image.open(tmp_path / run.stdout.splitlines()[-1]) as image:
        found = read(image)
    assert found is not None and found.layout() == {(Kind.TRIANGLE, Colour.GREEN, Place.BOTTOM_LEFT)}

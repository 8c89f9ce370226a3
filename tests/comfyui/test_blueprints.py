"""Blueprints: boxes that the search for nodes offers, each a graph of its own inside."""

from __future__ import annotations

import json
import tomllib

import pytest
from client import PACK, ROOT, Comfy, api_graph, ran, workflow
from PIL import Image

from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.world import Colour, Kind, Place

STAR = (Kind.STAR, Colour.BLUE, Place.BOTTOM_RIGHT)
# what each box gives, as it is, for the picture of the template text_to_image
PICTURES = {
    "LLaDA2 Text to picture": {(Kind.CIRCLE, Colour.RED, Place.TOP_LEFT), STAR},
    "LLaDA2 Edit a picture": {(Kind.CIRCLE, Colour.YELLOW, Place.TOP_LEFT), STAR},
}
ANSWERS = {
    "LLaDA2 Ask about a picture": "A red circle in the top left and a blue star in the bottom right, on a plain white background."
}
INSIDE, OUTSIDE = "-10", -20  # the front end's ids for a box's inputs and outputs, seen from inside


@pytest.fixture(scope="module")
def blueprints(comfy: Comfy) -> dict[str, dict]:
    """Name -> blueprint, as the front end gets it."""
    ours = {
        key: entry
        for key, entry in comfy.get("/global_subgraphs").items()
        if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"
    }
    return {entry["name"]: json.loads(comfy.get(f"/global_subgraphs/{key}")["data"]) for key, entry in ours.items()}


def test_the_search_for_nodes_finds_them(blueprints: dict[str, dict]) -> None:
    assert set(blueprints) == set(PICTURES) | set(ANSWERS)
    for name, blueprint in blueprints.items():
        (box,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
        assert name == box["title"] == inside["name"] and name.startswith("LLaDA2 ")
        assert inside["category"] == "LLaDA2"
        assert inside["description"] == blueprint["extra"]["BlueprintDescription"]
        assert "llada" in blueprint["extra"]["BlueprintSearchAliases"]


def test_they_say_which_pack_of_the_registry_their_nodes_are_of(blueprints: dict[str, dict]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    for blueprint in blueprints.values():
        (inside,) = blueprint["definitions"]["subgraphs"]
        nodes = [node["properties"] for node in inside["nodes"] if node["type"] in ours]
        said = {(properties.get("cnr_id"), properties.get("ver")) for properties in nodes}
        assert said == {(project["name"], project["version"])}


@pytest.mark.parametrize("name", [*PICTURES, *ANSWERS])
def test_a_box_does_what_it_says(comfy: Comfy, blueprints: dict[str, dict], name: str) -> None:
    (box,), (inside,) = blueprints[name]["nodes"], blueprints[name]["definitions"]["subgraphs"]
    links = {link["id"]: [str(link["origin_id"]), link["origin_slot"]] for link in inside["links"]}
    graph, varied = api_graph(comfy, inside["nodes"], links)
    assert varied.count("randomize") == (name in PICTURES)  # Run again draws a variation
    # from outside: the box's own values, and the picture of a template
    drawn = {f"drawn-{key}": node for key, node in workflow("text_to_image").items() if key in "123"}
    for node in drawn.values():
        node["inputs"] = {
            key: [f"drawn-{value[0]}", value[1]] if isinstance(value, list) else value
            for key, value in node["inputs"].items()
        }
    assert [slot["name"] for slot in box["inputs"]] == [slot["name"] for slot in inside["inputs"]]
    widgets = [slot["name"] for slot in box["inputs"] if "widget" in slot]
    given = {"image": ["drawn-3", 0], "mask": None, **dict(zip(widgets, box["widgets_values"], strict=True))}
    for node in graph.values():
        for key, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] == INSIDE:
                node["inputs"][key] = given[inside["inputs"][value[1]]["name"]]
        node["inputs"] = {key: value for key, value in node["inputs"].items() if value is not None}
    ((source, slot),) = [links[link["id"]] for link in inside["links"] if link["target_id"] == OUTSIDE]
    if name in ANSWERS:
        graph["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [source, slot]}}
    run = ran(comfy.run(graph | drawn))
    if name in ANSWERS:
        assert run.outputs["shown"]["text"] == [ANSWERS[name]]
    else:
        (path,) = comfy.images(run)  # of the Preview Image inside, which the box shows
        with Image.open(path) as image:
            found = read(image)
        assert found is not None and found.layout() == PICTURES[name]

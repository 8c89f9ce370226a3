"""What a person sees of this pack in ComfyUI's front end: the one that ComfyUI pins, and the newest.

``make test`` runs a short part with the pinned one, ``make browser`` all of it.
"""

from __future__ import annotations

import json
import re
import time

import pytest
from client import PACK, ROOT, Comfy, workflow
from templates import TEMPLATES, WORKFLOWS

pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[browser]'")

from editor import SECOND  # noqa: E402  it needs playwright

NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
# to open the page takes minutes where others use the cores too
pytestmark = pytest.mark.timeout(1500)
BOTH = pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes-2"])


def ours(server: Comfy) -> dict[str, dict]:
    """Name -> what the server says of a node."""
    everything = server.get("/object_info")
    return {name: info for name, info in everything.items() if info["python_module"] == f"custom_nodes.{PACK}"}


def saved(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def check_opened(editor, name: str) -> None:
    """Every node of a template is there and known, and nothing is said to be missing."""
    nodes = saved(name)["nodes"]
    editor.open_template(name, len(nodes))
    there = editor.nodes()
    assert {(str(node["id"]), node["type"]) for node in nodes} <= {(node, kind) for node, kind, _ in there}
    assert not [node for node in there if node[2]]
    assert not editor.error().is_visible()


def check_run(editor, name: str, nodes_2: bool) -> None:
    """It runs, what its nodes were given to show is seen, and no node hides another, whatever each has to show."""
    roots = {str(node["id"]) for node in saved(name)["nodes"]}
    # what they show on the canvas stays with Nodes 2.0
    outputs = editor.run() if nodes_2 else editor.run_all()
    outputs = {node: output for node, output in outputs.items() if node in roots}
    assert any(output.get("images") or output.get("text") for output in outputs.values())
    editor.fit()
    editor.keep(f"{name}-{'nodes-2' if nodes_2 else 'canvas'}")
    assert not [node for node, output in outputs.items() if not editor.shows(node, output, nodes_2)]
    # and what they said while they ran
    said = {detail["nodeId"]: detail["text"] for _, detail in editor.heard("progress_text")}
    assert not [
        node for node, text in said.items() if node in roots and not editor.shows(node, {"text": [text]}, nodes_2)
    ]
    assert not [node for node in editor.nodes() if node[2]]
    assert not editor.covered()


def check_app(editor, name: str) -> None:
    """It opens as an app that asks for what it shall ask for, and shows its picture; behind it is the graph."""
    asked = [widget for _, widget in saved(name)["extra"]["linearData"]["inputs"]]
    items = editor.page.get_by_test_id("app-mode-widget-item")
    items.nth(len(asked) - 1).wait_for()
    assert [item.inner_text().split()[0] for item in items.all()] == asked
    picture = editor.run_app()
    picture.wait_for()
    editor.page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
    editor.keep(f"{name}-app")
    editor.leave_app()


def test_the_front_end_is_the_one_that_is_tested(editor, front_end: str, comfyui) -> None:
    pinned = re.search(r"comfyui-frontend-package==(\S+)", (comfyui[0] / "requirements.txt").read_text())[1]
    assert (editor.version() == pinned) == (front_end == "pinned")


# --- templates ------------------------------------------------------------------------------------------------------


def test_the_browser_of_templates_shows_ours_with_their_pictures(editor) -> None:
    cards = editor.browse_templates()
    cards.nth(len(TEMPLATES) - 1).wait_for(state="attached")
    names = [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]
    assert names == list(TEMPLATES)  # in the order of learning
    editor.keep("templates")
    for card in cards.all():
        card.scroll_into_view_if_needed()  # a picture is fetched when it comes into view
        picture = card.locator("img").first.element_handle()
        editor.page.wait_for_function("picture => picture.complete && picture.naturalWidth > 0", arg=picture)
    editor.page.keyboard.press("Escape")


def test_a_template_opens_runs_and_shows_its_picture(editor) -> None:
    first = next(iter(TEMPLATES))
    check_opened(editor, first)
    check_run(editor, first, nodes_2=False)


@pytest.mark.whole
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_does_with_either_kind_of_nodes(editor, name: str) -> None:
    check_opened(editor, name)
    if name.endswith(".app"):
        check_app(editor, name)
    check_run(editor, name, nodes_2=False)
    editor.set_nodes_2(True)
    assert not editor.cut()
    check_run(editor, name, nodes_2=True)


# --- search and help ------------------------------------------------------------------------------------------------


def test_a_search_for_llada_finds_every_node(editor) -> None:
    editor.search().fill("llada")
    for info in ours(editor.server).values():
        expect_found(editor, info["display_name"])
    editor.keep("search")
    editor.page.keyboard.press("Escape")


@pytest.mark.whole
@pytest.mark.parametrize("name", NODES)
def test_a_search_for_an_alias_finds_its_node(editor, name: str) -> None:
    info = ours(editor.server)[name]
    field = editor.search()
    for alias in info["search_aliases"]:
        field.fill(alias)
        expect_found(editor, info["display_name"])
    editor.page.keyboard.press("Escape")


@pytest.mark.whole
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_search_finds_a_blueprint_and_puts_it_on_the_canvas(editor, name: str) -> None:
    editor.page.evaluate("app.graph.clear()")
    editor.search().fill(name)
    editor.found(name).first.click()
    editor.page.wait_for_function("app.graph.nodes.length === 1 && !!app.graph.nodes[0].subgraph")
    editor.page.mouse.click(400, 300)  # it follows the pointer until then
    editor.fit()
    editor.keep(f"blueprint-{name}")
    nodes = editor.nodes()
    inside = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())["definitions"]["subgraphs"][0]["nodes"]
    assert sorted(kind for _, kind, _ in nodes[1:]) == sorted(node["type"] for node in inside)
    assert not [node for node in nodes if node[2]]


@pytest.mark.parametrize("name", [NODES[0], *(pytest.param(name, marks=pytest.mark.whole) for name in NODES[1:])])
def test_the_help_page_of_a_node_opens(editor, name: str) -> None:
    title = ours(editor.server)[name]["display_name"]
    editor.place(name)
    page = editor.help()
    page.get_by_role("heading", name=title, exact=True).first.wait_for()
    page.get_by_role("heading", name="What goes wrong").wait_for()
    editor.page.wait_for_function(
        "[...document.querySelectorAll('.node-help-content img')].every(picture => picture.naturalWidth > 0)"
    )
    editor.keep(f"help-{name}")


def expect_found(editor, name: str) -> None:
    editor.found(name).first.wait_for(state="attached")


# --- errors and cancel ----------------------------------------------------------------------------------------------


@BOTH
def test_a_wrong_value_shows_one_readable_error_on_its_widget(editor, nodes_2: bool) -> None:
    editor.load(workflow("text_to_image", **{"2": {"prompt": " "}}))
    editor.set_nodes_2(nodes_2)
    editor.press_run()
    editor.error().get_by_text("LLaDA2 Text to VQ rejected the value for prompt.").wait_for()
    assert editor.wrong() == [("2", "prompt")]
    panel = editor.details()
    panel.get_by_role("button", name="Info for LLaDA2 Text to VQ - prompt").click()
    panel.get_by_text("The prompt is empty. Write what you want.").wait_for()
    assert "1 node — 1 error" in panel.inner_text()
    editor.keep(f"wrong-value-{'nodes-2' if nodes_2 else 'canvas'}")
    editor.forgive(r"/api/prompt|PromptExecutionError")  # that the server refused it


@pytest.mark.whole
@BOTH
def test_what_only_a_run_finds_is_told_on_the_node(editor, nodes_2: bool) -> None:
    # not a width of 300, which front end 1.58 rounds to the widget's step
    editor.load(workflow("codes_as_things", **{"5": {"left": 9}}))
    editor.set_nodes_2(nodes_2)
    editor.press_run()
    end = editor.wait_for("execution_success", "execution_error")
    assert (end["kind"], end.get("node_id")) == ("execution_error", "5")
    editor.error().wait_for()
    editor.page.wait_for_timeout(SECOND)  # what is taken away is taken away by now
    editor.keep(f"error-{'nodes-2' if nodes_2 else 'canvas'}")
    assert editor.page.evaluate("String(app.lastExecutionError?.node_id)") == "5"
    # beside the red node, in the same words
    assert editor.shows("5", {"text": ["outside the grid of 8 x 8 codes", "Left has to be 0 to 7"]}, nodes_2)


@pytest.mark.whole
def test_cancel_stops_a_run_and_the_next_one_works(editor) -> None:
    slow = {"prompt": "A blue ring in the top left", "steps": 256, "threshold": 1.0}
    editor.load(workflow("text_to_image", **{"2": slow}))
    editor.press_run()
    editor.wait_for("b_preview_with_metadata")
    asked = time.monotonic()
    editor.press_cancel()
    assert (
        editor.wait_for("execution_success", "execution_error", "execution_interrupted")["kind"]
        == "execution_interrupted"
    )
    assert time.monotonic() - asked < 20
    assert not editor.error().is_visible()
    assert not [node for node in editor.nodes() if node[2]]
    editor.load(workflow("text_to_image"))
    assert editor.run()["4"]["images"]


# --- two tabs -------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_two_tabs_hear_only_of_their_own_runs(editor) -> None:
    """The same graph in both, so that a message for the other tab would find its node."""
    one, other = editor.page, editor.second()
    try:
        for page, shape in ((one, "circle"), (other, "square")):
            editor.page = page
            editor.load(workflow("text_to_image", **{"2": {"prompt": f"A green {shape} in the top left"}}))
        editor.page = other
        editor.page.evaluate("window.heard.length = 0")
        editor.page = one
        assert editor.run()["4"]["images"]
        assert editor.heard("b_preview_with_metadata")
        editor.page = other
        assert not editor.page.evaluate("window.heard")
        assert not [node for node in ("2", "3", "4") if editor.pictures_of(node)]
    finally:
        editor.page = one
        other.close()

"""ComfyUI's front end in a browser: what a person does there, and what there is to see."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from client import PACK, RUN_TIMEOUT, Comfy
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, TimeoutError, expect

SECOND = 1000  # playwright counts in milliseconds
# a page of 240 files and 20 MB of code, on two cores that others use too
LOAD_TIMEOUT, STEP_TIMEOUT = 300 * SECOND, 120 * SECOND
# of the server's own settings: no greeting, nothing of an earlier page, nothing over the canvas in the pictures
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode"],  # its tour would lie over the first app
}
# what the front end itself asks for and does not find: the user's own files in a new installation, a help page in the
# user's language before the one for all of them, the sizes of models that ComfyUI's blueprints name, and its own graph
# before it is there
NOT_OURS = re.compile(
    r"/user\.css|/api/userdata|/docs/\w+/[\w-]+\.md|Content Security Policy|graph accessed before initialization"
)
ENDS = ("execution_success", "execution_error", "execution_interrupted")
# Keeps what the server says, in the order in which the front end hears it, in window.heard.
LISTEN = """kinds => {
    window.heard = []
    for (const kind of kinds) app.api.addEventListener(kind, event => window.heard.push([kind, event.detail]))
}"""
# The nodes of the graph and of the graphs in it: [id, type, whether something is wrong].
NODES = """() => {
    const each = graph => graph.nodes.flatMap(node =>
        [[String(node.id), node.type, !!node.has_errors], ...(node.subgraph ? each(node.subgraph) : [])])
    return each(app.graph)
}"""
# Of a node drawn on the canvas: how many pictures it shows, and its texts.
DRAWN = """id => {
    const node = app.graph.nodes.find(node => String(node.id) === id)
    const pictures = (node.imgs ?? []).filter(picture => picture.complete && picture.naturalWidth > 0)
    return [pictures.length, (node.widgets ?? []).map(widget => widget.value).filter(value => typeof value === 'string')]
}"""
# The same of one of Nodes 2.0, which is a part of the page.
SHOWN = """element => [
    [...element.querySelectorAll('img')].filter(picture => picture.complete && picture.naturalWidth > 0).length,
    [element.innerText, ...[...element.querySelectorAll('textarea')].map(text => text.value)]
]"""
# Of Nodes 2.0: names of inputs and outputs that are wider than their place, and titles.
CUT = """() => [...document.querySelectorAll(
    '[data-node-id] :is([data-testid=widget-layout-field-label], [data-testid=node-title], .lg-slot) *')
].filter(part => !part.children.length && part.clientWidth && part.scrollWidth > part.clientWidth + 1
).map(part => [part.closest('[data-node-id]').dataset.nodeId, part.textContent.trim()])"""
# Pairs of nodes of which one covers a part of the other, drawn on the canvas or as parts of the page.
COVERED = """() => {
    const boxes = [...document.querySelectorAll('[data-node-id]')].map(node => {
        const box = node.getBoundingClientRect()
        return [node.dataset.nodeId, box.left, box.top, box.right, box.bottom]
    })
    const title = LiteGraph.NODE_TITLE_HEIGHT
    if (!boxes.length) for (const {id, pos: [x, y], size: [w, h]} of app.graph.nodes)
        boxes.push([String(id), x, y - title, x + w, y + h])
    return boxes.flatMap(([a, l, t, r, b], i) => boxes.slice(i + 1).filter(
        ([, l2, t2, r2, b2]) => Math.min(r, r2) - Math.max(l, l2) > 1 && Math.min(b, b2) - Math.max(t, t2) > 1
    ).map(([b]) => [a, b]))
}"""
# Whether all nodes are in view: the front end's own way there can stop early on a busy machine.
IN_VIEW = """() => {
    const {ds: {offset, scale}, canvas} = app.canvas
    const {width, height} = canvas.getBoundingClientRect()
    const inside = (from, size, offset, most) => (from + offset) * scale >= 0 && (from + size + offset) * scale <= most
    const title = LiteGraph.NODE_TITLE_HEIGHT
    return app.graph.nodes.every(({pos: [x, y], size: [w, h]}) =>
        inside(x, w, offset[0], width) && inside(y - title, h + title, offset[1], height))
}"""
# Names of the inputs that are marked as wrong, with their nodes.
WRONG = """() => app.graph.nodes.flatMap(
    node => node.inputs.filter(input => input.hasErrors).map(input => [String(node.id), input.name]))"""


def plain(text: str) -> str:
    """Letters and digits alone: the front end may show a text as Markdown."""
    return "".join(filter(str.isalnum, text))


class Editor:
    """One page with the front end of one server."""

    def __init__(self, context: BrowserContext, server: Comfy, pictures: Path):
        self.context, self.server, self.pictures = context, server, pictures
        expect.set_options(timeout=STEP_TIMEOUT)
        self.faults: list[str] = []  # what the browser's console calls an error
        server.post("/settings", SETTINGS)
        self.page = self._open()

    def _open(self) -> Page:
        page = self.context.new_page()
        page.set_default_timeout(STEP_TIMEOUT)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(f"http://{self.server.address}/", timeout=LOAD_TIMEOUT)
        page.wait_for_function("() => window.app?.vueAppReady && app.canvas?.graph", timeout=LOAD_TIMEOUT)
        expect(page.get_by_test_id("queue-button")).to_be_visible(timeout=LOAD_TIMEOUT)
        # not ComfyUI's own first graph, whose models are missing here
        page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        page.evaluate(
            LISTEN, [*ENDS, "execution_cached", "executing", "executed", "progress_text", "b_preview_with_metadata"]
        )
        return page

    def _hear(self, message: ConsoleMessage) -> None:
        address = message.location.get("url", "")
        said = f"{message.text} ({address})"
        if message.type == "error" and f"//{self.server.address}" in address and not NOT_OURS.search(said):
            self.faults.append(said)

    def forgive(self, pattern: str) -> None:
        """Forget the errors that belong to what a test did on purpose."""
        self.faults[:] = [fault for fault in self.faults if not re.search(pattern, fault)]

    def second(self) -> Page:
        """Another tab of the same browser."""
        return self._open()

    def again(self) -> None:
        """The page as it is when it was just opened."""
        self.page.close()
        self.faults.clear()
        self.page = self._open()

    def version(self) -> str:
        return self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")

    def keep(self, name: str) -> None:
        """A picture of the page, to be looked at."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def set_up(self) -> None:
        """Nodes on the canvas, and no panel beside it."""
        self.set_nodes_2(False)
        self.page.evaluate("app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")

    def set_nodes_2(self, on: bool) -> None:
        self.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)
        first = self.page.locator("[data-node-id]").first
        if on and self.page.evaluate("app.graph.nodes.length"):
            expect(first).to_be_visible()
        elif not on:
            expect(first).to_be_hidden()

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def fit(self) -> None:
        """Move all nodes into view, and wait until they are there."""
        for _ in range(5):
            self.command("Comfy.Canvas.FitView")
            self.page.wait_for_timeout(1.5 * SECOND)
            if self.page.evaluate(IN_VIEW):
                return
        raise AssertionError("the nodes do not come into view")

    # --- templates --------------------------------------------------------------------------------------------------

    def browse_templates(self) -> Locator:
        """Open the browser of templates at those of this pack, and give their cards."""
        self.page.get_by_test_id("side-toolbar").get_by_role("button", name="Templates").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(PACK, exact=True).first.click()
        expect(dialog.get_by_role("heading", name=PACK)).to_be_visible()
        return dialog.locator("[data-testid^='template-workflow-']")

    def open_template(self, name: str, nodes: int) -> None:
        """Open one as a person does, and wait until its nodes are there."""
        self.browse_templates()
        card = self.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        card.click()
        self.page.wait_for_function("nodes => app.graph.nodes.length === nodes", arg=nodes)
        expect(self.page.get_by_role("dialog")).to_be_hidden()
        self.page.wait_for_timeout(2 * SECOND)  # what is missing is told a moment later

    def nodes(self) -> list[tuple[str, str, bool]]:
        return [tuple(node) for node in self.page.evaluate(NODES)]

    def cut(self) -> list[tuple[str, str]]:
        """Names that are cut in Nodes 2.0, with their nodes."""
        return [tuple(found) for found in self.page.evaluate(CUT)]

    def covered(self) -> list[tuple[str, str]]:
        """Pairs of nodes of which one lies on the other."""
        return [tuple(pair) for pair in self.page.evaluate(COVERED)]

    def load(self, prompt: dict) -> None:
        """An API graph, as when its file is dropped on the canvas."""
        self.page.evaluate("prompt => app.loadApiJson(prompt, 'test')", prompt)
        self.page.wait_for_function("nodes => app.graph.nodes.length === nodes", arg=len(prompt))

    # --- runs -------------------------------------------------------------------------------------------------------

    def press_run(self) -> None:
        self.page.evaluate("window.heard.length = 0")
        self.page.get_by_test_id("queue-button").click()

    def press_cancel(self) -> None:
        self.page.get_by_role("button", name="Cancel current run").click()

    def wait_for(self, *kinds: str) -> dict[str, Any]:
        """What is said with the first of these events."""
        found = self.page.wait_for_function(
            "kinds => window.heard.find(([kind]) => kinds.includes(kind))", arg=kinds, timeout=RUN_TIMEOUT * SECOND
        )
        kind, detail = found.json_value()
        return {"kind": kind, **(detail if isinstance(detail, dict) else {})}

    def run_all(self) -> dict[str, dict]:
        """As ``run``, but that the server has forgotten what nodes gave: all of them run and show what a first run shows."""
        for _ in range(5):
            self.server.post("/free", {"unload_models": False, "free_memory": True})
            self.page.wait_for_timeout(SECOND)  # it forgets when its worker wakes up, and does not say when that was
            outputs = self.run()
            if not any(detail["nodes"] for _, detail in self.heard("execution_cached")):
                return outputs
        raise AssertionError("the server does not forget")

    def run(self) -> dict[str, dict]:
        """Press Run and wait for its end: node -> what it gave the front end to show."""
        self.press_run()
        end = self.wait_for(*ENDS)
        assert end["kind"] == "execution_success", end
        return {
            detail["display_node"]: detail["output"] for kind, detail in self.heard("executed") if detail.get("output")
        }

    def run_app(self) -> Locator:
        """Press Run of a template that is open as an app, and give the picture that it shows at the end."""
        self.page.evaluate("window.heard.length = 0")
        self.page.get_by_test_id("linear-run-button").get_by_role("button", name="Run", exact=True).click()
        end = self.wait_for(*ENDS)
        assert end["kind"] == "execution_success", end
        (picture,) = [
            file for _, detail in self.heard("executed") for file in (detail["output"] or {}).get("images", ())
        ]
        # the small ones below it are those of earlier runs
        return self.page.locator(f"img.object-contain[src*='{picture['filename']}']")

    def leave_app(self) -> None:
        """From the app to its graph."""
        self.command("Comfy.ToggleLinear")
        expect(self.page.get_by_test_id("queue-button")).to_be_visible()

    def heard(self, kind: str) -> list[list]:
        return [event for event in self.page.evaluate("window.heard") if event[0] == kind]

    def pictures_of(self, node: str) -> int:
        """How many pictures a node shows that is drawn on the canvas."""
        return self.page.evaluate(DRAWN, node)[0]

    def node(self, node: str) -> Locator:
        """A node of Nodes 2.0."""
        return self.page.locator(f"[data-node-id='{node}']")

    def shows(self, node: str, output: dict, nodes_2: bool) -> bool:
        """Whether a node shows the pictures or the texts that it was given."""
        pictures, texts = self.node(node).evaluate(SHOWN) if nodes_2 else self.page.evaluate(DRAWN, node)
        # one without words takes away what an earlier run left
        wanted = [plain(text) for text in output.get("text", ()) if isinstance(text, str) and plain(text)]
        # of several pictures the new nodes show one large, or all small
        return bool(pictures) >= bool(output.get("images")) and all(
            any(text in plain(shown) for shown in texts) for text in wanted
        )

    # --- errors, search, help ---------------------------------------------------------------------------------------

    def wrong(self) -> list[tuple[str, str]]:
        """The inputs that are marked as wrong, with their nodes."""
        return [tuple(found) for found in self.page.evaluate(WRONG)]

    def error(self) -> Locator:
        """What says over the canvas that something is wrong."""
        return self.page.get_by_test_id("error-overlay")

    def details(self) -> Locator:
        """Open the panel with what is wrong."""
        self.page.get_by_test_id("error-overlay-see-errors").click()
        return self.page.get_by_test_id("properties-panel")

    def search(self) -> Locator:
        """Open the search for nodes by a double click on the canvas, and give its field."""
        size = self.page.viewport_size
        field = self.page.get_by_role("combobox", name=re.compile("Add a node"))
        for _ in range(10):  # front end 1.49 does not take every double click for one
            self.page.mouse.dblclick(size["width"] // 2, size["height"] - 60)
            with suppress(TimeoutError):
                field.wait_for(timeout=5 * SECOND)
                return field
        raise AssertionError("the search for nodes does not open")

    def found(self, name: str) -> Locator:
        """The search's result with this name."""
        return self.page.get_by_test_id("result-item").filter(has_text=name)

    def place(self, kind: str) -> None:
        """A graph of one node, which is selected."""
        self.page.evaluate(
            """kind => {
                app.graph.clear()
                const node = LiteGraph.createNode(kind)
                app.graph.add(node)
                node.pos = [300, 200]
                app.canvas.selectNode(node)
            }""",
            kind,
        )
        self.fit()

    def help(self) -> Locator:
        """Open the help page of the only node, which is selected, from the tools above it."""
        for _ in range(10):  # the tools do not always come with the first selection
            with suppress(TimeoutError):
                self.page.get_by_test_id("info-button").click(timeout=10 * SECOND)
                return self.page.locator(".node-help-content")
            self.page.evaluate("app.canvas.deselectAll(); app.canvas.selectNode(app.graph.nodes[0])")
        raise AssertionError("there are no tools above the node")

"""What is fuzzed of the nodes: API bodies, graphs, names of files. ComfyUI's own validation runs, without a server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from llada2_mlx.errors import RequestError

from .damage import TEXTS, VALUES, json_of
from .harness import Target, require_readable

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "tests/comfyui/fuzz_script.py"
OURS = ("/nodes/", "/llada2_mlx/")
NAMES = ("API bodies", "graphs", "names for saved grids", "names of saved grids")
# where a name could lead
ESCAPES = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "..\\x",
    "~/x",
    "C:\\x",
    "%year%/../../x",
    ".hidden/x",
    "a//b",
    "x\u0000y",
    "",
    ".",
    "a/.",
]
PATHS = st.one_of(
    st.sampled_from(ESCAPES),
    st.lists(
        st.one_of(TEXTS, st.sampled_from([*ESCAPES, "%width%", "%date:yyyy%", "codes", "llada2"])), max_size=4
    ).map("/".join),
)


class Asked:
    """ComfyUI's interpreter with the pack in it: takes requests one after the other."""

    def __init__(self, folder: Path, python: Path, base: Path):
        self.process = subprocess.Popen(
            [python, SCRIPT, ROOT, base],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._next("ready")

    def _next(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise AssertionError(f"ComfyUI's interpreter ended with {self.process.wait()}")

    def ask(self, **request: Any) -> str:
        """What was refused, in words; empty if nothing was.

        Raises:
            AssertionError: something of ours crashed. A crash of ComfyUI's own is none of ours.
        """
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._next("answer "))
        if crash := answer.get("crashed"):
            frames = [line for line in crash.splitlines() if line.lstrip().startswith('File "')]
            assert not any(str(ROOT) in line and any(part in line for part in OURS) for line in frames), crash
            return "ComfyUI itself cannot read it"
        return answer["refused"]


@contextmanager
def asked(folder: Path, python: Path, base: Path) -> Iterator[Asked]:
    """Start it, and end it."""
    running = Asked(folder, python, base)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def templates() -> list[dict]:
    """The shipped graphs, as a program sends them."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "workflows/api").glob("*.json"))]


def targets(comfy: Asked) -> list[Target]:
    """What the nodes take, with an interpreter that runs them."""
    graphs = templates()
    names = st.sampled_from(["Shapes (built in)", "the codes' own", "the backbone's own", "golden"])
    links = st.tuples(st.sampled_from([str(number) for number in range(12)]), st.integers(-1, 3)).map(list)
    bodies = st.sampled_from(graphs).flatmap(lambda graph: json_of(graph, st.one_of(VALUES, links, names, PATHS)))

    def validated(body: Any) -> None:
        said = comfy.ask(do="validate", prompt=body)
        if said:
            raise RequestError(f"It was refused in words: {said[:1000]}")

    def looked(given: tuple) -> None:
        graph, node, model = given
        # ComfyUI lets no other graph get so far
        if not isinstance(graph, dict) or not isinstance(graph.get(node), dict):
            return
        nodes = {
            name: each | {"inputs": each["inputs"]}
            for name, each in graph.items()
            if isinstance(each, dict)
            and isinstance(each.get("inputs"), dict)
            and isinstance(each.get("class_type"), str)
        }
        if node in nodes and (said := comfy.ask(do="look", prompt=nodes, node=node, model=model)):
            raise RequestError(said)

    def saved(prefix: str) -> None:
        said = comfy.ask(do="save", prefix=prefix)
        if said:
            require_readable(said)
            raise RequestError(said)

    def loaded(file: Any) -> None:
        if said := comfy.ask(do="load", file=file):
            require_readable(said)
            raise RequestError(said)

    node = st.sampled_from([str(number) for number in range(1, 12)])
    files = st.one_of(PATHS, PATHS.map(lambda name: f"{name}.safetensors [output]"), VALUES)
    return [
        Target(NAMES[0], bodies, validated, 2),
        Target(NAMES[1], st.tuples(bodies, node, names), looked, 2),
        Target(NAMES[2], PATHS, saved, 4),
        Target(NAMES[3], files, loaded, 4),
    ]

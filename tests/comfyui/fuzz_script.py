"""Run by fuzz/in_comfyui.py in ComfyUI's interpreter: answers each line of JSON with one, without a server.

Arguments: the pack's folder, a base directory. The current directory is ComfyUI's. A request is ``{"do": what, ...}``. An answer says
what was ``refused``, in words, or what ``crashed``, as a traceback; neither where all went well.
"""

from memory_base import base, host  # first: it finds ComfyUI

# isort: split
import asyncio
import json
import os
import sys
import traceback
from types import SimpleNamespace

import execution
from comfy_execution.graph import DynamicPrompt
from comfy_execution.utils import CurrentNodeContext
from the_pack.llada2_mlx.errors import LLaDA2Error
from the_pack.llada2_mlx.vq import VQGrid
from the_pack.nodes import LLaDA2Extension

import nodes

GRID = VQGrid.from_list(list(range(64)), 8, 8, 256)


async def register() -> None:
    """Make ComfyUI's own nodes and ours known, as its start does."""
    await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    for node in await LLaDA2Extension().get_node_list():
        nodes.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] = node


def validate(prompt: object) -> str:
    """What ComfyUI says of a body's prompt when it is queued; a crash of ours in it is raised."""
    fine, error, _, node_errors = asyncio.run(execution.validate_prompt("fuzzed", prompt, None))
    for node in node_errors.values():
        for each in node["errors"]:
            if each["type"].startswith("exception_during"):
                raise RuntimeError("".join(each["extra_info"].get("traceback", [])) + each["details"])
    return "" if fine else json.dumps([error, node_errors])


def look(prompt: dict, node: str, model: object) -> None:
    """What a node asks the graph before the pictures behind its links are made."""
    graph = DynamicPrompt(prompt)
    with CurrentNodeContext("fuzzed", node):
        host.is_linked(graph, "vq")
        host.check_one_codebook(graph, "vq", "backbone")
        host.check_codes(graph, model)


def save(prefix: str) -> None:
    saving.append(True)
    try:
        host.save_grids([GRID], prefix, SimpleNamespace(prompt={"1": {}}, extra_pnginfo=None))
    finally:
        saving.clear()


saving: list[bool] = []


def watch(event: str, arguments: tuple) -> None:
    """While a grid is saved nothing is made or written outside ComfyUI's output folder."""
    if saving and (
        event == "os.mkdir" or event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
    ):
        where = os.path.realpath(os.fsdecode(arguments[0]))
        if not where.startswith(os.path.realpath(base / "output")):
            raise RuntimeError(f"{event} of {where}, outside ComfyUI's output folder")


def load(file: object) -> None:
    host.grid_fingerprint(file)
    host.check_grid(file)
    host.load_grid(file)


sys.addaudithook(watch)
asyncio.run(register())
ACTIONS = {"validate": validate, "look": look, "save": save, "load": load}
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    answer = {}
    try:
        answer["refused"] = ACTIONS[request.pop("do")](**request) or ""
    except LLaDA2Error as error:
        answer["refused"] = str(error)
    except Exception:
        answer["crashed"] = traceback.format_exc()
    print("answer " + json.dumps(answer), flush=True)

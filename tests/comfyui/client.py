"""A ComfyUI server as a process, and a client of its HTTP and websocket interface."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import websocket
from PIL import Image
from templates import WORKFLOWS

PACK = "ComfyUI-LLaDA2-MLX"
ROOT = Path(__file__).parent.parent.parent
TEXT_EVENT, PREVIEW_EVENT = 3, 4  # binary websocket messages: progress text, a picture with where it belongs
START_TIMEOUT, RUN_TIMEOUT = 180, 300
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice with inputs of its own
WIDGETS = (
    "INT",
    "FLOAT",
    "STRING",
    "BOOLEAN",
    "COMBO",
    DYNAMIC,
)  # kinds that are no sockets; a list of choices is one too


def installed() -> tuple[Path, Path] | None:
    """ComfyUI's folder and its Python, as the environment says or where they usually are; None where there is none."""
    folder = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser().absolute()
    candidates = [os.environ.get("COMFYUI_PYTHON"), folder / "venv/bin/python", folder / ".venv/bin/python"]
    python = next((Path(path) for path in candidates if path and Path(path).exists()), None)
    return (folder, python) if python and (folder / "main.py").exists() else None


@dataclass
class Run:
    """What the server said about one prompt."""

    prompt_id: str
    outputs: dict[str, Any] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)  # ids of the nodes that ran
    cached: list[str] = field(default_factory=list)
    progress: list[dict] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # node id, text
    previews: list[tuple[str, Image.Image]] = field(default_factory=list)  # node id, picture
    error: dict | None = None
    interrupted: bool = False


class Comfy:
    """A client of one server."""

    def __init__(self, port: int, base: Path, log: Path, process: subprocess.Popen):
        self.address, self.base, self.log_path, self.process = f"127.0.0.1:{port}", base, log, process
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, content: dict) -> Any:
        """The JSON answer, also where the server refuses."""
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return json.loads(body) if body else None

    def free(self, parts: int, **more: bool) -> None:
        """Let all models go, and wait until so many parts of ours are gone.

        ComfyUI overhears what it is asked in the moment in which a prompt ends; so it is asked again.
        """
        gone, asked, deadline = self.log().count("let go") + parts, 0.0, time.monotonic() + 60
        while self.log().count("let go") < gone:
            assert time.monotonic() < deadline, "nothing was let go"
            if time.monotonic() - asked > 5:
                asked = time.monotonic()
                self.post("/free", {"unload_models": True, **more})
            time.sleep(0.1)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def run(self, prompt: dict, on_event: Callable[[str, dict], None] = lambda kind, data: None) -> Run:
        """Queue a prompt and follow it to its end."""
        connection = websocket.create_connection(
            f"ws://{self.address}/ws?clientId={self.client_id}", timeout=RUN_TIMEOUT
        )
        try:
            features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            connection.send(json.dumps(features))
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
            assert "prompt_id" in answer, json.dumps(answer, indent=1)
            run = Run(answer["prompt_id"])
            deadline = time.monotonic() + RUN_TIMEOUT
            while time.monotonic() < deadline:
                message = connection.recv()
                if isinstance(message, bytes):
                    kind, length = struct.unpack(">II", message[:8])
                    if kind == TEXT_EVENT:
                        run.texts.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))
                        on_event("text", {})
                    elif kind == PREVIEW_EVENT:
                        about, picture = json.loads(message[8 : 8 + length]), message[8 + length :]
                        run.previews.append((about["node_id"], Image.open(BytesIO(picture)).convert("RGB")))
                    continue
                event = json.loads(message)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") != run.prompt_id:
                    continue
                on_event(kind, data)
                if kind == "executing" and data["node"]:
                    run.executed.append(data["node"])
                elif kind == "execution_cached":
                    run.cached += data["nodes"]
                elif kind == "progress":
                    run.progress.append(data)
                elif kind == "executed":
                    run.outputs[data["node"]] = data["output"]
                elif kind in ("execution_error", "execution_interrupted"):
                    run.error, run.interrupted = data, kind == "execution_interrupted"
                    return run
                elif kind == "execution_success":
                    run.outputs |= self._history(run.prompt_id)["outputs"]
                    return run
            raise TimeoutError(f"the prompt did not end in {RUN_TIMEOUT} s")
        finally:
            connection.close()

    def _history(self, prompt_id: str) -> dict:
        """What is kept of a prompt, cached outputs included; it is written a moment after the last event."""
        for _ in range(100):
            if history := self.get(f"/history/{prompt_id}"):
                return history[prompt_id]
            time.sleep(0.05)
        raise TimeoutError(f"the prompt {prompt_id} did not get into the history")

    def refused(self, prompt: dict) -> str:
        """Everything that the server says when it refuses a prompt."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        assert "prompt_id" not in answer, "the prompt was accepted"
        return json.dumps(answer, ensure_ascii=False)

    def images(self, run: Run) -> list[Path]:
        """The files that a run saved."""
        return [
            self.base / image["type"] / image["subfolder"] / image["filename"]
            for output in run.outputs.values()
            for image in (output or {}).get("images", [])
        ]

    def image(self, run: Run, node: str) -> Path:
        """The one file that a node of a run saved."""
        (path,) = self.images(Run(run.prompt_id, {node: run.outputs[node]}))
        return path


def ran(run: Run) -> Run:
    assert run.error is None, run.error
    return run


def failed(run: Run, node: str) -> str:
    assert run.error and run.error["node_id"] == node, run.error
    return run.error["exception_message"]


def told(run: Run, node: str) -> str:
    """The last text that a node showed."""
    return [text for name, text in run.texts if name == node][-1]


def workflow(name: str, **changes: dict) -> dict:
    """A shipped API graph, with inputs of some nodes changed: ``workflow("text_to_image", **{"3": {"seed": 1}})``."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    for node, inputs in changes.items():
        prompt[node]["inputs"] |= inputs
    return prompt


def api_graph(comfy: Comfy, nodes: list[dict], links: dict[int, list]) -> tuple[dict, list[str]]:
    """Nodes as the editor saves them -> the same graph as the API has it, and what becomes of each seed after a run.

    ``links`` says of each link from which node and output it comes. Every value has to be there, and one that exists.
    """
    graph, varied = {}, []
    for node in nodes:
        kinds = comfy.get(f"/object_info/{node['type']}")[node["type"]]["input"]
        optional = kinds.get("optional", {})
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link")}
        values, inputs, pending = list(node.get("widgets_values") or []), {}, list(kinds["required"].items())
        is_widget = lambda kind: isinstance(kind, list) or kind in WIDGETS
        pending += [(key, spec) for key, spec in optional.items() if is_widget(spec[0])]
        while pending:
            key, (kind, *options) = pending.pop(0)
            options = options[0] if options else {}
            if kind == "COMFY_AUTOGROW_V3":
                grown = [f"{key}.{name}" for name in options["template"]["names"] if f"{key}.{name}" in linked]
                inputs |= {name: linked.pop(name) for name in grown}
                continue
            if not is_widget(kind):
                inputs[key] = linked.pop(key)
                continue
            value = values.pop(0)  # is kept where a link overrules it
            if kind == DYNAMIC:
                (chosen,) = [option for option in options["options"] if option["key"] == value]
                pending = [(f"{key}.{own}", spec) for own, spec in chosen["inputs"]["required"].items()] + pending
            elif isinstance(kind, list) or kind == "COMBO":
                assert value in (kind if isinstance(kind, list) else options["options"])
            inputs[key] = linked.pop(key, value)
            if options.get("control_after_generate"):
                varied.append(values.pop(0))
        for key in set(linked) & set(optional):
            inputs[key] = linked.pop(key)
        assert not linked
        if node["type"] != "PreviewAny":  # keeps what it showed
            assert not values
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph, varied


@contextmanager
def serve(folder: Path, python: Path, base: Path, *options: str | Path, **environment: str) -> Iterator[Comfy]:
    """Start a server on a free port, with more options of its command line, and stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / f"server-{port}.log"
    command = [
        python,
        "main.py",
        "--cpu",
        "--port",
        str(port),
        "--base-directory",
        base,
        "--disable-auto-launch",
        "--disable-api-nodes",
    ]
    command += ["--database-url", "sqlite:///:memory:", *options]
    if (paths := base / "extra_model_paths.yaml").exists():
        command += ["--extra-model-paths-config", paths]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    client = Comfy(port, base, log, process)
    try:
        for _ in range(2 * START_TIMEOUT):
            try:
                client.get("/system_stats")
                break
            except OSError:
                assert process.poll() is None, f"ComfyUI did not start:\n{client.log()}"
                time.sleep(0.5)
        else:
            raise TimeoutError(f"ComfyUI did not start in {START_TIMEOUT} s:\n{client.log()}")
        yield client
    finally:
        process.terminate()
        process.wait(timeout=30)

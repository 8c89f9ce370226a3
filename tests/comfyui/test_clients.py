"""Two clients of one server: what a run tells goes to the one that asked for it, and to nobody else."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from uuid import uuid4

import pytest
import websocket
from client import Comfy, Run, ran, workflow


def renamed(prompt: dict, before: str) -> dict:
    """The same graph with other names of its nodes."""
    link = lambda value: [before + value[0], value[1]] if isinstance(value, list) else value
    return {
        before + node: {**content, "inputs": {name: link(value) for name, value in content["inputs"].items()}}
        for node, content in prompt.items()
    }


def told_of(run: Run) -> dict[str, set[str]]:
    """The nodes of which a client was told anything, by how."""
    return {
        "texts": {node for node, _ in run.texts},
        "previews": {node for node, _ in run.previews},
        "progress": {event["node"] for event in run.progress},
        "executed": set(run.executed),
    }


def test_two_clients_are_told_of_their_own_runs(comfy: Comfy, unique: str) -> None:
    """Both wait for their answers at the same time, and a third who asks for nothing hears nothing."""
    clients = {name: copy(comfy) for name in ("one", "other")}
    for client in clients.values():
        client.client_id = uuid4().hex
    ask = lambda name: workflow("ask_about_a_picture", **{"2": {"prompt": f"{unique} ({name})"}})
    listener = websocket.create_connection(f"ws://{comfy.address}/ws?clientId={uuid4().hex}", timeout=2)
    try:
        with ThreadPoolExecutor() as pool:
            waiting = {
                name: pool.submit(client.run, renamed(ask(name), f"{name}-")) for name, client in clients.items()
            }
            runs = {name: ran(each.result()) for name, each in waiting.items()}
        for name, run in runs.items():
            for how, nodes in told_of(run).items():
                assert nodes and all(node.startswith(f"{name}-") for node in nodes), (name, how, nodes)
        heard = []
        with pytest.raises(websocket.WebSocketTimeoutException):
            while True:
                heard.append(listener.recv())
        assert not [message for message in heard if isinstance(message, bytes)]
        assert {json.loads(message)["type"] for message in heard} <= {"status", "feature_flags"}
    finally:
        listener.close()

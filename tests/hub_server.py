"""A hub on this machine: what the real client asks of one, over HTTP, and the faults that a network has."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest

PAGE = b"<!doctype html><html><title>Sign in</title>Welcome to this network. Please sign in.</html>"


@dataclass(frozen=True)
class Answer:
    """What another server than the hub says: a sign-in page, unless told otherwise."""

    status: int = 200
    content: bytes = PAGE
    tags: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/html; charset=utf-8"})
    length: bool = True  # whether it says how long it is


class Hub:
    """Serves one folder as one model. Weights are large files, which the hub keeps elsewhere and redirects to.

    ``requests`` are what was asked, as ``METHOD path`` with the range of bytes, if one was asked for. The faults can
    be changed at any time:

        cut: name of a file -> after how many bytes of an answer the connection breaks.
        broken: names of files that the server answers with an error.
        pause: seconds to wait after each 4096 bytes of a large file.
        instead: name of a file, or "api" -> what another server answers in the place of its content.
        changed: what is made of the hub's description of the model.
        slow: names of large files that come with a second after each 4096 bytes.
        on_request: called at the beginning of each request.
    """

    def __init__(self, folder: Path, repo: str):
        self.folder, self.repo, self.commit = folder, repo, "a" * 40
        self.requests: list[str] = []
        self.cut: dict[str, int] = {}
        self.broken: set[str] = set()
        self.pause = 0.0
        self.instead: dict[str, Answer] = {}
        self.changed: Callable[[dict], object] = lambda about: about
        self.slow: set[str] = set()
        self.on_request: Callable[[], object] = lambda: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    @property
    def port(self) -> int:
        return self.server.server_port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def blobs(self) -> dict[str, str]:
        """What a cache calls the content of each file."""
        return {name: sum_of(self.folder / name) for name in self.names()}

    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        asked = {line.split()[1] for line in self.requests if line.startswith("GET")}
        small = {name for name in self.names() if f"/{self.repo}/resolve/{self.commit}/{name}" in asked}
        return {name for name in small if not is_large(name)} | {
            name for name in self.names() if is_large(name) and f"/cdn/{name}" in asked
        }

    def ranges(self, name: str) -> list[int]:
        """Where the requests for a large file's content began."""
        asked = [re.fullmatch(rf"GET /cdn/{re.escape(name)}(?: bytes=(\d+)-)?", line) for line in self.requests]
        return [int(match[1] or 0) for match in asked if match]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".pt"))


def sum_of(path: Path) -> str:
    """What the hub calls a file's content: SHA-256 for a large one, git's SHA-1 for a small one."""
    about = path.stat()
    return _sum_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(1024)
def _sum_of(path: Path, size: int, changed: int) -> str:
    """Computed once until a file's size or its time changes: tests ask again and again."""
    content = path.read_bytes()
    if is_large(path.name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(folder: Path, repo: str) -> Iterator[Hub]:
    hub = Hub(folder, repo)
    thread = Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def talk_to(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client in this process talk to ``hub``, with a cache of its own."""
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "DOWNLOAD_CHUNK_SIZE", 4096)  # the files here are smaller than its own 10 MB
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a program that talks to ``hub``, with a cache of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            url, asked = urlsplit(self.path), self.headers.get("Range")
            hub.on_request()
            hub.requests.append(f"{self.command} {url.path}{' ' + asked if asked else ''}")
            api, model = f"/api/models/{hub.repo}", f"/{hub.repo}/resolve/"
            if url.path == "/sign-in":
                self.other(Answer())
            elif url.path.startswith(api) and "api" in hub.instead:
                self.other(hub.instead["api"])
            elif url.path.startswith("/cdn/"):
                self.content(url.path.removeprefix("/cdn/"), {})
            elif url.path == api or url.path.startswith(f"{api}/revision/"):
                if url.path.rpartition("/")[2] not in ("main", hub.commit) and url.path != api:
                    return self.refuse("RevisionNotFound")
                blobs = "blobs" in parse_qs(url.query)
                files = [self.described(n) if blobs else {"rfilename": n} for n in hub.names()]
                self.json(hub.changed({"id": hub.repo, "modelId": hub.repo, "sha": hub.commit, "siblings": files}))
            elif url.path.startswith(model):
                revision, _, name = url.path.removeprefix(model).partition("/")
                if revision not in ("main", hub.commit):
                    return self.refuse("RevisionNotFound")
                if name not in hub.names():
                    return self.refuse("EntryNotFound")
                self.file(name)
            else:
                self.refuse("RepoNotFound")

        def described(self, name: str) -> dict:
            path = hub.folder / name
            about = {"rfilename": name, "size": path.stat().st_size, "blobId": sum_of(path)}
            if is_large(name):
                about["blobId"] = hashlib.sha1(name.encode()).hexdigest()  # of the pointer that stands for it
                about["lfs"] = {"sha256": sum_of(path), "size": path.stat().st_size, "pointerSize": 130}
            return about

        def file(self, name: str) -> None:
            if name in hub.broken:
                return self.send(503, b"", {})
            path, tags = hub.folder / name, {"X-Repo-Commit": hub.commit}
            if not is_large(name):
                return self.content(name, tags | {"ETag": f'"{sum_of(path)}"'})
            tags |= {"X-Linked-Etag": f'"{sum_of(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            self.send(302, b"", tags | {"Location": f"http://localhost:{hub.port}/cdn/{name}"})  # another host

        def content(self, name: str, tags: dict[str, str]) -> None:
            if name in hub.instead and self.command == "GET":
                return self.other(hub.instead[name])
            content = (hub.folder / name).read_bytes()
            begin = 0
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                begin = int(match[1])
                tags |= {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
            self.send(206 if match else 200, content[begin:], tags, name)

        def other(self, answer: Answer) -> None:
            self.send_response(answer.status)
            length = {"Content-Length": str(len(answer.content))} if answer.length else {"Connection": "close"}
            for key, value in (answer.tags | length).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.content)
            self.close_connection = not answer.length

        def json(self, content: object) -> None:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def refuse(self, code: str) -> None:
            self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status: int, content: bytes, tags: dict[str, str], name: str = "") -> None:
            self.send_response(status)
            for key, value in (tags | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = hub.cut.get(name, len(content))
            if not is_large(name) or not (hub.pause or name in hub.cut or name in hub.slow):
                self.wfile.write(content)
                return
            for begin in range(0, min(cut, len(content)), 4096):
                self.wfile.write(content[begin : min(begin + 4096, cut)])
                time.sleep(1 if name in hub.slow else hub.pause)
            if cut < len(content):
                self.close_connection = True

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass  # the client went away, as some tests make it do

        def log_message(self, *_: object) -> None:
            pass

    return Handler

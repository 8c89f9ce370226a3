"""The front end in a browser: Debian's chromium or another, driven by playwright, which does not bring one here.

The browser is looked for at ``BROWSER``, else by its usual names. The front ends are the one that ComfyUI pins and the
newest on PyPI, which is kept in the user's cache; ``FRONT_END`` names another version. Pictures of what was seen are
left in ``build/browser``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import ROOT, Comfy, serve

PACKAGE = "comfyui-frontend-package"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llada2-mlx-tests"


def pip(*arguments: str | Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def newest_front_end() -> Path:
    """The folder with the newest front end on PyPI, or the version that ``FRONT_END`` names."""
    wanted = f"{PACKAGE}=={version}" if (version := os.environ.get("FRONT_END")) else PACKAGE
    try:
        report = json.loads(pip("--dry-run", "--ignore-installed", "--report", "-", wanted))
        version = report["install"][0]["metadata"]["version"]
        folder = CACHE / f"front-end-{version}"
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
            pip("--target", part, f"{PACKAGE}=={version}")
            part.rename(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip does not get {wanted}: {error.stderr.strip()[-300:]}")
    return folder / "comfyui_frontend_package" / "static"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright import sync_api as api

    path = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium here; install one, or set BROWSER to its path")
    with api.sync_playwright() as playwright:
        # nothing outside this machine is asked; to intercept requests would slow all of them down
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=path, args=[alone])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["pinned", pytest.param("newest", marks=pytest.mark.whole)])
def front_end(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(front_end: str, browser, comfyui: tuple[Path, Path], base: Path, request: pytest.FixtureRequest) -> Iterator:
    """The page that the tests of one front end share, because it takes long to open."""
    from editor import Editor

    def opened(server: Comfy) -> Iterator:
        context = browser.new_context(viewport={"width": 1920, "height": 1080}, locale="en")
        yield Editor(context, server, ROOT / "build" / "browser" / front_end)
        context.close()

    if front_end == "pinned":
        yield from opened(request.getfixturevalue("comfy"))
    else:
        with serve(*comfyui, base, "--front-end-root", newest_front_end()) as server:
            yield from opened(server)


@pytest.fixture
def editor(page, request: pytest.FixtureRequest) -> Iterator:
    """The shared page, opened anew after a test that failed; nothing that is called an error may come of a test."""
    failed = request.session.testsfailed
    page.set_up()
    yield page
    if request.session.testsfailed > failed:
        page.keep(f"failed-{request.node.name}")
        page.again()
    faults = list(page.faults)
    page.faults.clear()
    assert not faults

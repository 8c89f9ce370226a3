"""Fixtures that the tests share. ``--golden DIR`` runs the parity tests on another golden directory.

A real ComfyUI is a server on a free port with this pack in it, and a client that talks to it. ComfyUI is looked for at
``COMFYUI_PATH``, else ``~/comfy/ComfyUI``; its interpreter at ``COMFYUI_PYTHON``, else in its own ``venv`` or
``.venv``. Where there is none, the tests that need it are skipped. The user's tree stays as it is: the server gets a
temporary base directory into which the pack is linked.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import demonstration
import pytest
from client import PACK, ROOT, Comfy, installed, serve

from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint

TESTS = Path(__file__).parent


def pytest_configure() -> None:
    """Let what the tests start be interrupted: a run in a shell's background ignores SIGINT, and so would its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", type=Path, default=TESTS / "golden", help="directory of golden fixtures (default: tests/golden)"
    )


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden")


@pytest.fixture(scope="session")
def checkpoint(golden: Path) -> Checkpoint:
    return Checkpoint(golden / "checkpoint")


@pytest.fixture(scope="session")
def backbone(checkpoint: Checkpoint) -> Backbone:
    return Backbone(checkpoint, "float32")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> demonstration.Demo:
    return demonstration.make(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="session")
def comfyui() -> tuple[Path, Path]:
    """ComfyUI's folder and its Python."""
    if (found := installed()) is None:
        pytest.skip(
            "no ComfyUI with a Python of its own was found; set COMFYUI_PATH and COMFYUI_PYTHON to run these tests"
        )
    folder, python = found
    ready = subprocess.run(
        [python, "-c", "import mlx.core, mlx_lm, transformers, diffusers, einops, torchdiffeq"],
        capture_output=True,
        text=True,
    )
    if ready.returncode:
        pytest.fail(
            f"ComfyUI's Python lacks a package: {ready.stderr}\nRun: {python} -m pip install -r {ROOT / 'requirements.txt'}"
        )
    return folder, python


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the pack, the golden checkpoint as a model of the user's, and a folder that is none."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    models = base / "models" / "llada2"
    models.mkdir(parents=True)
    (models / "golden").symlink_to(ROOT / "tests/golden/checkpoint")
    (models / "empty").mkdir()
    # the built-in model without its turbo decoder
    partial = models / "partial"
    partial.mkdir()
    for part in BUILT_IN.iterdir():
        if part.name != "decoder-turbo":
            (partial / part.name).symlink_to(part)
    # the built-in model as the hub's cache keeps one, in a place that extra_model_paths.yaml names
    kept = base / "elsewhere/hub/models--someone--shapes"
    (kept / "snapshots").mkdir(parents=True)
    (kept / "snapshots/abc").symlink_to(BUILT_IN)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    (base / "extra_model_paths.yaml").write_text(f"elsewhere:\n  base_path: {base}/elsewhere\n  llada2: hub\n")
    return base


@pytest.fixture(scope="session")
def comfy(comfyui: tuple[Path, Path], base: Path) -> Iterator[Comfy]:
    with serve(*comfyui, base) as client:
        yield client

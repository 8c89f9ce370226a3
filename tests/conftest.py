"""Fixtures that the tests share. ``--golden DIR`` runs the parity tests on another golden directory."""

from __future__ import annotations

import signal
from pathlib import Path

import demonstration
import pytest

from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint

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

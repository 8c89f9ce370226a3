"""A short run of every target of the library; ``make fuzz`` tries many more, and the nodes in ComfyUI's own interpreter too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from fuzz.harness import Target, fuzz
from fuzz.targets import TARGETS


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all targets, because they keep files: nothing is written outside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("fuzzed")))
        yield


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_is_put_in(target: Target) -> None:
    result = fuzz(target, max(3, 60 // target.cost), 0)
    if result.wrong:
        raise result.wrong
    assert result.tried >= 3

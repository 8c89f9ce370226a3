"""What the tests inside a real ComfyUI share; the server itself is in ``tests/conftest.py``."""

from __future__ import annotations

from zlib import crc32

import pytest


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A prompt that no other test draws, so that nothing of it is cached, in words that the toy knows."""
    return f"A red circle. ({crc32(request.node.name.encode())})"

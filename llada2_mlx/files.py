"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f".{os.getpid()}-{time.monotonic_ns():x}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

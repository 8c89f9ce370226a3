"""What a Mac would say of itself, for tests and tables that are made where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from llada2_mlx.backbone import precision, working
from llada2_mlx.imaging import decoder_copy, engine

MEMORY = (16, 24, 32, 48, 64)  # GiB


def recommended(memory: int) -> int:
    """Bytes that Metal recommends to use of so many GiB: two thirds, three quarters from 36 on.

    As Macs of 16, 32 and 64 GB have reported it: 10,922.67 (abetlen/llama-cpp-python#687), 21,845.34 (ollama/ollama#434)
    and 49,152 MiB (ggml-org/llama.cpp#1870).
    """
    return memory * 2**30 * 3 // 4 if memory >= 36 else memory * 2**30 * 2 // 3


@contextmanager
def as_on_metal(memory: int = 0) -> Iterator[None]:
    """In this context sizes are those of Metal: bf16 with few bits and of the decoder, no scores written out.

    Args:
        memory: bytes that it recommends to use.
    """
    with ExitStack() as stack:
        for module in (precision, working, decoder_copy):
            stack.enter_context(patch.object(module, "on_cpu", lambda: False))
        stack.enter_context(patch.object(engine, "machine_bytes", lambda: memory))
        yield

"""What the running node shows: its bar and its texts; and how a person ends its work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from comfy import model_management
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...llada2_mlx.progress import amount
from ...llada2_mlx.vq import VQGrid, picture_seed

if TYPE_CHECKING:
    from ...llada2_mlx.progress import OnStep, Progress

_TEXT_INTERVAL = 0.1  # seconds between two texts sent to the canvas


def progress(item: int = 0, items: int = 1) -> OnStep:
    """An ``OnStep`` that moves the running node's bar and ends the work when the user cancels.

    Args:
        item, items: which of how many equal pieces of work this is.
    """
    bar, phase, show = ProgressBar(1), "", progress_text()

    def step(at: Progress) -> None:
        nonlocal bar, phase
        model_management.throw_exception_if_processing_interrupted()
        if at.phase != phase:  # a bar does not go back
            bar, phase = ProgressBar(1), at.phase
        bar.update_absolute(item * at.total + at.done, items * at.total)
        if at.in_bytes:  # it takes so long that a person wants to know how much is left
            show(f"{at.phase}: {amount(at.done)} of {amount(at.total)}", final=at.done == at.total)

    return step


def pictures(grids: tuple[VQGrid, ...], seed: int) -> Iterator[tuple[VQGrid, int, OnStep]]:
    """Each grid of a batch, with the seed and the ``OnStep`` of its own."""
    for index, grid in enumerate(grids):
        yield grid, picture_seed(seed, index), progress(index, len(grids))


def progress_text() -> Callable[..., None]:
    """A function that shows a growing text on the running node; with ``final=True`` at once, else not too often."""
    context, last = get_executing_context(), 0.0

    def show(text: str, final: bool = False) -> None:
        nonlocal last
        if context is not None and (final or time.monotonic() - last >= _TEXT_INTERVAL):
            last = time.monotonic()
            PromptServer.instance.send_progress_text(text, context.node_id)

    return show


def tell(sentence: str | None, level: int = logging.INFO, shown: str = "{}") -> None:
    """Show a sentence on the running node, and write it to the log; None is nothing to tell."""
    if sentence is None:
        return
    logging.log(level, "ComfyUI-LLaDA2-MLX: %s", sentence)
    if (context := get_executing_context()) is not None:
        PromptServer.instance.send_progress_text(shown.format(sentence), context.node_id)


def warn(sentence: str | None) -> None:
    """The same for a warning."""
    tell(sentence, logging.WARNING, "Warning: {}")

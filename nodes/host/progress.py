"""What the running node shows: its bar and its texts; and how a person ends its work."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from comfy import model_management
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...llada2_mlx.progress import Pace, amount
from ...llada2_mlx.vq import GridSet, Pictures, VQGrid, picture_seed
from ...llada2_mlx.vq import readings as vq_readings
from .dependencies import explains_imports

if TYPE_CHECKING:
    from PIL import Image

    from ...llada2_mlx.progress import Progress

_TEXT_INTERVAL = 0.1  # seconds between two texts sent to the canvas


class progress:  # called as the function that it makes is
    """An ``OnStep`` that moves the running node's bar and ends the work when the user cancels.

    Args:
        item, items: which of how many equal pieces of work this is.
    """

    def __init__(self, item: int = 0, items: int = 1) -> None:
        self._item, self._items = item, items
        self._bar, self._phase, self._show = ProgressBar(1), "", progress_text(passing=True)

    def __call__(self, at: Progress) -> None:
        model_management.throw_exception_if_processing_interrupted()
        if at.phase != self._phase:  # a bar does not go back
            self._bar, self._phase = ProgressBar(1), at.phase
            _shown.end_passing()
        self._bar.update_absolute(self._item * at.total + at.done, self._items * at.total)
        if at.in_bytes:  # it takes so long that a person wants to know how much is left
            self._show(f"{at.phase}: {amount(at.done)} of {amount(at.total)}", final=at.done == at.total)

    def preview(self, picture: Image.Image) -> None:
        """Show a picture on the node where it stands."""
        self._bar.update_absolute(self._bar.current, preview=("PNG", picture, None))


def readings(vq: tuple[VQGrid, ...] | GridSet, seed: int) -> Iterator[tuple[Pictures, int, progress]]:
    """Each picture of a batch, or a set as a whole, with the seed and the ``OnStep`` of its own."""
    together = vq_readings(vq)
    for index, pictures in enumerate(together):
        yield pictures, picture_seed(seed, index), progress(index, len(together))


def progress_text(passing: bool = False) -> Callable[..., None]:
    """A function that shows a growing text on the running node; with ``final=True`` at once, else not too often.

    Args:
        passing: the text is of no use when its phase is over.
    """
    pace = Pace(_TEXT_INTERVAL)

    def show(text: str, final: bool = False) -> None:
        if pace.due(at_once=final):
            _shown.write(text, passing)

    return show


def tell(sentence: str | None, level: int = logging.INFO, shown: str = "{}", leaving: bool = False) -> None:
    """Show a sentence on the running node for as long as its outcome, and write it to the log; None is nothing to tell.

    Args:
        shown: how it is shown.
        leaving: it goes when the node ends.
    """
    if sentence is None:
        return
    logging.log(level, "ComfyUI-LLaDA2-MLX: %s", sentence)
    _shown.add_note(shown.format(sentence), leaving)


def warn(*sentences: str | None) -> None:
    """The same for warnings."""
    for sentence in sentences:
        tell(sentence, logging.WARNING, "Warning: {}")


def explains(execute: Callable) -> Callable:
    """For a node's ``execute``: clears what the node showed of an earlier run, and shows why this one failed."""
    explained = explains_imports(execute)

    @functools.wraps(execute)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _shown.clear()
        try:
            return explained(*args, **kwargs)
        except Exception as error:  # not an interruption, which is no Exception
            _shown.clear(str(error))
            raise
        finally:
            _shown.end()

    return wrapper


class _Shown:
    """What the running node shows: notes that stay for as long as its outcome, those that leave when it ends, and one text below."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.leaving: list[str] = []
        self.text, self.passing = "", False
        self._written: set[str] = set()  # nodes that have shown a text

    def write(self, text: str, passing: bool = False) -> None:
        """Show ``text``; one that is ``passing`` is of no use when its phase is over."""
        self.text, self.passing = text, passing
        context, whole = get_executing_context(), "\n\n".join(filter(None, [*self.notes, *self.leaving, text]))
        # outside a run there is no server, and a node that has shown nothing has no room for a text yet
        if context is not None and (whole or context.node_id in self._written):
            self._written.add(context.node_id)
            _send(whole, context.node_id)

    def add_note(self, note: str, leaving: bool = False) -> None:
        (self.leaving if leaving else self.notes).append(note)
        self.write(self.text, self.passing)

    def clear(self, text: str = "") -> None:
        """Show nothing of what was there before, or ``text`` alone."""
        self.notes.clear()
        self.leaving.clear()
        self.write(text)

    def end_passing(self) -> None:
        if self.passing:
            self.write("")

    def end(self) -> None:
        """The node has ended: what is of use while it runs alone goes."""
        self.end_passing()
        if self.leaving:
            self.leaving.clear()
            self.write(self.text)


_shown = _Shown()  # one node runs at a time


def _send(text: str, node: str) -> None:
    """Send a text for a node to the client that queued the prompt.

    A text without a client goes to everyone, and lands on whatever node of another graph has the same number.
    """
    if (client := PromptServer.instance.client_id) is not None:
        PromptServer.instance.send_progress_text(text or " ", node, client)  # the canvas ignores an empty text

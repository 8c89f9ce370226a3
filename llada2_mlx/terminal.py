"""A conversation in a terminal, or in a pipe."""

from __future__ import annotations

import io
import shlex
import sys
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import chat, prompts
from .backbone.acceptance import Sampling
from .backbone.handle import Backbone
from .backbone.sprint import Sprint
from .errors import LLaDA2Error, RequestError
from .progress import OnStep, Progress
from .tasks import readable
from .vq import Pictures

if TYPE_CHECKING:
    from PIL import Image

HELP = """\
/image FILE  show a picture with what you say next; several are shown together
/reset       begin a new conversation
/help        this
/exit        leave, as Ctrl-D does; Ctrl-C ends an answer
A message that begins with a slash needs a space before it."""


@dataclass
class Terminal:
    """Reads messages line by line, and writes each answer as it settles.

    Args:
        backbone: who answers.
        open_picture: a picture from a file; raises ``RequestError`` where it is none.
        encode: pictures as codes, one or a set.
        bars: shows the progress of what is not the answer, which shows itself.
        conversation: what was said so far; its system text stays after ``/reset``.
        sampling, max_new_tokens, sprint: see ``chat.reply``.
        interactive: whether a person sits there, who wants to be prompted.
        failures: how many lines could not be done.
    """

    backbone: Backbone
    open_picture: Callable[[str], Image.Image]
    encode: Callable[[Sequence[Image.Image]], Pictures]
    bars: Callable[[], AbstractContextManager[OnStep]]
    conversation: chat.Conversation
    sampling: Sampling
    max_new_tokens: int
    sprint: Sprint | None = None
    interactive: bool = False
    failures: int = 0
    images: list[Image.Image] = field(default_factory=list)

    def run(self) -> None:
        """Talk until ``/exit`` or the end of the input."""
        if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused like any other, line by line
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.interactive:
            _tell("Say something, or /help.")
        while True:
            try:
                line = input("> " if self.interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                _tell("\n(/exit or Ctrl-D leaves)")
                continue
            try:
                if line.strip() in ("/exit", "/quit"):
                    return
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif prompts.trim(line):
                    self._say(line)
            except (LLaDA2Error, OSError) as error:
                self.failures += 1
                _tell(f"llada2-mlx: {error}")
            except KeyboardInterrupt:
                _tell("\n(stopped)")

    def _command(self, name: str, rest: str = "") -> None:
        rest = rest.strip()
        if name == "/image" and rest:
            self.images.append(self.open_picture(_path(rest)))
        elif name == "/reset" and not rest:
            self.conversation, self.images = chat.Conversation(self.conversation.system), []
            _tell("(a new conversation)")
        elif name == "/help":
            _tell(HELP)
        else:
            raise RequestError(f"{name} {rest}".rstrip() + f" is no command. The commands are:\n{HELP}")

    def _say(self, text: str) -> None:
        """Answer a message. What was settled when a person ended the answer stays as the answer."""
        images, self.images = self.images, []
        pictures, written = self.encode(images) if images else None, _Written()
        ids: list[int] = []

        def step(progress: Progress) -> None:
            nonlocal ids
            on_step(progress)
            if progress.generated:
                ids = chat.settled(self.backbone.tokens, progress)[: self.max_new_tokens]
                written.grow(readable(self.backbone, tuple(ids)))

        options = {"max_new_tokens": self.max_new_tokens, "sampling": self.sampling, "sprint": self.sprint}
        try:
            with self.bars() as on_step:
                answer = chat.reply(self.backbone, self.conversation, text, pictures, on_step=step, **options)
        except KeyboardInterrupt:
            written.end()
            if not ids:
                _tell("(stopped before there was an answer; what you said is forgotten)")
                return
            _tell("(stopped)")
            self.conversation = self.conversation.and_then(chat.answered(self.backbone, text, pictures, ids))
            return
        except BaseException:
            written.end()
            raise
        written.grow(answer.text)
        written.end(line=True)
        if not answer.text:
            _tell("(the model ended its answer before the first word)")
        self.conversation = answer.conversation


class _Written:
    """An answer on standard output, as far as it is written."""

    def __init__(self) -> None:
        self.text = ""

    def grow(self, text: str) -> None:
        """Write what ``text`` has more than is there."""
        if text.startswith(self.text):
            print("".join(filter(_shows, text[len(self.text) :])), end="", flush=True)
            self.text = text

    def end(self, *, line: bool = False) -> None:
        """End the line, if there is one; with ``line`` also an empty one."""
        if self.text or line:
            print(flush=True)


def _shows(character: str) -> bool:
    """Whether a character is no control character, which could do anything to a terminal."""
    return character in "\n\t" or unicodedata.category(character) != "Cc"


def _path(written: str) -> str:
    """The path that was written, or dragged into the window, which puts quotes or backslashes where there are spaces."""
    if not Path(written).expanduser().exists():
        try:
            words = shlex.split(written)
        except ValueError:  # an apostrophe in a name
            words = []
        written = words[0] if len(words) == 1 else written
    return str(Path(written).expanduser())


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

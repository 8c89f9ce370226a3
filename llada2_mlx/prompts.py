"""Task -> token ids, conditional and unconditional, as the model was trained on them.

Each piece is tokenised alone and the ids are joined. ``<uncondition>`` is plain text, not a special token.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RequestError
from .tokens import Tokens
from .vq import VQGrid

_HUMAN = "<role>HUMAN</role>"
_ASSISTANT = "<role>ASSISTANT</role>"
_DRAW = f"<role>SYSTEM</role> You are a text-to-image generation assistant. {_HUMAN}"
_EDIT = f"<role>SYSTEM</role> You are an image editing assistant. {_HUMAN}"
_UNCONDITION = "<uncondition>"


@dataclass(frozen=True)
class Prompt:
    """Token ids of a request: the conditional branch first, then the branches that guidance compares it with."""

    branches: tuple[list[int], ...]

    @property
    def conditional(self) -> list[int]:
        return self.branches[0]


def text_to_image(tokens: Tokens, prompt: str, height: int, width: int) -> Prompt:
    """Branches: conditional, unconditional. ``height`` and ``width`` are the grid's, in codes."""
    header = tokens.header(height, width)
    ask = lambda text: [*tokens.encode(_DRAW), *tokens.encode(text), *tokens.encode(_ASSISTANT), *header]
    return Prompt((ask(prompt), ask(_UNCONDITION)))


def understand(tokens: Tokens, grid: VQGrid, question: str) -> Prompt:
    """One branch: the picture, then the question; no system text and no roles."""
    return Prompt(([*_picture(tokens, grid), *tokens.encode(question)],))


def edit(tokens: Tokens, grid: VQGrid, instruction: str) -> Prompt:
    """Branches: conditional, without the instruction, without the picture. The result has the picture's size."""
    picture, header = _picture(tokens, grid), tokens.header(grid.height, grid.width)
    ask = lambda source, text: [
        *tokens.encode(_EDIT),
        *source,
        *tokens.encode(text),
        *tokens.encode(_ASSISTANT),
        *header,
    ]
    return Prompt((ask(picture, instruction), ask(picture, _UNCONDITION), ask([tokens.image], instruction)))


def require_text(text: str, what: str) -> str:
    """``text``, unless there is nothing in it.

    Raises:
        RequestError: the text is empty or blank.
    """
    if not text.strip():
        raise RequestError(f"The {what} is empty. Write what you want.")
    return text


def _picture(tokens: Tokens, grid: VQGrid) -> list[int]:
    if grid.codebook_size != tokens.codebook_size:
        raise RequestError(
            f"The grid's codes are of a codebook of {grid.codebook_size}, the model {tokens.folder.name} has {tokens.codebook_size}. "
            "Encode the picture with the image tokenizer of the same model."
        )
    return [*tokens.header(grid.height, grid.width), *tokens.codes_to_ids(grid.to_list()), tokens.image_end]

"""Task -> token ids, conditional and unconditional, as the model was trained on them.

Each piece is tokenised alone and the ids are joined. ``<uncondition>`` is plain text, not a special token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .errors import RequestError
from .tokens import Tokens, UserText
from .vq import Pictures, VQGrid, grids_of

_HUMAN = "<role>HUMAN</role>"
_ASSISTANT = "<role>ASSISTANT</role>"
_DRAW = f"<role>SYSTEM</role> You are a text-to-image generation assistant. {_HUMAN}"
_THINK = f"<role>SYSTEM</role> You are a text-to-image generation assistant with a thinking process. {_HUMAN}"
_EDIT = f"<role>SYSTEM</role> You are an image editing assistant. {_HUMAN}"
_TELL = f"<role>SYSTEM</role> You are a interleaved generation assistant. {_HUMAN}"  # so in the model's training
_UNCONDITION = "<uncondition>"
_TALK = "You are a multimodal understanding assistant."

# What shows nothing, beside spaces and control characters: soft hyphen, joiners, zero widths, directions, byte order
# mark, fillers. Not what ends an emoji: variation selectors, tags.
_UNSEEN = frozenset(
    "\u00ad\u034f\u061c\u115f\u1160\u180e\u2800\u3164\ufeff\uffa0"
    + "".join(map(chr, (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070))))
)

# Sides in pixels at which every model has size tokens (8 to 254 codes, even).
SMALLEST_SIDE, LARGEST_SIDE, SIDE_STEP = 256, 8128, 64


class Seeing(Enum):
    """What the model sees while it redraws a part of a picture."""

    PICTURE = "the whole picture"  # as the source of an edit
    BEFORE = "what comes before"  # as when it draws: blocks of codes in the order of rows


@dataclass(frozen=True)
class Prompt:
    """Token ids of a request: the conditional branch first, then the branches that guidance compares it with."""

    branches: tuple[list[int], ...]

    @property
    def conditional(self) -> list[int]:
        return self.branches[0]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: what a person said, and the answer.

    Args:
        text, pictures: what was said, and shown with it.
        answer: the answer's text.
        ids: its ids, without the token that ended it.
        tokenizer: the fingerprint of the tokenizer that the ids are of. Another one reads the text.
    """

    text: str
    pictures: Pictures | None = None
    answer: str = ""
    ids: tuple[int, ...] = ()
    tokenizer: str = ""


def text_to_image(tokens: Tokens, prompt: str, height: int, width: int) -> Prompt:
    """Branches: conditional, unconditional. ``height`` and ``width`` are the grid's, in codes."""
    header = tokens.header(height, width)
    return Prompt(tuple([*_ask(tokens, _DRAW, text), *header] for text in (prompt, _UNCONDITION)))


def thinking(tokens: Tokens, prompt: str, height: int, width: int) -> Prompt:
    """Branches: conditional, up to where the model begins to think and chooses a size of its own; unconditional, with the
    header of ``height x width`` codes.
    """
    header = tokens.header(height, width)
    return Prompt((_ask(tokens, _THINK, prompt), [*_ask(tokens, _THINK, _UNCONDITION), *header]))


def understand(tokens: Tokens, pictures: Pictures, question: str) -> Prompt:
    """One branch: the picture, or several one after the other, then the question; no system text and no roles."""
    return Prompt(([*blocks(tokens, pictures), *written(tokens, question)],))


def edit(tokens: Tokens, pictures: Pictures, instruction: str, size: tuple[int, int] | None = None) -> Prompt:
    """Branches: conditional, without the instruction, without the picture.

    Of several pictures the last is the one to be changed, and those before it are references, each an image block of its
    own. "Without the picture" is without all of them, one ``<|image|>`` alone: the branch that the model knows from
    editing one picture, and what it says of a picture when it sees none.

    Args:
        size: rows and columns of codes of the result; None is the picture's.
    """
    grid = grids_of(pictures)[-1]
    picture, header = blocks(tokens, pictures), tokens.header(*(size or (grid.height, grid.width)))
    ask = lambda source, text: [
        *tokens.encode(_EDIT),
        *source,
        *written(tokens, text),
        *tokens.encode(_ASSISTANT),
        *header,
    ]
    return Prompt((ask(picture, instruction), ask(picture, _UNCONDITION), ask([tokens.image], instruction)))


def story(tokens: Tokens, prompt: str) -> Prompt:
    """One branch, after which the model writes texts and pictures in turn."""
    return Prompt((_ask(tokens, _TELL, prompt),))


def story_picture(
    tokens: Tokens, told: Sequence[int], text: Sequence[int], header: Sequence[int], first: bool
) -> Prompt:
    """Branches of a picture in a story: conditional, then unconditional for the first picture; without the text and
    without the pictures before it for a later one.

    Args:
        told: ids from the request up to the last picture's end, or the request alone.
        text: ids after that.
        header: of the picture that comes now.
    """
    nothing = _ask(tokens, _TELL, _UNCONDITION)
    others = [[*nothing]] if first else [[*told, *written(tokens, _UNCONDITION)], [*nothing, *text]]
    return Prompt(tuple([*branch, *header] for branch in ([*told, *text], *others)))


def chat(
    tokens: Tokens, turns: Sequence[Turn], text: str, pictures: Pictures | None = None, system: str = ""
) -> Prompt:
    """One branch: a conversation, and what is said now, up to where the answer is to begin.

    Text alone is written by the tokenizer's own chat template. With pictures, or without a template, a conversation is
    the system text and its turns by roles, each with its pictures before its text.

    Args:
        turns: what was said and answered before.
        system: what the model is told of its part; empty is what it was trained with.

    Raises:
        RequestError: a picture is of another model or has no size token, or the text is not valid Unicode.
        CheckpointError: the template cannot write the conversation.
    """
    system, turns = trim(system), [*turns, Turn(text, pictures)]
    said = [UserText(trim(turn.text)) for turn in turns]
    answers = [_answer(tokens, turn) for turn in turns[:-1]]
    if all(turn.pictures is None for turn in turns):
        roles = [*(["system"] if system else []), *["user", "assistant"] * len(answers), "user"]
        messages = [*([UserText(system)] if system else []), *_alternating(said, answers)]
        if (around := tokens.around(roles)) is not None:
            return Prompt((tokens.encode_parts(_alternating(around, messages)),))
    parts: list[str | list[int]] = ["<role>SYSTEM</role> ", UserText(system or _TALK), " "]
    for turn, own, answer in zip(turns, said, [*answers, []], strict=True):
        parts += [_HUMAN, blocks(tokens, turn.pictures) if turn.pictures else [], own, _ASSISTANT, answer]
    return Prompt((tokens.encode_parts(parts),))


def _answer(tokens: Tokens, turn: Turn) -> list[int]:
    return list(turn.ids) if turn.tokenizer == tokens.fingerprint else tokens.encode_text(turn.answer)


def _alternating(one: Sequence, other: Sequence) -> list:
    """``one`` and ``other`` in turn; ``one`` begins and ends."""
    return [each for pair in zip(one, [*other, None], strict=True) for each in pair][:-1]


def written(tokens: Tokens, text: str) -> list[int]:
    """Ids of what a user wrote, without what is unseen at its ends. Every text of a user goes through here."""
    return tokens.encode_text(trim(text))


def trim(text: str) -> str:
    """``text`` without spaces, line ends and other unseen characters at its ends: they would change the answer."""
    seen = [index for index, character in enumerate(text) if not _unseen(character)]
    return text[seen[0] : seen[-1] + 1] if seen else ""


def require_text(text: str, what: str) -> str:
    """``text`` without what is unseen at its ends, unless nothing is left.

    Raises:
        RequestError: the text is empty or blank.
    """
    if not (text := trim(text)):
        raise RequestError(f"The {what} is empty. Write what you want.")
    return text


def require_size(width: int, height: int) -> None:
    """Check the size of a picture to draw, in pixels, as far as it can be known without the model.

    Raises:
        RequestError: a side is neither 0 (the model's own size) nor a multiple of 64 from 256 to 8128.
    """
    for name, side in (("width", width), ("height", height)):
        if side not in (0, *range(SMALLEST_SIDE, LARGEST_SIDE + 1, SIDE_STEP)):
            raise RequestError(
                f"The {name} is {side}; it has to be 0 (the model's own size) or a multiple of {SIDE_STEP} "
                f"from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels."
            )


def _unseen(character: str) -> bool:
    return character.isspace() or character in _UNSEEN or unicodedata.category(character) == "Cc"


def side_or_own(side: int) -> int:
    """A side as a widget gives it, which starts at 0 and steps up: below the smallest it is 0, the model's own."""
    return 0 if 0 <= side < SMALLEST_SIDE and side % SIDE_STEP == 0 else side


def blocks(tokens: Tokens, pictures: Pictures) -> list[int]:
    """Ids of pictures as image blocks, one after the other: header, codes, ``<|/image|>``.

    Raises:
        RequestError: a grid is of another model, or has no size token.
    """
    return [token for grid in grids_of(pictures) for token in _picture(tokens, grid)]


def _ask(tokens: Tokens, system: str, text: str) -> list[int]:
    return [*tokens.encode(system), *written(tokens, text), *tokens.encode(_ASSISTANT)]


def require_codebook(tokens: Tokens, grid: VQGrid) -> None:
    """Raise ``RequestError`` if a grid's codes are of a codebook of another size than the model's."""
    if grid.codebook_size != tokens.codebook_size:
        raise RequestError(
            f"The grid's codes are of a codebook of {grid.codebook_size}, the model {tokens.folder.name} has {tokens.codebook_size}. "
            "Encode the picture with the image tokenizer of the same model."
        )


def _picture(tokens: Tokens, grid: VQGrid) -> list[int]:
    require_codebook(tokens, grid)
    return [*tokens.header(grid.height, grid.width), *tokens.codes_to_ids(grid.to_list()), tokens.image_end]

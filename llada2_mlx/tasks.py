"""What a user asks of the backbone: a drawing, an answer, an edit. One function a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from . import prompts
from .backbone.acceptance import Sampling
from .backbone.denoising import Draft, Method, Vocabulary, check_length, generate
from .backbone.guidance import Guidance
from .backbone.handle import Backbone
from .backbone.session import Report
from .checkpoint.codebook import origin, require_same
from .checkpoint.sizes import DECODED_PIXELS, DEFAULT_DRAWING
from .errors import RequestError
from .progress import OnStep, Progress, ignore
from .tokens import Tokens
from .vq import Pictures, VQGrid, grids_of

# What bytes that are no whole character are read as.
HALF = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Drawing:
    """A grid of codes, and what it took."""

    grid: VQGrid
    report: Report


@dataclass(frozen=True)
class Answer:
    """A text, its token ids, and what it took."""

    text: str
    ids: list[int]
    report: Report


def text_to_vq(
    backbone: Backbone,
    prompt: str,
    width: int = 0,
    height: int = 0,
    guidance: float = 2.0,
    rescale: float = 0.7,
    sampling: Sampling = Sampling(steps=8),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
) -> Drawing:
    """Draw a picture as codes.

    Args:
        prompt: what to draw, in any language.
        width, height: of the decoded picture in pixels, multiples of 32; 0 is the model's own size.
        guidance: scale of the simple classifier-free guidance; 1 is none.
        rescale: see ``guidance.Guidance``.
        sampling, method: how tokens are chosen, and how the network is run.

    Returns:
        A grid of ``height / 32 x width / 32`` codes.

    Raises:
        RequestError: the size has no size token, or the prompt is too long; before anything runs.
    """
    rows, columns = grid_size(backbone, width, height)
    request = prompts.text_to_image(backbone.tokens, prompt, rows, columns)
    return _draw(backbone, request, rows, columns, Guidance.simple(guidance, rescale), sampling, method, on_step)


def edit(
    backbone: Backbone,
    pictures: Pictures,
    instruction: str,
    text_guidance: float = 4.0,
    image_guidance: float = 0.0,
    rescale: float = 0.7,
    sampling: Sampling = Sampling(steps=8),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
) -> Drawing:
    """Draw a picture anew, changed as the instruction says. The result has its size.

    Args:
        pictures: the picture as codes, prepared for editing; or a set, whose last picture is the one to be changed, and
            the others are what the instruction refers to, of any sizes.
        text_guidance, image_guidance: how strongly to follow the instruction, and to keep to the picture.
        sampling, method: how tokens are chosen, and how the network is run.

    Raises:
        RequestError: the grid is of another model or has no size token, or the request is too long.
    """
    request = prompts.edit(backbone.tokens, pictures, instruction)
    _require_same(pictures, backbone)
    guidance, grid = Guidance.editing(text_guidance, image_guidance, rescale), grids_of(pictures)[-1]
    check_room(backbone, len(request.conditional), grid.height * grid.width, pictures)
    return _draw(backbone, request, grid.height, grid.width, guidance, sampling, method, on_step)


def understand(
    backbone: Backbone,
    pictures: Pictures,
    question: str,
    max_new_tokens: int = 2048,
    sampling: Sampling = Sampling(steps=32),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer a question about a picture, or about several together.

    Args:
        pictures: the picture as codes, prepared for understanding; or a set, which the question can count in its order.
        max_new_tokens: the answer's length at most.
        on_text: called after each step with the answer so far; a stretch not yet denoised reads "…".
        sampling, method: how tokens are chosen, and how the network is run.

    Raises:
        RequestError: the grid is of another model or has no size token, or the request is too long.
    """
    tokens = backbone.tokens
    request = prompts.understand(tokens, pictures, question)
    _require_same(pictures, backbone)
    check_room(backbone, len(request.conditional), max_new_tokens, pictures)

    def step(progress: Progress) -> None:
        on_step(progress)
        if on_text and progress.generated:
            on_text(readable(backbone, progress.generated[:max_new_tokens]))

    vocabulary = Vocabulary(tokens.mask, ends=frozenset({tokens.end}))
    options = {"sampling": sampling, "method": method, "on_step": step}
    done = backbone.run(generate, Draft.blank(request.branches, max_new_tokens, tokens.mask), vocabulary, **options)
    return Answer(_whole(tokens, done.ids), done.ids, done.report)


def grid_size(backbone: Backbone, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of codes for a picture of ``width x height`` pixels; 0 is the model's own size.

    Raises:
        RequestError: a side is no multiple of 32 pixels, or no size token exists for it.
    """
    own = backbone.checkpoint.image_sizes.drawing or DEFAULT_DRAWING
    width, height = width or own, height or own
    if width % DECODED_PIXELS or height % DECODED_PIXELS or min(width, height) < 0:
        raise RequestError(
            f"The size is {width} x {height} pixels; both sides have to be multiples of {DECODED_PIXELS}."
        )
    rows, columns = height // DECODED_PIXELS, width // DECODED_PIXELS
    backbone.tokens.check_size(rows, columns)
    return rows, columns


def check_room(backbone: Backbone, prompt: int, length: int, *pictures: Pictures) -> None:
    """Raise ``RequestError`` if a prompt with pictures, and what is asked for, are longer than the model allows.

    Args:
        prompt, length: in tokens; pictures and all.
    """
    grids = [grid for each in pictures for grid in grids_of(each)]
    try:
        check_length(prompt, length, backbone.config.max_position_embeddings)
    except RequestError as error:
        if len(grids) < 2:
            raise
        codes = sum(grid.codes.size for grid in grids)
        raise RequestError(
            f"{error} The {len(grids)} pictures alone have {codes} codes: take fewer of them, or encode them smaller."
        ) from None


def readable(backbone: Backbone, ids: tuple[int, ...]) -> str:
    """The text of an answer that is still being denoised, up to its end token.

    A character may be several tokens. What of one is there, next to a mask or to the end of ``ids``, is not shown.
    """
    tokens, pieces = backbone.tokens, []
    ended = tokens.end in ids
    known = ids[: ids.index(tokens.end)] if ended else ids
    runs = [(masked, list(run)) for masked, run in groupby(known, tokens.mask.__eq__)]
    for index, (masked, run) in enumerate(runs):
        last = index == len(runs) - 1
        text = _whole(tokens, run) if last and not ended else tokens.decode(run)
        text = text if last else text.rstrip(HALF)
        text = text.lstrip(HALF) if index else text
        if masked and pieces[-1:] != [None]:
            pieces.append(None)
        elif text:
            pieces.append(text)
    return "".join("…" if piece is None else piece for piece in pieces)


def _require_same(pictures: Pictures, backbone: Backbone) -> None:
    for grid in grids_of(pictures):
        require_same(grid, backbone.checkpoint)


def _whole(tokens: Tokens, ids: list[int]) -> str:
    """The text of ``ids``, without the part of a character that they may end with where they are cut."""
    text = tokens.decode(ids)
    # an end token, or another that is no text, says that what stands before it was not cut
    return text.rstrip(HALF) if tokens.decode(ids[-1:]) else text


def _draw(
    backbone: Backbone,
    request: prompts.Prompt,
    rows: int,
    columns: int,
    guidance: Guidance,
    sampling: Sampling,
    method: Method,
    on_step: OnStep,
) -> Drawing:
    length, offset = rows * columns, backbone.config.image_token_offset
    check_length(len(request.conditional), length, backbone.config.max_position_embeddings)
    vocabulary = Vocabulary(backbone.tokens.mask, first=offset)
    draft = Draft.blank(request.branches, length, vocabulary.mask)
    options = {"sampling": sampling, "guidance": guidance, "method": method, "on_step": on_step}
    done = backbone.run(generate, draft, vocabulary, **options)
    codes = [token - offset for token in done.ids]
    made = VQGrid.from_list(codes, rows, columns, backbone.config.codebook_size, origin(backbone.checkpoint))
    return Drawing(made, done.report)

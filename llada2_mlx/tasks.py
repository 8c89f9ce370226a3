"""What a user asks of the backbone: a drawing, an answer, an edit. One function a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from . import prompts
from .backbone.acceptance import Sampling
from .backbone.denoising import (
    DENOISING,
    Draft,
    Generation,
    Method,
    Vocabulary,
    add_branches,
    check_length,
    generate,
    require_length,
)
from .backbone.guidance import Guidance
from .backbone.handle import Backbone, Steps
from .backbone.network import LLaDA2
from .backbone.session import Report
from .backbone.sprint import Sprint
from .backbone.working import Batch
from .checkpoint.codebook import origin, require_same
from .checkpoint.sizes import DECODED_PIXELS, DEFAULT_DRAWING
from .errors import RequestError
from .grids import require_added, require_covered
from .progress import OnStep, Progress, ignore
from .prompts import Seeing
from .tokens import Tokens
from .vq import Pictures, VQGrid, grids_of, picture_seed

# Called after every step of drawing with the codes so far, integers [height, width], and with which of them are still to be
# drawn, bool [height, width]; of the first picture where several are drawn together.
OnCodes = Callable[[np.ndarray, np.ndarray], None]
# How the progress calls the writing of the plan before a picture.
THINKING = "thinking"
_NO_SPRINT = "SPRINT is not used in editing, as published: the picture was drawn exactly."
# Pictures that are drawn together at most.
MOST_PICTURES = 64
# What bytes that are no whole character are read as.
HALF = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Drawing:
    """What was drawn, and what it took.

    Args:
        grids: a grid of codes for each picture.
        report: of all of them together.
        confidence: for each picture, the probability with which each code was accepted, float32 [height, width].
        masked: which codes were drawn, bool [height, width], where others were kept; else None.
        reasoning: what the model wrote before it drew, where it was to think.
        warnings: sentences on what was not done as it was asked for.
    """

    grids: tuple[VQGrid, ...]
    report: Report
    confidence: tuple[np.ndarray, ...]
    masked: np.ndarray | None = None
    reasoning: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def grid(self) -> VQGrid:
        """The grid of the only picture."""
        (grid,) = self.grids
        return grid


@dataclass(frozen=True)
class Thinking:
    """How the model plans a picture in words before it draws it.

    Args:
        steps: denoising steps for a block of the plan.
        length: tokens of the plan at most, the header of the picture included.
        temperature: of the plan; see ``Sampling``.

    Raises:
        RequestError: a value is out of range.
    """

    steps: int = 32
    length: int = 4096
    temperature: float = 0.0

    def __post_init__(self) -> None:
        Sampling(steps=self.steps, temperature=self.temperature)  # says what is out of range
        require_length(self.length)


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
    thinking: Thinking | None = None,
    on_text: Callable[[str], None] | None = None,
    sprint: Sprint | None = None,
    pictures: int = 1,
    on_codes: OnCodes | None = None,
) -> Drawing:
    """Draw a picture as codes, or several.

    Args:
        prompt: what to draw, in any language.
        width, height: of the decoded picture in pixels, multiples of 32; 0 is the model's own size.
        guidance: scale of the simple classifier-free guidance; 1 is none.
        rescale: see ``guidance.Guidance``.
        sampling, method: how tokens are chosen, and how the network is run.
        thinking: None draws at once. Else the model plans in words first, and may choose another size than asked; the
            picture is drawn in the same session.
        on_text: called with the plan so far.
        sprint: None is exact; see ``sprint.Sprint``.
        pictures: how many to draw. They run together, with seeds ``seed``, ``seed + 1`` and so on, and each is what it would
            be alone; so they differ above temperature 0 alone.
        on_codes: called with the codes so far.

    Returns:
        Grids of ``height / 32 x width / 32`` codes, or of the size that the model chose.

    Raises:
        RequestError: the size has no size token, the prompt is too long or the number of pictures is out of range, before
            anything runs; the model did not begin a picture in what it wrote, after that.
    """
    require_pictures(pictures)
    rows, columns = grid_size(backbone, width, height)
    guided, seeds = Guidance.simple(guidance, rescale), [picture_seed(sampling.seed, i) for i in range(pictures)]
    options = {"sampling": sampling, "method": method, "sprint": sprint}
    if thinking is None:
        request = prompts.text_to_image(backbone.tokens, prompt, rows, columns)
        return _draw(backbone, request, (rows, columns), on_step, on_codes, guidance=guided, seeds=seeds, **options)
    request = prompts.thinking(backbone.tokens, prompt, rows, columns)
    think = lambda seeds: _think_and_draw(
        backbone,
        request,
        (rows, columns),
        thinking,
        on_step,
        on_text,
        on_codes,
        guidance=guided,
        seeds=seeds,
        **options,
    )
    if not thinking.temperature:
        return think(seeds)
    # each has a plan of its own
    drawn = [think([seed]) for seed in seeds]
    return Drawing(
        tuple(drawing.grid for drawing in drawn),
        sum((drawing.report for drawing in drawn[1:]), drawn[0].report),
        tuple(confidence for drawing in drawn for confidence in drawing.confidence),
        reasoning="\n\n".join(drawing.reasoning for drawing in drawn),
        warnings=tuple(dict.fromkeys(warning for drawing in drawn for warning in drawing.warnings)),
    )


def of_one_size(drawing: Drawing, seed: int) -> Drawing:
    """The pictures that have the size of the first; a warning says of each other one how to draw it alone.

    Args:
        seed: of the first picture.
    """
    shape = drawing.grids[0].codes.shape
    kept = [index for index, grid in enumerate(drawing.grids) if grid.codes.shape == shape]
    left_out = tuple(
        f"Picture {index + 1} is left out: its plan chose {_pixels(grid.codes.shape)}, and the pictures of a batch have one "
        f"size, that of the first, {_pixels(shape)}. Draw it alone with seed {picture_seed(seed, index)}."
        for index, grid in enumerate(drawing.grids)
        if index not in kept
    )
    return replace(
        drawing,
        grids=tuple(drawing.grids[index] for index in kept),
        confidence=tuple(drawing.confidence[index] for index in kept),
        warnings=drawing.warnings + left_out,
    )


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
    sprint: Sprint | None = None,
    on_codes: OnCodes | None = None,
) -> Drawing:
    """Draw a picture anew, changed as the instruction says. The result has its size.

    Args:
        pictures: the picture as codes, prepared for editing; or a set, whose last picture is the one to be changed, and
            the others are what the instruction refers to, of any sizes.
        text_guidance, image_guidance: how strongly to follow the instruction, and to keep to the picture.
        sampling, method: how tokens are chosen, and how the network is run.
        sprint: is not used, as published, and the drawing has a warning that says so.
        on_codes: called with the codes so far.

    Raises:
        RequestError: the grid is of another model or has no size token, or the request is too long.
    """
    request = prompts.edit(backbone.tokens, pictures, instruction)
    _require_same(pictures, backbone)
    guidance, grid = Guidance.editing(text_guidance, image_guidance, rescale), grids_of(pictures)[-1]
    check_room(backbone, len(request.conditional), grid.codes.size, pictures)
    options = {"sampling": sampling, "guidance": guidance, "method": method}
    drawing = _draw(backbone, request, (grid.height, grid.width), on_step, on_codes, **options)
    return drawing if sprint is None else replace(drawing, warnings=(_NO_SPRINT,))


def redraw(
    backbone: Backbone,
    grid: VQGrid,
    masked: np.ndarray,
    text: str,
    seeing: Seeing = Seeing.BEFORE,
    guidance: float | None = None,
    image_guidance: float = 0.0,
    rescale: float = 0.7,
    sampling: Sampling = Sampling(steps=8),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
    on_codes: OnCodes | None = None,
) -> Drawing:
    """Draw a part of a picture anew. Every code that is not masked is kept.

    Args:
        grid: the picture as codes.
        masked: the codes to draw, bool [height, width].
        text: an instruction as for ``edit`` where the whole picture is seen, else a prompt that describes the picture.
        seeing: what the model sees. With the whole picture it reads as many codes again.
        guidance: scale of the guidance towards the text; None is 4.0 with the whole picture and else 2.0.
        image_guidance: how strongly to keep to the picture where it is seen.
        rescale, sampling, method, on_codes: as in drawing.

    Raises:
        RequestError: the mask has another size or masks nothing, the grid is of another model, or the request is too long.
    """
    if np.shape(masked) != grid.codes.shape:
        raise RequestError(f"A mask of {list(np.shape(masked))} codes does not fit {grid}.")
    require_covered([masked])
    how = {"sampling": sampling, "method": method, "on_step": on_step, "on_codes": on_codes}
    return _redraw(backbone, grid, grid, masked, text, seeing, guidance, image_guidance, rescale, **how)


def grow(
    backbone: Backbone,
    grid: VQGrid,
    text: str,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    seeing: Seeing = Seeing.BEFORE,
    guidance: float | None = None,
    image_guidance: float = 0.0,
    rescale: float = 0.7,
    sampling: Sampling = Sampling(steps=8),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
    on_codes: OnCodes | None = None,
) -> Drawing:
    """Draw what is around a picture. Every code of it is kept.

    Args:
        grid: the picture as codes.
        left, top, right, bottom: how many codes to add there.
        text: as in ``redraw``, and so is everything else.

    Raises:
        RequestError: nothing is to be added, the new size has no size token, the grid is of another model, or the request
            is too long.
    """
    require_added(left, top, right, bottom)
    backbone.tokens.check_size(grid.height + top + bottom, grid.width + left + right)
    around = ((top, bottom), (left, right))
    larger = replace(grid, codes=np.pad(grid.codes, around))
    masked = np.pad(np.zeros(grid.codes.shape, bool), around, constant_values=True)
    how = {"sampling": sampling, "method": method, "on_step": on_step, "on_codes": on_codes}
    return _redraw(backbone, grid, larger, masked, text, seeing, guidance, image_guidance, rescale, **how)


def understand(
    backbone: Backbone,
    pictures: Pictures,
    question: str,
    max_new_tokens: int = 2048,
    sampling: Sampling = Sampling(steps=32),
    method: Method = Method.CACHED,
    on_step: OnStep = ignore,
    on_text: Callable[[str], None] | None = None,
    sprint: Sprint | None = None,
) -> Answer:
    """Answer a question about a picture, or about several together.

    Args:
        pictures: the picture as codes, prepared for understanding; or a set, which the question can count in its order.
        max_new_tokens: the answer's length at most.
        on_text: called after each step with the answer so far; a stretch not yet denoised reads "…".
        sampling, method: how tokens are chosen, and how the network is run.
        sprint: None is exact; see ``sprint.Sprint``.

    Raises:
        RequestError: the grid is of another model or has no size token, or the request is too long.
    """
    tokens = backbone.tokens
    request = prompts.understand(tokens, pictures, question)
    _require_same(pictures, backbone)
    check_room(backbone, len(request.conditional), max_new_tokens, pictures)
    vocabulary = Vocabulary(tokens.mask, ends=frozenset({tokens.end}))
    step = _growing(backbone, on_step, on_text, vocabulary, max_new_tokens, DENOISING)
    options = {"sampling": sampling, "method": method, "sprint": sprint, "on_step": step}
    done = backbone.run(generate, Draft.blank(request.branches, max_new_tokens, tokens.mask), vocabulary, **options)
    return Answer(_whole(tokens, done.ids), done.ids, done.report)


def require_pictures(pictures: int) -> None:
    """Raise ``RequestError`` unless 1 to ``MOST_PICTURES`` pictures are to be drawn together."""
    if not 1 <= pictures <= MOST_PICTURES:
        raise RequestError(f"{pictures} pictures are asked for; it has to be from 1 to {MOST_PICTURES}.")


def require_multiples(width: int, height: int) -> None:
    """Raise ``RequestError`` unless the sides of a picture, in pixels, are multiples of 32; 0 is the model's own."""
    if width % DECODED_PIXELS or height % DECODED_PIXELS or min(width, height) < 0:
        raise RequestError(
            f"The size is {width} x {height} pixels; both sides have to be multiples of {DECODED_PIXELS}."
        )


def redraw_guidance(seeing: Seeing, guidance: float | None, image_guidance: float, rescale: float) -> Guidance:
    """The guidance of ``redraw`` and ``grow``, whose inputs these are.

    Raises:
        RequestError: a scale is out of range.
    """
    if seeing is Seeing.PICTURE:
        return Guidance.editing(4.0 if guidance is None else guidance, image_guidance, rescale)
    return Guidance.simple(2.0 if guidance is None else guidance, rescale)


def grid_size(backbone: Backbone, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of codes for a picture of ``width x height`` pixels; 0 is the model's own size.

    Raises:
        RequestError: a side is no multiple of 32 pixels, or no size token exists for it.
    """
    own = backbone.checkpoint.image_sizes.drawing or DEFAULT_DRAWING
    width, height = width or own, height or own
    require_multiples(width, height)
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


def _growing(
    backbone: Backbone,
    on_step: OnStep,
    on_text: Callable[[str], None] | None,
    vocabulary: Vocabulary,
    length: int,
    phase: str,
) -> OnStep:
    """``on_step``, and ``on_text`` with what has been written in ``phase``, up to its end."""

    def step(progress: Progress) -> None:
        on_step(progress)
        if on_text and progress.phase == phase and progress.generated:
            on_text(readable(backbone, tuple(vocabulary.through_end(list(progress.generated[:length])))))

    return step


def _draw(
    backbone: Backbone,
    request: prompts.Prompt,
    size: tuple[int, int],
    on_step: OnStep,
    on_codes: OnCodes | None,
    **options: Any,
) -> Drawing:
    """Draw a grid of ``size`` codes, or several; ``options`` are those of ``generate``."""
    draft, vocabulary = _canvas(backbone, request.branches, size)
    check_length(len(request.conditional), len(draft.body), backbone.config.max_position_embeddings)
    step = _appearing(on_step, on_codes, vocabulary, lambda: (size, draft.body))
    batch = _batch(options.get("seeds"), request, len(draft.body))
    return _drawing(backbone, size, backbone.run(generate, draft, vocabulary, on_step=step, **batch, **options))


def _batch(seeds: Sequence[int] | None, request: prompts.Prompt, length: int) -> dict[str, Batch]:
    """What ``Backbone.run`` has to know of pictures that are drawn together, with so many positions after the prompt."""
    if seeds is None or len(seeds) == 1:
        return {}
    return {"batch": Batch(len(seeds), len(request.branches), len(request.conditional) + length)}


def _appearing(
    on_step: OnStep,
    on_codes: OnCodes | None,
    vocabulary: Vocabulary,
    canvas: Callable[[], tuple[tuple[int, int], Sequence[int]]],
) -> OnStep:
    """``on_step``, and ``on_codes`` with what has been drawn on ``canvas()``, a size and the ids to begin with."""

    def step(progress: Progress) -> None:
        on_step(progress)
        if on_codes and progress.phase == DENOISING:
            on_codes(*codes_so_far(progress.generated, *canvas(), vocabulary))

    return step


def codes_so_far(
    generated: Sequence[int], size: tuple[int, int], body: Sequence[int], vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """What ``OnCodes`` is called with, from the ids that are generated of a body."""
    ids = np.array([*generated, *body[len(generated) :]][: len(body)]).reshape(size)
    masked = ids == vocabulary.mask
    return np.where(masked, 0, ids - vocabulary.first), masked


def _canvas(backbone: Backbone, branches: Sequence[Sequence[int]], size: tuple[int, int]) -> tuple[Draft, Vocabulary]:
    vocabulary = Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)
    return Draft.blank(branches, size[0] * size[1], vocabulary.mask), vocabulary


def _redraw(
    backbone: Backbone,
    source: VQGrid,
    grid: VQGrid,
    masked: np.ndarray,
    text: str,
    seeing: Seeing,
    guidance: float | None,
    image_guidance: float,
    rescale: float,
    on_step: OnStep,
    on_codes: OnCodes | None,
    **options: Any,
) -> Drawing:
    """Draw what is masked of ``grid``; ``source`` is what is seen of the picture before."""
    size, tokens = (grid.height, grid.width), backbone.tokens
    prompts.require_codebook(tokens, source)
    require_same(source, backbone.checkpoint)
    if seeing is Seeing.PICTURE:
        request = prompts.edit(tokens, source, text, size)
    else:
        request = prompts.text_to_image(tokens, text, *size)
    guided = redraw_guidance(seeing, guidance, image_guidance, rescale)
    blank, vocabulary = _canvas(backbone, request.branches, size)
    body = np.where(masked, vocabulary.mask, grid.codes + vocabulary.first).flatten().tolist()
    check_length(len(request.conditional), len(body), backbone.config.max_position_embeddings)
    step = _appearing(on_step, on_codes, vocabulary, lambda: (size, body))
    draft = replace(blank, body=tuple(body))
    done = backbone.run(generate, draft, vocabulary, guidance=guided, on_step=step, **options)
    return replace(_drawing(backbone, size, done), masked=np.asarray(masked))


def _drawing(backbone: Backbone, size: tuple[int, int], done: Generation) -> Drawing:
    grids = tuple(as_grid(backbone, ids, size) for ids in done.pictures)
    return Drawing(grids, done.report, tuple(certain.reshape(size) for certain in done.confidence))


def as_grid(backbone: Backbone, ids: Sequence[int], size: tuple[int, int]) -> VQGrid:
    """Token ids of image codes as a grid of the backbone's model; ``size`` is rows and columns."""
    codes = [token - backbone.config.image_token_offset for token in ids]
    return VQGrid.from_list(codes, *size, backbone.config.codebook_size, origin(backbone.checkpoint))


def _think_and_draw(
    backbone: Backbone,
    request: prompts.Prompt,
    size: tuple[int, int],
    thinking: Thinking,
    on_step: OnStep,
    on_text: Callable[[str], None] | None,
    on_codes: OnCodes | None,
    **options: Any,
) -> Drawing:
    """Write a plan, then draw what it says in the same session; ``options`` are those of ``generate`` for the picture."""
    tokens, most = backbone.tokens, backbone.config.max_position_embeddings
    check_length(len(request.conditional) + size[0] * size[1], thinking.length, most)
    ends = Vocabulary(tokens.mask, ends=frozenset({tokens.boi, tokens.end}))
    draft = Draft.blank(request.branches[:1], thinking.length, tokens.mask)
    sampling, seeds, sprint = options["sampling"], options["seeds"], options["sprint"]
    plan = replace(sampling, steps=thinking.steps, temperature=thinking.temperature, seed=seeds[0])
    writing = {"sampling": plan, "method": options["method"], "sprint": sprint, "phase": THINKING, "keep": True}

    begun: list[tuple[tuple[int, int], Sequence[int]]] = []

    def job(network: LLaDA2) -> Steps[tuple[list[int], tuple[int, int] | None, Generation]]:
        thought = yield from generate(network, draft, ends, **writing)
        ids, session, report = thought.ids, thought.session, thought.report
        if ids[-1] != tokens.boi:
            raise RequestError(_no_picture(ids[-1] == tokens.end, thinking.length))
        chosen = tokens.read_header(ids)
        _, (_, *others) = options["guidance"].select(request.branches)
        canvas, vocabulary = _canvas(backbone, [[]] * (1 + len(others)), chosen or size)
        begun.append((chosen or size, canvas.body))
        check_length(len(session), len(canvas.body), most)
        if session.layers is None:  # a method that keeps nothing begins anew
            session, canvas = None, replace(canvas, branches=([*request.conditional, *ids], *request.branches[1:]))
        elif others:
            session, read = yield from add_branches(network, session, others, tokens.mask, sprint)
            report += read
        drawn = yield from generate(network, canvas, vocabulary, session=session, **options)
        return ids, chosen, replace(drawn, report=report + drawn.report)

    canvas, codes = _canvas(backbone, [], size)
    step = _appearing(on_step, on_codes, codes, lambda: begun[-1])
    step = _growing(backbone, step, on_text, ends, thinking.length, THINKING)
    batch = _batch(seeds, request, thinking.length + len(canvas.body))
    ids, chosen, done = backbone.run(job, on_step=step, **batch)
    reasoning = tokens.decode(ids[:-4] if chosen else ids).strip()
    doubt = () if chosen == size else (_other_size(size, chosen),)
    return replace(_drawing(backbone, chosen or size, done), reasoning=reasoning, warnings=doubt)


def _no_picture(ended: bool, length: int) -> str:
    if ended:
        return "The model ended its text without beginning a picture. Ask for a picture, or draw without thinking."
    return (
        f"The model thought for {length} tokens and began no picture. Raise the length of thinking, or draw without it."
    )


def _other_size(size: tuple[int, int], chosen: tuple[int, int] | None) -> str:
    if chosen is None:
        return f"The model stated no size after thinking; the picture has the {_pixels(size)} asked for."
    return f"The model chose {_pixels(chosen)} in place of the {_pixels(size)} asked for."


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1] * DECODED_PIXELS} x {size[0] * DECODED_PIXELS} pixels"

"""Stories: text and pictures in turn, told in one session."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

from . import prompts
from .backbone.acceptance import Sampling
from .backbone.denoising import Draft, Vocabulary, add_branches, check_length, generate
from .backbone.guidance import Guidance
from .backbone.handle import Backbone, Steps
from .backbone.network import LLaDA2
from .backbone.session import Report, Session
from .checkpoint.sizes import DECODED_PIXELS
from .errors import RequestError
from .progress import OnStep, Progress, ignore
from .tasks import OnCodes, as_grid, codes_so_far, readable
from .vq import VQGrid, picture_seed

MOST_PICTURES = 64
# A text or a picture of a story.
StoryPart = str | VQGrid


@dataclass(frozen=True)
class Story:
    """What was told, and what it took.

    Args:
        parts: texts and grids of codes in their order. A text is never empty, and pictures may follow each other.
        report: of all parts together.
        warnings: sentences on why the story ended before the model ended it.
    """

    parts: tuple[StoryPart, ...]
    report: Report
    warnings: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def grids(self) -> list[VQGrid]:
        return [part for part in self.parts if isinstance(part, VQGrid)]

    @property
    def markdown(self) -> str:
        """The story as Markdown; see ``to_markdown``."""
        return to_markdown(self.parts)


def tell(
    backbone: Backbone,
    prompt: str,
    pictures: int = 10,
    codes: int = 4096,
    text: int = 8192,
    text_guidance: float = 7.5,
    image_guidance: float = 1.5,
    rescale: float = 0.7,
    sampling: Sampling = Sampling(steps=8),
    text_steps: int = 32,
    text_temperature: float = 0.0,
    on_step: OnStep = ignore,
    on_text: Callable[[str], None] | None = None,
    on_codes: OnCodes | None = None,
    on_picture: Callable[[int, VQGrid], None] | None = None,
) -> Story:
    """Tell a story in words and pictures. The model says when a picture comes, and of what size it is.

    It ends where the model ends it. It ends too, with a warning, where a limit is reached or the model writes what is
    neither text nor a picture.

    Args:
        prompt: what to tell, in any language.
        pictures: how many there are at most. What the model writes after the last one is told too.
        codes: of a picture at most; a picture of 1024 x 1024 pixels has 1024.
        text: tokens of all texts together at most, the headers of pictures included.
        text_guidance: how strongly a picture follows the words: the scale of simple guidance for the first picture, and
            of guidance as in editing for the others.
        image_guidance: how strongly a picture keeps to those before it.
        rescale: see ``guidance.Guidance``.
        sampling: how codes are chosen. Picture i, and the text before it, use seed + i, counted from 0. The texts have
            the same sampling with ``text_steps`` and ``text_temperature``.
        on_text: called with the story so far, as Markdown; what is still to be denoised, of a text or a picture, reads "…".
        on_codes: called with the codes so far of the picture that is being drawn.
        on_picture: called with each picture as soon as it is finished: its number, from 1, and its codes. Like
            ``on_step`` it is called in this thread, and what it raises ends the work.

    Raises:
        RequestError: a limit or a scale is out of range, or the prompt is too long, before anything runs; the model wrote
            neither text nor a picture, after that.
    """
    require_limits(pictures, text)
    smallest = min(backbone.tokens.sizes) ** 2
    if codes < smallest:
        raise RequestError(
            f"A picture may have {codes} codes at most; the smallest one has {smallest}. Raise the limit."
        )
    request = prompts.story(backbone.tokens, prompt).conditional
    check_length(len(request), 1, backbone.config.max_position_embeddings)
    teller = _Teller(
        backbone,
        request,
        limits=(pictures, codes, text),
        guidance=guidances(text_guidance, image_guidance, rescale),
        sampling=(text_sampling(sampling, text_steps, text_temperature), sampling),
    )
    announced = 0

    def step(progress: Progress) -> None:
        nonlocal announced
        on_step(progress)
        if on_codes and progress.phase == teller.drawing:
            on_codes(*codes_so_far(progress.generated, *teller.canvas, teller.codes))
        if announced < teller.pictures:
            announced = teller.pictures
            if on_picture:
                on_picture(announced, teller.parts[-1])
        if on_text and (shown := to_markdown([*teller.parts, teller.readable(progress.generated)])):
            on_text(shown)

    backbone.run(teller.job, on_step=step)
    if not teller.parts:
        why = " ".join(teller.warnings) or "It ended at once."
        raise RequestError(f"The model told neither text nor a picture. {why} Ask for a story in other words.")
    story = Story(tuple(teller.parts), teller.report, tuple(teller.warnings))
    if on_text:
        on_text(story.markdown)
    return story


def require_limits(pictures: int, text: int) -> None:
    """Check a story's limits, as far as it can be done without a model; see ``tell``.

    Raises:
        RequestError: one is out of range.
    """
    if not 1 <= pictures <= MOST_PICTURES:
        raise RequestError(f"A story of {pictures} pictures is asked for; it has to be from 1 to {MOST_PICTURES}.")
    if text < 1:
        raise RequestError(f"The text may have {text} tokens at most; it has to be 1 or more. Raise the limit.")


def guidances(text: float, image: float, rescale: float) -> tuple[Guidance, Guidance]:
    """The guidance of a story's first picture, and of the others; see ``tell``.

    Raises:
        RequestError: a scale is out of range.
    """
    return Guidance.simple(text, rescale), Guidance.editing(text, image, rescale)


def text_sampling(sampling: Sampling, steps: int, temperature: float) -> Sampling:
    """How the tokens of a story's texts are chosen, if its codes are as ``sampling`` says.

    Raises:
        RequestError: a value is out of range.
    """
    return replace(sampling, steps=steps, temperature=temperature)


class _Teller:
    """A story while it is told.

    Args:
        request: token ids.
        limits: pictures, codes of a picture, tokens of text.
        guidance: of the first picture, and of the others.
        sampling: of texts, and of pictures.
    """

    def __init__(
        self,
        backbone: Backbone,
        request: list[int],
        limits: tuple[int, int, int],
        guidance: tuple[Guidance, Guidance],
        sampling: tuple[Sampling, Sampling],
    ):
        self.tokens, self.config = backbone.tokens, backbone.config
        self.backbone = backbone
        self.most_pictures, self.most_codes, self.text_left = limits
        self.guidance, self.sampling = guidance, sampling
        self.parts: list[StoryPart] = []
        self.warnings: list[str] = []
        self.report = Report()
        self.pictures = 0
        # what the conditional branch holds up to the current text, and what of it the session does not have yet
        self.told, self.ahead = request, request
        # the size of the current picture and the ids that it begins with, and which ids it can have
        self.canvas: tuple[tuple[int, int], Sequence[int]] = ((0, 0), ())
        self.codes = Vocabulary(self.tokens.mask, first=self.tokens.image_offset)
        # no other name may hold it: what is forked or joined would be kept twice
        self.session: Session | None = None

    @property
    def writing(self) -> str:
        """What the progress calls the writing of the current text."""
        return f"writing text {self.pictures + 1}"

    @property
    def drawing(self) -> str:
        """The same of the current picture."""
        return f"drawing picture {self.pictures + 1}"

    def job(self, network: LLaDA2) -> Steps[None]:
        try:
            while True:
                written = yield from self._write(network)
                text, size, warning = self._read(written)
                if shown := self.readable(id for id in text if id != self.tokens.mask).strip():
                    self.parts.append(shown)
                if warning is not None:
                    self.warnings.append(warning)
                if size is None:
                    return
                grid = yield from self._draw(network, text, written[-4:], size)
                self.parts.append(grid)
                self.pictures += 1
                yield Progress(f"picture {self.pictures} is finished", 1, 1)
        finally:
            self.session = None  # on MLX's own thread

    def readable(self, ids: Iterable[int]) -> str:
        """What ids show of a text: of codes, and of what comes behind a ``<boi>``, nothing."""
        ids = tuple(ids)
        return readable(self.backbone, ids[: ids.index(self.tokens.boi)] if self.tokens.boi in ids else ids)

    @property
    def _room(self) -> int:
        """Tokens of text that may still be written."""
        return min(self.text_left, self.config.max_position_embeddings - len(self.told))

    def _write(self, network: LLaDA2) -> Steps[list[int]]:
        """A text, up to and with the first ``<boi>`` or end token. Any id may be chosen."""
        if self._room < 1:
            return []
        vocabulary = Vocabulary(self.tokens.mask, ends=frozenset({self.tokens.boi, self.tokens.end}))
        draft = Draft.blank((self.ahead,), self._room, vocabulary.mask)
        options = {"sampling": self._seeded(self.sampling[0]), "phase": self.writing, "keep": True}
        done = yield from generate(network, draft, vocabulary, session=self.session, **options)
        self.session, self.report = done.session, self.report + done.report
        return done.ids

    def _read(self, ids: list[int]) -> tuple[list[int], tuple[int, int] | None, str | None]:
        """What was written: the text, the size in codes of the picture that is to be drawn, and why the story ends here
        although the model has not ended it.
        """
        tokens, last, end = self.tokens, ids[-1:], len(self.told) + len(ids)
        strange = next((at for at, id in enumerate(ids) if id >= tokens.image_offset), None)
        size = tokens.read_header(ids)
        text = ids[:-4] if size else ids
        if strange is not None:
            return ids[:strange], None, "The story ends where the model wrote codes of a picture without a header."
        if last == [tokens.end]:
            return text, None, None
        if last != [tokens.boi]:
            return text, None, self._no_room()
        if size is None:
            return text, None, "The story ends where the model began a picture without stating its size."
        height, width = size
        picture = f"{width * DECODED_PIXELS} x {height * DECODED_PIXELS} pixels ({height * width} codes)"
        if self.pictures == self.most_pictures:
            has = f"{self.pictures} picture{'' if self.pictures == 1 else 's'}"
            return text, None, f"The story has {has}, which is the limit, and ends where the model began another."
        if height * width > self.most_codes:
            return text, None, f"The story ends before a picture of {picture}: the limit is {self.most_codes} codes."
        if end + height * width > self.config.max_position_embeddings:
            return text, None, f"The story ends before a picture of {picture}: {self._full()}"
        return text, size, None

    def _no_room(self) -> str:
        if self.text_left <= self.config.max_position_embeddings - len(self.told):
            return "The story was cut off: its text reached the limit. Raise it for a longer story."
        return f"The story was cut off: {self._full()}"

    def _full(self) -> str:
        return f"the model takes {self.config.max_position_embeddings} tokens, its own pictures included."

    def _draw(self, network: LLaDA2, text: list[int], header: list[int], size: tuple[int, int]) -> Steps[VQGrid]:
        """The picture that the model has begun."""
        tokens = self.tokens
        guidance = self.guidance[min(self.pictures, 1)]
        request = prompts.story_picture(tokens, self.told, text, header, first=not self.pictures)
        _, (conditional, *others) = guidance.select(request.branches)
        if others:
            self.session, read = yield from add_branches(network, self.session, others, tokens.mask)
            self.report += read
        draft = Draft.blank([[]] * (1 + len(others)), size[0] * size[1], tokens.mask)
        self.canvas = size, draft.body
        options = {"sampling": self._seeded(self.sampling[1]), "guidance": guidance, "phase": self.drawing}
        done = yield from generate(network, draft, self.codes, session=self.session, **options)
        # the next text goes on in the conditional branch alone
        self.session, self.report = done.session.fork([0]), self.report + done.report
        self.ahead = [tokens.image_end]
        self.told = [*conditional, *done.ids, *self.ahead]
        self.text_left -= len(text) + len(header)
        return as_grid(self.backbone, done.ids, size)

    def _seeded(self, sampling: Sampling) -> Sampling:
        return replace(sampling, seed=picture_seed(sampling.seed, self.pictures))


def to_markdown(parts: Iterable[StoryPart]) -> str:
    """A story as Markdown: its texts, and ``![picture N](picture_N.png)`` where picture N stands, counted from 1."""
    pieces, pictures = [], 0
    for part in parts:
        if isinstance(part, VQGrid):
            pictures += 1
            pieces.append(picture_link(pictures))
        elif part:
            pieces.append(part)
    return "\n\n".join(pieces)


def to_html(parts: Iterable[StoryPart], title: str) -> str:
    """A story as a page that shows its pictures by the names that ``picture_name`` gives them."""
    body, pictures = [], 0
    for part in parts:
        if isinstance(part, VQGrid):
            pictures += 1
            body.append(f'<figure><img src="{picture_name(pictures)}" alt="Picture {pictures}"></figure>')
        else:
            paragraphs = (lines.strip() for lines in part.split("\n\n"))
            body += [f"<p>{escape(lines).replace(chr(10), '<br>')}</p>" for lines in paragraphs if lines]
    style = "body{font:18px/1.5 serif;max-width:42em;margin:2em auto;padding:0 1em} figure{margin:1.5em 0} img{max-width:100%}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    return "\n".join(["<!doctype html>", head, f"<h1>{escape(title)}</h1>", *body, ""])


def picture_link(number: int) -> str:
    """What stands for picture ``number``, counted from 1, in Markdown."""
    return f"![picture {number}]({picture_name(number)})"


def without_links(markdown: str) -> str:
    """A story for where its pictures do not lie beside it: ``[picture N]`` for a link to one."""
    return re.sub(r"!\[(picture (\d+))\]\(picture_\2\.png\)", r"[\1]", markdown)


def picture_name(number: int, suffix: str = ".png") -> str:
    """The file name of picture ``number``, counted from 1."""
    return f"picture_{number}{suffix}"

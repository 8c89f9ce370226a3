"""Stories: texts and pictures in turn in one session, on a network that writes what a script says, and on a real one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scripted import SteeredNetwork, scripted

from llada2_mlx import prompts
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Draft, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.progress import Progress
from llada2_mlx.story import Story, tell, to_html, to_markdown, without_links
from llada2_mlx.tokens import Tokens
from llada2_mlx.vq import VQGrid

ASKED = "a fox, in three pictures"
SAMPLING = Sampling(steps=4)
ONE, TWO, LAST = "A fox woke up early.", "It walked through the snow, a long way.", "Then it slept."


@pytest.fixture
def fresh(checkpoint: Checkpoint) -> Backbone:
    return Backbone(checkpoint, "float32")


@pytest.fixture
def tokens(fresh: Backbone) -> Tokens:
    return fresh.tokens


def picture(tokens: Tokens, height: int, width: int, code: int) -> list[int]:
    """A picture with its header and its end."""
    codes = tokens.codes_to_ids([(code + at) % 128 for at in range(height * width)])
    return [*tokens.header(height, width), *codes, tokens.image_end]


@pytest.fixture
def told(fresh: Backbone, monkeypatch: pytest.MonkeyPatch):
    """Tell a story that a script says."""

    def told(*script: int, **options) -> Story:
        scripted(fresh, prompts.story(fresh.tokens, ASKED).conditional, script, monkeypatch)
        return tell(fresh, ASKED, **{"rescale": 0.0, "sampling": SAMPLING, "text_steps": 4} | options)

    return told


@pytest.fixture
def script(tokens: Tokens) -> list[int]:
    return [
        *tokens.encode(ONE),
        *picture(tokens, 8, 8, 5),
        *tokens.encode(f"\n{TWO}\n"),
        *picture(tokens, 8, 10, 50),
        *tokens.encode(LAST),
        tokens.end,
    ]


def test_texts_and_pictures_in_turn(told, script: list[int]) -> None:
    story = told(*script)
    small, wide = (VQGrid((np.arange(size).reshape(8, -1) + first) % 128, 128) for size, first in ((64, 5), (80, 50)))
    assert list(story.parts) == [ONE, small, TWO, wide, LAST]
    assert (story.texts, story.grids, story.warnings) == ([ONE, TWO, LAST], [small, wide], ())
    assert story.markdown == (f"{ONE}\n\n![picture 1](picture_1.png)\n\n{TWO}\n\n![picture 2](picture_2.png)\n\n{LAST}")
    assert all(grid.origin.model for grid in story.grids)


def test_each_picture_is_handed_on_before_the_story_goes_on(told, script: list[int]) -> None:
    events: list[str] = []
    texts: list[str] = []

    def seen(progress: Progress) -> None:
        if progress.phase not in events[-1:] and progress.phase != "reading the prompt":
            events.append(progress.phase)

    story = told(
        *script,
        sampling=Sampling(steps=4, threshold=1.0),
        on_step=seen,
        on_text=texts.append,
        on_picture=lambda number, grid: events.append(f"{number}: {grid.height} x {grid.width}"),
    )
    assert events == [
        "writing text 1",
        "drawing picture 1",
        "picture 1 is finished",
        "1: 8 x 8",
        "writing text 2",
        "drawing picture 2",
        "picture 2 is finished",
        "2: 8 x 10",
        "writing text 3",
    ]
    # it grows, and what is finished stays
    assert texts[-1] == story.markdown and any("…" in text for text in texts)
    assert [text.count("![") for text in texts] == sorted(text.count("![") for text in texts)
    assert f"{ONE}\n\n…" in texts and f"{ONE}\n\n![picture 1](picture_1.png)" in texts
    assert all(texts)


def test_codes_are_seen_as_they_are_accepted(told, script: list[int]) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    slow = Sampling(steps=4, threshold=1.0)
    story = told(*script, sampling=slow, on_codes=lambda codes, masked: seen.append((codes, masked)))
    left = {shape: [] for shape in ((8, 8), (8, 10))}
    for codes, masked in seen:
        grid = story.grids[codes.shape == (8, 10)]
        assert (codes == np.where(masked, 0, grid.codes)).all()
        left[codes.shape].append(masked.sum())
    for counts in left.values():
        assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 0


def test_what_a_callback_raises_ends_the_work(told, script: list[int]) -> None:
    class Enough(BaseException):
        pass

    seen: list[int] = []

    def stop(number: int, grid: VQGrid) -> None:
        seen.append(number)
        raise Enough

    with pytest.raises(Enough):
        told(*script, on_picture=stop)
    assert seen == [1]


def test_a_story_without_a_header_ends_with_its_text(told, tokens: Tokens) -> None:
    texts: list[str] = []
    story = told(*tokens.encode(ONE), tokens.boi, *tokens.encode(TWO), tokens.end, on_text=texts.append)
    assert story.parts == (ONE,)
    assert {text.rstrip("…") for text in texts if ONE in text} == {ONE}  # what stands behind is not even shown
    assert story.warnings == ("The story ends where the model began a picture without stating its size.",)


@pytest.mark.parametrize("side", [0, 1])
def test_a_size_that_has_no_token_is_no_header(told, tokens: Tokens, side: int) -> None:
    header = tokens.header(8, 8)
    header[1 + side] = tokens.encode("x")[0]
    story = told(*tokens.encode(ONE), *header, *picture(tokens, 8, 8, 5))
    assert not story.grids and story.texts[0].startswith(ONE) and "without stating its size" in story.warnings[0]


def test_a_picture_over_the_limit_of_codes_is_not_drawn(told, script: list[int], tokens: Tokens) -> None:
    assert len(told(*script, codes=80).grids) == 2
    story = told(*script, codes=79)
    assert [grid.codes.shape for grid in story.grids] == [(8, 8)] and story.texts == [ONE, TWO]
    assert story.warnings == ("The story ends before a picture of 320 x 256 pixels (80 codes): the limit is 79 codes.",)
    with pytest.raises(RequestError, match="neither text nor a picture. The story ends before a picture of 320 x 256"):
        told(*picture(tokens, 8, 10, 5), codes=64)


def test_pictures_over_the_limit_are_not_drawn(told, script: list[int]) -> None:
    assert told(*script, pictures=2).warnings == ()
    story = told(*script, pictures=1)
    assert len(story.grids) == 1 and story.texts == [ONE, TWO]
    assert "The story has 1 picture, which is the limit" in story.warnings[0]


def test_a_model_that_never_stops_drawing(told, tokens: Tokens) -> None:
    story = told(*(picture(tokens, 8, 8, 5) * 4), pictures=3)
    assert len(story.parts) == len(story.grids) == 3 and "3 pictures" in story.warnings[0]


@pytest.mark.parametrize("text", [1, 31, 32, 100])
def test_a_model_that_never_stops_writing(told, tokens: Tokens, text: int) -> None:
    story = told(*tokens.encode("x"), text=text)
    assert story.parts == ("x" * text,) and story.warnings[0].startswith("The story was cut off: its text reached the")


def test_the_limit_is_of_all_texts_together(told, script: list[int], tokens: Tokens) -> None:
    first = len(tokens.encode(ONE)) + 4
    story = told(*script, text=first + 11)
    assert story.texts == [ONE, TWO[:9]] and len(story.grids) == 1  # a line end stands before it
    assert "text reached the limit" in story.warnings[0]
    # a limit that the first text uses up leaves its picture
    assert [type(part) for part in told(*script, text=first).parts] == [str, VQGrid]


def test_the_context_is_a_limit_too(told, fresh: Backbone, script: list[int], tokens: Tokens) -> None:
    request = len(prompts.story(tokens, ASKED).conditional)
    before = request + len(tokens.encode(ONE)) + 4

    def limit(most: int) -> None:
        fresh.config = replace(fresh.config, max_position_embeddings=most)

    limit(before + 63)
    story = told(*script)
    assert story.parts == (ONE,)
    assert f"before a picture of 256 x 256 pixels (64 codes): the model takes {before + 63} tokens" in story.warnings[0]
    for room in (0, 1):  # no place for what follows the picture, or for its end alone
        limit(before + 64 + room)
        story = told(*script)
        assert [type(part) for part in story.parts] == [str, VQGrid]
        assert f"was cut off: the model takes {before + 64 + room} tokens" in story.warnings[0]
    limit(before + 64 + 1 + 5)
    assert told(*script).texts == [ONE, TWO[:4]]


def test_codes_in_a_text_end_the_story(told, tokens: Tokens) -> None:
    strange = tokens.codes_to_ids([3])
    story = told(*tokens.encode(ONE), *strange, *tokens.encode(TWO), *picture(tokens, 8, 8, 5))
    assert story.parts == (ONE,) and "codes of a picture without a header" in story.warnings[0]
    # so where they stand before the end
    story = told(*tokens.encode(ONE), *strange, tokens.end)
    assert story.parts == (ONE,) and story.warnings


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_story_of_nothing_is_an_error(told, tokens: Tokens, text: str) -> None:
    with pytest.raises(RequestError, match="told neither text nor a picture. It ended at once"):
        told(*tokens.encode(text), tokens.end)
    with pytest.raises(
        RequestError, match="neither text nor a picture. The story ends where the model began a picture"
    ):
        told(*tokens.encode(text), tokens.boi)


def test_a_story_may_be_a_picture_alone(told, tokens: Tokens) -> None:
    story = told(*picture(tokens, 10, 8, 5), tokens.end)
    assert [part.codes.shape for part in story.parts] == [(10, 8)] and story.warnings == ()
    assert (story.texts, story.markdown) == ([], "![picture 1](picture_1.png)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": 0}, "story of 0 pictures"),
        ({"pictures": 1000}, "from 1 to 64"),
        ({"codes": 63}, "smallest one has 64"),
        ({"text": 0}, "0 tokens"),
        ({"text_guidance": -1.0}, "guidance scale is -1"),
        ({"image_guidance": float("nan")}, "image guidance"),
        ({"rescale": 2.0}, "rescale is 2"),
        ({"text_steps": 0}, "steps is 0"),
        ({"text_temperature": -1.0}, "temperature is -1"),
        ({"prompt": "x" * 9000}, "too long"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_runs(fresh: Backbone, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tell(fresh, **{"prompt": ASKED} | options)
    assert not fresh.loaded


# --- on a real network ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A story of two pictures on the golden model, whose texts are a script, with how it is guided."""

    backbone: Backbone
    script: list[int]
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (8, 10))
    texts: tuple[str, ...] = (ONE, TWO)

    def __call__(self, **options) -> tuple[Story, Counter[str]]:
        steps: Counter[str] = Counter()
        count = lambda progress: steps.update([progress.phase])
        options = {"sampling": SAMPLING, "text_steps": 4} | options
        return tell(self.backbone, ASKED, on_step=count, **options), steps


@pytest.fixture
def golden_story(fresh: Backbone, tokens: Tokens, script: list[int], monkeypatch: pytest.MonkeyPatch) -> Asked:
    network = SteeredNetwork(fresh.load(), [*prompts.story(tokens, ASKED).conditional, *script])
    monkeypatch.setattr(fresh, "load", lambda on_step=None: network)
    return Asked(fresh, script)


GUIDED = [(7.5, 1.5), (7.5, 0.0), (2.5, 1.5), (1.0, 0.0)]


@pytest.mark.parametrize("guided", GUIDED)
def test_each_picture_is_what_its_branches_give_from_the_start(
    golden_story: Asked, tokens: Tokens, guided: tuple[float, float]
) -> None:
    """Written out here as published, ids by ids; nothing is kept from one picture to the next."""
    backbone = golden_story.backbone
    story, _ = golden_story(text_guidance=guided[0], image_guidance=guided[1])
    system = "<role>SYSTEM</role> You are a interleaved generation assistant. <role>HUMAN</role>"
    ask = lambda text: [*tokens.encode(system), *tokens.encode(text), *tokens.encode("<role>ASSISTANT</role>")]
    assert ask(ASKED) == prompts.story(tokens, ASKED).conditional
    nothing = ask("<uncondition>")
    one, two = tokens.encode(ONE), tokens.encode(f"\n{TWO}\n")
    first, second = (tokens.header(*size) for size in golden_story.sizes)
    drawn = [tokens.codes_to_ids(grid.to_list()) for grid in story.grids]
    history = [*ask(ASKED), *one, *first, *drawn[0], tokens.image_end]
    requests = [
        (Guidance.simple(guided[0]), ([*ask(ASKED), *one, *first], [*nothing, *first])),
        (
            Guidance.editing(*guided),
            (
                [*history, *two, *second],
                [*history, *tokens.encode("<uncondition>"), *second],
                [*nothing, *two, *second],
            ),
        ),
    ]
    for (guidance, branches), ids in zip(requests, drawn, strict=True):
        draft = Draft.blank(branches, len(ids), tokens.mask)
        anew = backbone.run(generate, draft, Vocabulary(tokens.mask, tokens.image_offset), SAMPLING, guidance)
        assert anew.ids == ids


@pytest.mark.parametrize("guided", GUIDED)
def test_what_has_been_told_is_read_once(golden_story: Asked, tokens: Tokens, guided: tuple[float, float]) -> None:
    """In the branch that goes on each block is read once, beside its steps; a branch of guidance once a picture."""
    story, steps = golden_story(text_guidance=guided[0], image_guidance=guided[1])
    before = lambda position: (position - 1) // 32 * 32  # what is final when that many ids are written
    asked, nothing, at = (len(prompts.story(tokens, text).conditional) for text in (ASKED, "<uncondition>", ASKED))
    weighed = [guided[0] != 1, guided[0] != 1 + guided[1], guided[1] != 0]
    others = 0
    for number, (text, (height, width)) in enumerate(zip(golden_story.texts, golden_story.sizes, strict=True), 1):
        words = len(tokens.encode(text)) + 2 * (number == 2)  # its line ends
        lengths = [nothing + 4] if number == 1 else [at + len(tokens.encode("<uncondition>")) + 4, nothing + words + 4]
        lengths = [
            length for length, used in zip(lengths, weighed[:1] if number == 1 else weighed[1:], strict=True) if used
        ]
        at += words + 4
        if lengths:
            begin = max(min((at - max(lengths)) // 32 * 32, before(at) - 32), 0)
            others += len(lengths) * (32 * steps[f"drawing picture {number}"] + before(at + height * width) - begin)
        at += height * width + 1
    end = at + len(tokens.encode(LAST)) + 1
    going_on = before(end) + 32 * story.report.steps
    assert story.report.positions == going_on + others
    assert story.report.steps == sum(count for phase, count in steps.items() if phase[:7] in ("writing", "drawing"))
    assert story.report.branches == {(7.5, 1.5): 3, (7.5, 0.0): 2, (2.5, 1.5): 2, (1.0, 0.0): 1}[guided] and asked < end


def test_seeds_matter_above_temperature_0_only(golden_story: Asked) -> None:
    draw = lambda **options: golden_story(sampling=Sampling(steps=4, **options))[0].grids
    assert draw(seed=1) == draw(seed=2)
    wild = draw(seed=1, temperature=2.0)
    assert wild == draw(seed=1, temperature=2.0)
    assert all(one != other for one, other in zip(wild, draw(seed=2, temperature=2.0), strict=True))


def test_a_text_has_a_temperature_of_its_own(fresh: Backbone) -> None:
    """On the golden model itself, which writes noise, and after some of it nothing that can be told."""

    def outcome(seed: int, temperature: float) -> str:
        sampling = Sampling(steps=2, seed=seed)
        try:
            story = tell(fresh, "once", sampling=sampling, text=40, text_steps=8, text_temperature=temperature)
            return story.markdown
        except RequestError as error:
            return str(error)

    outcomes = lambda temperature: [outcome(seed, temperature) for seed in range(5)]
    assert outcomes(1.0) == outcomes(1.0) and len(set(outcomes(1.0))) > 1
    assert len(set(outcomes(0.0))) == 1


# --- how a story is written down ------------------------------------------------------------------------------------


def test_a_page_shows_text_as_text() -> None:
    grid = VQGrid(np.zeros((8, 8), int), 128)
    page = to_html(["<b>a & b</b>\n\nnext\nline", grid, "end", grid], '<script>"x"</script>')
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page and "<p>next<br>line</p>" in page
    assert page.index("picture_1.png") < page.index("<p>end</p>") < page.index("picture_2.png")
    assert "<title>&lt;script&gt;&quot;x&quot;&lt;/script&gt;</title>" in page


def test_markdown_of_what_is_not_there() -> None:
    assert to_markdown([]) == ""


def test_a_story_without_links_keeps_all_else() -> None:
    markdown = f"{ONE}\n\n![picture 1](picture_1.png)\n\n![picture 12](picture_12.png) ![this](elsewhere.png)"
    assert without_links(markdown) == f"{ONE}\n\n[picture 1]\n\n[picture 12] ![this](elsewhere.png)"

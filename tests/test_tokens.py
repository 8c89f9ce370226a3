"""Special ids, size tokens and prompts."""

from __future__ import annotations

import json
import random
import shutil
from itertools import count, islice
from pathlib import Path

import pytest
from synthetic import tiny

from llada2_mlx import prompts
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.errors import CheckpointError, RequestError
from llada2_mlx.shapes import grammar
from llada2_mlx.shapes.world import scenes
from llada2_mlx.tokens import Tokens, check_size
from llada2_mlx.vq import VQGrid


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Backbone(Checkpoint(tiny())).tokens


def test_the_sizes_that_have_a_token(tokens: Tokens) -> None:
    assert tokens.sizes == (*range(8, 36, 2), *range(36, 256))


def test_the_files_alone_say_which_sizes_have_a_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for each in (checkpoint, Checkpoint(tiny()), Checkpoint(BUILT_IN)):
        sizes = Tokens(each).sizes
        for side in range(1, 300):
            if side in sizes:
                check_size(each, 8, side)
            else:
                with pytest.raises(RequestError, match=f"A grid of 8 x {side} codes"):
                    check_size(each, 8, side)
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        check_size(Checkpoint(tmp_path), 8, 8)


@pytest.mark.parametrize("size", [(8, 8), (34, 8), (36, 37), (255, 255)])
def test_a_header_is_four_ids(tokens: Tokens, size: tuple[int, int]) -> None:
    header = tokens.header(*size)
    assert header == tokens.encode(f"<|image|><|reserved_token_{size[0]}|><|reserved_token_{size[1]}|><boi>")
    assert len(header) == 4


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (35, 8), (0, 8), (256, 8), (-8, 8), (8, 6)])
def test_a_size_without_a_token_is_refused_and_the_sizes_named(tokens: Tokens, size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=r"no size tokens .* 8, 10, 12, .* 34, 36-255"):
        tokens.header(*size)


@pytest.mark.parametrize("text", ["a cat", "猫と犬 🐈‍⬛🐕", "Ünïcödé — “quotes”", " leading and trailing "])
def test_text_survives(tokens: Tokens, text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text


def test_special_tokens_and_codes_are_no_text(tokens: Tokens) -> None:
    assert (
        tokens.decode([*tokens.encode("a"), tokens.end, tokens.mask, tokens.image_offset + 5, *tokens.encode("b")])
        == "ab"
    )


def test_a_grid_of_another_model_is_refused(tokens: Tokens) -> None:
    grid = VQGrid.from_list([0] * 64, 8, 8, tokens.codebook_size * 2)
    with pytest.raises(RequestError, match="codebook of 512, the model tiny has 256"):
        prompts.understand(tokens, grid, "what?")
    with pytest.raises(RequestError, match="codebook"):
        prompts.edit(tokens, grid, "blue")


def test_unconditional_branches_replace_one_thing(tokens: Tokens) -> None:
    grid = VQGrid.from_list(list(range(64)), 8, 8, tokens.codebook_size)
    full, no_text, no_image = prompts.edit(tokens, grid, "make it blue").branches
    text, plain = tokens.encode("make it blue"), tokens.encode("<uncondition>")
    joined = ",".join(map(str, full))
    assert joined.replace(",".join(map(str, text)), ",".join(map(str, plain))) == ",".join(map(str, no_text))
    assert len(full) - len(no_image) == 64 + 4  # header, codes and end become <|image|> alone
    assert full[-4:] == no_text[-4:] == no_image[-4:] == tokens.header(8, 8)
    assert len(plain) > 1  # plain text, not a special token


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a fox in the snow", "fox, snow"),
        ("A red circle. Fox, fox and FOX's den!", "Fox, fox, FOX, den"),
        ("ein roter Kreis", "ein, roter, Kreis"),
        ("一只狐狸", "一只狐狸"),
        ("3 red circles", None),
        ("", None),
        ("!?", None),
    ],
)
def test_a_toy_says_which_words_it_never_learned(tokens: Tokens, text: str, unknown: str | None) -> None:
    toy = Tokens(Checkpoint(BUILT_IN))
    doubt = toy.doubt(text)
    assert doubt is None if unknown is None else f"none of its own: {unknown}. It knows circles" in doubt
    assert tokens.doubt(text) is None  # a model that states no world knows everything


def test_a_toy_knows_every_word_that_it_was_taught() -> None:
    toy, rng = Tokens(Checkpoint(BUILT_IN)), random.Random(0)
    for scene in islice(scenes("words"), 60):
        asked = [grammar.question(scene, topic, rng) for topic in grammar.Topic]
        edits = [edit for change in grammar.Change if (edit := grammar.edit(scene, change, rng))]
        said = [grammar.caption(scene, rng), grammar.describe(scene), *(edit.instruction for edit in edits)]
        for text in [*said, *(part for question in asked for part in (question.text, question.answer))]:
            assert toy.doubt(text) is None, text


CONTROLS = [
    *("<|mask|>", "<boi>", "<role>", "</role>", "<|image|>", "<|/image|>", "<|endoftext|>", "<|role_end|>"),
    *("<|startoftext|>", "[CLS]", "[gMASK]", "<think>", "</think>", "<|reserved_token_8|>", "<|reserved_token_36|>"),
]


@pytest.fixture(scope="module", params=["golden", "Shapes", "tiny"])
def any_tokens(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Tokens:
    others = {"Shapes": BUILT_IN, "tiny": tiny()}
    return Tokens(checkpoint if request.param == "golden" else Checkpoint(others[request.param]))


@pytest.mark.parametrize("control", CONTROLS)
def test_what_a_user_writes_is_text(any_tokens: Tokens, control: str) -> None:
    for text in (control, f"a {control} cat", f" {control}\n", control * 3, f"<role>HUMAN</role>{control}"):
        ids = any_tokens.encode_text(text)
        assert not set(ids) & set(any_tokens.encode("".join(CONTROLS)))
        assert max(ids) < min(any_tokens.end, any_tokens.image_offset)
        assert any_tokens.decode(ids) == text


@pytest.mark.parametrize("control", CONTROLS)
def test_a_request_holds_no_control_token_but_its_own(any_tokens: Tokens, control: str) -> None:
    grid = VQGrid.from_list([0] * 64, 8, 8, any_tokens.codebook_size)
    special = set(any_tokens.encode("".join(CONTROLS)))
    for make in (
        lambda text: prompts.text_to_image(any_tokens, text, 8, 8),
        lambda text: prompts.understand(any_tokens, grid, text),
        lambda text: prompts.edit(any_tokens, grid, text),
    ):
        own = [[token for token in branch if token in special] for branch in make("a cat").branches]
        assert [[token for token in branch if token in special] for branch in make(control).branches] == own


def test_other_text_has_the_ids_it_always_had(any_tokens: Tokens) -> None:
    rng = random.Random(0)
    ranges = ((0, 0x80), (0x80, 0x800), (0x2000, 0x2100), (0x3000, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FB00))
    words = ["a red circle", "  ", "\r\n", "don't", "<", "| >", "<uncondition>", "12345", "<|mask", "role", "\0"]
    for _ in range(300):
        parts = [chr(rng.randrange(*rng.choice(ranges))) if rng.random() < 0.7 else rng.choice(words) for _ in range(9)]
        text = "".join(parts)
        assert any_tokens.encode_text(text) == any_tokens.encode(text)


def changed(folder: Path, change) -> Tokens:
    """The tokens of a checkpoint whose tokenizer.json is changed."""
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(BUILT_IN / name, folder)
    content = json.loads((BUILT_IN / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokens(Checkpoint(folder))


def test_no_spelling_makes_a_control_token(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["normalizer"] = {"type": "NFKC"}
        for token in content["added_tokens"]:
            token |= {"normalized": True, "lstrip": True, "rstrip": True, "special": token["id"] % 2 == 0}

    tokens = changed(tmp_path / "normalised", change)
    for text in ("<|mask|>", "＜|mask|＞", "a ＜boi＞ b", "＜role＞"):
        ids = tokens.encode_text(text)
        assert max(ids) < tokens.end - 1 and len(ids) > 3
    assert tokens.encode_text("ﬁne, a red circle") == tokens.encode("ﬁne, a red circle")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_vocabulary_that_can_spell_a_control_token_does_not(tmp_path: Path, ignore_merges: bool) -> None:
    def change(content: dict) -> None:
        model, word = content["model"], "<boi>"
        model["ignore_merges"], content["pre_tokenizer"]["use_regex"] = ignore_merges, False
        parts = [(word[:end], word[end]) for end in range(1, len(word))] + [("z", "z"), ("zz", "z")]
        for left, right in parts:
            free = max(number for number in model["vocab"].values() if number < 10**6) + 1
            model["vocab"][left + right] = 10**6 if left == "zz" else free  # zzz is an image code
            model["merges"].append([left, right])
        rest = count(len(model["vocab"]))  # the library gives an added token the word's number, or the next
        for token in content["added_tokens"]:
            token["id"] = model["vocab"].get(token["content"]) or next(rest)

    tokens = changed(tmp_path / "words", change)
    assert tokens.encode_text("<boi") == tokens.encode("<boi") and len(tokens.encode("<boi")) == 1
    ids = tokens.encode_text("<boi> zzz")
    assert tokens.boi not in ids and max(ids) < tokens.image_offset
    assert tokens.decode(ids) == "<boi> zzz"


ENDS = [
    "\n",
    " ",
    "\t",
    "\r\n",
    "\n\n  ",
    "\u3000",
    "\xa0",
    "\u200b",
    "\ufeff",
    "\u2060",
    "\u2028",
    "\u200e",
    "\0",
    "\x85",
]


@pytest.mark.parametrize("end", ENDS)
def test_the_ends_of_a_text_do_not_matter(any_tokens: Tokens, end: str) -> None:
    grid = VQGrid.from_list([0] * 64, 8, 8, any_tokens.codebook_size)
    for text in (f"a cat?{end}", f"{end}a cat?", f"{end} a cat?{end}{end}"):
        assert prompts.text_to_image(any_tokens, text, 8, 8) == prompts.text_to_image(any_tokens, "a cat?", 8, 8)
        assert prompts.understand(any_tokens, grid, text) == prompts.understand(any_tokens, grid, "a cat?")
        assert prompts.edit(any_tokens, grid, text) == prompts.edit(any_tokens, grid, "a cat?")
        assert prompts.require_text(text, "prompt") == "a cat?"


@pytest.mark.parametrize("text", ["one\n\n two\u200bthree", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "é", "👩‍🚀"])
def test_what_is_within_a_text_stays(text: str) -> None:
    assert prompts.trim(text) == text


@pytest.mark.parametrize("text", ["", "   ", "\n\t", *ENDS])
def test_nothing_is_no_text(text: str) -> None:
    with pytest.raises(RequestError, match="The prompt is empty"):
        prompts.require_text(text, "prompt")

"""Special ids, size tokens and prompts."""

from __future__ import annotations

import pytest
from synthetic import tiny

from llada2_mlx import prompts
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.errors import RequestError
from llada2_mlx.tokens import Tokens
from llada2_mlx.vq import VQGrid


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Backbone(Checkpoint(tiny())).tokens


def test_the_sizes_that_have_a_token(tokens: Tokens) -> None:
    assert tokens.sizes == (*range(8, 36, 2), *range(36, 256))


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


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_nothing_is_no_text(text: str) -> None:
    with pytest.raises(RequestError, match="The prompt is empty"):
        prompts.require_text(text, "prompt")

"""Conversations: what the model reads of them, and that it reads nothing twice."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import tiny

from llada2_mlx import prompts
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.sprint import Sprint
from llada2_mlx.chat import KEPT, Conversation, Reply, answered, reply, settled
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.errors import CheckpointError, RequestError
from llada2_mlx.progress import Progress
from llada2_mlx.prompts import Turn
from llada2_mlx.tokens import Tokens, UserText
from llada2_mlx.vq import GridSet, Origin, VQGrid

# nothing is accepted early, so that positions can be counted
SAMPLING = Sampling(steps=4, threshold=1.0)
TEMPLATE = """\
{{- '<role>SYSTEM</role>' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + message.content + '<|role_end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""


def with_template(folder: Path, template: str) -> Checkpoint:
    """The tiny model with a chat template."""
    shutil.copytree(tiny(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def plain() -> Backbone:
    return Backbone(Checkpoint(tiny()))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone(with_template(tmp_path_factory.mktemp("chat") / "talker", TEMPLATE))


def grid(rows: int, columns: int, seed: int = 0) -> VQGrid:
    return VQGrid(np.random.default_rng(seed).integers(0, 256, (rows, columns)), 256)


def say(backbone: Backbone, conversation: Conversation, text: str, pictures=None, **options) -> Reply:
    return reply(backbone, conversation, text, pictures, 70, SAMPLING, **options)


def block(tokens: Tokens, grid: VQGrid) -> list[int]:
    head = f"<|image|><|reserved_token_{grid.height}|><|reserved_token_{grid.width}|><boi>"
    return [
        *tokens.encode(head),
        *(tokens.image_offset + code for code in grid.to_list()),
        *tokens.encode("<|/image|>"),
    ]


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_text_alone_is_written_by_the_tokenizers_own_template(backbone: Backbone, system: str) -> None:
    tokens = backbone.tokens
    turns = [Turn("Who are you?", answer="I am.\n"), Turn("Where?  ", answer="Here, 猫")]
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [{"role": "user", "content": turn.text.strip()}, {"role": "assistant", "content": turn.answer}]
    messages.append({"role": "user", "content": "When?"})
    from transformers import PreTrainedTokenizerFast

    published = PreTrainedTokenizerFast.from_pretrained(tokens.folder)
    whole = published.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = prompts.chat(tokens, turns, " When?\n", system=f" {system}").conditional
    assert ids == published.encode(whole, add_special_tokens=False)


def test_a_conversation_with_pictures(backbone: Backbone) -> None:
    tokens, one, two = backbone.tokens, grid(8, 8), grid(8, 20, 1)
    said = [Turn("Hello", answer="Hi"), Turn("What is it?", one, "A cat.")]
    ids = prompts.chat(tokens, said, "Which?", GridSet((two, one))).conditional
    human, assistant = tokens.encode("<role>HUMAN</role>"), tokens.encode("<role>ASSISTANT</role>")
    assert ids == [
        *tokens.encode("<role>SYSTEM</role> You are a multimodal understanding assistant. "),
        *[*human, *tokens.encode("Hello"), *assistant, *tokens.encode("Hi")],
        *[*human, *block(tokens, one), *tokens.encode("What is it?"), *assistant, *tokens.encode("A cat.")],
        *[*human, *block(tokens, two), *block(tokens, one), *tokens.encode("Which?"), *assistant],
    ]


def test_a_system_text_takes_the_place_of_the_trained_one(plain: Backbone) -> None:
    tokens = plain.tokens
    ids = prompts.chat(tokens, [], "Which?", system="Be brief.").conditional
    assert ids == tokens.encode("<role>SYSTEM</role> Be brief. <role>HUMAN</role>Which?<role>ASSISTANT</role>")


def test_without_a_template_text_has_the_form_of_pictures(plain: Backbone) -> None:
    tokens = plain.tokens
    ids = prompts.chat(tokens, [], "Who?").conditional
    written = (
        "<role>SYSTEM</role> You are a multimodal understanding assistant. <role>HUMAN</role>Who?<role>ASSISTANT</role>"
    )
    assert ids == tokens.encode(written)


def test_parts_are_read_as_one_text() -> None:
    """What stands between two control tokens has the ids that it has as a whole: " red" is one, " " and "red" are two."""
    tokens = Tokens(Checkpoint(BUILT_IN))
    parts = ["<role>HUMAN</role>A ", UserText("red"), " circle<boi>", [7], UserText("in "), UserText("the"), " top"]
    whole = tokens.encode("<role>HUMAN</role>A red circle<boi>")
    assert tokens.encode_parts(parts) == [*whole, 7, *tokens.encode("in the top")]
    assert len(whole) < sum(len(tokens.encode(part)) for part in parts[:3])
    assert tokens.encode_parts([]) == tokens.encode_parts(["", UserText("")]) == []


CONTROLS = [
    "<|mask|>",
    "<boi>",
    "<role>",
    "</role>",
    "<|image|>",
    "<|endoftext|>",
    "<|role_end|>",
    "<|reserved_token_8|>",
]


@pytest.mark.parametrize("pictures", [None, grid(8, 8)])
@pytest.mark.parametrize("control", CONTROLS)
def test_what_a_person_writes_is_text(backbone: Backbone, control: str, pictures: VQGrid | None) -> None:
    tokens = backbone.tokens
    special = {tokens.encode(each)[0] for each in CONTROLS}

    def kinds(text: str) -> list[int]:
        turns = [Turn(text, answer=text)]
        return [token for token in prompts.chat(tokens, turns, text, pictures, text).conditional if token in special]

    assert kinds(f"a {control}{control} cat") == kinds("a cat") != []
    assert kinds(f"{control}") == kinds("a")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ messages[0].content }}", "does not write every message of a conversation once and in order"),
        ("{{ messages[0].content }}{{ raise_exception('no') }}", r"cannot write a conversation .* user \(no\)"),
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", "once and in order"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, template: str, sentence: str) -> None:
    tokens = Tokens(with_template(tmp_path / "odd", template))
    with pytest.raises(CheckpointError, match=sentence):
        prompts.chat(tokens, [Turn("one", answer="two")], "three")


# --- nothing is read twice ------------------------------------------------------------------------------------------


def test_a_second_turn_reads_only_what_is_new(backbone: Backbone) -> None:
    picture = GridSet((grid(8, 20), grid(10, 10)))
    first = say(backbone, Conversation(), "What do you see in these two?", picture)
    session = first.conversation._read._session
    assert session.final >= len(session) - 64 and session.final > 260  # all but the block in which the answer ended
    second = say(backbone, first.conversation, "And which is the larger one?")
    size, blocks, steps = 32, second.report.blocks, second.report.steps
    prompt = len(prompts.chat(backbone.tokens, first.conversation.turns, "And which is the larger one?").conditional)
    begins = prompt // size * size
    # once what is not final and what is new, with each further block the one before it, and a block at every other step
    assert second.report.positions == begins + size - session.final + (blocks - 1) * 2 * size + (steps - blocks) * size
    anew = say(backbone, replace(first.conversation, _read=None), "And which is the larger one?")
    assert anew.report.positions == second.report.positions + session.final
    assert anew.ids == second.ids


def test_a_third_turn_too_and_text_alone(backbone: Backbone) -> None:
    conversation, texts = Conversation("Be brief."), ["Who are you? " * 20, "Where?", "When?"]
    positions = []
    for text in texts:
        answer = say(backbone, conversation, text)
        anew = say(backbone, replace(conversation, _read=None), text)
        assert answer.ids == anew.ids and answer.text == anew.text
        positions.append(anew.report.positions - answer.report.positions)
        conversation = answer.conversation
    assert positions[0] == 0 and 256 < positions[1] < positions[2]
    assert [turn.text for turn in conversation.turns] == [prompts.trim(text) for text in texts]


@pytest.mark.parametrize("method", [Method.RECOMPUTE, Method.PLAIN])
def test_the_slower_ways_give_the_same_answers(backbone: Backbone, method: Method) -> None:
    fast = slow = Conversation()
    for text, *pictures in (("What is it?", grid(8, 8)), ("And now?",)):
        one, other = say(backbone, fast, text, *pictures), say(backbone, slow, text, *pictures, method=method)
        assert one.ids == other.ids
        fast, slow = one.conversation, other.conversation
    assert fast == slow and slow._read is None


def test_the_first_picture_may_come_later(backbone: Backbone) -> None:
    """The form changes with it, and so what is read changes from the beginning."""
    first = say(backbone, Conversation(), "Hello there").conversation
    second = say(backbone, first, "What is it?", grid(8, 8))
    assert second.ids == say(backbone, replace(first, _read=None), "What is it?", grid(8, 8)).ids


def test_a_conversation_may_be_continued_twice(backbone: Backbone) -> None:
    first = say(backbone, Conversation(), "Hello there, what can you do? " * 5).conversation
    alone = {text: say(backbone, replace(first, _read=None), text).ids for text in ("One?", "Two, or more?")}
    for text in (*alone, *alone):
        assert say(backbone, first, text).ids == alone[text]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda text: (text, say(backbone, first, text)), (*alone, *alone)))
    for text, answer in together:
        assert answer.ids == alone[text] and answer.report.positions < 5 * 32 * 8
    assert len(first.turns) == 1


def test_another_block_length_reads_anew(backbone: Backbone) -> None:
    first = say(backbone, Conversation(), "Hello there").conversation
    other = Sampling(block_length=16, steps=4, threshold=1.0)
    answer, anew = (reply(backbone, each, "And?", None, 40, other) for each in (first, replace(first, _read=None)))
    assert answer.ids == anew.ids and answer.report.positions == anew.report.positions


def test_with_sprint_and_exactly_in_turn(backbone: Backbone) -> None:
    """What SPRINT leaves out in an answer is left out there alone: the next turn reads all that was said."""
    sprint = Sprint(keep_ratio=0.3, warm_up=1)
    first = say(backbone, Conversation(), "What do you see here, and what is it good for?", grid(16, 16), sprint=sprint)
    for options in ({}, {"sprint": sprint}):
        answer, anew = (
            say(backbone, each, "And now?", **options)
            for each in (first.conversation, replace(first.conversation, _read=None))
        )
        assert answer.ids == anew.ids and answer.report.positions < anew.report.positions


# --- where it is gone -----------------------------------------------------------------------------------------------


def test_a_backbone_that_was_let_go_reads_anew(backbone: Backbone) -> None:
    first = say(backbone, Conversation(), "Hello there, what can you do? " * 5).conversation
    kept = say(backbone, first, "And?")
    assert first._read._session is not None
    backbone.unload()
    assert first._read._session is None  # its memory is free again too
    again = say(backbone, first, "And?")
    assert again.ids == kept.ids and again.report.positions > kept.report.positions


def test_another_backbone_of_the_same_model(backbone: Backbone) -> None:
    first = say(backbone, Conversation(), "Hello there", grid(8, 8)).conversation
    other = Backbone(backbone.checkpoint, backbone.precision)
    answer, kept = say(other, first, "And?"), say(backbone, first, "And?")
    assert answer.ids == kept.ids and answer.report.positions > kept.report.positions
    assert say(backbone, answer.conversation, "Why?").ids == say(other, answer.conversation, "Why?").ids


def test_a_model_with_other_ids_reads_the_text(backbone: Backbone, checkpoint: Checkpoint) -> None:
    golden = Backbone(checkpoint, "float32")
    turn = Turn("Hello", answer="I am a cat.", ids=(1, 2, 3), tokenizer=backbone.tokens.fingerprint)
    assert backbone.tokens.fingerprint != golden.tokens.fingerprint
    assert prompts.chat(backbone.tokens, [turn], "x") != prompts.chat(backbone.tokens, [replace(turn, ids=(4,))], "x")
    ids = prompts.chat(golden.tokens, [turn], "And?").conditional
    assert golden.tokens.decode(ids).endswith("HelloASSISTANTI am a cat.HUMANAnd?ASSISTANT".replace("</role>", ""))
    assert say(golden, Conversation(turns=(turn,)), "And?").conversation.turns[0] == turn


def test_only_a_few_conversations_are_kept(backbone: Backbone) -> None:
    first = say(backbone, Conversation(), "Hello there, what can you do? " * 5)
    near = say(backbone, first.conversation, "And?")
    for number in range(KEPT):
        last = say(backbone, Conversation(), f"Hello {number}").conversation
    assert first.conversation._read._session is None and last._read._session is not None
    again = say(backbone, first.conversation, "And?")
    assert again.ids == near.ids and again.report.positions > near.report.positions


# --- the answer -----------------------------------------------------------------------------------------------------


def test_an_answer_grows_and_has_no_control_tokens(backbone: Backbone) -> None:
    texts: list[str] = []
    answer = say(backbone, Conversation(), "What is it?", on_text=texts.append)
    assert len(texts) == answer.report.steps and any("…" in text for text in texts)
    assert texts[-1] == answer.text == answer.conversation.turns[0].answer
    tokens = backbone.tokens
    assert not {tokens.mask, *tokens.ends} & set(answer.ids)


def test_what_is_no_part_of_an_answer(backbone: Backbone) -> None:
    tokens = backbone.tokens
    ids, (role_end,) = tokens.encode("ab"), tokens.encode("<|role_end|>")
    assert tokens.ends == {tokens.end, role_end}
    turn = answered(backbone, "x", None, [ids[0], tokens.mask, *ids[1:], role_end])
    assert (turn.answer, turn.ids) == ("ab", tuple(ids))
    for generated, count in (((*ids, tokens.mask, *ids), len(ids)), ((*ids, role_end), len(ids)), ((tokens.mask,), 0)):
        assert settled(tokens, Progress("denoising", 1, 2, generated)) == ids[:count]
    assert settled(tokens, Progress("denoising", 1, 2, tuple(ids))) == ids


def test_a_transcript() -> None:
    turns = (
        Turn("One?", grid(8, 8), "Yes."),
        Turn("Two?", GridSet((grid(8, 8),) * 2), "No."),
        Turn("So?", answer="Ah."),
    )
    assert Conversation(turns=turns).transcript() == (
        "You: [1 picture] One?\n\nLLaDA2: Yes.\n\nYou: [2 pictures] Two?\n\nLLaDA2: No.\n\nYou: So?\n\nLLaDA2: Ah."
    )


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused_before_anything_runs() -> None:
    fresh = Backbone(Checkpoint(tiny()))
    long = Conversation(turns=(Turn("x" * 4000, answer="y" * 3000),) * 1)
    with pytest.raises(
        RequestError,
        match=r"too long: it has 7\d\d\d tokens after 1 turns, .* 2048 for the answer .* takes 8192. Begin a new",
    ):
        reply(fresh, long, "And?")
    with pytest.raises(RequestError, match="The message is empty"):
        reply(fresh, Conversation(), " \n")
    with pytest.raises(RequestError, match="0 tokens are asked for"):
        reply(fresh, Conversation(), "x", None, 0)
    with pytest.raises(RequestError, match="codebook of 512"):
        reply(fresh, Conversation(), "x", VQGrid(np.zeros((8, 8), int), 512))
    stranger = replace(grid(8, 8), origin=Origin("stranger", vectors="other"))
    with pytest.raises(RequestError, match="of the model stranger, and tiny has another codebook"):
        reply(fresh, Conversation(turns=(Turn("x", stranger, "y"),)), "And?")
    with pytest.raises(RequestError, match="The text cannot be read"):
        reply(fresh, Conversation(), "a\udcff")
    assert not fresh.loaded

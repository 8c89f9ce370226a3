"""The text tokenizer: bytes, the merges that the world's sentences ask for, and the published special tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ...files import replacing, write_json
from ..grammar import Change, Topic, caption, edit, placeless, plan, question
from ..several import MOST_PICTURES, About, Loan, borrowing, pair_question, tale
from ..world import scenes

SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mask|>", "<|role_end|>", "<|image|>", "<|/image|>", "<boi>",
    "<think>", "</think>", "<role>", "</role>",
)  # fmt: skip
SIZES = (*range(8, 36, 2), *range(36, 256))  # grid sides that have a token, as in the published vocabulary
SYSTEM = (
    "SYSTEM", "HUMAN", "ASSISTANT", "<uncondition>",
    " You are a text-to-image generation assistant. ", " You are an image editing assistant. ",
)  # fmt: skip

FURTHER_SYSTEM = (
    " You are a text-to-image generation assistant with a thinking process. ",
    " You are a interleaved generation assistant. ",
)


def write_tokenizer(folder: Path, text_ids: int, sentences: Iterable[str] = ()) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; merges are learned from ``sentences``."""
    special = [*SPECIAL, *(f"<|reserved_token_{size}|>" for size in SIZES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_ids - len(special),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    assert tokenizer.get_vocab_size() <= text_ids, "the text vocabulary is too small for the special tokens"
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def add_words(path: Path, text_ids: int, sentences: Iterable[str]) -> dict[int, list[int]]:
    """Make each word of ``sentences`` one token of a ``tokenizer.json``, at ids that were free. No id of it changes.

    A text without such a word is the same ids as before: the new merges come after all others, and their parts are no
    part of an older one.

    Returns:
        The ids that are new now, and the ids that stood in their place.

    Raises:
        ValueError: there are fewer than ``text_ids`` in all free.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    # the library numbers added tokens by the size of the vocabulary, unless they are words of it
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    old, spaces = Tokenizer.from_file(str(path)), pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = dict.fromkeys(word for text in sentences for word, _ in spaces.pre_tokenize_str(text))
    added: dict[str, list[str]] = {}
    for word in words:
        model = models.BPE({**vocabulary}, [tuple(merge) for merge in merges])
        pieces = [token.value for token in model.tokenize(word)]
        for end in range(2, len(pieces) + 1):
            made, parts = "".join(pieces[:end]), ("".join(pieces[: end - 1]), pieces[end - 1])
            if made not in vocabulary:
                vocabulary[made] = max(vocabulary.values()) + 1
                added[made] = pieces[:end]
            merges.append(list(parts))
    if max(vocabulary.values()) >= text_ids:
        raise ValueError(f"{len(added)} more tokens do not fit into {text_ids} text ids")
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    old_id = lambda piece: old.token_to_id(piece)
    known = lambda pieces: [
        part for piece in pieces for part in (known(added[piece]) if piece in added else [old_id(piece)])
    ]
    return {vocabulary[made]: known(pieces) for made, pieces in added.items()}


def further_sentences(count: int = 2000) -> Iterator[str]:
    """What is said of the world beyond ``sentences``, and around it."""
    rng, world = random.Random("further sentences"), scenes("further sentences")
    for first, second in islice(zip(world, world), count):
        yield placeless(first.shapes[:2], rng)
        yield plan(first)
        for about in About:
            if asked := pair_question((first, second), about, rng):
                yield asked.text
                yield asked.answer
        for loan in Loan:
            if made := borrowing((first, second), loan, rng):
                yield made.instruction
        told = tale(first, MOST_PICTURES - 1, rng)
        yield told.prompt
        yield from told.texts
    yield from FURTHER_SYSTEM


def sentences(count: int = 4000) -> Iterator[str]:
    """Everything that is said about the world, and around it."""
    rng = random.Random("sentences")
    for scene in islice(scenes("sentences"), count):
        yield caption(scene, rng)
        for topic in Topic:
            asked = question(scene, topic, rng)
            yield asked.text
            yield asked.answer
        for change in Change:
            if made := edit(scene, change, rng):
                yield made.instruction
        yield from SYSTEM

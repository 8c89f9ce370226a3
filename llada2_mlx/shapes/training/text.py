"""The text tokenizer: bytes, the merges that the world's sentences ask for, and the published special tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..grammar import Change, Topic, caption, edit, question
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
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


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

"""The text tokenizer, the special ids, and the header that states an image's size."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.hub import again
from .checkpoint.layout import Checkpoint
from .checkpoint.sizes import DECODED_PIXELS, ENCODED_PIXELS
from .errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORD = re.compile(r"[^\W\d_]+")
_NEEDED = ("<|endoftext|>", "<|mask|>", "<|image|>", "<|/image|>", "<boi>", "<role>", "</role>")


class UserText(str):
    """Text that a person wrote, or that stands for itself: no control token is read in it."""


class Tokens:
    """Text <-> ids of one checkpoint. All ids are read from its tokenizer; none is a constant.

    Args:
        checkpoint: a checkpoint with ``tokenizer.json`` and ``config.json``.

    Raises:
        CheckpointError: there is no usable tokenizer, or it lacks a token that the prompts are made of.
    """

    def __init__(self, checkpoint: Checkpoint):
        from transformers import AutoTokenizer, PreTrainedConfig  # seconds to import

        self.folder: Path = checkpoint.root
        try:
            # an empty config, because the library does not know the backbone's
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(checkpoint.root), config=PreTrainedConfig(), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # the library raises whatever its readers raise
            raise CheckpointError(
                f"The text tokenizer in {checkpoint.root} cannot be read ({error}). "
                f"{again(checkpoint.root / 'tokenizer.json')}"
            ) from error
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.image_offset = checkpoint.config.image_token_offset
        self.codebook_size = checkpoint.config.codebook_size
        self.world = checkpoint.world
        stated = _stated_tokens(checkpoint)
        # the library gives a token that is only named in tokenizer_config.json a new id, which the model never saw
        if lacking := [
            token for token in _NEEDED if stated.get(token) is None or stated[token] != self._vocabulary.get(token)
        ]:
            raise CheckpointError(
                f"The text tokenizer in {checkpoint.root} has no token {', '.join(lacking)}; it is not of a LLaDA2.0-Uni model."
            )
        self.end = self._vocabulary["<|endoftext|>"]
        self.mask = self._vocabulary["<|mask|>"]
        self.image = self._vocabulary["<|image|>"]
        self.image_end = self._vocabulary["<|/image|>"]
        self.boi = self._vocabulary["<boi>"]
        # a conversation's turn may end with a token of its own
        self.ends = frozenset({self.end, self._vocabulary.get("<|role_end|>", self.end)})

    def encode(self, text: str) -> list[int]:
        """Ids of one piece of our own text, in which ``<role>`` and the like are tokens; nothing is added around it.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        _require_unicode(text)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Ids of what a user wrote. All of it is text: no id is a special token, an added one or an image code.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        _require_unicode(text)
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: Iterable[str | UserText | Sequence[int]]) -> list[int]:
        """Ids of a text in parts, encoded as one text: what stands between two control tokens is split as if it had no parts.

        Args:
            parts: our own text, in which control tokens are read; a person's, which is all text; and ids as they are.
        """
        ids: list[int] = []
        plain = ""
        for part in parts:
            if not isinstance(part, str):
                ids += [*self.encode_text(plain), *part]
                plain = ""
                continue
            for piece in [part] if isinstance(part, UserText) else self._controls.split(part):
                if not isinstance(part, UserText) and self._controls.fullmatch(piece):
                    ids += [*self.encode_text(plain), self._vocabulary[piece]]
                    plain = ""
                else:
                    plain += piece
        return [*ids, *self.encode_text(plain)]

    @cached_property
    def _controls(self) -> re.Pattern:
        """Any added token but the image codes, the longest first; split at it, a text keeps it as a piece."""
        added = [word for word, number in self._tokenizer.get_added_vocab().items() if number < self.image_offset]
        return re.compile(f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True)))})")

    def around(self, roles: Sequence[str]) -> list[str] | None:
        """What the tokenizer's own chat template writes around messages, up to where an answer is to begin.

        Args:
            roles: of the messages in their order: "system", "user", "assistant".

        Returns:
            The text before the first message, between each and the next, and after the last; None without a template.

        Raises:
            CheckpointError: the template fails, or does not write each message once and in order.
        """
        if not self._tokenizer.chat_template:
            return None
        # of a plane for private use, so that neither a template nor a text has them
        marks = [f"\U000f0000{number}\U000f0001" for number in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template raises what it likes
            raise CheckpointError(
                f"The chat template of {self.folder} cannot write a conversation with the roles {', '.join(roles)} ({error})."
            ) from error
        pieces = re.split("\U000f0000\\d+\U000f0001", text)
        if re.findall("\U000f0000\\d+\U000f0001", text) != marks:
            raise CheckpointError(
                f"The chat template of {self.folder} does not write every message of a conversation once and in order, "
                "so what was said cannot be read from it."
            )
        return pieces

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers that give a text the same ids, as far as their vocabulary says."""
        return hashlib.sha256(json.dumps(sorted(self._vocabulary.items())).encode()).hexdigest()[:32]

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer without its added tokens, so that nothing a user writes, in any spelling, is one."""
        from tokenizers import Tokenizer

        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        added = content["added_tokens"]
        content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        # a vocabulary may hold an added token as a word of its own too
        numbers, words = {token["id"] for token in added}, {token["content"] for token in added}
        model = content["model"]
        if isinstance(model["vocab"], dict):
            forbidden = {
                word
                for word, number in model["vocab"].items()
                if word in words or number in numbers or number >= self.image_offset
            }
            _forget(model, forbidden)
        return Tokenizer.from_str(json.dumps(content))

    def doubt(self, text: str) -> str | None:
        """A sentence where ``text`` has words that a toy never learned, else None.

        A toy states what it knows. Its tokenizer was made of just that, so that a word it knows is one token.
        """
        if not self.world:
            return None
        known = lambda word: any(
            len(self.encode_text(lead + form)) == 1 for form in _spellings(word) for lead in ("", " ")
        )
        if not (unknown := [word for word in dict.fromkeys(_WORD.findall(text)) if not known(word)]):
            return None
        return (
            f"{self.folder.name} is a toy, and these words are none of its own: {', '.join(unknown[:8])}. It knows {self.world}. "
            "For anything else choose another model."
        )

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens and image codes are left out."""
        return self._tokenizer.decode([i for i in ids if i < self.image_offset], skip_special_tokens=True)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The grid sides, in codes, that have a size token, ascending."""
        return _sides(self._vocabulary)

    def header(self, height: int, width: int) -> list[int]:
        """``<|image|>``, the two size tokens and ``<boi>`` of a grid of ``height x width`` codes.

        Raises:
            RequestError: a side has no size token. Such a size would silently become other text.
        """
        self.check_size(height, width)
        return [self.image, *(self._vocabulary[f"<|reserved_token_{side}|>"] for side in (height, width)), self.boi]

    def read_header(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of codes that the header at the end of ``ids`` states; None where there is none."""
        sides = {self._vocabulary[f"<|reserved_token_{side}|>"]: side for side in self.sizes}
        match list(ids[-4:]):
            case [self.image, height, width, self.boi] if height in sides and width in sides:
                return sides[height], sides[width]
        return None

    def check_size(self, height: int, width: int) -> None:
        """Raise ``RequestError`` if a grid of ``height x width`` codes has no size tokens."""
        _require_sides(self.sizes, self.folder, height, width)

    def codes_to_ids(self, codes: list[int]) -> list[int]:
        """Token ids of image codes."""
        return [self.image_offset + code for code in codes]


def check_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    """As ``Tokens.check_size``, by what the files of a tokenizer state; it is not loaded for that.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
        RequestError: a side has no size token.
    """
    _require_sides(_sides(_stated_tokens(checkpoint)), checkpoint.root, height, width)


def _sides(vocabulary: Collection[str]) -> tuple[int, ...]:
    return tuple(side for side in range(1, 1024) if f"<|reserved_token_{side}|>" in vocabulary)


def _require_sides(sides: tuple[int, ...], folder: Path, height: int, width: int) -> None:
    if not {height, width} <= set(sides):
        largest = max(sides, default=0)
        raise RequestError(
            f"A grid of {height} x {width} codes (height x width) has no size tokens in the model {folder.name}. "
            f"Sides that have one: {_ranges(sides)} codes. The largest is {DECODED_PIXELS * largest} "
            f"pixels of a drawn picture ({DECODED_PIXELS} per code), {ENCODED_PIXELS * largest} of an "
            f"encoded one ({ENCODED_PIXELS})."
        )


def _spellings(word: str) -> tuple[str, ...]:
    return word, word.lower(), word.capitalize()


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"The text cannot be read: {error.reason} at character {error.start}.") from None


def _forget(model: dict, words: Collection[str]) -> None:
    """Take ``words`` out of a BPE model, and every merge that needs or makes one.

    A single character stays, and so does the word for what is unknown: without them text would be lost.
    """
    kept = lambda word: word not in words or len(word) == 1 or word == model.get("unk_token")
    pair = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    model["merges"] = [
        merge
        for merge in model.get("merges") or []
        if all(part not in words or len(part) == 1 for part in (*pair(merge), "".join(pair(merge))))
    ]
    model["vocab"] = {word: number for word, number in model["vocab"].items() if kept(word)}


def _stated_tokens(checkpoint: Checkpoint) -> dict[str, int]:
    """Tokens and ids as the files of a tokenizer state them."""
    content, config = checkpoint.json("tokenizer.json"), checkpoint.json("tokenizer_config.json")
    vocabulary = content.get("model", {}).get("vocab") or {}
    stated = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    stated |= {token["content"]: int(number) for number, token in (config.get("added_tokens_decoder") or {}).items()}
    return stated | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _ranges(sides: tuple[int, ...]) -> str:
    """'8, 10, 12, 36-255': runs of three and more are joined."""
    parts, run = [], []
    for side in (*sides, None):
        if run and (side is None or side != run[-1] + 1):
            parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            run = []
        run.append(side)
    return ", ".join(parts) or "none"

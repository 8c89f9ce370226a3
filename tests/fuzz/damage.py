"""Strategies that damage what is whole: bytes of a file, values of JSON, the header of a safetensors file."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

# numbers that programs stumble over, beside any others
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**30]),
    st.integers(-64, 64),
    st.sampled_from([0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.floats(allow_nan=True, allow_infinity=True),
)
# with what ends a line, turns its direction, has no place in a file's name, is half of a character or names a token
CONTROLS = [
    "<|mask|>",
    "<|image|>",
    "<boi>",
    "<role>",
    "</role>",
    "<|endoftext|>",
    "<uncondition>",
    "<|reserved_token_8|>",
]
PIECES = [
    *CONTROLS,
    "\u0000",
    "\u202e",
    "\u200b",
    "\ufeff",
    "\u2028",
    "..",
    "/",
    "\\",
    "%s",
    "{}",
    "\r\n",
    "a\u0301",
]
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(["a red circle", "?", "\ud800"]),
        st.sampled_from(PIECES),
        st.text("\u0000é猫🦊", max_size=4),
    ),
    max_size=6,
).map("".join)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


@st.composite
def bytes_of(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes changed, put in or taken out; or cut short, doubled, empty, or something else altogether."""
    content = bytearray(whole)
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return bytes(content[: draw(st.integers(0, len(content)))])
    for _ in range(draw(st.integers(1, 4))):
        # headers stand at the beginning: as often there as anywhere
        at = draw(st.integers(0, min(len(content), 200)) | st.integers(0, len(content)))
        what = draw(st.binary(min_size=1, max_size=8))
        kind = draw(st.integers(0, 2))
        content[at : at + (len(what) if kind == 0 else 0)] = what if kind < 2 else b""
        if kind == 2:
            del content[at : at + len(what)]
    return bytes(content)


@st.composite
def json_of(draw: st.DrawFn, whole: Any, values: st.SearchStrategy = VALUES) -> Any:
    """A JSON value in which a few places have another value, or none, or one more."""
    content = deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        holders = [holder for holder in _holders(content) if holder]
        if not holders or draw(st.integers(0, 40)) == 0:
            return draw(values)
        holder = draw(st.sampled_from(holders))
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw(TEXTS)] = holder[key]
        elif kind < 5 and isinstance(holder[key], (int, float)):
            holder[key] = draw(NUMBERS)
        else:
            holder[key] = draw(values)
    return content


def _holders(content: Any) -> list[Any]:
    """All objects and arrays in a JSON value, itself first."""
    if not isinstance(content, (dict, list)):
        return []
    inner = content.values() if isinstance(content, dict) else content
    return [content, *(holder for value in inner for holder in _holders(value))]


def written(content: Any) -> bytes:
    """JSON as bytes; with halves of characters, and numbers that are none, as Python's own writer has them."""
    return json.dumps(content).encode()


@st.composite
def safetensors_of(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with a damaged header, which states its own length; or damaged as any other file."""
    if draw(st.integers(0, 3)) == 0:
        return draw(bytes_of(whole))
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    kinds = st.sampled_from(["F32", "BF16", "F16", "I64", "U32", "BOOL", "F8_E4M3", "F64", "X"])
    text = written(draw(json_of(header, st.one_of(VALUES, kinds, st.lists(st.integers(0, 5000), max_size=3)))))
    stated = draw(
        st.one_of(st.just(len(text)), st.just(len(text)), st.sampled_from([0, 2**63, 2**64 - 1]), st.integers(0, 10**9))
    )
    if draw(st.integers(0, 3)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    return stated.to_bytes(8, "little") + text + data

"""How exactly a backbone's weights are kept: as they are stored, or in a few bits; and what fits into a machine.

Few bits are MLX's affine quantisation: groups of weights of a row share a scale and an offset. A config says so in a
``quantization`` block, in the form that mlx-lm writes and reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.config import BackboneConfig
from ..errors import CheckpointError, RequestError
from ..progress import amount
from ..worker import machine_bytes as machine_bytes
from ..worker import on_cpu
from .network import PREFILL, LLaDA2
from .working import BRANCHES, Working, fit

Quantization = dict[
    str, Any
]  # the block: ``bits`` and ``group_size``, and by module path what differs (False: nothing)

TYPES = {"float32": mx.float32, "bf16": mx.bfloat16}
BITS = {"8bit": 8, "6bit": 6, "4bit": 4}
READ_BITS = (2, 3, 4, 5, 6, 8)  # those of copies that others made
GROUP_SIZE = 64
GROUP_SIZES = (128, 64, 32)  # what MLX has
OTHER_BITS = 8  # at least, of everything but the routed experts: a tenth of the weights, and each token passes them all


def is_router(parameter: str) -> bool:
    """Whether this is a parameter of a router, which is float32 by design and keeps what it has."""
    return ".mlp.gate." in parameter


def parameter_type(parameter: str, dtype: mx.Dtype) -> mx.Dtype:
    """The type to keep a parameter in, in a network that runs in ``dtype``."""
    # MLX's CPU backend multiplies experts in no other type
    whole_expert = ".switch_mlp." in parameter and parameter.endswith(".weight")
    return mx.float32 if is_router(parameter) or (whole_expert and on_cpu()) else dtype


def scheme(config: BackboneConfig, bits: int, group_size: int = GROUP_SIZE) -> Quantization:
    """The block for a backbone whose routed experts have ``bits`` bits, and all other matrices at least 8.

    The router and the norms stay as they are. Where ``group_size`` does not divide a matrix's width, the next smaller
    size that does is taken; where none does, the matrix stays as it is.

    Raises:
        RequestError: there are no such bits or groups.
    """
    if bits not in BITS.values() or group_size not in GROUP_SIZES:
        raise RequestError(
            f"{bits} bits in groups of {group_size} are not possible; bits can be {_listed(BITS.values())}, "
            f"groups {_listed(GROUP_SIZES)}."
        )
    block: Quantization = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for path, module in _matrices(LLaDA2(config)):
        width = module.weight.shape[-1]
        groups = next((size for size in GROUP_SIZES if size <= group_size and width % size == 0), None)
        own = {"group_size": groups, "bits": bits if ".switch_mlp." in path else max(bits, OTHER_BITS)}
        if groups is None:
            block[path] = False
        elif own != {"group_size": group_size, "bits": bits}:
            block[path] = own
    return block


def check_block(block: Any, where: str) -> Quantization:
    """The block of a config, if it is one that can be used.

    Raises:
        CheckpointError: it is of another kind.
    """
    entries = (
        [block, *(entry for entry in block.values() if isinstance(entry, dict))] if isinstance(block, dict) else []
    )
    usable = lambda entry: entry.get("bits") in READ_BITS and entry.get("group_size") in GROUP_SIZES
    if not entries or not all(map(usable, entries)) or block.get("mode", "affine") != "affine":
        raise CheckpointError(
            f"{where} has a quantization that cannot be read: affine, with {_listed(READ_BITS)} bits and a group_size "
            f"of {_listed(GROUP_SIZES)}, is needed. Convert the model again."
        )
    return block


def build(config: BackboneConfig, block: Quantization | None = None) -> LLaDA2:
    """The network, its matrices quantised as ``block`` says; no weight is computed."""
    model = LLaDA2(config)
    if block is not None:
        nn.quantize(
            model, class_predicate=lambda path, module: hasattr(module, "to_quantized") and quantization_of(block, path)
        )
    return model


def quantization_of(block: Quantization, path: str) -> dict[str, int] | Literal[False]:
    """Bits and group size of a matrix, or False where it is not quantised."""
    entry = block.get(path, block)
    return entry and {"group_size": entry["group_size"], "bits": entry["bits"]}


def memory_bytes(config: BackboneConfig, dtype: mx.Dtype, block: Quantization | None = None) -> int:
    """What the weights take in memory, in a network that runs in ``dtype``."""
    parameters = tree_flatten(build(config, block).parameters())
    kept = lambda name, value: mx.uint32 if value.dtype == mx.uint32 else parameter_type(name, dtype)
    return sum(prod(value.shape) * kept(name, value).size for name, value in parameters)


def choose(config: BackboneConfig, stored: str, memory: int) -> tuple[str, str]:
    """What ``auto`` means for a model that is not quantised: the most exact precision that fits, and why.

    Args:
        stored: "bf16" or "float32". Where MLX runs on the CPU, float32 stands for both.
        memory: in bytes, see ``machine_bytes``.
    """
    whole = ("float32",) if on_cpu() else ("float32", "bf16") if stored == "float32" else ("bf16",)
    return choose_of(config, (*whole, *BITS), memory)


def choose_of(config: BackboneConfig, precisions: Sequence[str], memory: int) -> tuple[str, str]:
    """The first of some precisions that fits into ``memory`` bytes, else the last; and why."""
    sizes = {name: precision_bytes(config, name) for name in precisions}
    works = {name: fit(config, run_type(name), memory - size) for name, size in sizes.items()}
    chosen = next((name for name, work in works.items() if work.fits), precisions[-1])
    told = [f"{name} takes {amount(size)}" for name, size in sizes.items()]
    larger, work = told[: list(sizes).index(chosen)], works[chosen]
    there = f"in the {amount(memory)} that MLX may use on this machine"
    needed = f"{told[len(larger)]}, and {amount(work.size)} to work {there}"
    if not work.fits:
        return chosen, f"Precision: {chosen}, the smallest; {needed}: {_too_large(work)}"
    smaller = f"; prompts are read in pieces of {work.piece} tokens" if work.piece < PREFILL else ""
    too_large = f"; {', '.join(larger)}, too much" if larger else ""
    return chosen, f"Precision: {chosen}. {needed}{smaller}{too_large}."


def precision_bytes(config: BackboneConfig, precision: str) -> int:
    """What the weights of a model take in memory that is converted to a precision, or run in it."""
    block = scheme(config, BITS[precision]) if precision in BITS else None
    return memory_bytes(config, run_type(precision), block)


def _too_large(work: Working) -> str:
    """What is to be expected where the work does not fit."""
    tokens = work.longest // BRANCHES
    if not tokens:
        return "it is too large, and will be slow or fail."
    return f"it is enough for {tokens} tokens with guidance, and what is longer will be slow or fail."


def run_type(precision: str) -> mx.Dtype:
    """The type that a network of a precision runs in; a quantised one in bf16, or float32 on the CPU."""
    return TYPES.get(precision) or (mx.float32 if on_cpu() else mx.bfloat16)


def _matrices(model: LLaDA2) -> Iterator[tuple[str, nn.Module]]:
    modules = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return ((path, module) for path, module in modules if hasattr(module, "to_quantized"))


def _listed(values: Any) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}"

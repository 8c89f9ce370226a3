"""Copies of a decoder with 8 bits, for MLX: half the memory. Written tensor by tensor, into a folder that says what it is of.

Few bits are MLX's affine quantisation; the copy's config has a ``quantization`` block in the form that mlx-lm writes. Eight
bits alone: with four, published ports of this network show grain.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.copies import (
    STATE,
    occupied,
    place_of,
    require_room,
    sizes_and_sums,
    state_of,
    written_alone,
)
from ..checkpoint.hub import again
from ..checkpoint.layout import Checkpoint, TensorInfo, check_tensors, safetensors_header
from ..errors import CheckpointError, RequestError
from ..files import holds_nothing, is_temporary, replacing, write_json
from ..progress import Progress
from ..vq import VQGrid
from ..worker import on_cpu
from .attention import SCORES
from .decoder import EMBEDDER, stored
from .device import read_config
from .flow import DecodeOptions
from .prior import FEATURE_UPSAMPLING
from .transformer_mlx import ADALN, FREQUENCIES, PIECE, TIME_HIDDEN, Config, ZImageTransformer

BITS, GROUP_SIZES = 8, (64, 32)
CACHE = 100_000_000  # bytes of freed buffers that MLX may keep while it decodes
# What there is of a token at once, in units of the network's width: of each in a layer, and of those of a piece beside that
IN_LAYER, IN_PIECE = 5, 16
FEATURE, TURN = 4, 8  # bytes of a value of the condition on its way, and of a rotation
WRITTEN = 1.5  # how often scores are there, where no kernel is fused
STORED = ("BF16", "F16", "F32")
_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32}

Block = dict[str, Any]  # ``bits`` and ``group_size``, and by module path what differs (False: nothing)


def weights_of(folder: Path) -> Path:
    """The one safetensors file of a decoder."""
    return Checkpoint(folder.parent).only_safetensors(folder.name)


def config_of(folder: Path) -> Config:
    """The sizes of a decoder's transformer.

    Raises:
        CheckpointError: its config cannot be read, or describes none that can be built.
    """
    where = folder / "config.json"
    try:
        return Config.from_dict(_stated(folder))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} describes no network that can be built ({error}). {again(where)}") from None


def block_of(folder: Path) -> Block | None:
    """How a decoder is quantised, as its config states it; None where it is not.

    Raises:
        CheckpointError: it is in a way that cannot be read.
    """
    block = _stated(folder).get("quantization")
    if block is None:
        return None
    entries = (
        [block, *(entry for entry in block.values() if isinstance(entry, dict))] if isinstance(block, dict) else []
    )
    usable = lambda entry: entry.get("bits") == BITS and entry.get("group_size") in GROUP_SIZES
    if not entries or not all(map(usable, entries)) or block.get("mode", "affine") != "affine":
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization that cannot be read: affine, with "
            f"{BITS} bits and a group_size of {' or '.join(map(str, GROUP_SIZES))}, is needed. Convert the decoder again."
        )
    return block


def scheme(config: Config, features: int) -> Block:
    """The block of a copy: matrices of layers have 8 bits; embedders, the last layer and what no group divides stay as they are."""
    block: Block = {"group_size": GROUP_SIZES[0], "bits": BITS, "mode": "affine"}
    for path, module in _matrices(ZImageTransformer(config, features)):
        width = module.weight.shape[-1]
        groups = next((size for size in GROUP_SIZES if width % size == 0), None)
        if not path.startswith(("layers.", "noise_refiner.", "context_refiner.")) or groups is None:
            block[path] = False
        elif groups != GROUP_SIZES[0]:
            block[path] = {"group_size": groups, "bits": BITS}
    return block


def build(config: Config, features: int, block: Block | None = None) -> ZImageTransformer:
    """The network, its matrices quantised as ``block`` says; no weight is computed."""
    transformer = ZImageTransformer(config, features)
    if block is not None:
        nn.quantize(transformer, class_predicate=lambda path, module: _how(block, path, module))
    return transformer


def check(folder: Path) -> tuple[ZImageTransformer, dict[str, TensorInfo]]:
    """The empty network of a decoder, and the header of its weights, which fits it.

    Raises:
        CheckpointError: they do not fit, or are of a type that cannot be read.
    """
    path = weights_of(folder)
    features = stored(path, EMBEDDER)[0].shape[-1]
    transformer = build(config_of(folder), features, block_of(folder))
    parameters, header = dict(tree_flatten(transformer.parameters())), safetensors_header(path)
    check_tensors(header, {name: value.shape for name, value in parameters.items()}, path)
    for name, value in parameters.items():
        if header[name].dtype not in (("U32",) if value.dtype == mx.uint32 else STORED):
            raise CheckpointError(
                f"{path} holds {name} ({header[name].dtype}); only weights in BF16, F16 or F32 can be read."
            )
    return transformer, header


def size_of_copy(folder: Path) -> int:
    """Bytes of a decoder's weights with 8 bits, from the headers of the files."""
    return sum(_bytes(info) for info in _copied(folder)[1].values())


def run_type(stored: str) -> mx.Dtype:
    """What a transformer runs in whose weights are stored in a type; a CPU multiplies float32 faster than bf16."""
    whole = stored == "F32" or on_cpu()
    return mx.float32 if whole else mx.bfloat16


def memory_bytes(folder: Path, quantised: bool) -> int:
    """What the weights of a decoder take in memory in MLX, from the headers of the files.

    Args:
        quantised: whether with 8 bits, where it is not stored with them.
    """
    tensors = _copied(folder)[1] if quantised and block_of(folder) is None else check(folder)[1]
    run = run_type(tensors["x_pad_token"].dtype).size
    return sum(prod(info.shape) * (4 if info.dtype == "U32" else run) for info in tensors.values())


def work_bytes(folder: Path, grids: Sequence[VQGrid], options: DecodeOptions) -> int:
    """What decoding takes in memory beside the weights in MLX, with the buffers that MLX may keep; headers are read, no weights.

    A layer has its input, queries, keys, values and its output of all tokens at once, and of a piece all that it makes on the way:
    counted were half of that, but work that is given out ahead has its memory at once (``python -m benchmarks.decoding`` in
    ``tests/``). Kept all the while are the features of all pictures and those of the other branch, which PyTorch has; of either
    branch the refined condition and the rotations; and what a step cache remembers.

    Raises:
        CheckpointError: the weights are missing or damaged, or of another network.
    """
    path, config = weights_of(folder), config_of(folder)
    embedder, token = stored(path, EMBEDDER, "x_pad_token")
    (width, features), size = embedder.shape, run_type(token.dtype).size
    codes, branches = grids[0].height * grids[0].width, 2 if options.guidance else 1
    condition = codes * FEATURE_UPSAMPLING**2
    tokens = condition + codes * options.upscale**2
    layer, piece = tokens * width * size, min(tokens, PIECE)
    turns = 2 * tokens * config.head_dim // 2 * TURN  # of the picture and the condition, together and each alone
    kept = condition * features * FEATURE * (len(grids) + branches - 1) + branches * (condition * width * size + turns)
    if options.cache_threshold:
        kept += (2 * branches + 1) * layer  # what the first layer and the others added, and what they add to
    entering = condition * (features * (FEATURE + 2 * size) + 2 * width * size)
    embedding = 4 * (FREQUENCIES * TIME_HIDDEN + min(width, ADALN) * (TIME_HIDDEN + 4 * width))
    scores = WRITTEN * min(config.n_heads * piece * tokens, SCORES) * 4 if on_cpu() else 0
    return kept + CACHE + max(IN_LAYER * layer + IN_PIECE * piece * width * size + int(scores), entering, embedding)


def own_copy(folder: Path) -> Path:
    """Where the copy lies that is made by itself: inside the decoder's folder, or in the user's cache if that is read-only."""
    return place_of(folder / f"mlx-{BITS}bit", lambda inside: is_current(inside, folder))


def is_current(copy: Path, folder: Path) -> bool:
    """Whether ``copy`` is whole, and is what would be made of what ``folder`` holds now."""
    try:
        return state_of(copy) == _wanted(folder) | {"whole": True} and bool(
            safetensors_header(copy / weights_of(folder).name)
        )
    except CheckpointError:
        return False


def convert_decoder(folder: Path, copy: Path) -> Generator[Progress, None, Path]:
    """Write a copy of a decoder with 8 bits: its weights and its config. A copy that is there and current is left alone.

    Args:
        folder: of a decoder that is stored in bf16, float16 or float32.
        copy: the folder to make; what is in it gives way if an earlier conversion made it.

    Yields:
        Progress after each tensor. Between two of them no more than one has been in memory.

    Returns:
        ``copy``.

    Raises:
        RequestError: the decoder is quantised already, or the folder holds something that no conversion made.
        CheckpointError: the decoder cannot be read, or there is no room for the copy, before anything is written; or a
            tensor holds values that are not finite.
        LLaDA2Error: another program is writing the copy, or it cannot be written.
    """
    if is_current(copy, folder):
        return copy
    if block_of(folder) is not None:
        raise RequestError(f"The decoder in {folder} has {BITS} bits already; convert the model that it was made of.")
    block, tensors = _copied(folder)
    if copy.exists() and not (copy.is_dir() and (_is_copy(copy) or holds_nothing(copy))):
        raise RequestError(occupied(copy))
    source = weights_of(folder)
    with written_alone(copy, kept=False):
        copy.mkdir(exist_ok=True)
        write_json(copy / STATE, _wanted(folder) | {"whole": False})
        for path in [*copy.iterdir()]:  # of a run that was killed, or of a source that was replaced
            if is_temporary(path.name) or path.suffix == ".safetensors" or path.name == "config.json":
                path.unlink()
        require_room(copy, sum(map(_bytes, tensors.values())), f"The decoder with {BITS} bits")
        with replacing(copy / source.name) as partial:
            yield from _stream(source, partial, block, tensors)
        stated = Checkpoint(folder).json("config.json")
        write_json(copy / "config.json", stated | {"quantization": block})
        write_json(copy / STATE, _wanted(folder) | {"whole": True})
    return copy


def _stream(
    source: Path, target: Path, block: Block, tensors: dict[str, TensorInfo]
) -> Generator[Progress, None, None]:
    """Write a safetensors file whose header is known, one tensor of ``source`` at a time."""
    header, end = {"__metadata__": {"format": "mlx"}}, 0
    for name, info in tensors.items():
        begin, end = end, end + _bytes(info)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    read, names = mx.load(str(source)), [name for name in tensors if not name.endswith((".scales", ".biases"))]
    with open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(names, 1):
            value, path = read.pop(name), name.removesuffix(".weight")
            if not mx.isfinite(value).all().item():
                raise CheckpointError(
                    f"{source} holds values that are not finite (NaN or infinity) in {name}. {again(source)}"
                )
            quantised = f"{path}.scales" in tensors
            parts = mx.quantize(value, **_groups(block, path)) if quantised else (value,)
            for part in parts:
                file.write(memoryview(mx.contiguous(part).flatten().view(mx.uint8)))
            del value, parts
            mx.clear_cache()
            yield Progress("converting", done, len(names))


def _copied(folder: Path) -> tuple[Block, dict[str, TensorInfo]]:
    """How a copy is quantised, and its tensors in the order of its file: a matrix with its scales and offsets behind it."""
    transformer, header = check(folder)
    features = transformer.semantic_embedder[1].weight.shape[-1]
    block = scheme(transformer.config, features)
    shapes = {name: value for name, value in tree_flatten(build(transformer.config, features, block).parameters())}
    tensors = {}
    for name, info in header.items():
        path = name.removesuffix(".weight")
        quantised = shapes[name].dtype == mx.uint32
        for own in (name, f"{path}.scales", f"{path}.biases") if quantised else (name,):
            dtype = "U32" if quantised and own == name else info.dtype
            tensors[own] = TensorInfo(info.file, tuple(shapes[own].shape), dtype)
    return block, tensors


def _stated(folder: Path) -> dict[str, Any]:
    return read_config(Checkpoint(folder.parent), folder.name)


def _matrices(transformer: ZImageTransformer) -> list[tuple[str, nn.Module]]:
    modules = tree_flatten(transformer.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, module) for path, module in modules if hasattr(module, "to_quantized")]


def _how(block: Block, path: str, module: nn.Module) -> dict[str, int] | bool:
    return hasattr(module, "to_quantized") and block.get(path) is not False and _groups(block, path)


def _groups(block: Block, path: str) -> dict[str, int]:
    entry = block.get(path, block)
    return {"group_size": entry["group_size"], "bits": entry["bits"]}


def _bytes(info: TensorInfo) -> int:
    return prod(info.shape) * _TYPES[info.dtype].size


def _is_copy(folder: Path) -> bool:
    return "source" in (state_of(folder) or {})


def _wanted(folder: Path) -> dict[str, Any]:
    """What a copy is made of, as its ``STATE`` says it; that has ``whole`` too, true once all of the copy is there."""
    source = sizes_and_sums((weights_of(folder), folder / "config.json"))
    return {"quantization": {"bits": BITS, "group_size": GROUP_SIZES[0]}, "source": source}

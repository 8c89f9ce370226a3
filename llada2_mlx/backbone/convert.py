"""Smaller copies of a model: its backbone with few bits, or stacked in bf16, written layer by layer.

A copy grows in a hidden folder beside its place and takes it when it is whole. Stopped anywhere, the next call goes on
with the layers that are there, if the source is still the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import __version__
from ..checkpoint.config import BackboneConfig
from ..checkpoint.copies import (
    STATE,
    occupied,
    place_of,
    require_room,
    sizes_and_sums,
    state_of,
    written_alone,
)
from ..checkpoint.hub import repo_of
from ..checkpoint.layout import INDEX, TOLD, WEIGHTS, Checkpoint, Part, safetensors_header, visible
from ..errors import CheckpointError, RequestError
from ..files import is_temporary, remove_temporary, replacing, summed, write_json
from ..progress import Progress
from .precision import GROUP_SIZE, Quantization, build, check_block, is_router, quantization_of, scheme
from .weights import Reader, check_backbone

README = "README.md"  # in a copy that stands alone
WHOLE = 16  # bits that stand for bf16
ELSEWHERE = ", or convert to another disk: llada2-mlx convert SOURCE FOLDER"


def own_copy(checkpoint: Checkpoint, bits: int) -> Path:
    """Where the copy lies that is made by itself: inside the model's folder, or in the user's cache if that is read-only."""
    return place_of(checkpoint.copy_folder(bits), lambda inside: is_current(inside, checkpoint, bits))


def is_current(copy: Path, checkpoint: Checkpoint, bits: int, group_size: int = GROUP_SIZE) -> bool:
    """Whether ``copy`` is whole, and is what would be made of what ``checkpoint`` holds now.

    Weights that the checkpoint does not have are taken for those that the copy was made of.
    """
    wanted, origin = _wanted(checkpoint, bits, group_size), _origin(copy)
    if origin is None or not isinstance(origin.get("source"), dict):
        return False
    gone = {name for name in origin["source"] if name == INDEX or fnmatchcase(name, WEIGHTS)} - wanted["source"].keys()
    if gone and not checkpoint.is_copy_alone:
        return False
    if origin | {"source": {k: v for k, v in origin["source"].items() if k not in gone}} != wanted:
        return False
    try:
        return bool(Checkpoint(copy).require(Part.BACKBONE).backbone_tensors())
    except CheckpointError:
        return False


def convert(
    checkpoint: Checkpoint, copy: Path, bits: int, group_size: int = GROUP_SIZE, replace: bool = False
) -> Generator[Progress, None, Checkpoint]:
    """Write a copy of a backbone, with its config and text tokenizer. It loads by itself.

    Args:
        checkpoint: stored in bf16, float16, float32 or float8; not quantised itself. Where only a smaller copy of its
            weights is here, that is what is copied.
        copy: the folder to make.
        bits: 4, 6 or 8 for the experts, see ``precision.scheme``; 16 keeps everything in bf16.
        replace: whether a copy that is there may be replaced, at the very end; it is given back if it is current.

    Yields:
        Progress after each layer. Between two of them, little more than the largest layer has been in memory.

    Raises:
        RequestError: there are no such bits, or the folder is there already and may not be replaced or is no copy.
        CheckpointError: the source cannot be read, or there is no room for the copy, before anything is written; or
            a tensor holds values that are not finite.
        LLaDA2Error: another program is writing the copy, or it cannot be written; what is done is kept.
    """
    config, ready = checkpoint.require(Part.BACKBONE).config, _ready(checkpoint, bits, group_size)
    if ready is None:
        require_whole(checkpoint)
    copy = copy.resolve()  # a link to another disk stays one
    if copy.exists() and not replace:
        raise RequestError(f"{copy} is there already. Delete it, or choose another place.")
    if not is_current(copy, checkpoint, bits, group_size):
        require_place(copy)
    block = block_of(checkpoint, bits, group_size)
    if ready is None:
        check_backbone(config, None, checkpoint.backbone_tensors(), checkpoint)
    size = size_of(config, block)
    wanted = _wanted(checkpoint, bits, group_size) if ready is None else _origin(ready.root)
    with written_alone(copy):
        if replace and is_current(copy, checkpoint, bits, group_size):  # another program has just made it
            return Checkpoint(copy)
        partial = begin(copy, lambda origin: origin == wanted)
        if ready is None:
            require_room(partial, size - _written(partial), "The converted copy", ELSEWHERE)
        if state_of(partial) is None:
            write_json(partial / STATE, wanted | {"made": {}, "made_by": made_by()})
        weight_map = yield from _layers(checkpoint, partial, block) if ready is None else _links(ready, partial)
        finish(checkpoint, partial, copy, block, weight_map)
    return Checkpoint(copy)


def _ready(checkpoint: Checkpoint, bits: int, group_size: int) -> Checkpoint | None:
    """The copy that is here in place of the model's own weights, if it is the one that is wanted."""
    if not checkpoint.is_copy_alone or (copy := checkpoint.copies().get(bits)) is None:
        return None
    return copy if is_current(copy.root, checkpoint, bits, group_size) else None


def _links(ready: Checkpoint, folder: Path) -> Generator[Progress, None, dict[str, str]]:
    """The layers of a copy that is there, as hard links, or copied to another disk; returns the index."""
    named = ready.weight_map()
    files = sorted(set(named.values()))
    for number, name in enumerate(files, 1):
        if not is_whole(folder / name):
            with making(folder, name) as partial:
                _link_or_copy((ready.root / name).resolve(), partial)
        yield Progress("copying", number, len(files))
    return named


def require_whole(checkpoint: Checkpoint) -> None:
    """Refuse a model that a copy cannot be made of, because its own weights are not here or are quantised.

    Raises:
        RequestError: it is one.
        CheckpointError: it states a quantization that cannot be read.
    """
    if checkpoint.quantization is not None:
        stated = check_block(checkpoint.quantization, f"{checkpoint.root / 'config.json'}")
        raise RequestError(
            f"{checkpoint.root} is quantised to {stated['bits']} bits already; convert the model it was made of."
        )
    if checkpoint.is_copy_alone:
        raise RequestError(only_copies(checkpoint))


def only_copies(checkpoint: Checkpoint, wanted: str = "another precision") -> str:
    """What to say where a precision is asked for that cannot be had, because the weights themselves are not here."""
    repo, there = repo_of(checkpoint.root), [f"{bits}bit" for bits in checkpoint.copies()]
    command = f": llada2-mlx download {repo}" if repo else ""
    bits = f", or with other bits (--bits {wanted.removesuffix('bit')})" if repo and wanted.endswith("bit") else ""
    return (
        f"{checkpoint.root} has its language model only as a smaller copy, {' and '.join(there)}; {wanted} cannot be made "
        f"of that. Choose {there[0]} or auto, or download the model whole{command}{bits}."
    )


def require_place(copy: Path) -> None:
    """Refuse to replace a folder that is no copy, or has something in it that a conversion did not make."""
    if copy.exists() and state_of(copy) is None and (not copy.is_dir() or any(copy.iterdir())):
        raise RequestError(occupied(copy))
    _require_own(copy, whole=True)


def begin(copy: Path, fits: Callable[[dict[str, Any]], bool]) -> Path:
    """The folder in which a copy grows, with what an earlier run has made if that fits."""
    partial = copy.with_name(f".{copy.name}.partial")
    _require_own(partial)
    if partial.exists() and ((origin := _origin(partial)) is None or not fits(origin)):
        _remove(partial)
    partial.mkdir(exist_ok=True)
    remove_temporary(partial)
    return partial


def finish(
    checkpoint: Checkpoint, partial: Path, copy: Path, block: Quantization | None, weight_map: dict[str, str]
) -> None:
    """Add to the layers what else a copy has, and give it its place."""
    size = size_of(checkpoint.config, block)
    with making(partial, INDEX) as path:
        write_json(path, {"metadata": {"total_size": size}, "weight_map": weight_map})
    stated = checkpoint.json("config.json")
    stated.pop("quantization_config", None)  # of a float8 source
    with making(partial, "config.json") as path:
        write_json(path, stated | ({"quantization": block} if block else {}))
    for source in checkpoint.files(Part.BACKBONE):
        if source.name.startswith("tokenizer"):
            with making(partial, source.name) as path:
                shutil.copyfile(source, path)
    _require_own(copy, whole=True)
    if copy.exists():
        _remove(copy)
    partial.rename(copy)


def _remove(folder: Path) -> None:
    """Remove a copy. What says that it is one goes last: killed before that, the next run still knows it as its own."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != STATE:
            path.unlink()
    shutil.rmtree(folder)


def add_parts(checkpoint: Checkpoint, copy: Path) -> Generator[Progress, None, None]:
    """Give a copy the other parts that the model has, unless they are there: as hard links, or copied to another disk.

    Last comes a text that says what the copy is, how it was made, and by which version.

    Yields:
        Progress after each file.

    Raises:
        LLaDA2Error: a file cannot be written; what is done is kept.
    """
    files = [path for part in Part if part is not Part.BACKBONE for path in checkpoint.files(part)]
    with written_alone(copy):
        remove_temporary(copy)
        for number, path in enumerate(files, 1):
            target = copy / path.relative_to(checkpoint.root)
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                with making(copy, target.relative_to(copy).as_posix()) as partial:
                    _link_or_copy(path.resolve(), partial)
            yield Progress("adding the other parts", number, len(files))
        _describe(checkpoint, copy)


def _describe(checkpoint: Checkpoint, copy: Path) -> None:
    """Write into a copy what it is and how it was made, unless its owner has written about it."""
    state, there = state_of(copy) or {}, copy / README
    if there.exists() and summed(there) != state.get("made", {}).get(README):
        return
    repo, block = repo_of(checkpoint.root), state.get("quantization")
    bits, groups = (block["bits"], block["group_size"]) if block else (WHOLE, GROUP_SIZE)
    name = repo or checkpoint.root.name
    source = f"[{repo}](https://huggingface.co/{repo})" if repo else name
    parts = [part.value for part in TOLD if not Checkpoint(copy).missing(part)]
    how = (
        f"{bits} bits for the routed experts and at least 8 for all else, in groups of {groups}"
        if block
        else "bfloat16"
    )
    text = f"""---
library_name: mlx
{f"base_model: {repo}" if repo else ""}
tags: [llada2, mlx, comfyui]
---
# {name.rpartition("/")[2]}, {f"{bits}bit" if block else "bf16"}

{source} for [MLX](https://github.com/ml-explore/mlx), with a smaller language model: {how}.
Its licence is that of the model that it was made of.

Parts: {", ".join(parts)}.

Made by {state.get("made_by", "ComfyUI-LLaDA2-MLX")}:

    llada2-mlx convert {name} FOLDER --bits {bits}{f" --group-size {groups}" if block else ""}

`{STATE}` has the sizes and sums of the files that it was made of. The nodes of ComfyUI-LLaDA2-MLX list it where it lies
as a folder in `models/llada2`, or where its hub id stands in a line of `models/llada2/hub.txt`.
"""
    with making(copy, README) as partial:
        partial.write_text(text.replace("\n\ntags", "\ntags"), encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(source, target)


def _layers(
    checkpoint: Checkpoint, folder: Path, block: Quantization | None
) -> Generator[Progress, None, dict[str, str]]:
    """Write each layer into a file of its own, unless it is there; returns the index."""
    reader, groups = Reader(checkpoint.backbone_tensors()), groups_of(checkpoint.config)
    weight_map: dict[str, str] = {}
    for number, parameters in enumerate(groups, 1):
        path = folder / layer_name(number, len(groups))
        if not is_whole(path):
            tensors: dict[str, mx.array] = {}
            for parameter, shape in parameters:
                tensors |= kept(parameter, reader.read(parameter, shape, None), block)
                mx.eval(tensors)
            save(folder, path.name, tensors)
            del tensors
            mx.clear_cache()
        weight_map |= dict.fromkeys(safetensors_header(path), path.name)
        yield Progress("converting", number, len(groups))
    return weight_map


def layer_name(number: int, count: int) -> str:
    """The file of the ``number``-th group of parameters, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def save(folder: Path, name: str, tensors: dict[str, mx.array]) -> None:
    """Write a file of weights into a folder in which a copy grows."""
    with making(folder, name) as partial, open(partial, "wb") as file:
        mx.save_safetensors(file, tensors, {"format": "mlx"})


def is_whole(path: Path) -> bool:
    try:
        return bool(safetensors_header(path))
    except CheckpointError:
        return False


def kept(parameter: str, value: mx.array, block: Quantization | None) -> dict[str, mx.array]:
    """What a copy keeps of a parameter: itself, or its packed weights with their scales and offsets."""
    if value.ndim < 2 or is_router(parameter):  # norms too stay as they are
        return {parameter: value}
    value, path = value.astype(mx.bfloat16), parameter.removesuffix(".weight")
    if block is None or not (how := quantization_of(block, path)):
        return {parameter: value}
    weight, scales, biases = mx.quantize(value, **how)
    return {parameter: weight, f"{path}.scales": scales, f"{path}.biases": biases}


def groups_of(config: BackboneConfig) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of the parameters, by what is written at once: each layer at once, and each of the rest."""
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for parameter, value in tree_flatten(build(config).parameters()):
        layer = parameter.split(".")[2] if parameter.startswith("model.layers.") else parameter
        groups.setdefault(layer, []).append((parameter, value.shape))
    return list(groups.values())


def _wanted(checkpoint: Checkpoint, bits: int, group_size: int) -> dict[str, Any]:
    """What a copy is made of, as its ``STATE`` says it."""
    return {"quantization": block_of(checkpoint, bits, group_size), "source": source_of(checkpoint)}


def source_of(checkpoint: Checkpoint) -> dict[str, list]:
    """The files that a copy is made of, with their sizes and sums."""
    return sizes_and_sums(checkpoint.files(Part.BACKBONE))


@contextmanager
def making(folder: Path, name: str) -> Iterator[Path]:
    """Like ``replacing``, for a file of a copy: that the conversion made it is noted before it has its name."""
    with replacing(folder / name) as partial:
        yield partial
        state = state_of(folder)
        if state is not None:
            made = state.get("made", {}) | {name: summed(partial, Path(name).suffix)}
            write_json(folder / STATE, state | {"made": made})


def _require_own(folder: Path, whole: bool = False) -> None:
    """Refuse to touch a folder with anything in it that a conversion did not make: that is for its owner to remove.

    Args:
        whole: it is a copy that was finished, in which a layer that nobody can read any more is one that was made.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    strange: list[Path] = [folder]
    if folder.is_dir() and not folder.is_symlink():
        state = state_of(folder)
        made = (state or {}).get("made", {})
        begun = state is None or {"quantization", "source"} <= state.keys() and isinstance(made, dict)
        if begun:
            strange = sorted(path for path in folder.rglob("*") if not _is_own(path, folder, made, whole))
    if strange:
        raise RequestError(f"{strange[0]} is in the way of the conversion, which did not make it. Rename or delete it.")


def _is_own(path: Path, folder: Path, made: dict[str, Any], whole: bool) -> bool:
    """Whether a conversion made what is at ``path``, as far as its content tells; a file may have been cut short since."""
    name = path.relative_to(folder).as_posix()
    if path.is_symlink():
        return False
    if path.is_dir():
        return any(each.startswith(f"{name}/") for each in made)
    if name == STATE or is_temporary(path.name) or path.name == ".DS_Store":  # macOS leaves it where it looked
        return True
    if name not in made:
        return False
    damaged = whole and path.suffix == ".safetensors" and not is_whole(path)
    try:
        return damaged or not path.stat().st_size or summed(path) == made[name]
    except OSError:
        return False


def block_of(checkpoint: Checkpoint, bits: int, group_size: int = GROUP_SIZE) -> Quantization | None:
    return None if bits == WHOLE else scheme(checkpoint.config, bits, group_size)


def size_of(config: BackboneConfig, block: Quantization | None) -> int:
    """Bytes of a copy: packed words, and bf16 for all else."""
    parameters = tree_flatten(build(config, block).parameters())
    return sum(value.size * (4 if value.dtype == mx.uint32 else 2) for _, value in parameters)


def _origin(folder: Path) -> dict[str, Any] | None:
    """What a copy was made of, and how, as ``_wanted`` says it."""
    state = state_of(folder)
    return None if state is None else {key: value for key, value in state.items() if key not in ("made", "made_by")}


def _written(folder: Path) -> int:
    """Bytes of the layers that an earlier run has made."""
    return sum(path.stat().st_size for path in visible(folder, "*.safetensors"))


def made_by() -> str:
    """The programs that make a copy, with their versions, for a person."""
    return f"ComfyUI-LLaDA2-MLX {__version__} with MLX {version('mlx')}"

"""Smaller copies of a model: its backbone with few bits, or stacked in bf16, written layer by layer.

A copy grows in a hidden folder beside its place and takes it when it is whole. Stopped anywhere, the next call goes on
with the layers that are there, if the source is still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from filelock import Timeout
from mlx.utils import tree_flatten

from ..checkpoint.config import BackboneConfig
from ..checkpoint.layout import INDEX, Checkpoint, Part, safetensors_header, visible
from ..errors import CheckpointError, LLaDA2Error, RequestError
from ..files import locked, replacing
from ..progress import Progress, amount
from .precision import GROUP_SIZE, Quantization, build, check_block, is_router, quantization_of, scheme
from .weights import Reader, check_backbone

STATE = "conversion.json"  # in a copy: what it was made of, and how, and which files were made
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]+\.partial")  # what ``replacing`` calls a file that it writes
WHOLE = 16  # bits that stand for bf16


def own_copy(checkpoint: Checkpoint, bits: int) -> Path:
    """Where the copy lies that is made by itself: inside the model's folder, or in the user's cache if that is read-only."""
    inside = checkpoint.root / f"mlx-{bits}bit"
    if os.access(checkpoint.root, os.W_OK) or is_current(inside, checkpoint, bits):
        return inside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llada2-mlx" / "-".join(checkpoint.root.resolve().parts[1:]) / inside.name


def is_current(copy: Path, checkpoint: Checkpoint, bits: int, group_size: int = GROUP_SIZE) -> bool:
    """Whether ``copy`` is whole, and is what would be made of what ``checkpoint`` holds now."""
    if _origin(copy) != _wanted(checkpoint, bits, group_size):
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
        checkpoint: stored in bf16, float16, float32 or float8; not quantised itself.
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
    config, source_block = checkpoint.require(Part.BACKBONE).config, checkpoint.quantization
    if source_block is not None:
        stated = check_block(source_block, f"{checkpoint.root / 'config.json'}")
        raise RequestError(
            f"{checkpoint.root} is quantised to {stated['bits']} bits already; convert the model it was made of."
        )
    copy = copy.resolve()  # a link to another disk stays one
    if copy.exists() and not replace:
        raise RequestError(f"{copy} is there already. Delete it, or choose another place.")
    if copy.exists() and _state(copy) is None:
        raise RequestError(
            f"{copy} is where the converted copy goes, but it holds something else. Rename or delete it."
        )
    if not is_current(copy, checkpoint, bits, group_size):
        _require_own(copy, whole=True)
    block = _block(checkpoint, bits, group_size)
    check_backbone(config, None, checkpoint.backbone_tensors(), checkpoint)
    size = _size(config, block)
    partial, lock = (copy.with_name(f".{copy.name}.{end}") for end in ("partial", "lock"))
    wanted = _wanted(checkpoint, bits, group_size)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if replace and is_current(copy, checkpoint, bits, group_size):  # another program has just made it
                return Checkpoint(copy)
            _require_own(partial)
            if partial.exists() and _origin(partial) != wanted:
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=True)
            cut_off = [path for path in partial.iterdir() if _TEMPORARY.fullmatch(path.name)]
            for path in cut_off:  # a killed run had begun it
                path.unlink()
            _require_room(partial, size)
            if _state(partial) is None:
                _write(partial / STATE, wanted | {"made": {}})
            weight_map = yield from _layers(checkpoint, partial, block)
            with _making(partial, INDEX) as path:
                _write(path, {"metadata": {"total_size": size}, "weight_map": weight_map})
            stated = checkpoint.json("config.json")
            stated.pop("quantization_config", None)  # of a float8 source
            with _making(partial, "config.json") as path:
                _write(path, stated | ({"quantization": block} if block else {}))
            for source in checkpoint.files(Part.BACKBONE):
                if source.name.startswith("tokenizer"):
                    with _making(partial, source.name) as path:
                        shutil.copyfile(source, path)
            _require_own(copy, whole=True)
            if copy.exists():
                shutil.rmtree(copy)
            partial.rename(copy)
            if lock.exists() and not lock.stat().st_size:  # one with something in it is somebody's
                lock.unlink()
    except Timeout:
        raise LLaDA2Error(f"{copy} is being written by another program; wait until it is done.") from None
    except OSError as error:
        raise _unwritten(copy, error) from error
    return Checkpoint(copy)


def add_parts(checkpoint: Checkpoint, copy: Path) -> Generator[Progress, None, None]:
    """Give a copy the other parts that the model has, unless they are there: as hard links, or copied to another disk.

    Yields:
        Progress after each file.

    Raises:
        LLaDA2Error: a file cannot be written; what is done is kept.
    """
    files = [path for part in Part if part is not Part.BACKBONE for path in checkpoint.files(part)]
    for number, path in enumerate(files, 1):
        target = copy / path.relative_to(checkpoint.root)
        try:
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                with _making(copy, target.relative_to(copy).as_posix()) as partial:
                    _link_or_copy(path.resolve(), partial)
        except OSError as error:
            raise _unwritten(target, error) from error
        yield Progress("adding the other parts", number, len(files))


def _unwritten(path: Path, error: OSError) -> LLaDA2Error:
    return LLaDA2Error(
        f"{path} cannot be written ({error.strerror or error}). Make room or allow writing there, and try again: what "
        "is done is kept."
    )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(source, target)


def _layers(
    checkpoint: Checkpoint, folder: Path, block: Quantization | None
) -> Generator[Progress, None, dict[str, str]]:
    """Write each layer into a file of its own, unless it is there; returns the index."""
    reader, groups = Reader(checkpoint), _groups(checkpoint)
    weight_map: dict[str, str] = {}
    for number, parameters in enumerate(groups, 1):
        path = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if not _whole(path):
            tensors: dict[str, mx.array] = {}
            for parameter, shape in parameters:
                tensors |= _kept(parameter, reader.read(parameter, shape, None), block)
                mx.eval(tensors)
            with _making(folder, path.name) as partial, open(partial, "wb") as file:
                mx.save_safetensors(file, tensors, {"format": "mlx"})
            del tensors
            mx.clear_cache()
        weight_map |= dict.fromkeys(safetensors_header(path), path.name)
        yield Progress("converting", number, len(groups))
    return weight_map


def _whole(path: Path) -> bool:
    try:
        return bool(safetensors_header(path))
    except CheckpointError:
        return False


def _kept(parameter: str, value: mx.array, block: Quantization | None) -> dict[str, mx.array]:
    """What a copy keeps of a parameter: itself, or its packed weights with their scales and offsets."""
    if value.ndim < 2 or is_router(parameter):  # norms too stay as they are
        return {parameter: value}
    value, path = value.astype(mx.bfloat16), parameter.removesuffix(".weight")
    if block is None or not (how := quantization_of(block, path)):
        return {parameter: value}
    weight, scales, biases = mx.quantize(value, **how)
    return {parameter: weight, f"{path}.scales": scales, f"{path}.biases": biases}


def _groups(checkpoint: Checkpoint) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of the parameters, by what is written at once: each layer at once, and each of the rest."""
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for parameter, value in tree_flatten(build(checkpoint.config).parameters()):
        layer = parameter.split(".")[2] if parameter.startswith("model.layers.") else parameter
        groups.setdefault(layer, []).append((parameter, value.shape))
    return list(groups.values())


def _wanted(checkpoint: Checkpoint, bits: int, group_size: int) -> dict[str, Any]:
    """What a copy is made of, as its ``STATE`` says it."""
    source = {path.name: [path.stat().st_size, _summed(path)] for path in checkpoint.files(Part.BACKBONE)}
    return {"quantization": _block(checkpoint, bits, group_size), "source": source}


def _summed(path: Path, suffix: str = "") -> str:
    """The SHA-256 of a file, or of the header of a safetensors file: a copy of a model may have other times."""
    with path.open("rb") as file:
        if (suffix or path.suffix) != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        length = file.read(8)
        # no longer than a header may be, whatever a damaged file says
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), 10**8))).hexdigest()


@contextmanager
def _making(folder: Path, name: str) -> Iterator[Path]:
    """Like ``replacing``, for a file of a copy: that the conversion made it is noted before it has its name."""
    with replacing(folder / name) as partial:
        yield partial
        state = _state(folder)
        if state is not None:
            made = state.get("made", {}) | {name: _summed(partial, Path(name).suffix)}
            _write(folder / STATE, state | {"made": made})


def _require_own(folder: Path, whole: bool = False) -> None:
    """Refuse to touch a folder with anything in it that a conversion did not make: that is for its owner to remove.

    Args:
        whole: it is a copy that was finished, in which a layer that nobody can read any more is one that was made.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    strange: list[Path] = [folder]
    if folder.is_dir() and not folder.is_symlink():
        state = _state(folder)
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
    if name == STATE or _TEMPORARY.fullmatch(path.name) or path.name == ".DS_Store":  # macOS leaves it where it looked
        return True
    if name not in made:
        return False
    damaged = whole and path.suffix == ".safetensors" and not _whole(path)
    try:
        return damaged or not path.stat().st_size or _summed(path) == made[name]
    except OSError:
        return False


def _block(checkpoint: Checkpoint, bits: int, group_size: int) -> Quantization | None:
    return None if bits == WHOLE else scheme(checkpoint.config, bits, group_size)


def _size(config: BackboneConfig, block: Quantization | None) -> int:
    """Bytes of a copy: packed words, and bf16 for all else."""
    parameters = tree_flatten(build(config, block).parameters())
    return sum(value.size * (4 if value.dtype == mx.uint32 else 2) for _, value in parameters)


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _origin(folder: Path) -> dict[str, Any] | None:
    """What a copy was made of, and how, as ``_wanted`` says it."""
    state = _state(folder)
    return None if state is None else {key: value for key, value in state.items() if key != "made"}


def _require_room(folder: Path, size: int) -> None:
    there = sum(path.stat().st_size for path in visible(folder, "*.safetensors"))
    free = shutil.disk_usage(folder).free
    if size - there > free:
        raise CheckpointError(
            f"The converted copy takes {amount(size)} in {folder.parent}, where {amount(free)} are free. Make room, or "
            "convert to another disk: llada2-mlx convert SOURCE FOLDER."
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")

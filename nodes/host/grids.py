"""Saved grids of codes, in ComfyUI's output and input folders and nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...llada2_mlx.checkpoint.codebook import origin
from ...llada2_mlx.checkpoint.sizes import DECODED_PIXELS
from ...llada2_mlx.errors import CheckpointError, LLaDA2Error, RequestError
from ...llada2_mlx.files import is_hidden, is_plain
from ...llada2_mlx.tokens import check_size
from ...llada2_mlx.vq import Origin, VQGrid
from .folders import local_checkpoint, model_names, named
from .progress import tell, warn

LOADER = "LLaDA2LoadVQ"  # the node that hands on a saved grid: the graph says which

_SUFFIX = ".safetensors"
_FORMAT = "llada2-vq"
_LONGEST_HEADER = 2**24  # bytes; what states more is no grid


def grid_names() -> list[str]:
    """What can be loaded: files of the input folder, then of the output folder, which carry ComfyUI's mark "[output]".

    A safetensors file that says that it is something else is left out.
    """
    return [f"{name}{mark}" for mark, folder in _marks().items() for name in sorted(_found(folder))]


def check_grid(file: str) -> None:
    """Check that ``load_grid`` can read it; files of grids are small.

    Raises:
        RequestError: as ``load_grid``.
    """
    _read(file)


def load_grid(file: str) -> VQGrid:
    """A saved grid, with the name that the model lists here have for the model of its codebook.

    Raises:
        RequestError: the name leads out of the folders, there is no such file, or it holds no grid.
    """
    grid = _read(file)
    model = _model_here(grid)
    if model is None and grid.origin.model and (grid.origin.vectors or grid.origin.table):
        warn(
            f"These codes are of the model {grid.origin.model}, and no model here is known to have its codebook. "
            "To decode, read or edit them, put that model into models/llada2."
        )
    return grid if model is None else named(model, [grid])[0]


def model_of_file(file: Any) -> str | None:
    """The model here whose codes a saved grid has; None where that cannot be said."""
    try:
        return _model_here(_read(file))
    except LLaDA2Error:
        return None


def grid_fingerprint(file: str) -> tuple:
    """The state of the file, and the model here that it is of: it changes when one of them does."""
    try:
        found = _path(file).stat()
    except (LLaDA2Error, OSError):
        return ()
    return found.st_size, found.st_mtime_ns, model_of_file(file)


def check_prefix(prefix: str) -> None:
    """Check the name that files of grids shall begin with.

    Raises:
        RequestError: it is none, or leads out of the output folder.
    """
    output = folder_paths.get_output_directory()
    if not is_plain(prefix) or not folder_paths.is_within_directory(output, os.path.join(output, prefix)):
        raise RequestError(
            f"{prefix!r} is no name for a file inside ComfyUI's output folder. Give one such as llada2/codes, which may begin with "
            "folders; none of its parts may be empty or begin with a dot, and it has no backslash or colon."
        )


def save_grids(grids: Sequence[VQGrid], prefix: str, hidden: Any) -> list[dict[str, str]]:
    """Save each grid of a batch under the next free number, with the workflow, and tell where they are.

    Args:
        hidden: of the node, with ``prompt`` and ``extra_pnginfo``. ComfyUI opens the workflow of a file that is dropped on it.

    Returns:
        Where each file is, as ComfyUI says it: ``filename``, ``subfolder``, ``type``.

    Raises:
        RequestError: as ``check_prefix``, or the files cannot be written.
    """
    check_prefix(prefix)
    notes, saved = {} if args.disable_metadata else _notes(hidden), []
    try:
        for grid in grids:
            size = DECODED_PIXELS * grid.width, DECODED_PIXELS * grid.height
            # it looks for the next free number, and expands %width%, %year% and the like
            folder, name, number, subfolder, _ = folder_paths.get_save_image_path(
                prefix, folder_paths.get_output_directory(), *size
            )
            file = f"{name}_{number:05}_{_SUFFIX}"
            grid.save(Path(folder, file), notes)
            saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
    except OSError as error:
        raise RequestError(
            f"The codes cannot be saved as {prefix!r} in ComfyUI's output folder ({error.strerror or error})."
        ) from error
    tell(f"Saved {', '.join('/'.join(filter(None, (each['subfolder'], each['filename']))) for each in saved)}.")
    return saved


def size_note(grids: Sequence[VQGrid]) -> str | None:
    """A sentence where the model of some grids is here and has no tokens for their size, else None.

    It is no warning: a part that is cut out to be pasted is of any size.
    """
    for grid in grids:
        checkpoint = local_checkpoint(grid.origin.model)
        try:
            if checkpoint is not None:
                check_size(checkpoint, grid.height, grid.width)
        except RequestError:
            return (
                f"{grid.height} x {grid.width} codes (height x width) can be decoded, pasted and joined, but not read or edited: "
                f"{checkpoint.root.name} has no tokens for this size."
            )
        except CheckpointError:  # no text tokenizer, or a damaged one: its loader says so
            continue
    return None


def _marks() -> dict[str, str]:
    """What stands after the name of a file, and the folder that it means."""
    return {"": folder_paths.get_input_directory(), " [output]": folder_paths.get_output_directory()}


def _read(file: str) -> VQGrid:
    return VQGrid.load(_path(file))


def _path(file: Any) -> Path:
    if not isinstance(file, str) or not file:
        raise RequestError("No saved grid is chosen. Save one with Save VQ, or put one into ComfyUI's input folder.")
    folders = {" [input]": folder_paths.get_input_directory(), **_marks()}
    mark = max((mark for mark in folders if file.endswith(mark)), key=len)
    name, folder = file.removesuffix(mark), folders[mark]
    path = Path(folder, name)
    if not is_plain(name) or not folder_paths.is_within_directory(folder, path):
        raise RequestError(
            f"{file!r} is not inside ComfyUI's input or output folder. Choose a file from the list; R refreshes it."
        )
    if not path.is_file():
        raise RequestError(f"There is no saved grid {file!r}. Choose a file from the list; R refreshes it.")
    if path.suffix != _SUFFIX:
        raise RequestError(f"{file!r} is no saved grid: their names end in {_SUFFIX}. Choose a file from the list.")
    return path


def _found(folder: str) -> Iterator[str]:
    """Files in a folder and below, relative to it, that are grids or may be damaged ones."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for file in files:
            path = Path(where, file)
            if path.suffix == _SUFFIX and is_plain(name := path.relative_to(folder).as_posix()) and _may_be_grid(path):
                if not path.is_symlink() or folder_paths.is_within_directory(folder, path):
                    yield name


def _may_be_grid(path: Path) -> bool:
    try:
        found = path.stat()
        return path.is_file() and _states_grid(path, found.st_size, found.st_mtime_ns)
    except OSError:
        return False


@lru_cache(4096)
def _states_grid(path: Path, size: int, changed: int) -> bool:
    """Whether a safetensors file says that it is a grid; one that says nothing may be a damaged grid, if it is small."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
        return header.get("__metadata__", {}).get("format") == _FORMAT
    except (ValueError, AttributeError, RecursionError):
        return size <= _LONGEST_HEADER


def _model_here(grid: VQGrid) -> str | None:
    """The name in the model lists of a model that has the codebook of a grid; its own name, if that is one of them."""
    own = grid.origin.model
    for name in dict.fromkeys([own, *model_names()]):
        checkpoint = local_checkpoint(name)
        if checkpoint is not None and _is_known_equal(origin(checkpoint), grid.origin):
            return name
    return None


def _is_known_equal(one: Origin, other: Origin) -> bool:
    both_known = (one.vectors and other.vectors) or (one.table and other.table)
    return bool(both_known) and one.may_equal(other)


def _notes(hidden: Any) -> dict[str, str]:
    notes = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in notes.items() if value is not None}

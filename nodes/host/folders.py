"""The model folders that ComfyUI knows, and the checkpoint behind a name of the list."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths

from ...llada2_mlx.checkpoint.hub import cached
from ...llada2_mlx.checkpoint.layout import BUILT_IN as BUILT_IN_FOLDER
from ...llada2_mlx.checkpoint.layout import (
    HUB_LIST,
    HUB_MODEL,
    Checkpoint,
    Part,
    cached_ids,
    listed_ids,
    model_folders,
    resolve,
)
from ...llada2_mlx.errors import CheckpointError, RequestError
from ...llada2_mlx.vq import VQGrid
from .progress import progress

if TYPE_CHECKING:
    from .memory import ManagedBackbone

BUILT_IN = "Shapes (built in)"
CODES, BACKBONES = "the codes' own", "the backbone's own"  # what a model list offers beside names
_FOLDER = "llada2"

folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))


def model_names() -> list[str]:
    """What a model list offers: the built-in default, the folders under ``models/llada2``, and hub models."""
    return [BUILT_IN, *sorted(_folders()), *hub_models()]


def hub_models() -> list[str]:
    """The published model, those in ``models/llada2/hub.txt``, and those of the same layout in the hub's cache."""
    listed, problems = listed_ids(map(Path, folder_paths.get_folder_paths(_FOLDER)))
    for problem in problems:
        _log_once(problem)
    return list(dict.fromkeys([HUB_MODEL, *listed, *cached_ids()]))


def checkpoint(model: str, *parts: Part) -> Checkpoint:
    """The checkpoint behind a name of the list, with ``parts`` in it; a hub model is downloaded where it is not yet.

    Raises:
        CheckpointError: there is no such model, or it lacks a part.
    """
    folders = _folders() | {BUILT_IN: BUILT_IN_FOLDER}
    if model not in list(folders) and not is_hub_model(model):  # an API graph may name what is no text, and has no hash
        raise CheckpointError(
            f"There is no model {model!r}. There are: {', '.join(model_names())}. Put a model folder into models/{_FOLDER}, "
            f"or a hub id into models/{_FOLDER}/{HUB_LIST}."
        )
    if model in folders:
        return resolve(folders[model], *parts)
    return resolve(model, *parts, on_step=progress())


def is_hub_model(model: str) -> bool:
    """Whether a name of the list is a hub id, which is downloaded where it is not here yet."""
    return model in hub_models()


def local_checkpoint(model: str) -> Checkpoint | None:
    """What is on this machine of a model of the list, complete or not; None where nothing is. Nothing is downloaded."""
    if is_hub_model(model):
        found = cached(model)
    else:
        found = (_folders() | {BUILT_IN: BUILT_IN_FOLDER}).get(model)
    return None if found is None else Checkpoint(found)


def check_model(model: str, *parts: Part) -> None:
    """Like ``checkpoint``, when queueing: a hub model is not looked at, because that could take long."""
    if model not in (CODES, BACKBONES) and not is_hub_model(model):
        checkpoint(model, *parts)


def fingerprint(model: str, *parts: Part) -> tuple:
    """The state of the files of some parts: it changes when they are replaced, and with nothing else."""
    if model in (CODES, BACKBONES):  # whichever it will be
        return tuple((name, fingerprint(name, *parts)) for name in _folders())
    folder = _folders().get(model)
    return () if folder is None else Checkpoint(folder).fingerprint(*parts)


def named(model: str, grids: Sequence[VQGrid]) -> tuple[VQGrid, ...]:
    """Grids that carry the name by which a model list calls the model that made them."""
    return tuple(replace(grid, origin=replace(grid.origin, model=model)) for grid in grids)


def model_of_codes(model: str, grids: Sequence[VQGrid]) -> str:
    """The model that is chosen, or that codes carry where "the codes' own" is.

    Raises:
        RequestError: the codes do not say.
    """
    own = grids[0].origin.model
    if model == CODES and not own:
        raise RequestError("The codes do not say which model they are of. Choose the model.")
    return own if model == CODES else model


def model_of_backbone(model: str, backbone: ManagedBackbone | None) -> str:
    """The model that is chosen, or that a linked backbone has where "the backbone's own" is.

    Raises:
        RequestError: no backbone is linked.
    """
    if model != BACKBONES:
        return model
    if backbone is None:
        raise RequestError("No backbone is linked. Link Load LLaDA2 Backbone to this node, or choose the model.")
    return backbone.source


def _folders() -> dict[str, Path]:
    found, problems = model_folders(map(Path, folder_paths.get_folder_paths(_FOLDER)))
    for problem in problems:
        _log_once(problem)
    return found


@cache
def _log_once(sentence: str) -> None:
    """The folders are looked at again and again."""
    logging.warning("ComfyUI-LLaDA2-MLX: %s", sentence)

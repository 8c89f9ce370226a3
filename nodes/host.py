"""The only place that talks to ComfyUI's runtime: folders, progress, interruption, memory."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

if TYPE_CHECKING:
    from ..llada2_mlx.backbone import Backbone
    from ..llada2_mlx.checkpoint import Checkpoint
    from ..llada2_mlx.progress import OnStep, Progress
    from ..llada2_mlx.tokens import Tokens

BUILT_IN = "Built-in (tiny, random)"
HUB_MODEL = "inclusionAI/LLaDA2.0-Uni"
_FOLDER = "llada2"
_PACKAGES = ("mlx", "mlx_lm", "transformers", "diffusers", "safetensors", "huggingface_hub", "einops", "torchdiffeq")
_TEXT_INTERVAL = 0.1  # seconds between two texts sent to the canvas

folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))


# --- dependencies -------------------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Packages that the nodes need and this Python does not have; nothing is imported."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def repair_hint() -> str:
    """How to install what is missing, into the Python that runs ComfyUI."""
    return f'Run: "{sys.executable}" -m pip install -r "{Path(__file__).parent.parent / "requirements.txt"}" and restart ComfyUI.'


def explains_imports(execute: Callable) -> Callable:
    """For a node's ``execute``: a package that is missing or broken becomes one sentence that says what to do."""

    @functools.wraps(execute)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except ImportError as error:
            package = f"the package {error.name.partition('.')[0]}" if error.name else "a package"
            raise RuntimeError(
                f"ComfyUI-LLaDA2-MLX needs {package}, which cannot be imported ({error}). {repair_hint()}"
            ) from error

    return wrapper


# --- models -------------------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    """What a model list offers: the built-in default, the folders under ``models/llada2``, the hub's model."""
    return [BUILT_IN, *sorted(_folders()), HUB_MODEL]


def checkpoint(model: str, *parts: str) -> Checkpoint:
    """The checkpoint behind a name of the list, with ``parts`` (names of ``Part``) in it; the hub's model is downloaded where it is not yet."""
    from ..llada2_mlx.checkpoint import BUILT_IN as built_in
    from ..llada2_mlx.checkpoint import Part, resolve

    folder = built_in if model == BUILT_IN else _folders().get(model, model)
    return resolve(folder, *(Part[part] for part in parts))


def check_model(model: str | None, *parts: str) -> str | bool:
    """For ``validate_inputs``: True, or why ``model`` cannot be used for ``parts`` (names of ``Part``)."""
    if model is None or model == HUB_MODEL:  # linked, or downloaded when the node runs
        return True
    if model not in model_names():
        return f"There is no model {model!r}. There are: {', '.join(model_names())}. Put a model folder into models/{_FOLDER}."
    from ..llada2_mlx.errors import CheckpointError

    try:
        checkpoint(model, *parts)
    except CheckpointError as error:
        return str(error)
    return True


def check_text(text: str | None, what: str) -> str | bool:
    """For ``validate_inputs``: True, or why ``text`` cannot be used; a linked text is checked when the node runs."""
    return True if text is None or text.strip() else f"The {what} is empty. Write what you want."


def fingerprint(model: str) -> float:
    """Changes when a file of a model folder does, so that a node runs again after a model was replaced."""
    folder = _folders().get(model)
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0) if folder else 0.0


def _folders() -> dict[str, Path]:
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(_FOLDER)):
        if root.is_dir():
            for folder in root.iterdir():
                if folder.is_dir() and not folder.name.startswith("."):
                    found.setdefault(folder.name, folder)
    return found


# --- progress and interruption ------------------------------------------------------------------------------------


def progress(item: int = 0, items: int = 1) -> OnStep:
    """An ``OnStep`` that moves the running node's bar and ends the work when the user cancels.

    Args:
        item, items: which of how many equal pieces of work this is.
    """
    bar, phase = ProgressBar(1), ""

    def step(progress: Progress) -> None:
        nonlocal bar, phase
        model_management.throw_exception_if_processing_interrupted()
        if progress.phase != phase:  # a bar does not go back
            bar, phase = ProgressBar(1), progress.phase
        bar.update_absolute(item * progress.total + progress.done, items * progress.total)

    return step


def progress_text() -> Callable[..., None]:
    """A function that shows a growing text on the running node; with ``final=True`` at once, else not too often."""
    context, last = get_executing_context(), 0.0

    def show(text: str, final: bool = False) -> None:
        nonlocal last
        if context is not None and (final or time.monotonic() - last >= _TEXT_INTERVAL):
            last = time.monotonic()
            PromptServer.instance.send_progress_text(text, context.node_id)

    return show


# --- memory -------------------------------------------------------------------------------------------------------


class ManagedPart(ModelPatcher):
    """A part of a model that ComfyUI's memory management can load and let go.

    To ComfyUI it is a patcher of an empty module with a size. What it holds is ``value``: all of it or nothing.

    Args:
        name: what a person calls it.
        load: makes the value; called again after it was let go.
        size: bytes that the value takes.
        release: called with the value when it is let go, where dropping it is not enough.
    """

    def __init__(
        self, name: str, load: Callable[[OnStep], Any], size: int, release: Callable[[Any], None] | None = None
    ):
        super().__init__(torch.nn.Module(), model_management.get_torch_device(), torch.device("cpu"), size=max(size, 1))
        self.name, self.value = name, None
        self._load, self._release = load, release
        self._on_step: OnStep | None = None

    def get(self, on_step: OnStep) -> Any:
        """The value, loaded if it is not; ComfyUI makes room for it and knows that it is in use."""
        self._on_step = on_step
        try:
            model_management.load_models_gpu([self])
        finally:
            self._on_step = None
        return self.value

    def loaded_size(self) -> int:
        return self.size if self.value is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.value is not None else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        if self.value is None:
            began = time.perf_counter()
            self.value = self._load(self._on_step)
            logging.info(
                "ComfyUI-LLaDA2-MLX: %s, %.1f MB, loaded in %.1f s",
                self.name,
                self.size / 2**20,
                time.perf_counter() - began,
            )
        return self.size

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        return 0  # all or nothing: ComfyUI then calls detach

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        # ComfyUI also calls this on what stays loaded, with unpatch_all false
        if unpatch_all and self.value is not None:
            value, self.value = self.value, None
            if self._release:
                self._release(value)
            logging.info("ComfyUI-LLaDA2-MLX: %s, %.1f MB, let go", self.name, self.size / 2**20)
        return self.model


class ManagedBackbone(ManagedPart):
    """What the backbone socket carries: to ComfyUI a patcher, to ``llada2_mlx.tasks`` a backbone.

    A task checks the request with the tokenizer and the config, and the weights are loaded when it runs the network.
    """

    def __init__(self, handle: Backbone):
        def load(on_step: OnStep) -> Backbone:
            handle.load(on_step)
            return handle

        super().__init__(f"backbone of {handle.checkpoint.root.name}", load, handle.size, type(handle).unload)
        self.checkpoint, self.config = handle.checkpoint, handle.config
        self._handle = handle

    @property
    def tokens(self) -> Tokens:
        return self._handle.tokens

    def run(self, job: Callable, *args: Any, on_step: OnStep, **options: Any) -> Any:
        return self.get(on_step).run(job, *args, on_step=on_step, **options)


# The one registry of parts, loaded or not: (kind, folder, options) -> (state of its files, part).
_parts: dict[tuple, tuple[float, ManagedPart]] = {}


def backbone(model: str, precision: str) -> ManagedBackbone:
    """The backbone of a model. Its files' headers are checked now, its weights read on use."""
    from ..llada2_mlx.backbone import Backbone

    found = checkpoint(model, "BACKBONE")
    return _registered(("backbone", found.root, precision), model, lambda: ManagedBackbone(Backbone(found, precision)))


def image_part(model: str, part: str) -> ManagedPart:
    """A PyTorch part of a model (a name of ``Part``), on the device that ComfyUI chooses."""
    from ..llada2_mlx.checkpoint import Part

    found, kind = checkpoint(model, part), Part[part]

    def load(on_step: OnStep) -> Any:
        from ..llada2_mlx.imaging import load_part

        model_management.throw_exception_if_processing_interrupted()
        return load_part(found, kind, model_management.get_torch_device())

    return _registered(
        (kind, found.root),
        model,
        lambda: ManagedPart(f"{kind.value} of {found.root.name}", load, found.weight_bytes(kind)),
    )


def _registered(key: tuple, model: str, make: Callable[[], ManagedPart]) -> ManagedPart:
    state = fingerprint(model)
    known = _parts.get(key)
    if known and known[0] == state:
        return known[1]
    part = make()
    if known:
        known[1].detach()  # its files were replaced
    _parts[key] = state, part
    return part

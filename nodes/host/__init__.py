"""The only place that talks to ComfyUI's runtime: folders, progress, interruption, memory."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...llada2_mlx.checkpoint.layout import BUILT_IN as BUILT_IN_FOLDER
from ...llada2_mlx.checkpoint.layout import HUB_MODEL, Checkpoint, Part, model_folders, resolve
from ...llada2_mlx.errors import CheckpointError, LLaDA2Error
from ...llada2_mlx.progress import amount, ignore
from ...llada2_mlx.vq import VQGrid, picture_seed

if TYPE_CHECKING:
    from ...llada2_mlx.backbone.handle import Backbone
    from ...llada2_mlx.progress import OnStep, Progress
    from ...llada2_mlx.tokens import Tokens

BUILT_IN = "Shapes (built in)"
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
    return f'Run: "{sys.executable}" -m pip install -r "{Path(__file__).parent.parent.parent / "requirements.txt"}" and restart ComfyUI.'


def explains_imports(execute: Callable) -> Callable:
    """For a node's ``execute``: a package that is missing or broken becomes one sentence that says what to do."""

    @functools.wraps(execute)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except LLaDA2Error:
            raise
        except Exception as error:
            cause = _import_error(error)
            if cause is None:
                raise
            package = f"the package {cause.name.partition('.')[0]}" if cause.name else "a package"
            raise RuntimeError(
                f"ComfyUI-LLaDA2-MLX needs {package}, which cannot be imported ({cause}). {repair_hint()}"
            ) from error

    return wrapper


def _import_error(error: BaseException | None) -> ImportError | None:
    """The import that failed behind an error; lazy loaders wrap it."""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__
    return error


# --- validation ---------------------------------------------------------------------------------------------------


def refusal(*checks: tuple) -> str | bool:
    """For ``validate_inputs``: True, or why the inputs cannot be used.

    Args:
        checks: ``(function, *arguments)`` each; the first that raises one of our errors is the answer. One with an
            argument that is None (missing or linked) is left to ComfyUI, or to the run.
    """
    if missing := missing_packages():
        return f"ComfyUI-LLaDA2-MLX needs {', '.join(missing)}, which this Python does not have. {repair_hint()}"
    for function, *arguments in checks:
        if None in arguments:
            continue
        try:
            function(*arguments)
        except LLaDA2Error as error:
            return str(error)
    return True


# --- models -------------------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    """What a model list offers: the built-in default, the folders under ``models/llada2``, the hub's model."""
    return [BUILT_IN, *sorted(_folders()), HUB_MODEL]


def checkpoint(model: str, *parts: Part) -> Checkpoint:
    """The checkpoint behind a name of the list, with ``parts`` in it; the hub's model is downloaded where it is not yet.

    Raises:
        CheckpointError: there is no such model, or it lacks a part.
    """
    folders = _folders() | {BUILT_IN: BUILT_IN_FOLDER}
    if model not in [*folders, HUB_MODEL]:
        raise CheckpointError(
            f"There is no model {model!r}. There are: {', '.join(model_names())}. Put a model folder into models/{_FOLDER}."
        )
    if model in folders:
        return resolve(folders[model], *parts)
    return resolve(model, *parts, on_step=progress())


def check_model(model: str, *parts: Part) -> None:
    """Like ``checkpoint``, when queueing: the hub's model is not looked at, because that could take long."""
    if model != HUB_MODEL:
        checkpoint(model, *parts)


def fingerprint(model: str, *parts: Part) -> tuple:
    """The state of the files of some parts: it changes when they are replaced, and with nothing else."""
    folder = _folders().get(model)
    if folder is None:
        return ()
    files = {path for part in parts for path in Checkpoint(folder).files(part)}
    stats = [(str(path.relative_to(folder)), path.stat()) for path in sorted(files)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _folders() -> dict[str, Path]:
    found, problems = model_folders(map(Path, folder_paths.get_folder_paths(_FOLDER)))
    for problem in problems:
        _log_once(problem)
    return found


@functools.cache
def _log_once(sentence: str) -> None:
    """The folders are looked at again and again."""
    logging.warning("ComfyUI-LLaDA2-MLX: %s", sentence)


# --- progress and interruption ------------------------------------------------------------------------------------


def progress(item: int = 0, items: int = 1) -> OnStep:
    """An ``OnStep`` that moves the running node's bar and ends the work when the user cancels.

    Args:
        item, items: which of how many equal pieces of work this is.
    """
    bar, phase, show = ProgressBar(1), "", progress_text()

    def step(at: Progress) -> None:
        nonlocal bar, phase
        model_management.throw_exception_if_processing_interrupted()
        if at.phase != phase:  # a bar does not go back
            bar, phase = ProgressBar(1), at.phase
        bar.update_absolute(item * at.total + at.done, items * at.total)
        if at.in_bytes:  # it takes so long that a person wants to know how much is left
            show(f"{at.phase}: {amount(at.done)} of {amount(at.total)}", final=at.done == at.total)

    return step


def pictures(grids: tuple[VQGrid, ...], seed: int) -> Iterator[tuple[VQGrid, int, OnStep]]:
    """Each grid of a batch, with the seed and the ``OnStep`` of its own."""
    for index, grid in enumerate(grids):
        yield grid, picture_seed(seed, index), progress(index, len(grids))


def progress_text() -> Callable[..., None]:
    """A function that shows a growing text on the running node; with ``final=True`` at once, else not too often."""
    context, last = get_executing_context(), 0.0

    def show(text: str, final: bool = False) -> None:
        nonlocal last
        if context is not None and (final or time.monotonic() - last >= _TEXT_INTERVAL):
            last = time.monotonic()
            PromptServer.instance.send_progress_text(text, context.node_id)

    return show


def tell(sentence: str | None, level: int = logging.INFO, shown: str = "{}") -> None:
    """Show a sentence on the running node, and write it to the log; None is nothing to tell."""
    if sentence is None:
        return
    logging.log(level, "ComfyUI-LLaDA2-MLX: %s", sentence)
    if (context := get_executing_context()) is not None:
        PromptServer.instance.send_progress_text(shown.format(sentence), context.node_id)


def warn(sentence: str | None) -> None:
    """The same for a warning."""
    tell(sentence, logging.WARNING, "Warning: {}")


# --- memory -------------------------------------------------------------------------------------------------------


class ManagedPart(ModelPatcher):
    """A part of a model that ComfyUI's memory management can load and let go.

    To ComfyUI it is a patcher of an empty module with a size. What it holds is ``value``: all of it or nothing.

    Args:
        name: what a person calls it.
        load: makes the value on a device; called again after it was let go.
        size: bytes that the value takes.
        release: called with the value when it is let go, where dropping it is not enough.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[torch.device, OnStep], Any],
        size: int,
        release: Callable[[Any], None] | None = None,
    ):
        device = model_management.get_torch_device()
        super().__init__(torch.nn.Module(), device, torch.device("cpu"), size=max(size, 1))
        self.name, self.value = name, None
        self._load, self._release = load, release
        self._on_step: OnStep = ignore

    def get(self, on_step: OnStep, working_bytes: int = 0) -> Any:
        """The value, loaded if it is not; ComfyUI makes room for it and for ``working_bytes`` of work."""
        self._on_step = on_step
        try:
            model_management.throw_exception_if_processing_interrupted()
            model_management.load_models_gpu([self], memory_required=working_bytes)
        finally:
            self._on_step = ignore
        return self.value

    def loaded_size(self) -> int:
        return self.size if self.value is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.value is not None else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        if self.value is not None:
            return 0
        began = time.perf_counter()
        self.value = self._load(self.load_device, self._on_step)
        seconds = time.perf_counter() - began
        logging.info("ComfyUI-LLaDA2-MLX: %s, %.1f MB, loaded in %.1f s", self.name, self.size / 2**20, seconds)
        return self.size

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        return 0  # all or nothing: ComfyUI then calls detach

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        # ComfyUI also calls this on what stays loaded, with unpatch_all false
        if unpatch_all and self.value is not None:
            if self._release:
                self._release(self.value)
            self.value = None
            model_management.soft_empty_cache()  # so that ComfyUI sees what became free before it asks for more
            logging.info("ComfyUI-LLaDA2-MLX: %s, %.1f MB, let go", self.name, self.size / 2**20)
        return self.model


class ManagedBackbone(ManagedPart):
    """What the backbone socket carries: to ComfyUI a patcher, to ``llada2_mlx.tasks`` a backbone.

    A task checks the request with the tokenizer and the config, and the weights are loaded when it runs the network.
    """

    def __init__(self, handle: Backbone):
        def load(device: torch.device, on_step: OnStep) -> Backbone:
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


# The one registry of parts, loaded or not: (kind, folder, ...) -> (state of its files, part).
_parts: dict[tuple, tuple[tuple, ManagedPart]] = {}


def backbone(model: str, precision: str) -> ManagedBackbone:
    """The backbone of a model. Its files' headers are checked now, its weights read on use.

    Tells on the node why "auto" picked what it did.
    """
    from ...llada2_mlx.backbone.handle import Backbone

    handle = Backbone(checkpoint(model, Part.BACKBONE), precision)
    tell(handle.reason)
    key = "backbone", handle.checkpoint.root.resolve(), handle.precision  # "auto" is one of the others
    return _registered(key, fingerprint(model, Part.BACKBONE), lambda: ManagedBackbone(handle))


def image_part(model: str, part: Part) -> ManagedPart:
    """A part of a model that runs in PyTorch, on the device that ComfyUI chooses."""
    found = checkpoint(model, part)

    def load(device: torch.device, on_step: OnStep) -> Any:
        from ...llada2_mlx.imaging import load_part

        return load_part(found, part, device, on_step)

    make = lambda: ManagedPart(f"{part.value} of {found.root.name}", load, found.weight_bytes(part))
    return _registered((part, found.root.resolve()), fingerprint(model, part), make)


def _registered(key: tuple, state: tuple, make: Callable[[], ManagedPart]) -> ManagedPart:
    known_state, known = _parts.get(key, (None, None))
    if known is not None and known_state == state:
        return known
    if known is not None:
        known.detach()  # its files were replaced
    part = make()
    _parts[key] = state, part
    return part

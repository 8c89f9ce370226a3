"""Parts of a model that ComfyUI's memory management loads and lets go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher

from ...llada2_mlx.checkpoint.layout import Checkpoint, Part
from ...llada2_mlx.progress import ignore
from .folders import checkpoint, fingerprint, is_hub_model
from .progress import progress, tell

if TYPE_CHECKING:
    from ...llada2_mlx.backbone.handle import Backbone
    from ...llada2_mlx.backbone.working import Batch
    from ...llada2_mlx.imaging.flow import DecodeOptions
    from ...llada2_mlx.progress import OnStep
    from ...llada2_mlx.tokens import Tokens
    from ...llada2_mlx.vq import VQGrid


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

    ``source`` is its name in the model lists. A task checks the request with the tokenizer and the config, and the weights are loaded when it
    runs the network; ComfyUI then makes room for them and for the work.
    """

    def __init__(self, handle: Backbone, model: str):
        def load(device: torch.device, on_step: OnStep) -> Backbone:
            handle.load(on_step)
            return handle

        super().__init__(f"backbone of {handle.checkpoint.root.name}", load, handle.size, type(handle).unload)
        self.checkpoint, self.config = handle.checkpoint, handle.config
        self.source, self._handle = model, handle  # ``model`` is the patcher's own

    @property
    def tokens(self) -> Tokens:
        return self._handle.tokens

    def run(
        self, job: Callable, *args: Any, on_step: OnStep = ignore, batch: Batch | None = None, **options: Any
    ) -> Any:
        backbone = self.get(on_step, self._handle.work_bytes(batch))
        return backbone.run(job, *args, on_step=on_step, batch=batch, **options)


# The one registry of parts, loaded or not: (kind, folder, ...) -> (state of its files, part).
_parts: dict[tuple, tuple[tuple, ManagedPart]] = {}


def backbone(model: str, precision: str) -> ManagedBackbone:
    """The backbone of a model. Its files' headers are checked now, its weights read on use.

    A hub model that is not here and is asked for with few bits is converted while it arrives. Tells on the node why "auto"
    picked what it did.
    """
    from ...llada2_mlx.backbone.fetch import fetch_copy, needs_fetching
    from ...llada2_mlx.backbone.handle import Backbone
    from ...llada2_mlx.backbone.precision import BITS

    if needs_fetching(model, precision) and is_hub_model(model):
        fetch_copy(model, BITS[precision], progress())
    handle = Backbone(checkpoint(model, Part.BACKBONE), precision)
    tell(handle.reason)
    key = "backbone", handle.checkpoint.root.resolve(), handle.precision  # "auto" is one of the others
    return _registered(key, fingerprint(model, Part.BACKBONE), lambda: ManagedBackbone(handle, model))


def image_part(model: str, part: Part) -> ManagedPart:
    """A part of a model that runs in PyTorch, on the device that ComfyUI chooses."""
    found = checkpoint(model, part)
    return _image_part(found, model, part, "torch", found.weight_bytes(part))


def decoder(
    model: str, part: Part, engine: str, grids: tuple[VQGrid, ...], options: DecodeOptions
) -> tuple[ManagedPart, int]:
    """A decoder in an engine, and the bytes that decoding takes beside its weights.

    Tells on the node why "auto" took what it did.
    """
    from ...llada2_mlx.imaging.engine import plan

    found = checkpoint(model, part)
    chosen = plan(found, part, engine, grids, options, model_management.get_torch_device())
    tell(chosen.reason)
    return _image_part(found, model, part, chosen.engine, chosen.size), chosen.working


def _image_part(found: Checkpoint, model: str, part: Part, engine: str, size: int) -> ManagedPart:
    def load(device: torch.device, on_step: OnStep) -> Any:
        from ...llada2_mlx.imaging import load_part

        return load_part(found, part, device, on_step, engine)

    release = None if engine == "torch" else lambda decoder: decoder.unload()
    make = lambda: ManagedPart(f"{part.value} of {found.root.name}", load, size, release)
    return _registered((part, found.root.resolve(), engine), fingerprint(model, part), make)


def _registered(key: tuple, state: tuple, make: Callable[[], ManagedPart]) -> ManagedPart:
    known_state, known = _parts.get(key, (None, None))
    if known is not None and known_state == state:
        return known
    if known is not None:
        known.detach()  # its files were replaced
    part = make()
    _parts[key] = state, part
    return part

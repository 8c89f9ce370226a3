"""The only place that talks to ComfyUI's runtime: one room for each thing that it does for the nodes."""

from .dependencies import missing_packages, repair_hint
from .folders import (
    BACKBONES,
    BUILT_IN,
    CODES,
    check_model,
    checkpoint,
    fingerprint,
    model_names,
    model_of_backbone,
    model_of_codes,
    named,
)
from .graph import JOIN, check_codes, check_one_codebook, given, is_linked, listed, wanted_picture
from .grids import check_grid, check_prefix, grid_fingerprint, grid_names, load_grid, save_grids, size_note
from .memory import ManagedBackbone, ManagedPart, backbone, decoder, image_part
from .native import comfy_decoder, comfy_vae, empty_latent
from .preview import appeared, appearing, appearing_latent
from .progress import explains, progress, progress_text, readings, tell, warn
from .validation import refusal

__all__ = [
    "BACKBONES",
    "BUILT_IN",
    "CODES",
    "JOIN",
    "ManagedBackbone",
    "ManagedPart",
    "appeared",
    "appearing",
    "appearing_latent",
    "backbone",
    "check_codes",
    "check_grid",
    "check_model",
    "check_one_codebook",
    "check_prefix",
    "checkpoint",
    "comfy_decoder",
    "comfy_vae",
    "decoder",
    "empty_latent",
    "explains",
    "fingerprint",
    "given",
    "grid_fingerprint",
    "grid_names",
    "image_part",
    "is_linked",
    "listed",
    "load_grid",
    "missing_packages",
    "model_names",
    "model_of_backbone",
    "model_of_codes",
    "named",
    "progress",
    "progress_text",
    "readings",
    "refusal",
    "repair_hint",
    "save_grids",
    "size_note",
    "tell",
    "wanted_picture",
    "warn",
]

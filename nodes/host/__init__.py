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
from .graph import check_codes, check_one_codebook, given, listed
from .grids import check_grid, check_prefix, grid_fingerprint, grid_names, load_grid, save_grids, size_note
from .memory import ManagedBackbone, ManagedPart, backbone, image_part
from .preview import appearing
from .progress import explains, pictures, progress, progress_text, tell, warn
from .validation import refusal

__all__ = [
    "BACKBONES",
    "BUILT_IN",
    "CODES",
    "ManagedBackbone",
    "ManagedPart",
    "appearing",
    "backbone",
    "check_codes",
    "check_grid",
    "check_model",
    "check_one_codebook",
    "check_prefix",
    "checkpoint",
    "explains",
    "fingerprint",
    "given",
    "grid_fingerprint",
    "grid_names",
    "image_part",
    "listed",
    "load_grid",
    "missing_packages",
    "model_names",
    "model_of_backbone",
    "model_of_codes",
    "named",
    "pictures",
    "progress",
    "progress_text",
    "refusal",
    "repair_hint",
    "save_grids",
    "size_note",
    "tell",
    "warn",
]

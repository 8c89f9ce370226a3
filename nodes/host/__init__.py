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
from .graph import JOIN, check_codes, is_linked
from .memory import ManagedBackbone, ManagedPart, backbone, image_part
from .progress import explains, progress, progress_text, readings, tell, warn
from .validation import refusal

__all__ = [
    "BACKBONES",
    "BUILT_IN",
    "CODES",
    "JOIN",
    "ManagedBackbone",
    "ManagedPart",
    "backbone",
    "check_codes",
    "check_model",
    "checkpoint",
    "explains",
    "fingerprint",
    "image_part",
    "is_linked",
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
    "tell",
    "warn",
]

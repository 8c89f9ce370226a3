"""The only place that talks to ComfyUI's runtime: one room for each thing that it does for the nodes."""

from .dependencies import missing_packages, repair_hint
from .folders import BUILT_IN, check_model, checkpoint, fingerprint, model_names
from .memory import ManagedBackbone, ManagedPart, backbone, image_part
from .progress import explains, pictures, progress, progress_text, tell, warn
from .validation import refusal

__all__ = [
    "BUILT_IN",
    "ManagedBackbone",
    "ManagedPart",
    "backbone",
    "check_model",
    "checkpoint",
    "explains",
    "fingerprint",
    "image_part",
    "missing_packages",
    "model_names",
    "pictures",
    "progress",
    "progress_text",
    "refusal",
    "repair_hint",
    "tell",
    "warn",
]

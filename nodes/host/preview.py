"""Codes as a picture that the running node shows while they are drawn."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from ...llada2_mlx.errors import LLaDA2Error
from ...llada2_mlx.imaging.look import look, palette
from .folders import local_checkpoint
from .progress import progress

_INTERVAL = 0.1  # seconds between two pictures
_SIDE, _LARGEST_CELL = 512, 32  # pixels of a picture, and of a code, at most


def appearing(model: str, on_step: progress) -> Callable[[np.ndarray, np.ndarray], None] | None:
    """For a task's ``on_codes``: shows codes of a model of the list as they are accepted, at most ten times a second.

    None where the image tokenizer, whose codebook has the colours, is not on this machine.
    """
    found = local_checkpoint(model)
    try:
        colours = None if found is None else palette(found)
    except LLaDA2Error:
        return None
    last = 0.0

    def show(codes: np.ndarray, masked: np.ndarray) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL or not masked.any():
            last = time.monotonic()
            scale = max(1, min(_LARGEST_CELL, _SIDE // max(codes.shape)))
            on_step.preview(Image.fromarray(look(codes, colours, masked, scale)))

    return None if colours is None else show

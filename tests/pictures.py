"""Pictures that tests make."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(width: int, height: int) -> Image.Image:
    """An RGB picture of random pixels, the same every time."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))

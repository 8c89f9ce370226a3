"""Between ComfyUI's picture tensors ([batch, height, width, channels], 0 .. 1) and Pillow's pictures."""

from __future__ import annotations

import torch
from PIL import Image

from ..errors import RequestError

_CHANNELS = (1, 3, 4)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """A batch [batch, height, width, 1, 3 or 4 channels] of floats in 0 .. 1 -> 8-bit pictures.

    Raises:
        RequestError: the batch is empty or has another shape.
    """
    if pixels.ndim != 4 or 0 in pixels.shape or pixels.shape[-1] not in _CHANNELS:
        raise RequestError(
            f"A picture of shape {list(pixels.shape)} cannot be used; it needs pixels and 1, 3 or 4 channels."
        )
    # rounded; what is outside 0 .. 1 or not a number is clamped
    values = (torch.nan_to_num(pixels.float()).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in values]

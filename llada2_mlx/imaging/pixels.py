"""Between ComfyUI's picture tensors ([batch, height, width, channels], 0 .. 1) and Pillow's pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..errors import RequestError

_CHANNELS = (1, 3, 4)


def to_images(pixels: torch.Tensor, mask: torch.Tensor | None = None) -> list[Image.Image]:
    """A batch [batch, height, width, 1, 3 or 4 channels] of floats in 0 .. 1 -> 8-bit pictures.

    Args:
        mask: [batch or 1, any height, any width], 1 where a picture is transparent, which becomes white; brought to the
            size of the pictures, because ComfyUI gives a small empty one for a picture without transparency.

    Raises:
        RequestError: the batch is empty or has another shape, or the mask is for another number of pictures.
    """
    if pixels.ndim != 4 or 0 in pixels.shape or pixels.shape[-1] not in _CHANNELS:
        raise RequestError(
            f"A picture of shape {list(pixels.shape)} cannot be used; it needs pixels and 1, 3 or 4 channels."
        )
    if mask is not None:
        if mask.ndim != 3 or 0 in mask.shape or mask.shape[0] not in (1, pixels.shape[0]):
            raise RequestError(
                f"A mask of shape {list(mask.shape)} does not fit {pixels.shape[0]} pictures; give one for all, or one for each."
            )
        size = pixels.shape[1:3]
        cover = functional.interpolate(mask[:, None].float(), size, mode="bilinear").clamp(0, 1).movedim(1, -1)
        pixels = pixels.float() * (1 - cover) + cover
    # rounded; what is outside 0 .. 1 or not a number is clamped
    values = (torch.nan_to_num(pixels.float()).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in values]


def to_mask(cells: Sequence[np.ndarray], pixels: int) -> torch.Tensor:
    """Grids of numbers in 0 .. 1, [rows, columns] of one size, -> a mask [batch, height, width], float32.

    Args:
        pixels: the side of the square that each cell becomes.
    """
    grids = torch.from_numpy(np.stack(cells).astype(np.float32))
    return grids.repeat_interleave(pixels, dim=1).repeat_interleave(pixels, dim=2)

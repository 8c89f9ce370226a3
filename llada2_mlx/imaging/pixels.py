"""Between ComfyUI's tensors of pictures ([batch, height, width, channels], 0 .. 1) and of masks ([batch, height, width]) and ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..errors import RequestError
from ..grids import cells
from ..vq import VQGrid

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


def to_pixels(pictures: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """8-bit pictures [height, width, 3] -> batches [batch, height, width, 3] in 0 .. 1: one, or one a picture where sizes differ."""
    batches = [pictures] if len({picture.shape for picture in pictures}) == 1 else [[picture] for picture in pictures]
    return [torch.from_numpy(np.stack(batch)).float() / 255 for batch in batches]


def to_mask(cells: Sequence[np.ndarray], pixels: int) -> torch.Tensor:
    """Grids of numbers in 0 .. 1, [rows, columns] of one size, -> a mask [batch, height, width], float32.

    Args:
        pixels: the side of the square that each cell becomes.

    Raises:
        RequestError: they have several sizes.
    """
    if len(sizes := {each.shape for each in cells}) != 1:
        told = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)) or "none"
        raise RequestError(
            f"The masks of a batch have one size, and these grids have several ({told}). Give them one by one."
        )
    grids = torch.from_numpy(np.stack(cells).astype(np.float32))
    return grids.repeat_interleave(pixels, dim=1).repeat_interleave(pixels, dim=2)


def to_cells(mask: torch.Tensor | None, grids: Sequence[VQGrid], threshold: float = 0.5) -> list[np.ndarray | None]:
    """A mask of any size -> the codes of each grid that it covers, as booleans [height, width]; None without a mask.

    Args:
        mask: [batch or 1, height, width], or one of them alone.
        threshold: the part of a code that has to be covered at least.

    Raises:
        RequestError: the mask is empty or for another number of grids, or the threshold is out of range.
    """
    if mask is None:
        return [None] * len(grids)
    masks = torch.nan_to_num(mask.float()).clamp(0, 1).cpu().numpy()
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or len(masks) not in (1, len(grids)):
        raise RequestError(
            f"A mask of shape {list(masks.shape)} does not fit {len(grids)} grids; give one for all, or one for each."
        )
    return [cells(masks[min(index, len(masks) - 1)], *grid.codes.shape, threshold) for index, grid in enumerate(grids)]

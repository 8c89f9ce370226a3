"""Codes as colours: a picture of a grid of codes that costs no decoding.

A code's colour is where its vector lies in the codebook of the image tokenizer, along the three directions in which
the codebook spreads most. Codes that stand for alike things so get alike colours.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..checkpoint.codebook import VECTORS, require_same
from ..checkpoint.hub import again
from ..checkpoint.layout import Checkpoint
from ..errors import CheckpointError, RequestError
from ..vq import VQGrid

LARGEST_SCALE = 64  # pixels on a side of a code
_OUTLIERS = 2  # percent at each end of an axis that get its last colour
_HATCHES = np.array([72, 152], np.uint8)  # greys of the stripes of a masked code


def palette(checkpoint: Checkpoint) -> np.ndarray:
    """A colour for each code of a model: uint8 [codebook, 3], read-only.

    Only the codebook is read of the image tokenizer, once until its file changes; of the published model that takes some seconds.

    Raises:
        CheckpointError: the image tokenizer is not there, or holds no codebook.
    """
    path = checkpoint.only_safetensors("image_tokenizer")
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from None
    return _palette(path, stat.st_size, stat.st_mtime_ns)


def look_at(grid: VQGrid, checkpoint: Checkpoint, masked: np.ndarray | None = None, scale: int = 16) -> np.ndarray:
    """A picture of a grid in the colours of a model: uint8 [height * scale, width * scale, 3].

    Args:
        masked, scale: as for ``look``.

    Raises:
        RequestError: the grid is of another codebook, as far as that is known, or of one of another size; or as ``look``.
        CheckpointError: as ``palette``.
    """
    require_scale(scale)
    require_same(grid, checkpoint)
    colours = palette(checkpoint)
    if grid.codebook_size != len(colours):  # a file without fingerprints says no more of its codebook
        raise RequestError(
            f"The grid was made by a model with {grid.codebook_size} codes; the image tokenizer of {checkpoint.root.name} has "
            f"{len(colours)}. Choose the model that made the grid."
        )
    return look(grid.codes, colours, masked, scale)


def require_scale(scale: int) -> None:
    """Raise ``RequestError`` unless a code is shown by 1 to ``LARGEST_SCALE`` pixels on a side."""
    if not 1 <= scale <= LARGEST_SCALE:
        raise RequestError(f"A code is shown by 1 to {LARGEST_SCALE} pixels on a side, not by {scale}.")


def look(codes: np.ndarray, palette: np.ndarray, masked: np.ndarray | None = None, scale: int = 16) -> np.ndarray:
    """A picture of codes: uint8 [height * scale, width * scale, 3]. Cheap enough to show every step of a drawing.

    Args:
        codes: integers [height, width].
        palette: as ``palette`` gives it.
        masked: booleans [height, width]: codes that are not there; they are hatched in grey, and their values are not looked at.
        scale: pixels on a side of a code, 1 to 64.

    Raises:
        RequestError: a code is not in the palette, ``masked`` has another size, or ``scale`` is not 1 to 64.
    """
    require_scale(scale)
    if masked is None:
        masked = np.zeros(codes.shape, bool)
    if masked.shape != codes.shape:
        raise RequestError(
            f"The mask is for a grid of {list(masked.shape)} codes, and the grid has {list(codes.shape)}."
        )
    known = np.where(masked, 0, codes)
    least, most = int(known.min()), int(known.max())
    if least < 0 or most >= len(palette):
        raise RequestError(
            f"The grid holds codes from {least} to {most}; there are colours for 0 to {len(palette) - 1}."
        )
    enlarged = lambda values: values.repeat(scale, axis=0).repeat(scale, axis=1)
    picture = enlarged(palette[known])
    if masked.any():
        rows, columns = np.ogrid[: picture.shape[0], : picture.shape[1]]
        stripes = _HATCHES[(rows + columns) // 2 % 2]
        np.copyto(picture, stripes[..., None], where=enlarged(masked)[..., None])
    return picture


@lru_cache(maxsize=4)
def _palette(path: Path, size: int, changed: int) -> np.ndarray:
    vectors = _vectors(path)
    # the tokenizer compares directions: it divides each vector by its length
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    places = _along_principal_axes(vectors, 3)
    low, high = np.percentile(places, [_OUTLIERS, 100 - _OUTLIERS], axis=0)
    spread = np.where(high > low, high - low, 1)
    middle = np.where(high > low, (places - low) / spread, 0.5)  # an axis along which all are equal says nothing
    colours = (middle.clip(0, 1) * 255).round().astype(np.uint8)
    colours.setflags(write=False)
    return colours


def _along_principal_axes(vectors: np.ndarray, count: int) -> np.ndarray:
    """[n, width] -> [n, count]: where vectors lie along the axes of their largest spread, the largest first.

    An axis has two directions; of these the one is taken in which its largest component points.
    """
    centred = vectors - vectors.mean(axis=0)
    spread, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))  # ascending
    axes = axes[:, ::-1][:, :count]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0))
    # rounding noise is no axis: in a codebook of fewer dimensions, or with fewer codes
    axes = axes * (spread[::-1][:count] > spread[-1] * 1e-9)
    places = centred @ axes
    return np.pad(places, ((0, 0), (0, count - places.shape[1])))


def _vectors(path: Path) -> np.ndarray:
    """The codebook: float32 [codes, width]."""
    try:
        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
            vectors = file.get_tensor(VECTORS).float().numpy()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The codebook in {path} cannot be read ({error}). {again(path)}") from None
    if vectors.ndim != 2 or 0 in vectors.shape or not np.isfinite(vectors).all():
        raise CheckpointError(f"{path} holds no codebook of finite vectors. {again(path)}")
    return vectors

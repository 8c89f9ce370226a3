"""What is in a picture of the world, read by plain code and not by a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from .world import (
    SIDE,
    Background,
    Colour,
    Kind,
    Pattern,
    Place,
    Scene,
    Shape,
    Size,
    Tone,
    Variation,
    background_pixels,
    coverage_of,
)

LEAST_AREA = 500  # pixels of a quarter that have to stand out for a shape; the smallest has about 1,400
_STRIDE = 4  # of the pixels that are compared with a background; a stripe is 16 high
LEAST_OVERLAP = 0.6  # intersection over union with the best template, for a shape to have a kind


def read(image: Image.Image) -> Scene | None:
    """The scene of a picture of any size; None where something stands out that is no shape of the world."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    background = _background(pixels)
    shapes = []
    for place in Place:
        x, y = (centre - SIDE // 4 for centre in place.centre)
        quarter = pixels[y : y + SIDE // 2, x : x + SIDE // 2]
        behind = background_pixels(background)[y : y + SIDE // 2, x : x + SIDE // 2]
        # between its background and a colour, a pixel belongs to the nearer of the two
        distances = np.stack([np.linalg.norm(quarter - rgb, axis=-1) for rgb in _palette()])
        best = distances.argmin(axis=0)
        stands_out = distances.min(axis=0) < np.linalg.norm(quarter - behind, axis=-1)
        if stands_out.sum() < LEAST_AREA:
            continue
        inner = _eroded(stands_out)  # an edge's colours are mixtures
        colour = list(Colour)[np.bincount(best[inner if inner.any() else stands_out], minlength=len(Colour)).argmax()]
        kind, size, overlap = _kind(stands_out)
        if overlap < LEAST_OVERLAP:
            return None
        shapes.append(Shape(kind, colour, place, size))
    return Scene(tuple(shapes), background)


def _background(pixels: np.ndarray) -> Background:
    """The background that most of the picture is nearest to."""

    sample = pixels[::_STRIDE, ::_STRIDE]

    def error(background: Background) -> float:
        return np.minimum(np.abs(sample - background_pixels(background)[::_STRIDE, ::_STRIDE]).sum(axis=-1), 60).mean()

    return min((Background(pattern, tone) for pattern in Pattern for tone in Tone), key=error)


@cache
def _palette() -> np.ndarray:
    return np.array([colour.rgb for colour in Colour], dtype=np.float32)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """The mask without its outermost two pixels."""
    for _ in range(2):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _kind(mask: np.ndarray) -> tuple[Kind, Size, float]:
    """The template that overlaps the mask best, both centred on their middle."""
    names, templates = _templates()
    values = _centred(mask)
    common = templates @ values
    overlaps = common / (templates.sum(axis=1) + values.sum() - common)
    best = int(overlaps.argmax())
    return *names[best], float(overlaps[best])


@cache
def _templates() -> tuple[list[tuple[Kind, Size]], np.ndarray]:
    """Names, and masks [templates, pixels] float32."""
    turned = [
        (kind, size, _centred(_mask(kind, size, turn, scale)))
        for kind in Kind
        for size in Size
        for turn in (-6, 0, 6)
        for scale in (0.96, 1.04)
    ]
    return [(kind, size) for kind, size, _ in turned], np.stack([values for _, _, values in turned])


def _mask(kind: Kind, size: Size, turn: float, scale: float) -> np.ndarray:
    shape = replace(Shape(kind, Colour.RED, Place.TOP_LEFT, size), variation=Variation(turn=turn, scale=scale))
    rows, columns, coverage = coverage_of(shape)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[rows, columns] = coverage > 0.5
    return mask[: SIDE // 2, : SIDE // 2]


def _centred(mask: np.ndarray) -> np.ndarray:
    """The mask moved so that its centre of mass is in the middle; every other pixel of it, as float32 in a row."""
    rows, columns = np.nonzero(mask)
    middle = mask.shape[0] // 2
    moved = np.roll(mask, (middle - round(rows.mean()), middle - round(columns.mean())), axis=(0, 1))
    return moved[::2, ::2].astype(np.float32).ravel()

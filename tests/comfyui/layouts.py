"""What the shipped prompts ask for, and what a picture shows, as the detector reads it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.world import Colour, Kind, Place, Scene

Layout = set[tuple[Kind, Colour, Place]]

CIRCLE, STAR = (Kind.CIRCLE, Colour.RED, Place.TOP_LEFT), (Kind.STAR, Colour.BLUE, Place.BOTTOM_RIGHT)
DRAWN = {CIRCLE, STAR}


def seen_in(picture: Path | Image.Image) -> Scene | None:
    """What is in a picture; None where it cannot be read."""
    if isinstance(picture, Path):
        with Image.open(picture) as image:
            return read(image)
    return read(picture)


def layout_of(picture: Path | Image.Image) -> Layout | None:
    """The shapes in a picture; None where it cannot be read."""
    found = seen_in(picture)
    return found and found.layout()

"""A world of flat shapes: what a picture can hold, how it is drawn, and what the backbone never gets to see.

A picture has four places. Each holds at most one shape, about three codes wide on the 8 x 8 grid of a 256 x 256 picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache

import numpy as np
from PIL import Image

SIDE = 256  # pixels
CODE = 32  # pixels of a picture per code
MOST_SHAPES = 3
SUMMARY = (
    "circles, squares, triangles, stars and rings, in red, orange, yellow, green, blue, purple, pink and black, at the "
    "top left, top right, bottom left and bottom right, on a plain, striped or gradient background"
)


class Kind(Enum):
    """What a shape is."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"
    RING = "ring"


class Colour(Enum):
    """The colours of shapes."""

    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    BLUE = "blue"
    PURPLE = "purple"
    PINK = "pink"
    BLACK = "black"

    @property
    def rgb(self) -> tuple[int, int, int]:
        return _SHAPE_RGB[self]


class Place(Enum):
    """Where a shape is."""

    TOP_LEFT = "top left"
    TOP_RIGHT = "top right"
    BOTTOM_LEFT = "bottom left"
    BOTTOM_RIGHT = "bottom right"

    @property
    def centre(self) -> tuple[int, int]:
        """x and y in pixels."""
        return SIDE // 4 + SIDE // 2 * ("right" in self.value), SIDE // 4 + SIDE // 2 * ("bottom" in self.value)

    @property
    def left(self) -> bool:
        return "left" in self.value


class Size(Enum):
    """How large a shape is."""

    SMALL = "small"
    LARGE = "large"

    @property
    def radius(self) -> float:
        """Half the width in pixels: a shape is 2.4 or 3.2 codes wide."""
        return CODE * {"small": 1.2, "large": 1.6}[self.value]


class Pattern(Enum):
    """How a background is filled."""

    PLAIN = "plain"
    GRADIENT = "gradient"
    STRIPED = "striped"


class Tone(Enum):
    """The colours of backgrounds, light and pale."""

    WHITE = "white"
    GREY = "grey"
    BEIGE = "beige"
    SKY = "light blue"

    @property
    def rgb(self) -> tuple[int, int, int]:
        return _TONE_RGB[self]


_SHAPE_RGB = {
    Colour.RED: (214, 30, 40),
    Colour.ORANGE: (245, 130, 20),
    Colour.YELLOW: (245, 215, 30),
    Colour.GREEN: (30, 150, 60),
    Colour.BLUE: (30, 70, 210),
    Colour.PURPLE: (125, 40, 165),
    Colour.PINK: (250, 120, 190),
    Colour.BLACK: (25, 25, 30),
}
_TONE_RGB = {
    Tone.WHITE: (250, 250, 250),
    Tone.GREY: (190, 190, 195),
    Tone.BEIGE: (238, 222, 190),
    Tone.SKY: (185, 220, 245),
}


@dataclass(frozen=True)
class Background:
    """What is behind the shapes."""

    pattern: Pattern
    tone: Tone


@dataclass(frozen=True)
class Variation:
    """The small differences between shapes of one description: none of them has a word."""

    x: float = 0.0  # pixels
    y: float = 0.0
    scale: float = 1.0
    turn: float = 0.0  # degrees
    light: float = 0.0  # added to each channel, of 255


@dataclass(frozen=True)
class Shape:
    """A shape of a picture. Two shapes are equal if their descriptions are, whatever their variation."""

    kind: Kind
    colour: Colour
    place: Place
    size: Size
    variation: Variation = field(default=Variation(), compare=False)


@dataclass(frozen=True)
class Scene:
    """What is in a picture: shapes in the order of the places, on a background."""

    shapes: tuple[Shape, ...]
    background: Background

    def at(self, place: Place) -> Shape | None:
        """The shape at a place, if there is one."""
        return next((shape for shape in self.shapes if shape.place is place), None)

    def free(self) -> list[Place]:
        """The places without a shape."""
        return [place for place in Place if self.at(place) is None]

    def with_shapes(self, *shapes: Shape) -> Scene:
        """This background with other shapes, put in order."""
        return replace(self, shapes=tuple(sorted(shapes, key=lambda shape: list(Place).index(shape.place))))

    def layout(self) -> set[tuple[Kind, Colour, Place]]:
        """Kind, colour and place of every shape: what the measures compare."""
        return {(shape.kind, shape.colour, shape.place) for shape in self.shapes}


def held_out_shape(kind: Kind, colour: Colour, place: Place) -> bool:
    """Whether no training picture of the backbone has this shape: 16 of the 160 combinations, evenly spread."""
    numbers = list(Kind).index(kind), list(Colour).index(colour), list(Place).index(place)
    return (2 * numbers[0] + numbers[1] + 5 * numbers[2]) % 10 == 0


def held_out_pair(kind: Kind, colour: Colour) -> bool:
    """Whether no prompt without a place asks for this in training: 8 of the 40, those with a held-out place."""
    return any(held_out_shape(kind, colour, place) for place in Place)


def held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the test set: it has a held-out shape, or a ring left and a square right."""
    ring = any(shape.kind is Kind.RING and shape.place.left for shape in scene.shapes)
    square = any(shape.kind is Kind.SQUARE and not shape.place.left for shape in scene.shapes)
    return ring and square or any(held_out_shape(s.kind, s.colour, s.place) for s in scene.shapes)


def random_variation(rng: random.Random) -> Variation:
    """A variation too small to change what a shape is called."""
    shift = lambda: rng.uniform(-4, 4)
    return Variation(shift(), shift(), rng.uniform(0.96, 1.04), rng.uniform(-6, 6), rng.uniform(-8, 8))


def random_shape(rng: random.Random, place: Place) -> Shape:
    """Any shape at a place."""
    choose = lambda kind: rng.choice(list(kind))
    return Shape(choose(Kind), choose(Colour), place, choose(Size), random_variation(rng))


def random_background(rng: random.Random) -> Background:
    """Any background."""
    return Background(rng.choice(list(Pattern)), rng.choice(list(Tone)))


def random_scene(rng: random.Random, shapes: int | None = None) -> Scene:
    """Any scene of one to three shapes, held out or not."""
    places = rng.sample(list(Place), shapes or rng.randint(1, MOST_SHAPES))
    return Scene((), random_background(rng)).with_shapes(*(random_shape(rng, place) for place in places))


def scenes(seed: int | str, test: bool | None = None) -> Iterator[Scene]:
    """Endless scenes of a seed: only held-out ones for a test, none of them otherwise; all if None."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        if test is None or held_out(scene) is test:
            yield scene


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, 256 x 256 pixels RGB, its edges smoothed."""
    return Image.fromarray(draw_array(scene))


def draw_array(scene: Scene) -> np.ndarray:
    """The picture of a scene, [256, 256, 3] uint8."""
    pixels = _background_bytes(scene.background).copy()
    for shape in scene.shapes:
        rows, columns, coverage = coverage_of(shape)
        colour = np.clip(np.array(shape.colour.rgb, dtype=np.float32) + shape.variation.light, 0, 255)
        patch = pixels[rows, columns]
        pixels[rows, columns] = patch + (colour - patch) * coverage[..., None] + 0.5
    return pixels


@cache
def background_pixels(background: Background) -> np.ndarray:
    """The background alone, [256, 256, 3] float32. A stripe is half a code wide; a gradient darkens downwards."""
    rows = np.arange(SIDE, dtype=np.float32)
    shade = {
        Pattern.PLAIN: np.ones(SIDE, dtype=np.float32),
        Pattern.GRADIENT: 1.0 - 0.3 * rows / (SIDE - 1),
        Pattern.STRIPED: 1.0 - 0.2 * (rows // (CODE // 2) % 2),
    }[background.pattern]
    tone = np.array(background.tone.rgb, dtype=np.float32)
    return np.broadcast_to(shade[:, None, None] * tone, (SIDE, SIDE, 3)).astype(np.float32)


@cache
def _background_bytes(background: Background) -> np.ndarray:
    return (background_pixels(background) + 0.5).astype(np.uint8)


def coverage_of(shape: Shape) -> tuple[slice, slice, np.ndarray]:
    """The part of the picture around a shape, and how much of each pixel the shape covers, 0 .. 1."""
    variation = shape.variation
    x, y = shape.place.centre[0] + variation.x, shape.place.centre[1] + variation.y
    radius = shape.size.radius * variation.scale
    box = [slice(max(0, int(c - radius - 3)), min(SIDE, int(c + radius + 4))) for c in (y, x)]
    rows, columns = (np.arange(part.start, part.stop, dtype=np.float32) + 0.5 for part in box)
    right, down = (columns - x)[None, :], (rows - y)[:, None]
    angle = math.radians(variation.turn)
    across = math.cos(angle) * right + math.sin(angle) * down
    along = math.cos(angle) * down - math.sin(angle) * right
    return box[0], box[1], np.clip(0.5 - _distance(shape.kind, across, along, radius), 0, 1)


def _distance(kind: Kind, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline in pixels, negative inside, for a shape around the origin."""
    away = np.hypot(x, y)
    if kind is Kind.CIRCLE:
        return away - radius
    if kind is Kind.RING:
        return np.abs(away - 0.74 * radius) - 0.26 * radius
    if kind is Kind.SQUARE:
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    if kind is Kind.TRIANGLE:
        return _polygon(x, y, _corners(3, radius * 1.12, radius * 1.12) + np.array([0, 0.18 * radius]))
    return _polygon(x, y, _corners(5, radius * 1.08, radius * 0.45))


def _corners(points: int, outer: float, inner: float) -> np.ndarray:
    """Corners of a star with its tip up, or of a regular polygon where both radii are equal."""
    count = points if inner == outer else 2 * points
    angles = np.arange(count) * 2 * math.pi / count
    radii = np.where(np.arange(count) % 2, inner, outer)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon: the nearest edge, and the sign by counting crossings."""
    nearest, inside = np.full(x.shape, np.inf, dtype=np.float32), np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, (x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2)
        if dy:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * dx / dy)
    return np.where(inside, -1, 1) * np.sqrt(nearest)

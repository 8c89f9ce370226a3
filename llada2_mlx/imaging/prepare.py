"""Pictures -> the sizes that the image tokenizer wants, the published way and ours."""

from __future__ import annotations

import math
from enum import Enum

import numpy as np
from PIL import Image, ImageOps

from ..checkpoint.sizes import ENCODED_PIXELS, SIDE_STEP, ImageSizes
from ..errors import RequestError

PATCH = ENCODED_PIXELS
UNIT = SIDE_STEP
UNDERSTAND_LARGEST, UNDERSTAND_SMALLEST = 800**2, 128**2  # area in pixels
SEVERAL_LARGEST = 448**2  # of each, where several pictures are understood together
EDIT_UNITS = 256  # an edited picture has about this many UNIT x UNIT squares
EDIT_ASPECT = 4  # and sides within 4:1
GRID_SIDES = (8, 255)  # the smallest and the largest grid side that can have a size token
SMALLEST_SIDE, LARGEST_SIDE = 8 * PATCH, 254 * PATCH


class Purpose(Enum):
    """What a picture is encoded for; the value is what a person calls it."""

    UNDERSTAND = "understand"
    UNDERSTAND_SEVERAL = "understand with others"
    EDIT = "edit"
    EDIT_PUBLISHED = "edit as published"


def prepare(image: Image.Image, purpose: Purpose, side: int = 0) -> Image.Image:
    """The picture in a size that the tokenizer takes and the backbone can be told, RGB.

    Args:
        side: the picture shall have about the area of a square with this side, in pixels; 0 is the published rule.

    Raises:
        RequestError: the picture is empty, or so thin that its grid has no size token; or the side cannot be used.
    """
    require_side(side)
    _check_pixels(image)
    _check_grid(image, target_size(image, purpose, side), purpose)  # before a thin picture is made enormous
    prepared = fit(image, purpose, side)
    _check_grid(image, prepared.size, purpose)
    return prepared


def prepare_for(sizes: ImageSizes, image: Image.Image, purpose: Purpose, side: int = 0) -> Image.Image:
    """The picture in the size that a model states for a purpose, or in another that a person gives.

    A model that states a size for understanding was made for that square alone: the picture is scaled to cover it, and the middle is
    cropped.

    Args:
        side: as for ``prepare``; 0 is what the model states, and the published rule where it states nothing.
    """
    own = own_side(sizes, purpose)
    if own and not side and use_of(purpose) == "understanding":
        _check_grid(image, target_size(image, purpose, own), purpose)  # too thin to see anything in the square
        return ImageOps.fit(to_rgb(image), (own, own), Image.Resampling.BICUBIC)
    return prepare(image, purpose, side or own)


def own_side(sizes: ImageSizes, purpose: Purpose) -> int:
    """The side that a model states for a purpose; 0 where it states none."""
    return getattr(sizes, use_of(purpose))


def use_of(purpose: Purpose) -> str:
    """The use of a picture that ``ImageSizes`` has a size for."""
    return "understanding" if purpose in (Purpose.UNDERSTAND, Purpose.UNDERSTAND_SEVERAL) else "editing"


def require_side(side: int) -> None:
    """Check a side that a person gives.

    Raises:
        RequestError: it is neither 0 nor a multiple of 32 from 128 to 4064 pixels.
    """
    if side not in (0, *range(SMALLEST_SIDE, LARGEST_SIDE + 1, UNIT)):
        raise RequestError(
            f"The size is {side}; it has to be 0 (the model's own) or a multiple of {UNIT} from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels."
        )


def side_or_own(side: int) -> int:
    """A side as a widget gives it, which starts at 0 and steps up: below the smallest it is 0, the model's own.

    Raises:
        RequestError: as ``require_side``.
    """
    if 0 <= side < SMALLEST_SIDE and side % UNIT == 0:
        return 0
    require_side(side)
    return side


def fit(image: Image.Image, purpose: Purpose, side: int = 0) -> Image.Image:
    """The picture in its target size, however thin, RGB.

    Understanding scales it to cover its target and crops the middle, as published. Editing does the same; "as
    published" crops without any scaling, so that a large photo loses all but its middle and a small one is padded
    with black.

    Raises:
        RequestError: the picture is empty.
    """
    image = to_rgb(image)
    target = target_size(image, purpose, side)
    if purpose is Purpose.EDIT:
        return ImageOps.fit(image, target, Image.Resampling.BICUBIC)
    if purpose is Purpose.EDIT_PUBLISHED:
        return centre_crop(image, *target)
    covering = cover(image, *target)
    # the published crop is now and then a step larger than the target
    return centre_crop(
        covering, *(max(UNIT * (side // UNIT), wanted) for side, wanted in zip(covering.size, target, strict=True))
    )


def target_size(image: Image.Image, purpose: Purpose, side: int = 0) -> tuple[int, int]:
    """Width and height to bring a picture to: about its own, or one of a fixed set of about 512 x 512 to edit it.

    Where a side is given, both are about as large as a square with this side.
    """
    if use_of(purpose) == "understanding":
        largest = UNDERSTAND_LARGEST if purpose is Purpose.UNDERSTAND else SEVERAL_LARGEST
        return understand_size(*image.size, side**2 or largest, side**2 or UNDERSTAND_SMALLEST)
    return edit_size(*image.size, (side // UNIT) ** 2 or EDIT_UNITS)


def _check_pixels(image: Image.Image) -> None:
    if 0 in image.size:
        raise RequestError(f"The picture is {image.width} x {image.height} pixels: there is nothing in it.")


def _check_grid(image: Image.Image, size: tuple[int, int], purpose: Purpose) -> None:
    least, most = GRID_SIDES
    if not all(least <= side // PATCH <= most for side in size):
        raise RequestError(
            f"The picture is {image.width} x {image.height} pixels, too thin to {purpose.value}: its grid would be "
            f"{size[0] // PATCH} x {size[1] // PATCH} codes, and a side has to have {least} to {most}. "
            "Crop it or pad it to a less extreme shape."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode; transparent parts are put on white, 16-bit values are scaled.

    Raises:
        RequestError: the picture has no pixels.
    """
    _check_pixels(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # 32-bit modes carry pictures of other depths; what they hold tells which
        most = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        if image.mode == "F" and values.max() <= 1:
            most = 1
        image = Image.fromarray((values.clip(0, most) / most * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def understand_size(
    width: int, height: int, largest: int = UNDERSTAND_LARGEST, smallest: int = UNDERSTAND_SMALLEST
) -> tuple[int, int]:
    """Width and height to understand a picture at: multiples of 32 near its own, its area kept in bounds."""
    target = [max(UNIT, UNIT * round(side / UNIT)) for side in (width, height)]
    area = target[0] * target[1]
    if area > largest:
        scale = math.sqrt(largest / (width * height))
        target = [max(UNIT, UNIT * math.floor(side * scale / UNIT)) for side in (width, height)]
    elif area < smallest:
        scale = math.sqrt(smallest / (width * height))
        target = [UNIT * math.ceil(side * scale / UNIT) for side in (width, height)]
    return target[0], target[1]


def edit_size(width: int, height: int, units: int = EDIT_UNITS) -> tuple[int, int]:
    """Width and height to edit a picture at: of the allowed sizes the one nearest to its shape."""

    def fit(size: tuple[int, int]) -> tuple[float, int, int]:
        ratios = size[0] / width, size[1] / height
        return min(ratios) / max(ratios), *size

    return max(_edit_sizes(units), key=fit)


def _edit_sizes(units: int) -> list[tuple[int, int]]:
    """Sizes ``32 a x 32 b`` with ``a b <= units < (a + 1) (b + 1)`` and sides within 4:1 that have size tokens."""
    sides = range(SMALLEST_SIDE // UNIT, units + 1)
    return [
        (UNIT * a, UNIT * b)
        for a in sides
        for b in sides
        if a * b <= units < (a + 1) * (b + 1) and max(a, b) <= EDIT_ASPECT * min(a, b)
    ]


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled (bicubic) so that it just covers ``width x height``."""
    scale = max(width / image.width, height / image.height)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle ``width x height``; a picture that is smaller is padded with black at the right and bottom."""
    left, top = max(image.width - width, 0) // 2, max(image.height - height, 0) // 2
    return image.crop((left, top, left + width, top + height))

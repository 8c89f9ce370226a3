"""What sizes of picture a model was made for, where its config states any."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import CheckpointError, RequestError
from ..vq import VQGrid

# The side of a square picture, in pixels, that a checkpoint draws when it does not state its own.
DEFAULT_DRAWING = 1024
SIDE_STEP = 32  # pixels; so that grids have even sides
# Pixels per code: of a picture as the tokenizer sees it, and of the decoded one, which the decoder doubles.
ENCODED_PIXELS, DECODED_PIXELS = 16, 32
UPSCALES = (0, 1, 2)  # by which a decoder may be stated to enlarge; 0 is any


@dataclass(frozen=True)
class ImageSizes:
    """Sides in pixels of the square picture that a model was made to draw, and of those that it reads.

    Other shapes of about the same area are meant too. 0 is nothing stated: then the published rules hold, which take
    pictures of many sizes. A checkpoint states them as ``image_sizes`` in its ``config.json``.

    Args:
        drawing: of the decoded picture.
        understanding, editing: of a picture as the image tokenizer sees it, to be asked about and to be changed.
        upscale: the only factor by which its decoders enlarge a picture; 0 is any that there is.
    """

    drawing: int = 0
    understanding: int = 0
    editing: int = 0
    upscale: int = 0

    @classmethod
    def from_dict(cls, stated: Any) -> ImageSizes:
        """Of what a config states.

        Raises:
            CheckpointError: it is no object, a size is no multiple of 32, or the factor is none.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(stated, dict) or not set(stated) <= set(known):
            raise CheckpointError(
                f"config.json has image_sizes = {stated!r}; an object with {', '.join(known)} is needed."
            )
        for name, value in stated.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if name == "upscale":
                allowed, needed = whole and value in UPSCALES, f"one of {UPSCALES}"
            else:
                allowed, needed = whole and value >= 0 and value % SIDE_STEP == 0, f"a multiple of {SIDE_STEP} pixels"
            if not allowed:
                raise CheckpointError(f"config.json has {name} = {value!r} in image_sizes; {needed} is needed.")
        return cls(**stated)

    def require_upscale(self, upscale: int) -> None:
        """Check the factor by which a decoder shall enlarge a picture.

        Raises:
            RequestError: the model's decoders were not made for it.
        """
        if self.upscale not in (0, upscale):
            raise RequestError(
                f"upscale is {upscale}, and this model's decoders were made for {self.upscale} alone. Set it to {self.upscale}."
            )

    def doubt(self, use: str, width: int, height: int) -> str | None:
        """A sentence where a picture is of another size than the model was made for, else None.

        It has every size in codes too, the unit that all uses share.

        Args:
            use: "drawing", "understanding" or "editing".
            width, height: in pixels, of the decoded picture or of the one that the image tokenizer sees.
        """
        side, pixels = getattr(self, use), _code_pixels(use)
        if not side or width * height == side**2:
            return None
        return (
            f"This model was made for {use} at {side} x {side} pixels, and this is {width} x {height}: expect a poor result. "
            f"In codes that is {side // pixels} x {side // pixels}, and {width // pixels} x {height // pixels}."
        )

    def doubt_grid(self, use: str, grid: VQGrid) -> str | None:
        """The same of a picture that comes as codes."""
        pixels = _code_pixels(use)
        return self.doubt(use, grid.width * pixels, grid.height * pixels)


def _code_pixels(use: str) -> int:
    return DECODED_PIXELS if use == "drawing" else ENCODED_PIXELS

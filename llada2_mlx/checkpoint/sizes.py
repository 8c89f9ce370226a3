"""What sizes of picture a model was made for, where its config states any."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import CheckpointError
from ..vq import VQGrid

# The side of a square picture, in pixels, that a checkpoint draws when it does not state its own.
DEFAULT_DRAWING = 1024
SIDE_STEP = 32  # pixels; so that grids have even sides
# Pixels per code: of a picture as the tokenizer sees it, and of the decoded one, which the decoder doubles.
ENCODED_PIXELS, DECODED_PIXELS = 16, 32


@dataclass(frozen=True)
class ImageSizes:
    """Sides in pixels of the square picture that a model was made to draw, and of those that it reads.

    Other shapes of about the same area are meant too. 0 is nothing stated: then the published rules hold, which take
    pictures of many sizes. A checkpoint states them as ``image_sizes`` in its ``config.json``.

    Args:
        drawing: of the decoded picture.
        understanding, editing: of a picture as the image tokenizer sees it, to be asked about and to be changed.
    """

    drawing: int = 0
    understanding: int = 0
    editing: int = 0

    @classmethod
    def from_dict(cls, stated: Any) -> ImageSizes:
        """Of what a config states.

        Raises:
            CheckpointError: it is no object, or a size is no multiple of 32.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(stated, dict) or not set(stated) <= set(known):
            raise CheckpointError(
                f"config.json has image_sizes = {stated!r}; an object with {', '.join(known)} is needed."
            )
        for name, side in stated.items():
            if not isinstance(side, int) or isinstance(side, bool) or side < 0 or side % SIDE_STEP:
                raise CheckpointError(
                    f"config.json has {name} = {side!r} in image_sizes; a multiple of {SIDE_STEP} pixels is needed."
                )
        return cls(**stated)

    def doubt(self, use: str, width: int, height: int) -> str | None:
        """A sentence where a picture is of another size than the model was made for, else None.

        Args:
            use: "drawing", "understanding" or "editing".
        """
        side = getattr(self, use)
        if not side or width * height == side**2:
            return None
        return (
            f"This model was made for {use} at {side} x {side} pixels, and this is {width} x {height}: "
            "expect a poor result."
        )

    def doubt_grid(self, use: str, grid: VQGrid) -> str | None:
        """The same of a picture that comes as codes."""
        pixels = DECODED_PIXELS if use == "drawing" else ENCODED_PIXELS
        return self.doubt(use, grid.width * pixels, grid.height * pixels)

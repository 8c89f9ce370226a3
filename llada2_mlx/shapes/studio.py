"""A model with all its parts open: text to picture, picture to text, picture to picture, as the nodes chain them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from .. import tasks
from ..backbone.handle import Backbone
from ..backbone.sprint import Sprint
from ..checkpoint.layout import BUILT_IN, Checkpoint, Part
from ..grids import crop
from ..imaging import load_part
from ..imaging.decoder import LatentDecoder
from ..imaging.flow import DecodeOptions
from ..imaging.pixels import to_images
from ..imaging.prepare import Purpose
from ..imaging.tokenizer import ImageTokenizer
from ..imaging.vae import VAE
from ..story import tell
from ..vq import GridSet, VQGrid

MOST_TEXT = 256  # tokens of a plan, of an answer about several pictures and of a story


class Studio:
    """The parts of a checkpoint, each opened on first use, at the defaults of the nodes.

    Args:
        checkpoint: any model; the built-in one if left out.
        precision: of the backbone.
        sprint: how to save work; None is exact.
        engine: what the decoders run in, see ``imaging.engine.open_decoder``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        precision: str = "auto",
        sprint: Sprint | None = None,
        engine: str = "torch",
    ) -> None:
        self.checkpoint, self.precision, self.sprint = checkpoint or Checkpoint(BUILT_IN), precision, sprint
        self.engine = engine

    @cached_property
    def backbone(self) -> Backbone:
        return Backbone(self.checkpoint, self.precision)

    @cached_property
    def tokenizer(self) -> ImageTokenizer:
        return load_part(self.checkpoint, Part.IMAGE_TOKENIZER)

    @cached_property
    def decoder(self) -> LatentDecoder:
        return load_part(self.checkpoint, Part.DECODER, engine=self.engine)

    @cached_property
    def turbo(self) -> LatentDecoder:
        return load_part(self.checkpoint, Part.DECODER_TURBO, engine=self.engine)

    @cached_property
    def vae(self) -> VAE:
        return load_part(self.checkpoint, Part.VAE)

    def draw(self, prompt: str) -> Image.Image:
        """A picture for a prompt."""
        return self.decode(self.codes(prompt))

    def codes(self, prompt: str, guidance: float = 2.0) -> VQGrid:
        """The codes of a picture for a prompt."""
        return tasks.text_to_vq(self.backbone, prompt, guidance=guidance, sprint=self.sprint).grid

    def decode(self, grid: VQGrid, turbo: bool = True) -> Image.Image:
        """The picture of a grid: turbo at 8 steps, or the full decoder at 50."""
        decoder, steps = (self.turbo, 8) if turbo else (self.decoder, 50)
        return to_images(self.vae.decode(decoder.sample([grid], DecodeOptions(steps))))[0]

    def ask(self, picture: Image.Image, question: str) -> str:
        """The answer to a question about a picture."""
        grid = self.tokenizer.encode(picture, Purpose.UNDERSTAND)
        return tasks.understand(self.backbone, grid, question, sprint=self.sprint).text

    def edit(self, picture: Image.Image, instruction: str) -> Image.Image:
        """A picture changed as an instruction says."""
        grid = self.tokenizer.encode(picture, Purpose.EDIT)
        return self.decode(tasks.edit(self.backbone, grid, instruction).grid)

    def think(self, prompt: str) -> tuple[str, Image.Image]:
        """The plan for a prompt, and the picture drawn from it."""
        thinking = tasks.Thinking(length=MOST_TEXT)
        drawing = tasks.text_to_vq(self.backbone, prompt, thinking=thinking, sprint=self.sprint)
        return drawing.reasoning, self.decode(drawing.grid)

    def ask_about(self, pictures: Sequence[Image.Image], question: str) -> str:
        """The answer to a question about several pictures."""
        grids = GridSet(tuple(self.tokenizer.encode(picture, Purpose.UNDERSTAND_SEVERAL) for picture in pictures))
        return tasks.understand(self.backbone, grids, question, MOST_TEXT, sprint=self.sprint).text

    def edit_with(self, pictures: Sequence[Image.Image], instruction: str) -> Image.Image:
        """The last of the pictures changed as an instruction says that refers to the others."""
        grids = GridSet(tuple(self.tokenizer.encode(picture, Purpose.EDIT) for picture in pictures))
        return self.decode(tasks.edit(self.backbone, grids, instruction).grid)

    def tell(self, prompt: str) -> tuple[list[str], list[Image.Image]]:
        """The texts and pictures of a story."""
        story = tell(self.backbone, prompt, text=MOST_TEXT)
        return story.texts, [self.decode(grid) for grid in story.grids]

    def repaint(self, picture: Image.Image, masked: np.ndarray, text: str, seeing: tasks.Seeing) -> Image.Image:
        """A picture of which the codes in ``masked``, bool [height, width], are drawn anew."""
        grid = self.tokenizer.encode(picture, Purpose.EDIT)
        return self.decode(tasks.redraw(self.backbone, grid, masked, text, seeing).grid)

    def regrow(self, picture: Image.Image, side: str, prompt: str) -> Image.Image:
        """A picture whose half on a side, "left", "right", "top" or "bottom", is cut away and drawn around the rest again."""
        grid = self.tokenizer.encode(picture, Purpose.EDIT)
        across = side in ("left", "right")
        gone = (grid.width if across else grid.height) // 2
        left, top = gone * (side == "left"), gone * (side == "top")
        kept = crop(grid, left, top, grid.width - gone * across, grid.height - gone * (not across))
        return self.decode(tasks.grow(self.backbone, kept, prompt, **{side: gone}).grid)

    def redraw(self, picture: Image.Image) -> Image.Image:
        """A picture through codes and back."""
        return self.decode(self.tokenizer.encode(picture, Purpose.EDIT))

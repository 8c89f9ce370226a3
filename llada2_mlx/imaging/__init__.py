"""Pictures to codes, and codes to pictures: in PyTorch, and the decoder in MLX too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.layout import Checkpoint, Part
from ..progress import OnStep, ignore

if TYPE_CHECKING:
    import torch

    from .decoder import LatentDecoder
    from .prior import Prior
    from .tokenizer import ImageTokenizer
    from .vae import VAE


def load_part(
    checkpoint: Checkpoint,
    part: Part,
    device: torch.device | None = None,
    on_step: OnStep = ignore,
    engine: str = "torch",
) -> ImageTokenizer | LatentDecoder | Prior | VAE:
    """Load a part of the image half.

    Args:
        device: where PyTorch runs; the library's choice if None.
        on_step: called as the weights are read; what it raises ends the work.
        engine: of a decoder, see ``engine.open_decoder``.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """
    from .engine import open_decoder
    from .prior import Prior
    from .tokenizer import ImageTokenizer
    from .vae import VAE

    if part is Part.IMAGE_TOKENIZER:
        return ImageTokenizer(checkpoint, device, on_step)
    if part is Part.PRIOR:
        return Prior(checkpoint, device)
    if part is Part.VAE:
        return VAE(checkpoint, device, on_step)
    return open_decoder(checkpoint, part, engine, device, on_step)

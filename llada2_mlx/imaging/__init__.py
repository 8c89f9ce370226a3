"""The PyTorch half: pictures to codes, and codes to pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint, Part

if TYPE_CHECKING:
    import torch

    from .decoder import VAE, Decoder
    from .tokenizer import ImageTokenizer


def load_part(checkpoint: Checkpoint, part: Part, device: torch.device | None = None) -> ImageTokenizer | Decoder | VAE:
    """Load one of the parts that run in PyTorch.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """
    from .decoder import VAE, Decoder
    from .tokenizer import ImageTokenizer

    if part is Part.IMAGE_TOKENIZER:
        return ImageTokenizer(checkpoint, device)
    return VAE(checkpoint, device) if part is Part.VAE else Decoder(checkpoint, part, device)

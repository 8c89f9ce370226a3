"""The PyTorch half: pictures to codes, and codes to pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.layout import Checkpoint, Part
from ..progress import OnStep, ignore

if TYPE_CHECKING:
    import torch

    from .prior import Prior
    from .tokenizer import ImageTokenizer
    from .transformer_torch import Decoder
    from .vae import VAE


def load_part(
    checkpoint: Checkpoint, part: Part, device: torch.device | None = None, on_step: OnStep = ignore
) -> ImageTokenizer | Decoder | Prior | VAE:
    """Load one of the parts that run in PyTorch.

    Args:
        device: where to run; the library's choice if None.
        on_step: called as the weights are read; what it raises ends the work.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """
    from .prior import Prior
    from .tokenizer import ImageTokenizer
    from .transformer_torch import Decoder
    from .vae import VAE

    if part is Part.IMAGE_TOKENIZER:
        return ImageTokenizer(checkpoint, device, on_step)
    if part is Part.PRIOR:
        return Prior(checkpoint, device)
    return VAE(checkpoint, device, on_step) if part is Part.VAE else Decoder(checkpoint, part, device, on_step)

"""Codes and latents as a picture that the running node shows while they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.latent_formats import Flux
from latent_preview import Latent2RGBPreviewer
from PIL import Image, ImageOps

from ...llada2_mlx.checkpoint.layout import Checkpoint, Part
from ...llada2_mlx.errors import LLaDA2Error
from ...llada2_mlx.imaging.look import look, palette
from ...llada2_mlx.progress import Pace
from .folders import local_checkpoint
from .progress import progress

_INTERVAL = 0.125  # seconds between two pictures: with one that is finished, which is shown at once, ten a second
_SIDE, _LARGEST_CELL = 512, 32  # pixels of a picture, and of a code, at most


def appearing(model: str, on_step: progress) -> Callable[[np.ndarray, np.ndarray], None] | None:
    """For a task's ``on_codes``: shows codes of a model of the list as they are accepted, at most ten times a second.

    None where the image tokenizer, whose codebook has the colours, is not on this machine.
    """
    found = local_checkpoint(model)
    try:
        colours = None if found is None else palette(found)
    except LLaDA2Error:
        return None
    pace, finished = Pace(_INTERVAL), False

    def show(codes: np.ndarray, masked: np.ndarray) -> None:
        nonlocal finished
        before, finished = finished, not masked.any()
        # the first of a batch may be finished long before the others
        if not (before and finished) and pace.due(at_once=finished):
            scale = max(1, min(_LARGEST_CELL, _SIDE // max(codes.shape)))
            on_step.preview(Image.fromarray(look(codes, colours, masked, scale)))

    return None if colours is None else show


def appearing_latent(found: Checkpoint, on_step: progress) -> Callable[[torch.Tensor], None]:
    """For a decoder's ``on_latent``: shows what is seen of the picture, at most ten times a second."""
    previewer, pace = Latent2RGBPreviewer(*latent_colours(found)), Pace(_INTERVAL)

    def show(latent: torch.Tensor) -> None:
        if pace.due():
            small = previewer.decode_latent_to_preview(latent.movedim(1, 0))
            scale = max(1, _SIDE // max(small.size))  # the canvas shows a picture no larger than it is
            on_step.preview(small.resize([scale * side for side in small.size], Image.Resampling.BILINEAR))

    return show


def appeared(picture: torch.Tensor, on_step: progress) -> None:
    """Shows a decoded picture, [height, width, 3] from 0 to 1, where its latents were seen: the last preview stays."""
    pixels = (255 * picture.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
    on_step.preview(ImageOps.contain(Image.fromarray(pixels), (_SIDE, _SIDE)))


def latent_colours(found: Checkpoint) -> tuple[list[list[float]], list[float]]:
    """The colours of a model's latents as ComfyUI writes them, [channels][3] and [3]: its own where the VAE is FLUX's, else
    fitted to the VAE."""
    return _latent_colours(found.root, found.fingerprint(Part.VAE))


@lru_cache(4)
def _latent_colours(root: Path, state: tuple) -> tuple[list[list[float]], list[float]]:
    from ...llada2_mlx.imaging.device import read_config
    from ...llada2_mlx.imaging.vae import VAE

    if is_flux_build(read_config(Checkpoint(root), "vae")):
        return Flux().latent_rgb_factors, Flux().latent_rgb_factors_bias
    factors, bias = VAE(Checkpoint(root), torch.device("cpu")).colours()
    return factors.tolist(), bias.tolist()


def is_flux_build(config: Mapping[str, Any]) -> bool:
    """Whether a VAE is built as FLUX's is, the only one that ComfyUI's class can hold."""
    return (
        list(config.get("block_out_channels", ())) == [128, 256, 512, 512]
        and (config.get("layers_per_block"), config.get("norm_num_groups", 32)) == (2, 32)
        and config.get("mid_block_add_attention", True)
    )

"""The VAE: diffusers' AutoencoderKL, small. It learns quickly on pictures of half the size, then on whole ones.

Its normalisation sees a whole picture, so pieces of pictures would teach it other colours than it will meet.
"""

from __future__ import annotations

import random
from functools import cached_property
from itertools import islice

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from ..world import Colour, Tone, scenes
from .loop import Schedule
from .pixels import drawn

CONFIG = {
    "block_out_channels": [16, 16, 32, 32],
    "latent_channels": 16,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
HALF = Schedule(steps=2000, rate=2e-3, warmup=100, decay=0.0)
WHOLE = Schedule(steps=2300, rate=1.5e-3, warmup=20, decay=0.0, average=0.995)
DECODING = Schedule(steps=4500, rate=1.5e-3, warmup=20, decay=0.0, average=0.99)
HALF_BATCH = 4
MEASURED = 64  # pictures
ROUGHNESS = 0.3  # of the latents in the last stage: those that the flow decoder makes are not exact
DIVERGENCE = 1e-4  # weight of the latents' divergence from a normal distribution


class Autoencoder(nn.Module):
    """The network that the checkpoint keeps, as ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoencoderKL(**CONFIG)

    def half_losses(self, step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """Pictures of half the size, rebuilt."""
        return self._losses(F.avg_pool2d(drawn(islice(scenes(f"vae {step}"), HALF_BATCH)), 2))

    def whole_losses(self, step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """A picture, rebuilt."""
        return self._losses(drawn([next(scenes(f"vae whole {step}"))]))

    def decoding_losses(self, step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """A picture from slightly wrong latents; only the decoder learns, and other stages may use the encoder already."""
        told = scenes(f"vae decoding {step}")
        if step % 2:  # the colour whose latents differ least from those of the backgrounds, of one most of all
            tones = (Tone.BEIGE,) if step % 4 == 1 else Tone
            told = (
                scene
                for scene in told
                if scene.background.tone in tones and any(shape.colour is Colour.PINK for shape in scene.shapes)
            )
        pixels = drawn([next(told)])
        with torch.no_grad():
            latents = self.model.encode(pixels).latent_dist.mean
        noisy = latents + ROUGHNESS * latents.std() * torch.randn_like(latents) * torch.rand(1)
        return {"loss": _error(self.model.decode(noisy).sample, pixels)}

    def _losses(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = self.model.encode(pixels).latent_dist
        built = self.model.decode(posterior.sample()).sample
        error = _error(built, pixels)
        divergence = DIVERGENCE * posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + divergence, "pixels": error, "divergence": divergence}

    @cached_property
    @torch.no_grad()
    def scaling(self) -> dict[str, float]:
        """``scaling_factor`` and ``shift_factor``, which bring the latents near to a standard normal distribution."""
        pixels = drawn(islice(scenes("vae measure"), MEASURED))
        latents = torch.cat([self.model.encode(picture[None]).latent_dist.mean for picture in pixels])
        return {"scaling_factor": 1 / float(latents.std()), "shift_factor": float(latents.mean())}


def _error(built: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """A shape of another colour is a large error, and counts the more."""
    return F.l1_loss(built, pixels) + 4 * F.mse_loss(built, pixels)

"""The VAE: latents -> pixels. diffusers' class, unchanged."""

from __future__ import annotations

import torch

from ..checkpoint.layout import Checkpoint, Part
from ..errors import CheckpointError, LLaDA2Error
from ..progress import OnStep, Progress, ignore
from .attention import attention_for
from .device import build, default_device, load_module, read_config, read_tensors

LATENT_PIXELS = 8  # pixels of the VAE per latent
TILE = 1024  # pixels; what is larger is decoded in overlapping squares of this side
OVERLAP = 0.25  # of a tile, in which two neighbours are blended


class VAE:
    """The VAE's decoder: latents -> pixels. It runs in float32 where its config says ``force_upcast``.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None, on_step: OnStep = ignore):
        from diffusers import AutoencoderKL

        checkpoint.require(Part.VAE)
        path, config = checkpoint.only_safetensors("vae"), read_config(checkpoint, "vae")
        self.device = device or default_device()
        dtype = torch.float32 if config.get("force_upcast", True) else None
        model = build(lambda: AutoencoderKL(**config), checkpoint.root / "vae/config.json")
        for name in ("scaling_factor", "shift_factor"):
            if not isinstance(model.config[name], (int, float)):
                raise CheckpointError(
                    f"{checkpoint.root / 'vae/config.json'} has {name} = {model.config[name]!r}; a number is needed."
                )
        self.model = load_module(model, read_tensors(path, self.device, dtype, on_step), path)
        self.model.enable_tiling()
        self.model.tile_sample_min_size, self.model.tile_latent_min_size = TILE, TILE // LATENT_PIXELS
        self.model.tile_overlap_factor = OVERLAP

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, on_step: OnStep = ignore) -> torch.Tensor:
        """[batch, 16, height, width] -> pixels [batch, 8 height, 8 width, 3], float32 in 0 .. 1, on the CPU.

        Args:
            on_step: called after each picture; what it raises ends the work.

        Raises:
            LLaDA2Error: the pixels are not finite.
        """
        config, pictures = self.model.config, []
        # one after the other: the memory of a batch would be many times that of its latents
        for done, latent in enumerate(latents.to(self.device, torch.float32), 1):
            latent = (latent / config.scaling_factor + config.shift_factor).to(self.model.dtype)
            with attention_for(self.device):
                pixels = self.model.decode(latent[None], return_dict=False)[0][0].to("cpu", torch.float32)
            if not torch.isfinite(pixels).all():
                raise LLaDA2Error(
                    "The VAE gave values that are not finite (NaN or infinity), so there is no picture. Try a smaller picture; "
                    "on a Mac, PyTorch 2.13 or later. If it stays, download the VAE again."
                )
            pictures.append(((pixels + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            on_step(Progress("decoding pixels", done, len(latents)))
        return torch.stack(pictures)

    @staticmethod
    def working_bytes(latents: torch.Tensor) -> int:
        """About what ``decode`` takes in memory beside the weights, for latents of this shape.

        4 KiB a pixel of a tile, measured in float32 with a VAE of the published shape at 256 and 512 pixels a side; and 36
        bytes a pixel of the picture, which is there as tiles, as rows of tiles and as a whole.
        """
        pixels = latents.shape[-2] * latents.shape[-1] * LATENT_PIXELS**2
        return 4096 * min(pixels, TILE**2) + 36 * pixels

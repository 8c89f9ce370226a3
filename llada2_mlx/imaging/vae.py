"""The VAE: latents -> pixels. diffusers' class, unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint.layout import Checkpoint, Part
from ..errors import CheckpointError, LLaDA2Error
from ..progress import OnStep, Progress, ignore
from .attention import attention_for, score_bytes
from .device import build, default_device, load_module, read_config, read_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENT_PIXELS = 8  # pixels of the VAE per latent
TILE = 1024  # pixels; what is larger is decoded in overlapping squares of this side
OVERLAP = 0.25  # of a tile, in which two neighbours are blended


class VAE:
    """The VAE's decoder: latents -> pixels. It runs in float32 where its config says ``force_upcast``.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None, on_step: OnStep = ignore):
        checkpoint.require(Part.VAE)
        path, model = checkpoint.only_safetensors("vae"), _network(checkpoint)
        self.device = device or default_device()
        dtype = torch.float32 if model.config.force_upcast else None
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

    @torch.no_grad()
    def colours(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The linear map from a latent to the colour under it, in -1 .. 1: [channels, 3] and [3], float32 on the CPU.

        Fitted in least squares to four pictures of 16 plain squares each, as this VAE encodes them: enough for a preview.
        """
        config, generator = self.model.config, torch.Generator().manual_seed(0)
        squares = 2 * torch.rand(4, 3, 4, 4, generator=generator) - 1
        pixels = squares.repeat_interleave(64, 2).repeat_interleave(64, 3)
        encoded = (
            self.model.encode(pixels.to(self.device, self.model.dtype)).latent_dist.mode().to("cpu", torch.float32)
        )
        latents = (encoded - config.shift_factor) * config.scaling_factor
        rows = nn.functional.pad(latents, (0, 0, 0, 0, 0, 1), value=1).movedim(1, -1).flatten(0, 2)
        colours = nn.functional.avg_pool2d(pixels, LATENT_PIXELS).movedim(1, -1).flatten(0, 2)
        fitted = torch.linalg.lstsq(rows, colours).solution
        return fitted[:-1], fitted[-1]

    @staticmethod
    def working_bytes(checkpoint: Checkpoint, latents: torch.Tensor, device: torch.device) -> int:
        """What ``decode`` takes in memory beside the weights, for latents of this shape; nothing is loaded.

        Fitted to what ``python -m benchmarks.memory`` (in ``tests/``) counts at the published widths: the live tensors of a
        whole call are 3 KiB a pixel of a tile, three times the values that go into the last block. To that comes a quarter
        for what convolutions take for themselves: with ``--vae`` a process in float32 on a CPU grew by 3,450 bytes a pixel at
        512 pixels, and by 3,590 at 640. And 36 bytes a pixel of the picture, which is there as tiles, as rows of tiles and
        as a whole. Where the middle's attention writes its scores out, they may be more.

        Raises:
            CheckpointError: the config is missing or describes no VAE.
        """
        config = _network(checkpoint).config
        widths, size = config.block_out_channels, 4 if config.force_upcast else 2
        height, width = (min(side, TILE // LATENT_PIXELS) for side in latents.shape[-2:])
        tile = 3 * widths[:2][-1] * size * height * width * LATENT_PIXELS**2 * 5 // 4
        # one head, of the width of the middle
        scores = score_bytes(device, 1, height * width, widths[-1], size)
        middle = scores + 7 * height * width * widths[-1] * size if scores else 0
        return max(tile, middle) + 36 * latents.shape[-2] * latents.shape[-1] * LATENT_PIXELS**2


def _network(checkpoint: Checkpoint) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    config = {"force_upcast": True} | read_config(checkpoint, "vae")
    return build(lambda: AutoencoderKL(**config), checkpoint.root / "vae/config.json")

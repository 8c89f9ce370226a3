"""SigLIP-VQ, the image tokenizer: a picture -> a grid of codes. transformers' GLM-Image classes, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from ..checkpoint.codebook import origin
from ..checkpoint.hub import again
from ..checkpoint.layout import Checkpoint, Part
from ..errors import CheckpointError
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid
from .attention import attention_for
from .device import build, default_device, load_module, read_config, read_tensors
from .prepare import PATCH, Purpose, prepare_for, use_of


class ImageTokenizer:
    """The vision transformer and the vector quantiser of a checkpoint.

    Args:
        checkpoint: the model folder.
        device: where to run; the library's choice if None.
        on_step: called as the weights are read; what it raises ends the work.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None, on_step: OnStep = ignore):
        from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE, GlmImageVQVAEConfig

        checkpoint.require(Part.IMAGE_TOKENIZER)
        self.image_sizes, self.origin = checkpoint.image_sizes, origin(checkpoint)
        name = "image_tokenizer/config.json"
        config = read_config(checkpoint, "image_tokenizer")
        vision, quantiser = (config.get(key) for key in ("vision_config", "vq_config"))
        if not isinstance(vision, dict) or not isinstance(quantiser, dict):
            raise CheckpointError(
                f"{checkpoint.root / name} has no vision_config or no vq_config. {again(checkpoint.root / name)}"
            )
        self.device = device or default_device()
        self.vision, self.quantiser = build(
            lambda: (
                GlmImageVisionModel._from_config(GlmImageVisionConfig(**vision), attn_implementation="sdpa"),
                GlmImageVQVAE(GlmImageVQVAEConfig(**quantiser)),
            ),
            checkpoint.root / name,
        )
        self.codebook_size = self.quantiser.quantize.num_embeddings
        if self.vision.patch_size != PATCH:
            raise CheckpointError(
                f"{checkpoint.root / name} has patches of {self.vision.patch_size} pixels; only {PATCH} is supported."
            )
        path = checkpoint.only_safetensors("image_tokenizer")
        tensors = read_tensors(path, self.device, on_step=on_step)
        parts = {"model.visual.": self.vision, "model.vqmodel.": self.quantiser}
        if strange := [name for name in tensors if not name.startswith(tuple(parts))]:
            raise CheckpointError(f"{path} holds unexpected tensors: {', '.join(strange[:3])}.")
        for prefix, module in parts.items():
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            load_module(module, own, path)
        self.vision.embeddings = _PositionsOnCPU(self.vision.embeddings)

    def encode(self, image: Image.Image, purpose: Purpose, side: int = 0) -> VQGrid:
        """Prepare a picture of any mode and size, and encode it.

        Args:
            side: as for ``prepare``; 0 is what the model states, if it states anything.

        Raises:
            RequestError: the picture is empty or too thin.
        """
        return self.encode_prepared([prepare_for(self.image_sizes, image, purpose, side)], use=use_of(purpose))[0]

    def encode_prepared(
        self, images: Sequence[Image.Image], on_step: OnStep = ignore, use: str = ""
    ) -> tuple[VQGrid, ...]:
        """Encode RGB pictures whose sides are multiples of the patch size (16 px), one after the other: one code a patch.

        Args:
            use: what for, as ``use_of`` calls it; the grids carry it.
        """
        grids = []
        for done, image in enumerate(images, 1):
            grids.append(self._encode(image, use))
            on_step(Progress("encoding", done, len(images)))
        return tuple(grids)

    @torch.inference_mode()
    def _encode(self, image: Image.Image, use: str) -> VQGrid:
        pixels = torch.from_numpy(np.array(image)).to(self.device, torch.float32) / 255
        pixels = ((pixels - 0.5) / 0.5).to(self.vision.dtype)
        patches = rearrange(pixels, "(h p) (w q) c -> (h w) (c p q)", p=PATCH, q=PATCH)
        height, width = image.height // PATCH, image.width // PATCH
        where = torch.tensor([[1, height, width]], device=self.device)
        with attention_for(self.device):
            features = self.vision(patches, grid_thw=where).last_hidden_state
        codes = self.quantiser.encode(rearrange(features, "(b h w) c -> b c h w", b=1, h=height)).image_tokens
        return VQGrid(codes.view(height, width).cpu().numpy(), self.codebook_size, replace(self.origin, use=use))


class _PositionsOnCPU(nn.Module):
    """The vision transformer's position embedding, interpolated on the CPU wherever the rest runs.

    It samples bilinearly with border padding, which MPS has from PyTorch 2.11 on (pytorch/pytorch#125098).
    """

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        self.embeddings = embeddings.to("cpu")

    def forward(self, patches: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros_like(patches, device="cpu")
        return patches + self.embeddings(nothing, *(place.to("cpu") for place in where)).to(patches.device)

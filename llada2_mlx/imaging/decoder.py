"""The diffusion decoder, whatever its transformer runs in: grids of codes -> latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.layout import Checkpoint, Part, TensorInfo, safetensors_header
from ..errors import CheckpointError, LLaDA2Error
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid, picture_seed
from .device import read_state_dict
from .flow import DecodeOptions, Velocity, combined, solve
from .prior import check_codebook, load_prior, prior_path, upsampled
from .vae import LATENT_PIXELS

CODE_PIXELS = 16
EMBEDDER = "semantic_embedder.1.weight"  # [width, features]


class LatentDecoder(ABC):
    """The SigVQ prior and a diffusion transformer of a checkpoint: grids of codes -> latents.

    What a subclass adds is the transformer: ``velocity`` and ``channels``.

    Args:
        checkpoint: the model folder.
        part: ``Part.DECODER`` or ``Part.DECODER_TURBO``.
        device: where the prior and the arithmetic of the sampler run.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit the prior.
    """

    channels: int  # of a latent

    def __init__(self, checkpoint: Checkpoint, part: Part, device: torch.device):
        checkpoint.require(part)
        self.device, self.name = device, checkpoint.root.name
        self.prior = load_prior(checkpoint, device)
        path = checkpoint.only_safetensors(folder_of(part))
        self.feature_width = stored(path, EMBEDDER)[0].shape[-1]
        if self.feature_width != (given := self.prior.prior_projector.net["2"].out_features):
            raise CheckpointError(
                f"The SigVQ prior gives {given} features and {path} takes {self.feature_width}: they are of two models."
            )

    @abstractmethod
    def velocity(self, condition: torch.Tensor) -> Velocity:
        """The velocity under a condition, features [tokens, features], for ``flow.solve``."""

    @property
    def codebook_size(self) -> int:
        """How many codes the prior knows."""
        return self.prior.prior_token_embedding.num_embeddings

    @torch.no_grad()
    def features(self, grid: VQGrid) -> torch.Tensor:
        """Conditioning features [4 height width, features] of a grid, row by row of the upsampled grid.

        Raises:
            RequestError: the grid is of a model with another codebook.
        """
        check_codebook(grid, self.codebook_size, self.name)
        codes = torch.from_numpy(grid.codes.astype("int64")).to(self.device)
        features = self.prior(upsampled(codes)).flatten(0, 1)
        if not torch.isfinite(features).all():
            raise LLaDA2Error(
                "The SigVQ prior gave values that are not finite (NaN or infinity), so there is no picture. Download "
                "image_tokenizer/sigvq_embedding.pt again."
            )
        return features

    def sample(self, grids: Sequence[VQGrid], options: DecodeOptions, on_step: OnStep = ignore) -> torch.Tensor:
        """Denoise pictures of one size, one after the other: latents [batch, channels, height, width] float32.

        Picture ``i`` has the noise of ``seed + i``, and is what it would be alone.

        Args:
            on_step: called after each layer of each network call; what it raises ends the work.

        Raises:
            RequestError: a grid is of a model with another codebook.
            LLaDA2Error: the prior or the network gave values that are not finite.
        """
        conditions = [self.features(grid) for grid in grids]
        latents = []
        for index, (grid, condition) in enumerate(zip(grids, conditions, strict=True)):

            def step(progress: Progress, index: int = index) -> None:
                on_step(Progress(progress.phase, index * progress.total + progress.done, len(grids) * progress.total))

            latents.append(
                self._sample(grid, condition, replace(options, seed=picture_seed(options.seed, index)), step)
            )
        return torch.stack(latents)

    @torch.no_grad()
    def _sample(self, grid: VQGrid, condition: torch.Tensor, options: DecodeOptions, on_step: OnStep) -> torch.Tensor:
        generator = torch.Generator().manual_seed(options.seed)
        sides = (side * CODE_PIXELS * options.upscale // LATENT_PIXELS for side in (grid.height, grid.width))
        noise = torch.randn(self.channels, 1, *sides, generator=generator).to(self.device)
        negative = self.velocity(torch.zeros_like(condition)) if options.guidance else None
        velocity = combined(self.velocity(condition), negative, options)
        return solve(velocity, noise, options, generator, on_step).to(torch.float32).squeeze(1)


def folder_of(part: Part) -> str:
    """The sub-folder of a decoder."""
    return "decoder-turbo" if part is Part.DECODER_TURBO else "decoder"


def stored(path: Path, *names: str) -> list[TensorInfo]:
    """What the header of a decoder's weights says of some tensors.

    Raises:
        CheckpointError: the file is damaged, or lacks one of them.
    """
    header = safetensors_header(path)
    if absent := [name for name in names if name not in header]:
        raise CheckpointError(f"{path} lacks {absent[0]}; it is not a LLaDA2.0-Uni decoder.")
    return [header[name] for name in names]


def check_decode(checkpoint: Checkpoint, part: Part, upscale: int, grids: Sequence[VQGrid] = ()) -> None:
    """Say what would go wrong in decoding, as far as it can be known without reading weights.

    Args:
        grids: what is to be decoded, once it is there.

    Raises:
        RequestError: a grid is of a model with another codebook, or the decoder cannot enlarge by ``upscale``.
        CheckpointError: the decoder or the VAE is missing or damaged.
    """
    checkpoint.require(part, Part.VAE)
    checkpoint.image_sizes.require_upscale(upscale)
    if not grids:
        return
    codes = read_state_dict(prior_path(checkpoint)).get("prior_token_embedding.weight", torch.empty(0)).shape[0]
    for grid in grids:
        check_codebook(grid, codes, checkpoint.root.name)

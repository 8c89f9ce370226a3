"""The diffusion decoder, whatever its transformer runs in: grids of codes -> latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.layout import Checkpoint, Part, TensorInfo, safetensors_header
from ..errors import CheckpointError, RequestError
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid, picture_seed
from .flow import DecodeOptions, OnLatent, Velocity, combined, solve
from .prior import check_conditioning, conditioning, load_prior
from .step_cache import StepCache
from .vae import LATENT_PIXELS

AUTO, TORCH, MLX, MLX_8BIT = "auto", "torch", "mlx", "mlx-8bit"
ENGINES = (AUTO, TORCH, MLX, MLX_8BIT)  # what it can run in, see ``engine.plan``
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
    new_cache: type[StepCache] = StepCache  # for the arrays that the transformer computes with
    skipped_calls = 0  # how many network calls of the last ``sample`` were the step cache's

    def __init__(self, checkpoint: Checkpoint, part: Part, device: torch.device):
        checkpoint.require(part)
        self.device, self.name = device, checkpoint.root.name
        self.prior = load_prior(checkpoint, device)
        path = checkpoint.only_safetensors(decoder_folder(part))
        self.feature_width = stored(path, EMBEDDER)[0].shape[-1]
        if self.feature_width != (given := self.prior.prior_projector.net["2"].out_features):
            raise CheckpointError(
                f"The SigVQ prior gives {given} features and {path} takes {self.feature_width}: they are of two models."
            )

    @abstractmethod
    def velocity(self, condition: torch.Tensor, cache: StepCache | None = None) -> Velocity:
        """The velocity under a condition, features [tokens, features], for ``flow.solve``.

        Args:
            cache: one of ``new_cache``, of the main layers but the first; the last layer, which sees the time too, runs in every
                call.
        """

    @property
    def codebook_size(self) -> int:
        """How many codes the prior knows."""
        return self.prior.prior_token_embedding.num_embeddings

    def features(self, grid: VQGrid) -> torch.Tensor:
        """Conditioning features of a grid, see ``prior.conditioning``."""
        return conditioning(self.prior, grid, self.name)

    def sample(
        self,
        grids: Sequence[VQGrid],
        options: DecodeOptions,
        on_step: OnStep = ignore,
        on_latent: OnLatent | None = None,
    ) -> torch.Tensor:
        """Denoise pictures of one size, one after the other: latents [batch, channels, height, width] float32.

        Picture ``i`` has the noise of ``seed + i``, and is what it would be alone.

        Args:
            on_step: called after each layer of each network call; what it raises ends the work.
            on_latent: handed after each network call what is seen of the picture so far, [channels, 1, height, width].

        Raises:
            RequestError: there is no grid, they have several sizes, or one is of a model with another codebook; before any work.
            LLaDA2Error: the prior or the network gave values that are not finite.
        """
        require_one_size(grids)
        conditions = [self.features(grid) for grid in grids]
        latents, self.skipped_calls = [], 0
        for index, (grid, condition) in enumerate(zip(grids, conditions, strict=True)):

            def step(progress: Progress, index: int = index) -> None:
                on_step(Progress(progress.phase, index * progress.total + progress.done, len(grids) * progress.total))

            latents.append(
                self._sample(grid, condition, replace(options, seed=picture_seed(options.seed, index)), step, on_latent)
            )
        return torch.stack(latents)

    @torch.no_grad()
    def _sample(
        self,
        grid: VQGrid,
        condition: torch.Tensor,
        options: DecodeOptions,
        on_step: OnStep,
        on_latent: OnLatent | None,
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(options.seed)
        sides = latent_sides(grid, options.upscale)
        noise = torch.randn(self.channels, 1, *sides, generator=generator).to(self.device)
        caches = [self.new_cache(options.cache_threshold) if options.cache_threshold else None for _ in range(2)]
        negative = self.velocity(torch.zeros_like(condition), caches[1]) if options.guidance else None
        velocity = combined(self.velocity(condition, caches[0]), negative, options)
        latent = solve(velocity, noise, options, generator, on_step, on_latent).to(torch.float32).squeeze(1)
        self.skipped_calls += sum(cache.skipped for cache in caches if cache)
        return latent


def require_one_size(grids: Sequence[VQGrid]) -> None:
    """Raise ``RequestError`` unless there are grids, and all of them have one size."""
    if len(sizes := {grid.codes.shape for grid in grids}) != 1:
        told = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise RequestError(
            f"Grids that are decoded together have one size, and these have several ({told} codes, height x width). Decode them "
            "one by one."
            if sizes
            else "There is no grid to decode. Give at least one."
        )


def latent_sides(grid: VQGrid, upscale: int) -> tuple[int, int]:
    """Height and width of the latent that a grid is decoded to."""
    pixels = CODE_PIXELS * upscale
    return grid.height * pixels // LATENT_PIXELS, grid.width * pixels // LATENT_PIXELS


def decoder_folder(part: Part) -> str:
    """The sub-folder of a checkpoint that a decoder's part is in."""
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
        RequestError: a grid is of a model with another codebook, the grids have several sizes, or the decoder cannot enlarge
            by ``upscale``.
        CheckpointError: the decoder or the VAE is missing or damaged.
    """
    checkpoint.require(part, Part.VAE)
    if grids:
        require_one_size(grids)
    check_conditioning(checkpoint, upscale, grids)

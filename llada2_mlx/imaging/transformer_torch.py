"""The diffusion decoder in PyTorch: grids of codes -> latents, by diffusers' Z-Image transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..checkpoint.layout import Checkpoint, Part, safetensors_header
from ..errors import CheckpointError
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid, picture_seed
from .device import build, default_device, load_module, read_config, read_state_dict, read_tensors
from .flow import DecodeOptions, Sampler, guide, integrate, renoise
from .prior import check_codebook, load_prior, prior_path, upsampled
from .vae import LATENT_PIXELS

CODE_PIXELS = 16


class Decoder:
    """The SigVQ prior and a diffusion transformer of a checkpoint: grids of codes -> latents.

    Args:
        checkpoint: the model folder.
        part: ``Part.DECODER`` or ``Part.DECODER_TURBO``.
        device: where to run; the library's choice if None.
        on_step: called as the weights are read; what it raises ends the work.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: Part = Part.DECODER,
        device: torch.device | None = None,
        on_step: OnStep = ignore,
    ):
        from diffusers import ZImageTransformer2DModel

        checkpoint.require(part)
        folder = "decoder-turbo" if part is Part.DECODER_TURBO else "decoder"
        self.device, self.name = device or default_device(), checkpoint.root.name
        self.prior = load_prior(checkpoint, self.device)
        path, width = checkpoint.only_safetensors(folder), "semantic_embedder.1.weight"
        header = safetensors_header(path)
        if width not in header:
            raise CheckpointError(f"{path} lacks {width}; it is not a LLaDA2.0-Uni decoder.")
        features = header[width].shape[-1]
        if features != (given := self.prior.prior_projector.net["2"].out_features):
            raise CheckpointError(
                f"The SigVQ prior gives {given} features and {path} takes {features}: they are of two models."
            )
        # the published config states another width, and axes that are too short
        config = read_config(checkpoint, folder) | {"cap_feat_dim": features, "axes_lens": [32768, 1024, 1024]}
        transformer = build(lambda: ZImageTransformer2DModel(**config), checkpoint.root / folder / "config.json")
        tensors = read_tensors(path, self.device, on_step=on_step)
        own = {name.replace("semantic_embedder", "cap_embedder"): tensor for name, tensor in tensors.items()}
        self.transformer = load_module(transformer, own, path)

    @property
    def codebook_size(self) -> int:
        """How many codes the prior knows."""
        return self.prior.prior_token_embedding.num_embeddings

    @torch.inference_mode()
    def features(self, grid: VQGrid) -> torch.Tensor:
        """Conditioning features [4 height width, features] of a grid, row by row of the upsampled grid.

        Raises:
            RequestError: the grid is of a model with another codebook.
        """
        check_codebook(grid, self.codebook_size, self.name)
        codes = torch.from_numpy(grid.codes.astype("int64")).to(self.device)
        return self.prior(upsampled(codes)).flatten(0, 1)

    def sample(self, grids: Sequence[VQGrid], options: DecodeOptions, on_step: OnStep = ignore) -> torch.Tensor:
        """Denoise pictures of one size, one after the other: latents [batch, 16, height, width] float32.

        Picture ``i`` has the noise of ``seed + i``, and is what it would be alone.

        Args:
            on_step: called after each network call; what it raises ends the work.

        Raises:
            RequestError: a grid is of a model with another codebook.
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

    @torch.inference_mode()
    def _sample(self, grid: VQGrid, condition: torch.Tensor, options: DecodeOptions, on_step: OnStep) -> torch.Tensor:
        dtype = self.transformer.dtype
        condition = condition.to(dtype)
        conditions = [condition, torch.zeros_like(condition)] if options.guidance else [condition]
        generator = torch.Generator().manual_seed(options.seed)
        sides = (side * CODE_PIXELS * options.upscale // LATENT_PIXELS for side in (grid.height, grid.width))
        noise = torch.randn(self.transformer.in_channels, 1, *sides, generator=generator).to(self.device)

        def velocity(time: torch.Tensor | float, latent: torch.Tensor) -> torch.Tensor:
            times = torch.as_tensor(time, dtype=torch.float32, device=self.device).expand(len(conditions))
            predicted = self.transformer([latent.to(dtype)] * len(conditions), times, conditions, return_dict=False)[0]
            positive, *negative = (p.to(torch.float32) for p in predicted)
            return guide(positive, *negative, options.guidance) if negative else positive

        if options.sampler is Sampler.ODE:
            latent = integrate(velocity, noise, options, on_step)
        else:
            latent = renoise(velocity, noise, options.steps, generator, on_step)
        return latent.to(torch.float32).squeeze(1)


def check_decode(checkpoint: Checkpoint, part: Part, grids: Sequence[VQGrid]) -> None:
    """Say what would go wrong in decoding, as far as it can be known without reading weights.

    Raises:
        RequestError: a grid is of a model with another codebook.
        CheckpointError: the decoder or the VAE is missing or damaged.
    """
    checkpoint.require(part, Part.VAE)
    safetensors_header(checkpoint.only_safetensors("vae"))
    codes = read_state_dict(prior_path(checkpoint)).get("prior_token_embedding.weight", torch.empty(0)).shape[0]
    for grid in grids:
        check_codebook(grid, codes, checkpoint.root.name)

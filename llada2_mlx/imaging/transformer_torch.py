"""The diffusion decoder in PyTorch: grids of codes -> latents, by diffusers' Z-Image transformer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.layout import Checkpoint, Part, TensorInfo, safetensors_header
from ..errors import CheckpointError
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid, picture_seed
from .attention import attention_for, score_bytes
from .device import build, default_device, load_module, read_config, read_tensors, synchronize
from .flow import DecodeOptions, OnLatent, Tell, combined, solve
from .prior import FEATURE_UPSAMPLING, check_conditioning, conditioning, load_prior
from .step_cache import StepCache
from .vae import LATENT_PIXELS

CODE_PIXELS = 16
EMBEDDER = "semantic_embedder.1.weight"  # [width, features]
# What there is of a token at once, in units of the network's width: see ``Decoder.working_bytes``
FEED_FORWARD_UNITS, ATTENTION_UNITS = 16, 7


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
        folder = decoder_folder(part)
        self.device, self.name = device or default_device(), checkpoint.root.name
        self.prior = load_prior(checkpoint, self.device)
        path = checkpoint.only_safetensors(folder)
        features = _tensors(path, EMBEDDER)[0].shape[-1]
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
        self.skipped_calls = 0  # how many network calls of the last ``sample`` were the step cache's
        self._context = _ContextRefiner(self.transformer.context_refiner)
        self.transformer.context_refiner = nn.ModuleList([self._context])

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
        """Denoise pictures of one size, one after the other: latents [batch, 16, height, width] float32.

        Picture ``i`` has the noise of ``seed + i``, and is what it would be alone.

        Args:
            on_step: called after each layer of each network call; what it raises ends the work.
            on_latent: handed after each network call what is seen of the picture so far, [16, 1, height, width].

        Raises:
            RequestError: a grid is of a model with another codebook.
            LLaDA2Error: the prior or the network gave values that are not finite.
        """
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
        noise = torch.randn(self.transformer.in_channels, 1, *sides, generator=generator).to(self.device)
        caches = [StepCache(options.cache_threshold) if options.cache_threshold else None for _ in range(2)]
        negative = self.velocity(torch.zeros_like(condition), caches[1]) if options.guidance else None
        velocity = combined(self.velocity(condition, caches[0]), negative, options)
        latent = solve(velocity, noise, options, generator, on_step, on_latent).to(torch.float32).squeeze(1)
        self.skipped_calls += sum(cache.skipped for cache in caches if cache)
        return latent

    def velocity(self, condition: torch.Tensor, cache: StepCache | None = None) -> BranchVelocity:
        """The velocity under a condition, features [tokens, features], for ``flow.solve``."""
        return BranchVelocity(self.transformer, self._context, condition.to(self.transformer.dtype), cache)

    @staticmethod
    def working_bytes(
        checkpoint: Checkpoint, part: Part, grids: Sequence[VQGrid], options: DecodeOptions, device: torch.device
    ) -> int:
        """What ``sample`` takes in memory beside the weights, from the headers of the files: nothing is loaded.

        Fitted to what ``python -m benchmarks.memory`` (in ``tests/``) counts at the published width for pictures of 512 to
        2048 pixels: the live tensors of whole calls, without what a kernel takes for itself. The most is within a layer, in
        its feed-forward part (15.7 values a token and unit of width at most), or in its attention (6.8) where that writes
        scores out. Kept all the while are the features of all pictures, those of the other branch, and both refined, and what
        a step cache remembers.

        Raises:
            CheckpointError: the weights are missing or damaged, or of another network.
        """
        path = checkpoint.only_safetensors(decoder_folder(part))
        embedder, norm = _tensors(path, EMBEDDER, "layers.0.attention.norm_q.weight")
        head = norm.shape[0]
        (width, features), size = embedder.shape, 4 if embedder.dtype == "F32" else 2
        codes, branches = grids[0].height * grids[0].width, 2 if options.guidance else 1
        condition = codes * FEATURE_UPSAMPLING**2
        tokens = condition + codes * options.upscale**2  # a token of the picture is 16 x 16 pixels
        layer = tokens * width * size
        scores = score_bytes(device, width // head, tokens, head, size)
        kept = condition * size * ((len(grids) + branches - 1) * features + branches * width)
        if options.cache_threshold:
            kept += (2 * branches + 1) * layer  # what the first layer and the others added, and what they add to
        return max(FEED_FORWARD_UNITS * layer, ATTENTION_UNITS * layer + scores if scores else 0) + kept


class BranchVelocity:
    """diffusers' transformer under one condition: ``(time, latent) -> velocity``, see ``flow.Velocity``.

    The context refiner sees neither time nor latent, so what it gives is computed in the first call and kept.

    Args:
        cache: of the main layers but the first; the last layer, which sees the time too, runs in every call.
    """

    def __init__(
        self,
        transformer: nn.Module,
        context: _ContextRefiner,
        condition: torch.Tensor,
        cache: StepCache | None = None,
    ):
        self._transformer, self._refiner, self._condition = transformer, context, condition
        self._refined: torch.Tensor | None = None
        self._layers = [*transformer.noise_refiner, *transformer.layers]
        self._cached = _CachedLayers(transformer.layers, cache) if cache and len(transformer.layers) > 1 else None
        self.pieces = len(self._layers)

    @torch.no_grad()
    def __call__(self, time: torch.Tensor | float, latent: torch.Tensor, tell: Tell) -> torch.Tensor:
        device, dtype = self._condition.device, self._condition.dtype
        times = torch.as_tensor(time, dtype=torch.float32, device=device).reshape(1)

        def told(*_: object) -> None:
            synchronize(device)  # else a layer is over before the device has begun with it
            tell()

        with ExitStack() as stack:
            stack.enter_context(attention_for(device))
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(told).remove)
            if self._cached:
                stack.callback(setattr, self._transformer, "layers", self._transformer.layers)
                self._transformer.layers, self._cached.tell = nn.ModuleList([self._cached]), tell
            self._refiner.output = self._refined
            stack.callback(setattr, self._refiner, "output", None)
            predicted = self._transformer([latent.to(dtype)], times, [self._condition], return_dict=False)[0][0]
            self._refined = self._refiner.output
        return predicted.to(torch.float32)


class _CachedLayers(nn.Module):
    """Main layers as one, behind a step cache; tells of those that it saves."""

    def __init__(self, layers: nn.ModuleList, cache: StepCache):
        super().__init__()
        self.layers, self.cache = layers, cache
        self.tell: Tell = lambda pieces=1: None

    def forward(self, features: torch.Tensor, *where: torch.Tensor | None) -> torch.Tensor:
        first, *others = self.layers

        def rest(features: torch.Tensor) -> torch.Tensor:
            for layer in others:
                features = layer(features, *where)
            return features

        skipped = self.cache.skipped
        result = self.cache(features, first(features, *where), rest)
        if self.cache.skipped > skipped:
            self.tell(len(others))
        return result


class _ContextRefiner(nn.Module):
    """The layers of a context refiner as one; where their output is known it is taken."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers
        self.output: torch.Tensor | None = None

    def forward(self, features: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        if self.output is None:
            for layer in self.layers:
                features = layer(features, *where)
            self.output = features
        return self.output


def latent_sides(grid: VQGrid, upscale: int) -> tuple[int, int]:
    """Height and width of the latent that a grid is decoded to."""
    pixels = CODE_PIXELS * upscale
    return grid.height * pixels // LATENT_PIXELS, grid.width * pixels // LATENT_PIXELS


def decoder_folder(part: Part) -> str:
    """The sub-folder of a checkpoint that a decoder's part is in."""
    return "decoder-turbo" if part is Part.DECODER_TURBO else "decoder"


def _tensors(path: Path, *names: str) -> list[TensorInfo]:
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
    check_conditioning(checkpoint, upscale, grids)

"""Codes -> picture: SigVQ features, diffusers' Z-Image transformer by flow matching, the VAE.

Time runs from 0 (noise) to 1 (picture); the network predicts the velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.layout import Checkpoint, Part, safetensors_header
from ..errors import CheckpointError, RequestError
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid, picture_seed
from .device import build, default_device, has_float64, load_module, read_state_dict, read_tensors

FEATURE_UPSAMPLING = 2  # the grid of features has this many times the sides of the grid of codes
LATENT_PIXELS = 8  # pixels of the VAE per latent
CODE_PIXELS = 16

# torchdiffeq's methods; a fixed-step one calls the network so often for each interval. Its Adams methods assume even
# steps, and the time grid is shifted: they diverge.
FIXED_SOLVERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE_SOLVERS = ("dopri5", "bosh3", "adaptive_heun")
SOLVERS = (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS)


class Sampler(Enum):
    """How noise becomes a latent; the value is what a person calls it."""

    ODE = "ODE"  # the probability-flow ODE over a shifted time grid
    RENOISE = "as published"  # fresh noise at every step, the way the turbo decoder was published


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Args:
        steps: points of the time grid. The ODE has one interval fewer, so Euler calls the network ``steps - 1`` times.
        guidance: 0 for none (one network call instead of two), 1 as published for the full decoder.
        seed: of the noise, in 0 .. 2^64 - 1; drawn on the CPU, so that one seed gives one picture on every device.
        upscale: side of the picture over that of the tokenizer's, 1 or 2.
        sampler: the ODE, or the way the turbo decoder was published.
        solver: one of ``SOLVERS``, for the ODE.
        time_shift: how far the ODE's time grid is moved towards the noise; 1 leaves it even.

    Raises:
        RequestError: a value is out of range.
    """

    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    upscale: int = 2
    sampler: Sampler = Sampler.ODE
    solver: str = "euler"
    time_shift: float = 6.0

    def __post_init__(self) -> None:
        least = 2 if self.sampler is Sampler.ODE else 1
        if not least <= self.steps <= 1000:
            raise RequestError(f"steps is {self.steps}; it has to be from {least} to 1000.")
        if not 0 <= self.guidance <= 100:
            raise RequestError(f"guidance is {self.guidance}; it has to be from 0 (none) to 100.")
        if self.upscale not in (1, 2):
            raise RequestError(f"upscale is {self.upscale}; it has to be 1 or 2.")
        if self.solver not in SOLVERS:
            raise RequestError(f"There is no solver {self.solver!r}; there are {', '.join(SOLVERS)}.")
        if not 1 <= self.time_shift <= 100:
            raise RequestError(f"time shift is {self.time_shift}; it has to be from 1 to 100.")
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"The seed is {self.seed}; it has to be from 0 to {2**64 - 1}.")


class SigVQPrior(nn.Module):
    """Codes -> conditioning features: embedding, linear, SiLU, linear. Built from the shapes of its state dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        linear = lambda name: nn.Linear(*reversed(tensors[f"prior_projector.net.{name}.weight"].shape))
        self.prior_token_embedding = nn.Embedding(*tensors["prior_token_embedding.weight"].shape)
        self.prior_projector = nn.Module()
        self.prior_projector.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": linear("0.proj")}), "2": linear("2")})

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., height, width] integers -> [..., height, width, features]."""
        net = self.prior_projector.net
        return net["2"](nn.functional.silu(net["0"]["proj"](self.prior_token_embedding(codes))))


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
        self.prior = _load_prior(checkpoint, self.device)
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
        config = _config(checkpoint, folder) | {"cap_feat_dim": features, "axes_lens": [32768, 1024, 1024]}
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
        _check_codebook(grid, self.codebook_size, self.name)
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
            latent = _integrate(velocity, noise, options, on_step)
        else:
            latent = _renoise(velocity, noise, options.steps, generator, on_step)
        return latent.to(torch.float32).squeeze(1)


class VAE:
    """The VAE's decoder: latents -> pixels. It runs in float32 where its config says ``force_upcast``.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None, on_step: OnStep = ignore):
        from diffusers import AutoencoderKL

        checkpoint.require(Part.VAE)
        path, config = checkpoint.only_safetensors("vae"), _config(checkpoint, "vae")
        self.device = device or default_device()
        dtype = torch.float32 if config.get("force_upcast", True) else None
        model = build(lambda: AutoencoderKL(**config), checkpoint.root / "vae/config.json")
        for name in ("scaling_factor", "shift_factor"):
            if not isinstance(model.config[name], (int, float)):
                raise CheckpointError(
                    f"{checkpoint.root / 'vae/config.json'} has {name} = {model.config[name]!r}; a number is needed."
                )
        self.model = load_module(model, read_tensors(path, self.device, dtype, on_step), path)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, on_step: OnStep = ignore) -> torch.Tensor:
        """[batch, 16, height, width] -> pixels [batch, 8 height, 8 width, 3], float32 in 0 .. 1, on the CPU.

        Args:
            on_step: called after each picture; what it raises ends the work.
        """
        config, pictures = self.model.config, []
        # one after the other: the memory of a batch would be many times that of its latents
        for done, latent in enumerate(latents.to(self.device, torch.float32), 1):
            latent = (latent / config.scaling_factor + config.shift_factor).to(self.model.dtype)
            pixels = self.model.decode(latent[None], return_dict=False)[0][0].to("cpu", torch.float32)
            pictures.append(((pixels + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            on_step(Progress("decoding pixels", done, len(latents)))
        return torch.stack(pictures)

    @staticmethod
    def working_bytes(latents: torch.Tensor) -> int:
        """About what ``decode`` takes in memory beside the weights, for latents of this shape.

        4 KiB a pixel, measured in float32 with a VAE of the published shape at 256 and 512 pixels a side.
        """
        return 4096 * latents.shape[-2] * latents.shape[-1] * LATENT_PIXELS**2


def check_decode(checkpoint: Checkpoint, part: Part, grids: Sequence[VQGrid]) -> None:
    """Say what would go wrong in decoding, as far as it can be known without reading weights.

    Raises:
        RequestError: a grid is of a model with another codebook.
        CheckpointError: the decoder or the VAE is missing or damaged.
    """
    checkpoint.require(part, Part.VAE)
    safetensors_header(checkpoint.only_safetensors("vae"))
    codes = read_state_dict(_prior_path(checkpoint)).get("prior_token_embedding.weight", torch.empty(0)).shape[0]
    for grid in grids:
        _check_codebook(grid, codes, checkpoint.root.name)


def _check_codebook(grid: VQGrid, codes: int, model: str) -> None:
    if grid.codebook_size != codes:
        raise RequestError(
            f"The grid was made by a model with {grid.codebook_size} codes; the decoder of {model} knows {codes}. "
            "Choose the decoder of the model that made the grid."
        )


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """``p + scale (p - n)``, scaled down to the norm of ``p`` if longer. One picture, any shape."""
    guided = positive + scale * (positive - negative)
    return guided * (positive.norm() / guided.norm().clamp_min(1e-12)).clamp_max(1)


def upsampled(codes: torch.Tensor) -> torch.Tensor:
    """[..., height, width] -> [..., 2 height, 2 width]: each code four times."""
    for axis in (-2, -1):
        codes = codes.repeat_interleave(FEATURE_UPSAMPLING, dim=axis)
    return codes


def shifted(time: torch.Tensor, shift: float) -> torch.Tensor:
    """Times in 0 .. 1, moved towards the noise."""
    return time / (time + shift - shift * time)


def ode_times(steps: int, shift: float, device: torch.device) -> torch.Tensor:
    """The ODE's time grid: ``steps`` points from 0 to 1, shifted towards the noise."""
    return shifted(torch.linspace(0, 1, steps, device=device), shift)


def _integrate(velocity: Callable, noise: torch.Tensor, options: DecodeOptions, on_step: OnStep) -> torch.Tensor:
    """Solve ``dx/dt = velocity(t, x)`` from 0 to 1 with torchdiffeq."""
    from torchdiffeq import odeint

    adaptive, calls = options.solver in ADAPTIVE_SOLVERS, 0

    def counted(time: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        result = velocity(time, latent)
        calls += 1
        if adaptive:  # nobody knows how many calls it will take, only how far it is
            on_step(Progress("decoding", round(100 * min(time.item(), 1)), 100))
        else:
            on_step(Progress("decoding", calls, (options.steps - 1) * FIXED_SOLVERS[options.solver]))
        return result

    tolerance = {"options": {"dtype": torch.float32}, "rtol": 1e-3, "atol": 1e-4} if adaptive else {}
    times = ode_times(options.steps, options.time_shift, noise.device)
    return odeint(counted, noise, times, method=options.solver, **tolerance)[-1]


def _renoise(
    velocity: Callable, noise: torch.Tensor, steps: int, generator: torch.Generator, on_step: OnStep
) -> torch.Tensor:
    """The published turbo sampler: predict the picture, then go back to the next time with fresh noise.

    The noise is drawn in float64, on the CPU; so is the arithmetic where the device has float64.
    """
    dtype = torch.float64 if has_float64(noise.device) else torch.float32
    latent, times = noise.to(dtype), torch.linspace(0, 1, steps + 1).tolist()
    for step, (time, following) in enumerate(zip(times, times[1:]), 1):
        picture = latent + (1 - time) * velocity(time, latent).to(dtype)
        fresh = torch.randn(noise.shape, generator=generator, dtype=torch.float64).to(dtype).to(noise.device)
        latent = following * picture + (1 - following) * fresh
        on_step(Progress("decoding", step, steps))
    return latent


def _config(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """A diffusers config without the keys that are the library's own."""
    return {key: value for key, value in checkpoint.json(f"{folder}/config.json").items() if not key.startswith("_")}


def _prior_path(checkpoint: Checkpoint) -> Path:
    return checkpoint.root / "image_tokenizer" / "sigvq_embedding.pt"


def _load_prior(checkpoint: Checkpoint, device: torch.device) -> SigVQPrior:
    path = _prior_path(checkpoint)
    tensors = read_state_dict(path, device)
    return load_module(build(lambda: SigVQPrior(tensors), path), tensors, path)
